"""The report of the experiment: verdicts first, then what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.adpo import language, online
from experiments.adpo.arms import ADPO, ARMS, SAME_PAIRS
from experiments.adpo.distillation import SIMULATED
from experiments.adpo.suite import MEDIUM, REFERENCE, BanditConfig
from experiments.adpo.verdicts import DYNAMIC, Measured
from experiments.worlds import bandits
from experiments.worlds.claims import (
    BOOTSTRAPPED,
    Verdict,
    verdict_cards,
    verdict_table,
)
from experiments.worlds.sections import estimate, series
from pref_jax import report
from pref_jax.evals.preference import Interval

_OF_MEDIUM = [list(bandits.SCENARIOS).index(name) for name in MEDIUM]
"""Where the scenarios of the sweeps stand among the twelve."""


def _shown(interval: Interval) -> report.Estimate:
    return report.Estimate(*interval)


def _beside(measured: Measured, config: BanditConfig) -> report.Table:
    """What the paper's texts say, and the same figure here."""
    one_pair, all_pairs, names = "DPO, one pair", "DPO, all pairs", bandits.SCENARIOS

    def gain(version, what, paper, kind):
        rows = [i for i, name in enumerate(names) if kind in name]
        for rival in (one_pair, all_pairs):
            ours, theirs = (measured.arm(name)[rows] for name in (ADPO, rival))
            mean = estimate(((ours - theirs) / theirs).mean(0))
            yield version, f"{what}; here over {rival}", paper, mean, None

    def heavy_tails(version, what, paper, arm):
        found = measured.arm(arm)[list(names).index("cauchy, heavy")]
        return version, f"{what}, heavy tails", paper, None, estimate(found)

    def largest(what, paper, arm):
        size = max(config.sizes)
        found = estimate(measured.of(f"size/{size}/{arm}").mean(0))
        return "2", f"{what}, hidden size 256; here {size}", paper, None, found

    def moving():
        ends = (measured.online(name)[..., -1] for name in (online.FIXED, DYNAMIC))
        fixed, moved = ends
        mean = estimate(((moved - fixed) / fixed).mean(0))
        return "6", f"gain of a moving anchor; here {DYNAMIC}", "5 to 11 %", mean, None

    return report.Table(
        "The paper's figures beside ours",
        columns=(
            report.Column("version"),
            report.Column("what"),
            report.Column("paper"),
            report.Column("gain here", digits=1, percent=True),
            report.Column("win mass here", digits=3),
        ),
        rows=(
            *gain("6", "gain over standard DPO, 12 scenarios", "12 to 93 %", ""),
            *gain("December", "gain over DPO, shift", "13.6 %", "shift"),
            *gain("December", "gain over DPO, adversarial", "9.3 %", "adversarial"),
            *([moving()] if measured.has("online") else []),
            heavy_tails("1", "smoothed ranks", "0.68", f"{ADPO}, KDE"),
            heavy_tails("1", f"{one_pair} (the paper: DPO)", "0.32", one_pair),
            heavy_tails("4, 5", "list", "0.809", ADPO),
            heavy_tails("4, 5", f"{all_pairs} (the paper: DPO)", "0.472", all_pairs),
            *(
                largest(what, paper, arm)
                for what, paper, arm in (
                    ("list", "0.718", ADPO),
                    (f"{one_pair} (the paper: DPO)", "0.416", one_pair),
                )
                if config.sizes
            ),
        ),
        note="Not the same worlds: the paper's noise, sizes and steps are not "
        "verified, so that only signs and orders can be compared. Its versions "
        "contradict each other.",
    )


def _scenarios(measured: Measured) -> report.Comparisons:
    """Twelve panels: the win mass of every arm."""
    names = [REFERENCE, *ARMS]
    values = {REFERENCE: measured.of(REFERENCE)}
    values |= {name: measured.arm(name) for name in ARMS}
    return report.Comparisons(
        "Win mass in the twelve scenarios",
        panels=tuple(
            report.Comparison(
                scenario,
                "win mass",
                {name: estimate(values[name][i]) for name in names},
                marked=float(measured.of(REFERENCE)[i].mean()),
            )
            for i, scenario in enumerate(bandits.SCENARIOS)
        ),
        note="Probability that the policy gives to the truly best item of fresh "
        "contexts, with 95 % intervals over seeds; the dashed line is the reference. "
        "One pair of a list, all its pairs, and its labels are different amounts of "
        "information.",
    )


