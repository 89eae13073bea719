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
      own: numbers of the rows that are built, those of this process's devices; None:
        all. Every process draws the same groups and lays them into the same rows.
    """

    groups: Sequence[TokenGroup]
    indices: Callable[[int], Sequence[int]]
    num_batches: int
    shape: rows.RowShape
    own: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> ResponseBatch:
        if not 0 <= number < self.num_batches:
            raise IndexError(f"batch {number} of {self.num_batches}")
        members = self.indices(number)
        if self.own is None:
            return rows.pack([self.groups[i] for i in members], self.shape)
        num_tokens = self.num_tokens[np.asarray(members)].tolist()
        groups = _Chosen(self.groups, members)
        return rows.pack(groups, self.shape, num_tokens=num_tokens, own=self.own)

    @functools.cached_property
    def num_tokens(self) -> np.ndarray:
        """i64[N]: positions that each group takes."""
        return rows.measure(self.groups).num_tokens

    def of_rows(self, own: Sequence[int] | None) -> Batches:
        """The same batches, of which only these rows are built."""
        return dataclasses.replace(self, own=own)


class _Chosen(Sequence):
    """Some of the groups, each read when it is asked for."""

    def __init__(self, groups, members):
        self._groups, self._members = groups, members

    def __len__(self):
        return len(self._members)

    def __getitem__(self, index):
        return self._groups[self._members[index]]


def fit_groups(
    groups: Sequence[TokenGroup],
    row_length: int,
    *,
    policy: str,
    max_positions: int | None = None,
) -> tuple[Sequence[TokenGroup], dict[str, int]]:
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
    rows.check_policy(policy)
    if isinstance(groups, Mixture):
        options = {"policy": policy, "max_positions": max_positions}
        fitted = [fit_groups(part, row_length, **options) for part in groups.parts]
        counts = collections.Counter()
        for _, of_part in fitted:
            counts.update(of_part)
        return Mixture([part for part, _ in fitted], groups.weights), dict(counts)
    counts = collections.Counter(groups=len(groups), dropped=0, cut=0)
    lengths = rows.measure(groups)
    fits = (lengths.num_tokens <= row_length) & (
        lengths.longest_text <= (max_positions or np.inf)
    )
    if len(groups) and fits.all():
        return groups, dict(counts)  # as they are: a cache is not read for it
    fitted = []
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
    longest = int(rows.measure(groups).num_tokens.max())
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
    drawn from (seed, epoch); batch b is a slice of the stream. Nothing is left over. Of
    a `Mixture` each part has a stream of its own.

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
    parts = getattr(groups, "parts", (groups,))
    weights = getattr(groups, "weights", (1.0,))
    first = np.cumsum([0, *map(len, parts)])
    # Batch b takes of part p what stands in its stream from taken[b, p] on.
    taken = _shares(weights, groups_per_step, num_steps)

    @functools.lru_cache(maxsize=2 * len(parts))
    def permutation(part, epoch):
        # The order of one part alone is that of the data without a mixture.
        key = [seed, epoch, part] if part else [seed, epoch]
        return np.random.default_rng(key).permutation(len(parts[part]))

    def indices(number):
        found = []
        for part, size in enumerate(map(len, parts)):
            stream = range(taken[number, part], taken[number + 1, part])
            order = (int(permutation(part, i // size)[i % size]) for i in stream)
            found += [int(first[part]) + i for i in order]
        return found

    shape = _shape(groups, map(indices, range(num_steps)), row_length, rows_multiple)
    return Batches(groups, indices, num_steps, shape)


def _shares(weights: Sequence[float], groups_per_step: int, num_steps: int):
    """i64[num_steps + 1, parts]: groups of each part in the batches before each batch.

    Every batch has its whole number of groups, and after every batch each part has had
    its share of all groups so far, to within one.
    """
    share = np.array(weights, np.float64) / np.sum(weights)
    taken = np.zeros((num_steps + 1, len(share)), np.int64)
    for b in range(num_steps):
        wanted = share * groups_per_step * (b + 1) - taken[b]
        counts = np.floor(np.maximum(wanted, 0.0)).astype(np.int64)
        # Rounding up comes first to whom most is owed.
        owed = np.argsort(counts - wanted, kind="stable")
        counts[owed[: groups_per_step - counts.sum()]] += 1
        taken[b + 1] = taken[b] + counts
    return taken


class Mixture(rows.LazyGroups):
    """Several data sets as one, of which a run sees stated shares.

    As a sequence it holds the groups of all parts, one part after the other.
    `training_batches` takes of each part its share of every batch; a small part with a
    large weight is seen more often.

    Attributes:
      parts: the data sets; all groups have the same number of responses.
      weights: share of each part in the groups of a run, up to a common factor.
      lengths: of all groups.

    Raises:
      ValueError: there is no part, a part is empty, a weight is not positive, or the
        parts differ in K.

    >>> _shares((3.0, 1.0), 2, 4).tolist()
    [[0, 0], [2, 0], [3, 1], [5, 1], [6, 2]]
    """

    def __init__(self, parts: Sequence[Sequence[TokenGroup]], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(map(float, weights))
        if len(self.parts) != len(self.weights) or not self.parts:
            raise ValueError(
                f"a mixture needs a weight for each part; got {len(self.parts)} parts "
                f"and {len(self.weights)} weights."
            )
        if not all(0 < weight < np.inf for weight in self.weights):
            raise ValueError(f"`weights` must be positive; got {self.weights}.")
        sizes = list(map(len, self.parts))
        if 0 in sizes:
            raise ValueError(f"part {sizes.index(0)} of the mixture has no groups.")
        measured = [rows.measure(part) for part in self.parts]
        num_responses = [int(lengths.num_responses[0]) for lengths in measured]
        if len(set(num_responses)) > 1:
            raise ValueError(
                f"the parts of a mixture have {num_responses} responses a group; all "
                f"need the same number."
            )
        self.lengths = rows.Lengths(
            **{
                field.name: np.concatenate([getattr(m, field.name) for m in measured])
                for field in dataclasses.fields(rows.Lengths)
            }
        )
        self._first = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> TokenGroup:
        """Return group `index`, counted over all parts."""
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.parts[part][index - int(self._first[part])]


def mapped(
    function: Callable[[TokenGroup], TokenGroup], groups: Sequence[TokenGroup]
) -> Sequence[TokenGroup]:
    """The groups with a function applied to each when it is asked for.

    A `Mixture` stays one.
    """
    if isinstance(groups, Mixture):
        parts = [mapped(function, part) for part in groups.parts]
        return Mixture(parts, groups.weights)
    return _Mapped(function, groups)


class _Mapped(rows.LazyGroups):
    def __init__(self, function, groups):
        self._function, self._groups = function, groups

    def __len__(self):
        return len(self._groups)

    def read(self, index):
        return self._function(self._groups[index])

    @functools.cached_property
    def lengths(self):
        return rows.measure(self[i] for i in range(len(self)))


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
    lengths = rows.measure(groups)
    return rows.plan_shape(
        batches,
        num_tokens=lengths.num_tokens.tolist(),
        num_predict=lengths.num_predict.tolist(),
        num_targets=int(lengths.longest_response.max()),
        num_responses=int(lengths.num_responses[0]),
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
