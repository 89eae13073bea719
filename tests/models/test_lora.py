"""Adapters: off they are the base, merged they are the same, and PEFT reads them."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fixtures
import tiny_stage
from pref_jax.data.anchor_cache import params_identity
from pref_jax.logps import response_scores
from pref_jax.models import families, lora, pretrained
from pref_jax.models.decoder import DecoderConfig, LayerKind, Rotary
from pref_jax.models.lora import LoraConfig
from pref_jax.models.pretrained import CheckpointFormatError
from pref_jax.train import sharding
from pref_jax.train.checkpoint import Checkpoints, PreemptionGuard
from pref_jax.train.stage import _step_flops_per_token, train_stage

CONFIG = LoraConfig(rank=3, alpha=5.0)
MODEL = lora.adapted(fixtures.decoder(), CONFIG)


def random_adapters(params, config=CONFIG, seed=1):
    """Frozen and trained parameters, of which neither a nor b is 0."""
    frozen, trained = lora.split(params, config, jax.random.key(0))
    rng = np.random.default_rng(seed)
    trained["adapters"] = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32),
        trained["adapters"],
    )
    return frozen, trained


@pytest.fixture(scope="module")
def batch():
    return fixtures.pack_all(fixtures.random_groups(1, 5, 2), 40)


def logps(params, batch):
    return np.asarray(fixtures.scorer()(params, batch).logp)


def test_new_adapters_and_none_are_the_base_bit_for_bit(batch):
    params = fixtures.random_params(0)
    frozen, trained = lora.split(params, CONFIG, jax.random.key(0))
    base = logps(params, batch)
    np.testing.assert_array_equal(logps(frozen, batch), base)
    np.testing.assert_array_equal(logps(MODEL.combine(frozen, trained), batch), base)


def test_merged_adapters_score_as_unmerged_ones(batch):
    frozen, trained = random_adapters(fixtures.random_params(0))
    unmerged = logps(MODEL.combine(frozen, trained), batch)
    merged = lora.merge(frozen, trained, CONFIG)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    np.testing.assert_allclose(logps(merged, batch), unmerged, rtol=1e-5, atol=1e-4)
    assert np.abs(unmerged - logps(frozen, batch)).max() > 1


def test_what_is_added_is_alpha_over_rank_times_a_b(batch):
    frozen, trained = random_adapters(fixtures.random_params(0))
    adapter = trained["adapters"]["last_blocks"]["0"]["attention"]["out"]
    out = np.asarray(frozen["last_blocks"]["0"]["attention"]["out"])
    product = np.einsum("hfr,rd->hfd", adapter["a"], adapter["b"])
    merged = lora.merge(frozen, trained, CONFIG)
    got = merged["last_blocks"]["0"]["attention"]["out"]
    np.testing.assert_allclose(got, out + 5.0 / 3 * product, rtol=1e-5, atol=1e-5)
    norm = merged["blocks"]["0"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(norm, frozen["blocks"]["0"]["mlp_norm"]["scale"])


def test_only_what_is_trained_has_a_gradient_and_all_of_it(batch):
    frozen, trained = random_adapters(fixtures.random_params(0))

    def total(trained):
        params = MODEL.combine(frozen, trained)
        return response_scores(MODEL, params, batch).logp.sum()

    grads = jax.jit(jax.grad(total))(trained)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attention/query", "attention/value"), {"query", "value"}),
        (("mlp/*",), {"gate", "up", "down"}),
        (("*/[qd]*",), {"query", "down"}),
    ],
)
def test_patterns_say_which_matrices_are_adapted(targets, names):
    config = LoraConfig(rank=2, targets=targets)
    _, trained = lora.split(fixtures.random_params(0), config, jax.random.key(0))
    block = trained["adapters"]["blocks"]["1"]
    assert {name for room in block.values() for name in room} == names


def test_the_start_has_unit_outputs_of_a_and_no_two_alike():
    params = fixtures.random_params(0)
    config = LoraConfig(rank=64, targets=("mlp/*", "attention/out"))
    _, trained = lora.split(params, config, jax.random.key(0))
    block = trained["adapters"]["blocks"]["0"]
    for adapter, inputs in ((block["mlp"]["up"], 16), (block["attention"]["out"], 16)):
        assert np.asarray(adapter["a"]).var() * inputs == pytest.approx(1, rel=0.15)
        assert not np.asarray(adapter["b"]).any()
    assert not np.allclose(block["mlp"]["up"]["a"], block["mlp"]["gate"]["a"])


def test_every_adapter_has_a_logical_name_for_each_axis():
    frozen, trained = random_adapters(fixtures.random_params(0))
    axes = MODEL.param_axes(MODEL.combine(frozen, trained))
    stack = axes["adapters"]["blocks"]["0"]["attention"]
    assert stack["query"]["a"] == ("layers", "embed", "rank")
    assert stack["query"]["b"] == ("layers", "rank", "heads", "head_dim")
    last = axes["adapters"]["last_blocks"]["0"]
    assert last["attention"]["out"]["a"] == ("heads", "head_dim", "rank")
    assert last["mlp"]["down"]["b"] == ("rank", "embed")
    assert axes["embedding"] == ("vocab", "embed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1 and `alpha` positive; got 0 and 32"),
        ({"alpha": 0.0}, "`alpha` positive; got 16 and 0.0"),
        ({"whole": ("embedding",)}, "`whole` may name reward_head, .*; got embedding"),
        ({"targets": ("attention/q",)}, "'attention/q', which matches none of atten"),
    ],
)
def test_a_wrong_option_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**change)


def test_what_is_not_there_cannot_be_trained():
    params, key = fixtures.random_params(0), jax.random.key(0)
    with pytest.raises(ValueError, match="`whole` has 'reward_head'; the parameters"):
        lora.split(params, LoraConfig(whole=("reward_head",)), key)
    with pytest.raises(ValueError, match="no matrix of the parameters matches"):
        lora.split({"embedding": params["embedding"]}, LoraConfig(), key)


# --- a stage --------------------------------------------------------------------------

STAGE = dataclasses.replace(
    tiny_stage.CONFIG,
    loop=dataclasses.replace(
        tiny_stage.CONFIG.loop, num_steps=6, validate_every=6, checkpoint_every=3
    ),
)


MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def train(folder, source=tiny_stage.sources.OfflineSource, *, shift=0.0):
    """DPO of adapters with the live base, whose entries are shifted, as anchor."""
    mesh = sharding.make_mesh(**MESH, devices=jax.devices()[:4])
    model = lora.adapted(tiny_stage.MODEL, CONFIG)
    params = jax.tree.map(lambda x: x + shift, tiny_stage.make_params())
    frozen, trained = lora.split(params, CONFIG, jax.random.key(0))
    shardings = sharding.param_shardings(mesh, model.param_axes(frozen), frozen)
    frozen = jax.device_put(frozen, shardings)
    with PreemptionGuard() as guard:
        trained, _ = tiny_stage.train(
            folder,
            mesh=mesh,
            guard=guard,
            model=model,
            config=STAGE,
            params=trained,
            anchor=(),
            frozen=frozen,
            base={"path": "base", "hash": params_identity(frozen), "dtype": "float32"},
            source=source(tiny_stage.make_batches(mesh, STAGE)),
        )
    return frozen, trained


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Folder, base, adapters, and the arrays on the mesh before each step."""
    folder, seen = tmp_path_factory.mktemp("stage"), []

    class Watching(tiny_stage.sources.OfflineSource):
        def __call__(self, state):
            on_mesh = [x for x in jax.live_arrays() if len(x.sharding.device_set) == 4]
            seen.append([x.shape for x in on_mesh])
            return super().__call__(state)

    return folder, *train(folder, Watching), seen