def _arm_table(measured: Measured) -> report.Table:
    def row(name, of):
        parts = ("win_mass", "accuracy", "reward", "kl")
        return (name, *(estimate(of(part).mean(0)) for part in parts))

    return report.Table(
        "Means over the twelve scenarios",
        columns=(
            report.Column("method"),
            report.Column("win mass", digits=3),
            report.Column("accuracy", digits=3),
            report.Column("true reward", digits=3),
            report.Column("KL to the reference", digits=3, unit="nats"),
        ),
        rows=(
            row(REFERENCE, lambda part: measured.of(REFERENCE, part)),
            *(row(name, lambda part, n=name: measured.arm(n, part)) for name in ARMS),
        ),
        note="Win mass rewards a sharp policy; accuracy is how often its likeliest "
        "item is the best one, and does not.",
    )


def _sweep(measured: Measured, name: str, values: Sequence[float]) -> report.Curves:
    def panel(measure, label):
        found = np.stack([measured.of(f"{name}/{value}", measure) for value in values])
        return report.Panel(
            label,
            name,
            label,
            tuple(
                series(scenario, values, found[:, i])
                for i, scenario in enumerate(MEDIUM)
            ),
            log_x=True,
        )

    return report.Curves(
        f"{ADPO}: {name}",
        panels=(
            panel("win_mass", "win mass"),
            panel("kl", "KL to the reference, nats"),
        ),
        note=f"The other numbers are those chosen on validation contexts; {name} "
        f"changes the sharpness of the optimum, and with it the win mass.",
    )


def _calibration(results: Mapping[str, dict]) -> report.Curves:
    lines = []
    for name in (ADPO, f"{ADPO}, KDE", f"{ADPO}, snapshot"):
        counts, said, meant = np.array(
            results[f"bandits/test/{name}"]["calibration"], float
        ).T
        some = counts > 0
        lines.append(
            report.Series(
                name,
                tuple(said[some] / counts[some]),
                tuple(meant[some] / counts[some]),
            )
        )
    ends = (0.0, 1.0)
    return report.Curves(
        "What the policy says of an item, and what it was to say",
        panels=(
            report.Panel(
                "calibration",
                "softmax of the anchored scores",
                "target of the clean labels, mean",
                (*lines, report.Series("equal", ends, ends)),
            ),
        ),
        note="Items of all test contexts in bins of the policy's anchored "
        "distribution; the target is the method's own, of the clean labels.",
    )


_ANCHORED_LISTS = {
    "none": "unanchored list",
    "fixed": ADPO,
    "snapshot, every 100": f"{ADPO}, snapshot",
    "EMA": f"{ADPO}, EMA",
    "on policy": f"{ADPO}, on policy",
}
"""Arms that fit the softmax of the same labels and differ in their anchor."""


def _anchors(measured: Measured) -> report.Comparisons:
    """Four panels: the anchors of one loss, by the kind of noise."""
    kinds = dict.fromkeys(name.split(",")[0] for name in bandits.SCENARIOS)
    return report.Comparisons(
        "Anchors of the listwise loss",
        panels=tuple(
            report.Comparison(
                kind,
                "win mass",
                {
                    anchor: estimate(measured.arm(name)[rows].mean(0))
                    for anchor, name in _ANCHORED_LISTS.items()
                },
                marked=float(measured.of(REFERENCE)[rows].mean()),
            )
            for kind in kinds
            for rows in [
                [i for i, x in enumerate(bandits.SCENARIOS) if x.startswith(kind)]
            ]
        ),
        note="Means over three severities on fixed data, settings chosen for each "
        "anchor; the dashed line is the reference. An anchor that moves while the "
        "labels stay multiplies by their target again and again: noise included.",
    )


def _qualities(measured: Measured, config: BanditConfig) -> report.Table:
    rows = []
    for with_anchor, without in SAME_PAIRS:
        for steps in (config.world.reference_steps, *config.reference_steps):
            if steps == config.world.reference_steps:
                ours, theirs = (
                    measured.arm(n)[_OF_MEDIUM] for n in (with_anchor, without)
                )
            else:
                ours, theirs = (
                    measured.of(f"quality/{steps}/{n}") for n in (with_anchor, without)
                )
            difference = estimate((ours - theirs).mean(0))
            rows.append((f"{with_anchor} - {without}", steps, difference))
    return report.Table(
        "Anchoring, and how good the reference is",
        columns=(
            report.Column("difference"),
            report.Column("updates of the reference"),
            report.Column("win mass", digits=4),
        ),
        rows=tuple(rows),
        note="Means over the four scenarios of medium severity, paired by seed.",
    )


