"""Weights & Biases gets the numbers of a run, one run for all of its restarts."""

import json
import math
import sys
import types

import jax
import pytest
from etils import epath

import object_store
from pref_jax.train.logging import MetricsLog
from pref_jax.train.tracking import ID_FILE, WandbConfig

CONFIG = WandbConfig(project="preferences", group="pairs")


@pytest.fixture
def runs(monkeypatch):
    """What a stand-in for the package was told, a dict a run."""
    started = []

    def init(**options):
        told = {"options": options, "metrics": {}, "lines": [], "exit_code": None}
        started.append(told)
        return types.SimpleNamespace(
            define_metric=lambda name, **how: told["metrics"].update({name: how}),
            log=told["lines"].append,
            finish=lambda exit_code: told.update(exit_code=exit_code),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return started


def write_step(folder, step, **options):
    with MetricsLog(folder, resume_step=step - 1, wandb=CONFIG, **options) as log:
        log.write(step, {"loss": 0.5}, {"step": 0.25})


def test_the_numbers_are_sent_under_the_names_of_the_lines(tmp_path, runs):
    write_step(tmp_path / "001" / "dpo", 1, about={"beta": 0.1})
    (told,) = runs
    number = json.loads((tmp_path / "001" / "dpo" / ID_FILE).read_text())["id"]
    assert told["options"] == {
        "project": "preferences",
        "entity": None,
        "group": "pairs",
        "name": "001/dpo",
        "id": number,
        "resume": "allow",
        "dir": str(tmp_path / "001" / "dpo"),
        "config": {"beta": 0.1},
    }
    assert told["lines"] == [{"step": 1, "loss": 0.5, "time/step": 0.25}]
    assert told["metrics"] == {"step": {}, "*": {"step_metric": "step"}}
    assert told["exit_code"] == 0


def test_a_resumed_run_goes_on_under_its_id(tmp_path, runs):
    for step in (1, 2):
        write_step(tmp_path / "a", step)
    write_step(tmp_path / "b", 1)
    first, again, other = (told["options"]["id"] for told in runs)
    assert first == again != other


def test_a_number_that_is_not_finite_is_sent_as_it_is(tmp_path, runs):
    with MetricsLog(tmp_path, wandb=CONFIG) as log:
        log.write(1, {"loss": math.inf})
    assert runs[0]["lines"] == [{"step": 1, "loss": math.inf}]


def test_a_run_that_fails_is_shown_as_failed(tmp_path, runs):
    with pytest.raises(KeyError), MetricsLog(tmp_path, wandb=CONFIG):
        raise KeyError
    assert runs[0]["exit_code"] == 1


def test_only_the_first_process_sends(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_step(tmp_path / "run", 1)
    assert runs == [] and not (tmp_path / "run").exists()


def test_nothing_is_sent_unless_asked(tmp_path, runs):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
    assert runs == [] and not (tmp_path / ID_FILE).exists()


def test_a_missing_package_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'pref_jax\[wandb\]'"):
        write_step(tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


def test_a_server_that_refuses_leaves_no_open_log(tmp_path, runs, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no such project")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    bucket = object_store.install(monkeypatch)
    with pytest.raises(RuntimeError, match="no such project"):
        write_step("gs://bucket/run", 1)
    assert "/bucket/run/metrics.jsonl" in bucket.puts


def test_files_of_wandb_reach_a_bucket(runs, monkeypatch):
    object_store.install(monkeypatch)
    with MetricsLog("gs://bucket/run", wandb=CONFIG):
        files = epath.Path(runs[0]["options"]["dir"])
        (files / "wandb").mkdir()
        (files / "wandb" / "offline").write_text("numbers")
    remote = epath.Path("gs://bucket/run")
    assert (remote / "wandb" / "offline").read_text() == "numbers"
    assert json.loads((remote / ID_FILE).read_text())["id"] == runs[0]["options"]["id"]
