"""Flops from closed forms, memory and rooflines by arithmetic."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax.loops import loop_at_most
from pref_jax.models import decoder
from pref_jax.train import costs, sharding, topology
from pref_jax.train.hlo import Collective
from pref_jax.train.optimizer import OptimizerConfig, make_optimizer
from pref_jax.train.state import init_state
from tests import tiny_stage, tpu_experiment

P = PartitionSpec
SHAPE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 8**3  # flops of the product of two such matrices


def flops(function, *shapes):
    return costs.count_flops(jax.jit(function).trace(*(shapes or (SHAPE,))).jaxpr)


@jax.custom_vjp
def square(x):
    return x @ x


square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


def on_mesh(function, names):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    return jax.shard_map(
        *(function,),
        mesh=mesh,
        in_specs=P(names),
        out_specs=P(names),
        axis_names=set(names),
        check_vma=False,
    )


def kernel(x, y, out):
    out[...] = x[...] @ y[...]


def in_kernel(x):
    return pl.pallas_call(
        kernel,
        out_shape=SHAPE,
        grid=(2,),
        in_specs=[
            pl.BlockSpec((4, 8), lambda i: (i, 0)),
            pl.BlockSpec((8, 8), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
    )(x, x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x, PRODUCT),
        (lambda x: jnp.einsum("ij,ij->i", x, x), 2 * 64),
        (lambda x: jax.jit(lambda x: x @ x)(x) @ x, 2 * PRODUCT),
        (
            lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, 3)[0],
            3 * PRODUCT,
        ),
        (
            lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, 6)[0],
            6 * PRODUCT,
        ),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), 5 * PRODUCT),
        (
            lambda x: jax.lax.switch(
                *(
                    x[0, 0].astype(int),
                    [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x],
                    x,
                )
            ),
            2 * PRODUCT,
        ),
        (lambda x: square(x), PRODUCT),
        (jax.grad(lambda x: square(x).sum()), 2 * PRODUCT),
        (jax.grad(lambda x: jnp.sin(x @ x).sum()), 3 * PRODUCT),
        (jax.grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum())), 3 * PRODUCT),
        # The product is needed a second time, and made a second time.
        (jax.grad(lambda x: jnp.sin(jax.checkpoint(twice)(x)).sum()), 7 * PRODUCT),
        (jax.vmap(lambda x: x @ x), 2 * 64),
        (lambda x: (x @ x, x)[1], 0),  # nobody needs it
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 3, jnp.sin, x), 0),
        # A product of [1, 8] and [8, 1] on each of the 8 devices.
        (on_mesh(lambda x: x @ x.T, ("data", "fsdp")), 8 * 2 * 8),
        # A product of [4, 8] and [8, 4] on each of two, split further by the compiler.
        (on_mesh(lambda x: x @ x.T[:, :8], ("data",)), 2 * 2 * 4 * 8 * 4),
        (in_kernel, PRODUCT),
    ],
)
def test_flops_are_those_of_the_products(function, expected):
    assert flops(function) == expected


def twice(x):
    return jnp.sin(x @ x) @ x


def test_convolutions_count_by_their_kernel():
    images = jax.ShapeDtypeStruct((2, 3, 16, 16), jnp.float32)
    kernels = jax.ShapeDtypeStruct((4, 3, 5, 5), jnp.float32)
    counted = flops(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), images, kernels)
    assert counted == 2 * (2 * 4 * 12 * 12) * (3 * 5 * 5)


@pytest.mark.parametrize("outer", [1, 3])
def test_a_loop_that_says_how_often_it_turns_at_most_counts_as_often(outer):
    def layer(x, _):
        return loop_at_most(5, (x > 0).sum() % 5, lambda n, x: x @ x, x), None

    def layers(x):
        return jax.lax.scan(layer, x, None, length=outer)[0]

    assert flops(layers) == outer * 5 * PRODUCT


def test_what_cannot_be_counted_is_an_error():
    def unknown(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="inside a while_loop"):
        flops(unknown)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    stack = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)
    with pytest.raises(ValueError, match="does not count ragged_dot"):
        flops(jax.lax.ragged_dot, SHAPE, stack, sizes)


ROWS, LENGTH = 8, tiny_stage.ROW_LENGTH


def decoder_gradient(num_layers, remat):
    """The tiny decoder, and the gradient of a loss on it."""
    model = decoder.make_decoder(
        decoder.DecoderConfig(
            vocab_size=tiny_stage.VOCAB_SIZE,
            width=16,
            num_layers=num_layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            mlp_width=32,
            attention="xla",
            remat=remat,
        )
    )

    def loss(params, tokens):
        return (model.hidden(params, tokens, tokens, tokens) ** 2).sum()

    return model, jax.grad(loss)


def decoder_flops(num_layers, remat):
    """Flops of the tiny decoder's gradient, counted; and those of one forward pass."""
    model, gradient = decoder_gradient(num_layers, remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    num_tokens, down = ROWS * LENGTH, 2 * ROWS * LENGTH * 32 * 16
    attention = 2 * 2 * ROWS * LENGTH**2 * 4 * 4
    matrices = 16 * (4 + 2 + 2) * 4 + 4 * 4 * 16 + 3 * 16 * 32
    forward = num_layers * (2 * num_tokens * matrices + attention)
    return flops(gradient, params, tokens), forward, num_layers * down


@pytest.mark.parametrize("num_layers", [2, 4])
def test_a_decoder_costs_its_closed_form(num_layers):
    counted, forward, down = decoder_flops(num_layers, "none")
    assert counted == 3 * forward
    # All is made again but the last product of a layer, which its gradient needs not.
    counted, forward, down = decoder_flops(num_layers, "full")
    assert counted == 4 * forward - down


def decoder_costs(num_layers):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, gradient = decoder_gradient(num_layers, "full")
    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = sharding.param_shardings(mesh, model.param_axes(params), params)
    arguments = (
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            *(params, placed),
        ),
        jax.ShapeDtypeStruct(
            *((ROWS, LENGTH), jnp.int32),
            sharding=NamedSharding(mesh, P(sharding.ROW_AXES)),
        ),
    )
    function = jax.jit(gradient, out_shardings=placed)
    program = costs.Program("gradient", function, arguments, 1.0, "")
    return costs.measure(program, mesh)


