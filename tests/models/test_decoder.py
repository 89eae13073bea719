"""The decoder against the oracle, its equivalent forms, its cache, its config."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import oracles
from pref_jax.models import decoder
from pref_jax.models.attention import IMPLEMENTATIONS, xla_attention
from pref_jax.models.decoder import DecoderConfig, LayerKind

CONFIG = fixtures.CONFIG


@pytest.fixture(scope="module")
def batch():
    return fixtures.pack_all(fixtures.random_groups(1, 5, 2), 40)


@functools.cache
def compiled(config: DecoderConfig):
    """(params, batch, cotangent) -> hidden states, and their gradient."""
    model = decoder.make_decoder(config)

    def value(params, batch, cotangent):
        hidden = model.hidden(params, batch.tokens, batch.position, batch.end)
        return (hidden.astype(jnp.float32) * cotangent).sum(), hidden

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def states_and_gradient(config, batch):
    cotangent = np.random.default_rng(2).standard_normal((*batch.tokens.shape, 16))
    cotangent = cotangent.astype(np.float32)
    (_, hidden), grads = compiled(config)(fixtures.random_params(0), batch, cotangent)
    return hidden, grads


def test_hidden_states_of_a_text_equal_the_oracle():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 12))
    index = np.broadcast_to(np.arange(12), tokens.shape)
    params = fixtures.random_params(0)
    logits = fixtures.logits_of_texts()(params, tokens, index, np.full((2, 12), 12))
    weights = fixtures.oracle_weights(params)
    for text, got in zip(tokens, logits, strict=True):
        hidden = oracles.decoder_hidden(weights, text, **fixtures.ORACLE)
        np.testing.assert_allclose(
            got, hidden @ weights["unembedding"], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    "change",
    [{"attention": "blockwise", "remat": "full"}, {"remat": "dots"}],
    ids=str,
)
def test_how_it_computes_does_not_change_what(batch, change):
    plain = states_and_gradient(CONFIG, batch)
    other = states_and_gradient(dataclasses.replace(CONFIG, **change), batch)
    # Gradients of early layers reach 1e2: the bound is relative to the largest entry.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max())
        ),
        other,
        plain,
    )


def test_every_parameter_has_a_gradient(batch):
    """Of the hidden states; the unembedding comes after them."""
    _, grads = states_and_gradient(CONFIG, batch)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True)
        assert np.abs(grad).max() > 0 or name == "unembedding"


def test_scanned_layers_equal_the_same_layers_unrolled(batch):
    """A period as long as the model has one scan step; a longer one has none."""
    layers = dict(width=16, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
    config = DecoderConfig(vocab_size=37, num_layers=4, **layers)
    unrolled = dataclasses.replace(config, period=(LayerKind(),) * 5)
    params = fixtures.random_params(0, config)
    stack = params["blocks"]["0"]
    last_blocks = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(4)}
    arguments = (batch.tokens, batch.position, batch.end)
    shared = {name: params[name] for name in ("embedding", "final_norm")}
    got = jax.jit(decoder.make_decoder(unrolled).hidden)(
        {**shared, "last_blocks": last_blocks}, *arguments
    )
    expected = jax.jit(decoder.make_decoder(config).hidden)(params, *arguments)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_tied_models_read_and_write_with_one_matrix():
    config = dataclasses.replace(CONFIG, tied=True)
    model = decoder.make_decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert "unembedding" not in params
    assert model.unembedding(params) is params["embedding"]
    untied = fixtures.random_params(0)
    assert fixtures.decoder().unembedding(untied) is untied["unembedding"]


def test_layers_start_different_and_add_up_to_the_size_of_the_embedding():
    """Of unit inputs, what reads gives unit outputs, and all that writes, together,
    the variance of the embedding: 2 * layers * inputs * std^2."""
    config = DecoderConfig(
        vocab_size=64,
        width=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=96,
        tied=False,
        embedding_scale=3.0,
    )
    init = jax.jit(decoder.make_decoder(config).init)
    params, other = (init(jax.random.key(seed)) for seed in (0, 1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not np.allclose(params["embedding"], other["embedding"])
    block = params["blocks"]["0"]
    matrices = block["attention"] | block["mlp"]
    for values in matrices.values():
        assert not np.allclose(values[0], values[1])
    spread = {name: np.asarray(values).std() for name, values in matrices.items()}
    for name in ("query", "key", "value", "gate", "up"):
        assert 64 * spread[name] ** 2 == pytest.approx(1.0, rel=0.1)
    assert 64 * np.asarray(params["unembedding"]).var() == pytest.approx(1.0, rel=0.1)
    variance = (3.0 * np.asarray(params["embedding"])).var()
    for name, inputs in (("out", 4 * 16), ("down", 96)):
        total = 2 * 3 * inputs * spread[name] ** 2
        assert total == pytest.approx(variance, rel=0.15)


def test_bfloat16_states_stay_near_float32(batch):
    expected = states_and_gradient(CONFIG, batch)[0]
    model = decoder.make_decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    arguments = (batch.tokens, batch.position, batch.end)
    got = jax.jit(model.hidden)(fixtures.random_params(0), *arguments)
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.float32(got) - expected)
    # 2^-8 a rounding, some twenty roundings one after the other, states near 1.
    assert error.mean() < 0.05 and error.max() > 1e-4


def test_the_norm_of_bfloat16_states_is_computed_in_float32():
    """Rounded once, at the end."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    got = decoder.RMSNorm(CONFIG, CONFIG.width)(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(expected, jnp.bfloat16))


