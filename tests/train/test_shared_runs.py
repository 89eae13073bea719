"""A run folder in a bucket, or of several processes, keeps every promise."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

import object_store
from pref_jax import processes
from pref_jax.train import lease, storage
from pref_jax.train import run as run_lib
from pref_jax.train.run import (
    CONFIG_FILE,
    RECORD_FILE,
    RunFolderError,
    count_starts,
    open_run,
    read_json,
    write_json,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = "gs://bucket/runs/tiny"
CONFIG, OTHER = {"beta": 0.1, "sizes": (4, 8)}, {"beta": 0.5, "sizes": (4, 8)}


@pytest.fixture
def bucket(monkeypatch):
    quick = {"renew_seconds": 0.05, "stale_seconds": 0.5, "on_lost": lambda: None}
    monkeypatch.setattr(lease, "take", functools.partial(lease.take, **quick))
    return object_store.install(monkeypatch)


def open_and_close(config=CONFIG, name=None):
    with open_run(RUNS, config=config, name=name) as folder:
        return folder


# --- one process, a bucket ------------------------------------------------------------


def test_a_run_in_a_bucket_is_made_continued_and_followed(bucket):
    first = open_and_close()
    assert str(first) == f"{RUNS}/001"
    assert read_json(first / CONFIG_FILE)["config"] == {"beta": 0.1, "sizes": [4, 8]}
    assert (open_and_close(), count_starts(first)) == (first, 2)
    assert open_and_close(OTHER).name == "002"
    assert open_and_close() == first
    write_json(first / RECORD_FILE, {})
    assert open_and_close().name == "003"
    assert open_and_close(name="mine").name == "mine"
    with pytest.raises(RunFolderError, match="beta: saved 0.1, now 0.5"):
        open_and_close(OTHER, name="mine")
    with pytest.raises(RunFolderError, match="001 is finished; give another --name"):
        open_and_close(name="001")
    assert sorted(p.name for p in epath.Path(RUNS).iterdir()) == [
        *("001", "002", "003", "mine")
    ]


def test_a_run_of_a_bucket_in_use_is_left_alone(bucket):
    with open_run(RUNS, config=CONFIG) as first:
        with pytest.raises(RunFolderError, match="001 is in use by another process"):
            open_and_close(name="001")
        assert open_and_close().name == "002"
    write_json(epath.Path(RUNS) / "002" / RECORD_FILE, {})
    assert open_and_close() == first


def test_of_two_claimants_of_a_bucket_each_gets_a_run_of_its_own(bucket):
    begin, names = threading.Barrier(2), []

    def claim():
        begin.wait()
        with open_run(RUNS, config=CONFIG) as folder:
            names.append(folder.name)
            time.sleep(0.5)

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == ["001", "002"]


def test_the_run_of_a_dead_process_is_continued_not_followed(bucket):
    folder = open_and_close()
    dead = lease.take(lease.open_store(str(folder)), name="run")
    dead._released.set()  # a killed process renews no more, and releases nothing
    assert open_and_close() == folder


def test_a_run_that_was_finished_while_its_lock_was_watched_is_kept(bucket):
    folder = open_and_close()
    for name in (None, folder.name):
        held = lease.take(lease.open_store(str(folder)), name="run")

        def finish(held=held):
            time.sleep(0.02)
            write_json(folder / RECORD_FILE, {})
            held.release()

        held._released.set()
        thread = threading.Thread(target=finish)
        thread.start()
        if name is None:
            assert open_and_close().name == "002"
        else:
            with pytest.raises(RunFolderError, match="001 is finished"):
                open_and_close(name=name)
        thread.join()
        (folder / RECORD_FILE).unlink()


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
    find = storage.importlib.util.find_spec
    missing = ("gcsfs", "tensorflow")
    monkeypatch.setattr(
        *(storage.importlib.util, "find_spec"),
        lambda name, *rest: None if name in missing else find(name, *rest),
    )
    with pytest.raises(ImportError, match="needs the package gcsfs"):
        open_and_close()


# --- several processes ----------------------------------------------------------------


def test_what_the_first_process_raises_all_raise(monkeypatch):
    """The first's message as the others hear of it, without other processes."""
    heard = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "agree", lambda value: heard.append(value) or value)

    def fail():
        raise RunFolderError("run 001 is in use")

    with pytest.raises(RunFolderError, match="^run 001 is in use$"):
        processes.on_first(fail, errors=(RunFolderError,))
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "agree", lambda value: heard[0])
    calls = []
    with pytest.raises(RunFolderError, match="^run 001 is in use$"):
        processes.on_first(lambda: calls.append(1), errors=(RunFolderError,))
    with pytest.raises(RuntimeError, match="first process failed: RunFolderError: run"):
        processes.on_first(lambda: calls.append(1))
    assert not calls


