"""Groups -> rows: a prompt stands in memory once, its responses branch off after it.

A row of L tokens holds groups one after the other; a group is a prompt and its K
responses:

    row:        | p p p p | a a a a a | b b b | q q | c c c c | d d d d d d | . . |
    position:     0 1 2 3   4 5 6 7 8   4 5 6   0 1   2 3 4 5   2 3 4 5 6 7   0 0
    end:         12 ....   9 .......   12 ...  24     18 ....   24 .......    self

- Token i sees token j when `j <= i < end[j]`. `end[j]` is the end of the group for a
  token of the prompt, the end of its own branch for a token of a response, and j + 1
  for padding.
- The last prompt token opens every branch: the prompt part is the prompt without its
  last token, and a branch of n targets is the n + 1 inputs `[p_last, r_1 .. r_n]`. The
  first n predict `r_1 .. r_n`; the state at the last one has seen the whole response.
- All shifting is done here. No other code shifts anything.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from pref_jax.types import EXTRAS, ResponseBatch, TokenGroup

FIT_POLICIES = ("drop", "keep_start", "keep_end")
"""What to do with a group that is longer than a row; see `fit_group`."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a batch; a run has one, so that it compiles once.

    Attributes:
      num_rows: G.
      row_length: L.
      groups_per_row: E, the largest number of groups in a row; B = G * E.
      num_predict: P, the largest number of scored positions in a row.
      num_responses: K.
      num_targets: T, the largest number of targets of a response.
    """

    num_rows: int
    row_length: int
    groups_per_row: int
    num_predict: int
    num_responses: int
    num_targets: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What has to be known of groups before they are put into rows; N groups.

    Attributes:
      num_tokens: i64[N]. Positions that the group takes in a row.
      num_predict: i64[N]. Trained targets, over all responses.
      longest_text: i64[N]. Tokens of the prompt with its longest response.
      longest_response: i64[N]. Targets of the longest response.
      num_responses: i64[N]. K, the same for all groups of a run.
    """

    num_tokens: np.ndarray
    num_predict: np.ndarray
    longest_text: np.ndarray
    longest_response: np.ndarray
    num_responses: np.ndarray

    def take(self, indices: Sequence[int]) -> Lengths:
        """Those of some of the groups."""
        fields = dataclasses.asdict(self)
        return Lengths(**{name: value[indices] for name, value in fields.items()})

    def digest(self) -> str:
        """A hash by which other groups, or another order, are noticed for nothing.

        No token is read for it: groups of the very same lengths have the same.
        """
        digest = hashlib.sha256()
        for value in dataclasses.asdict(self).values():
            digest.update(np.ascontiguousarray(value, np.int64).tobytes())
        return digest.hexdigest()[:16]


