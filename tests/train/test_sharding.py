"""Where arrays live changes how fast a step is, never what it computes."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import tiny_stage
from pref_jax import logps
from pref_jax.data import sources
from pref_jax.method import objective
from pref_jax.models import decoder
from pref_jax.train import hlo, sharding
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step, weighted_mean
from tiny_stage import DPO, MODEL, make_groups, make_params

SGD = optax.sgd(0.3)

quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


# --- mesh -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shape", "row_shards"),
    [
        ({}, (8, 1, 1), 8),
        ({"fsdp": 8}, (1, 8, 1), 8),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2), 4),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 4, 2), 4),
        ({"tensor": 8}, (1, 1, 8), 1),
    ],
)
def test_a_mesh_uses_every_device(sizes, shape, row_shards):
    mesh = sharding.make_mesh(**sizes)
    names = ("slice", "data", "fsdp", "tensor")
    assert tuple(mesh.shape.items()) == tuple(zip(names, (1, *shape), strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert sharding.num_row_shards(mesh) == row_shards


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2},
        {"fsdp": 3},
        {"fsdp": 16},
        {"fsdp": 0},
        {"data": 4, "fsdp": 4, "tensor": 4},
        {"data": -8, "fsdp": -1},
    ],
)
def test_a_mesh_of_another_size_is_an_error(sizes):
    with pytest.raises(ValueError, match="does not use 8 devices; their product must"):
        sharding.make_mesh(**sizes)


# --- parameters -----------------------------------------------------------------------

SHAPES = {
    "embedding": jax.ShapeDtypeStruct((24, 16), np.float32),
    "norm": {"scale": jax.ShapeDtypeStruct((16,), np.float32)},
}
AXES = {"embedding": ("vocab", "embed"), "norm": {"scale": ("norm",)}}


def test_every_parameter_of_a_decoder_is_split_by_its_rule():
    mesh, params = sharding.make_mesh(fsdp=2, tensor=2), make_params()
    found = sharding.param_shardings(mesh, MODEL.param_axes(params), params)
    block = found["blocks"]["0"]
    expected = {
        "embedding": (found["embedding"], ("tensor", "fsdp")),
        "query": (block["attention"]["query"], (None, "fsdp", "tensor", None)),
        "key": (block["attention"]["key"], (None, "fsdp", "tensor", None)),
        "out": (block["attention"]["out"], (None, "tensor", None, "fsdp")),
        "up": (block["mlp"]["up"], (None, "fsdp", "tensor")),
        "down": (block["mlp"]["down"], (None, "tensor", "fsdp")),
        "norm": (block["mlp_norm"]["scale"], (None, None)),
        "final": (found["final_norm"]["scale"], (None,)),
    }
    for name, (leaf, axes) in expected.items():
        assert leaf.spec == PartitionSpec(*axes), name
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_a_parameter_without_a_rule_is_an_error():
    axes = AXES | {"norm": {"scale": ("experts",)}}
    message = r"norm/scale of shape \(16,\) has the logical axes \('experts',\).*RULES"
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(sharding.make_mesh(), axes, SHAPES)


def test_a_parameter_whose_axes_do_not_fit_its_shape_is_an_error():
    axes = AXES | {"embedding": ("vocab",)}
    with pytest.raises(ValueError, match=r"embedding of shape \(24, 16\)"):
        sharding.param_shardings(sharding.make_mesh(), axes, SHAPES)


def test_a_parameter_without_axes_is_an_error():
    with pytest.raises(ValueError, match="norm"):
        sharding.param_shardings(
            sharding.make_mesh(), {"embedding": ("vocab", "embed")}, SHAPES
        )
    with pytest.raises(ValueError, match="mixer has no logical axes"):
        MODEL.param_axes({"mixer": np.zeros(3)})


def test_a_size_that_the_mesh_does_not_divide_is_an_error():
    shapes = SHAPES | {"embedding": jax.ShapeDtypeStruct((20, 16), np.float32)}
    message = "embedding has 20 along vocab, which the 8 devices of mesh axis tensor"
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(sharding.make_mesh(tensor=8), AXES, shapes)


# --- batches --------------------------------------------------------------------------


def test_each_device_gets_its_own_rows():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    batch = {
        "rows": np.arange(8 * 3).reshape(8, 3),
        "groups": np.arange(16),
        "none": None,
    }
    placed = sharding.place_batch(mesh, batch)
    assert placed["none"] is None
    for name in ("rows", "groups"):
        np.testing.assert_array_equal(placed[name], batch[name])
        parts = np.split(batch[name], 4)
        for shard in placed[name].addressable_shards:
            _, data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
            np.testing.assert_array_equal(shard.data, parts[2 * data + fsdp])


def test_rows_that_the_devices_do_not_divide_are_an_error():
    message = "a batch of 12 rows cannot be split over 8 devices.*rows_multiple"
    with pytest.raises(ValueError, match=message):
        sharding.place_batch(sharding.make_mesh(), {"rows": np.zeros((12, 2))})


# --- values ---------------------------------------------------------------------------

MESHES = {
    "data=8": ({"data": 8}, 1),
    "fsdp=8": ({"fsdp": 8}, 1),
    "data=4 fsdp=2": ({"data": 4, "fsdp": 2}, 1),
    "fsdp=2 tensor=2 data=2": ({"fsdp": 2, "tensor": 2, "data": 2}, 2),
    "fsdp=4 tensor=2": ({"fsdp": 4, "tensor": 2}, 1),
}


def place_state(mesh, optimizer):
    params = make_params()
    state = init_state(params, optimizer, rng=jax.random.key(0), anchor=params)
    axes = MODEL.param_axes(params)
    shardings = sharding.state_shardings(mesh, axes, state, optimizer)
    return jax.device_put(state, shardings), shardings


def make_batches(num_steps):
    return sources.training_batches(
        make_groups(13, seed=2),
        groups_per_step=10,
        num_steps=num_steps,
        row_length=tiny_stage.ROW_LENGTH,
        seed=0,
        rows_multiple=8,
    )


def updates(mesh, num_microbatches, num_steps=2):
    """The state after updates by DPO with a live anchor, and the metrics of each."""
    batches = make_batches(num_steps)
    step = make_train_step(DPO, MODEL, SGD, num_microbatches=num_microbatches)
    metrics = []
    with jax.set_mesh(mesh):
        state, shardings = place_state(mesh, SGD)
        step = sharding.CompiledStep(step, mesh, shardings)
        for batch in batches:
            assert not batch.valid.all()
            state, outputs = step(state, sharding.place_batch(mesh, batch))
            assert outputs["finite"].all()
            metrics.append({k: float(x) for k, x in outputs["metrics"].items()})
    # Policy and anchor are alike: the sign of a margin is that of its rounding.
    del metrics[0]["rewards/accuracy"]
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), state, shardings)
    return state, metrics


@pytest.fixture(scope="module")
def on_one_device():
    return updates(sharding.make_mesh(devices=jax.devices()[:1]), 1)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_compute_what_one_does(name, on_one_device):
    sizes, num_microbatches = MESHES[name]
    state, metrics = updates(sharding.make_mesh(**sizes), num_microbatches)
    expected_state, expected = on_one_device
    assert expected[1]["rewards/margin"] > 0.01  # the parameters have moved
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for tree in ("params", "anchor"):
        assert_close(getattr(state, tree), getattr(expected_state, tree), 1e-5)


def assert_close(found, expected, tolerance):
    """Relative to the norm of the leaf: small entries are sums that cancel."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data=8", "data=4 fsdp=2", "fsdp=2 tensor=2 data=2"])
