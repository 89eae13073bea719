"""The first command of the README, small: its stages, its folder, its errors."""

import json
import re
import subprocess
import sys

import jax
import pytest

import own_files as files
from pref_jax.models import pretrained
from scripts import convert_checkpoint

TINY = (
    "--preset smoke --decoder.width 16 --decoder.num-layers 1 --decoder.mlp-width 16 "
    "--num-documents 100 --num-demonstrations 100 --num-pair-prompts 16 "
    "--pair-samples 4 --num-eval-prompts 8 --eval-samples 2 --max-new-tokens 12 "
    "--base.loop.num-steps 4 --base.loop.validate-every 2 "
    "--sft.loop.num-steps 4 --sft.loop.validate-every 2 "
    "--dpo.loop.num-steps 2 --dpo.groups-per-step 4 "
    "--base.optimizer.warmup-steps 1 --sft.optimizer.warmup-steps 1 "
    "--dpo.optimizer.warmup-steps 1 --control-optimizer.warmup-steps 1"
).split()


def quickstart(folder, *arguments, expect=0):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == expect, result.stderr[-3000:]
    return result


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch, pytestconfig):
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A folder of what a user brings."""
    folder = tmp_path_factory.mktemp("own")
    files.write(folder)
    return folder


@pytest.fixture(scope="module")
def world_run(tmp_path_factory, pytestconfig):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
        result = quickstart(folder, *TINY)
    return folder, result


def test_the_world_runs_from_pretraining_to_a_report(world_run):
    folder, result = world_run
    run = folder / "runs/quickstart/001"
    record = json.loads((run / "record.json").read_text())
    assert set(record["results"]["models"]) == {"base", "SFT", "DPO", "control"}
    assert record["results"]["steps"]["DPO"] == record["results"]["steps"]["control"]
    assert record["results"]["models"]["SFT"]["kl"] == pytest.approx(
        [0, 0, 0], abs=1e-6
    )
    assert record["results"]["models"]["DPO"]["kl"][0] > 0
    assert (run / "report.html").stat().st_size > 10_000
    assert str(run / "report.html") in result.stdout.replace("\n", "") or (
        "runs/quickstart/001/report.html" in result.stdout
    )
    for stage in ("base", "SFT", "DPO", "control"):
        assert (run / stage / "metrics.jsonl").stat().st_size > 0
    first = json.loads((run / "DPO/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_a_finished_run_is_kept_and_the_next_gets_a_new_name(world_run):
    folder, _ = world_run
    before = (folder / "runs/quickstart/001/record.json").read_bytes()
    # The second run finds nothing to continue; it stops at its first bad field.
    quickstart(folder, *TINY, "--name", "001", expect=1)
    assert (folder / "runs/quickstart/001/record.json").read_bytes() == before


@pytest.mark.slow  # the world runs the same stages
def test_own_pairs_with_a_fresh_decoder(own_files, tmp_path):
    quickstart(
        tmp_path,
        *TINY,
        *("--data", own_files / "pairs.jsonl", "--tokenizer", own_files / "tokenizer"),
        *("--sft.groups-per-step", 8),
    )
    page = (tmp_path / "runs/quickstart/001/report.html").read_text()
    assert "--grade module:function" in page
    results = json.loads((tmp_path / "runs/quickstart/001/record.json").read_text())
    assert results["results"]["preferences"]["DPO"]["accuracy"]
    assert "reward" not in results["results"]["models"]["DPO"]


@pytest.mark.slow  # as the test before it, with one field more
def test_own_pairs_with_a_grade_have_a_true_reward(own_files, tmp_path, monkeypatch):
    quickstart(
        own_files,
        *TINY,
        *("--root", tmp_path / "runs"),
        *("--data", "pairs.jsonl", "--tokenizer", "tokenizer"),
        *("--sft.groups-per-step", 8, "--grade", "mygrade:short"),
    )
    record = json.loads((tmp_path / "runs/001/record.json").read_text())
    assert record["results"]["models"]["DPO"]["reward"][0] < 0


@pytest.mark.slow
def test_adapters_on_a_model_end_as_a_folder_that_is_a_model_again(own_files, tmp_path):
    """From a Hugging Face folder, over adapters, a stage and a conversion, to one."""
    params = files.save_model(tmp_path / "base", own_files / "tokenizer")
    data = ("--data", own_files / "pairs.jsonl", "--sft.groups-per-step", 8)
    adapters = ("--adapters", "--lora.rank", 2)
    run = tmp_path / "runs/quickstart/001"
    quickstart(tmp_path, *TINY, *data, "--model", "base", *adapters)
    stage = json.loads((run / "DPO/model.json").read_text())
    assert (stage["lora"]["rank"], stage["method"]) == (2, "DPO")
    first = json.loads((run / "DPO/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert len(list((run / "tokenizer").iterdir())) > 1
    convert_checkpoint.convert(
        convert_checkpoint.Config(str(run / "DPO"), str(tmp_path / "out"))
    )
    _, trained = pretrained.load(tmp_path / "out")
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), trained, params)
    assert moved["blocks"]["0"]["mlp"]["up"] > 0 and moved["embedding"] == 0
    # The stage is a model to start from as well.
    quickstart(tmp_path, *TINY, *data, "--model", run / "DPO", "--name", "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sft.lop", 3], "--sft.lop"),
        (["--preset", "large"], "invalid choice: 'large'"),
        (["--tokenizer", "somewhere"], "belongs to `data`"),
        (["--cache", "elsewhere"], "`cache` belongs to `data`"),
        (["--adapters"], "`adapters` and `max_positions` belong to `model`"),
        (["--lora.rank", 4], "`lora` belongs to `adapters`; give --adapters too"),
        (["--on-error", "skip"], "`on_error` belongs to `data`"),
        (["--data", "pairs.jsonl"], "needs a tokenizer"),
        (["--beta", 0], "`beta` must be positive"),
        (["--dpo.loop.num-steps", 0], "`num_steps` must be at least 1"),
    ],
)
def test_a_bad_command_line_says_what_is_wrong(tmp_path, arguments, message):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert re.search(re.escape(message), result.stderr + result.stdout)
    assert not (tmp_path / "runs").exists()


def test_a_bad_row_stops_with_file_line_and_field(own_files, tmp_path):
    text = (own_files / "pairs.jsonl").read_text().splitlines()
    text[6] = json.dumps({"prompt": "x", "chosen": " y", "rejected": 3})
    (tmp_path / "bad.jsonl").write_text("\n".join(text))
    result = quickstart(
        tmp_path,
        *TINY,
        *("--data", "bad.jsonl", "--tokenizer", own_files / "tokenizer"),
        expect=1,
    )
    assert "bad.jsonl:7" in result.stderr and "rejected" in result.stderr
    assert not (tmp_path / "runs").exists()