def test_a_process_that_sees_another_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib, "_SEEN_WITHIN_SECONDS", 0.3)
    monkeypatch.setattr(run_lib.jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes, "which", lambda hidden: [3] if hidden else [])
    write_json(tmp_path / CONFIG_FILE, {"id": "ab"})
    run_lib._check_shared(tmp_path, "ab")
    for folder, identity in ((tmp_path, "cd"), (tmp_path / "none", "ab")):
        with pytest.raises(
            RunFolderError,
            match="all processes share; process 3 does not see .* Give a --root on",
        ):
            run_lib._check_shared(epath.Path(folder), identity)


PROCESS = """
import json, os, pathlib, sys, time
from pref_jax import processes
processes.initialize()
import jax
from pref_jax.train import run as run_lib
from pref_jax.train.logging import MetricsLog
number = jax.process_index()
roots, config, name = sys.argv[1].split(","), {"beta": 0.1}, sys.argv[2] or None
began = time.monotonic()
try:
    root = roots[number % len(roots)]
    with run_lib.open_run(root, config=config, name=name) as folder:
        opened = os.listdir(folder)
        processes.wait("opened")
        with MetricsLog(folder) as log:
            log.write(number + 1, {"loss": 1.0})
        done = folder / "done.json"
        processes.on_first(lambda: run_lib.write_json(done, {"by": number}))
        done = run_lib.read_json(done)
        answer = [folder.name, sorted(opened), done, run_lib.count_starts(folder)]
        processes.wait("seen")
except ValueError as error:
    answer = [type(error).__name__, str(error)]
print(json.dumps([number, answer, time.monotonic() - began]), flush=True)
"""


def run_two(root, name=""):
    """The answer of each process, and how long the slower one took."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(root), name],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [output.splitlines()[-1] for output in outputs]
    (_, first, a), (_, second, b) = sorted(json.loads(line) for line in lines)
    return first, second, max(a, b)


@pytest.mark.slow
def test_two_processes_share_a_folder_and_the_first_one_writes(tmp_path):
    first, second, _ = run_two(tmp_path)
    # One start, one writer, and both read what it wrote.
    assert first == second == ["001", ["config.json", "lock"], {"by": 0}, 1]
    lines = (tmp_path / "001" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["001"]


@pytest.mark.slow
def test_an_error_of_the_first_process_reaches_the_other_within_seconds(tmp_path):
    with open_run(str(tmp_path), config={"beta": 0.1}, name="mine") as folder:
        first, second, seconds = run_two(tmp_path, "mine")
    assert (
        first
        == second
        == [*("RunFolderError", f"run {folder} is in use by another process.")]
    )
    assert seconds < 10


@pytest.mark.slow
def test_processes_that_do_not_share_a_disk_are_told_so(tmp_path):
    first, second, _ = run_two(f"{tmp_path}/a,{tmp_path}/b")
    assert first[0] == second[0] == "RunFolderError"
    for answer, folder in ((first, "a"), (second, "b")):
        assert "process 1 does not see" in answer[1] and f"/{folder}/001" in answer[1]
