"""A paper's claims: what each needs to hold here, and what became of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.special

from pref_jax import report
from pref_jax.evals.preference import Interval

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


def t_interval(values, *, confidence: float = 0.95) -> Interval:
    """Mean of a few values, such as one a seed, with Student's t interval.

        mean +- t(N - 1) * s / sqrt(N)

    A percentile bootstrap of five values covers less than it says: of normal ones 84 %
    where it says 95 %. This one covers of normal values what it says, however few.

    Source: Student, "The probable error of a mean" (1908).

    Args:
      values: float[N], N at least 2. For a paired comparison, differences.
      confidence: of the two-sided interval.

    Raises:
      ValueError: fewer than two values, or one is not finite.

    >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
    >>> mean, round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"an interval over seeds needs two finite numbers or more, one a seed; got "
            f"{values.tolist()}."
        )
    error = values.std(ddof=1) / np.sqrt(values.size)
    reach = scipy.special.stdtrit(values.size - 1, (1 + confidence) / 2) * error
    mean = values.mean()
    return Interval(float(mean), float(mean - reach), float(mean + reach))


FEWEST_SEEDS = 5
"""Of fewer numbers nothing is judged."""

BOOTSTRAPPED = (
    "95 % bootstrap intervals over seeds, which of few seeds are rather too narrow"
)
STUDENT = "95 % intervals of Student's t over seeds"


def judged(claim: str, needed: str, differences, unit: str, note: str = "") -> Verdict:
    """A claim that holds if Student's interval of a mean is above zero.

    Args:
      claim: in words.
      needed: in words.
      differences: f64[seeds], paired; fewer than `FEWEST_SEEDS` are not judged.
      unit: of the differences.
      note: what else there is to say.
    """
    effect = t_interval(differences)
    verdict = HOLDS if effect.low > 0 else FAILS
    if len(differences) < FEWEST_SEEDS:
        verdict, note = NOT_TESTABLE, f"{len(differences)} seeds are too few. {note}"
    return Verdict(claim, needed, effect, unit, verdict, note.strip())


def verdict_table(verdicts: Sequence[Verdict], intervals: str) -> report.Table:
    """Every claim with its verdict.

    Args:
      verdicts: of the claims.
      intervals: `BOOTSTRAPPED` or `STUDENT`.
    """
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
        note=f"Differences between runs of one seed, with {intervals}. What each claim "
        f"needed was written before the first run, unless a remark says otherwise. "
        f"Verdicts are not corrected for their number.",
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
