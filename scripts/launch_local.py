"""N processes of one command on this machine, started and ended together.

    python scripts/launch_local.py 2 python -m experiments.quickstart --preset smoke

Each process gets what `pref_jax.processes.initialize` reads: the address of the first
one, their number and its own. Its lines are printed with its number in front.

- One GPU each, if there are as many as processes; otherwise one CPU device each.
- SIGTERM and Ctrl-C are passed on to all, once, as SIGTERM: a run saves and exits with
  the code for "start me again". What is left after `--grace` seconds is killed; a
  second Ctrl-C kills at once.
- When one fails, the others cannot go on without it: they get a few seconds to say why
  they end, then SIGTERM, then SIGKILL.

The exit code is that of the first process that failed, 128 + the signal if a signal
ended it; 75 if some were preempted and none failed; else 0. With `--restart K` all are
started again, at most K times, unless the launcher itself was told to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

# `train.checkpoint.PREEMPTED_EXIT_CODE`, equal by test: the launcher imports no jax.
PREEMPTED_EXIT_CODE = 75

_POLL_SECONDS = 0.05
_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to start, and how patient to be."""

    num_processes: int
    command: tuple[str, ...]
    restart: int = 0  # further starts after a failure or a preemption
    grace: float = 120.0  # seconds from SIGTERM to SIGKILL when a run may save
    failure_grace: float = (
        10.0  # seconds to SIGTERM, and again to SIGKILL, after a death
    )

    def __post_init__(self):
        if self.num_processes < 1 or not self.command:
            raise ValueError(
                f"needs the number of processes, 1 or more, and a command; got "
                f"{self.num_processes} and {' '.join(self.command) or 'none'}."
            )
        for name in ("restart", "grace", "failure_grace"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must not be negative; got {getattr(self, name)}."
                )


@dataclasses.dataclass
class Stop:
    """What the launcher itself was told, by SIGTERM, SIGHUP or Ctrl-C.

    Attributes:
      asked: to end.
      at_once: a second Ctrl-C came.
    """

    asked: bool = False
    at_once: bool = False

    def __call__(self, number, frame) -> None:
        """The handler of the signals."""
        self.at_once |= self.asked and number == signal.SIGINT
        self.asked = True


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"[launch] {text}", file=sys.stderr, flush=True)


def gpus() -> list[str]:
    """The GPUs that the processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def environments(config: Config, port: int) -> list[dict[str, str]]:
    """The environment of each process.

    Args:
      config: what is started.
      port: a free one of this machine.
    """
    found = gpus()
    on_gpus = 0 < config.num_processes <= len(found)
    if found and not on_gpus:
        say(
            f"{config.num_processes} processes and {len(found)} GPUs: on CPU devices. "
            f"For GPUs start at most {len(found)}."
        )
    common = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(config.num_processes),
        "PYTHONUNBUFFERED": "1",  # lines appear when they are printed
    }
    # These would tell jax of another cluster than this one.
    common.pop("PREF_JAX_MULTIHOST", None)
    if not on_gpus:
        flags = common.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if not flag.startswith(_FLAG)]
        common |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": " ".join(flags),
        }
    return [
        common
        | {"JAX_PROCESS_ID": str(i)}
        | ({"CUDA_VISIBLE_DEVICES": found[i]} if on_gpus else {})
        for i in range(config.num_processes)
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Process:
    """One of the processes: its lines, its end.

    It leads a group of its own, so that a Ctrl-C of the terminal reaches it through
    the launcher alone, and that what it started can be killed with it.
    """

    def __init__(self, number: int, command: Sequence[str], environment):
        self.number = number
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._copy, args=pair, daemon=True)
            for pair in (
                (self._process.stdout, sys.stdout.buffer),
                (self._process.stderr, sys.stderr.buffer),
            )
        ]
        for reader in self._readers:
            reader.start()

    def _copy(self, lines, out) -> None:
        for line in lines:
            end = b"" if line.endswith(b"\n") else b"\n"
            # Nobody may read any more; the process must not block on a full pipe.
            with contextlib.suppress(BrokenPipeError):
                out.write(b"[%d] " % self.number + line + end)  # lines stay whole
                out.flush()

    def code(self) -> int | None:
        """None while it runs, then its exit code; of a signal 128 + its number."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def how(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if code == PREEMPTED_EXIT_CODE:
            return f"was preempted (exit code {code})"
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    def terminate(self) -> None:
        """SIGTERM to the process alone: what it started is its own to end."""
        if self.code() is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to it and to what it started, and wait for its last lines."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=5)