def _sizes(measured: Measured, config: BanditConfig, names: Sequence[str]):
    sizes = (config.world.hidden, *config.sizes)
    lines = []
    for name in names:
        values = [measured.arm(name)[_OF_MEDIUM]]
        values += [measured.of(f"size/{size}/{name}") for size in config.sizes]
        lines.append(series(name, sizes, np.stack(values).mean(1)))
    return report.Curves(
        "Larger networks",
        panels=(
            report.Panel(
                "win mass", "hidden size", "win mass", tuple(lines), log_x=True
            ),
        ),
        note="Means over the four scenarios of medium severity; settings were chosen "
        "for the smallest network.",
    )


def _online(measured: Measured, config: online.OnlineConfig) -> report.Curves:
    steps = range(0, config.num_steps + 1, config.measure_every)
    return report.Curves(
        "Anchors that move, online",
        panels=tuple(
            report.Panel(
                scenario,
                "update",
                "win mass",
                tuple(
                    series(name, steps, measured.online(name)[i].T)
                    for name in online.ANCHORS
                ),
            )
            for i, scenario in enumerate(MEDIUM)
        ),
        note="On clean test contexts. The policy draws the candidates that it learns "
        "from, and sees their labels once.",
    )


def _language(measured: Measured, results) -> report.Table:
    rows = []
    for rate in measured.flip_rates:
        for arm in language.ARMS:
            parts = ("reward", "right", "kl", "length")
            found = (measured.language(rate, arm.name, part) for part in parts)
            rows.append((f"{rate:.0%}", arm.name, *map(estimate, found)))
    sft = results["language/SFT"]
    start = (sft[part] for part in ("reward", "right", "kl", "length"))
    return report.Table(
        "Language model",
        columns=(
            report.Column("lists negated"),
            report.Column("method"),
            report.Column("true reward", digits=3),
            report.Column("right", digits=3),
            report.Column("KL to SFT", digits=3, unit="nats / token"),
            report.Column("length", digits=1, unit="tokens"),
        ),
        rows=(("-", "SFT", *start), *rows),
        note=f"Of answers to prompts that no stage has seen, with 95 % intervals over "
        f"seeds, which draw the wrong labels and the order; {sft['num_lists']} lists, "
        f"the best answer of a list having a true reward of {sft['best_of_list']:.3f}.",
    )


def _distillation(measured: Measured) -> report.Table:
    rows = []
    for task in measured.tasks:
        full, none, likeliest = measured.teacher(task)
        rows.append((f"{task}, teacher", full, 1.0, likeliest, 0.0, 1.0, None))
        rows.append((f"{task}, untrained", none, 0.0, None, None, None, None))
        rows += [
            (
                f"{task}, {student.name}",
                *(_shown(student.returned), _shown(student.gain)),
                *(_shown(student.likeliest), _shown(student.kl), _shown(student.ndcg)),
                student.temperature,
            )
            for student in measured.students()
            if student.task == task
        ]
    return report.Table(
        "Distillation of policies",
        columns=(
            report.Column("task, student"),
            report.Column("return", digits=1),
            report.Column("of the teacher's gain", digits=1, percent=True),
            report.Column("return, likeliest actions", digits=1),
            report.Column("KL(teacher, student)", digits=4, unit="nats"),
            report.Column("NDCG", digits=4),
            report.Column("temperature", digits=1),
        ),
        rows=tuple(rows),
        note="With 95 % intervals over seeds of states, start and order; one teacher a "
        "task. Of four temperatures the one of the best return on other episodes. "
        "Actions are drawn, but in the control, which takes the likeliest: a student "
        "that is sharper than its teacher returns more by drawing fewer bad ones.",
    )


