"""Products have the values and slopes of jax's own, whichever side is turned round."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.models import decoder
from pref_jax.models.products import product, project

_SHAPES = {  # x, matrix, axes of `in`
    "widens": ((2, 5, 3), (3, 7), 1),
    "narrows": ((2, 5, 7), (7, 3), 1),
    "to heads": ((2, 5, 3), (3, 4, 2), 1),
    "from heads": ((2, 5, 4, 6), (4, 6, 3), 2),
    "one state": ((3,), (3, 7), 1),
}


def _draw(shape, seed, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("name", _SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_slopes_are_those_of_tensordot(name, dtype):
    x_shape, matrix_shape, inputs = _SHAPES[name]
    x, matrix = _draw(x_shape, 0, dtype), _draw(matrix_shape, 1, dtype)
    ours, our_slopes = jax.vjp(functools.partial(product, inputs=inputs), x, matrix)
    expected, slopes = jax.vjp(lambda x, m: jnp.tensordot(x, m, inputs), x, matrix)
    slope = _draw(expected.shape, 2, dtype)
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    for found, wanted in zip(
        (ours, *our_slopes(slope)), (expected, *slopes(slope)), strict=True
    ):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(
            found.astype(jnp.float32),
            wanted.astype(jnp.float32),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("name", ["widens", "narrows"])
def test_the_narrower_side_is_turned_round(name):
    x_shape, matrix_shape, inputs = _SHAPES[name]
    x, matrix = _draw(x_shape, 0), _draw(matrix_shape, 1)
    slope = _draw((*x_shape[:2], *matrix_shape[inputs:]), 2)
    times = functools.partial(product, inputs=inputs)
    jaxpr = jax.make_jaxpr(lambda m: jax.vjp(times, x, m)[1](slope))(matrix)
    contracted = [
        [v.aval.shape for v in eqn.invars]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general"
        and eqn.params["dimension_numbers"][0] == ((0, 1), (0, 1))
    ]
    narrow, wide = sorted((x.shape, slope.shape), key=lambda shape: shape[-1])
    assert contracted == [[narrow, wide]]


def test_states_before_a_matrix_that_is_not_trained_are_not_kept():
    x, matrix = _draw((3, 5), 0), _draw((5, 2), 1)

    def kept(trained):
        def loss(x, matrix):
            return product(jnp.sin(x), matrix if trained else jnp.ones((5, 2)), 1).sum()

        _, slopes = jax.vjp(loss, x, matrix)
        return sorted(leaf.shape for leaf in jax.tree.leaves(slopes))

    assert kept(True).count(x.shape) == kept(False).count(x.shape) + 1


def test_adapters_and_bias_add_to_the_product():
    x, matrix, bias = _draw((2, 5, 3), 0), _draw((3, 7), 1), _draw((7,), 2)
    adapter = {"a": _draw((3, 2), 3), "b": _draw((2, 7), 4)}
    found = project(x, matrix, bias, adapter, ("embed", "mlp"))
    expected = x @ (matrix + adapter["a"] @ adapter["b"]) + bias[None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_between_the_products_of_an_mlp_nothing_is_kept_but_what_the_first_ones_made():
    config = decoder.DecoderConfig(
        vocab_size=11,
        width=8,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        mlp_width=29,
    )

    def widths(config):
        model = decoder.make_decoder(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jnp.zeros((1, 6), jnp.int32)
        end = jnp.full((1, 6), 6)
        position = jnp.arange(6)[None]

        def forward(params):
            return jax.vjp(lambda p: model.hidden(p, tokens, position, end), params)[1]

        kept = jax.tree.leaves(jax.eval_shape(forward, shapes))
        return [leaf.shape for leaf in kept].count((3, 1, 6, 29))

    assert widths(config) == 2  # gate and up
    assert widths(dataclasses.replace(config, gated=False, activation="gelu")) == 1
