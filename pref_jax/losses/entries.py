"""What every loss does at its door: check, widen, drop; and with its results: mask.

A dropped entry must not reach the maths: a NaN there would give a NaN gradient even
where the result is masked. So it is replaced on the way in, and masked on the way out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.numerics import at_least_float32
from pref_jax.types import CHOSEN, REJECTED

LISTWISE = "A list of more than two responses needs a listwise loss: `losses.listwise`."


def inclusion(where, *, shape: tuple[int, ...], of: str):
    """`where` checked and broadcast to `shape`, that of argument `of`; None stays."""
    if where is None:
        return None
    checks.check_bool("where", where)
    checks.check_broadcast("where", where, to=shape, of=of)
    return jnp.broadcast_to(where, shape)


def fill(array, where, value: float = 0.0):
    """The array with `value` in dropped entries, and no gradient from there.

    Args:
      array: [..., ...].
      where: None, or bool of the leading axes of `array`.
      value: of dropped entries.

    >>> fill(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]), jnp.array([True, False])).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    if where is None:
        return array
    trailing = [None] * (array.ndim - where.ndim)
    return jnp.where(where[..., *trailing], array, value)


def read_pair(name: str, array, where):
    """A checked pair in float32 or wider, and `where` of its leading axes.

    Returns:
      f32[..., 2] without what `where` drops; bool[...] or None.
    """
    checks.check_floating(name, array)
    checks.check_pair(name, array, use_instead=LISTWISE)
    array = at_least_float32(array)
    where = inclusion(where, shape=array.shape[:-1], of=name)
    return fill(array, where), where


def read_constant(name: str, array, *, like, of: str, where=None):
    """What the data says, of the shape and dtype of `like`, without gradient.

    What a dropped entry holds need not be replaced, unless entries are added up: `like`
    was replaced, and lets no gradient of a dropped entry through.

    Args:
      name: of the argument, for messages.
      array: numbers or booleans that broadcast to the shape of `like`.
      like: f32[...], the array that it belongs to.
      of: the name of `like`.
      where: None, or bool of the shape of `like`: 0 where it is False.
    """
    array = jnp.asarray(array, like.dtype)
    checks.check_broadcast(name, array, to=like.shape, of=of)
    array = jnp.broadcast_to(array, like.shape)
    return fill(jax.lax.stop_gradient(array), where)


def read_lengths(lengths, *, like, of: str):
    """Numbers of tokens of the shape of `like`; at least 1, so that one can divide."""
    return jnp.maximum(read_constant("lengths", lengths, like=like, of=of), 1.0)


def accuracy(margin):
    """1 where the margin is positive, 0 where negative, one half at a tie."""
    return jnp.heaviside(margin, 0.5)


def all_equal(values, there, axis):
    """Whether all values that are there are one number; of none, too. Axes are kept.

    >>> there = jnp.array([True, True, False])
    >>> all_equal(jnp.array([2.0, 2.0, 5.0]), there, 0).tolist()
    [True]
    """
    most, least = -jnp.inf, jnp.inf
    most = jnp.where(there, values, most).max(axis, keepdims=True, initial=most)
    least = jnp.where(there, values, least).min(axis, keepdims=True, initial=least)
    return most <= least


def pair_metrics(rewards) -> dict[str, jax.Array]:
    """The metrics of a pair of rewards f32[..., 2], each f32[...]."""
    chosen, rejected = rewards[..., CHOSEN], rewards[..., REJECTED]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": accuracy(chosen - rejected),
    }


def results(loss, metrics, where):
    """(loss, metrics) of one shape, exactly 0 in dropped entries."""
    return fill(loss, where), {name: fill(x, where) for name, x in metrics.items()}
