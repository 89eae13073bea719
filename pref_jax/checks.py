"""Checks of shape, dtype and range: the error style, once.

Each check runs at trace time and costs nothing later. Values on the device are never
looked at, and neither is a number that is an argument of what is being compiled.
"""

from __future__ import annotations

import contextlib
import contextvars

import jax
import jax.numpy as jnp

_num_microbatches = contextvars.ContextVar("num_microbatches", default=1)


def describe(array) -> str:
    """Short form of an array's dtype and shape for messages.

    >>> describe(jnp.zeros((8, 3)))
    'f32[8, 3]'
    """
    names = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}
    dtype = str(jnp.result_type(array))
    kind = dtype.rstrip("0123456789")
    short = names.get(kind, kind) + dtype[len(kind) :]
    return f"{short}[{', '.join(str(size) for size in jnp.shape(array))}]"


def check_pair(name: str, array, *, use_instead: str) -> None:
    """Raise unless the last axis of `array` holds a pair (chosen, rejected)."""
    shape = jnp.shape(array)
    if not shape or shape[-1] != 2:
        raise ValueError(
            f"`{name}` needs a last axis of 2 (chosen, rejected); got "
            f"{describe(array)}.\n{use_instead}"
        )


def check_floating(name: str, array) -> None:
    """Raise unless `array` holds floating-point numbers."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise TypeError(
            f"`{name}` needs floating-point numbers; got {describe(array)}. "
            f"Convert it with `.astype(jnp.float32)`."
        )


def check_bool(name: str, array) -> None:
    """Raise unless `array` is boolean (inclusion, not importance)."""
    if jnp.result_type(array) != jnp.bool_:
        raise TypeError(
            f"`{name}` is inclusion and needs booleans; got {describe(array)}. "
            f"Pass `{name} > 0`, or give importance through a weight."
        )


def check_broadcast(name: str, array, *, to: tuple[int, ...], of: str) -> None:
    """Raise unless `array` broadcasts to the shape `to` of argument `of`."""
    try:
        fits = jnp.broadcast_shapes(jnp.shape(array), to) == tuple(to)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` needs a shape that broadcasts to {tuple(to)}, that of `{of}`; "
            f"got {describe(array)}."
        )


def check_same_shape(name: str, array, *, like, of: str) -> None:
    """Raise unless `array` has exactly the shape of `like`, argument `of`."""
    if jnp.shape(array) != jnp.shape(like):
        raise ValueError(
            f"`{name}` needs the shape of `{of}`, {describe(like)}; got "
            f"{describe(array)}."
        )


def check_integers(name: str, array) -> None:
    """Raise unless `array` holds integers."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise TypeError(f"`{name}` needs integers; got {describe(array)}.")


def is_known(value) -> bool:
    """Whether `value` is a number now, and no argument of what is being compiled."""
    return not isinstance(value, jax.core.Tracer)


def check_range(name: str, value: float, *, low: float, high: float, why: str) -> None:
    """Raise unless a number lies in [low, high]."""
    if is_known(value) and not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}] ({why}); got {value}.")


def check_positive(name: str, value: float) -> None:
    """Raise unless a number is positive and finite."""
    if is_known(value) and not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite; got {value}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise unless a number is at least 0 and finite."""
    if is_known(value) and not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be 0 or more, and finite; got {value}.")


@contextlib.contextmanager
def microbatches(number: int):
    """Say to what is traced inside that it sees one of `number` parts of a batch."""
    token = _num_microbatches.set(number)
    try:
        yield
    finally:
        _num_microbatches.reset(token)


def check_whole_batch(name: str) -> None:
    """Raise if function `name` is traced for a part of a batch only.

    What was compiled before, outside of `microbatches`, is not traced again and not
    seen: a step must trace its loss itself.
    """
    number = _num_microbatches.get()
    if number > 1:
        raise ValueError(
            f"`{name}` looks across the whole batch, and the step computes it in "
            f"{number} micro-batches: each part would give another number. Use one "
            f"micro-batch, or a loss without batch statistics."
        )