@contextlib.contextmanager
def _started(config: Config) -> Iterator[list[Process]]:
    processes: list[Process] = []
    try:
        for i, environment in enumerate(environments(config, free_port())):
            processes.append(Process(i, config.command, environment))
        yield processes
    finally:
        for process in processes:
            process.kill()


def run_once(config: Config, stop: Stop) -> int:
    """Start all, watch them to the end, return the exit code of the whole.

    Args:
      config: what to start.
      stop: what the launcher is told meanwhile.
    """
    failed = preempted = None  # the first process of the kind
    terminate_at = kill_at = float("inf")
    forwarded = False
    with _started(config) as processes:
        running = list(processes)
        while running:
            now = time.monotonic()
            ended = [process for process in running if process.code() is not None]
            running = [process for process in running if process not in ended]
            for process in ended:
                if process.code() == PREEMPTED_EXIT_CODE:
                    preempted = preempted or process
                    kill_at = min(kill_at, now + config.grace)
                elif process.code() and failed is None:
                    failed = process
                    if running:
                        say(
                            f"process {process.number} {process.how()}; the others "
                            f"cannot go on without it and are ended."
                        )
                    terminate_at = now + config.failure_grace
                    kill_at = min(kill_at, terminate_at + config.failure_grace)
            if stop.asked and not forwarded:
                say(f"stopping: SIGTERM to all, SIGKILL in {config.grace:g} s.")
                terminate_at, kill_at = now, min(kill_at, now + config.grace)
            if now >= terminate_at and not forwarded:
                forwarded = True
                for process in running:
                    process.terminate()
            if running and (now >= kill_at or stop.at_once):
                for process in running:
                    say(f"process {process.number} did not end: SIGKILL.")
                    process.kill()
            time.sleep(_POLL_SECONDS)
    for process in processes:
        if process.code():
            say(f"process {process.number} {process.how()}.")
    if failed is not None:
        return failed.code()
    return PREEMPTED_EXIT_CODE if preempted else 0


def run(config: Config, stop: Stop) -> int:
    """Start all, and again after failures and preemptions; the last exit code."""
    for left in range(config.restart, -1, -1):
        code = run_once(config, stop)
        if not code or stop.asked:
            break
        if left:
            say(f"starting again ({left} of {config.restart} restarts left).")
    return code


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="launch_local.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--restart",
        type=int,
        default=Config.restart,
        metavar="K",
        help="start again, at most K times; default %(default)s",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=Config.grace,
        metavar="S",
        help="seconds that a run has to save itself; default %(default)s",
    )
    parser.add_argument(
        "--failure-grace",
        type=float,
        default=Config.failure_grace,
        metavar="S",
        help="seconds to SIGTERM when another failed, and again to SIGKILL; default "
        "%(default)s",
    )
    parser.add_argument("num_processes", type=int, metavar="N")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = vars(parser.parse_args(arguments))
    command = tuple(options.pop("command"))
    command = command[1:] if command[:1] == ("--",) else command
    try:
        return Config(**options, command=command)
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    """The command line; returns the exit code."""
    config, stop = parse(), Stop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, stop)
    try:
        return run(config, stop)
    except (FileNotFoundError, PermissionError) as error:
        say(
            f"{error.filename} cannot be run: {error.strerror}. Give a program on the "
            f"PATH, or its path."
        )
        return 127


if __name__ == "__main__":
    sys.exit(main())
