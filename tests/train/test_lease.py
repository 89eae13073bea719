"""Of several processes one works in a folder of a store, a dead one not for long."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorstore

from pref_jax.train import lease

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = {"name": "run", "renew_seconds": 0.05, "stale_seconds": 0.5}
QUICK |= {"on_lost": lambda: None}  # not the end of the tests


@pytest.fixture
def store():
    return tensorstore.KvStore.open("memory://run/").result()


def saved(store):
    return json.loads(store.read(lease.LOCK_KEY).result().value)


def stop_renewing(held):
    """What a kill does to a holder: it writes nothing any more."""
    held._released.set()
    held._thread.join()


class Crowd:
    """A store whose claimants write only when all of them have made up their minds."""

    def __init__(self, store, size):
        self._store, self._ready = store, threading.Barrier(size)

    def read(self, key):
        return self._store.read(key)

    def write(self, key, value, **options):
        if threading.current_thread().name.startswith("claimant"):
            self._ready.wait(10)
        return self._store.write(key, value, **options)


def take_together(store, size):
    """What each of some threads gets that find the same lock."""
    crowd, taken = Crowd(store, size), []
    threads = [
        threading.Thread(
            target=lambda: taken.append(lease.take(crowd, **QUICK)),
            name=f"claimant {number}",
        )
        for number in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def test_one_of_many_claimants_gets_the_lock(store):
    taken = take_together(store, 8)
    held = [one for one in taken if one is not None]
    assert (len(taken), len(held)) == (8, 1)
    assert saved(store)["token"] == held[0]._token
    held[0].release()


def test_a_lock_that_is_renewed_stays_longer_than_a_stale_one(store):
    held = lease.take(store, **QUICK)
    first = saved(store)
    time.sleep(3 * QUICK["stale_seconds"])
    assert lease.take(store, **QUICK) is None
    assert saved(store)["token"] == first["token"]
    assert saved(store)["time"] > first["time"]
    held.release()


def test_a_released_lock_is_free_at_once(store):
    lease.take(store, **QUICK).release()
    assert store.read(lease.LOCK_KEY).result().state == "missing"
    began = time.monotonic()
    held = lease.take(store, name="run")
    assert time.monotonic() - began < 1
    held.release()


def test_the_lock_of_a_dead_process_is_taken_over_once_it_is_stale(store, caplog):
    dead = lease.take(store, **QUICK)
    stop_renewing(dead)
    began = time.monotonic()
    with caplog.at_level(logging.INFO, "pref_jax"):
        held = lease.take(store, **QUICK)
    assert time.monotonic() - began >= QUICK["stale_seconds"]
    assert "waiting up to 0 s to see whether its process is alive" in caplog.text
    assert "run was left by a process that died; taken over" in caplog.text
    # What the dead one would still do, had it only slept, hurts nobody.
    dead.release()
    assert saved(store)["token"] == held._token
    held.release()


def test_a_lock_of_long_ago_is_not_waited_for(store):
    old = {"token": "old", "time": time.time() - lease.LONG_AGO_SECONDS - 1}
    store.write(lease.LOCK_KEY, json.dumps(old).encode()).result()
    began = time.monotonic()
    held = lease.take(store, name="run")
    assert held is not None and time.monotonic() - began < 1
    held.release()


def test_a_lock_that_is_released_while_it_is_watched_is_free(store):
    store.write(lease.LOCK_KEY, b"{}").result()
    remove = threading.Timer(0.1, lambda: store.write(lease.LOCK_KEY, None).result())
    remove.start()
    began = time.monotonic()
    held = lease.take(store, name="run", renew_seconds=0.05)
    assert held is not None and time.monotonic() - began < lease.STALE_SECONDS / 2
    held.release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"time"'])
def test_a_lock_that_says_nothing_goes_stale_like_any_other(store, content):
    store.write(lease.LOCK_KEY, content).result()
    held = lease.take(store, **QUICK)
    assert held is not None
    held.release()


def test_of_two_that_wait_for_a_stale_lock_one_gets_it(store):
    stop_renewing(lease.take(store, **QUICK))
    taken = take_together(store, 2)
    assert sorted(one is None for one in taken) == [False, True]
    next(filter(None, taken)).release()


def test_a_holder_that_was_replaced_is_told(store):
    told = threading.Event()
    held = lease.take(store, **QUICK | {"on_lost": told.set})
    store.write(lease.LOCK_KEY, b'{"token": "of another"}').result()
    assert told.wait(5)
    held.release()
    assert saved(store) == {"token": "of another"}


def test_a_lost_answer_and_a_bad_network_do_not_lose_the_lock(store, caplog):
    class Unreliable:
        """Fails once before a write, and once after it."""

        def __init__(self):
            self.failures = ["before", "after"]

        def read(self, key):
            return store.read(key)

        def write(self, key, value, **options):
            failure = self.failures.pop(0) if self.failures else None
            if failure == "before":
                raise OSError("no network")
            written = store.write(key, value, **options)
            if failure == "after":
                written.result()
                raise OSError("no answer")
            return written

    lost = threading.Event()
    first = store.write(lease.LOCK_KEY, b'{"token": "mine"}').result()
    unreliable = Unreliable()
    held = lease.Lease(
        *(unreliable, first.generation, "mine"),
        renew_seconds=0.02,
        on_lost=lost.set,
    )
    time.sleep(0.5)
    assert not unreliable.failures and not lost.is_set()
    assert saved(store)["token"] == "mine" and time.time() - saved(store)["time"] < 0.4
    assert "could not renew the lock of the run: no network" in caplog.text
    held.release()
    assert store.read(lease.LOCK_KEY).result().state == "missing"


HOLD = """
import sys, time, tensorstore
from pref_jax.train import lease
spec = {"driver": "file", "path": sys.argv[1] + "/"}
store = tensorstore.KvStore.open(spec).result()
stale = float(sys.argv[2])
held = lease.take(store, name="run", renew_seconds=0.1, stale_seconds=stale)
print(held is not None, flush=True)
time.sleep(100)
"""


def test_a_killed_process_loses_its_lock_and_a_frozen_one_ends_itself(tmp_path):
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"})
    store, quick = store.result(), QUICK | {"renew_seconds": 0.4, "stale_seconds": 1.2}

    def hold():
        command = [sys.executable, "-c", HOLD, str(tmp_path), "1.2"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "True\n"
        return process

    with hold() as killed:
        assert lease.take(store, **quick) is None
        killed.send_signal(signal.SIGKILL)
    held = lease.take(store, **quick)
    assert held is not None
    held.release()
    with hold() as frozen:
        try:
            frozen.send_signal(signal.SIGSTOP)
            held = lease.take(store, **quick)
            assert held is not None
            frozen.send_signal(signal.SIGCONT)
            assert frozen.wait(timeout=10) == 1
            assert "another process has taken this run over" in frozen.stderr.read()
        finally:
            frozen.kill()
    assert saved(store)["token"] == held._token
    held.release()