@pytest.mark.slow
def test_dpo_of_adapters_holds_the_base_once(stage):
    """The base is policy and anchor: each of its arrays is there once at any step."""
    *_, seen = stage
    assert len(seen) == STAGE.loop.num_steps
    block = tiny_stage.make_params()["blocks"]["0"]
    assert block["mlp"]["gate"].shape == block["mlp"]["up"].shape
    for shapes in seen:
        assert shapes.count(block["mlp"]["up"].shape) == 2  # gate and up
        assert shapes.count(block["mlp"]["down"].shape) == 1
        assert shapes.count(block["attention"]["query"].shape) == 1


@pytest.mark.slow
def test_the_base_stays_as_it_was_and_the_adapters_move(stage):
    _, frozen, trained, _ = stage
    jax.tree.map(np.testing.assert_array_equal, frozen, tiny_stage.make_params())
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), trained["adapters"])
    b = moved["blocks"]["0"]["attention"]["query"]["b"]
    assert b > 1e-3


@pytest.mark.slow
def test_the_first_loss_is_that_of_a_policy_which_is_its_anchor(stage):
    folder, *_ = stage
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line) for line in lines]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["validation/loss"] != pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_checkpoints_hold_the_adapters_and_name_the_base(stage):
    folder, frozen, trained, _ = stage
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.restore_meta()
        shapes = checkpoints.saved_shapes("params")
        assert checkpoints.saved_shapes("frozen") == {}
    assert meta["base"]["hash"] == params_identity(frozen)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), trained)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == expected


