"""A checkpoint and the user's data: one stage, its folder, its presets, its errors."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import own_files as files
from experiments import finetune
from experiments.worlds.methods import AdaptiveTau, FsftConfig
from pref_jax import model_folders
from pref_jax.models import published
from pref_jax.train import sharding

TINY = ("--stage.loop.num-steps", 4, "--stage.loop.validate-every", 2)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A folder of what a user brings, and a model in it."""
    folder = tmp_path_factory.mktemp("own")
    files.write(folder)
    files.save_model(folder / "base", folder / "tokenizer")
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    demonstrations = [{"prompt": x["prompt"], "response": x["chosen"]} for x in rows]
    text = "".join(json.dumps(x) + "\n" for x in demonstrations)
    (folder / "demonstrations.jsonl").write_text(text)
    return folder


def run(folder, *arguments, root):
    command = [sys.executable, "-m", "experiments.finetune", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_pairs_align_a_checkpoint_that_can_be_loaded_again(
    own_files, tmp_path, pytestconfig, adapters
):
    model = ("--model", own_files / "base", "--data", own_files / "pairs.jsonl")
    options = ("--adapters", "--lora.rank", 2) if adapters else ()
    result = run(
        tmp_path,
        *("--preset", "smoke", *TINY, *model, *options),
        root=pytestconfig.rootpath,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "runs/finetune/001"
    record = json.loads((folder / "record.json").read_text())
    assert record["results"]["steps"] == 4
    assert record["results"]["preferences"]["margin"][0] != 0
    assert "first step after" in result.stderr
    _, trained = model_folders.load(str(folder / "DPO"))
    _, start = model_folders.load(str(own_files / "base"))
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(start), strict=True)
    ]
    assert max(moved) > 0


