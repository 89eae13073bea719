"""SFT, then DPO, on the user's text: what is read, trained, told, and refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import own_files as files
from experiments.sft_bridge import text
from experiments.sft_bridge.text import Rows
from experiments.worlds.methods import FsftConfig
from pref_jax.train import sharding
from pref_jax.types import TokenGroup


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A folder of pairs, demonstrations, a tokenizer, a grade and a checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    files.write(folder)
    files.save_model(folder / "base", folder / "tokenizer")
    rows = [
        {"prompt": f"What is {i} plus {i}?", "response": f" It is {2 * i}."}
        for i in range(40)
    ]
    text_of_rows = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "demonstrations.jsonl").write_text(text_of_rows)
    return folder


def change(**fields):
    return dataclasses.replace(text.SMOKE, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "`divergence` must be one of total-variation, chi"),
        ({"fsft": FsftConfig(beta=1.0)}, "`fsft` belongs to `divergence`"),
        ({"beta": 0.0}, "`beta` must be positive; got 0"),
        ({"warmup": 0.2}, "`warmup` is of stages whose epochs are given"),
        ({"model": "x", "documents": Rows(("x",))}, "are text for a base, and none is"),
        ({"base": None, "documents": Rows(("x",))}, "are text for a base, and none is"),
        ({"sft_epochs": 0.0}, "`sft_epochs` must be positive or None; got 0"),
        ({"shape": "llama-9"}, "`shape` must be one of llama-3-8b"),
        ({"grade": "a:b", "num_eval_prompts": 0}, "`grade` needs answers"),
    ],
)
def test_a_bad_config_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        change(**fields)


def test_what_is_missing_is_named(own_files):
    with pytest.raises(ValueError, match="needs a base: give --model DIR, or"):
        text.read_data(text.SMOKE)
    given = change(tokenizer=str(own_files / "tokenizer"))
    with pytest.raises(ValueError, match=r"give --demonstrations\.data FILE"):
        text.read_data(given)


def test_demonstrations_are_no_pairs(own_files, tmp_path):
    rows = Rows((str(own_files / "demonstrations.jsonl"),))
    config = change(
        tokenizer=str(own_files / "tokenizer"),
        demonstrations=rows,
        pairs=rows,
        cache=str(tmp_path),
    )
    with pytest.raises(ValueError, match="holds demonstrations, and DPO compares"):
        text.read_data(config)


def test_text_without_prompts_needs_a_heldout_file_of_its_own(own_files, tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"prompt": "", "response": f"{i} is a number."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = change(
        tokenizer=str(own_files / "tokenizer"),
        demonstrations=Rows((str(own_files / "demonstrations.jsonl"),)),
        pairs=Rows((str(own_files / "pairs.jsonl"),)),
        documents=Rows((str(path),)),
        cache=str(tmp_path),
    )
    with pytest.raises(ValueError, match=r"give --documents\.heldout FILE"):
        text.read_data(config)
    given = dataclasses.replace(config.documents, heldout=str(path))
    data = text.read_data(dataclasses.replace(config, documents=given))
    assert len(data.documents[0][0].responses[0]) > 3


def test_epochs_become_steps_with_warm_up_and_validations():
    stage = text.PAPER.sft
    assert text.in_epochs(stage, None, 1000, 0.1) is stage
    found = text.in_epochs(stage, 2.0, 12_800, 0.1)
    assert (found.loop.num_steps, found.optimizer.warmup_steps) == (200, 20)
    assert found.loop.validate_every == found.loop.checkpoint_every == 20
    assert text.in_epochs(stage, 0.01, 100, 0.1).loop.num_steps == 1


def test_all_of_a_text_is_predicted_from_its_first_token():
    masks = (np.array([True, False]),)
    group = TokenGroup(np.array([1, 5, 6]), (np.array([7, 2]),), masks, (1.0,), 3)
    (document,) = text._as_text([group])
    assert document.prompt.tolist() == [1] and document.record == 3
    assert document.responses[0].tolist() == [5, 6, 7, 2]
    assert document.loss_masks[0].tolist() == [True] * 4


@pytest.mark.parametrize("divergence", [None, "hellinger"])
def test_programs_are_known_from_shapes_alone(divergence):
    config = dataclasses.replace(
        text.PAPER, shape="llama-3.2-1b", divergence=divergence
    )
    mesh = sharding.make_mesh(fsdp=8)
    found = {program.name: program for program in text.programs(config, mesh)}
    assert list(found) == [
        "scoring pass, demonstrations",
        "SFT step",
        "scoring pass, pairs",
        "DPO step",
        "sampler",
    ]
    _, _, shown = found["SFT step"].arguments
    _, _, pairs = found["DPO step"].arguments
    assert ("anchor_logps" in shown.extras) == (divergence is not None)
    assert "anchor_logps" in pairs.extras
    assert shown.tokens.shape == (128, 2048) and pairs.tokens.shape == (128, 3072)
    for program in found.values():
        for leaf in jax.tree.leaves(program.arguments):
            assert leaf.sharding.mesh == mesh


def command(folder, *arguments):
    given = (
        *(
            "--preset",
            "smoke",
            "--demonstrations.data",
            folder / "demonstrations.jsonl",
        ),
        *("--pairs.data", folder / "pairs.jsonl", *arguments),
    )
    return [sys.executable, "-m", "experiments.sft_bridge.text", *map(str, given)]


def run(folder, cwd, root, *arguments):
    result = subprocess.run(
        command(folder, *arguments),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{root}:{folder}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_a_grade_that_fails_does_so_before_anything_is_trained(own_files, tmp_path):
    rows = Rows((str(own_files / "demonstrations.jsonl"),))
    config = change(
        tokenizer=str(own_files / "tokenizer"),
        demonstrations=rows,
        pairs=Rows((str(own_files / "pairs.jsonl"),)),
        cache=str(tmp_path),
        grade="nowhere:grade",
    )
    with pytest.raises(ValueError, match="--grade nowhere:grade must name module"):
        text.read_data(config)


@pytest.mark.slow
def test_a_base_is_trained_and_its_models_answer(own_files, tmp_path, pytestconfig):
    options = ("--tokenizer", own_files / "tokenizer", "--grade", "mygrade:short")
    result = run(own_files, tmp_path, pytestconfig.rootpath, *options)
    folder = tmp_path / "runs" / "sft_bridge_text" / "001"
    assert "report: runs/sft_bridge_text/001/report.html" in result.stdout
    record = json.loads((folder / "record.json").read_text())
    found = record["results"]
    assert found["SFT"]["loss"] < found["base"]["loss"]
    # The same number twice: by the base's logps, and as a difference of losses.
    gained = found["base"]["loss"] - found["SFT"]["loss"]
    assert found["SFT"]["log_ratio"] == pytest.approx(gained, abs=1e-4)
    assert {"accuracy", "accuracy_from_base", "reward"} <= set(found["DPO"])
    lines = (folder / "responses.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["model"] for a in answers] == ["SFT"] * 4 + ["DPO"] * 4
    assert all(a["reward"] == -len(a["response"]) for a in answers)
    assert "accuracy of log(pi / SFT)" in (folder / "report.html").read_text()
    # As if it had been killed before DPO: nothing that is done is done again.
    (folder / "record.json").unlink()
    for path in sorted((folder / "DPO").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    again = run(own_files, tmp_path, pytestconfig.rootpath, *options)
    assert "SFT 1/4" not in again.stderr and "DPO 1/4" in again.stderr
    record = json.loads((folder / "record.json").read_text())
    assert record["results"] == found and record["starts"] == 2


@pytest.mark.slow
def test_a_checkpoint_is_the_base_of_sft_by_a_divergence(
    own_files, tmp_path, pytestconfig
):
    options = (
        *("--model", own_files / "base"),
        *("--divergence", "jensen-shannon", "--fsft.beta", 0.5),
        *("--sft-epochs", 1, "--num-eval-prompts", 0),
    )
    run(own_files, tmp_path, pytestconfig.rootpath, *options)
    folder = tmp_path / "runs" / "sft_bridge_text" / "001"
    record = json.loads((folder / "record.json").read_text())
    found = record["results"]
    # What the stage itself says of its steps is not used, and that is told.
    assert any(note.startswith("SFT: 4 steps (1 epochs") for note in record["notes"])
    assert not any(note.startswith("DPO: ") for note in record["notes"])
    assert not (folder / "base").exists()
    lines = (folder / "SFT" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    steps = [line for line in metrics if "sft/weight" in line]
    assert len(steps) == 4  # 36 demonstrations, 8 a step
    assert steps[0]["sft/weight"] == pytest.approx(1.0, abs=1e-4)
    assert found["SFT"]["log_ratio"] > 0
    assert not (folder / "responses.jsonl").exists()
