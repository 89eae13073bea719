"""The right to work in one folder of an object store, held by one process at a time.

A lock that the system releases when its holder dies exists on a disk alone. In a store
the holder writes an object `lock`, and writes it again every few seconds; a lock that
is no longer renewed belongs to a dead process and may be taken over. Each of these
writes is conditional on the object being what the writer has last seen, so of several
processes one succeeds. Nothing depends on the clocks of two machines agreeing: who
waits for a lock to go stale measures by its own.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable

RENEW_SECONDS = 10.0
"""How often a holder says that it is alive."""

STALE_SECONDS = 60.0
"""Watched for so long without a renewal, a lock counts as left by a dead process."""

LONG_AGO_SECONDS = 900.0
"""A lock of this age by our clock is stale without being watched: clocks that are
further apart than this could not sign a request to the store."""

LOCK_KEY = "lock"

_logger = logging.getLogger(__name__)


def open_store(folder: str):
    """The objects below a folder, as a `tensorstore.KvStore`.

    Args:
      folder: `gs://bucket/path`.
    """
    import tensorstore

    bucket, _, path = folder.removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}
    return tensorstore.KvStore.open(spec).result()


class Lease:
    """A lock object that is ours, renewed in the background until `release`.

    Made by `take`.

    Args:
      store: a `tensorstore.KvStore`.
      generation: of the lock object as we have written it.
      token: what our lock object says.
      renew_seconds: how often it is written again.
      on_lost: called, in the background, when another process has taken the lock over
        because we could not renew it. By default this process ends at once, since two
        that write into one folder spoil it.
    """

    def __init__(
        self,
        store,
        generation: bytes,
        token: str,
        *,
        renew_seconds: float,
        on_lost: Callable[[], None] | None,
    ):
        self._store, self._generation, self._token = store, generation, token
        self._seconds = renew_seconds
        self._on_lost = _end_process if on_lost is None else on_lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_every, daemon=True)
        self._thread.start()

    def _renew_every(self) -> None:
        while not self._released.wait(self._seconds):
            try:
                if not self._renew():
                    self._on_lost()
                    return
            except Exception as error:  # the network; the lock stays ours for a while
                _logger.warning("could not renew the lock of the run: %s", error)

    def _renew(self) -> bool:
        """Write the lock again; False: it is another's by now."""
        written = self._store.write(
            LOCK_KEY, _describe(self._token), if_equal=self._generation
        ).result(timeout=STALE_SECONDS)
        if not written.generation:
            # Ours all the same, if the answer to an earlier write was lost.
            found = self._store.read(LOCK_KEY).result(timeout=STALE_SECONDS)
            if _token_of(found) != self._token:
                return False
            written = found.stamp
        self._generation = written.generation
        return True

    def release(self) -> None:
        """Let go: the next process need not wait."""
        self._released.set()
        self._thread.join()
        try:
            self._store.write(LOCK_KEY, None, if_equal=self._generation).result(
                timeout=STALE_SECONDS
            )
        except Exception as error:
            _logger.warning(
                "could not remove the lock of the run (%s); the next start waits %.0f "
                "seconds for it",
                *(error, STALE_SECONDS),
            )


def take(
    store,
    *,
    name: str,
    renew_seconds: float = RENEW_SECONDS,
    stale_seconds: float = STALE_SECONDS,
    on_lost: Callable[[], None] | None = None,
) -> Lease | None:
    """Take the lock of a folder, if no living process holds it.

    A lock that is there is watched: until it is renewed, which takes `renew_seconds`,
    or has gone stale.

    Args:
      store: a `tensorstore.KvStore` of the folder, see `open_store`.
      name: of the folder, for messages.
      renew_seconds: as `RENEW_SECONDS`; the same for all processes.
      stale_seconds: as `STALE_SECONDS`; several times as long.
      on_lost: as in `Lease`.

    Returns:
      The lease, or None: another process holds it, or was quicker.

    >>> import tensorstore
    >>> store = tensorstore.KvStore.open("memory://run/").result()
    >>> lease = take(store, name="run", renew_seconds=0.01)
    >>> take(store, name="run", renew_seconds=0.01) is None  # in use
    True
    >>> lease.release()
    """
    found = store.read(LOCK_KEY).result(timeout=STALE_SECONDS)
    if found.state != "missing" and _age(found) < LONG_AGO_SECONDS:
        _logger.info(
            "%s is locked; waiting up to %.0f s to see whether its process is alive",
            *(name, stale_seconds),
        )
        first, began = found.stamp.generation, time.monotonic()
        while time.monotonic() - began < stale_seconds:
            time.sleep(renew_seconds / 4)
            found = store.read(LOCK_KEY).result(timeout=STALE_SECONDS)
            if found.state == "missing":
                break
            if found.stamp.generation != first:
                return None
    token = secrets.token_hex(16)
    written = store.write(
        LOCK_KEY, _describe(token), if_equal=found.stamp.generation
    ).result(timeout=STALE_SECONDS)
    if not written.generation:
        return None
    if found.state != "missing":
        _logger.warning("%s was left by a process that died; taken over", name)
    return Lease(
        store,
        written.generation,
        token,
        renew_seconds=renew_seconds,
        on_lost=on_lost,
    )


def _describe(token: str) -> bytes:
    return json.dumps({"token": token, "time": time.time()}).encode()


def _read(found) -> dict:
    try:
        value = json.loads(found.value)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _token_of(found) -> str | None:
    return _read(found).get("token")


def _age(found) -> float:
    """Seconds since the lock was written, by our clock; 0 if it does not say."""
    return time.time() - _read(found).get("time", time.time())


def _end_process() -> None:
    _logger.critical(
        "another process has taken this run over, since its lock was not renewed for "
        "too long; this process ends, to write nothing more into the run's folder"
    )
    logging.shutdown()
    os._exit(1)
