"""Many short runs of an experiment: announced, kept job by job, and continued.

A job is some runs that are computed together and whose results lie in one file. What
has a file is read and not computed again, so that an experiment which was stopped goes
on where it was. Jobs are listed before the first one starts, which is why their number
and the time that they take can be told; what a job needs of earlier ones it looks up in
their results.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from pref_jax import processes
from pref_jax.train import run as run_lib
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.logging import Progress
from pref_jax.train.loop import Preempted

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class Job:
    """Some runs, computed together.

    Attributes:
      name: of its file, such as "bandits/test/DPO"; after that of the jobs it needs.
      num_runs: trainings that it stands for.
      seconds: that it is expected to take, on two CPU cores.
      compute: results of the earlier jobs by name -> its own: a dict of plain values
        and arrays of numbers, which come back as lists. What is not finite comes back
        as None, which NumPy reads as NaN.
    """

    name: str
    num_runs: int
    seconds: float
    compute: Callable[[Mapping[str, dict]], dict]


def run_jobs(
    title: str, jobs: Sequence[Job], folder: epath.Path, guard: PreemptionGuard
) -> dict[str, dict]:
    """Compute the jobs that have no results yet, in order.

    Args:
      title: of the experiment, for the log.
      jobs: each after those that it needs, no name twice.
      folder: of the results.
      guard: says when to stop, which happens between two jobs.

    Returns:
      The results of all jobs by name; with those of a job stand the `seconds` that it
      took.

    Raises:
      ValueError: two jobs have one name.
      Preempted: stopped; the results so far are kept.
    """
    paths = {job.name: folder / f"{_file_name(job.name)}.json" for job in jobs}
    if len(set(paths.values())) < len(jobs):
        raise ValueError("two jobs have one name, or names that make one file.")
    found = {
        name: run_lib.read_json(path) for name, path in paths.items() if path.exists()
    }
    left = [job for job in jobs if job.name not in found]
    _logger.info(
        "%s: %d runs in %d jobs, of which %d runs are left; about %.0f minutes on two "
        "CPU cores",
        *(title, sum(job.num_runs for job in jobs), len(jobs)),
        *(sum(job.num_runs for job in left), sum(job.seconds for job in left) / 60),
    )
    with Progress(title, len(jobs)) as progress:
        for number, job in enumerate(jobs, start=1):
            if job in left:
                if guard.agreed():
                    raise Preempted(
                        f"stopped before {job.name}, {number} of {len(jobs)}"
                    )
                began = time.perf_counter()
                result = _plain(job.compute(found))
                result["seconds"] = time.perf_counter() - began
                paths[job.name].parent.mkdir(parents=True, exist_ok=True)
                _write(paths[job.name], result)
                found[job.name] = run_lib.as_read_back(result)
                _logger.info(
                    "%s: %d runs, %.0f s",
                    *(job.name, job.num_runs, result["seconds"]),
                )
            progress.count(number)
    return found


def in_blocks(function: Callable, rows: Sequence, size: int):
    """Results of a function that is mapped over rows, a block of them at a time.

    Args:
      function: of a pytree whose leaves have an axis of `size` runs; compiled once.
      rows: pytrees of numbers, one a run.
      size: of a block; the last one is filled up with its last row.

    Returns:
      The pytree of results, NumPy arrays with an axis of `len(rows)`.
    """
    found = []
    for first in range(0, len(rows), size):
        part = list(rows[first : first + size])
        filled = part + part[-1:] * (size - len(part))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
        found.append(jax.device_get(function(stacked)))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return jax.tree.map(lambda x: x[: len(rows)], joined)


def _file_name(name: str) -> str:
    kept = (c if c.isalnum() or c in "/-." else "_" for c in name)
    return "".join(kept)


def _write(path, result) -> None:
    processes.on_first(lambda: run_lib.write_json(path, result))


def _plain(result):
    """Numbers and lists of numbers; None for what is not finite."""

    def of_leaf(leaf):
        if isinstance(leaf, str | bool | int | None):
            return leaf
        values = np.asarray(leaf)
        if np.issubdtype(values.dtype, np.floating):
            values = values.astype(float).astype(object)
            values = np.where(np.isfinite(values.astype(float)), values, None)
        return values.tolist()

    return jax.tree.map(of_leaf, result, is_leaf=lambda x: x is None)
