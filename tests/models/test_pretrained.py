"""What loads is the model that was saved; what cannot be so is an error that says why.

That a loaded model computes what torch computes is shown in `test_golden_llama.py`.
"""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from pref_jax.data.templates import TextEncoder, check_vocabulary, load_tokenizer
from pref_jax.logps import token_stats
from pref_jax.models import pretrained, tensor_files
from pref_jax.models.decoder import LayerKind, Rotary, make_decoder
from pref_jax.models.pretrained import CheckpointFormatError
from pref_jax.sampling import SamplingConfig, make_sampler

GOLDEN = Path(__file__).parents[1] / "golden"

# Greedy from the BOS: ids and text in the data's own README, made in another layout.
GREEDY_IDS = [
    *(1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426),
    *(338, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282, 295, 433, 426),
    *(385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 391, 266),
    *(267, 337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415, 426, 13, 438),
    *(310, 439, 419, 357, 336, 432, 313, 438, 310, 432, 278, 316, 439, 419, 298, 414),
    *(267, 265, 282, 295, 433, 426, 436, 317, 286, 296, 418, 269, 279, 292, 416, 439),
    *(413, 409, 416, 327, 263, 415, 294, 267, 400, 426, 338, 336, 432, 313, 442, 391),
    *(267, 337, 335, 364, 420, 268, 388, 432, 398),
]
GREEDY_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball. She wanted to play with it, but it "
    "was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and "
    "didn't know what to do. She said, \"I want to play with your ball, but"
)


class Checkpoint:
    """A checkpoint folder that a test may damage."""

    def __init__(self, folder, name="llama_untied"):
        shutil.copytree(GOLDEN / name / "weights", folder)
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    def save(self, config=None):
        (self.folder / "config.json").write_text(
            json.dumps(self.config | (config or {}))
        )
        save_file(self.tensors, self.folder / "model.safetensors")
        return self.folder

    def split(self, num_parts):
        """Spread the tensors over files, as the index says."""
        (self.folder / "model.safetensors").unlink()
        parts = [
            f"model-{i + 1:05d}-of-{num_parts:05d}.safetensors"
            for i in range(num_parts)
        ]
        names = list(self.tensors)
        for i, part in enumerate(parts):
            some = {name: self.tensors[name] for name in names[i::num_parts]}
            save_file(some, self.folder / part)
        weight_map = {name: parts[i % num_parts] for i, name in enumerate(names)}
        index = self.folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return parts


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path / "checkpoint")


def assert_trees_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("name", ["llama_untied", "llama_tied"])
def test_params_have_the_shapes_and_types_that_the_decoder_makes(name):
    config, params = pretrained.load(GOLDEN / name / "weights")
    made = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made
    )


def test_a_loaded_array_holds_each_head_and_layer_of_its_tensor(checkpoint):
    _, params = pretrained.load(checkpoint.folder)
    block = params["blocks"]["0"]
    layer, head, feature = 2, 1, 5
    prefix, row = f"model.layers.{layer}.", head * 8 + feature
    key = checkpoint.tensors[prefix + "self_attn.k_proj.weight"]
    assert_trees_equal(block["attention"]["key"][layer, :, head, feature], key[row])
    out = checkpoint.tensors[prefix + "self_attn.o_proj.weight"]
    assert_trees_equal(block["attention"]["out"][layer, head, feature], out[:, row])
    up = checkpoint.tensors[prefix + "mlp.up_proj.weight"]
    assert_trees_equal(block["mlp"]["up"][layer], up.T)


def test_overrides_say_how_to_compute_and_leave_the_weights(checkpoint):
    plain, params = pretrained.load(checkpoint.folder)
    config, same = pretrained.load(
        checkpoint.folder, dtype="bfloat16", attention="blockwise", remat="full"
    )
    assert (config.dtype, config.attention, config.remat) == (
        *("bfloat16", "blockwise", "full"),
    )
    assert config.width == plain.width
    assert_trees_equal(same, params)


def test_config_reads_what_older_files_leave_out_or_name_otherwise(checkpoint):
    del checkpoint.config["rope_parameters"], checkpoint.config["head_dim"]
    old = {"rope_theta": 123.0, "rope_scaling": None, "num_key_value_heads": None}
    config = pretrained.load_config(checkpoint.save(old))
    assert config.period == (LayerKind(rotary=Rotary(123.0)),)
    assert (config.head_dim, config.num_kv_heads) == (8, config.num_heads)


