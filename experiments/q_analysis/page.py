"""The page of the analysis: what was found, then the tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.q_analysis import findings
from experiments.q_analysis.findings import Drop, Read, Signal
from experiments.q_analysis.readings import CORRUPTED, OWN, WITH_REFERENCE
from pref_jax import report
from pref_jax.evals.preference import Interval, bootstrap_interval

_LEVELS = ("q", "value")  # of which only differences within a page mean something


def _shown(interval: Interval | None) -> report.Estimate | None:
    return None if interval is None else report.Estimate(*interval)


def _signal_table(signals: Sequence[Signal]) -> report.Table:
    return report.Table(
        "What tells good responses from bad",
        columns=(
            report.Column("number of a response"),
            report.Column("role"),
            report.Column("accuracy", digits=1, percent=True),
            report.Column("Spearman's correlation", digits=3),
            report.Column("AUC", digits=3),
        ),
        rows=tuple(
            (
                signal.name,
                "control" if signal.control else "",
                *map(_shown, (signal.accuracy, signal.correlation, signal.auc)),
            )
            for signal in signals
        ),
        note="Accuracy: how often the response of the higher label has more of it, "
        "among responses to one prompt. Correlation and AUC: over all labelled "
        "responses. Controls need no values: a signal that is no better than they are "
        "says nothing of its own. 95 % intervals over prompts.",
    )


def _drop_table(drops: Sequence[Drop]) -> report.Table:
    return report.Table(
        "One token replaced",
        columns=(
            report.Column("quantity"),
            report.Column("response less copy", digits=3),
            report.Column("copies with less", digits=1, percent=True),
            report.Column("copies"),
        ),
        rows=tuple(
            (drop.name, _shown(drop.difference), _shown(drop.share), drop.number)
            for drop in drops
        ),
        note="At the place of the token that was replaced by one drawn from the other "
        "responses, and in V right after it. 95 % intervals over prompts.",
    )


def _line(name: str, reads: Sequence[Read], quantity: str) -> report.Series:
    values = findings.along(reads, quantity)
    x, found = [], []
    for part in range(findings.NUM_PARTS):
        here = values[:, part]
        here = here[np.isfinite(here)]
        if here.size:
            x.append((part + 0.5) / findings.NUM_PARTS)
            found.append(bootstrap_interval(here, num_resamples=1000))
    means, lows, highs = zip(*found, strict=True) if found else ((), (), ())
    return report.Series(name, tuple(x), means, lows, highs)


def _curves(reads: Sequence[Read], quantities: Sequence[str]) -> report.Curves:
    by_kind = findings.kinds(reads)
    return report.Curves(
        "Along the response",
        panels=tuple(
            report.Panel(
                quantity,
                "share of the response",
                f"{quantity}, less that of the first token",
                tuple(_line(name, those, quantity) for name, those in by_kind.items()),
            )
            for quantity in quantities
        ),
        note=f"Means in {findings.NUM_PARTS} parts of each response, with 95 % "
        "intervals over responses. Better and worse: above and below the mean label of "
        "the prompt.",
    )


def _centred(reads: Sequence[Read]) -> dict[str, float]:
    """Means of the levels over all that is shown, which are taken off."""
    sides = [side for read in reads for side in (read.own, read.reference) if side]
    return {
        name: float(np.nanmean(np.concatenate([side[name] for side in sides])))
        for name in _LEVELS
    }


def _maps(
    reads: Sequence[Read], tokens: Sequence[Sequence[str]], names: Sequence[str]
) -> report.TokenMaps:
    means = _centred(reads)
    with_reference = reads[0].reference is not None
    quantities = OWN | (WITH_REFERENCE if with_reference else {})
    # What one looks for first comes first.
    first = ("token_reward", "log_ratio", "advantage", "value", "q")
    order = dict.fromkeys([*(n for n in first if n in quantities), *quantities])
    quantities = {name: quantities[name] for name in order}
    for name, mean in means.items():
        quantities[name] += f"; {mean:.3f}, the mean of all that is shown, is taken off"

    def token_map(texts, numbers, changed):
        return report.TokenMap(
            tuple(texts),
            {
                name: tuple((numbers[name] - means.get(name, 0.0)).tolist())
                for name in quantities
                if name in numbers
            },
            () if changed is None else (changed,),
        )

    return report.TokenMaps(
        "Tokens",
        columns=tuple(names),
        quantities=quantities,
        rows=tuple(
            report.TokenSample(
                read.response.prompt,
                _described(read),
                tuple(
                    token_map(texts, side, read.response.changed)
                    for side in (read.own, read.reference)
                    if side is not None
                ),
            )
            for read, texts in zip(reads, tokens, strict=True)
        ),
        note="Choose a quantity; with the pointer on a token all of its numbers are "
        "shown. Blue is above zero, orange below; the token that was replaced is "
        "underlined.",
    )


def _described(read: Read) -> str:
    response = read.response
    parts = [f"row {response.record}, response {response.slot + 1}", response.kind]
    if np.isfinite(response.label):
        parts.append(f"label {response.label:g}")
    if response.kind == CORRUPTED and response.changed is not None:
        parts.append(f"token {response.changed + 1} replaced")
    return ", ".join(parts)


def make_report(
    reads: Sequence[Read],
    shown: Sequence[Read],
    tokens: Sequence[Sequence[str]],
    *,
    signals: Sequence[Signal],
    drops: Sequence[Drop],
    names: Sequence[str],
    config: dict,
    notes: Sequence[str],
    meta: dict,
) -> report.Report:
    """The page.

    Args:
      reads: all responses.
      shown: those whose tokens are on the page.
      tokens: their texts.
      signals: of `find_signals`.
      drops: of `find_drops`.
      names: of the model, and of its reference if there is one.
      config: of the command.
      notes: what was read, left out and counted.
      meta: facts of the run.
    """
    quantities = ["value", "advantage"]
    if reads[0].reference is not None:
        quantities += ["log_ratio", "token_reward"]
    sections: list[report.Section] = []
    if signals:
        sections.append(_signal_table(signals))
    if drops:
        sections.append(_drop_table(drops))
    sections += [
        _curves(reads, quantities),
        _maps(shown, tokens, names),
        report.Text("What was read", tuple(notes)),
        report.Config("Config", config),
    ]
    best = [s for s in signals if s.accuracy is not None]
    return report.Report(
        title=f"What the logits of {names[0]} say",
        subtitle=" beside ".join(names),
        summary="Logits are read as Q / beta, their log-sum-exp as V / beta. Softmax "
        "does not see a number added to all logits of a state: only the advantage is "
        "identified, and whether V says more than its controls is what the first "
        "table is for.",
        cards=tuple(
            report.Card(
                signal.name,
                _shown(signal.accuracy),
                "tells the better response of a prompt",
                digits=1,
                percent=True,
            )
            for signal in sorted(best, key=lambda s: -s.accuracy.mean)[:3]
        ),
        sections=tuple(sections),
        meta=meta,
    )
