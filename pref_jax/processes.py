"""Several processes as one program: who writes, and what all of them know.

On several hosts every process runs the same program on its own devices. What is written
is written by the first process alone, and what only one process can know (a free name,
what a file says at this moment) is made the same for all. With one process nothing here
costs or does anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

HEARTBEAT_SECONDS = 30
"""Without a sign of life for so long a process counts as lost, and all others end."""

_ADDRESS, _NUMBER, _ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
_DETECT = "PREF_JAX_MULTIHOST"

_ASK_SECONDS = 5.0  # a collective that one process comes to 30 s late fails on CPUs


def initialize() -> None:
    """Join the other processes, if the environment says that there are any.

    Call it before anything that touches a device. The environment says so in one of
    two ways, which the scripts `scripts/launch_*.sh` take care of:

    - `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: host and port
      of the first process, how many there are, and which of them this is;
    - `PREF_JAX_MULTIHOST=1`: as jax finds out by itself on TPU slices, under Slurm and
      under Open MPI.

    Raises:
      ValueError: only some of the three variables are set. (The address alone is
        right where jax finds out the rest.)
    """
    given = [name for name in (_ADDRESS, _NUMBER, _ID) if os.environ.get(name)]
    detect = os.environ.get(_DETECT) == "1"
    options = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        # A process that fails waits so long for the others, which wait for it.
        "shutdown_timeout_seconds": HEARTBEAT_SECONDS,
    }
    if _NUMBER in given or _ID in given or (given and not detect):
        if len(given) < 3:
            raise ValueError(
                f"several processes need {_ADDRESS}, {_NUMBER} and {_ID}; the "
                f"environment has only {', '.join(given)}. Start them with "
                f"scripts/launch_local.sh, or set {_DETECT}=1 where jax finds out."
            )
        options |= {
            "coordinator_address": os.environ[_ADDRESS],
            "num_processes": int(os.environ[_NUMBER]),
            "process_id": int(os.environ[_ID]),
        }
    elif not detect:
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until every process has come to this point.

    Args:
      name: of the point; the same on every process, or the wait is an error.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(value):
    """The value of the first process, on all of them; the others' are not looked at.

    Args:
      value: plain JSON values.

    >>> agree({"name": "001"})
    {'name': '001'}
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    letters = np.zeros(size, np.uint8)
    if is_first():
        letters[:] = np.frombuffer(text, np.uint8)
    letters = multihost_utils.broadcast_one_to_all(letters)
    return json.loads(np.asarray(letters, np.uint8).tobytes())


def any_of(flags) -> np.ndarray:
    """bool[N]: where a flag is set on any process.

    Args:
      flags: bool[N], of this process.

    >>> any_of([False, True]).tolist()
    [False, True]
    """
    flags = np.asarray(flags, bool)
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(flags)).any(axis=0)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """A block that the first process has left before any other enters it.

    For files that the first makes, and that the others find there if they share the
    folder, or make for themselves if they do not.

    The block is short and without collectives; where it fails on the first process, it
    fails on all.

    Args:
      name: of the block, for the message.

    Raises:
      RuntimeError: on the others, when the first one failed.
    """
    if not is_first():
        failure = agree(None)
        if failure is not None:
            raise RuntimeError(f"{name}: the first process failed: {failure}")
        yield
        return
    try:
        yield
    except BaseException as error:
        agree(f"{type(error).__name__}: {error}")
        raise
    agree(None)


def check_same(name: str, value) -> None:
    """Fail on every process unless all of them hold the same value.

    Args:
      name: of the value, for the message.
      value: plain JSON values.

    Raises:
      ValueError: the processes disagree.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = json.dumps(value, sort_keys=True).encode()
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text)))
    if len(set(np.asarray(sums).ravel().tolist())) > 1:
        raise ValueError(
            f"the processes disagree on {name}; process {jax.process_index()} has "
            f"{value!r}. Start all of them with the same command and the same files."
        )


def on_first(function: Callable, *, errors: tuple[type[Exception], ...] = ()):
    """What `function` returns on the first process, on all of them.

    The others do not call it. If it fails, it fails everywhere: a process that goes on
    alone would wait for the first one in the next collective. It may take as long as it
    likes: it runs in a thread, and meanwhile the processes ask each other every few
    seconds whether it is done, since collectives have time-outs.

    Args:
      function: without arguments, and without collectives; returns plain JSON values.
      errors: classes, made from a message, that the other processes raise as they are.

    Returns:
      The value, as it comes back from JSON.

    Raises:
      RuntimeError: on the others, when the first one failed with anything else.

    >>> on_first(lambda: {"name": "001"})
    {'name': '001'}
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(function()))
    outcome = {"told": None, "error": None}

    def run() -> None:
        try:
            outcome["told"] = {"value": json.loads(json.dumps(function()))}
        except BaseException as error:  # also SystemExit: the others wait
            outcome["error"] = error
            outcome["told"] = {"kind": type(error).__name__, "message": str(error)}

    thread = threading.Thread(target=run, daemon=True)
    if is_first():
        thread.start()
    while True:
        if is_first():
            thread.join(_ASK_SECONDS)
        told = agree(outcome["told"])
        if told is not None:
            break
    if outcome["error"] is not None:
        raise outcome["error"]
    if "value" in told:
        return told["value"]
    classes = {one.__name__: one for one in errors}
    if told["kind"] in classes:
        raise classes[told["kind"]](told["message"])
    raise RuntimeError(f"the first process failed: {told['kind']}: {told['message']}")


def which(condition: bool) -> list[int]:
    """Numbers of the processes on which `condition` holds, known to all.

    >>> which(True), which(False)
    ([0], [])
    """
    if jax.process_count() == 1:
        return [0] if condition else []
    from jax.experimental import multihost_utils

    answers = multihost_utils.process_allgather(np.bool_(condition))
    return np.flatnonzero(np.asarray(answers).ravel()).tolist()
