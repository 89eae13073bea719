"""The report of the experiment: verdicts first, then what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.sft_bridge.values import SFT, SIGNALS
from experiments.sft_bridge.verdicts import MEASURES, Measured
from experiments.worlds.claims import Verdict, verdict_cards, verdict_table
from experiments.worlds.sections import estimate
from pref_jax import report


def _signals(measured: Measured) -> report.Table:
    return report.Table(
        "What signals tell of a state",
        columns=(
            report.Column("signal"),
            report.Column("role"),
            *(report.Column(name, digits=3) for name in MEASURES.values()),
        ),
        rows=tuple(
            (
                name,
                "" if name == SFT else "control",
                *(estimate(measured.of(measure, name)) for measure in MEASURES),
            )
            for name in SIGNALS
        ),
        note="Over all states of responses that the SFT model writes in rooms that no "
        "training saw, with 95 % intervals over seeds. At a wrong move the signal "
        "after it is compared with that after the model's own move.",
    )


def _runs(measured: Measured) -> report.Table:
    return report.Table(
        "The runs",
        columns=(report.Column("number"), report.Column("mean over seeds", digits=3)),
        rows=(
            ("rooms that the SFT model wins", estimate(measured.alone("won"))),
            ("rooms that pi* wins", estimate(measured.alone("won_by_best"))),
            ("states", estimate(measured.alone("states"))),
            (
                "responses of fewer than two moves",
                estimate(measured.alone("too_short")),
            ),
            (
                "partial correlation of V with V*, given entropy and moves left",
                estimate(measured.alone("beyond")),
            ),
        ),
        note="Responses of fewer than two moves are not measured.",
    )


def make_report(
    results: Mapping[str, dict],
    verdicts: Sequence[Verdict],
    *,
    num_seeds: int,
    config: dict,
    meta: dict,
) -> report.Report:
    """The page.

    Args:
      results: of all jobs, by name.
      verdicts: of `verdicts.judge`.
      num_seeds: of the part on values.
      config: the whole config, for the end of the page.
      meta: facts of the run.
    """
    measured = Measured(results)
    return report.Report(
        title="The bridge between SFT and DPO",
        subtitle="what the logits of an SFT model know, arXiv:2507.00018",
        summary=f"{num_seeds} seeds, each with a model, demonstrations and rooms of "
        "its own. Only the paper's abstract was read; the test is ours, and so are all "
        "sizes. Its other claims are not tested here.",
        cards=verdict_cards(verdicts),
        sections=(
            verdict_table(verdicts),
            _signals(measured),
            _runs(measured),
            report.Config("Config", config),
        ),
        meta=meta,
    )
