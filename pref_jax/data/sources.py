"""Batch number -> batch, a pure function; and sources, which hand batches to a run.

A source is called with the train state and returns a host batch. An offline source
ignores the state: its only state of its own is the number of the next batch, so resume
is one integer and costs nothing. Grain prefetches batches in threads.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pref_jax.data import rows
from pref_jax.types import ResponseBatch, TokenGroup


class Source(Protocol):
    """What a training loop draws from.

    Attributes:
      prefetchable: whether batches may be made before the state that they follow is
        known.
    """

    prefetchable: bool

    def __call__(self, state: Any) -> ResponseBatch:
        """Return the next batch, as host arrays."""

    def get_state(self) -> int:
        """Return the number of the next batch."""

    def set_state(self, number: int) -> None:
        """Go on with batch `number`."""


@dataclasses.dataclass(frozen=True)
class Batches(Sequence):
    """All batches of a run, made when they are asked for.

    Attributes:
      groups: the ids.
      indices: batch number -> indices of its groups.
      num_batches: how many there are.
      shape: one shape for all of them.
    """

    groups: Sequence[TokenGroup]
    indices: Callable[[int], Sequence[int]]
    num_batches: int
    shape: rows.RowShape

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> ResponseBatch:
        if not 0 <= number < self.num_batches:
            raise IndexError(f"batch {number} of {self.num_batches}")
        return rows.pack([self.groups[i] for i in self.indices(number)], self.shape)


def fit_groups(
    groups: Sequence[TokenGroup],
    row_length: int,
    *,
    policy: str,
    max_positions: int | None = None,
) -> tuple[list[TokenGroup], dict[str, int]]:
    """Apply `rows.fit_group` to all groups and count what it did.

    Args:
      groups: the ids.
      row_length: L.
      policy: one of `rows.FIT_POLICIES`.
      max_positions: longest text of the model, or None.

    Returns:
      The groups that fit, in order, and {"groups", "dropped", "cut"}.

    Raises:
      ValueError: none fits.
    """
    fitted, counts = [], collections.Counter(groups=len(groups), dropped=0, cut=0)
    for group in groups:
        result = rows.fit_group(group, row_length, policy, max_positions=max_positions)
        if result is None:
            counts["dropped"] += 1
            continue
        counts["cut"] += result is not group
        fitted.append(result)
    if not fitted:
        shortest = min((group.num_tokens for group in groups), default=0)
        raise ValueError(
            f"no group fits a row: {len(groups)} groups, the shortest takes {shortest} "
            f"positions, `row_length` is {row_length}, the model's longest text "
            f"{max_positions or 'of any length'} and the policy {policy!r}. Use longer "
            f"rows, or the policy keep_start or keep_end."
        )
    return fitted, dict(counts)


def longest_group(groups: Sequence[TokenGroup], *, multiple: int = 32) -> int:
    """A row length that every group fits: the longest, rounded up to a multiple."""
    longest = max(group.num_tokens for group in groups)
    return -(-longest // multiple) * multiple


def training_batches(
    groups: Sequence[TokenGroup],
    *,
    groups_per_step: int,
    num_steps: int,
    row_length: int,
    seed: int,
    rows_multiple: int = 1,
) -> Batches:
    """Batches of exactly `groups_per_step` groups, without end of epoch.

    The groups of all epochs stand in one stream, each epoch in a permutation of its own
    drawn from (seed, epoch); batch b is a slice of the stream. Nothing is left over.

    Args:
      groups: each fits a row.
      groups_per_step: N, the global batch size.
      num_steps: batches of the run; the shape is the smallest that all of them fit.
      row_length: L.
      seed: of the permutations.
      rows_multiple: G is a multiple of it (devices times micro-batches).

    Raises:
      ValueError: there are fewer groups than a step takes.
    """
    if groups_per_step > len(groups):
        raise ValueError(
            f"a step takes {groups_per_step} groups and there are {len(groups)}; use a "
            f"smaller batch or more data."
        )
    total = len(groups)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(total)

    def indices(number):
        stream = range(number * groups_per_step, (number + 1) * groups_per_step)
        return [int(permutation(i // total)[i % total]) for i in stream]

    shape = _shape(groups, map(indices, range(num_steps)), row_length, rows_multiple)
    return Batches(groups, indices, num_steps, shape)


def evaluation_batches(
    groups: Sequence[TokenGroup],
    *,
    groups_per_step: int,
    row_length: int,
    rows_multiple: int = 1,
) -> Batches:
    """Every group once, in order; the last batch may have empty slots."""
    total = len(groups)

    def indices(number):
        return range(
            number * groups_per_step, min(total, (number + 1) * groups_per_step)
        )

    num_batches = -(-total // groups_per_step)
    shape = _shape(groups, map(indices, range(num_batches)), row_length, rows_multiple)
    return Batches(groups, indices, num_batches, shape)


def _shape(groups, batches, row_length, rows_multiple) -> rows.RowShape:
    return rows.plan_shape(
        batches,
        num_tokens=[group.num_tokens for group in groups],
        num_predict=[sum(int(m.sum()) for m in g.loss_masks) for g in groups],
        num_targets=max(len(r) for group in groups for r in group.responses),
        num_responses=len(groups[0].responses),
        row_length=row_length,
        rows_multiple=rows_multiple,
    )


class OfflineSource:
    """Hands out `Batches` in order, prepared ahead by Grain's threads.

    >>> source = OfflineSource(["batch 0", "batch 1", "batch 2"])
    >>> source(None), source.get_state()
    ('batch 0', 1)
    >>> source.set_state(2)
    >>> source(None)
    'batch 2'
    """

    prefetchable = True

    def __init__(self, batches: Sequence):
        self.batches = batches
        self._next = 0
        self._iterator = None

    def __call__(self, state):
        """Return the next batch; the state is not looked at."""
        del state
        if self._iterator is None:
            import grain

            dataset = grain.MapDataset.range(self._next, len(self.batches))
            dataset = dataset.map(self.batches.__getitem__)
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            self._iterator = iter(dataset.to_iter_dataset(options))
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> int:
        """Return the number of the next batch."""
        return self._next

    def set_state(self, number: int) -> None:
        """Go on with batch `number`.

        Raises:
          ValueError: there is no such batch.
        """
        if not 0 <= number <= len(self.batches):
            raise ValueError(
                f"there are {len(self.batches)} batches; got number {number}. The run "
                f"folder belongs to a longer run than this config describes."
            )
        self._next, self._iterator = number, None
