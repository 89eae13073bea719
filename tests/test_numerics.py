"""Arithmetic that keeps its digits and stays finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.numerics import at_least_float32, exp_or_tangent, soft_cap


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.int32, jnp.float32),
    ],
)
def test_numbers_are_widened_to_float32_and_never_narrowed(given, expected):
    with jax.enable_x64(True):
        assert at_least_float32(jnp.ones(2, given)).dtype == expected


def test_up_to_an_exponent_of_30_it_is_the_exponential():
    x = np.array([-800.0, -1.0, 0.0, 1.0, 29.9, 30.0])
    with jax.enable_x64(True):
        value, slope = jax.vmap(jax.value_and_grad(exp_or_tangent))(x)
    np.testing.assert_allclose(value, np.exp(x), rtol=1e-14)
    np.testing.assert_allclose(slope, np.exp(x), rtol=1e-14)


def test_beyond_30_it_is_the_tangent():
    x = np.array([30.5, 31.0, 100.0, 1e4])
    with jax.enable_x64(True):
        value, slope = jax.vmap(jax.value_and_grad(exp_or_tangent))(x)
    top = math.exp(30)
    np.testing.assert_allclose(value, top * (x - 29), rtol=1e-14)
    np.testing.assert_allclose(slope, np.full(4, top), rtol=1e-14)


def test_in_float32_value_and_the_squares_of_a_million_slopes_are_finite():
    x = jnp.array([-1e4, 0.0, 88.0, 1e4], jnp.float32)
    value, slope = jax.vmap(jax.value_and_grad(exp_or_tangent))(x)
    assert np.isfinite(value).all()
    assert np.isfinite(jnp.float32(1e6) * jnp.square(slope).sum())


def test_nan_and_minus_infinity_stay_what_they_are():
    assert np.isnan(exp_or_tangent(jnp.nan))
    assert exp_or_tangent(-jnp.inf) == 0.0


def test_a_soft_cap_bounds_logits_and_leaves_small_ones():
    x = jnp.array([-1e4, -3.0, 0.0, 1e-3, 3.0, 1e4])
    expected = [-2.0, 2 * math.tanh(-1.5), 0.0, 1e-3, 2 * math.tanh(1.5), 2.0]
    np.testing.assert_allclose(soft_cap(x, 2.0), expected, rtol=1e-5)
    assert soft_cap(x, None) is x
