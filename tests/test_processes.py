"""Several processes are one program: they agree, share the work, and end together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from pref_jax import processes
from pref_jax.train import sharding

TESTS = pathlib.Path(__file__).resolve().parent
TIMED = ("time/",)  # what may differ between runs of the same numbers


# --- alone ----------------------------------------------------------------------------


def test_one_process_agrees_with_itself_and_waits_for_nobody():
    assert processes.is_first()
    assert processes.agree({"a": [1, None]}) == {"a": [1, None]}
    assert processes.any_of([True, False]).tolist() == [True, False]
    processes.wait("nobody")
    processes.check_same("a number", 3)
    with processes.first_before_others("alone"):
        pass


def test_without_a_word_in_the_environment_nothing_is_joined(monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "PREF_JAX_MULTIHOST"):
        monkeypatch.delenv(name, raising=False)
    processes.initialize()
    assert processes.agree(1) == 1


@pytest.mark.parametrize("missing", range(3))
def test_half_a_description_of_the_processes_is_an_error(monkeypatch, missing):
    values = {
        "JAX_COORDINATOR_ADDRESS": "localhost:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    for i, (name, value) in enumerate(values.items()):
        monkeypatch.setenv(name, "" if i == missing else value)
    with pytest.raises(ValueError, match="several processes need .*launch_local.sh"):
        processes.initialize()


def test_a_process_that_holds_all_devices_holds_all_rows():
    assert sharding.own_rows(sharding.make_mesh(fsdp=2), 16) is None


# --- two ------------------------------------------------------------------------------


class Job:
    """The tiny stage on one device a process, or on two devices of one process."""

    def __init__(self, folder, num_processes, program=(str(TESTS / "tiny_stage.py"),)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(2 // num_processes),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        }
        common.pop("XLA_FLAGS", None)
        common["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # they take longest
        self.children = []
        for number in range(num_processes):
            joined = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(num_processes),
                "JAX_PROCESS_ID": str(number),
            }
            self.children.append(
                subprocess.Popen(
                    [sys.executable, *program, str(folder)],
                    env=common | (joined if num_processes > 1 else {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait(self, seconds=200):
        """Exit codes and outputs; whoever is late is killed and fails the test."""
        try:
            outputs = [child.communicate(timeout=seconds)[0] for child in self.children]
        finally:
            for child in self.children:
                child.kill()
        return [child.returncode for child in self.children], outputs

    def wait_for_step(self, folder, step):
        """Until the metrics have come to a step."""
        for _ in range(1200):
            path = folder / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > step:
                return
            assert all(child.poll() is None for child in self.children)
            time.sleep(0.1)
        pytest.fail(f"step {step} was not reached")


def results(folder):
    """The metrics of all steps, and the trained parameters."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in x.items() if not k.startswith(TIMED)} for x in lines]
    saved = np.load(folder / "params.npz")
    return lines, [saved[name] for name in saved.files]


def assert_same_end(found, expected):
    for line, wanted in zip(found[0], expected[0], strict=True):
        assert line == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    codes, outputs = Job(folder, 1).wait()
    assert codes == [0], outputs
    return results(folder)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, of_one_process):
    folder = tmp_path / "run"
    codes, outputs = Job(folder, 2).wait()
    assert codes == [0, 0], outputs
    assert_same_end(results(folder), of_one_process)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_on_two(tmp_path, of_one_process):
    folder = tmp_path / "run"
    job = Job(folder, 1)
    job.wait_for_step(folder, 12)
    job.children[0].send_signal(signal.SIGTERM)
    (code,), _ = job.wait()
    assert code != 0 and not (folder / "params.npz").exists()
    codes, outputs = Job(folder, 2).wait()
    assert codes == [0, 0], outputs
    assert_same_end(results(folder), of_one_process)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_job_continues(
    tmp_path, of_one_process, killed
):
    folder = tmp_path / "run"
    job = Job(folder, 2)
    job.wait_for_step(folder, 12)
    job.children[killed].kill()
    began = time.monotonic()
    codes, outputs = job.wait(seconds=60)
    assert time.monotonic() - began < 60
    assert codes[1 - killed] != 0
    said = outputs[1 - killed]
    assert "another task died" in said or "Connection closed by peer" in said, said
    assert not (folder / "params.npz").exists()
    codes, outputs = Job(folder, 2).wait()
    assert codes == [0, 0], outputs
    assert_same_end(results(folder), of_one_process)


FAILS = """
import sys
from pref_jax import processes
processes.initialize()
if processes.is_first() == (sys.argv[1] == "first"):
    raise ValueError("this process cannot go on")
processes.wait("for the one that failed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "second"])
def test_a_process_that_fails_ends_the_other(who):
    codes, outputs = Job(who, 2, ("-c", FAILS)).wait(seconds=90)
    assert all(codes), outputs
    assert any("this process cannot go on" in said for said in outputs)