def test_the_longest_text_is_that_of_the_config(checkpoint):
    path = checkpoint.save({"max_position_embeddings": 77})
    assert pretrained.load_config(path).max_positions == 77
    assert make_decoder(pretrained.load_config(path)).max_positions == 77


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_float_types_load_as_float32_with_the_same_values(checkpoint, dtype):
    # Seven bits after the point: exact in each of the types, as are the exponents.
    for name, tensor in checkpoint.tensors.items():
        short = (tensor.view(np.uint32) & 0xFFFF0000).view(np.float32)
        checkpoint.tensors[name] = np.where(np.abs(short) < 1e-3, 0, short)
    checkpoint.save()
    _, expected = pretrained.load(checkpoint.folder)
    for name, tensor in checkpoint.tensors.items():
        checkpoint.tensors[name] = tensor.astype(dtype)
    checkpoint.save()
    _, params = pretrained.load(checkpoint.folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_trees_equal(params, expected)


def test_a_checkpoint_in_parts_is_the_whole_one(checkpoint):
    config, params = pretrained.load(checkpoint.folder)
    checkpoint.split(3)
    assert not (checkpoint.folder / "model.safetensors").exists()
    in_parts_config, in_parts = pretrained.load(checkpoint.folder)
    assert in_parts_config == config
    assert_trees_equal(in_parts, params)


def test_a_written_copy_of_tied_weights_and_rotary_frequencies_are_read(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint", "llama_tied")
    config, params = pretrained.load(checkpoint.folder)
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    checkpoint.tensors["lm_head.weight"] = embedding.copy()
    frequencies = np.ones(3, np.float32)
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
    same_config, same = pretrained.load(checkpoint.save())
    assert same_config == config
    assert_trees_equal(same, params)


def test_each_device_reads_its_part_alone_and_once(checkpoint, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    read, sizes = pretrained._Reader.read, []

    def counted(self, place, index, dtype):
        out = read(self, place, index, dtype)
        sizes.append((place.tensors[0].name, out.size))
        return out

    def shardings(shapes):
        def of(leaf):
            last = "x" if leaf.ndim > 1 and leaf.shape[-1] % 4 == 0 else None
            spec = (None,) * (leaf.ndim - 1) + (last,)
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(of, shapes)

    monkeypatch.setattr(pretrained._Reader, "read", counted)
    _, params = pretrained.load(checkpoint.folder, shardings=shardings)
    monkeypatch.undo()
    name = "model.layers.0.mlp.up_proj.weight"
    up = params["blocks"]["0"]["mlp"]["up"]
    assert [size for n, size in sizes if n == name] == [up.size // 4] * 4
    assert {s.data.size for s in up.addressable_shards} == {up.size // 4}
    assert_trees_equal(jax.device_get(params), pretrained.load(checkpoint.folder)[1])


@pytest.mark.parametrize("shape", [(33, 50), (3, 40, 17), (1, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_copy_in_strips_is_a_copy(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)
    for axes in itertools.permutations(range(len(shape))):
        view = values.transpose(axes)
        for part in (view, view[1:], view[..., ::2]):
            out = np.empty(part.shape, dtype)
            tensor_files.copy_turned(out, part)
            np.testing.assert_array_equal(out, part.astype(dtype))


SCALED = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 300.0}
PARTIAL = {"rope_theta": 300.0, "partial_rotary_factor": 0.5}
CONFIG_ERRORS = [
    ({"model_type": "opt"}, "is of model type 'opt'; these are read: gemma, gemma2"),
    ({"rope_parameters": SCALED}, r"rope_type = 'yarn'; the decoder .* default, linea"),
    ({"rope_parameters": PARTIAL}, "partial_rotary_factor = 0.5, which .* type llama"),
    ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.k_proj.bias"),
    ({"mlp_bias": True}, "lacks the tensor model.layers.0.mlp.down_proj.bias"),
    ({"hidden_act": "relu"}, "has the activation 'relu'; the decoder computes silu, s"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config = \{.*; the decoder"),
    ({"model_type": "no_such"}, r"config.json cannot be read: .*`no_such`"),
    (
        {"tie_word_embeddings": True},
        "lm_head.weight differs from .* false to read both",
    ),
    ({"vocab_size": 62}, r"embed_tokens.weight has shape \(61, 32\); .* \(62, 32\)"),
    ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 32\); .* \(32, 32\)"),
    ({"num_hidden_layers": 4}, r"lacks the tensor model.layers.3.self_attn.k_"),
    ({"num_hidden_layers": 2}, r"has 9 tensors .* first model.layers.2.input_layernor"),
]


@pytest.mark.parametrize(
    ("change", "message"), CONFIG_ERRORS, ids=[next(iter(c)) for c, _ in CONFIG_ERRORS]
)
def test_a_config_that_is_not_ours_or_not_of_the_tensors_is_an_error(
    checkpoint, change, message
):
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(checkpoint.save(change))


def test_older_rope_scaling_is_an_error(checkpoint):
    del checkpoint.config["rope_parameters"]
    old = {"rope_theta": 300.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(CheckpointFormatError, match="rope_type = 'dynamic'"):
        pretrained.load_config(checkpoint.save(old))


def test_a_missing_tensor_is_an_error(checkpoint):
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    message = r"lacks the tensor model.layers.1.mlp.up_proj.weight \(40, 32\)"
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(checkpoint.save())


def test_a_surplus_tensor_is_an_error(checkpoint):
    checkpoint.tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    message = "has 1 tensors .* does not speak of, first model.layers.1.self_attn.q_pro"
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(checkpoint.save())


def test_a_tensor_of_another_shape_is_an_error(checkpoint):
    name = "model.layers.0.self_attn.o_proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name][:, :-1].copy()
    message = r"tensor model.layers.0.self_attn.o_proj.weight has shape \(32, 31\); .* "
    with pytest.raises(CheckpointFormatError, match=message + r"makes it \(32, 32\)"):
        pretrained.load(checkpoint.save())


def test_a_folder_without_a_config_is_an_error(checkpoint):
    (checkpoint.folder / "config.json").unlink()
    with pytest.raises(
        CheckpointFormatError, match="checkpoint has no config.json; give"
    ):
        pretrained.load(checkpoint.folder)


def test_a_folder_of_pickles_alone_is_an_error(checkpoint):
    weights = checkpoint.folder / "model.safetensors"
    weights.rename(checkpoint.folder / "pytorch_model.bin")
    message = "no model.safetensors, only pytorch_model.bin; pickles are not read. Save"
    with pytest.raises(CheckpointFormatError, match=message):
        pretrained.load(checkpoint.folder)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_file_that_was_cut_off_is_an_error(checkpoint, size):
    weights = checkpoint.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointFormatError, match="model.safetensors is not a whole"):
        pretrained.load(checkpoint.folder)


def test_a_missing_part_is_an_error(checkpoint):
    parts = checkpoint.split(3)
    (checkpoint.folder / parts[1]).unlink()
    with pytest.raises(CheckpointFormatError, match=f"has no {parts[1]}"):
        pretrained.load(checkpoint.folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_an_index_that_maps_nothing_is_an_error(checkpoint, text):
    (checkpoint.folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointFormatError, match="index.json does not map tensors"):
        pretrained.load(checkpoint.folder)


def test_an_index_that_leads_out_of_the_folder_is_an_error(checkpoint):
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    path = checkpoint.folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointFormatError, match="names the file '../other.safete"):
        pretrained.load(checkpoint.folder)


def test_a_config_that_is_no_json_is_an_error(checkpoint):
    (checkpoint.folder / "config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match="config.json cannot be read"):
        pretrained.load(checkpoint.folder)


def test_tensors_of_integers_are_an_error(checkpoint):
    name = "model.norm.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].astype(np.int8)
    with pytest.raises(CheckpointFormatError, match=f"{name} is of type I8; only F16"):
        pretrained.load(checkpoint.save())


# --- a real model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data("stories260k")
    config, params = pretrained.load(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return make_decoder(config), params, TextEncoder(tokenizer)


def test_stories260k_tells_its_story(stories):
    model, params, encoder = stories
    config = SamplingConfig(max_new_tokens=len(GREEDY_IDS) - 1, temperature=0.0)
    sampler = make_sampler(model, config, end_ids=())
    keys = jax.random.split(jax.random.key(0), 1)
    samples = sampler(params, jnp.array([[GREEDY_IDS[0]]]), jnp.array([1]), keys)
    assert samples.tokens[0, 0].tolist() == GREEDY_IDS[1:]
    assert encoder.decode(GREEDY_IDS) == GREEDY_TEXT
    assert encoder.encode_prompt(GREEDY_TEXT).tolist() == GREEDY_IDS


def test_stories260k_reads_a_story_as_torch_does(stories):
    model, params, encoder = stories
    recorded = json.loads((GOLDEN / "stories260k.json").read_text())
    ids = encoder.encode_prompt(recorded["text"])
    assert ids.tolist() == recorded["ids"]
    num_targets = len(ids) - 1
    index = jnp.arange(num_targets)[None]
    hidden = jax.jit(model.hidden)(
        params, ids[None, :-1], index, jnp.full_like(index, num_targets)
    )
    logps = token_stats(hidden, model.unembedding(params), ids[None, 1:], index)["logp"]
    # Float32 on both sides, through five layers, on logps of up to ten nats.
    np.testing.assert_allclose(logps[0], recorded["token_logps"], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(-logps.mean(), recorded["mean_nll"], rtol=1e-5)
