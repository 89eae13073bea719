"""Jobs: each computed once, kept, continued; what is not finite survives."""

import json
import types

import numpy as np
import pytest
from etils import epath

from experiments.worlds.jobs import Job, in_blocks, run_jobs
from pref_jax.train.loop import Preempted


class Guard:
    """Says when to stop: after so many questions."""

    def __init__(self, after=100):
        self.left = after

    def agreed(self):
        self.left -= 1
        return self.left < 0


def make_jobs(calls, *, names=("a/one", "a/two", "b/three, four")):
    def compute(name, results):
        calls.append(name)
        return {"before": list(results), "values": np.float32([len(results), 0.5])}

    return [
        Job(name, 3, 60.0, lambda results, name=name: compute(name, results))
        for name in names
    ]


def results_of(job):
    """Without the seconds that it took."""
    assert job["seconds"] >= 0
    return {name: value for name, value in job.items() if name != "seconds"}


def test_jobs_run_in_order_and_see_what_came_before(tmp_path):
    calls = []
    found = run_jobs("t", make_jobs(calls), epath.Path(tmp_path), Guard())
    assert calls == ["a/one", "a/two", "b/three, four"]
    expected = {"before": calls[:2], "values": [2.0, 0.5]}
    assert results_of(found["b/three, four"]) == expected
    assert (tmp_path / "b" / "three__four.json").is_file()


def test_what_was_computed_is_kept_when_told_to_stop(tmp_path, caplog):
    caplog.set_level("INFO", "pref_jax")
    calls = []
    with pytest.raises(Preempted, match="stopped before b/three, four, 3 of 3"):
        run_jobs("t", make_jobs(calls), epath.Path(tmp_path), Guard(after=2))
    assert calls == ["a/one", "a/two"]
    assert "t: 9 runs in 3 jobs, of which 9 runs are left; about 3 min" in caplog.text
    again = []
    found = run_jobs("t", make_jobs(again), epath.Path(tmp_path), Guard())
    assert again == ["b/three, four"]
    assert "of which 3 runs are left; about 1 minutes" in caplog.text
    assert results_of(found["a/two"]) == {"before": ["a/one"], "values": [1.0, 0.5]}


def test_a_job_that_fails_leaves_no_file(tmp_path):
    def fail(results):
        raise ZeroDivisionError

    job = Job("a", 1, 1.0, fail)
    with pytest.raises(ZeroDivisionError):
        run_jobs("t", [job], epath.Path(tmp_path), Guard())
    assert not list(tmp_path.rglob("*.json"))


def test_what_is_not_finite_comes_back_as_nan(tmp_path):
    values = {"a": np.array([1.0, np.nan, np.inf]), "b": float("nan"), "c": None}
    job = Job("a", 1, 1.0, lambda results: values)
    found = run_jobs("t", [job], epath.Path(tmp_path), Guard())["a"]
    assert results_of(found) == {"a": [1.0, None, None], "b": None, "c": None}
    np.testing.assert_array_equal(np.array(found["a"], float), [1, np.nan, np.nan])
    assert json.loads((tmp_path / "a.json").read_text()) == found


def test_two_jobs_of_one_file_are_an_error(tmp_path):
    jobs = make_jobs([], names=("a b", "a,b"))
    with pytest.raises(ValueError, match="two jobs have one name"):
        run_jobs("t", jobs, epath.Path(tmp_path), Guard())


def test_other_values_are_refused(tmp_path):
    job = Job("a", 1, 1.0, lambda results: {"x": types.SimpleNamespace()})
    with pytest.raises(TypeError):
        run_jobs("t", [job], epath.Path(tmp_path), Guard())


def test_rows_are_computed_in_blocks_of_one_size():
    sizes = []

    def function(rows):
        numbers, factor = rows
        sizes.append(len(numbers))
        return {"product": numbers * factor}

    rows = [(np.float32(n), np.float32(10)) for n in range(5)]
    found = in_blocks(function, rows, 2)
    assert found["product"].tolist() == [0, 10, 20, 30, 40]
    assert sizes == [2, 2, 2]
    assert in_blocks(function, rows[:1], 3)["product"].tolist() == [0]