def test_twenty_steps_on_eight_devices_are_those_of_one(name):
    sizes, num_microbatches = MESHES[name]
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    expected, _ = updates(alone, 1, num_steps=20)
    found, _ = updates(sharding.make_mesh(**sizes), num_microbatches, num_steps=20)
    moved = [
        np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
        for a, b in zip(
            jax.tree.leaves(expected.params),
            jax.tree.leaves(make_params()),
            strict=True,
        )
    ]
    assert min(moved) > 1e-2
    assert_close(found.params, expected.params, 1e-4)


DEEP = decoder.make_decoder(
    decoder.DecoderConfig(
        vocab_size=tiny_stage.VOCAB_SIZE,
        width=16,
        num_layers=5,  # no other size is a multiple of it: a stack is told from a layer
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_width=32,
    )
)


def loss_and_gradient(params, anchor, batch):
    def mean(params):
        loss, weight, _ = objective(DPO, DEEP, params, anchor, batch)
        return weighted_mean(loss, weight)

    return jax.value_and_grad(mean)(params)


def on_mesh(mesh):
    """Parameters, those of another anchor, and a batch."""
    found = [make_params(seed, DEEP) for seed in (0, 1)]
    shardings = sharding.param_shardings(mesh, DEEP.param_axes(found[0]), found[0])
    batch = sharding.place_batch(mesh, make_batches(1)[0])
    return *jax.device_put(found, [shardings] * 2), batch


