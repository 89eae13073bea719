"""A grid over fields of an experiment's config: every combination a run, and a table.

    python scripts/sweep.py experiments.quickstart --root runs/lr \
        --grid sft.optimizer.learning_rate=1e-3,3e-4 --grid seed=0,1 \
        --metrics results.models.DPO.reward -- --preset smoke

What stands after `--` goes to every run; so do, for its own values, the fields of the
grid, as the experiment's `--help` names them (a value of several words, such as
"fractions=0.1 0.2,0.5", is several arguments). A run lies in ROOT/<its values>, and
what it prints in ROOT/<its values>.log. Runs that are finished are not run again, and
what was interrupted continues: the same command again goes on with the sweep.

    --num-parallel N   so many runs at once on this machine
    --only K           the K-th combination alone, from 0: for a job of a cluster each
    --list             the commands, one a line, and nothing is run
    --table            the table of what is finished so far, and nothing is run

At the end ROOT/sweep.md and ROOT/sweep.json hold each combination with its metrics,
dotted paths in its record.json. A run that failed stands in the table as failed and
ends none of the others; the exit code is then 1, and 75 if runs were stopped.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE

RECORD = "record.json"
FINISHED, STOPPED, FAILED, WAITING = "finished", "stopped", "failed", "not run"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run, and what of it is shown."""

    experiment: tyro.conf.Positional[str]  # module, such as experiments.finetune
    grid: tyro.conf.UseAppendAction[tuple[str, ...]]  # FIELD=VALUE,VALUE,...; repeated
    root: str = "runs/sweep"  # folder of the runs
    metrics: tuple[str, ...] = ()  # dotted paths in record.json
    num_parallel: int = 1  # runs at once
    only: int | None = None  # number of the one combination to run, from 0
    list: bool = False  # print the commands alone
    table: bool = False  # print the table of what is finished alone

    def __post_init__(self):
        if self.num_parallel < 1:
            raise ValueError(
                f"`num_parallel` must be 1 or more; got {self.num_parallel}."
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """One combination.

    Attributes:
      values: by field.
      folder: of the run.
      command: that runs or continues it.
    """

    values: dict[str, str]
    folder: epath.Path
    command: tuple[str, ...]


def parse_grid(grid: Sequence[str]) -> dict[str, list[str]]:
    """Values by field.

    Raises:
      ValueError: a word is of another form, or a field or value comes twice.

    >>> parse_grid(["seed=0,1", "dpo.beta=0.1"])
    {'seed': ['0', '1'], 'dpo.beta': ['0.1']}
    """
    found: dict[str, list[str]] = {}
    for word in grid:
        field, equals, values = word.partition("=")
        parts = [value.strip() for value in values.split(",")]
        if not equals or not re.fullmatch(r"[\w.-]+", field) or not all(parts):
            raise ValueError(
                f"--grid needs FIELD=VALUE,VALUE,... with no empty value; got {word!r}."
            )
        if field in found or len(set(parts)) < len(parts):
            raise ValueError(f"--grid has a field or a value twice: {word!r}.")
        found[field] = parts
    if not found:
        raise ValueError("--grid is needed: FIELD=VALUE,VALUE,...")
    return found


def make_runs(config: Config, arguments: Sequence[str]) -> list[Run]:
    """Every combination, the last field changing fastest.

    Args:
      config: of the command line.
      arguments: that all runs get.
    """
    grid = parse_grid(config.grid)
    for owned in ("--root", "--name"):
        if any(a == owned or a.startswith(f"{owned}=") for a in arguments):
            raise ValueError(f"{owned} of the runs is the sweep's: give --root to it.")
    short = [field.split(".")[-1] for field in grid]
    labels = short if len(set(short)) == len(short) else list(grid)
    found = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        name = ",".join(f"{k}={v}" for k, v in zip(labels, combination, strict=True))
        name = re.sub(r"[^\w.,=+-]", "_", name)
        own = [
            part
            for field, value in values.items()
            for part in (f"--{field.replace('_', '-')}", *shlex.split(value))
        ]
        command = (
            *(sys.executable, "-m", config.experiment, *arguments),
            *("--root", config.root, "--name", name, *own),
        )
        found.append(Run(values, epath.Path(config.root) / name, command))
    names = [run.folder.name for run in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two combinations have one folder, {_twice(names)}, as their values "
            "differ in signs that it cannot hold. Sweep them apart."
        )
    return found


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def status(run: Run) -> str:
    """What became of a run so far."""
    if (run.folder / RECORD).exists():
        return FINISHED
    return WAITING if not (run.folder / "config.json").exists() else STOPPED


def _command_file(run: Run) -> epath.Path:
    return run.folder.parent / f"{run.folder.name}.command"


def check_same(runs: Sequence[Run]) -> None:
    """Refuse folders whose runs were begun by other commands.

    Raises:
      ValueError: one was.
    """
    for run in runs:
        path = _command_file(run)
        if status(run) == WAITING or not path.exists():
            continue  # not begun, or not by a sweep on a disk
        begun = path.read_text()
        if begun != _arguments(run):
            raise ValueError(
                f"{run.folder} is the run of another command: {begun}. Give another "
                f"--root."
            )


def _arguments(run: Run) -> str:
    """All but the interpreter, which may be another one."""
    return shlex.join(run.command[1:])


class Runner:
    """Runs combinations to their ends, in threads."""

    def __init__(self):
        self._stopping = False
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen] = []

    def stop(self, tell: bool) -> None:
        """Begin no run more; with `tell`, those that run are told to save and end."""
        with self._lock:
            self._stopping = True
            for process in self._running if tell else ():
                process.terminate()

    def execute(self, run: Run) -> str:
        """Run one; returns its status."""
        name = run.folder.name
        if status(run) == FINISHED:
            print(f"{name}: finished before", flush=True)
            return FINISHED
        log = run.folder.parent / f"{name}.log"
        with log.open("ab") as out:
            with self._lock:
                if self._stopping:
                    return status(run)
                print(f"{name}: started", flush=True)
                _command_file(run).write_text(_arguments(run))
                began = time.perf_counter()
                process = subprocess.Popen(run.command, stdout=out, stderr=out)
                self._running.append(process)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
        if code == 0:
            seconds = time.perf_counter() - began
            print(f"{name}: finished, {seconds:.0f} s", flush=True)
            return FINISHED
        if code == PREEMPTED_EXIT_CODE or self._stopping:
            print(f"{name}: stopped; the same command continues", flush=True)
            return STOPPED
        lines = log.read_bytes().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        print(f"{name}: failed ({code}): {last}; see {log}", flush=True)
        return FAILED


