"""python -m experiments.sft_bridge: the runs of the experiment, and its report."""

from __future__ import annotations

import dataclasses
import functools

from experiments import sft_bridge
from experiments.sft_bridge import page, values, verdicts
from experiments.sft_bridge.config import PRESETS, Config
from experiments.worlds.command import run_command, where_is
from experiments.worlds.jobs import Job
from experiments.worlds.suite import run_suite
from pref_jax.evals.preference import bootstrap_interval


def summarise(results, found) -> dict:
    """The numbers of a run for its record: verdicts, and intervals over seeds."""
    measured = verdicts.Measured(results)
    return {
        "verdicts": [dataclasses.asdict(verdict) for verdict in found],
        "signals": [
            {"signal": name}
            | {
                measure: bootstrap_interval(measured.of(measure, name))
                for measure in verdicts.MEASURES
            }
            for name in values.SIGNALS
        ],
        **{
            name: bootstrap_interval(measured.alone(name))
            for name in ("won", "won_by_best", "beyond")
        },
    }


def make_jobs(config: Config, folder, guard) -> list[Job]:
    """All runs of the experiment."""
    return values.jobs(config.values, folder / "values", guard)


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its report's path."""
    return run_suite(
        "sft_bridge",
        config,
        make_jobs=make_jobs,
        judge=verdicts.judge,
        make_report=functools.partial(
            page.make_report, num_seeds=config.values.num_seeds
        ),
        summarise=summarise,
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
