"""Checkpoints come back exactly, on any mesh, after any crash, or say why not."""

import dataclasses
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import object_store
from pref_jax.train.checkpoint import Checkpoints, PreemptionGuard
from pref_jax.train.state import init_state

REPOSITORY = pathlib.Path(__file__).parents[2]
AXES = ("data", "fsdp", "tensor")


def make_mesh(*shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def make_state(mesh, *, width=8, dtype=jnp.float32, impl="threefry2x32"):
    """A train state with every kind of leaf and node that a run has."""
    query = jnp.arange(4 * 8 * width, dtype=dtype).reshape(4, 8, width) / 7
    params = {
        "blocks": {"attention": {"query": query}, "norms": [jnp.ones(8), ()]},
        "embedding": jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16).reshape(16, 4),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            optax.adamw(1e-3), lambda tree: {"blocks": True, "embedding": False}
        ),
    )
    state = init_state(params, optimizer, rng=jax.random.key(7, impl=impl))

    def place(leaf):
        spec = (
            PartitionSpec(None, "fsdp", "tensor") if leaf.ndim == 3 else PartitionSpec()
        )
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(actual, expected):
    """Same types, dtypes and bits; shardings are the caller's."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


def steps_on_disk(folder):
    return sorted(int(path.name) for path in pathlib.Path(folder).iterdir())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_round_trip_keeps_types_bits_and_shardings(folder):
    state = make_state(make_mesh(2, 2, 2), impl="rbg")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(state)
    assert_same(restored, state)
    assert type(restored) is type(state) and restored.anchor == ()
    assert type(restored.opt_state[1]) is optax.MaskedState
    assert jax.random.key_impl(restored.rng) == jax.random.key_impl(state.rng)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.sharding == old.sharding


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 4, 2), (1, 1, 8)])
def test_restores_onto_another_mesh(folder, shape):
    state = make_state(make_mesh(2, 2, 2))
    target = make_mesh(*shape)

    def elsewhere(leaf):
        sharding = NamedSharding(target, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(jax.tree.map(elsewhere, state))
    assert_same(restored, state)
    assert all(leaf.sharding.mesh == target for leaf in jax.tree.leaves(restored))


def test_donating_right_after_save_does_not_change_what_is_saved(folder):
    sharding = NamedSharding(make_mesh(1, 8, 1), PartitionSpec("fsdp"))
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0
    )
    values = np.arange(1 << 20, dtype=np.float32)
    with Checkpoints(folder, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            state = {
                "w": jax.device_put(values * step, sharding),
                "b": jnp.full(9, step),
            }
            checkpoints.save(step, state)
            state = jax.block_until_ready(overwrite(state))
        for step in (1, 2, 3):
            restored = checkpoints.restore(state, step)
            np.testing.assert_array_equal(restored["w"], values * step)
            np.testing.assert_array_equal(restored["b"], np.full(9, step))


def test_a_step_is_listed_only_once_it_is_complete(folder):
    state = {"w": jnp.ones((1 << 20,))}
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(5, state)
        assert checkpoints.latest_step() == 5
        assert steps_on_disk(folder) == [5]


def test_keeps_the_last_and_the_best(folder):
    accuracies = {1: 0.9, 2: 0.5, 3: float("nan"), 4: 0.9, 5: None, 6: 0.1, 7: 0.2}
    options = {"keep_last": 2, "keep_best": 2, "metric": "eval/accuracy"}
    with Checkpoints(folder, **options) as checkpoints:
        for step, value in accuracies.items():
            metrics = None if value is None else {"eval/accuracy": value}
            checkpoints.save(step, {"w": jnp.full(2, step)}, metrics=metrics)
        assert checkpoints.best_step() == 4
    assert steps_on_disk(folder) == [1, 4, 6, 7]
    with Checkpoints(folder, **options) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (4, 7)


def test_best_may_be_the_lowest(folder):
    options = {"keep_best": 1, "metric": "eval/loss", "higher_is_better": False}
    with Checkpoints(folder, **options) as checkpoints:
        for step, loss in [(1, 0.7), (2, 0.6), (3, 0.8), (4, 0.9)]:
            checkpoints.save(step, {"w": jnp.zeros(2)}, metrics={"eval/loss": loss})
        assert checkpoints.best_step() == 2
    assert steps_on_disk(folder) == [2, 4]


def test_another_shape_is_refused_by_path(folder):
    mesh = make_mesh(2, 2, 2)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(mesh, width=16))
        with pytest.raises(ValueError) as error:
            checkpoints.restore(make_state(mesh, width=8))
    lines = str(error.value).split("\n")
    assert lines[0].endswith("does not fit the state asked for: 3 of 11 leaves differ.")
    assert lines[1] == (
        "  params/blocks/attention/query: saved f32[4, 8, 16], needed f32[4, 8, 8]"
    )
    assert lines[-1].startswith("Build the model and the optimiser with the config")


def test_another_dtype_or_random_generator_is_refused(folder):
    mesh = make_mesh(1, 1, 1)
    state = make_state(mesh)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    raw = jax.random.key_data(state.rng)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(
            ValueError, match=r"norms/0: saved f32\[8\], needed bf16\[8\]"
        ):
            checkpoints.restore(dataclasses.replace(state, params=half))
        with pytest.raises(
            ValueError, match=r"rng: saved key<fry>\[\], needed key<rbg>"
        ):
            checkpoints.restore(make_state(mesh, impl="rbg"))
        with pytest.raises(
            ValueError, match=r"rng: saved key<fry>\[\], needed u32\[2\]"
        ):
            checkpoints.restore(dataclasses.replace(state, rng=raw))


def test_another_tree_is_refused_by_path(folder):
    state = make_state(make_mesh(1, 1, 1))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        more = dataclasses.replace(state, anchor=state.params)
        with pytest.raises(ValueError, match="3 of 14 leaves differ") as error:
            checkpoints.restore(more)
        assert "  anchor/embedding: saved nothing, needed bf16[16, 4]" in str(
            error.value
        )
        fewer = dataclasses.replace(state, opt_state=(), params={})
        with pytest.raises(ValueError, match="8 of 11 leaves differ") as error:
            checkpoints.restore(fewer)
        assert "saved f32[4, 8, 8], needed nothing" in str(error.value)
        assert "\n  and 3 more\n" in str(error.value)


def test_one_field_is_read_alone(folder):
    state = make_state(make_mesh(2, 2, 2))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(state.params, field="params"), state.params)
        with pytest.raises(ValueError, match="params/head: saved nothing, needed f32"):
            checkpoints.restore({**state.params, "head": jnp.ones(3)}, field="params")
        with pytest.raises(ValueError, match="parameters/embedding: saved nothing"):
            checkpoints.restore(state.params, field="parameters")


def test_leaves_must_be_arrays_that_say_where_they_live(folder):
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(
            TypeError, match="leaf counts/0 must be a jax.Array.* got int"
        ):
            checkpoints.save(1, {"counts": [3]})
        checkpoints.save(1, {"w": jnp.ones(3)})
        with pytest.raises(ValueError, match="leaf w says no sharding"):
            checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_meta_comes_back_as_it_was(folder):
    meta = {"source": {"cursor": [1, None, "x"], "done": False}, "loss": 0.1}
    with Checkpoints(folder, keep_last=2) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, meta=meta)
        checkpoints.save(2, {"w": jnp.ones(3)})
        assert checkpoints.restore_meta(1) == meta
        assert checkpoints.restore_meta() is None
        for bad in ({"a": (1, 2)}, {1: "a"}, {"a": float("inf")}, {"a": jnp.ones(1)}):
            with pytest.raises(
                ValueError, match="`meta` must hold only what JSON keeps"
            ):
                checkpoints.save(3, {"w": jnp.ones(3)}, meta=bad)


def test_a_folder_in_a_bucket_stays_there(tmp_path, monkeypatch):
    object_store.install(monkeypatch)
    with Checkpoints("gs://bucket/run/checkpoints") as checkpoints:
        assert str(checkpoints.folder) == "gs://bucket/run/checkpoints"
        assert checkpoints.latest_step() is None
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        assert str(checkpoints.folder) == str(tmp_path / "run" / "checkpoints")


def test_wrong_arguments_say_what_is_needed(folder):
    with pytest.raises(ValueError, match="got keep_last=0"):
        Checkpoints(folder, keep_last=0)
    with pytest.raises(ValueError, match="keep_best=1, metric=None"):
        Checkpoints(folder, keep_best=1)
    with pytest.raises(
        FileNotFoundError, match="no folder .* to read checkpoints from"
    ):
        Checkpoints(folder, read_only=True)
    state = {"w": jnp.ones(3)}
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(
            FileNotFoundError, match="no complete checkpoint; its .* none"
        ):
            checkpoints.restore(state)
        with pytest.raises(ValueError, match="`best_step` needs a metric"):
            checkpoints.best_step()
        checkpoints.save(4, state)
        for step in (4, 3):
            with pytest.raises(ValueError, match=f"save step {step}: .* holds step 4"):
                checkpoints.save(step, state)
        with pytest.raises(FileNotFoundError, match=r"of step 5; its steps: \[4\]"):
            checkpoints.restore(state, 5)
    with Checkpoints(folder, keep_best=1, metric="accuracy") as checkpoints:
        with pytest.raises(ValueError, match="lack 'accuracy', .* got \\['loss'\\]"):
            checkpoints.save(5, state, metrics={"loss": 1.0})


def test_a_folder_of_another_writer_is_refused(folder):
    from orbax.checkpoint import v1 as ocp

    ocp.save(folder / "1", {"w": jnp.ones(3)})
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ValueError, match="1 was not written by `Checkpoints.save`"):
            checkpoints.restore({"w": jnp.ones(3)})


def test_a_failed_save_is_raised_and_leaves_the_one_before(folder):
    noise = np.random.default_rng(0).normal(size=500_000)  # does not compress
    state = {"w": jnp.asarray(noise, jnp.float32)}
    with Checkpoints(folder, keep_last=2) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # a full disk
        try:
            with pytest.raises(RuntimeError, match="Saving step 2 to .* failed"):
                checkpoints.save(2, state)
                checkpoints.save(3, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.latest_step() == 1
        assert_same(checkpoints.restore(state), state)
        checkpoints.save(2, state)
    assert steps_on_disk(folder) == [1, 2]


def test_reading_leaves_a_save_of_another_process_alone(folder):
    state = {"w": jnp.ones(3)}
    with Checkpoints(folder, keep_last=5) as writer:
        writer.save(1, state)
        writer.wait()
        unfinished = folder / "2.orbax-checkpoint-tmp"
        unfinished.mkdir()
        with Checkpoints(folder, read_only=True) as reader:
            assert reader.latest_step() == 1
            writer.save(3, state)
            writer.wait()
            assert reader.latest_step() == 3
            with pytest.raises(ValueError, match="was opened `read_only`; cannot save"):
                reader.save(4, state)
        assert unfinished.exists()
    with Checkpoints(folder) as writer:
        writer.save(4, state)
    assert steps_on_disk(folder) == [4]


SAVE_FOREVER = """
import sys, jax, jax.numpy as jnp
from pref_jax.train.checkpoint import Checkpoints
shape = (4_000_000,)
with Checkpoints(sys.argv[1]) as checkpoints:
    first = (checkpoints.latest_step() or 0) + 1
    for step in range(first, first + 1000):
        w = jax.random.bits(jax.random.key(step), shape)  # does not compress
        checkpoints.save(step, {"step": jnp.int32(step), "w": w}, meta={"step": step})