@pytest.mark.slow
def test_another_base_is_refused(stage, tmp_path):
    folder = shutil.copytree(stage[0], tmp_path / "stage")
    with pytest.raises(ValueError, match="stage tiny .* base: saved"):
        train(folder, shift=1.0)


@pytest.mark.slow
def test_adapters_of_another_scale_are_refused_by_a_finished_stage(
    stage, tmp_path, monkeypatch
):
    folder = shutil.copytree(stage[0], tmp_path / "stage")
    before = (folder / "model.json").read_bytes()
    monkeypatch.setitem(globals(), "CONFIG", LoraConfig(rank=3, alpha=6.0))
    with pytest.raises(ValueError, match="lora.alpha: saved 5.0, now 6.0"):
        train(folder)
    assert (folder / "model.json").read_bytes() == before


def test_what_is_frozen_costs_no_gradient():
    """Forward and backward by the states: two passes of three, and one of an anchor."""
    model, params = tiny_stage.MODEL, tiny_stage.make_params()
    passes = [
        _step_flops_per_token(model, anchor, frozen) / model.flops_per_token
        for anchor, frozen in (((), ()), (params, ()), ((), params), (params, params))
    ]
    assert passes == [3, 4, 2, 3]


def test_a_base_without_a_name_is_an_error(tmp_path):
    frozen, trained = lora.split(tiny_stage.make_params(), CONFIG, jax.random.key(0))
    arguments = dict.fromkeys(("source", "validation", "count", "guard", "mesh"))
    with pytest.raises(ValueError, match="`frozen` and `base` .* belong together"):
        train_stage(
            "x",
            folder=tmp_path,
            config=STAGE,
            method=tiny_stage.DPO,
            model=MODEL,
            params=trained,
            anchor=(),
            seed=0,
            frozen=frozen,
            **arguments,
        )


# --- PEFT's files ---------------------------------------------------------------------

SIZES = {
    "vocab_size": 20,
    "width": 16,
    "num_layers": 3,
    "num_heads": 4,
    "head_dim": 4,
    "mlp_width": 24,
    "tied": False,
}
_PLAIN = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True}
DECODERS = {
    "llama": DecoderConfig(num_kv_heads=2, **SIZES),
    "phi3": DecoderConfig(
        num_kv_heads=2, period=(LayerKind(6, Rotary(10.0, 0.5)),), **SIZES
    ),
    "gpt_neox": DecoderConfig(num_kv_heads=4, mlp_bias=True, **_PLAIN, **SIZES),
    "gpt2": DecoderConfig(num_kv_heads=4, mlp_bias=True, **_PLAIN, **SIZES),
}


@functools.cache
def base_params(name):
    shapes = pretrained.param_shapes(DECODERS[name])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("float32"), shapes)


def write(folder, name, config=CONFIG):
    """An adapter of a family's tiny decoder, in PEFT's files."""
    frozen, trained = random_adapters(base_params(name), config)
    lora.save_peft(
        folder, trained, config, DECODERS[name], base="some/base", family=name
    )
    return frozen, trained


def read(folder, name):
    return lora.load_peft(folder, DECODERS[name], base="some/base", family=name)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("targets", [("attention/*", "mlp/*"), ("attention/[kv]*",)])
def test_written_adapters_add_what_they_added(tmp_path, name, targets):
    """Fused matrices on disk have one adapter of the sum of the ranks."""
    config = LoraConfig(rank=3, alpha=5.0, targets=targets)
    frozen, trained = write(tmp_path / "a", name, config)
    read_config, again = read(tmp_path / "a", name)
    assert read_config.scale == pytest.approx(config.scale)
    expected = lora.merge(frozen, trained, config)
    got = lora.merge(frozen, again, read_config)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        got,
        expected,
    )


def test_an_adapter_of_unfused_matrices_is_read_bit_for_bit(tmp_path):
    _, trained = write(tmp_path / "a", "llama")
    config, again = read(tmp_path / "a", "llama")
    assert (config.rank, config.alpha) == (3, 5.0)
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_a_tensor_of_peft_holds_each_rank_and_feature(tmp_path):
    _, trained = write(tmp_path / "a", "llama")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.2.self_attn.q_proj"
    query = trained["adapters"]["blocks"]["0"]["attention"]["query"]
    a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
    np.testing.assert_array_equal(a, np.asarray(query["a"][2]).T)
    np.testing.assert_array_equal(b[1 * 4 + 3], query["b"][2, :, 1, 3])


