"""python -m experiments.adpo: every part of the experiment, and its report."""

from __future__ import annotations

import dataclasses
import logging

from experiments import adpo
from experiments.adpo import distillation, language, online, page, suite, verdicts
from experiments.adpo.config import PRESETS, Config
from experiments.worlds import bandits
from experiments.worlds.command import run_command, where_is
from experiments.worlds.jobs import Job, run_jobs
from pref_jax import processes, report
from pref_jax.evals.preference import bootstrap_interval
from pref_jax.train import run as run_lib
from pref_jax.train.checkpoint import PreemptionGuard

_logger = logging.getLogger("pref_jax.experiments")


def make_jobs(config: Config, folder, guard) -> list[Job]:
    """All runs of the experiment."""
    found = []
    if config.bandits is not None:
        found += suite.jobs(config.bandits)
    if config.online is not None:
        found += online.jobs(config.online)
    if config.distillation is not None:
        found += distillation.jobs(config.distillation)
    if config.language is not None:
        found += language.jobs(config.language, folder / "language", guard)
    if not found:
        raise ValueError("all parts are left out: there is nothing to run.")
    return found


def summarise(results, found) -> dict:
    """The numbers of a run for its record: verdicts, and means over seeds."""
    measured = verdicts.Measured(results)
    summary = {"verdicts": [dataclasses.asdict(verdict) for verdict in found]}
    if measured.has("bandits"):
        names = (suite.REFERENCE, *(f"test/{name}" for name in suite.ARMS))
        summary |= {
            "scenarios": list(bandits.SCENARIOS),
            "win_mass": {
                name.removeprefix("test/"): measured.of(name).mean(-1).tolist()
                for name in names
            },
        }
    if measured.has("distillation"):
        summary["distillation"] = [
            dataclasses.asdict(row) for row in measured.students()
        ]
    if measured.has("language"):
        summary["language"] = [
            {"flip_rate": rate, "method": arm.name}
            | {
                part: bootstrap_interval(measured.language(rate, arm.name, part))
                for part in ("reward", "kl")
            }
            for rate in measured.flip_rates
            for arm in language.ARMS
        ]
    return summary


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its report's path."""
    values = dataclasses.asdict(config)
    with (
        run_lib.open_run(config.root, config=values, name=config.name) as folder,
        PreemptionGuard() as guard,
    ):
        _logger.info("run folder: %s", folder)
        jobs = make_jobs(config, folder, guard)
        results = run_jobs("ADPO", jobs, folder / "results", guard)
        found = verdicts.judge(results)
        meta = {
            **run_lib.environment(),
            "duration": sum(result["seconds"] for result in results.values()),
            "starts": run_lib.count_starts(folder),
        }
        finished = page.make_report(
            results,
            found,
            suite=config.bandits,
            online_config=config.online,
            sizes_of=suite.COMPARED,
            config=values,
            meta=meta,
        )
        record = {
            "experiment": "adpo",
            "results": summarise(results, found),
            "config": values,
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
        description=adpo.__doc__,
    )


if __name__ == "__main__":
    main()
