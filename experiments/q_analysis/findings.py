"""What the numbers of tokens say of responses, with what else would say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

from experiments.q_analysis.readings import CORRUPTED, Response
from experiments.worlds.token_numbers import Numbers
from pref_jax.evals.preference import Interval, bootstrap_interval

NUM_PARTS = 10
"""Parts of a response that its values are averaged over."""

_NUM_RESAMPLES = 400
_CONTROLS = ("length", "mean entropy")


@dataclasses.dataclass(frozen=True)
class Read:
    """A response with the numbers of its tokens.

    Attributes:
      response: what it is.
      own: of the model, by the names of `OWN` and `WITH_REFERENCE`.
      reference: of the reference, by the names of `OWN`; None: there is none.
    """

    response: Response
    own: Numbers
    reference: Numbers | None


@dataclasses.dataclass(frozen=True)
class Signal:
    """A number a response, and how it goes with what the data says of it.

    Attributes:
      name: of the number.
      control: whether it is there to be compared with.
      accuracy: how often the better of two responses to a prompt has more of it; ties
        are half. None: no prompt has responses of different labels.
      correlation: Spearman's, over all labelled responses; None: all labels are equal.
      auc: of labels with two values: how often a response of the higher one has more
        of it; None: labels have more values, or one.
    """

    name: str
    control: bool
    accuracy: Interval | None
    correlation: Interval | None
    auc: Interval | None


@dataclasses.dataclass(frozen=True)
class Drop:
    """A quantity at the place of a replaced token: of the response less of its copy.

    Attributes:
      name: of the quantity.
      difference: mean over prompts.
      share: of the copies that have less of it.
      number: of the copies that have it.
    """

    name: str
    difference: Interval
    share: Interval
    number: int


def _mean(values) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def _last(values) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else np.nan


def signals_of(read: Read) -> dict[str, float]:
    """The numbers of a response that are held against its label, controls last."""
    own, reference = read.own, read.reference
    found = {
        "mean V": _mean(own["value"]),
        "V before the last token": _last(own["value"]),
        "mean advantage": _mean(own["advantage"]),
    }
    if reference is not None:
        found |= {
            "implicit reward": float(np.nansum(own["log_ratio"])),
            "implicit reward a token": _mean(own["log_ratio"]),
            "mean V of the reference": _mean(reference["value"]),
            "mean advantage of the reference": _mean(reference["advantage"]),
        }
    return found | {
        "mean entropy": _mean(own["entropy"]),
        "length": float(read.response.where.sum()),
    }


def _resampled(
    by_prompt: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float]
) -> Interval | None:
    """A statistic of all rows, with a 95 % interval over resampled prompts.

    Args:
      by_prompt: for each prompt its rows, f64[n, 2].
      statistic: f64[N, 2] -> number; NaN: it has none.
    """
    value = statistic(np.concatenate(by_prompt))
    if not np.isfinite(value):
        return None
    rng = np.random.default_rng(0)
    draws = rng.integers(len(by_prompt), size=(_NUM_RESAMPLES, len(by_prompt)))
    found = [statistic(np.concatenate([by_prompt[i] for i in row])) for row in draws]
    finite = [x for x in found if np.isfinite(x)]
    low, high = np.percentile(finite, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def _spearman(pairs) -> float:
    if any(len(np.unique(column)) < 2 for column in pairs.T):
        return np.nan
    return float(scipy.stats.spearmanr(*pairs.T).statistic)


def _auc(pairs) -> float:
    values, labels = pairs.T
    kinds = np.unique(labels)
    if len(kinds) != 2:
        return np.nan
    high, low = values[labels == kinds[1]], values[labels == kinds[0]]
    wins = scipy.stats.mannwhitneyu(high, low).statistic
    return float(wins / (len(high) * len(low)))


def _accuracy(values, labels) -> float:
    """Of one prompt: over its pairs of unequal labels; NaN: it has none."""
    first, second = np.triu_indices(len(labels), k=1)
    sign = np.sign(labels[first] - labels[second])
    agrees = 0.5 + 0.5 * sign * np.sign(values[first] - values[second])
    return _mean(agrees[sign != 0]) if (sign != 0).any() else np.nan


def find_signals(reads: Sequence[Read]) -> list[Signal]:
    """Every signal against the labels; empty without labels.

    Args:
      reads: of all responses; those without a label are passed over.
    """
    by_prompt: dict[int, list[tuple[dict[str, float], float]]] = {}
    for read in reads:
        if np.isfinite(read.response.label):
            entry = signals_of(read), read.response.label
            by_prompt.setdefault(read.response.record, []).append(entry)
    if not by_prompt:
        return []
    labels = [np.array([label for _, label in rows]) for rows in by_prompt.values()]
    found = []
    for name in next(iter(by_prompt.values()))[0][0]:
        values = [
            np.array([numbers[name] for numbers, _ in rows])
            for rows in by_prompt.values()
        ]
        accuracy = np.array([_accuracy(*x) for x in zip(values, labels, strict=True)])
        known = accuracy[np.isfinite(accuracy)]
        pairs = [np.stack(x, axis=1) for x in zip(values, labels, strict=True)]
        found.append(
            Signal(
                name=name,
                control=name in _CONTROLS or name.endswith("of the reference"),
                accuracy=bootstrap_interval(known) if known.size else None,
                correlation=_resampled(pairs, _spearman),
                auc=_resampled(pairs, _auc),
            )
        )
    return found


def _following(values, where, place: int) -> float:
    """The number of the next token that counts; NaN: there is none."""
    later = np.flatnonzero(where[place + 1 :])
    return float(values[place + 1 + later[0]]) if later.size else np.nan


def find_drops(reads: Sequence[Read]) -> list[Drop]:
    """What a replaced token changes, at its place and in the value right after it.

    Args:
      reads: responses and their copies; a copy belongs to the response of its record
        and slot.
    """
    originals = {
        (read.response.record, read.response.slot): read
        for read in reads
        if read.response.kind != CORRUPTED
    }
    differences: dict[str, dict[int, list[float]]] = {}
    for read in reads:
        copy = read.response
        if copy.kind != CORRUPTED or copy.changed is None:
            continue
        original = originals[copy.record, copy.slot]

        def numbers(of: Read, place=copy.changed):
            names = ("q", "advantage", "log_ratio", "token_reward")
            at = {name: of.own[name][place] for name in names if name in of.own}
            after = _following(of.own["value"], of.response.where, place)
            return at | {"value after it": after}

        ours, theirs = numbers(original), numbers(read)
        for name, value in ours.items():
            if np.isfinite(value) and np.isfinite(theirs[name]):
                by_record = differences.setdefault(name, {})
                by_record.setdefault(copy.record, []).append(value - theirs[name])
    return [
        Drop(
            name=name,
            difference=bootstrap_interval([np.mean(x) for x in by_record.values()]),
            share=bootstrap_interval(
                [np.mean(np.array(x) > 0) for x in by_record.values()]
            ),
            number=sum(map(len, by_record.values())),
        )
        for name, by_record in differences.items()
    ]


def along(reads: Sequence[Read], quantity: str) -> np.ndarray:
    """A quantity by the part of the response, less that of the first token.

    Args:
      reads: some responses.
      quantity: a name of their numbers.

    Returns:
      f64[responses, `NUM_PARTS`]; NaN where a response has no token in a part.
    """
    found = np.full((len(reads), NUM_PARTS), np.nan)
    for i, read in enumerate(reads):
        values = read.own[quantity][read.response.where]
        if not len(values):
            continue
        part = np.arange(len(values)) * NUM_PARTS // len(values)
        for number in np.unique(part):
            found[i, number] = np.mean(values[part == number]) - values[0]
    return found


def kinds(reads: Sequence[Read]) -> Mapping[str, list[Read]]:
    """Responses by what is known of them: better, worse, or neither; and the copies.

    Better is a label above the mean of the labels of its prompt.
    """
    labels: dict[int, list[float]] = {}
    for read in reads:
        if np.isfinite(read.response.label):
            labels.setdefault(read.response.record, []).append(read.response.label)
    found: dict[str, list[Read]] = {}
    for read in reads:
        response = read.response
        name = "one token replaced"
        if response.kind != CORRUPTED:
            mean = np.mean(labels.get(response.record, [np.nan]))
            above, below = response.label > mean, response.label < mean
            name = "better" if above else "worse" if below else "responses"
        elif response.changed is None:
            continue
        found.setdefault(name, []).append(read)
    return found
