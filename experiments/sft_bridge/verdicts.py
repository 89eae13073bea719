"""The paper's claims, what each has to show here, and whether it does.

Judged by differences between numbers of one seed, with Student's interval over seeds.
What each claim needs was written before it was run; sizes and grids were set by trials
of seeds that are not reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.sft_bridge import arms
from experiments.sft_bridge.arms import (
    DIVERGENCES,
    EARLY,
    REDUCED,
    WHOLE,
    StagesConfig,
)
from experiments.sft_bridge.values import CONTROLS, SFT, SIGNALS
from experiments.worlds.claims import FAILS, HOLDS, NOT_TESTABLE, Verdict, judged

# --- what SFT leaves for DPO ----------------------------------------------------------

ABOVE = "above zero, with the whole interval"


class StagesMeasured:
    """Results of the jobs as arrays.

    Args:
      results: of `run_jobs`, by name.
      config: that the jobs were made of.
    """

    def __init__(self, results: Mapping[str, dict], config: StagesConfig):
        self.results, self.config = results, config
        self.arms = {arm.name: arm for arm in arms.make_arms(config)}
        self.rate = arms.best_rate(results, config)
        self.reduced = arms.reduced_arm(results, config)

    def _runs(self, job: str) -> list[dict]:
        job = self.reduced.name if job == REDUCED else job
        numbers = arms.seeds_of(self.config)
        return [self.results[f"stages/seed{n}/{job}"] for n in numbers]

    def of(self, arm: str, part: str, measure: str = "reward") -> np.ndarray:
        """A measure of an arm after a part, "sft" or "dpo": f64[seeds].

        Of the whole and of the reduced rate also after DPO on "own" pairs, and of the
        latter "matched": after DPO with the settings of the whole rate.
        """
        job = arm if part in ("sft", "dpo") else f"again/{arm}"
        return np.array([run[part][measure] for run in self._runs(job)], float)

    def alone(self, arm: str, name: str) -> np.ndarray:
        """A number of each run: f64[seeds]."""
        return np.array([run[name] for run in self._runs(arm)], float)

    def tuning(self, arm: str, key: str) -> np.ndarray:
        """What the choice of an arm has seen: f64[tuning seeds, ...]."""
        return arms.tuned(self.results, arm, key, self.config)

    def setting(self, arm: str) -> arms.Setting:
        """What an arm has chosen."""
        return arms.chosen_setting(self.results, self.arms[arm], self.config)

    def at_ends(self, arm: str) -> list[str]:
        """What of that lies at an end of what it has tried."""
        tried = arms.settings_of(self.arms[arm], self.config, self.results)
        return arms.at_ends(self.setting(arm), tried)

    def gains(self, ours: str, theirs: str, measure: str = "reward") -> np.ndarray:
        """Differences between two arms after DPO: f64[seeds]."""
        return self.of(ours, "dpo", measure) - self.of(theirs, "dpo", measure)


def judge_stages(measured: StagesMeasured) -> list[Verdict]:
    """Every claim on SFT, DPO and both at once."""
    whole = WHOLE.name

    def compared(claim, ours, theirs, note=""):
        unit = f"reward after DPO, {ours} less {theirs}"
        return judged(claim, ABOVE, measured.gains(ours, theirs), unit, note)

    def beyond(claim, ours, theirs, given: Verdict, what: str):
        """What is a question only if another claim holds."""
        found = compared(claim, ours, theirs)
        found = dataclasses.replace(found, needed=f"{what}, and this {ABOVE}")
        if given.verdict == HOLDS:
            return found
        became = "does not hold" if given.verdict == FAILS else "is not testable"
        note = f"{what} {became}"
        return dataclasses.replace(found, verdict=NOT_TESTABLE, note=note)

    first = compared(
        "A smaller learning rate of SFT gives a better model after DPO.",
        REDUCED,
        whole,
        f"chosen: {measured.reduced.name}",
    )
    own = measured.of(REDUCED, "own") - measured.of(whole, "own")
    matched = measured.of(REDUCED, "matched") - measured.of(whole, "dpo")
    found = [
        first,
        judged(
            "So it does with the settings of DPO that the whole rate has chosen.",
            ABOVE,
            matched,
            f"reward after DPO, {REDUCED} less {whole}",
            "added after a first run",
        ),
        judged(
            "So it does with pairs that each SFT model samples itself.",
            ABOVE,
            own,
            f"reward after DPO, {REDUCED} less {whole}",
            "settings chosen on the fixed pairs",
        ),
        *(
            beyond(
                f"It does more than {what}.", REDUCED, name, first, "the first claim"
            )
            for name, what in (
                (EARLY.name, "stopping early at the same validation loss"),
                ("explicit KL", "an explicit KL to the base"),
                ("decay to the base", "weight decay to the base"),
            )
        ),
    ]
    for name in DIVERGENCES:
        better = compared(
            f"SFT by {name} gives a better model after DPO than plain SFT, at the same "
            f"rate.",
            name,
            whole,
        )
        found += [
            better,
            beyond(
                f"SFT by {name} is better than plain SFT at its reduced rate, too.",
                name,
                REDUCED,
                better,
                "the claim before it",
            ),
        ]
    return [
        *found,
        compared(
            "Training on both losses at once is worse than one after the other.",
            whole,
            "joint",
        ),
    ]


# --- V --------------------------------------------------------------------------------

MEASURES = {
    "correlation": "Spearman's correlation with V*",
    "auc": "AUC for a later win",
    "drop": "share of wrong moves that it falls at",
}
"""What V is judged by."""

REPORTED = {**MEASURES, "at_move": "the same among states after as many moves"}
"""What signals are compared by; the last was added after the first results."""

_ADDED = "that sureness is a control was added after a first run"
_TURNED = f"{_ADDED}, that a control may be turned round after a second"


class ValuesMeasured:
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


NOTHING = {"correlation": 0.0, "auc": 0.5, "drop": 0.5}
"""What a signal has of each measure that tells nothing."""


def strongest(measured: ValuesMeasured, measure: str) -> tuple[str, np.ndarray]:
    """The control that tells most, and its measure: f64[seeds].

    One that falls where V* rises knows as much of it as one that rises: of each the
    signal or minus the signal is taken, whichever has the higher mean over seeds.
    """
    found = []
    for name in CONTROLS:
        values, nothing = measured.of(measure, name), NOTHING[measure]
        if values.mean() < nothing:
            name, values = f"{name}, turned round", 2 * nothing - values
        found.append((name, values))
    return max(found, key=lambda control: control[1].mean())


def _over_controls(measured: ValuesMeasured, measure: str) -> Verdict:
    rival, theirs = strongest(measured, measure)
    return judged(
        f"V of the SFT model knows the value of a state: by {MEASURES[measure]}.",
        "above its strongest control, the interval of the difference above zero",
        measured.of(measure, SFT) - theirs,
        f"{MEASURES[measure]}, less that of: {rival}",
        _TURNED,
    )


def _beyond(measured: ValuesMeasured) -> Verdict:
    return judged(
        "V of the SFT model tells more of V* than entropy and time do.",
        "a partial correlation whose interval is above zero",
        measured.alone("beyond"),
        "Spearman's partial correlation with V*, given entropy, sureness and moves "
        "left",
        _ADDED,
    )


def judge_values(measured: ValuesMeasured) -> list[Verdict]:
    """Every claim on V."""
    return [
        *(_over_controls(measured, measure) for measure in MEASURES),
        _beyond(measured),
    ]
