"""A folder that is written reads back as the same model, for every family.

That torch opens it and computes the same is shown in `parity/test_family_parity.py`.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from family_cases import FAMILY_CASES, LONG
from pref_jax.models import pretrained
from pref_jax.models.decoder import LayerKind, Rotary, make_decoder
from pref_jax.models.pretrained import CheckpointFormatError

GOLDEN = Path(__file__).parents[1] / "golden" / "families"


def weights(name):
    return GOLDEN / name / "weights"


def load(folder, name="", **options):
    return pretrained.load(folder, max_positions=LONG.get(name), **options)


def assert_trees_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def tensors_of(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def llama():
    return load(weights("llama2"))


# --- there and back -------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_a_saved_model_loads_as_it_was(name, tmp_path):
    config, params = load(weights(name), name)
    folder = pretrained.save(tmp_path / "alone", config, params)
    same_config, same = load(folder, name)
    assert same_config == config
    assert_trees_equal(same, params)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_a_model_saved_like_the_one_that_it_was_has_its_tensors_and_config(
    name, tmp_path
):
    config, params = load(weights(name), name)
    # Files small enough that several are needed.
    folder = pretrained.save(
        tmp_path / "saved", config, params, like=weights(name), max_shard_bytes=9000
    )
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    expected, ours = tensors_of(weights(name)), tensors_of(folder)
    assert ours.keys() == expected.keys()
    assert_trees_equal(ours, expected)
    assert settings_of(folder) == settings_of(weights(name))
    same_config, same = load(folder, name)
    assert same_config == config
    assert_trees_equal(same, params)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_a_model_saved_in_bfloat16_is_the_rounded_one(name, tmp_path):
    config, params = load(weights(name), name)
    folder = pretrained.save(tmp_path / "saved", config, params, dtype="bfloat16")
    assert {x.dtype for x in tensors_of(folder).values()} == {jnp.bfloat16.dtype}
    assert settings_of(folder)["dtype"] == "bfloat16"
    _, rounded = load(folder, name)
    assert_trees_equal(
        rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("f4"), params)
    )
    _, kept = load(folder, name, param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.bfloat16.dtype}
    assert_trees_equal(kept, rounded)


def test_files_are_no_larger_than_asked_and_the_index_names_each_tensor(
    llama, tmp_path
):
    folder = pretrained.save(tmp_path / "saved", *llama, max_shard_bytes=9000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        assert sum(x.nbytes for x in tensors.values()) <= 9000
    total = sum(x.nbytes for x in tensors_of(folder).values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("is_like", [False, True], ids=["alone", "like"])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "gpt2", "pythia"])
def test_a_reward_model_loads_as_it_was(name, is_like, tmp_path):
    config, params = load(weights(name))
    config = dataclasses.replace(config, tied=True)  # it has no unembedding
    params.pop("unembedding", None)
    head = np.linspace(-1, 1, config.width, dtype=np.float32)
    params["reward_head"] = head
    like = weights(name) if is_like else None
    folder = pretrained.save(tmp_path / "saved", config, params, like=like)
    (architecture,) = settings_of(folder)["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert not (folder / "generation_config.json").exists()
    same_config, same = load(folder)
    assert same_config == config
    assert_trees_equal(same, params)
    assert_trees_equal(tensors_of(folder)["score.weight"], head[None])


@pytest.mark.parametrize("like", [None, weights("llama3")], ids=["alone", "like"])
def test_an_unembedding_beside_a_reward_head_is_kept(llama, tmp_path, like):
    config, params = llama
    params = params | {"reward_head": np.ones(config.width, np.float32)}
    folder = pretrained.save(tmp_path / "saved", config, params, like=like)
    same_config, same = load(folder)
    assert same_config == config
    assert_trees_equal(same, params)


def test_ids_and_companions_are_those_of_the_model_it_is_like(llama, tmp_path):
    like = tmp_path / "like"
    shutil.copytree(weights("llama2"), like)
    settings = settings_of(like) | {"bos_token_id": 3, "eos_token_id": [4, 5]}
    (like / "config.json").write_text(json.dumps(settings))
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (like / file).write_text('{"temperature": 0.3}')
    folder = pretrained.save(tmp_path / "saved", *llama, like=like, card="# A card")
    assert settings_of(folder) == settings
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / file).read_text() == '{"temperature": 0.3}'
    assert (folder / "README.md").read_text() == "# A card"


# --- what cannot be saved -------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; save into a new folder"):
        pretrained.save(tmp_path, *llama)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_nothing(llama, tmp_path, monkeypatch):
    config, params = llama
    monkeypatch.setattr(pretrained, "_write_companions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrained.save(tmp_path / "saved", config, params)
    assert list(tmp_path.iterdir()) == []


def test_missing_unknown_and_misshapen_parameters_are_named(llama, tmp_path):
    config, params = llama
    cases = [
        ({"final_norm": {}}, "the parameters lack final_norm/scale, against their"),
        ({"adapters": {"x": np.ones(1)}}, "the parameters have adapters/x, .* merge"),
        (
            {"embedding": params["embedding"][1:]},
            r"parameter embedding has shape \(28, 16\); its config makes it \(29, 16\)",
        ),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            pretrained.save(tmp_path / "saved", config, params | change)
        assert not (tmp_path / "saved").exists()


WINDOWS = (LayerKind(window=4), LayerKind(window=6), LayerKind())
CONFIG_ERRORS = {
    "windows of two sizes": ({"period": WINDOWS}, {}, "no family .* llama: period"),
    "layers without rotation": (
        {"period": (LayerKind(rotary=None), LayerKind())},
        {},
        "no family of checkpoints says all of this config",
    ),
    "a post-norm of queries": (
        {"norm_placement": "both", "qk_norm": "all"},
        {},
        "no family .* olmo2: norm_placement both -> post",
    ),
    "a window in a Llama": (
        {"period": (LayerKind(6, Rotary(70.0)),)},
        {"family": "llama"},
        "what each would change: llama: period",
    ),
    "caps in a Llama": (
        {"logit_softcap": 3.0},
        {"like": weights("llama2")},
        "what each would change: llama: logit_softcap 3.0 -> None$",
    ),
    "an unknown family": ({}, {"family": "opt"}, "`family` must be .* got 'opt'"),
}


@pytest.mark.parametrize(
    ("change", "options", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS
)
def test_a_config_that_the_family_cannot_say_is_an_error(
    llama, tmp_path, change, options, message
):
    config, params = llama
    config = dataclasses.replace(config, **change)
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.save(tmp_path / "saved", config, params, **options)
    assert not (tmp_path / "saved").exists()


# --- what folders of other makers look like -------------------------------------------


class Checkpoint:
    """A checkpoint folder that a test may change."""

    def __init__(self, folder, name):
        shutil.copytree(weights(name), folder)
        self.folder = folder
        self.settings = settings_of(folder)
        self.tensors = tensors_of(folder)

    def save(self, **settings):
        text = json.dumps(self.settings | settings)
        (self.folder / "config.json").write_text(text)
        save_file(self.tensors, self.folder / "model.safetensors")
        return self.folder

    def rename(self, change):
        self.tensors = {change(name): x for name, x in self.tensors.items()}


@pytest.fixture
def checkpoint(tmp_path):
    return lambda name: Checkpoint(tmp_path / "checkpoint", name)


BIDIRECTIONAL = {"use_bidirectional_attention": True}
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
READ_ERRORS = [
    ("gemma3", BIDIRECTIONAL, "has use_bidirectional_attention = "),
    (
        "gemma2",
        QUANTISED,
        "has quantization_config = .* computes None only",
    ),
    ("gpt2", QUANTISED, "has quantization_config = "),
    ("pythia", QUANTISED, "has quantization_config = "),
    ("gpt2", {"add_cross_attention": True}, "has add_cross_attention = True"),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "has scale_attn_by_inverse_layer_idx = True",
    ),
    ("pythia", {"hidden_act": "relu"}, "has the activation 'relu'"),
    (
        "mistral",
        {"rope_parameters": {"rope_theta": 70.0, "rope_type": "yarn", "factor": 2.0}},
        "has rope_type = 'yarn'",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "has layers of type chunked_attention",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), READ_ERRORS)
def test_a_config_that_the_decoder_does_not_compute_is_an_error(
    checkpoint, name, change, message
):
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(checkpoint(name).save(**change))


def test_a_classifier_of_two_labels_is_an_error(checkpoint):
    classifier = checkpoint("llama3")
    classifier.tensors["score.weight"] = np.ones((2, 16), np.float32)
    message = r"score.weight has shape \(2, 16\); config.json makes it \(1, 16\)"
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(classifier.save())


def test_gpt2_loads_without_the_prefix_of_its_tensors_and_with_its_masks(checkpoint):
    expected_config, expected = load(weights("gpt2"))
    bare = checkpoint("gpt2")
    bare.rename(lambda name: name.removeprefix("transformer."))
    for layer in range(3):
        bare.tensors[f"h.{layer}.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
        bare.tensors[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4)[None]
    config, params = load(bare.save())
    assert config == expected_config
    assert_trees_equal(params, expected)


def test_the_masks_that_pythia_stores_are_passed_over(checkpoint):
    expected_config, expected = load(weights("pythia"))
    pythia = checkpoint("pythia")
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention."
        # Booleans, which are no parameters.
        pythia.tensors[f"{prefix}bias"] = np.ones((1, 1, 64, 64), bool)
        pythia.tensors[f"{prefix}masked_bias"] = np.float32(-1e9)[None]
        pythia.tensors[f"{prefix}rotary_emb.inv_freq"] = np.ones(2, np.float32)
    config, params = load(pythia.save())
    assert config == expected_config
    assert_trees_equal(params, expected)


def new_prefix(name):
    """As written since the version 4.52 of transformers."""
    return "model.language_model." + name.removeprefix("model.")


@pytest.mark.parametrize(
    ("prefix", "vision"),
    [
        ("language_model.{}".format, "vision_tower.vision_model.x.weight"),
        (new_prefix, "model.vision_tower.vision_model.x.weight"),
    ],
    ids=["old", "new"],
)
def test_the_text_part_of_a_multimodal_model_is_read(
    checkpoint, tmp_path, prefix, vision
):
    expected_config, expected = load(weights("gemma3"))
    multimodal = checkpoint("gemma3")
    multimodal.rename(prefix)
    multimodal.tensors[vision] = np.ones((2, 2), np.float32)
    projector = vision.split("vision_tower")[0] + "multi_modal_projector.weight"
    multimodal.tensors[projector] = np.ones((2, 2), np.float32)
    text = multimodal.settings
    multimodal.settings = {"model_type": "gemma3", "text_config": text}
    config, params = load(multimodal.save())
    assert config == expected_config
    assert_trees_equal(params, expected)
    folder = tmp_path / "saved"
    pretrained.save(folder, config, params, like=multimodal.folder)
    assert settings_of(folder)["model_type"] == "gemma3_text"
    assert_trees_equal(tensors_of(folder), tensors_of(weights("gemma3")))


def test_a_tensor_of_no_known_part_of_a_multimodal_model_is_an_error(checkpoint):
    multimodal = checkpoint("gemma3")
    multimodal.rename(new_prefix)
    multimodal.tensors["model.audio_tower.weight"] = np.ones((2, 2), np.float32)
    text = multimodal.settings
    multimodal.settings = {"model_type": "gemma3", "text_config": text}
    message = "has 1 tensors .* does not speak of, first model.audio_tower.weight"
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(multimodal.save())


def test_a_shorter_length_keeps_the_short_factors_of_a_stretched_model():
    short = pretrained.load_config(weights("phi4_mini"))
    assert short.max_positions == 16
    assert not short.period[0].rotary.scaling.is_long
    long = pretrained.load_config(weights("phi4_mini"), max_positions=17)
    assert long.max_positions == 17
    assert long.period[0].rotary.scaling.is_long


@pytest.mark.parametrize("name", ["llama2", "gemma", "olmo2"])
def test_a_window_in_the_config_of_a_family_without_one_means_nothing(name, tmp_path):
    folder = shutil.copytree(weights(name), tmp_path / "copy")
    settings = settings_of(folder) | {"sliding_window": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    assert [kind.window for kind in pretrained.load_config(folder).period] == [None]


def test_learned_positions_may_be_used_in_part_and_never_exceeded():
    folder = weights("gpt2")
    config, params = pretrained.load(folder, max_positions=7)
    assert (config.max_positions, len(params["positions"])) == (7, 64)
    with pytest.raises(CheckpointFormatError, match="can be at most 64, the number of"):
        pretrained.load(folder, max_positions=65)
    with pytest.raises(CheckpointFormatError, match="`max_positions` must be at least"):
        pretrained.load_config(folder, max_positions=0)
    model = make_decoder(config)
    tokens, position = np.zeros((2, 2), np.int32), np.array([[0, 63], [0, 64]])
    hidden = jax.jit(model.hidden)(params, tokens, position, np.array([[1, 2]] * 2))
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1, 1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "16"}, "config.json cannot be read: "),
        (
            {"num_attention_heads": 0},
            "config.json (describes no decoder|cannot be read)",
        ),
        ({"num_key_value_heads": 3}, "describes no decoder: .*multiple of `num_kv_hea"),
    ],
)
def test_sizes_that_make_no_decoder_are_errors_of_the_file(tmp_path, change, message):
    folder = shutil.copytree(weights("llama2"), tmp_path / "copy")
    settings = settings_of(folder) | change
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load_config(folder)
