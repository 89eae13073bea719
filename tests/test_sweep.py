"""The sweep: every combination once, continued, and a table of what became of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from scripts import sweep
from scripts.sweep import Config

EXPERIMENT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("--root", "--name", "--rate", "--seed", "--preset"):
    parser.add_argument(name)
parser.add_argument("--sizes", nargs="*")
args = parser.parse_args()
folder = pathlib.Path(args.root, args.name)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text("{}")
(folder / "calls").open("a").write("called ")
if args.preset == "slow":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "begun").touch()
    time.sleep(60)
if args.rate == "9":
    sys.exit("error: such a rate")
if args.rate == "8" and not (folder / "resumed").exists():
    (folder / "resumed").touch()
    sys.exit(75)
score = float(args.rate) + float(args.seed or 0)
results = {"score": [score, score - 1, score + 1], "sizes": args.sizes}
(folder / "record.json").write_text(json.dumps({"results": results, "seconds": 0.25}))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "fake_experiment.py").write_text(EXPERIMENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "runs"


def config(root, *grid, **changes):
    return Config("fake_experiment", grid, root=str(root), **changes)


def calls(root):
    return {p.parent.name: p.read_text().split() for p in root.glob("*/calls")}


@pytest.mark.parametrize(
    "grid",
    [["rate"], ["rate="], ["rate=1,,2"], ["ra te=1"], ["rate=1", "rate=2"], ["a=1,1"]],
)
def test_a_grid_of_another_form_is_refused(grid):
    with pytest.raises(ValueError, match="--grid"):
        sweep.parse_grid(grid)


def test_every_combination_is_run_once_and_stands_in_the_table(root, capsys):
    grid = config(root, "rate=1,2", "seed=0,1", metrics=("results.score",))
    assert sweep.sweep(grid, ["--preset", "quick"]) == 0
    names = [f"rate={r},seed={s}" for r in (1, 2) for s in (0, 1)]
    assert calls(root) == {name: ["called"] for name in names}
    rows = json.loads((root / "sweep.json").read_text())
    assert [row["results.score"][0] for row in rows] == [1, 2, 2, 3]
    lines = (root / "sweep.md").read_text().splitlines()
    assert lines[0] == "| rate | seed | status | seconds | results.score |"
    assert lines[4] == "| 2 | 0 | finished | 0.25 | 2 [1, 3] |"
    assert "rate=2,seed=1: finished" in capsys.readouterr().out
    assert sweep.sweep(grid, ["--preset", "quick"]) == 0
    assert calls(root) == {name: ["called"] for name in names}


def test_a_failed_run_is_told_and_ends_no_other(root, capsys):
    grid = config(root, "rate=9,1", num_parallel=2)
    assert sweep.sweep(grid, []) == 1
    rows = json.loads((root / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["failed", "finished"]
    out = capsys.readouterr().out
    assert f"rate=9: failed (1): error: such a rate; see {root}/rate=9.log" in out
    assert sweep.sweep(grid, []) == 1  # what failed is tried again
    assert calls(root) == {"rate=9": ["called"] * 2, "rate=1": ["called"]}


def test_a_run_that_was_preempted_continues(root):
    grid = config(root, "rate=8,1")
    assert sweep.sweep(grid, []) == 75
    rows = json.loads((root / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["stopped", "finished"]
    assert sweep.sweep(grid, []) == 0
    assert calls(root)["rate=8"] == ["called"] * 2


def test_a_value_may_be_several_arguments(root):
    assert sweep.sweep(config(root, "sizes=1 2,3", "rate=1"), []) == 0
    found = [
        json.loads((root / name / "record.json").read_text())["results"]["sizes"]
        for name in ("sizes=1_2,rate=1", "sizes=3,rate=1")
    ]
    assert found == [["1", "2"], ["3"]]


def test_one_combination_alone_is_for_a_job_of_a_cluster(root, capsys):
    for only in (2, 0):
        assert sweep.sweep(config(root, "rate=1,2,3", only=only), []) == 0
    assert set(calls(root)) == {"rate=1", "rate=3"}
    capsys.readouterr()
    grid = config(root, "rate=1,2,3", table=True, metrics=("results.score.0",))
    assert sweep.sweep(grid, []) == 0
    rows = json.loads((root / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["finished", "not run", "finished"]
    assert [row.get("results.score.0") for row in rows] == [1, None, 3]
    with pytest.raises(ValueError, match=r"`only` must lie in \[0, 3\)"):
        sweep.sweep(config(root, "rate=1,2,3", only=3), [])


def test_commands_are_listed_and_nothing_is_run(root, capsys):
    grid = config(root, "dpo.learning_rate=1e-3,5e-4", list=True)
    assert sweep.sweep(grid, ["--preset", "a b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        f"{sys.executable} -m fake_experiment --preset 'a b' --root {root} --name "
        "learning_rate=5e-4 --dpo.learning-rate 5e-4"
    )
    assert not root.exists()


def test_runs_of_another_command_are_not_taken_for_these(root):
    assert sweep.sweep(config(root, "rate=1"), ["--preset", "a"]) == 0
    with pytest.raises(ValueError, match="run of another command: .*--preset a"):
        sweep.sweep(config(root, "rate=1,2"), ["--preset", "b"])
    for way in ({"only": 0}, {"table": True}):
        with pytest.raises(ValueError, match="run of another command: .*--preset a"):
            sweep.sweep(config(root, "rate=1,2", **way), ["--preset", "b"])
    assert calls(root) == {"rate=1": ["called"]}
    assert sweep.sweep(config(root, "rate=1,2"), ["--preset", "a"]) == 0


def test_a_command_that_began_nothing_may_be_mended(root):
    assert sweep.sweep(config(root, "rate=1"), ["--preste", "a"]) == 1
    assert calls(root) == {}
    assert sweep.sweep(config(root, "rate=1"), ["--preset", "a"]) == 0


@pytest.mark.parametrize("argument", ["--root", "--name=x"])
def test_what_the_sweep_names_is_not_named_by_others(root, argument):
    with pytest.raises(ValueError, match=r"of the runs is the sweep's"):
        sweep.make_runs(config(root, "rate=1"), [argument, "x"])


def test_fields_of_one_last_part_are_named_in_full(root):
    runs = sweep.make_runs(config(root, "sft.rate=1,2", "dpo.rate=3"), [])
    assert [r.folder.name for r in runs] == [
        f"sft.rate={rate},dpo.rate=3" for rate in (1, 2)
    ]
    with pytest.raises(ValueError, match="one folder, rate=a_b, as their values"):
        sweep.make_runs(config(root, "rate=a/b,a:b"), [])


def test_a_metric_that_is_not_there_names_its_neighbours(root):
    grid = config(root, "rate=1", metrics=("results.scores",))
    with pytest.raises(ValueError, match=r"no 'results.scores': results has score"):
        sweep.sweep(grid, [])


def test_a_bucket_is_for_runs_that_start_elsewhere():
    with pytest.raises(ValueError, match="gs://b/runs are started elsewhere: --list"):
        sweep.sweep(Config("fake_experiment", ("rate=1",), root="gs://b/runs"), [])


def test_sigterm_is_passed_on_and_runs_save(root, tmp_path, pytestconfig):
    script = pathlib.Path(pytestconfig.rootpath) / "scripts" / "sweep.py"
    process = subprocess.Popen(
        [
            *(sys.executable, str(script), "fake_experiment", "--root", str(root)),
            *("--grid", "rate=1,2", "--", "--preset", "slow"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{pytestconfig.rootpath}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if (root / "rate=1" / "begun").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "rate=1: stopped; the same command continues" in out
    assert set(calls(root)) == {"rate=1"}
