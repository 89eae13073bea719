"""What every contestant has in common: its job, its data and the gate of its loop.

A contestant is a process that trains with its own trainer, in its own environment. Its
loop passes a `Gate` before every step. After each block of steps the gate waits for
what it has done, says on its standard output what the block took, and sleeps in a read
of its standard input until the next block is asked for: an idle contestant takes no
processor time from the one that is measured.

Nothing is imported here but the standard library and numpy, which every environment
has.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """What a contestant is asked to do.

    Attributes:
      model: folder of the initial weights, as `transformers` writes it.
      data: .npz of the pairs, see `read_pairs`.
      scratch: folder for what the trainer writes.
      batches: indices of the pairs of each step of a block.
      num_blocks: how many blocks are asked for at most; each repeats `batches`.
      beta: reward per nat.
      optimizer: learning_rate, b1, b2 and eps of AdamW at a constant rate; without
        weight decay and without clipping.
      sizes: of the model, under the names of `pref_jax.models.decoder.DecoderConfig`.
      seed: of the trainer.
      options: settings of this contestant.
    """

    model: str
    data: str
    scratch: str
    batches: list[list[int]]
    num_blocks: int
    beta: float
    optimizer: dict[str, float]
    sizes: dict[str, Any]
    seed: int
    options: dict[str, Any]


def read_job() -> Job:
    """The job named on the command line."""
    return Job(**json.loads(pathlib.Path(sys.argv[1]).read_text()))


def write_pairs(path: str | os.PathLike, pairs) -> None:
    """Write the ids of pairs.

    Args:
      path: of the .npz file.
      pairs: (prompt, chosen, rejected) of i32[n] each.
    """
    lengths = np.array([[len(part) for part in pair] for pair in pairs], np.int64)
    tokens = np.concatenate([part for pair in pairs for part in pair])
    np.savez(path, tokens=tokens.astype(np.int32), lengths=lengths)


def read_pairs(path: str | os.PathLike) -> list[tuple[np.ndarray, ...]]:
    """(prompt, chosen, rejected) of i32[n] each, as `write_pairs` was given them."""
    with np.load(path) as file:
        parts = np.split(file["tokens"], np.cumsum(file["lengths"].ravel())[:-1])
    return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))


class Gate:
    """Stands before every step of a loop and lets blocks of steps through.

    Args:
      job: whose blocks they are.
      settle: () -> None; waits until every step that was begun is done.
      losses: to which the loop adds the loss of each step, as any kind of scalar.
      about: what the contestant says of itself once it is ready.
      packages: whose versions it names.
    """

    def __init__(
        self,
        job: Job,
        *,
        settle: Callable[[], Any],
        losses: list,
        about: dict[str, Any],
        packages: tuple[str, ...],
    ):
        self._steps, self._settle, self._losses = len(job.batches), settle, losses
        versions = {name: importlib.metadata.version(name) for name in packages}
        self._about = {"about": about, "versions": versions}
        self._done = 0  # steps that were let through
        # What libraries print must not stand between the answers.
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def __call__(self) -> None:
        """Pass, or end the process when nothing more is asked for."""
        if self._done % self._steps == 0:
            if self._done:
                self._settle()
                self._answer(self._measured())
            else:
                self._answer(self._about)
            self._wait()
        self._done += 1

    def _measured(self) -> dict[str, Any]:
        measured = {
            "seconds": time.perf_counter() - self._began,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak_bytes": peak_bytes(),
            "idle_cpu_seconds": self._idle,
            "losses": [float(loss) for loss in self._losses],
        }
        self._losses.clear()
        return measured

    def _answer(self, values: dict[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()
        self._cpu = time.process_time()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            # The loop's own end would save and evaluate what nobody asked for.
            os._exit(0)
        self._idle = time.process_time() - self._cpu
        self._cpu, self._began = time.process_time(), time.perf_counter()


def passed(gate: Gate, batches, num_blocks: int) -> Iterator:
    """The batches of a block, again and again, each after the gate has let it pass."""
    # One block more than is asked for: the gate stands before its first step.
    for _ in range(num_blocks + 1):
        for batch in batches:
            gate()
            yield batch


def peak_bytes() -> int:
    """The most memory that this process has held, as the kernel counts it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
