"""The report of the experiment: verdicts first, then what they rest on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.sft_bridge.arms import DIVERGENCES, REDUCED, WHOLE, tuning_seeds
from experiments.sft_bridge.config import Config
from experiments.sft_bridge.trainer import SlopeWatch
from experiments.sft_bridge.values import CONTROLS, SIGNALS
from experiments.sft_bridge.verdicts import (
    REPORTED,
    StagesMeasured,
    ValuesMeasured,
)
from experiments.worlds import sections as sections_lib
from experiments.worlds.claims import (
    STUDENT,
    Verdict,
    t_interval,
    verdict_cards,
    verdict_table,
)
from pref_jax import report

estimate = functools.partial(sections_lib.estimate, interval=t_interval)
series = functools.partial(sections_lib.series, interval=t_interval)

STAGE_MEASURES = {
    "reward": "true reward",
    "right": "right",
    "wins": "win rate over the expert",
    "kl": "KL to the base, nats / token",
    "entropy": "entropy, nats / token",
    "length": "length, tokens",
    "distinct": "distinct answers of a prompt",
}
"""What is measured of a model's answers, and how it is called."""


# --- what SFT leaves for DPO ----------------------------------------------------------


def headline(measured: StagesMeasured) -> list[dict]:
    """What the paper's abstract says, and the same figure here.

    Returns:
      For each: `what`, `paper`, `relative` (the gain in reward as a share of the mean
      of the whole rate) and `points` (of win rate), both after DPO and with intervals.
    """
    whole = WHOLE.name
    mean = measured.of(whole, "dpo").mean()

    def row(what, paper, name):
        return {
            "what": what,
            "paper": paper,
            "relative": t_interval(measured.gains(name, whole) / mean),
            "points": t_interval(measured.gains(name, whole, "wins")),
        }

    return [
        row(
            "a smaller learning rate of SFT",
            "up to 25 % relative, up to 6 points of win rate",
            REDUCED,
        ),
        *(
            row(
                f"SFT by {name}",
                "better; a review calls it weaker than the learning rate",
                name,
            )
            for name in DIVERGENCES
        ),
        row("both losses at once", "worse, as a review tells", "joint"),
    ]


def _headline(measured: StagesMeasured) -> report.Table:
    return report.Table(
        "The paper's figures beside ours",
        columns=(
            report.Column("what, less plain SFT at the whole rate"),
            report.Column("paper"),
            report.Column("reward here, relative", digits=1, percent=True),
            report.Column("win rate here, difference", digits=1, percent=True),
        ),
        rows=tuple(
            (
                row["what"],
                row["paper"],
                *(report.Estimate(*row[key]) for key in ("relative", "points")),
            )
            for row in headline(measured)
        ),
        note="After DPO. Win rates are over one answer of the expert to each prompt. "
        "The paper's are of its abstract and of a review; its models, judges and "
        "settings are not verified, and its tables are not reproduced.",
    )


def _arms(measured: StagesMeasured) -> report.Table:
    return report.Table(
        "Every arm, after SFT and after DPO",
        columns=(
            report.Column("arm"),
            report.Column("validation loss of SFT", digits=3, unit="nats / token"),
            report.Column("KL of SFT to the base", digits=3, unit="nats / token"),
            report.Column("reward after SFT", digits=3),
            report.Column("preference accuracy of SFT", digits=1, percent=True),
            report.Column("reward after DPO", digits=3),
            report.Column("right after DPO", digits=3),
            report.Column("win rate over the expert", digits=1, percent=True),
        ),
        rows=tuple(
            (
                name,
                estimate(measured.alone(name, "sft_loss")),
                estimate(measured.of(name, "sft", "kl")),
                estimate(measured.of(name, "sft")),
                estimate(measured.alone(name, "sft_accuracy")),
                *(
                    estimate(measured.of(name, "dpo", measure))
                    for measure in ("reward", "right", "wins")
                ),
            )
            for name in measured.arms
        ),
        note="Means with 95 % intervals over seeds, at temperature 1. Preference "
        "accuracy is of log(pi / pi_0), the implicit reward of SFT, on held-out pairs; "
        "the base against itself is undecided, which counts as a half. Without SFT, "
        f"and with both losses at once, what is called SFT here is the base. The "
        f"reduced rate is {measured.reduced.name}.",
    )


