"""python -m experiments.sft_bridge: the runs of the experiment, and its report."""

from __future__ import annotations

import dataclasses
import logging

from experiments import sft_bridge
from experiments.sft_bridge import page, values, verdicts
from experiments.sft_bridge.config import PRESETS, Config
from experiments.worlds.command import run_command, where_is
from experiments.worlds.jobs import run_jobs
from pref_jax import processes, report
from pref_jax.evals.preference import bootstrap_interval
from pref_jax.train import run as run_lib
from pref_jax.train.checkpoint import PreemptionGuard

_logger = logging.getLogger("pref_jax.experiments")


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


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its report's path."""
    settings = dataclasses.asdict(config)
    with (
        run_lib.open_run(config.root, config=settings, name=config.name) as folder,
        PreemptionGuard() as guard,
    ):
        _logger.info("run folder: %s", folder)
        jobs = values.jobs(config.values, folder / "values", guard)
        results = run_jobs("SFT bridge", jobs, folder / "results", guard)
        found = verdicts.judge(results)
        meta = {
            **run_lib.environment(),
            "duration": sum(result["seconds"] for result in results.values()),
            "starts": run_lib.count_starts(folder),
        }
        finished = page.make_report(
            results,
            found,
            num_seeds=config.values.num_seeds,
            config=settings,
            meta=meta,
        )
        record = {
            "experiment": "sft_bridge",
            "results": summarise(results, found),
            "config": settings,
            "environment": run_lib.environment(),
            "seconds": meta["duration"],  # of all jobs
            "starts": meta["starts"],
            "report": report.to_json(finished),
        }

        def write() -> None:
            report.write_report(finished, folder / "report.html")
            run_lib.write_json(folder / run_lib.RECORD_FILE, record)

        processes.on_first(write)
        return folder / "report.html"


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