@pytest.mark.slow
def test_demonstrations_are_for_sft_alone(own_files, tmp_path, pytestconfig):
    model = (
        *("--model", own_files / "base"),
        *("--data", own_files / "demonstrations.jsonl"),
    )
    small = ("--compute.dtype", "float32", "--stage.groups-per-step", 8)
    warmup = ("--stage.optimizer.warmup-steps", 1)
    result = run(
        tmp_path,
        *("--preset", "sft", *TINY, *small, *warmup, *model),
        root=pytestconfig.rootpath,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = (tmp_path / "runs/finetune/001/SFT/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1
    result = run(
        tmp_path, "--preset", "smoke", *TINY, *model, root=pytestconfig.rootpath
    )
    assert result.returncode != 0
    assert "holds demonstrations, and DPO compares responses" in result.stderr


@pytest.mark.slow
def test_sft_by_a_divergence_begins_at_its_anchor(own_files, tmp_path, pytestconfig):
    model = ("--model", own_files / "base", "--data", own_files / "pairs.jsonl")
    small = ("--compute.dtype", "float32", "--stage.groups-per-step", 8)
    options = ("--stage.optimizer.warmup-steps", 1, "--fsft.partition", "solve")
    result = run(
        tmp_path,
        *("--preset", "fsft", *TINY, *small, *options, *model),
        root=pytestconfig.rootpath,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    path = tmp_path / "runs/finetune/001/f-SFT/metrics.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    # Every token weighs 1 at the anchor.
    assert first["sft/weight"] == pytest.approx(1.0, abs=1e-4)
    assert abs(first["loss"]) < 1e-3


@pytest.mark.slow
def test_lists_are_for_adpo_alone(own_files, tmp_path, pytestconfig):
    grades = {"labels": [0.0, 2.0, 1.0]}
    rows = [
        {"prompt": f"{i} + {i} =", "responses": [f" {i}", f" {2 * i}", " 7"]} | grades
        for i in range(60)
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--preset", "smoke", *TINY, "--model", own_files / "base", "--data", path)
    refused = run(tmp_path, *model, root=pytestconfig.rootpath)
    assert refused.returncode == 1 and "3 responses a row" in refused.stderr
    options = ("--temperature", 0.5)
    result = run(tmp_path, *model, *options, root=pytestconfig.rootpath)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "runs/finetune/001"
    record = json.loads((folder / "record.json").read_text())
    assert list(record["results"]["preferences"]) == ["accuracy"]
    assert (folder / "ADPO" / "model.json").is_file()


def test_a_run_without_model_or_data_says_what_it_needs():
    with pytest.raises(ValueError, match="give --model DIR --data FILE"):
        finetune.make_task(finetune.SMOKE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "`beta` must be positive or None"),
        ({"temperature": -1.0}, "`temperature` must be positive or None; got -1"),
        ({"beta": None, "temperature": 1.0}, "`temperature` belongs to `beta`"),
        ({"adaptive": True}, "`adaptive` belongs to ADPO; give --temperature"),
        ({"adaptive_tau": AdaptiveTau(low=0.2)}, "belongs to `adaptive`; give"),
        ({"divergence": "hellinger"}, "`divergence` is of SFT and `beta` of DPO"),
        ({"beta": None, "divergence": "kl"}, "`divergence` must be one of total-var"),
        ({"fsft": FsftConfig(level="sequence")}, "`fsft` belongs to `divergence`"),
        (
            {
                "beta": None,
                "divergence": "hellinger",
                "fsft": FsftConfig(partition="solve"),
                "stage": dataclasses.replace(finetune.SMOKE.stage, num_microbatches=2),
            },
            "`partition` solve looks across the batch",
        ),
        ({"shape": "llama-9"}, "`shape` must be one of llama-3-8b"),
        ({"lora": dataclasses.replace(finetune.SMOKE.lora, rank=3)}, "give --adapters"),
        ({"weights": (1.0,)}, "a number for each of 0 sources"),
    ],
)
def test_a_bad_config_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(finetune.SMOKE, **change)


def test_every_preset_of_a_slice_splits_its_batch():
    names = [name for name in finetune.PRESETS if "v5" in name or "v6" in name]
    assert len(names) == 26
    for name in names:
        config = finetune.PRESETS[name]
        sizes = published.SHAPES[config.shape]
        chips = int(np.prod([int(n) for n in name.split("-")[-1].split("x")]))
        mesh = config.mesh
        data = chips // (mesh.fsdp * mesh.tensor)
        assert data * mesh.fsdp * mesh.tensor == chips
        parts = data * mesh.fsdp * config.stage.num_microbatches
        assert config.planned.num_rows % parts == 0
        assert sizes.num_kv_heads % mesh.tensor == sizes.width % mesh.fsdp == 0


@pytest.mark.parametrize("method", finetune.METHODS)
def test_programs_are_known_from_shapes_alone(method):
    config = dataclasses.replace(finetune.METHODS[method], shape="llama-3.2-1b")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    found = {program.name: program for program in finetune.programs(config, mesh)}
    anchored = config.beta or config.divergence
    scored = ["scoring pass"] if anchored else []
    assert list(found) == ["train step", *scored, "sampler"]
    moving, frozen, batch = found["train step"].arguments
    length = {1: 1280, 2: 2048, 8: 3328}
    num_responses = batch.labels.shape[1]
    assert batch.tokens.shape == (64, length[num_responses])
    assert (num_responses > 1) == bool(config.beta)
    assert bool(frozen) == config.adapters
    trained = sum(x.size for x in jax.tree.leaves(moving.params))
    assert (trained < 3e7) == config.adapters
    for program in found.values():
        for leaf in jax.tree.leaves(program.arguments):
            assert leaf.sharding.mesh == mesh
    passes = 2 if config.adapters else 3
    if anchored:
        ratio = found["train step"].useful_flops / found["scoring pass"].useful_flops
        assert ratio == passes
    # 2 flops a parameter and token at least, of 1.24 billion less the embedding.
    tokens = config.planned.prompt + config.planned.response * num_responses
    least = 2 * passes * 0.97e9 * batch.labels.shape[0] * tokens
    assert least < found["train step"].useful_flops < 2 * least