def _behaviour(measured: StagesMeasured) -> report.Table:
    shown = ("kl", "entropy", "length", "distinct")
    return report.Table(
        "Behaviour after DPO",
        columns=(
            report.Column("arm"),
            *(report.Column(STAGE_MEASURES[name], digits=3) for name in shown),
            report.Column("updates of SFT", digits=1),
        ),
        rows=tuple(
            (
                name,
                *(estimate(measured.of(name, "dpo", part)) for part in shown),
                estimate(measured.alone(name, "sft_updates")),
            )
            for name in measured.arms
        ),
        note="KL is exact over the vocabulary, on the model's own answers.",
    )


def _choices(measured: StagesMeasured) -> report.Table:
    rows = []
    for name in measured.arms:
        setting = measured.setting(name)
        rewards = measured.tuning(name, "rewards").mean(axis=0)
        rows.append(
            (
                *(name, setting.knob, setting.dpo_beta, f"{setting.dpo_rate:g}"),
                *(len(rewards), rewards.min(), rewards.max()),
                ", ".join(measured.at_ends(name)),
            )
        )
    return report.Table(
        "What each arm has chosen",
        columns=(
            report.Column("arm"),
            report.Column("its own number"),
            report.Column("beta of DPO"),
            report.Column("learning rate of DPO"),
            report.Column("settings tried", digits=0),
            report.Column("lowest reward of them", digits=3),
            report.Column("highest", digits=3),
            report.Column("at an end of its grid"),
        ),
        rows=tuple(rows),
        note=f"By the reward on validation prompts, a mean over "
        f"{measured.config.num_tuning_seeds} seeds that are not reported. The whole "
        f"rate of SFT is {measured.rate:g}, whose validation loss was the lowest of "
        f"{', '.join(f'{x:g}' for x in measured.config.sft_rates)}.",
    )


def _rates(measured: StagesMeasured) -> report.Curves:
    names = [WHOLE.name, *(n for n, a in measured.arms.items() if a.fraction < 1)]
    x = [measured.arms[name].fraction * measured.rate for name in names]

    def panel(title, label, lines):
        return report.Panel(
            title,
            "learning rate of SFT",
            label,
            tuple(series(name, x, np.stack(values)) for name, values in lines.items()),
            log_x=True,
        )

    def of(part, measure="reward"):
        return [measured.of(name, part, measure) for name in names]

    return report.Curves(
        "The learning rate of SFT",
        panels=(
            panel("reward", "true reward", {"SFT": of("sft"), "DPO": of("dpo")}),
            panel(
                "distance",
                "KL to the base, nats / token",
                {"SFT": of("sft", "kl"), "DPO": of("dpo", "kl")},
            ),
            panel(
                "fit",
                "validation loss of SFT",
                {"SFT": [measured.alone(name, "sft_loss") for name in names]},
            ),
            panel(
                "implicit reward of SFT",
                "accuracy on held-out pairs",
                {"SFT": [measured.alone(name, "sft_accuracy") for name in names]},
            ),
        ),
        note="Bands are 95 % intervals over seeds.",
    )


def _divergences(measured: StagesMeasured) -> report.Curves:
    betas = measured.config.divergence_betas

    def panel(label, key):
        (plain,) = measured.tuning(WHOLE.name, key).mean(axis=0)
        lines = [
            report.Series(name, betas, tuple(measured.tuning(name, key).mean(axis=0)))
            for name in DIVERGENCES
        ]
        lines.append(report.Series("plain SFT", betas, (plain,) * len(betas)))
        return report.Panel(label, "beta", label, tuple(lines), log_x=True)

    return report.Curves(
        "f-divergences after SFT",
        panels=(
            panel("KL to the base, nats / token", "sft_kl"),
            panel("validation loss", "sft_loss"),
        ),
        note="Means over the seeds that settings are chosen on: no intervals.",
    )


def _slopes(measured: StagesMeasured) -> report.Curves:
    betas, median = measured.config.divergence_betas, SlopeWatch.LEVELS.index(0.5)
    first = tuning_seeds(measured.config)[0]
    low, high = 0, len(SlopeWatch.LEVELS) - 1

    def line(name, beta, seen):
        found = np.array(seen["at"], float).T
        return report.Series(
            f"beta {beta:g}",
            tuple(map(float, seen["steps"])),
            *(tuple(found[i]) for i in (median, low, high)),
        )

    return report.Curves(
        "The weight h'(v) of a demonstration's tokens, over SFT",
        panels=tuple(
            report.Panel(
                name,
                "update of SFT",
                "h'(v)",
                tuple(
                    line(name, beta, seen)
                    for beta, seen in zip(
                        betas,
                        measured.results[f"stages/tune{first}/{name}"]["slopes"],
                        strict=True,
                    )
                ),
            )
            for name in DIVERGENCES
        ),
        note="On held-out demonstrations of the first of the seeds that settings are "
        "chosen on: the median of the tokens, and the band of 5 to 95 %. Plain SFT has "
        "1 throughout.",
    )


