"""python -m experiments.sft_bridge: the runs of the experiment, and its report."""

from __future__ import annotations

import dataclasses
import functools

from experiments import sft_bridge
from experiments.sft_bridge import arms as arms_lib
from experiments.sft_bridge import page, stages, values, verdicts
from experiments.sft_bridge.config import PRESETS, Config
from experiments.sft_bridge.verdicts import StagesMeasured, ValuesMeasured
from experiments.worlds.claims import t_interval
from experiments.worlds.command import run_command, where_is
from experiments.worlds.jobs import Job
from experiments.worlds.suite import run_suite


def _values_summary(results) -> dict:
    measured = ValuesMeasured(results)
    return {
        "signals": [
            {"signal": name}
            | {
                measure: t_interval(measured.of(measure, name))
                for measure in verdicts.REPORTED
            }
            for name in values.SIGNALS
        ],
        **{
            name: t_interval(measured.alone(name))
            for name in ("won", "won_by_best", "too_short", "beyond")
        },
    }


def _stages_summary(measured: StagesMeasured) -> dict:
    return {
        "rate": measured.rate,
        "reduced": measured.reduced.name,
        "headline": page.headline(measured),
        "arms": [
            {
                "arm": name,
                "setting": dataclasses.asdict(measured.setting(name)),
                "at_ends": measured.at_ends(name),
                "tuning": {
                    "settings": [
                        dataclasses.asdict(setting)
                        for setting in arms_lib.settings_of(
                            arm, measured.config, measured.results
                        )
                    ],
                    "rewards": measured.tuning(name, "rewards").tolist(),
                },
                "sft_loss": t_interval(measured.alone(name, "sft_loss")),
                "sft_updates": t_interval(measured.alone(name, "sft_updates")),
                "sft_accuracy": t_interval(measured.alone(name, "sft_accuracy")),
                **{
                    part: {
                        measure: t_interval(measured.of(name, part, measure))
                        for measure in page.STAGE_MEASURES
                    }
                    for part in ("sft", "dpo")
                },
            }
            for name, arm in measured.arms.items()
        ],
    }


def summarise(results, found, *, config: Config) -> dict:
    """The numbers of a run for its record: verdicts, and intervals over seeds."""
    summary = {"verdicts": [dataclasses.asdict(verdict) for verdict in found]}
    if config.stages is not None:
        measured = StagesMeasured(results, config.stages)
        summary["stages"] = _stages_summary(measured)
    if config.values is not None:
        summary["values"] = _values_summary(results)
    return summary


def make_jobs(config: Config, folder, guard) -> list[Job]:
    """All runs of the experiment."""
    found = []
    if config.stages is not None:
        found += stages.jobs(config.stages, folder / "stages", guard)
    if config.values is not None:
        found += values.jobs(config.values, folder / "values", guard)
    return found


def judge(results, *, config: Config) -> list:
    """The verdicts of all parts."""
    found = []
    if config.stages is not None:
        found += verdicts.judge_stages(StagesMeasured(results, config.stages))
    if config.values is not None:
        found += verdicts.judge_values(ValuesMeasured(results))
    return found


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its report's path."""
    return run_suite(
        "sft_bridge",
        config,
        make_jobs=make_jobs,
        judge=functools.partial(judge, config=config),
        make_report=functools.partial(page.make_report, parts=config),
        summarise=functools.partial(summarise, config=config),
    )


def main() -> None:
    """The command line."""
    run_command(
        PRESETS,
        run_config,
        lambda config, path: where_is(path),
        default="small",
        description=sft_bridge.__doc__,
    )


if __name__ == "__main__":
    main()
