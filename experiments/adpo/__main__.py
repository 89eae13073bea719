"""python -m experiments.adpo: every part of the experiment, and its report."""

from __future__ import annotations

import dataclasses
import functools

from experiments import adpo
from experiments.adpo import distillation, language, online, page, suite, verdicts
from experiments.adpo.config import PRESETS, Config
from experiments.worlds import bandits
from experiments.worlds.command import run_command, where_is
from experiments.worlds.jobs import Job
from experiments.worlds.suite import run_suite
from pref_jax.evals.preference import bootstrap_interval


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
    return run_suite(
        "adpo",
        config,
        make_jobs=make_jobs,
        judge=verdicts.judge,
        make_report=functools.partial(
            page.make_report,
            suite=config.bandits,
            online_config=config.online,
            sizes_of=suite.COMPARED,
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
        description=adpo.__doc__,
    )


if __name__ == "__main__":
    main()
