"""Where arrays live changes how fast a step is, never what it computes."""

import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import tiny_stage
from pref_jax.data import sources
from pref_jax.train import sharding
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
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
    "fsdp=2 tensor=2 data=2": ({"fsdp": 2, "tensor": 2, "data": 2}, 2),
    "fsdp=4 tensor=2": ({"fsdp": 4, "tensor": 2}, 1),
}


def place_state(mesh, optimizer):
    params = make_params()
    state = init_state(params, optimizer, rng=jax.random.key(0), anchor=params)
    axes = MODEL.param_axes(params)
    shardings = sharding.state_shardings(mesh, axes, state, optimizer)
    return jax.device_put(state, shardings), shardings


def two_updates(mesh, num_microbatches):
    """The state after two updates by DPO with a live anchor, and both metrics."""
    batches = sources.training_batches(
        make_groups(13, seed=2),
        groups_per_step=10,
        num_steps=2,
        row_length=tiny_stage.ROW_LENGTH,
        seed=0,
        rows_multiple=8,
    )
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
    return two_updates(sharding.make_mesh(devices=jax.devices()[:1]), 1)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_compute_what_one_does(name, on_one_device):
    sizes, num_microbatches = MESHES[name]
    state, metrics = two_updates(sharding.make_mesh(**sizes), num_microbatches)
    expected_state, expected = on_one_device
    assert expected[1]["rewards/margin"] > 0.01  # the parameters have moved
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for tree in ("params", "anchor"):
        for a, b in zip(
            jax.tree.leaves(getattr(state, tree)),
            jax.tree.leaves(getattr(expected_state, tree)),
            strict=True,
        ):
            a, b = np.asarray(a), np.asarray(b)
            # Relative to the norm of the leaf: small entries are sums that cancel.
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


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
