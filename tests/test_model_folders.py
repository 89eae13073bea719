"""A model by its folder: Hugging Face, adapter, stage of a run; and its conversion."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import object_store
import tiny_stage
from experiments.worlds import instructions
from pref_jax import model_folders
from pref_jax.models import decoder, lora, pretrained
from pref_jax.models.pretrained import CheckpointFormatError
from pref_jax.train import sharding, storage
from pref_jax.train.checkpoint import PreemptionGuard
from scripts import convert_checkpoint

CONFIG = decoder.from_description(json.loads(tiny_stage.MODEL.description)["decoder"])
LORA = lora.LoraConfig(rank=2)
STAGE = dataclasses.replace(
    tiny_stage.CONFIG,
    loop=dataclasses.replace(
        tiny_stage.CONFIG.loop, num_steps=3, validate_every=3, checkpoint_every=3
    ),
)


def same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def train(folder, *, base=None, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with PreemptionGuard() as guard:
        return tiny_stage.train(
            folder, mesh=mesh, guard=guard, config=STAGE, base=base, **options
        )[0]


@dataclasses.dataclass
class Folders:
    """A base, a run with a stage of adapters on it and a plain stage, an adapter."""

    root: object
    params: dict
    merged: dict
    plain: dict

    @property
    def base(self):
        return self.root / "base"

    @property
    def run(self):
        return self.root / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    params = jax.device_get(tiny_stage.make_params())
    tokenizer = instructions.train_tokenizer(instructions.World())
    pretrained.save(root / "base", CONFIG, params, tokenizer=tokenizer)
    tokenizer.save_pretrained(root / "run" / "tokenizer")
    config = {"model": str(root / "base"), "data": ["pairs.jsonl"], "seed": 0}
    (root / "run" / "config.json").write_text(json.dumps({"config": config}))
    plain = train(root / "run" / "full")
    frozen, trained = lora.split(params, LORA, jax.random.key(0))
    trained = train(
        root / "run" / "adapters",
        model=lora.adapted(tiny_stage.MODEL, LORA),
        params=trained,
        anchor=(),
        frozen=frozen,
        base=model_folders.base_identity(root / "base"),
    )
    merged = lora.merge(frozen, trained, LORA)
    # Adapters on what adapters made, whose base is that stage.
    frozen, trained = lora.split(merged, LORA, jax.random.key(1))
    train(
        root / "run" / "again",
        model=lora.adapted(tiny_stage.MODEL, LORA),
        params=trained,
        anchor=(),
        frozen=frozen,
        base=model_folders.base_identity(root / "run" / "adapters"),
    )
    merged = jax.device_get(merged)
    return Folders(root, params, merged, jax.device_get(plain))


@pytest.fixture
def folders(made, tmp_path):
    """A copy to spoil, at the same place for who looks for the base."""
    return dataclasses.replace(made, root=shutil.copytree(made.root, tmp_path / "copy"))


def test_a_stage_is_its_config_and_trained_parameters(made):
    config, params = model_folders.load(made.run / "full")
    assert config == CONFIG == model_folders.load_config(made.run / "full")
    same(params, made.plain)
    options = {"dtype": "bfloat16", "remat": "full", "param_dtype": "bfloat16"}
    config, params = model_folders.load(made.run / "full", **options)
    assert (config.dtype, config.remat) == ("bfloat16", "full")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_stage_of_adapters_is_merged_into_its_base(made):
    config, params = model_folders.load(made.run / "adapters")
    assert config == CONFIG
    same(params, made.merged)
    changed = jax.tree.map(lambda x, y: (x != y).any(), params, made.params)
    assert changed["blocks"]["0"]["mlp"]["up"] and not changed["embedding"]


def test_a_hugging_face_folder_is_read_and_so_is_an_adapter(made, tmp_path):
    same(model_folders.load(made.base)[1], made.params)
    frozen, trained = lora.split(made.params, LORA, jax.random.key(0))
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    lora.save_peft(tmp_path / "a", trained, LORA, CONFIG, base=str(made.base))
    assert model_folders.load_config(tmp_path / "a") == model_folders.load_config(
        made.base
    )
    _, params = model_folders.load(tmp_path / "a")
    expected = lora.merge(frozen, trained, LORA)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        params,
        expected,
    )


@pytest.mark.parametrize("name", ["base", "run/full", "run/adapters", "run/again"])
def test_on_a_mesh_every_device_holds_its_part(made, name):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, devices=jax.devices()[:8])
    _, params = model_folders.load(made.root / name, mesh=mesh)
    up = params["blocks"]["0"]["mlp"]["up"]
    assert {s.data.shape for s in up.addressable_shards} == {(2, 4, 16)}
    _, alone = model_folders.load(made.root / name)
    # A merged product adds up in another order on other devices.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        *jax.device_get((params, alone)),
    )


def test_a_stage_reads_texts_of_another_length_where_it_can(made, folders):
    stage = folders.run / "full"
    assert model_folders.load_config(stage, max_positions=7).max_positions == 7
    assert model_folders.load(stage, max_positions=7)[0].max_positions == 7
    path = stage / "model.json"
    values = json.loads(path.read_text())
    values["decoder"] |= {"learned_positions": 9, "max_positions": 9}
    path.write_text(json.dumps(values))
    assert model_folders.load_config(stage, max_positions=8).max_positions == 8
    with pytest.raises(
        ValueError, match="can be at most 9, the number of `learned_pos"
    ):
        model_folders.load_config(stage, max_positions=10)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model.json", "{", "model.json does not describe a decoder: JSONDecodeError"),
        ("model.json", "{}", "model.json does not describe a decoder: KeyError"),
        ("done.json", "", "done.json cannot be read: JSONDecodeError"),
    ],
)
def test_a_spoilt_stage_says_which_file(folders, file, text, message):
    (folders.run / "full" / file).write_text(text)
    with pytest.raises(CheckpointFormatError, match=message):
        model_folders.load(folders.run / "full")


def test_the_tokenizer_is_that_of_the_folder_run_or_base(made):
    of = model_folders.tokenizer_folder
    assert of(str(made.base)) == str(made.base)
    assert of(made.run / "full") == str(made.run / "tokenizer")


def test_the_best_checkpoint_is_taken_once_a_stage_is_done(folders):
    done = folders.run / "full" / "done.json"
    values = json.loads(done.read_text())
    assert values["best_step"] == 3
    done.write_text(json.dumps(values | {"best_step": 2}))
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 2"):
        model_folders.load(folders.run / "full")


def test_a_base_that_moved_or_changed_is_an_error(folders, made):
    stage = folders.run / "adapters"
    description = json.loads((stage / "model.json").read_text())
    assert description["lora"]["rank"] == 2
    moved = made.base.rename(made.root / "elsewhere")
    try:
        with pytest.raises(
            CheckpointFormatError, match="base, which is no folder here"
        ):
            model_folders.load(stage)
        other = jax.tree.map(lambda x: x + 1, made.params)
        pretrained.save(made.base, CONFIG, other)
        with pytest.raises(CheckpointFormatError, match="base, which has changed: its"):
            model_folders.load(stage)
    finally:
        shutil.rmtree(made.base, ignore_errors=True)
        moved.rename(made.base)


def test_what_is_no_model_says_what_would_be_one(made, tmp_path):
    with pytest.raises(
        CheckpointFormatError, match="neither config.json .Hugging Face"
    ):
        model_folders.load(tmp_path)
    with pytest.raises(
        CheckpointFormatError, match="a run of the stages adapters, again, f"
    ):
        model_folders.load_config(made.run)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    with pytest.raises(
        CheckpointFormatError, match="names the base 'x/y', which is no"
    ):
        model_folders.load(tmp_path)


def test_checkpoints_and_adapters_are_read_from_a_bucket(made, tmp_path, monkeypatch):
    object_store.install(monkeypatch)
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path))
    base, adapter = "gs://bucket/models/base", "gs://bucket/models/adapter"
    _, trained = lora.split(made.params, LORA, jax.random.key(0))
    for name, path in (("here", made.base), ("there", base)):
        lora.save_peft(
            tmp_path / name, trained, LORA, CONFIG, base=path, family="llama"
        )
    for remote, folder in ((base, made.base), (adapter, tmp_path / "there")):
        for file in folder.iterdir():
            (epath.Path(remote) / file.name).write_bytes(file.read_bytes())

    config = model_folders.load_config(base)
    assert config == model_folders.load_config(str(made.base))
    copied = {path.suffix for path in (tmp_path / "bucket/models/base").iterdir()}
    assert ".json" in copied and ".safetensors" not in copied
    same(model_folders.load(base)[1], made.params)
    same(model_folders.load(adapter)[1], model_folders.load(tmp_path / "here")[1])
    assert model_folders.tokenizer_folder(adapter).startswith(str(tmp_path))
    identity = model_folders.base_identity(base)
    assert identity == model_folders.base_identity(str(made.base)) | {"path": base}


# --- conversion -----------------------------------------------------------------------


def convert(model, out, **options):
    return convert_checkpoint.convert(
        convert_checkpoint.Config(str(model), str(out), **options)
    )


def test_a_stage_becomes_a_hugging_face_folder(made, tmp_path):
    folder = convert(made.run / "adapters", tmp_path / "hf")
    same(model_folders.load(folder)[1], made.merged)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    tokenizer = model_folders.tokenizer_folder(str(folder))
    assert tokenizer == str(folder)
    card = (folder / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "Method: dpo",
        "base_model",
        "pairs.json",
    ):
        assert part in card
    assert "| validation/loss | " in card


def test_adapters_are_written_by_themselves(made, tmp_path):
    folder = convert(made.run / "adapters", tmp_path / "a", adapters=True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        model_folders.load(folder)[1],
        made.merged,
    )
    with pytest.raises(
        CheckpointFormatError, match="is no stage of a run with adapters"
    ):
        convert(made.run / "full", tmp_path / "b", adapters=True)


def test_adapters_on_a_stage_have_no_base_that_peft_could_open(made, tmp_path):
    with pytest.raises(CheckpointFormatError, match="adapters, which is no Hugging Fa"):
        convert(made.run / "again", tmp_path / "a", adapters=True)
    with pytest.raises(FileExistsError, match="is not empty; save into a new folder"):
        convert(made.run / "again", made.base)


def test_types_and_parts_are_as_asked(made, tmp_path):
    options = {"dtype": "bfloat16", "max_shard_gb": 5e-6}
    folder = convert(made.run / "full", tmp_path / "hf", **options)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    _, params = pretrained.load(folder)
    expected = jax.tree.map(
        lambda x: x.astype("bfloat16").astype("float32"), made.plain
    )
    same(params, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be float32, bfloat16 or float16; got 'int8'"),
        ({"max_shard_gb": 0.0}, "`max_shard_gb` must be positive; got 0.0"),
    ],
)
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint.Config("a", "b", **options)


def test_a_scale_of_the_embedding_goes_into_it_where_no_family_has_one(tmp_path):
    config = dataclasses.replace(CONFIG, embedding_scale=3.0)
    params = jax.device_get(tiny_stage.make_params())
    pretrained.save(tmp_path / "hf", config, params)
    again, read_back = pretrained.load(tmp_path / "hf")
    assert (again.embedding_scale, again.tied) == (1.0, False)
    np.testing.assert_allclose(read_back["embedding"], 3 * params["embedding"], 1e-6)
    np.testing.assert_array_equal(read_back["unembedding"], params["embedding"])