def test_scales_of_peft_are_kept(tmp_path):
    """A rank and alpha of a module's own, and alpha over the root of the rank."""
    folder = tmp_path / "a"
    frozen, trained = write(folder, "llama")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings |= {"alpha_pattern": {"q_proj": 10.0}}
    path.write_text(json.dumps(settings))
    config, changed = read(folder, "llama")
    plain = trained["adapters"]["blocks"]["0"]["attention"]["query"]["b"]
    got = changed["adapters"]["blocks"]["0"]["attention"]["query"]["b"]
    np.testing.assert_allclose(got * config.scale, plain * 10.0 / 3, rtol=1e-6)
    settings |= {"alpha_pattern": {}, "use_rslora": True}
    path.write_text(json.dumps(settings))
    config, _ = read(folder, "llama")
    assert config.scale == pytest.approx(5.0 / 3**0.5)


def test_a_reward_head_goes_along(tmp_path):
    params = {**base_params("llama"), "reward_head": np.arange(16, dtype=np.float32)}
    del params["unembedding"]
    config = LoraConfig(rank=2, whole=("reward_head",))
    decoder_config = dataclasses.replace(DECODERS["llama"], tied=True)
    frozen, trained = lora.split(params, config, jax.random.key(0))
    assert "reward_head" not in frozen
    options = {"base": "some/base", "family": "llama"}
    lora.save_peft(tmp_path / "a", trained, config, decoder_config, **options)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["score"]
    assert settings["task_type"] == "SEQ_CLS"
    again, read_back = lora.load_peft(tmp_path / "a", decoder_config, **options)
    assert again.whole == ("reward_head",)
    np.testing.assert_array_equal(read_back["reward_head"], params["reward_head"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA is read"),
        ({"use_dora": True}, "has use_dora = True; only False is read"),
        ({"bias": "all"}, "has bias = 'all'; only 'none' is read"),
        ({"layers_to_transform": [0]}, r"has layers_to_transform = \[0\]; only None"),
        ({"use_qalora": True}, "has use_qalora = True; only False is read"),
        ({"alora_invocation_tokens": [3]}, r"has alora_invocation_tokens = \[3\]"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4', which changes the b",
        ),
        ({"r": None}, "needs positive r and lora_alpha; got None and 5.0"),
        ({"lora_alpha": 0}, "needs positive r and lora_alpha; got 3 and 0"),
        ({"r": 4}, r"lora_A.weight has shape \(3, 16\); its base and rank make it"),
    ],
)
def test_an_adapter_that_does_something_else_is_an_error(tmp_path, change, message):
    write(tmp_path / "a", "llama")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointFormatError, match=message):
        read(tmp_path / "a", "llama")


def test_adapter_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "a", "llama")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(CheckpointFormatError, match="safetensors is not a whole file"):
        read(tmp_path / "a", "llama")
    for text, message in (("{", "cannot be read"), ("[]", "needs a JSON object; got")):
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointFormatError, match=f"config.json {message}"):
            read(tmp_path / "a", "llama")


@pytest.mark.parametrize(
    ("missing", "surplus", "message"),
    [
        (
            "layers.1.mlp.up_proj.lora_A",
            None,
            "lacks .*layers.1.mlp.up_proj.lora_A.*so",
        ),
        ("layers.1.mlp.up_proj.lora_B", None, "lacks the tensor .*up_proj.lora_B"),
        (
            None,
            "base_model.model.x.lora_A.weight",
            "has 1 tensors that are no adapters",
        ),
    ],
)
def test_a_tensor_too_few_or_too_many_is_an_error(tmp_path, missing, surplus, message):
    write(tmp_path / "a", "llama")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    if missing:
        del tensors[f"base_model.model.model.{missing}.weight"]
    else:
        tensors[surplus] = np.zeros(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(CheckpointFormatError, match=message):
        read(tmp_path / "a", "llama")


def test_a_folder_without_an_adapter_is_an_error(tmp_path):
    with pytest.raises(CheckpointFormatError, match="no adapter_config.json; give the"):
        read(tmp_path, "llama")
    (tmp_path / "a").write_text("")
    with pytest.raises(FileExistsError, match="is not empty; save into a new folder"):
        write(tmp_path, "llama")
    assert set(families.FAMILIES) >= set(DECODERS)
