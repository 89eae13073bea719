"""Attention over rows: both implementations against the oracle, blocks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import oracles
from pref_jax.models import attention, decoder

HEADS, HEAD_DIM = 4, 6


@pytest.fixture(scope="module")
def batch():
    """Rows of up to 40 with several groups of ragged branches, and padding."""
    groups = fixtures.random_groups(1, 7, 2)
    batch = fixtures.pack_all(groups, 40)
    assert batch.valid.all(-1).reshape(len(batch.tokens), -1).sum(1).max() > 1
    return batch


def draw(num_rows, length, kv_heads, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    heads = (HEADS, kv_heads, kv_heads)
    return [
        jnp.asarray(rng.standard_normal((num_rows, length, h, HEAD_DIM)), dtype)
        for h in heads
    ]


def paths(batch):
    """For every response: its row, and the indices of prompt and branch in that row."""
    per_row = len(batch.valid) // len(batch.tokens)
    for b, k in zip(*np.nonzero(batch.valid), strict=True):
        first = int(batch.start[b, 0])
        begin = first - int(batch.position[b // per_row, first])
        start, length = int(batch.start[b, k]), int(batch.length[b, k])
        branch = np.arange(start, start + length + 1)
        yield b // per_row, np.concatenate([np.arange(begin, first), branch])


def oracle_attention(batch, query, key, value, window):
    """Every response read alone; what no response reads stays NaN."""
    out = np.full(query.shape, np.nan)
    for g, path in paths(batch):
        q, k, v = (np.asarray(x[g, path], np.float64) for x in (query, key, value))
        out[g, path] = oracles.attention(q, k, v, window=window)
    return out


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (2, 4), (4, 1)])
def test_both_implementations_equal_the_oracle(batch, kv_heads, window):
    arrays = draw(*batch.tokens.shape, kv_heads)
    expected = oracle_attention(batch, *arrays, window)
    read = ~np.isnan(expected)
    assert 0.5 < read.mean() < 1  # the rest is padding
    blockwise = functools.partial(attention.blockwise_attention, block=7)
    for implementation in (attention.xla_attention, blockwise):
        attend = jax.jit(functools.partial(implementation, window=window))
        got = np.asarray(attend(*arrays, batch.position, batch.end))
        np.testing.assert_allclose(got[read], expected[read], rtol=1e-5, atol=2e-6)
        assert np.isfinite(got).all()


@pytest.mark.parametrize(("block", "window"), [(4, None), (7, 3), (16, None), (64, 4)])
def test_blockwise_equals_xla_in_value_and_gradient(batch, block, window):
    """4 divides the rows; 7 and 16 do not; 64 is longer than they are."""
    arrays = draw(*batch.tokens.shape, 2)
    cotangent = draw(*batch.tokens.shape, 2, seed=1)[0]

    def value(implementation, query, key, value):
        out = implementation(query, key, value, batch.position, batch.end)
        return (out * cotangent).sum(), out

    implementations = (
        functools.partial(attention.xla_attention, window=window),
        functools.partial(attention.blockwise_attention, window=window, block=block),
    )
    xla, blockwise = (
        jax.jit(
            jax.value_and_grad(
                functools.partial(value, x), argnums=(0, 1, 2), has_aux=True
            )
        )(*arrays)
        for x in implementations
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        blockwise,
        xla,
    )


@pytest.mark.parametrize("name", sorted(attention.IMPLEMENTATIONS))
def test_a_stated_scale_replaces_the_default(batch, name):
    query, key, value = draw(*batch.tokens.shape, 2)
    attend = jax.jit(attention.IMPLEMENTATIONS[name], static_argnames="scale")
    rows = (batch.position, batch.end)
    got = attend(query, key, value, *rows, scale=0.25)
    expected = attend(query * (0.25 * HEAD_DIM**0.5), key, value, *rows)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(attention.IMPLEMENTATIONS))
def test_bfloat16_stays_near_float32(batch, name):
    """bfloat16 keeps 8 bits; the softmax in float32 adds nothing to their rounding."""
    low = draw(*batch.tokens.shape, 2, dtype=jnp.bfloat16)
    attend = jax.jit(attention.IMPLEMENTATIONS[name])
    got = attend(*low, batch.position, batch.end)
    high = [x.astype(jnp.float32) for x in low]
    expected = attend(*high, batch.position, batch.end)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), expected, atol=2e-2)


def test_a_decoding_step_caps_all_logits_as_a_whole_row_does():
    """Three tokens of a prompt and two of its own; the last one is asked."""
    query, key, value = draw(1, 5, 2)
    position, end = jnp.arange(5)[None], jnp.full((1, 5), 5)
    options = {"scale": 3.0, "softcap": 0.7}
    expected = attention.xla_attention(query, key, value, position, end, **options)
    plain = attention.xla_attention(query, key, value, position, end, scale=3.0)
    heads_first = (key.swapaxes(1, 2), value.swapaxes(1, 2))
    prompt = [x[:, :, :3] for x in heads_first]
    own = [x[:, None, :, 3:] for x in heads_first]
    lengths = {"prompt_length": jnp.array([3]), "step": 1}
    step = attention.branch_attention(query[:, 4:], *prompt, *own, **lengths, **options)
    np.testing.assert_allclose(step[0, 0], expected[0, 4], rtol=1e-5, atol=1e-6)
    assert np.abs(plain[0, 4] - expected[0, 4]).max() > 0.01


def test_logits_of_bfloat16_states_are_float32():
    """Logits of 256 and 257, and bfloat16 has no 257: the keys would weigh the same."""
    query = jnp.full((1, 2, 1, 2), jnp.array([16.0, 1.0]), jnp.bfloat16)
    key = jnp.array([[16.0, 0.0], [16.0, 1.0]], jnp.bfloat16)[None, :, None]
    value = jnp.array([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16)[None, :, None]
    rows = (jnp.arange(2)[None], jnp.full((1, 2), 2))
    found = [
        attend(query, key, value, *rows, scale=1.0)[0, 1]
        for attend in attention.IMPLEMENTATIONS.values()
    ]
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    prompt = key[:, :, :1], value[:, :, :1]
    own = key[:, None, :, 1:], value[:, None, :, 1:]
    lengths = {"prompt_length": jnp.ones(1, int), "step": 0}
    step = attention.branch_attention(query[:, 1:], *prompt, *own, **lengths, scale=1.0)
    for out in (*found, step[0, 0]):
        np.testing.assert_allclose(np.float32(out), 1 / (1 + np.exp(-1)), atol=2**-8)


def test_huge_logits_do_not_overflow(batch):
    query, key, value = draw(*batch.tokens.shape, 2)

    def total(query, key, value, implementation):
        return implementation(query, key, value, batch.position, batch.end).sum()

    for implementation in (
        attention.xla_attention,
        functools.partial(attention.blockwise_attention, block=16),
    ):
        grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=3)(
            query * 1e4, key, value, implementation
        )
        assert all(np.isfinite(grad).all() for grad in grads)


# --- blocks that nobody sees ----------------------------------------------------------


def two_groups(length=32):
    """Two groups of one branch each in every one of two rows."""
    half = length // 2
    position = np.tile(np.arange(half, dtype=np.int32), (2, 2))
    end = np.repeat(np.array([half, length], np.int32), half)
    return position, np.broadcast_to(end, (2, length))


def poisoned_output(implementation, position, end, poisoned, **kwargs):
    """The output when the keys and values at `poisoned` are NaN."""
    query, key, value = draw(*end.shape, 2)
    key, value = (x.at[:, poisoned].set(jnp.nan) for x in (key, value))
    attend = jax.jit(functools.partial(implementation, **kwargs))
    return np.asarray(attend(query, key, value, position, end))


def test_blocks_of_another_group_are_skipped():
    """A masked block would still spread its NaN (0 * NaN); a skipped one cannot."""
    position, end = two_groups()
    poison = functools.partial(
        poisoned_output, position=position, end=end, poisoned=slice(0, 16)
    )
    later = poison(attention.blockwise_attention, block=8)[:, 16:]
    assert np.isfinite(later).all()
    assert np.isnan(poison(attention.xla_attention)[:, 16:]).all()  # the control


def test_blocks_of_another_branch_are_skipped():
    """A prompt of 8, then branches of 8 and 16."""
    position = np.r_[:16, 8:24][None].astype(np.int32)
    end = np.repeat([32, 16, 32], [8, 8, 16])[None].astype(np.int32)
    out = poisoned_output(
        attention.blockwise_attention, position, end, slice(8, 16), block=8
    )
    assert np.isfinite(out[:, 16:]).all()
    assert np.isnan(out[:, 8:16]).all()


def test_blocks_outside_the_window_are_skipped_by_position():
    """Index 8 to 15 is far in the row, yet near to a branch that restarts there."""
    position = np.r_[:16, 8:24][None].astype(np.int32)
    end = np.repeat([32, 16, 32], [8, 8, 16])[None].astype(np.int32)
    out = poisoned_output(
        attention.blockwise_attention, position, end, slice(0, 8), block=8, window=8
    )
    assert np.isnan(out[:, 16:17]).all()  # position 8 sees position 1
    assert np.isfinite(out[:, 24:]).all()  # position 16 does not see position 7


def test_a_block_that_one_row_needs_is_not_skipped():
    position, end = two_groups()
    one_group = np.stack([np.arange(32), position[1]]).astype(np.int32)
    ends = np.stack([np.full(32, 32), end[1]]).astype(np.int32)
    arrays = draw(2, 32, 2)
    for window in (None, 20):
        dense, blocks = (
            jax.jit(functools.partial(attend, window=window))(*arrays, one_group, ends)
            for attend in (
                attention.xla_attention,
                functools.partial(attention.blockwise_attention, block=8),
            )
        )
        np.testing.assert_allclose(blocks, dense, rtol=1e-5, atol=1e-5)


def test_a_block_that_is_near_in_one_row_is_not_skipped():
    """Block 0 is out of the window of block 3 in one row and in it in the other."""
    position = np.stack([np.arange(32), np.r_[:16, 8:24]]).astype(np.int32)
    end = np.stack([[32] * 32, [32] * 8 + [16] * 8 + [32] * 16]).astype(np.int32)
    arrays = draw(2, 32, 2)
    dense, blocks = (
        jax.jit(functools.partial(attend, window=10))(*arrays, position, end)
        for attend in (
            attention.xla_attention,
            functools.partial(attention.blockwise_attention, block=8),
        )
    )
    np.testing.assert_allclose(blocks, dense, rtol=1e-5, atol=1e-5)


# --- memory ---------------------------------------------------------------------------


def attention_bytes(implementation, length: int, *, backward: bool) -> int:
    """Peak of attention over a row, beside its arguments."""

    def value(query, key, value, position, end):
        return implementation(query, key, value, position, end).sum()

    function = jax.grad(value, argnums=(0, 1, 2)) if backward else value
    states = [
        jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1)
    ]
    integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(function).lower(*states, integers, integers).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_blockwise_memory_is_linear_in_the_row_length(backward):
    blockwise = functools.partial(attention.blockwise_attention, block=256)
    short, middle, long = (
        attention_bytes(blockwise, length, backward=backward)
        for length in (2048, 4096, 8192)
    )
    # At most: the same bytes may hold what is used at different times.
    assert long - middle < 2.2 * (middle - short)
    assert long < 4.4 * short
    # The control: a quadratic grows by four times, and lies far above.
    control = [
        attention_bytes(attention.xla_attention, length, backward=backward)
        for length in (2048, 4096, 8192)
    ]
    growth = (control[2] - control[1]) / (control[1] - control[0])
    assert growth == pytest.approx(4.0, rel=0.05)
    assert control[2] > 20 * long


def test_the_gradient_of_a_decoder_keeps_no_masks_of_all_blocks():
    """Masks depend on no parameter: left alone, they are kept, once for all layers."""
    config = decoder.DecoderConfig(
        vocab_size=8,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
        attention="blockwise",
    )
    model = decoder.make_decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def gradient_bytes(length):
        integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.grad(lambda params, *rows: model.hidden(params, *rows).sum())
        compiled = jax.jit(gradient).lower(params, *[integers] * 3).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (gradient_bytes(length) for length in (1024, 2048, 4096))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.1)


# --- masks, decoding, errors ----------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3], ids="window={}".format)
def test_visible_is_the_rule_of_the_layout(batch, window):
    mask = np.asarray(attention.visible(batch.position, batch.end, window=window))
    for g, i, j in np.ndindex(mask.shape):
        sees = j <= i < batch.end[g, j]
        if window is not None:
            sees &= batch.position[g, i] - batch.position[g, j] < window
        assert mask[g, i, j] == sees


@pytest.mark.parametrize("window", [None, 1, 6], ids="window={}".format)
def test_a_decoding_step_equals_the_oracle(window):
    rng = np.random.default_rng(0)
    prompts, samples, kept, own, step, kv_heads = 3, 2, 6, 5, 3, 2
    lengths = np.array([6, 2, 0], np.int32)
    query = rng.standard_normal((prompts, samples, HEADS, HEAD_DIM))
    shared = rng.standard_normal((2, prompts, kept, kv_heads, HEAD_DIM))
    branch = rng.standard_normal((2, prompts, samples, own, kv_heads, HEAD_DIM))
    attend = jax.jit(attention.branch_attention, static_argnames="window")
    cache = (*shared.swapaxes(2, 3), *branch.swapaxes(3, 4))  # heads first
    got = attend(
        *(jnp.asarray(x, jnp.float32) for x in (query, *cache)),
        prompt_length=lengths,
        step=jnp.asarray(step),
        window=window,
    )
    for b, k in np.ndindex(prompts, samples):
        key, value = (
            np.concatenate([shared[x, b, : lengths[b]], branch[x, b, k, : step + 1]])
            for x in (0, 1)
        )
        queries = np.zeros((len(key), HEADS, HEAD_DIM))
        queries[-1] = query[b, k]
        expected = oracles.attention(queries, key, value, window=window)[-1]
        np.testing.assert_allclose(got[b, k], expected, rtol=1e-5, atol=2e-6)


def test_heads_that_do_not_divide_are_named():
    query, key = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 2, 3, 8))
    integers = jnp.zeros((1, 2), jnp.int32)
    for attend in attention.IMPLEMENTATIONS.values():
        with pytest.raises(ValueError, match="`query` has 4 heads, which 3 key heads"):
            attend(query, key, key, integers, integers)