"""


def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(folder):
    latest, killed_while_writing = 0, False
    template = {"step": jnp.int32(0), "w": jnp.zeros(4_000_000, jnp.uint32)}
    for _ in range(2):  # the second process starts from what the first one left
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, folder],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

        def in_the_middle_of_a_save(after=latest):
            names = [path.name for path in folder.glob("*")]
            complete = any(name.isdigit() and int(name) > after for name in names)
            writing = folder.glob("*.orbax-checkpoint-tmp/state*/ocdbt*/d/*")
            return complete and any(writing)

        try:
            deadline = time.monotonic() + 120
            while not in_the_middle_of_a_save():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed_while_writing |= any(folder.glob("*.orbax-checkpoint-tmp"))
        with Checkpoints(folder, read_only=True) as checkpoints:
            assert checkpoints.latest_step() > latest
            latest = checkpoints.latest_step()
            restored = checkpoints.restore(template)
            assert restored["step"] == latest == checkpoints.restore_meta()["step"]
            expected = jax.random.bits(jax.random.key(latest), (4_000_000,))
            np.testing.assert_array_equal(restored["w"], expected)
    assert killed_while_writing
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(latest + 1, template)
    assert steps_on_disk(folder) == [latest + 1]


def test_sigterm_and_the_first_interrupt_only_set_a_flag():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with PreemptionGuard() as guard:
            assert not guard.requested and not guard.agreed()
            os.kill(os.getpid(), number)
            assert guard.requested and guard.agreed()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), PreemptionGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.requested
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second interrupt")
    assert signal.getsignal(signal.SIGINT) == before


TWO_PROCESSES = """
import os, signal, sys, time, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pref_jax.train.checkpoint import Checkpoints, PreemptionGuard
folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
values = np.arange(10, dtype=np.float32)
make_key = jax.jit(lambda: jax.random.key(3), out_shardings=NamedSharding(mesh, P()))
state = {"w": jax.device_put(values, NamedSharding(mesh, P("data"))), "rng": make_key()}
with PreemptionGuard() as guard, Checkpoints(folder) as checkpoints:
    for step in range(1000, 2000):
        if step == 1010 and process == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if guard.agreed():
            break
        time.sleep(0.02 + 0.01 * process)  # the processes are steps apart
    assert guard.requested
    print("stops at", step)
    checkpoints.save(1, state, meta={"a": 1})
    restored = checkpoints.restore(state)
    assert checkpoints.latest_step() == 1 and checkpoints.restore_meta() == {"a": 1}
    for shard in restored["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
print("done")
"""


@pytest.mark.slow
def test_two_processes_save_together_and_agree_to_stop(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, folder, port, str(process)],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [output.splitlines()[-2:] for output in outputs]
    assert lines[0] == lines[1] and lines[0][1] == "done"
    assert 1010 < int(lines[0][0].removeprefix("stops at ")) < 1999
    # One process alone reads what two have written.
    target = {"w": jnp.zeros(10), "rng": jax.random.key(0)}
    with Checkpoints(folder, read_only=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(target)["w"], np.arange(10))
