"""The paper's claims, what each has to show here, and whether it does.

Judged by differences between numbers of one seed, with a bootstrap interval over seeds.
What each claim needs was written before anything was run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.sft_bridge import stages
from experiments.sft_bridge.stages import DIVERGENCES, EARLY, WHOLE, Arm, StagesConfig
from experiments.sft_bridge.values import CONTROLS, SFT, SIGNALS
from experiments.worlds.claims import FAILS, HOLDS, Verdict
from pref_jax.evals.preference import bootstrap_interval

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
        self.arms = {arm.name: arm for arm in stages.make_arms(config)}
        self.rate = stages.best_rate(results, config)
        self.reduced = stages.best_reduced(results, config)
        self.joint = "joint"

    def _runs(self, arm: str) -> list[dict]:
        numbers = stages.seeds_of(self.config)
        return [self.results[f"stages/seed{n}/{arm}"] for n in numbers]

    def of(self, arm: str, part: str, measure: str = "reward") -> np.ndarray:
        """A measure of an arm after a part, "sft", "dpo" or "own": f64[seeds]."""
        return np.array([run[part][measure] for run in self._runs(arm)], float)

    def alone(self, arm: str, name: str) -> np.ndarray:
        """A number of each run: f64[seeds]."""
        return np.array([run[name] for run in self._runs(arm)], float)

    def tuning(self, arm: str) -> dict:
        """What the choice of an arm has seen."""
        return self.results[f"stages/tune/{arm}"]

    def setting(self, arm: str) -> stages.Setting:
        """What an arm has chosen."""
        return stages.chosen_setting(self.results, self.arms[arm], self.config)

    def best_divergence(self) -> Arm:
        """The f-divergence that the tuning seed prefers."""
        arms = [self.arms[name] for name in DIVERGENCES]
        return max(arms, key=lambda arm: stages.tuned(self.results, arm))


def _judged(claim: str, ours, theirs, unit: str, note: str = "") -> Verdict:
    effect = bootstrap_interval(ours - theirs)
    return Verdict(
        claim=claim,
        needed=ABOVE,
        effect=effect,
        unit=unit,
        verdict=HOLDS if effect.low > 0 else FAILS,
        note=note,
    )


def judge_stages(measured: StagesMeasured) -> list[Verdict]:
    """Every claim on SFT, DPO and both at once."""
    whole, reduced = WHOLE.name, measured.reduced.name

    def after_dpo(claim, ours, theirs, note=""):
        return _judged(
            claim,
            measured.of(ours, "dpo"),
            measured.of(theirs, "dpo"),
            f"reward after DPO, {ours} less {theirs}",
            note,
        )

    chosen = f"{reduced} is the reduced rate that the tuning seed prefers"
    best = measured.best_divergence().name
    return [
        after_dpo(
            "A smaller learning rate of SFT gives a better model after DPO.",
            reduced,
            whole,
            chosen,
        ),
        _judged(
            "So it does with pairs that each SFT model samples itself.",
            measured.of(reduced, "own"),
            measured.of(whole, "own"),
            f"reward after DPO, {reduced} less {whole}",
            "settings chosen on the fixed pairs",
        ),
        after_dpo(
            "It does more than stopping early at the same validation loss.",
            reduced,
            EARLY.name,
        ),
        after_dpo(
            "It does more than an explicit KL to the base.", reduced, "explicit KL"
        ),
        after_dpo(
            "It does more than weight decay to the base.", reduced, "decay to the base"
        ),
        *(
            after_dpo(
                f"SFT by {name} gives a better model after DPO than plain SFT, at the "
                f"same rate.",
                name,
                whole,
            )
            for name in DIVERGENCES
        ),
        after_dpo(
            "SFT by the best f-divergence gives a better model after DPO than plain "
            "SFT at its best reduced rate.",
            best,
            reduced,
            f"{best} is the divergence that the tuning seed prefers",
        ),
        after_dpo(
            "Training on both losses at once is worse than one after the other.",
            whole,
            measured.joint,
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


def strongest(measured: ValuesMeasured, measure: str) -> str:
    """The control of the highest mean."""
    return max(CONTROLS, key=lambda name: measured.of(measure, name).mean())


def _over_controls(measured: ValuesMeasured, measure: str) -> Verdict:
    rival = strongest(measured, measure)
    effect = bootstrap_interval(measured.of(measure, SFT) - measured.of(measure, rival))
    return Verdict(
        claim=f"V of the SFT model knows the value of a state: by {MEASURES[measure]}.",
        needed="above its strongest control, the interval of the difference above zero",
        effect=effect,
        unit=f"{MEASURES[measure]}, less that of: {rival}",
        verdict=HOLDS if effect.low > 0 else FAILS,
    )


def _beyond(measured: ValuesMeasured) -> Verdict:
    effect = bootstrap_interval(measured.alone("beyond"))
    return Verdict(
        claim="V of the SFT model tells more of V* than entropy and time do.",
        needed="a partial correlation whose interval is above zero",
        effect=effect,
        unit="Spearman's partial correlation with V*, given entropy, sureness and "
        "moves left",
        verdict=HOLDS if effect.low > 0 else FAILS,
    )


def judge_values(measured: ValuesMeasured) -> list[Verdict]:
    """Every claim on V."""
    return [
        *(_over_controls(measured, measure) for measure in MEASURES),
        _beyond(measured),
    ]
