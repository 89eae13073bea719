"""Products of states and matrices, and what their slopes cost.

What a linear layer computes is one line. What its derivative costs is another matter:
which of two arrays is turned round, and what is kept until then.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pref_jax.axes import gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, matrix, inputs: int):
    """x, over its last axes, times a matrix.

    The slope by the matrix contracts x and the slope of the result over all positions.
    A CPU has to turn one of the two round for it: here the narrower one. By jax's own
    rule it is always the slope, and all that computes the slope is done again in the
    order of the turned one. There is no forward-mode derivative.

    Args:
      x: [..., *in].
      matrix: [*in, *out], of x's dtype.
      inputs: axes of `in`.

    Returns:
      [..., *out].

    >>> product(jnp.ones((2, 3)), jnp.ones((3, 5)), 1).shape
    (2, 5)
    """
    return jnp.tensordot(x, matrix, inputs)


def _product_forward(x, matrix, inputs):
    # What is not trained, such as the base under adapters, needs no x kept.
    kept = x.value if matrix.perturbed else None
    return jnp.tensordot(x.value, matrix.value, inputs), (kept, matrix.value)


def _product_backward(inputs, kept, slope):
    x, matrix = kept
    rows = slope.ndim - (matrix.ndim - inputs)
    outputs = range(rows, slope.ndim), range(inputs, matrix.ndim)
    by_x = jax.lax.dot_general(slope, matrix, (outputs, ((), ())))
    if x is None:
        return by_x, None
    positions = tuple(range(rows)), tuple(range(rows))
    if x.size <= slope.size:
        return by_x, jax.lax.dot_general(x, slope, (positions, ((), ())))
    turned = jax.lax.dot_general(slope, x, (positions, ((), ())))
    last = range(matrix.ndim - inputs, matrix.ndim)
    first = range(matrix.ndim - inputs)
    return by_x, turned.transpose(*last, *first)


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def project(x, matrix, bias, adapter, axes, *, inputs: int = 1):
    """x, over its last axes, times a matrix; plus bias and low-rank adapter.

    Args:
      x: [..., *in].
      matrix: [*in, *out], an array or a parameter.
      bias: [*out], likewise, or None.
      adapter: {"a": [*in, rank], "b": [rank, *out]} or None: a @ b is added.
      axes: logical ones of the matrix.
      inputs: axes of `in`.
    """

    def times(x, matrix, axes, inputs):
        return product(x, gather(matrix.astype(x.dtype), axes), inputs)

    out = times(x, matrix[...], axes, inputs)
    if adapter is not None:
        low = times(x, adapter["a"], (*axes[:inputs], "rank"), inputs)
        out += times(low, adapter["b"], ("rank", *axes[inputs:]), 1)
    if bias is not None:
        out += with_leading_axes(bias[...].astype(x.dtype), out.ndim)
    return out


def with_leading_axes(x, ndim: int):
    """x as [1, ..., 1, *shape] of `ndim` axes: it broadcasts without rank promotion."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
