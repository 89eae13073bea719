"""Arithmetic that keeps its digits, and stays finite."""

from __future__ import annotations

import jax.numpy as jnp

_LARGEST_EXPONENT = 30.0  # squares of exp of it add up, 1e12 of them, in float32


def at_least_float32(array):
    """The array in float32, or in float64 if it came so.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def exp_or_tangent(x):
    """exp up to 30, its tangent beyond: finite, and so are sums of its slope's squares.

    >>> bool(jnp.isfinite(exp_or_tangent(jnp.float32(1e4))))
    True
    """
    # Not jnp.minimum: it would halve the slope at 30 itself.
    capped = jnp.where(x > _LARGEST_EXPONENT, _LARGEST_EXPONENT, x)
    beyond = jnp.where(x > _LARGEST_EXPONENT, x - _LARGEST_EXPONENT, 0.0)
    return jnp.exp(capped) * (1 + beyond)


def soft_cap(logits, bound: float | None):
    """Logits kept within a bound: bound * tanh(logits / bound).

    Source: Gemma 2, arXiv:2408.00118, section 2.

    Args:
      logits: f32[...].
      bound: positive; None: they stay as they are.

    >>> [round(float(x), 4) for x in soft_cap(jnp.array([0.5, 50.0]), 2.0)]
    [0.4898, 2.0]
    """
    return logits if bound is None else bound * jnp.tanh(logits / bound)
