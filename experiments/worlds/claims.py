"""A paper's claims: what each needs to hold here, and what became of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pref_jax import report
from pref_jax.evals.preference import Interval, bootstrap_interval

HOLDS, FAILS, NOT_TESTABLE = "holds", "does not hold", "not testable here"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and what became of it.

    Attributes:
      claim: in words.
      needed: what it had to show here; written before anything is run.
      effect: the number that it is judged by, or None.
      unit: of the effect.
      verdict: `HOLDS`, `FAILS` or `NOT_TESTABLE`.
      note: what else there is to say.
    """

    claim: str
    needed: str
    effect: Interval | None
    unit: str
    verdict: str
    note: str = ""


FEWEST_SEEDS = 5
"""A bootstrap interval of fewer numbers says nothing."""


def judged(claim: str, needed: str, differences, unit: str, note: str = "") -> Verdict:
    """A claim that holds if the interval of a mean is above zero.

    Args:
      claim: in words.
      needed: in words.
      differences: f64[seeds], paired; fewer than `FEWEST_SEEDS` are not judged.
      unit: of the differences.
      note: what else there is to say.
    """
    effect = bootstrap_interval(differences)
    verdict = HOLDS if effect.low > 0 else FAILS
    if len(differences) < FEWEST_SEEDS:
        verdict, note = NOT_TESTABLE, f"{len(differences)} seeds are too few. {note}"
    return Verdict(claim, needed, effect, unit, verdict, note.strip())


def verdict_table(verdicts: Sequence[Verdict]) -> report.Table:
    """Every claim with its verdict."""
    return report.Table(
        "The paper's claims",
        columns=(
            report.Column("claim"),
            report.Column("verdict"),
            report.Column("effect", digits=3),
            report.Column("of what"),
            report.Column("needed"),
            report.Column("remarks"),
        ),
        rows=tuple(
            (
                v.claim,
                v.verdict,
                None if v.effect is None else report.Estimate(*v.effect),
                v.unit,
                v.needed,
                v.note,
            )
            for v in verdicts
        ),
        note="Differences between runs of one seed, with 95 % bootstrap intervals over "
        "seeds, which of few seeds are rather too narrow. What each claim needed was "
        "written before the first run, unless a remark says otherwise.",
    )


def verdict_cards(verdicts: Sequence[Verdict]) -> tuple[report.Card, ...]:
    """How many claims hold, and how many do not."""
    return tuple(
        report.Card(
            label,
            sum(verdict.verdict == kind for verdict in verdicts),
            f"of {len(verdicts)}",
        )
        for label, kind in (
            ("claims that hold", HOLDS),
            ("claims that do not", FAILS),
        )
    )