class LazyGroups(Sequence[TokenGroup]):
    """Groups that are read when they are asked for; what such sequences share.

    A subclass has `__len__`, `lengths` and `read`.

    Attributes:
      lengths: of all groups, known without reading them.
    """

    lengths: Lengths

    @abc.abstractmethod
    def read(self, index: int) -> TokenGroup:
        """Return group `index`, from 0; safe from several threads."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        return self.read(index % len(self))


def measure(groups: Iterable[TokenGroup]) -> Lengths:
    """The lengths of groups; what has `lengths` already is not read for them."""
    known = getattr(groups, "lengths", None)
    if known is not None:
        return known
    rows = [
        (
            group.num_tokens,
            sum(int(mask.sum()) for mask in group.loss_masks),
            len(group.prompt) + max(len(r) for r in group.responses),
            max(len(r) for r in group.responses),
            len(group.responses),
        )
        for group in groups
    ]
    return Lengths(*np.array(rows, np.int64).reshape(len(rows), 5).T)


def fit_group(
    group: TokenGroup,
    row_length: int,
    policy: str,
    *,
    max_positions: int | None = None,
) -> TokenGroup | None:
    """Make a group fit a row of its own and its texts the model, or say that it cannot.

    All responses of a group keep the same prompt, and none is emptied.

    Args:
      group: the ids.
      row_length: L.
      policy: "drop" leaves a longer group out; "keep_start" keeps the prompt and cuts
        the ends of the responses, the longest first; "keep_end" keeps the responses and
        cuts the start of the prompt, but for its first token, which may be the BOS.
      max_positions: longest text of the model: a prompt with one response; None: any.

    Returns:
      The group, a cut copy, or None if it has to be left out: under "drop" always,
      under "keep_start" when a response would be left without a trained target, under
      "keep_end" when the responses alone do not fit.

    Raises:
      ValueError: the policy is not known.
    """
    check_policy(policy)
    lengths = np.array([len(response) for response in group.responses])
    surplus = group.num_tokens - row_length
    room = np.inf if max_positions is None else max_positions - len(group.prompt)
    if surplus <= 0 and lengths.max() <= room:
        return group
    if policy == "keep_start":
        if room < 1:
            return None
        surplus -= int(np.maximum(lengths - room, 0).sum())
        lengths = np.minimum(lengths, room).astype(int)
        while surplus > 0 and lengths.max() > 1:
            longest = lengths.argmax()
            others = np.delete(lengths, longest)
            runner_up = others.max() if others.size else 1
            cut = min(surplus, max(1, lengths[longest] - max(runner_up, 1)))
            lengths[longest] -= cut
            surplus -= cut
        cut = _cut_responses(group, lengths)
        trained = all(mask.any() for mask in cut.loss_masks)
        return None if surplus > 0 or not trained else cut
    if policy == "keep_end":
        keep = len(group.prompt) - int(max(surplus, lengths.max() - room))
        if keep < 2:
            return None
        prompt = np.concatenate([group.prompt[:1], group.prompt[1 - keep :]])
        return dataclasses.replace(group, prompt=prompt)
    return None


def check_policy(policy: str) -> None:
    """Raise unless `policy` is one of `FIT_POLICIES`, needed or not.

    Raises:
      ValueError: it is none.
    """
    if policy not in FIT_POLICIES:
        raise ValueError(
            f"`policy` must be one of {', '.join(FIT_POLICIES)}; got {policy!r}."
        )


def _cut_responses(group: TokenGroup, lengths) -> TokenGroup:
    def cut(per_response):
        return tuple(
            np.asarray(x)[:n] for x, n in zip(per_response, lengths, strict=True)
        )

    whole = [name for name in group.extras if EXTRAS[name].endswith("M")]
    if whole:
        raise ValueError(
            f"record {group.record} has {', '.join(whole)} of whole responses, and the "
            f"policy `keep_start` would cut one. Use `drop`, or a longer row."
        )
    extras = {
        name: cut(value) if EXTRAS[name].endswith("T") else value
        for name, value in group.extras.items()
    }
    return dataclasses.replace(
        group,
        responses=cut(group.responses),
        loss_masks=cut(group.loss_masks),
        step_ids=None if group.step_ids is None else cut(group.step_ids),
        extras=extras,
    )


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put groups into rows: each into the first row that still has room for it.

    Args:
      lengths: positions that each group takes.
      row_length: L.

    Returns:
      For each row the indices of its groups, in their order.

    Raises:
      ValueError: a group is longer than a row.

    >>> first_fit([6, 5, 4, 3], row_length=10)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(
                f"group {i} takes {length} positions, a row has {row_length}; pass it "
                f"through `fit_group` first."
            )
        for row, free in enumerate(room):
            if length <= free:
                rows[row].append(i)
                room[row] -= length
                break
        else:
            rows.append([i])
            room.append(row_length - length)
    return rows


def plan_shape(
    batches: Iterable[Sequence[int]],
    *,
    num_tokens: Sequence[int],
    num_predict: Sequence[int],
    num_targets: int,
    num_responses: int,
    row_length: int,
    rows_multiple: int = 1,
) -> RowShape:
    """The smallest shape that every batch of a run fits.

    Args:
      batches: for each batch the indices of its groups.
      num_tokens: positions that each group takes.
      num_predict: scored positions of each group.
      num_targets: T, the longest response of all groups.
      num_responses: K.
      row_length: L.
      rows_multiple: G is rounded up to a multiple of it (devices times micro-batches).
    """
    most_rows = most_groups = most_predict = 1
    for batch in batches:
        rows = first_fit([num_tokens[i] for i in batch], row_length)
        most_rows = max(most_rows, len(rows))
        most_groups = max(most_groups, *(len(row) for row in rows))
        predicted = (sum(num_predict[batch[i]] for i in row) for row in rows)
        most_predict = max(most_predict, *predicted)
    return RowShape(
        num_rows=-(-most_rows // rows_multiple) * rows_multiple,
        row_length=row_length,
        groups_per_row=most_groups,
        num_predict=most_predict,
        num_responses=num_responses,
        num_targets=num_targets,
    )


def pack(
    groups: Sequence[TokenGroup],
    shape: RowShape,
    *,
    num_tokens: Sequence[int] | None = None,
    own: Sequence[int] | None = None,
) -> ResponseBatch:
    """Lay groups into the rows of one batch.

    Args:
      groups: at most as many as fit `shape`; the slots that are left are empty.
      shape: the static sizes.
      num_tokens: positions that each group takes, where it is known without reading it.
      own: numbers of the rows to build, in their order; only their groups are read, and
        the first one, which says which fields there are. None: all rows.

    Returns:
      A `ResponseBatch` of NumPy arrays, of all rows or of its own.

    Raises:
      ValueError: the groups do not fit the shape, or differ in K or in extras.
    """
    if num_tokens is None:
        num_tokens = [group.num_tokens for group in groups]
    rows = first_fit(num_tokens, shape.row_length)
    per_row = max((len(row) for row in rows), default=0)
    if len(rows) > shape.num_rows or per_row > shape.groups_per_row:
        raise ValueError(
            f"{len(groups)} groups need {len(rows)} rows of up to {per_row} groups; "
            f"the shape has {shape.num_rows} rows of {shape.groups_per_row}. Plan the "
            f"shape over all batches of the run with `plan_shape`."
        )
    first = groups[0] if groups else None
    if own is not None:
        rows = [rows[g] if g < len(rows) else [] for g in own]
        shape = dataclasses.replace(shape, num_rows=len(rows))
    groups = {index: groups[index] for members in rows for index in members}
    read = [*groups.values()] if first is None else [first, *groups.values()]
    _check_extras(read)
    num_rows, row_length = shape.num_rows, shape.row_length
    num_groups = num_rows * shape.groups_per_row
    axes = {
        "B": num_groups,
        "K": shape.num_responses,
        "T": shape.num_targets,
        "M": _num_sources(read),
    }
    row = {name: np.zeros((num_rows, row_length), np.int32) for name in _ROW_FIELDS}
    row["end"][:] = np.arange(1, row_length + 1)
    predict = np.full((num_rows, shape.num_predict), -1, np.int32)
    slot = {
        "start": np.zeros((axes["B"], axes["K"]), np.int32),
        "length": np.zeros((axes["B"], axes["K"]), np.int32),
        "valid": np.zeros((axes["B"], axes["K"]), bool),
        "labels": np.zeros((axes["B"], axes["K"]), np.float32),
        "loss_mask": np.zeros((axes["B"], axes["K"], axes["T"]), bool),
    }
    has_steps = first is not None and first.step_ids is not None
    step_ids = np.zeros(slot["loss_mask"].shape, np.int32) if has_steps else None
    record = np.full(num_groups, -1, np.int32)
    extras = {
        name: np.zeros([axes[axis] for axis in EXTRAS[name]], np.float32)
        for name in (first.extras if first is not None else ())
    }
    for g, members in enumerate(rows):
        cursor, scored = 0, []
        for e, index in enumerate(members):
            group = groups[index]
            b = g * shape.groups_per_row + e
            _check_group(group, shape, first)
            record[b] = group.record
            slot["labels"][b] = group.labels
            slot["valid"][b] = True
            _fill_extras(extras, b, group)
            branches = _lay_group(row, g, cursor, group)
            for k, start in enumerate(branches):
                n, mask = len(group.responses[k]), group.loss_masks[k]
                slot["start"][b, k], slot["length"][b, k] = start, n
                slot["loss_mask"][b, k, :n] = mask
                scored.append(start + np.flatnonzero(mask))
                if has_steps:
                    step_ids[b, k, :n] = group.step_ids[k]
            cursor += group.num_tokens
        positions = np.concatenate(scored) if scored else np.zeros(0, np.int32)
        if len(positions) > shape.num_predict:
            raise ValueError(
                f"row {g} scores {len(positions)} positions; the shape has "
                f"{shape.num_predict}. Plan the shape over all batches of the run."
            )
        predict[g, : len(positions)] = positions
    return ResponseBatch(
        **row, **slot, predict=predict, step_ids=step_ids, record=record, extras=extras
    )


def batch_shapes(shape: RowShape, extras: Sequence[str] = ()) -> ResponseBatch:
    """The shapes of a batch, without steps, of which nothing else is known yet.

    Args:
      shape: the static sizes.
      extras: names of `types.EXTRAS` with the axes B, K and T.
    """
    num_groups = shape.num_rows * shape.groups_per_row
    axes = {"B": num_groups, "K": shape.num_responses, "T": shape.num_targets}

    def of(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    slot, token = (axes["B"], axes["K"]), tuple(axes.values())
    return ResponseBatch(
        **{n: of(np.int32, shape.num_rows, shape.row_length) for n in _ROW_FIELDS},
        predict=of(np.int32, shape.num_rows, shape.num_predict),
        start=of(np.int32, *slot),
        length=of(np.int32, *slot),
        loss_mask=of(bool, *token),
        step_ids=None,
        valid=of(bool, *slot),
        labels=of(np.float32, *slot),
        record=of(np.int32, num_groups),
        extras={n: of(np.float32, *(axes[a] for a in EXTRAS[n])) for n in extras},
    )


def slots(num_tokens: Sequence[int], shape: RowShape) -> list[int]:
    """Where `pack` puts each group of a batch: its index along B.

    Args:
      num_tokens: positions that each group takes, in the order of the groups.
      shape: of the batch.

    >>> slots([6, 5, 4], RowShape(2, 10, 3, 8, 2, 4))
    [0, 3, 1]
    """
    found = [0] * len(num_tokens)
    for g, members in enumerate(first_fit(num_tokens, shape.row_length)):
        for e, index in enumerate(members):
            found[index] = g * shape.groups_per_row + e
    return found


_ROW_FIELDS = ("tokens", "position", "end", "targets")


def _lay_group(row, g, cursor, group: TokenGroup) -> list[int]:
    """Write one group at `cursor` of row `g`; the start of each branch."""
    prefix = len(group.prompt) - 1
    here = slice(cursor, cursor + prefix)
    row["tokens"][g, here] = group.prompt[:-1]
    row["position"][g, here] = np.arange(prefix)
    row["end"][g, here] = cursor + group.num_tokens
    starts, start = [], cursor + prefix
    for response in group.responses:
        n = len(response)
        here = slice(start, start + n + 1)
        row["tokens"][g, here] = np.concatenate([group.prompt[-1:], response])
        row["position"][g, here] = prefix + np.arange(n + 1)
        row["end"][g, here] = start + n + 1
        row["targets"][g, start : start + n] = response
        starts.append(start)
        start += n + 1
    return starts


def _check_group(group: TokenGroup, shape: RowShape, first: TokenGroup) -> None:
    longest = max(len(response) for response in group.responses)
    if len(group.responses) != shape.num_responses or longest > shape.num_targets:
        raise ValueError(
            f"record {group.record} has {len(group.responses)} responses of up to "
            f"{longest} tokens; the shape has {shape.num_responses} of up to "
            f"{shape.num_targets}."
        )
    if not len(group.prompt) or min(len(r) for r in group.responses) == 0:
        raise ValueError(
            f"record {group.record} has an empty prompt or an empty response; a prompt "
            f"needs a token (a BOS will do) and so does each response."
        )
    if set(group.extras) != set(first.extras):
        raise ValueError(
            f"record {group.record} has the extras {sorted(group.extras)}, record "
            f"{first.record} has {sorted(first.extras)}; all must have the same."
        )
    if (group.step_ids is None) != (first.step_ids is None):
        raise ValueError(
            f"record {group.record} and record {first.record} do not both have "
            f"step_ids; all groups of a batch must, or none."
        )
    for name, values in _per_response(group).items():
        needed = [len(response) for response in group.responses]
        lengths = [len(value) for value in values]
        if lengths != needed:
            raise ValueError(
                f"record {group.record} has {name} of lengths {lengths}; its responses "
                f"have {needed} tokens."
            )
    if len(group.labels) != len(group.responses):
        raise ValueError(
            f"record {group.record} has {len(group.labels)} labels and "
            f"{len(group.responses)} responses."
        )


def _check_extras(groups: Sequence[TokenGroup]) -> None:
    for group in groups:
        for name, value in group.extras.items():
            if name not in EXTRAS:
                raise ValueError(
                    f"record {group.record} has the extra {name!r}; there are "
                    f"{', '.join(EXTRAS)}. A new one is declared in `types.EXTRAS`."
                )
            axes = EXTRAS[name][1:]
            needed = {"": (), "K": (len(group.responses),)}.get(axes)
            if needed is not None and np.shape(value) != needed:
                raise ValueError(
                    f"record {group.record} has {name} of the shape {np.shape(value)}; "
                    f"{len(group.responses)} responses need {needed}."
                )


def _num_sources(groups: Sequence[TokenGroup]) -> int:
    """M of the extras that have it, which all groups share; 0 without any."""
    found = {
        (group.record, name): np.shape(value)
        for group in groups
        for name, value in group.extras.items()
        if EXTRAS[name].endswith("M")
    }
    shapes = set(found.values())
    if len(shapes) > 1:
        (record, name), shape = next(iter(found.items()))
        (other, its), another = next(x for x in found.items() if x[1] != shape)
        raise ValueError(
            f"record {record} has {name} of the shape {shape}, record {other} has "
            f"{its} of {another}; all need [K, M] for the same source models. Give a "
            f"source that lacks a response the length 0."
        )
    return shapes.pop()[-1] if shapes else 0


def _per_response(group: TokenGroup) -> dict:
    """The fields that hold one entry a token of each response."""
    fields = {"loss_masks": group.loss_masks}
    if group.step_ids is not None:
        fields["step_ids"] = group.step_ids
    return fields | {
        name: value
        for name, value in group.extras.items()
        if EXTRAS[name].endswith("T")
    }


def _fill_extras(extras, b, group: TokenGroup) -> None:
    for name, value in group.extras.items():
        if EXTRAS[name].endswith("T"):
            for k, tokens in enumerate(value):
                extras[name][b, k, : len(tokens)] = tokens
        else:
            extras[name][b] = value


def count_batch(batch: ResponseBatch) -> dict:
    """Real tokens (no padding) and prompts of a batch, for rates.

    Args:
      batch: of NumPy arrays, or of device arrays: it may be compiled.

    Returns:
      {"tokens", "examples"}, each i32[] or i64[].
    """
    used = (batch.start + batch.length + 1) * batch.valid
    per_row = used.reshape(batch.tokens.shape[0], -1).max(axis=1)
    return {"tokens": per_row.sum(), "examples": batch.valid.any(axis=1).sum()}


def show_batch(
    batch: ResponseBatch, decode: Callable[[Sequence[int]], str], *, rows: int = 1
) -> str:
    """Print rows so that one can read them: what each token sees and predicts.

    Args:
      batch: of NumPy or device arrays.
      decode: ids -> text.
      rows: how many rows to show.

    Returns:
      A table; one line a token: index, position, end, part (p the prompt, a letter a
      branch, . padding), the token, and what it predicts, with * where it is trained.
    """
    lines = []
    num_rows = batch.tokens.shape[0]
    per_row = batch.valid.shape[0] // num_rows
    for g in range(min(rows, num_rows)):
        part = np.full(batch.tokens.shape[1], ".", object)
        predicts = np.full(batch.tokens.shape[1], "", object)
        records = []
        for b in range(g * per_row, (g + 1) * per_row):
            if not batch.valid[b].any():
                continue
            records.append(int(batch.record[b]))
            first = int(batch.start[b, 0])
            group_end = int(batch.start[b, -1] + batch.length[b, -1]) + 1
            before = np.flatnonzero(np.asarray(batch.end[g][:first]) == group_end)
            part[before] = f"{len(records)}p"
            for k in range(batch.valid.shape[1]):
                start, n = int(batch.start[b, k]), int(batch.length[b, k])
                part[start : start + n + 1] = f"{len(records)}{chr(ord('a') + k)}"
                for t in range(n):
                    mark = "*" if batch.loss_mask[b, k, t] else " "
                    target = int(batch.targets[g, start + t])
                    predicts[start + t] = f"{mark} {decode([target])!r}"
        lines.append(f"row {g}: records {', '.join(map(str, records))}")
        lines.append("index  pos  end  part  token -> target (* trained)")
        for j in range(batch.tokens.shape[1]):
            token = "" if part[j] == "." else repr(decode([int(batch.tokens[g, j])]))
            lines.append(
                f"{j:5d} {int(batch.position[g, j]):4d} {int(batch.end[g, j]):4d}  "
                f"{part[j]:>4}  {token} -> {predicts[j]}".rstrip(" ->")
            )
    return "\n".join(lines)