def look_up(record: object, path: str, where: str) -> object:
    """What stands at a dotted path of a record.

    Raises:
      ValueError: nothing does; says what is there.

    >>> look_up({"results": {"kl": [0.1, 0.0, 0.2]}}, "results.kl.0", "a record")
    0.1
    """
    here, passed = record, []
    for part in path.split("."):
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, Mapping) and part in here:
            here = here[part]
        else:
            keys = list(map(str, here)) if isinstance(here, Mapping) else []
            near = difflib.get_close_matches(part, keys, 3, 0.3) or keys[:8]
            raise ValueError(
                f"{where} has no {path!r}: {'.'.join(passed) or 'its top'} has "
                f"{', '.join(near) if near else f'no part {part!r}'}."
            )
        passed.append(part)
    return here


def written(value: object) -> str:
    """A metric as text; three numbers are a mean and its interval."""
    if isinstance(value, list) and len(value) == 3:
        mean, low, high = map(written, value)
        return f"{mean} [{low}, {high}]"
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
        return written([value["mean"], value["low"], value["high"]])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def collect(runs: Sequence[Run], states: Sequence[str], metrics: Sequence[str]):
    """A row for each run: its values, its status, its folder, its metrics.

    Raises:
      ValueError: a finished run lacks a metric.
    """
    rows = []
    for run, state in zip(runs, states, strict=True):
        row = {**run.values, "status": state, "run": run.folder.name}
        if state == FINISHED:
            record = json.loads((run.folder / RECORD).read_text())
            row["seconds"] = record.get("seconds")
            for metric in metrics:
                row[metric] = look_up(record, metric, str(run.folder / RECORD))
        rows.append(row)
    return rows


def show(rows: Sequence[dict], metrics: Sequence[str], root: epath.Path) -> None:
    """Print the table, and keep it as Markdown and JSON."""
    columns = [column for column in rows[0] if column != "run"]
    columns += [c for c in ("seconds", *metrics) if c not in columns]
    cells = [[written(row.get(c, "-")) for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.md").write_text("".join(f"| {' | '.join(x)} |\n" for x in lines))
    (root / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(*columns)
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


class _Told(Exception):
    """SIGTERM came."""


def _raise_told():
    raise _Told


def sweep(config: Config, arguments: Sequence[str]) -> int:
    """What the command does; returns its exit code."""
    runs, root = make_runs(config, arguments), epath.Path(config.root)
    if config.only is not None:
        if not 0 <= config.only < len(runs):
            raise ValueError(
                f"`only` must lie in [0, {len(runs)}), the number of combinations; got "
                f"{config.only}."
            )
        runs = [runs[config.only]]
    if config.list:
        for run in runs:
            print(shlex.join(run.command))
        return 0
    if config.table:
        check_same(runs)
        show(collect(runs, [*map(status, runs)], config.metrics), config.metrics, root)
        return 0
    if "://" in config.root:
        raise ValueError(
            f"runs that lie in {config.root} are started elsewhere: --list prints "
            f"their commands, --table shows what became of them."
        )
    check_same(runs)
    root.mkdir(parents=True, exist_ok=True)
    runner = Runner()
    signal.signal(signal.SIGTERM, lambda *_: _raise_told())
    with concurrent.futures.ThreadPoolExecutor(config.num_parallel) as pool:
        pending = [pool.submit(runner.execute, run) for run in runs]
        try:
            concurrent.futures.wait(pending)
        except (KeyboardInterrupt, _Told) as told:
            # At Ctrl-C the terminal has told the runs too: each saves and ends.
            runner.stop(tell=isinstance(told, _Told))
            print("stopping; runs that have begun save first", flush=True)
    states = [each.result() for each in pending]
    if config.only is None:
        show(collect(runs, states, config.metrics), config.metrics, root)
    if FAILED in states:
        return 1
    return 0 if set(states) == {FINISHED} else PREEMPTED_EXIT_CODE


def main() -> None:
    """The command line."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    config = tyro.cli(Config, description=__doc__, args=given[:cut])
    try:
        raise SystemExit(sweep(config, given[cut + 1 :]))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
