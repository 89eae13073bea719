"""The claim about V, what it has to show here, and whether it does.

Judged by differences between numbers of one seed, with a bootstrap interval over seeds.
What the claim needs was written before anything was run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.sft_bridge.values import SFT, SIGNALS
from experiments.worlds.claims import FAILS, HOLDS, Verdict
from pref_jax.evals.preference import bootstrap_interval

MEASURES = {
    "correlation": "Spearman's correlation with V*",
    "auc": "AUC for a later win",
    "drop": "share of wrong moves that it falls at",
}
"""What signals are compared by."""


class Measured:
    """Results of the jobs as arrays.

    Args:
      results: of `run_jobs`, by name.
    """

    def __init__(self, results: Mapping[str, dict]):
        names = (name for name in results if name.startswith("values/"))
        self._values = [results[name] for name in names]

    def of(self, measure: str, signal: str) -> np.ndarray:
        """A measure of a signal: f64[seeds]."""
        place = SIGNALS.index(signal)
        return np.array([run[measure][place] for run in self._values], float)

    def alone(self, name: str) -> np.ndarray:
        """A number of each run: f64[seeds]."""
        return np.array([run[name] for run in self._values], float)


def strongest(measured: Measured, measure: str) -> str:
    """The control of the highest mean."""
    controls = [name for name in SIGNALS if name != SFT]
    return max(controls, key=lambda name: measured.of(measure, name).mean())


def _over_controls(measured: Measured, measure: str) -> Verdict:
    rival = strongest(measured, measure)
    effect = bootstrap_interval(measured.of(measure, SFT) - measured.of(measure, rival))
    return Verdict(
        claim=f"V of the SFT model knows the value of a state: by {MEASURES[measure]}.",
        needed="above its strongest control, the interval of the difference above zero",
        effect=effect,
        unit=f"{MEASURES[measure]}, less that of: {rival}",
        verdict=HOLDS if effect.low > 0 else FAILS,
    )


def _beyond(measured: Measured) -> Verdict:
    effect = bootstrap_interval(measured.alone("beyond"))
    return Verdict(
        claim="V of the SFT model tells more of V* than entropy and time do.",
        needed="a partial correlation whose interval is above zero",
        effect=effect,
        unit="Spearman's partial correlation with V*, given entropy and moves left",
        verdict=HOLDS if effect.low > 0 else FAILS,
    )


def judge(results: Mapping[str, dict]) -> list[Verdict]:
    """Every claim, by the results of all jobs."""
    measured = Measured(results)
    return [
        *(_over_controls(measured, measure) for measure in MEASURES),
        _beyond(measured),
    ]