def _own_pairs(measured: StagesMeasured) -> report.Table:
    names = (WHOLE.name, REDUCED)
    return report.Table(
        "With pairs of each SFT model's own",
        columns=(
            report.Column("arm"),
            report.Column("reward after DPO", digits=3),
            report.Column("on the fixed pairs", digits=3),
            report.Column("pairs", digits=0),
        ),
        rows=tuple(
            (
                name,
                estimate(measured.of(name, "own")),
                estimate(measured.of(name, "dpo")),
                estimate(measured.alone(f"again/{name}", "own_pairs")),
            )
            for name in names
        ),
        note="The SFT model answers the prompts of the fixed pairs twice; the same "
        "judge compares. Pairs of equal rewards are left out; the updates are as many "
        "as on the fixed pairs.",
    )


def _of_stages(measured: StagesMeasured) -> tuple:
    return (
        _headline(measured),
        _arms(measured),
        _rates(measured),
        _divergences(measured),
        _slopes(measured),
        _own_pairs(measured),
        _behaviour(measured),
        _choices(measured),
    )


# --- V --------------------------------------------------------------------------------


def _signals(measured: ValuesMeasured) -> report.Table:
    return report.Table(
        "What signals tell of a state",
        columns=(
            report.Column("signal"),
            report.Column("role"),
            *(report.Column(name, digits=3) for name in REPORTED.values()),
        ),
        rows=tuple(
            (
                name,
                "control" if name in CONTROLS else "",
                *(estimate(measured.of(measure, name)) for measure in REPORTED),
            )
            for name in SIGNALS
        ),
        note="Over all states of responses that the SFT model writes in rooms that no "
        "training saw, with 95 % intervals over seeds. At a wrong move the signal "
        "after it is compared with that after the model's own move.",
    )


def _runs(measured: ValuesMeasured) -> report.Table:
    return report.Table(
        "The runs",
        columns=(report.Column("number"), report.Column("mean over seeds", digits=3)),
        rows=(
            ("rooms that the SFT model wins", estimate(measured.alone("won"))),
            ("rooms that pi* wins", estimate(measured.alone("won_by_best"))),
            ("states", estimate(measured.alone("states"))),
            ("pairs of DPO", estimate(measured.alone("pairs"))),
            (
                "responses of fewer than two moves",
                estimate(measured.alone("too_short")),
            ),
            (
                "partial correlation of V with V*, given entropy, sureness and moves",
                estimate(measured.alone("beyond")),
            ),
        ),
        note="Responses of fewer than two moves are not measured.",
    )


def make_report(
    results: Mapping[str, dict],
    verdicts: Sequence[Verdict],
    *,
    parts: Config,
    config: dict,
    meta: dict,
) -> report.Report:
    """The page.

    Args:
      results: of all jobs, by name.
      verdicts: of the claims.
      parts: the config; what is left out has no section.
      config: the same as plain values, for the end of the page.
      meta: facts of the run.
    """
    sections, seeds = [], []
    if parts.stages is not None:
        sections += _of_stages(StagesMeasured(results, parts.stages))
        seeds.append(f"SFT and DPO: {parts.stages.num_seeds} seeds")
    if parts.values is not None:
        measured = ValuesMeasured(results)
        sections += [_signals(measured), _runs(measured)]
        seeds.append(f"V: {parts.values.num_seeds} seeds")
    return report.Report(
        title="The bridge between SFT and DPO",
        subtitle="learning rates, f-divergences, and what logits know, "
        "arXiv:2507.00018",
        summary=f"{'; '.join(seeds)}; each with a model and data of its own. Only the "
        "paper's abstract was read: the tests are ours, and so are all sizes.",
        cards=verdict_cards(verdicts),
        sections=(
            verdict_table(verdicts, STUDENT),
            *sections,
            report.Config("Config", config),
        ),
        meta=meta,
    )
