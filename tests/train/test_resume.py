"""A process that is killed again and again ends as if nothing had happened."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_STEPS = 40  # of `tiny_stage.CONFIG`, which saves every third


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing ended; it leaves its compiled programs to the others."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, folder / "cache")
    assert process.wait() == 0, errors(folder)
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted([*range(1, NUM_STEPS + 1), 12, 24, 36, 40])
    return folder


def start(folder, cache):
    """Start the stage of `tests/tiny_stage.py`, on one device."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    folder.mkdir(exist_ok=True)
    with (folder / "stderr.txt").open("w") as stderr:
        command = [sys.executable, str(ROOT / "tests" / "tiny_stage.py"), str(folder)]
        return subprocess.Popen(command, env=environment, stderr=stderr)


def errors(folder):
    return (folder / "stderr.txt").read_text()


def written(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def last_step(text):
    complete = [line for line in text.splitlines(keepends=True) if line[-1:] == b"\n"]
    return json.loads(complete[-1])["step"] if complete else 0


def saved_steps(folder):
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def end(number, folder, cache, *, num_steps, delay=0.0):
    """Start the stage, and send signal `number` when it has done some steps.

    Args:
      number: of the signal.
      folder: of the stage.
      cache: of compiled programs.
      num_steps: that have written their line since the start.
      delay: seconds from then to the signal.

    Returns:
      What the process exited with.
    """
    before, saved = written(folder), max(saved_steps(folder), default=0)
    process = start(folder, cache)
    while True:
        text = written(folder)
        # The lines of steps that were not saved are removed before the first new one.
        if text != before and last_step(text) >= saved + num_steps:
            break
        assert process.poll() is None, f"ended by itself\n{errors(folder)}"
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait()


def lines(folder):
    """The lines of `metrics.jsonl` without what the clock says."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in written(folder).splitlines()
    ]


def assert_same_end(folder, straight):
    process = start(folder, straight / "cache")
    assert process.wait() == 0, errors(folder)
    assert lines(folder) == lines(straight)
    assert saved_steps(folder) == saved_steps(straight)
    with (
        np.load(folder / "params.npz") as params,
        np.load(straight / "params.npz") as expected,
    ):
        assert params.files == expected.files
        for name in expected.files:
            np.testing.assert_array_equal(params[name], expected[name])


@pytest.mark.slow
def test_two_kills_and_a_stop_change_nothing(straight, tmp_path):
    cache = straight / "cache"
    killed = -signal.SIGKILL
    assert end(signal.SIGKILL, tmp_path, cache, num_steps=8) == killed
    # The save of step 6 has begun, for which that of step 3 was waited for.
    assert saved_steps(tmp_path)[-1] >= 3
    assert end(signal.SIGKILL, tmp_path, cache, num_steps=5, delay=0.01) == killed
    stopped = end(signal.SIGTERM, tmp_path, cache, num_steps=4)
    assert stopped == PREEMPTED_EXIT_CODE, errors(tmp_path)
    # What a stop saves is the step that it stopped after, due or not.
    step = max(saved_steps(tmp_path))
    assert last_step(written(tmp_path)) == step
    assert f"stopped after step {step}, which is saved" in errors(tmp_path)
    assert_same_end(tmp_path, straight)


@pytest.mark.slow
def test_ten_kills_change_nothing(straight, tmp_path):
    rng = random.Random(0)
    for _ in range(10):
        # Before, in and after a save; in the second half of the stage at the first
        # step of a life, lest one of them gets to the end.
        early = max(saved_steps(tmp_path), default=0) < NUM_STEPS / 2
        code = end(
            signal.SIGKILL,
            tmp_path,
            straight / "cache",
            num_steps=rng.randint(1, 9) if early else 1,
            delay=rng.uniform(0, 0.03) if early else 0.0,
        )
        assert code == -signal.SIGKILL
    assert 3 <= saved_steps(tmp_path)[-1] < NUM_STEPS
    assert_same_end(tmp_path, straight)
