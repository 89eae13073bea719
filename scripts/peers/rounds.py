"""Live contestants that take turns: A B C, A B C, ... on a machine that is never quiet.

Every contestant does its first block alone, to compile and to warm up, then one block a
round. Ratios are formed within a round, where the machine was the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Processes that are started inside are given so many processors and no more."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Contestant:
    """A process that waits behind its gate (`blocks.Gate`).

    Args:
      name: for messages.
      command: that starts it.
      log: file for what it prints.
      environment: variables added to this process's own.

    Attributes:
      about: what it said of itself when it was ready; empty until `wait_ready`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: pathlib.Path,
        environment: Mapping[str, str],
    ):
        self.name, self._log, self.about = name, log, {}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
            )

    def wait_ready(self) -> None:
        """Wait until it stands before its first step."""
        self.about = self._read()

    def block(self) -> dict[str, Any]:
        """Let it do a block of steps; what the block took."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End it; nothing of it is kept."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            lines = self._log.read_text(errors="replace").splitlines()
            raise RuntimeError(
                f"{self.name} ended with exit code {self._process.wait()}; the end of "
                f"what it said:\n" + "\n".join(lines[-20:])
            )
        return json.loads(line)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the blocks of one contestant took, in the order of the rounds.

    Attributes:
      warm_up_seconds: of its first block, compilation included.
      seconds: of each timed block.
      cpu_seconds: of all its threads, user and system, in each timed block.
      idle_cpu_seconds: while others were measured, all rounds together.
      peak_bytes: the most memory it has held since it started.
      losses: of every step, those of the first block included.
    """

    warm_up_seconds: float
    seconds: list[float]
    cpu_seconds: list[float]
    idle_cpu_seconds: float
    peak_bytes: int
    losses: list[float]


def alternate(contestants: Sequence, num_rounds: int, *, say=print) -> list[Blocks]:
    """A first block of each, then rounds of a block each, begun by another every time.

    Args:
      contestants: with a `name` and a `block()` as of `Contestant`.
      num_rounds: timed blocks of each.
      say: takes a line of progress.
    """
    blocks = [[contestant.block()] for contestant in contestants]
    for number in range(num_rounds):
        for i in range(len(contestants)):
            # Whoever comes after a contestant finds the caches that it left.
            place = (i + number) % len(contestants)
            found = contestants[place].block()
            blocks[place].append(found)
            say(
                f"round {number + 1}: {contestants[place].name}, "
                f"{found['seconds']:.2f} s, {found['cpu_seconds']:.2f} s of processors"
            )
    return [_collect(found) for found in blocks]


def _collect(found: list[dict[str, Any]]) -> Blocks:
    first, *timed = found
    return Blocks(
        warm_up_seconds=first["seconds"],
        seconds=[block["seconds"] for block in timed],
        cpu_seconds=[block["cpu_seconds"] for block in timed],
        idle_cpu_seconds=sum(block["idle_cpu_seconds"] for block in timed),
        peak_bytes=found[-1]["peak_bytes"],
        losses=[loss for block in found for loss in block["losses"]],
    )


def ratio(
    theirs: Sequence[float],
    ours: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> list[float]:
    """Median of theirs / ours over rounds, with a percentile bootstrap over rounds.

    Args:
      theirs: of each round, positive.
      ours: of the same rounds.
      confidence: of the two-sided interval.
      num_resamples: draws of as many rounds with replacement.
      seed: of the draws.

    Returns:
      [median, low, high].

    Raises:
      ValueError: the rounds are not the same.
    """
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    if theirs.shape != ours.shape or theirs.ndim != 1 or not theirs.size:
        raise ValueError(
            f"`theirs` and `ours` need one number for each of the same rounds; got "
            f"shapes {theirs.shape} and {ours.shape}."
        )
    ratios = theirs / ours
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, ratios.size, (num_resamples, ratios.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(ratios[draws], axis=1), [tail, 1 - tail])
    return [float(np.median(ratios)), float(low), float(high)]