@pytest.mark.parametrize("name", ["data=8", "data=4 fsdp=2", "fsdp=2 tensor=2 data=2"])
def test_gradients_on_eight_devices_are_those_of_one(name):
    found = []
    for mesh in (
        sharding.make_mesh(devices=jax.devices()[:1]),
        sharding.make_mesh(**MESHES[name][0]),
    ):
        with jax.set_mesh(mesh):
            found.append(jax.jit(loss_and_gradient)(*on_mesh(mesh)))
    assert_close(found[1], found[0], 1e-4)


# --- what is exchanged ----------------------------------------------------------------


@pytest.fixture(scope="module")
def exchanged():
    """The collectives of loss and gradient by mesh, with chunks of few entries."""

    @functools.cache
    def compiled(**sizes):
        mesh = sharding.make_mesh(**sizes)
        with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
            patch.setattr(logps, "_CHUNK_ELEMENTS", 1)
            patch.setattr(logps, "_CHUNK_ENTRIES", 4)
            patch.setattr(logps, "_LANES", 1)
            step = jax.jit(loss_and_gradient)
            text = step.lower(*on_mesh(mesh)).compile().as_text()
        return hlo.collectives(text, mesh), mesh

    return compiled


ALL_MESHES = [{"data": 8}, {"data": 4, "fsdp": 2}, {"fsdp": 2, "tensor": 2, "data": 2}]


@pytest.mark.parametrize("sizes", ALL_MESHES, ids=str)
def test_a_loss_of_each_prompt_exchanges_nothing(exchanged, sizes):
    found, _ = exchanged(**sizes)
    scopes = [collective.scope for collective in found]
    assert any("score" in scope for scope in scopes) or sizes == {"data": 8}
    assert not [s for s in scopes if re.search(r"\b(loss|reward)\b", s)]


@pytest.mark.parametrize("sizes", ALL_MESHES, ids=str)
def test_the_chunks_of_scoring_exchange_nothing(exchanged, sizes):
    """Loops in the scope of scoring: that over layers is in a scope of the decoder."""
    found, _ = exchanged(**sizes)
    assert found
    assert not [c for c in found if c.loops and "token_stats" in c.scope]


@pytest.mark.parametrize("sizes", ALL_MESHES[1:], ids=str)
def test_layers_are_gathered_one_by_one(exchanged, sizes):
    found, mesh = exchanged(**sizes)
    gathers = [c for c in found if c.kind == "all-gather" and c.loops]
    assert gathers and all("fsdp" in c.axes for c in gathers)
    stacks = jax.tree.leaves(on_mesh(mesh)[0]["blocks"])
    for stack in stacks:
        assert not hlo.gathers_of(found, stack, mesh)


def test_optimiser_and_anchor_are_split_like_the_parameters():
    mesh, optimizer = sharding.make_mesh(fsdp=4, tensor=2), optax.adam(0.1)
    state, _ = place_state(mesh, optimizer)
    adam = state.opt_state[0]
    for copy in (adam.mu, adam.nu, state.anchor):
        jax.tree.map(
            lambda x, p: x.sharding == p.sharding or pytest.fail(str(x.sharding)),
            copy,
            state.params,
        )
    (shard, *_) = adam.mu["embedding"].addressable_shards
    assert shard.data.shape == (24 // 2, 16 // 4)
    for scalar in (adam.count, state.step, state.data, state.rng):
        assert scalar.sharding.is_fully_replicated
        assert len(scalar.sharding.device_set) == 8


def test_a_state_without_an_anchor_keeps_none():
    mesh, params = sharding.make_mesh(), make_params()
    state = init_state(params, SGD, rng=jax.random.key(0))
    shardings = sharding.state_shardings(mesh, MODEL.param_axes(params), state, SGD)
    assert shardings.anchor == ()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, *ALL_MESHES[1:]], ids=str)
def test_states_of_rows_do_not_leave_the_devices_of_their_rows(exchanged, sizes):
    """What layers exchange beside parameters are sums over tensor."""
    found, _ = exchanged(**sizes)
    states = [
        c
        for c in found
        if c.loops and any(tiny_stage.ROW_LENGTH in x.dims for x in c.outputs)
    ]
    assert all(c.axes == ("tensor",) for c in states)
    assert bool(states) == (sizes.get("tensor", 1) > 1)
