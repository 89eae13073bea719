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
    with jax.named_scope(f"at_most_{most}_turns"):
        return jax.lax.fori_loop(0, turns, body, carry)


def most_turns(scope: str) -> int | None:
    """The bound of a loop of `loop_at_most` by the name of its scope, else None.

    Args:
      scope: of the loop itself, as a jaxpr or a compiled program has it.

    >>> most_turns("jit(step)/jvp(score)/at_most_10_turns/while"), most_turns("while")
    (10, None)
    """
    found = re.search(r"at_most_(\d+)_turns\)*(/while)?$", scope)
    return int(found[1]) if found else None
