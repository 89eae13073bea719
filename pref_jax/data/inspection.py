"""What the library understands of a data set, before anything is trained on it.

    python -m pref_jax.data inspect pairs.jsonl --tokenizer DIR

shows rows read and left out, fields, duplicates, the template's boundary, straddling
tokens, lengths, what a row length would drop or cut, how full the rows would be, and
some rows with their masks.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pref_jax.data import rows, sources
from pref_jax.data.records import Records
from pref_jax.data.templates import TextEncoder
from pref_jax.types import CHOSEN, REJECTED, TokenGroup

_BAR_WIDTH = 40
_NUM_BINS = 8
_PACKED = 256  # groups that are packed together, as in a large step


@dataclasses.dataclass(frozen=True)
class Fit:
    """What one policy does to the groups, and how full the rows are then.

    Attributes:
      policy: one of `rows.FIT_POLICIES`.
      used: groups that are used, cut or whole.
      cut: groups of these that are cut.
      dropped: groups that are left out.
      fill: share of the positions of packed rows that hold a token; 0 without groups.
    """

    policy: str
    used: int
    cut: int
    dropped: int
    fill: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The figures of a data set; `text` shows them.

    Attributes:
      num_groups: groups of token ids.
      num_responses: K.
      lengths: name -> numbers of tokens, one a group (or one a response).
      longer: share of pairs whose chosen response is longer, equal, shorter; None
        without pairs.
      equal_ids: groups with two responses of equal ids.
      untrained: targets that are masked, of all targets.
      targets: all targets.
      labels: values of the labels and how often each comes, the most frequent first.
      row_length: L.
      fits: what each policy does at this length.
    """

    num_groups: int
    num_responses: int
    lengths: dict[str, np.ndarray]
    longer: tuple[float, float, float] | None
    equal_ids: int
    untrained: int
    targets: int
    labels: list[tuple[float, int]]
    row_length: int
    fits: tuple[Fit, ...]

    def text(self) -> str:
        """The figures as lines."""
        lines = [f"{self.num_groups} groups of {self.num_responses} response(s)"]
        lines.append("tokens          mean   50%   90%   99%   max")
        for name, values in self.lengths.items():
            quantiles = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
            shown = " ".join(f"{q:5.0f}" for q in quantiles)
            lines.append(f"  {name:<12}{values.mean():6.0f} {shown}")
        if self.longer is not None:
            longer, equal, shorter = (f"{100 * x:.0f} %" for x in self.longer)
            lines.append(
                f"chosen is longer in {longer} of the pairs, equally long in {equal}, "
                f"shorter in {shorter}"
            )
        if self.equal_ids:
            lines.append(f"groups with two responses of equal ids: {self.equal_ids}")
        lines.append(f"targets: {self.targets}, of which {self.untrained} not trained")
        shown = ", ".join(f"{value:g} ({num})" for value, num in self.labels[:6])
        rest = f" and {len(self.labels) - 6} other values" * (len(self.labels) > 6)
        lines.append(f"labels (how often): {shown}{rest}")
        lines.append(f"at {self.row_length} positions a row, by --long-groups:")
        for fit in self.fits:
            lines.append(
                f"  {fit.policy:<12}{fit.used} used, {fit.cut} of them cut, "
                f"{fit.dropped} dropped; rows {100 * fit.fill:.0f} % full"
            )
        lines.append("positions of a group")
        lines += histogram(self.lengths["group"])
        return "\n".join(lines)


def inspect_groups(
    groups: Sequence[TokenGroup],
    *,
    row_length: int | None = None,
    max_positions: int | None = None,
) -> Inspection:
    """Count and measure groups.

    Args:
      groups: the ids, all with the same number of responses.
      row_length: L; None: the longest group.
      max_positions: longest text of the model, or None.

    Raises:
      ValueError: there are no groups.
    """
    if not len(groups):
        raise ValueError("there are no groups to inspect.")
    measured = rows.measure(groups)
    num_responses = int(measured.num_responses[0])
    lengths = {"prompt": [], "response": [], "longest": [], "group": []}
    longer, equal_ids, targets, untrained = np.zeros(3), 0, 0, 0
    labels: dict[float, int] = {}
    for group in groups:
        sizes = [len(response) for response in group.responses]
        lengths["prompt"].append(len(group.prompt))
        lengths["response"] += sizes
        lengths["longest"].append(max(sizes))
        lengths["group"].append(group.num_tokens)
        if num_responses == 2:
            longer[1 - np.sign(sizes[CHOSEN] - sizes[REJECTED])] += 1
        equal_ids += len({r.tobytes() for r in group.responses}) < len(sizes)
        targets += sum(sizes)
        untrained += sum(int((~mask).sum()) for mask in group.loss_masks)
        for label in group.labels:
            labels[label] = labels.get(label, 0) + 1
    length = row_length or int(measured.num_tokens.max())
    return Inspection(
        num_groups=len(groups),
        num_responses=num_responses,
        lengths={name: np.array(values) for name, values in lengths.items()},
        longer=tuple(longer / len(groups)) if num_responses == 2 else None,
        equal_ids=equal_ids,
        untrained=untrained,
        targets=targets,
        labels=sorted(labels.items(), key=lambda item: -item[1]),
        row_length=length,
        fits=tuple(
            _fit(groups, length, policy, max_positions) for policy in rows.FIT_POLICIES
        ),
    )


