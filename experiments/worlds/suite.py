"""An experiment of many jobs: its run folder, its verdicts, its report, its record."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from experiments.worlds.jobs import run_jobs
from pref_jax import processes, report
from pref_jax.train import run as run_lib
from pref_jax.train.checkpoint import PreemptionGuard

_logger = logging.getLogger("pref_jax.experiments")


def run_suite(
    experiment: str,
    config,
    *,
    make_jobs: Callable,
    judge: Callable,
    make_report: Callable,
    summarise: Callable,
):
    """Run, or continue, the run of a config; returns its report's path.

    Args:
      experiment: name in the record.
      config: a dataclass with `name` and `root` of the run.
      make_jobs: (config, folder, guard) -> jobs of `worlds.jobs`.
      judge: results -> verdicts of `worlds.claims`.
      make_report: (results, verdicts, config=..., meta=...) -> `report.Report`, with
        the config as plain values.
      summarise: (results, verdicts) -> the numbers of the record.
    """
    values = dataclasses.asdict(config)
    with (
        run_lib.open_run(config.root, config=values, name=config.name) as folder,
        PreemptionGuard() as guard,
    ):
        _logger.info("run folder: %s", folder)
        jobs = make_jobs(config, folder, guard)
        results = run_jobs(experiment, jobs, folder / "results", guard)
        verdicts = judge(results)
        seconds = sum(result["seconds"] for result in results.values())  # of all starts
        starts = run_lib.count_starts(folder)
        meta = {**run_lib.environment(), "duration": seconds, "starts": starts}
        finished = make_report(results, verdicts, config=values, meta=meta)
        record = {
            "experiment": experiment,
            "results": summarise(results, verdicts),
            "config": values,
            "environment": run_lib.environment(),
            "seconds": seconds,
            "starts": starts,
            "report": report.to_json(finished),
        }

        def write() -> None:
            report.write_report(finished, folder / "report.html")
            run_lib.write_json(folder / run_lib.RECORD_FILE, record)

        processes.on_first(write)
        return folder / "report.html"