@pytest.mark.slow  # compiles a decoder twice
def test_twice_the_layers_of_a_decoder_cost_twice_as_much():
    few, many = decoder_costs(2), decoder_costs(4)
    inside = [
        sum(c.total_bytes for c in found.collectives if c.loops)
        for found in (few, many)
    ]
    assert inside[0] > 0
    assert inside[1] == 2 * inside[0]
    assert many.flops == 2 * few.flops


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=4)


@pytest.fixture(scope="module")
def measured(mesh):
    """Programs of the tiny experiment by name, with their costs."""
    programs = tpu_experiment.programs(tpu_experiment.PRESETS["small"], mesh)
    return {
        program.name: (program, costs.measure(program, mesh)) for program in programs
    }


def test_a_program_is_measured_without_running_it(mesh, measured):
    config = tpu_experiment.PRESETS["small"]
    for name, times in (("loss", 1), ("step", 3)):
        program, found = measured[name]
        assert found.num_chips == 8
        assert found.useful_flops == program.useful_flops
        # A product of each layer is made again for the gradient of tanh.
        rematerialised = program.useful_flops / 3 if times == 3 else 0
        assert found.flops == program.useful_flops + rematerialised
        stack = 4 * config.num_layers * config.width**2 / 4
        rows = 4 * config.rows * config.width / 8
        assert found.memory.arguments == stack + rows
        kept = (stack, stack) if name == "step" else (4, 0)
        assert (found.memory.outputs, found.memory.aliased) == kept
        assert found.memory.total == sum(
            (
                *(stack + rows, kept[0], -kept[1]),
                *(found.memory.temporaries, found.memory.code),
            )
        )
        assert found.hbm_bytes > stack
        assert found.unknown_loops == ()
        inside = [c for c in found.collectives if c.loops]
        assert {c.executions for c in inside} == {config.num_layers}
        assert found.sent()["all-gather", ("fsdp",)] > 0
        assert sum(found.sent().values()) == sum(
            c.total_bytes for c in found.collectives
        )


def test_a_function_that_is_not_compiled_by_jit_is_refused(mesh, measured):
    program = dataclasses.replace(measured["loss"][0], function=lambda *args: None)
    with pytest.raises(TypeError, match="'loss' must be made by jax.jit"):
        costs.measure(program, mesh)