def test_bfloat16_states_are_rotated_by_float32_angles():
    """Bfloat16 has no 257."""
    x, position = jnp.array([[[1.0, 0.0]]], jnp.bfloat16), jnp.array([257])
    got = np.float32(decoder.rotate(x, position, decoder.Rotary(100.0)))[0, 0]
    np.testing.assert_allclose(got, [np.cos(257), np.sin(257)], atol=2**-8)


def test_remat_keeps_less_for_the_backward_pass(batch):
    def kept(remat):
        config = dataclasses.replace(CONFIG, num_layers=4, remat=remat)
        model = decoder.make_decoder(config)

        def pullback(params):
            arguments = (batch.tokens, batch.position, batch.end)
            return jax.vjp(lambda params: model.hidden(params, *arguments), params)[1]

        residuals = jax.eval_shape(pullback, fixtures.random_params(0, config))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")


def test_the_attention_of_the_config_is_the_one_that_runs(batch, monkeypatch):
    called = []

    def watched(*args, **kwargs):
        called.append(1)
        return xla_attention(*args, **kwargs)

    monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", watched)
    model = decoder.make_decoder(dataclasses.replace(CONFIG, attention="blockwise"))
    arguments = (batch.tokens, batch.position, batch.end)
    jax.eval_shape(model.hidden, fixtures.random_params(0), *arguments)
    assert called


def test_flops_are_two_a_weight_that_multiplies():
    def weights(config):
        attention = 2 * config.num_heads + 2 * config.num_kv_heads
        layer = attention * config.head_dim * config.width
        layer += 3 * config.width * config.mlp_width
        return config.num_layers * layer + config.vocab_size * config.width

    for config in (CONFIG, dataclasses.replace(CONFIG, tied=True)):
        got = decoder.make_decoder(config).flops_per_token
        norms = 2 * (2 * config.num_layers + 1) * config.width
        assert got == pytest.approx(2 * weights(config), abs=norms)


# --- cache ----------------------------------------------------------------------------


def test_decoding_with_the_cache_equals_reading_the_whole_text():
    """Ragged prompts, one of a single token; windows; two branches that differ."""
    model, params = fixtures.decoder(), fixtures.random_params(0)
    rng = np.random.default_rng(0)
    lengths, steps = np.array([7, 1, 4]), 6
    prompts = rng.integers(0, CONFIG.vocab_size, (3, 9)).astype(np.int32)  # 9: padded
    branches = rng.integers(0, CONFIG.vocab_size, (3, 2, steps)).astype(np.int32)
    branches[:, :, 0] = prompts[np.arange(3), lengths - 1][:, None]
    cache = model.init_cache(3, 9, 2, steps)
    cache = jax.jit(model.prefill)(params, prompts, lengths - 1, cache)
    decode = jax.jit(model.decode)
    got = np.zeros((3, 2, steps, CONFIG.width))
    for step in range(steps):
        got[:, :, step], cache = decode(
            params, branches[:, :, step], lengths - 1, jnp.asarray(step), cache
        )
    weights = fixtures.oracle_weights(params)
    for b, k in np.ndindex(3, 2):
        text = [*prompts[b, : lengths[b] - 1], *branches[b, k]]
        hidden = oracles.decoder_hidden(weights, text, **fixtures.ORACLE)
        expected = hidden[lengths[b] - 1 :]
        np.testing.assert_allclose(got[b, k], expected, rtol=1e-5, atol=1e-4)


def test_the_cache_holds_the_prompt_once_for_all_samples():
    """Bytes of K=8: the prompt, and eight responses."""
    prompt, samples, response = 512, 8, 64
    cache = jax.eval_shape(
        lambda: fixtures.decoder().init_cache(1, prompt, samples, response)
    )
    got = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    kinds, kv_heads, head_dim, float_bytes = 2, CONFIG.num_kv_heads, CONFIG.head_dim, 4
    of_a_token = kinds * CONFIG.num_layers * kv_heads * head_dim * float_bytes
    assert got < 1.2 * (prompt + samples * response) * of_a_token
    assert got < 0.3 * samples * (prompt + response) * of_a_token  # a prompt a sample


def test_the_cache_has_the_dtype_of_the_states():
    model = decoder.make_decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    cache = jax.eval_shape(lambda: model.init_cache(1, 2, 3, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}


# --- names, config --------------------------------------------------------------------


def test_every_parameter_has_a_logical_name_for_each_axis():
    params = fixtures.random_params(0)
    axes = decoder.param_axes(params)
    by_leaf = jax.tree.map(lambda leaf, names: len(names) == leaf.ndim, params, axes)
    assert all(jax.tree.leaves(by_leaf))
    stacked = axes["blocks"]["1"]
    assert stacked["attention"]["query"] == ("layers", "embed", "heads", "head_dim")
    assert axes["last_blocks"]["0"]["mlp"]["down"] == ("mlp", "embed")
    assert axes["embedding"] == axes["unembedding"] == ("vocab", "embed")


def test_a_parameter_without_logical_axes_is_an_error():
    with pytest.raises(ValueError, match="blocks/0/gate_norm has no logical axes; add"):
        decoder.param_axes({"blocks": {"0": {"gate_norm": jnp.zeros(3)}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "`num_layers` must be at least 1"),
        ({"mlp_width": -1}, "`mlp_width` must be at least 1"),
        ({"num_kv_heads": 3}, "multiple of `num_kv_heads`; got 4 and 3"),
        ({"head_dim": 5}, "turns an even number of a head's entries, 2 or more; got 5"),
        ({"dtype": "float16"}, "`dtype` must be one of float32, bfloat16; got 'float1"),
        ({"attention": "flash"}, "`attention` must be one of auto, xla, blockwise"),
        ({"max_positions": 0}, "`max_positions` must be at least 1"),
        ({"remat": "some"}, "`remat` must be one of none, dots, full; got 'some'"),
    ],
)
def test_a_wrong_size_or_name_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