_PAPERS_STUDENTS = {
    ("HalfCheetah-v5", "KD"): ("-309.0 +- 98.2 (-3.6 %)", "30.50", "0.857"),
    ("HalfCheetah-v5", "self-anchor"): ("279.3 +- 53.2 (3.3 %)", "10.45", "0.765"),
    ("HalfCheetah-v5", "self-anchor EMA"): ("166.8 +- 227.0 (2.0 %)", "0.62", "0.858"),
    ("Hopper-v5", "KD"): ("36.9 +- 20.2 (3.2 %)", "16.98", "0.799"),
    ("Hopper-v5", "self-anchor"): ("177.3 +- 158.4 (15.2 %)", "7.61", "0.684"),
    ("Hopper-v5", "self-anchor EMA"): ("855.6 +- 269.1 (73.1 %)", "3.97", "0.755"),
}
"""Return with its share of the teacher's 8476.5 or 1169.8, KL and NDCG: December text.
"""


def _beside_students(measured: Measured) -> report.Table:
    students = {(s.task, s.name): s for s in measured.students()}
    rows = [
        (
            ", ".join(of),
            returned,
            *(_shown(students[of].returned), _shown(students[of].share)),
            *(kl, _shown(students[of].kl), ndcg, _shown(students[of].ndcg)),
        )
        for of, (returned, kl, ndcg) in _PAPERS_STUDENTS.items()
        if of in students
    ]
    return report.Table(
        "The paper's students beside ours",
        columns=(
            report.Column("task, student"),
            report.Column("return, paper (of its teacher)"),
            report.Column("return here", digits=1),
            report.Column("of our teacher", digits=1, percent=True),
            report.Column("KL, paper"),
            report.Column("KL here", digits=4, unit="nats"),
            report.Column("NDCG, paper"),
            report.Column("NDCG here", digits=4),
        ),
        rows=tuple(rows),
        note="Not the same teachers: the paper's return 8476.5 and 1169.8 and are not "
        "published, nor are the students' sizes, states and steps. Nothing here is a "
        "reproduction of its figures.",
    )


def make_report(
    results: Mapping[str, dict],
    verdicts: Sequence[Verdict],
    *,
    suite: BanditConfig | None,
    online_config: online.OnlineConfig | None,
    sizes_of: Sequence[str],
    config: dict,
    meta: dict,
) -> report.Report:
    """The page.

    Args:
      results: of all jobs, by name.
      verdicts: of `verdicts.judge`.
      suite: config of the bandits, or None.
      online_config: of the online part, or None.
      sizes_of: arms that were trained with larger networks.
      config: the whole config, for the end of the page.
      meta: facts of the run.
    """
    measured = Measured(results)
    summary, cards, sections = [], [], []
    if suite is not None:
        summary.append(
            f"{suite.num_seeds} paired seeds; every method chose its setting from "
            f"nine, for each scenario, on {suite.num_tuning_seeds} other seeds and "
            f"clean validation contexts. The paper's own sizes and noise are not "
            f"verified, so the scenarios are ours; none of its tables is reproduced."
        )
        cards += [
            report.Card(
                f"{ADPO} over {rival}",
                estimate((measured.arm(ADPO) - measured.arm(rival)).mean(0)),
                f"win mass, mean of 12 scenarios; {information} information",
                digits=3,
            )
            for rival, information in (
                ("DPO, all pairs", "the same"),
                ("DPO, one pair", "more"),
            )
        ]
        sections += [
            _beside(measured, suite),
            _scenarios(measured),
            _arm_table(measured),
            _anchors(measured),
            _qualities(measured, suite),
            _sweep(measured, "tau", suite.taus),
            _sweep(measured, "temperature", suite.temperatures),
            _calibration(results),
            _sizes(measured, suite, sizes_of),
        ]
    if online_config is not None:
        sections.append(_online(measured, online_config))
    if measured.has("language"):
        sections.append(_language(measured, results))
    if measured.has("distillation"):
        sections.append(_distillation(measured))
        if any(task in SIMULATED for task in measured.tasks):
            summary.append(
                "Teachers are our own: those of the paper are not published, and its "
                "figures stand beside ours for comparison of signs alone."
            )
            sections.append(_beside_students(measured))
    return report.Report(
        title="ADPO: which claims hold",
        subtitle="where the truth is known, arXiv:2510.18913v6",
        summary=" ".join(summary),
        cards=(*verdict_cards(verdicts), *cards),
        sections=(
            verdict_table(verdicts, BOOTSTRAPPED),
            *sections,
            report.Config("Config", config),
        ),
        meta=meta,
    )
