"""Loops that turn as often as the data needs, and say how often that is at most."""

from __future__ import annotations

import re

import jax


def loop_at_most(most: int, turns, body, carry):
    """`jax.lax.fori_loop` of `turns` turns, which are known to be no more than `most`.

    The bound stands in the name of the loop's scope, where those who count what a
    program costs find it (`most_turns`).

    Args:
      most: bound of `turns`, known while the program is traced.
      turns: i32[].
      body: (number of the turn, carry) -> carry.
      carry: what the loop starts with.

    >>> int(loop_at_most(9, jax.numpy.int32(3), lambda n, total: total + n, 0))
    3
    """
    with _at_most(most):
        return jax.lax.fori_loop(0, turns, body, carry)


def while_at_most(most: int, condition, body, carry):
    """`jax.lax.while_loop` that ends after `most` turns at the latest.

    Args:
      most: bound of its turns, which `condition` sees to; said as in `loop_at_most`.
      condition: carry -> bool[].
      body: carry -> carry.
      carry: what the loop starts with.

    >>> int(while_at_most(9, lambda n: n < 3, lambda n: n + 1, 0))
    3
    """
    with _at_most(most):
        return jax.lax.while_loop(condition, body, carry)


def _at_most(turns: int):
    return jax.named_scope(f"at_most_{turns}_turns")


def most_turns(scope: str) -> int | None:
    """The bound of a loop of this module by the name of its scope, else None.

    Args:
      scope: of the loop itself, as a jaxpr or a compiled program has it.

    >>> most_turns("jit(step)/jvp(score)/at_most_10_turns/while"), most_turns("while")
    (10, None)
    """
    found = re.search(r"at_most_(\d+)_turns\)*(/while)?$", scope)
    return int(found[1]) if found else None