def _fit(groups, row_length, policy, max_positions) -> Fit:
    try:
        fitted, counts = sources.fit_groups(
            groups, row_length, policy=policy, max_positions=max_positions
        )
    except ValueError:  # none fits
        return Fit(policy, 0, 0, len(groups), 0.0)
    sizes = rows.measure(fitted).num_tokens
    num_rows = sum(
        len(rows.first_fit(sizes[i : i + _PACKED].tolist(), row_length))
        for i in range(0, len(sizes), _PACKED)
    )
    fill = float(sizes.sum()) / (num_rows * row_length)
    return Fit(policy, len(fitted), counts["cut"], counts["dropped"], fill)


def survey(
    records: Records,
    encoder: TextEncoder,
    *,
    row_length: int,
    policy: str = "drop",
    groups_per_step: int = 32,
) -> dict[str, Any]:
    """What becomes of every row of a source: one epoch, and where the rest went.

    Args:
      records: of `readers.read(..., on_error="skip")`.
      encoder: text to ids.
      row_length: L.
      policy: for groups that are longer than a row.
      groups_per_step: groups of a batch.

    Returns:
      `rows` of the source; `used`, those that stood in a batch of the epoch; `left_out`
      {reason: rows}, so that rows are the used and the left out together; `cut`,
      `duplicates`, `equal_responses` and `straddling` of the used; and `fill`, the
      share of the positions of the epoch's rows that hold a token.

    Raises:
      RuntimeError: the account does not add up, which would be an error of this
        library.
    """
    counts = records.counts
    encoded = encoder.encode_all(records, on_error="skip")
    fits = [rows.fit_group(group, row_length, policy) for group in encoded]
    groups = [group for group in fits if group is not None]
    seen, tokens, rows_used = [], 0, 0
    for batch in _epoch(groups, groups_per_step, row_length):
        seen += batch.record[batch.record >= 0].tolist()
        tokens += rows.count_batch(batch)["tokens"]
        rows_used += int((batch.end != np.arange(1, row_length + 1)).any(axis=1).sum())
    # A problem says first what was needed, and after a semicolon what came.
    problems = [problem for _, problem in (*records.skipped, *encoder.left_out)]
    left_out = collections.Counter(text.split(";")[0].rstrip(".") for text in problems)
    left_out["longer than a row"] = len(encoded) - len(groups)
    used = len(set(seen))
    if len(seen) != used or used + sum(left_out.values()) != counts["read"]:
        raise RuntimeError(
            f"{records.source}: {counts['read']} rows, {used} used, {left_out}, "
            f"{len(seen)} seen in an epoch."
        )
    return {
        "source": records.source,
        "rows": counts["read"],
        "responses": records.num_responses,
        "used": used,
        "left_out": {reason: n for reason, n in left_out.items() if n},
        "cut": sum(
            new is not None and new is not old
            for new, old in zip(fits, encoded, strict=True)
        ),
        "duplicates": counts["duplicates"],
        "equal_responses": counts["equal_responses"],
        "straddling": encoder.counts["records_with_straddling"],
        "fill": tokens / max(1, rows_used * row_length),
    }


def _epoch(groups, groups_per_step, row_length):
    if not groups:
        return ()
    return sources.evaluation_batches(
        groups, groups_per_step=groups_per_step, row_length=row_length
    )


def histogram(values, *, num_bins: int = _NUM_BINS) -> list[str]:
    r"""Lines with a bar a bin.

    >>> print("\n".join(histogram([1, 1, 1, 9], num_bins=2)))
        1 -     4 ######################################## 3
        5 -     9 ############# 1
    """
    values = np.asarray(values)
    edges = np.unique(
        np.linspace(values.min(), values.max() + 1, num_bins + 1).astype(int)
    )
    counts, _ = np.histogram(values, edges)
    return [
        f"{low:5d} - {high - 1:5d} {'#' * round(_BAR_WIDTH * n / counts.max())} {n}"
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def show_groups(
    groups: Sequence[TokenGroup], decode: Callable[[Sequence[int]], str]
) -> str:
    """Groups as the rows that they become: what each token sees and predicts."""
    return "\n".join(
        rows.show_batch(
            sources.evaluation_batches(
                [group], groups_per_step=1, row_length=group.num_tokens
            )[0],
            decode,
        )
        for group in groups
    )