def fake_mesh(shape, extent):
    """A mesh of devices in the order of their coordinates."""
    coords = np.stack(np.unravel_index(np.arange(np.prod(extent)), extent), -1)
    devices = np.empty(len(coords), object)
    devices[:] = [types.SimpleNamespace(coords=list(c)) for c in coords]
    return types.SimpleNamespace(
        devices=devices.reshape(1, *shape),
        axis_names=sharding.MESH_AXES,
        shape=dict(zip(sharding.MESH_AXES, (1, *shape), strict=True)),
    )


def sending(kind, axes, num_bytes, executions=1):
    shape = (kind, axes, 4, num_bytes, executions, True)
    return Collective(*shape, outputs=(), scope="", loops=())


def make_costs(**changes):
    values = {
        **{"name": "step", "num_chips": 64, "useful_flops": 3e15, "formula": "f"},
        **{"flops": 4e15, "memory": costs.Memory(1, 2, 3, 4, 5)},
        **{"hbm_bytes": 5e9, "collectives": (), "unknown_loops": ()},
        **{"compile_seconds": 1.0},
    }
    return costs.Costs(**values | changes)


def test_a_roofline_is_three_quotients():
    chip = topology.CHIPS["v5p"]
    mesh = fake_mesh((1, 16, 4), (4, 4, 4))
    found = make_costs(
        collectives=(
            sending("all-gather", ("fsdp",), 1e9, 3),  # two dimensions, both rings
            sending("all-reduce", ("tensor",), 1e9),  # one ring
            sending("collective-permute", ("tensor",), 1e9),
        )
    )
    times = costs.roofline(found, mesh, chip)
    assert times.compute == pytest.approx(4e15 / (64 * 459e12))
    assert times.hbm == pytest.approx(5e9 / 2765e9)
    assert times.ici == pytest.approx(3e9 / 400e9 + 1e9 / 200e9 + 1e9 / 100e9)
    assert times.with_overlap == times.compute
    assert times.without_overlap == pytest.approx(times.compute + times.hbm + times.ici)
    assert times.limit == "compute"
    useful = 3e15 / (64 * 459e12)
    assert times.mfu(times.with_overlap) == pytest.approx(useful / times.compute)
    assert times.mfu(times.with_overlap) == pytest.approx(0.75)
    slow = dataclasses.replace(found, hbm_bytes=1e12)
    times = costs.roofline(slow, mesh, chip)
    assert times.limit == "hbm"
    assert times.with_overlap == times.hbm


def test_the_bytes_of_a_chip_are_counted_once():
    assert make_costs().memory.total == 1 + 2 - 3 + 4 + 5


def test_what_does_not_fit_gets_advice_with_numbers(mesh):
    config = OptimizerConfig(learning_rate=0.1)
    optimizer = make_optimizer(config, 10, param_axes={"w": ("embed", "mlp")})
    params = {"w": jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)}  # 4 GiB
    state = jax.eval_shape(
        lambda params, key: init_state(params, optimizer, rng=key, anchor=params),
        *(params, jax.eval_shape(jax.random.key, 0)),
    )
    split = NamedSharding(mesh, P("fsdp"))  # over 4
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=split if x.ndim == 2 else None
        ),
        state,
    )
    program = costs.Program("step", None, (state, None), 1.0, "")
    gib = 2**30
    chip = dataclasses.replace(topology.CHIPS["v5e"], hbm_bytes=10 * gib)
    memory = costs.Memory(6 * gib, 6 * gib, 6 * gib, 8 * gib, 0)
    found = make_costs(memory=memory)
    lines = costs.advice(program, found, mesh, chip)
    words = ("micro-batches", "remat=full", "fsdp", "anchor", "LoRA", "more chips")
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert "at most 4.0 GiB" in lines[0]
    assert "4.0 GiB are missing" in lines[0]
    assert "2 times as large" in lines[2]
    assert "3.0 of 6.0 GiB" in lines[2]
    assert "frees 1.0 GiB of anchor" in lines[3]
    assert "optimiser's 2.0 GiB" in lines[4]  # Adam has two of each parameter
    assert "the 1.0 GiB of parameters" in lines[4]
    assert "2 times as many" in lines[5]
    # Without a data axis, fsdp cannot be larger.
    without = costs.advice(program, found, sharding.make_mesh(fsdp=8), chip)
    assert without == [*lines[:2], *lines[3:]]
    chip = dataclasses.replace(chip, hbm_bytes=14 * gib)
    assert costs.advice(program, found, mesh, chip) == []
