"""Attention over packed rows: one interface, several implementations, equal by test.

Every implementation takes `(query, key, value, position, end)` and never a mask:
token i sees token j when `j <= i < end[j]`, and, with a sliding window of W, when also
`position[i] - position[j] < W`. What `end` means is said in `pref_jax.data.rows`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.loops import loop_at_most
from pref_jax.numerics import soft_cap

_MASKED = -1e30  # finite, so that a row that sees nothing gives 0 and not NaN


def visible(position, end, *, window: int | None = None):
    """Which keys each query sees, as a dense mask.

    Args:
      position: i32[G, L].
      end: i32[G, L].
      window: keys at this distance or farther are not seen; None: no limit.

    Returns:
      bool[G, L, L], query index before key index.

    >>> end = jnp.array([[3, 2, 3]])  # a prompt token and two branches of one token
    >>> visible(jnp.array([[0, 1, 1]]), end)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    index = jnp.arange(end.shape[-1])
    return _sees(index, index, position, position, end, window)


def _sees(query_index, key_index, query_position, key_position, end, window):
    query_index, key_index = query_index[:, None], key_index[None, :]
    mask = (key_index <= query_index)[None] & (query_index[None] < end[:, None, :])
    if window is not None:
        distance = query_position[:, :, None] - key_position[:, None, :]
        mask &= distance < window
    return mask


def xla_attention(
    query, key, value, position, end, *, window=None, scale=None, softcap=None
):
    """Dense attention: simple and quick for short rows; memory grows with L squared.

    Args:
      query: [G, L, H, head_dim].
      key: [G, L, H_kv, head_dim]; H is a multiple of H_kv (grouped queries).
      value: as `key`.
      position: i32[G, L].
      end: i32[G, L].
      window: sliding window in units of `position`, or None.
      scale: of the logits; None: 1 / sqrt(head_dim).
      softcap: bound of the scaled logits, softcap * tanh(logits / softcap), or None.

    Returns:
      [G, L, H, head_dim] in the dtype of `query`. The softmax is float32.
    """
    query, groups = _group_heads(query, key.shape[-2], scale)
    logits = jnp.einsum(
        "gqhrd,gkhd->ghrqk", query, key, preferred_element_type=jnp.float32
    )
    logits = soft_cap(logits, softcap)
    mask = visible(position, end, window=window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1)
    out = jnp.einsum("ghrqk,gkhd->gqhrd", weights.astype(value.dtype), value)
    return _ungroup_heads(out, groups)


def _group_heads(query, num_kv_heads, scale):
    """Scaled query as [G, L, H_kv, H / H_kv, head_dim], and H."""
    num_heads, head_dim = query.shape[-2:]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"`query` has {num_heads} heads, which {num_kv_heads} key heads do not "
            f"divide; grouped-query attention needs a multiple."
        )
    scale = head_dim**-0.5 if scale is None else scale
    shape = (num_kv_heads, num_heads // num_kv_heads, head_dim)
    return (query * scale).reshape(*query.shape[:-2], *shape), num_heads


def _ungroup_heads(out, num_heads):
    return out.reshape(*out.shape[:-3], num_heads, out.shape[-1])


def blockwise_attention(
    query,
    key,
    value,
    position,
    end,
    *,
    window=None,
    scale=None,
    softcap=None,
    block=None,
):
    """Attention in blocks: memory grows linearly with L, forward and backward.

    Blocks of keys that no query of a block of queries sees (later in the row, another
    group, another branch, outside the window) are skipped. Arguments and result as
    `xla_attention`; `block` is the number of positions in a block; None: 64 on a CPU,
    whose caches the logits of a block should fit, and 512 elsewhere.

    Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; backward pass from
    the saved log-sum-exp, Dao et al., arXiv:2205.14135, Algorithm 4.
    """
    if block is None:
        attend = functools.partial(
            blockwise_attention, window=window, scale=scale, softcap=softcap
        )
        return jax.lax.platform_dependent(
            *(query, key, value, position, end),
            cpu=functools.partial(attend, block=64),
            default=functools.partial(attend, block=512),
        )
    query, num_heads = _group_heads(query, key.shape[-2], scale)
    length = query.shape[1]
    block = min(block, length)
    padding = -length % block
    # Padded keys have end 0, so nothing sees them; padded queries are cut off below.
    query, key, value, position, end = (
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        for x in (query, key, value, position, end)
    )
    out = _blockwise(query, key, value, position, end, window, softcap, block)
    return _ungroup_heads(out[:, :length], num_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blockwise(query, key, value, position, end, window, softcap, block):
    out, _ = _blockwise_forward(
        query, key, value, position, end, window, softcap, block
    )
    return out


def _block_pairs(position, end, window, block):
    """The (query block, key block) pairs below the diagonal: the needed ones first.

    Returns:
      i32[N, 2], and how many of them are needed.
    """
    num_blocks = end.shape[1] // block
    pairs = np.array([(i, j) for i in range(num_blocks) for j in range(i + 1)])
    first_index = jnp.asarray(pairs[:, :1].T * block)
    by_block = end.reshape(end.shape[0], num_blocks, block)
    needed = (by_block.max(-1)[:, pairs[:, 1]] > first_index).any(0)
    if window is not None:
        blocks = position.reshape(by_block.shape)
        nearest = blocks.min(-1)[:, pairs[:, 0]] - blocks.max(-1)[:, pairs[:, 1]]
        # Positions restart with a group: only what the window rules out in all rows.
        needed &= (nearest < window).any(0)
    return jnp.asarray(pairs)[jnp.argsort(~needed, stable=True)], needed.sum()


def _slice(x, index, block):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)


def _add(x, update, index, block):
    return _put(x, _slice(x, index, block) + update, index, block)


def _put(x, update, index, block):
    return jax.lax.dynamic_update_slice_in_dim(x, update, index * block, axis=1)


def _block_logits(query, key, position, end, pair, window, softcap, block):
    """Of one pair of blocks: f32[G, block, H_kv, R, block], and which are seen."""
    i, j = pair
    offsets = jnp.arange(block)
    mask = _sees(
        i * block + offsets,
        j * block + offsets,
        _slice(position, i, block),
        _slice(position, j, block),
        _slice(end, j, block),
        window,
    )
    logits = jnp.einsum(
        "gqhrd,gkhd->gqhrk",
        _slice(query, i, block),
        _slice(key, j, block),
        preferred_element_type=jnp.float32,
    )
    return soft_cap(logits, softcap), mask[:, :, None, None, :]


def _scan_pairs(step, carry, position, end, window, block):
    pairs, number = _block_pairs(position, end, window, block)
    # Not a scan that skips: to skip a pair costs a copy of all that the loop carries.
    return loop_at_most(
        len(pairs), number, lambda n, carry: step(carry, pairs[n]), carry
    )


def _blockwise_forward(query, key, value, position, end, window, softcap, block):
    # Tied to the queries, or the gradient of a scan over layers would compute the masks
    # of all pairs of blocks before it and keep them.
    query, position, end = jax.lax.optimization_barrier((query, position, end))
    shape = query.shape[:-1]

    def step(carry, pair):
        out, total, highest = carry
        i, j = pair
        logits, mask = _block_logits(
            query, key, position, end, pair, window, softcap, block
        )
        logits = jnp.where(mask, logits, _MASKED)
        old = _slice(highest, i, block)
        new = jnp.maximum(old, logits.max(-1))
        weights = jnp.where(mask, jnp.exp(logits - new[..., None]), 0.0)
        shrink = jnp.exp(old - new)
        update = jnp.einsum(
            "gqhrk,gkhd->gqhrd",
            weights.astype(value.dtype),
            _slice(value, j, block),
            preferred_element_type=jnp.float32,
        )
        out = _put(out, _slice(out, i, block) * shrink[..., None] + update, i, block)
        total = _put(
            total, _slice(total, i, block) * shrink + weights.sum(-1), i, block
        )
        return out, total, _put(highest, new, i, block)

    carry = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32),
    )
    out, total, highest = _scan_pairs(step, carry, position, end, window, block)
    total = jnp.where(total == 0, 1.0, total)
    out = (out / total[..., None]).astype(query.dtype)
    residuals = (query, key, value, position, end, out, highest + jnp.log(total))
    return out, residuals


def _blockwise_backward(window, softcap, block, residuals, grad):
    query, key, value, position, end, out, logsumexp = residuals
    grad = grad.astype(jnp.float32)
    # d(softmax) = weights * (d_weights - sum(weights * d_weights)); the sum is this:
    inner = (grad * out.astype(jnp.float32)).sum(-1)

    def step(carry, pair):
        d_query, d_key, d_value = carry
        i, j = pair
        logits, mask = _block_logits(
            query, key, position, end, pair, window, softcap, block
        )
        masked = jnp.where(mask, logits, _MASKED)
        normalised = jnp.exp(masked - _slice(logsumexp, i, block)[..., None])
        weights = jnp.where(mask, normalised, 0.0)
        grad_i = _slice(grad, i, block)
        value_j = _slice(value, j, block).astype(jnp.float32)
        d_weights = jnp.einsum("gqhrd,gkhd->gqhrk", grad_i, value_j)
        d_logits = weights * (d_weights - _slice(inner, i, block)[..., None])
        if softcap is not None:
            d_logits *= 1 - (logits / softcap) ** 2  # slope of the cap
        key_j = _slice(key, j, block).astype(jnp.float32)
        query_i = _slice(query, i, block).astype(jnp.float32)
        d_query = _add(
            d_query, jnp.einsum("gqhrk,gkhd->gqhrd", d_logits, key_j), i, block
        )
        d_key = _add(
            d_key, jnp.einsum("gqhrk,gqhrd->gkhd", d_logits, query_i), j, block
        )
        d_value = _add(
            d_value, jnp.einsum("gqhrk,gqhrd->gkhd", weights, grad_i), j, block
        )
        return d_query, d_key, d_value

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    grads = _scan_pairs(step, carry, position, end, window, block)
    grads = [g.astype(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)]
    return *grads, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def branch_attention(
    query,
    prompt_key,
    prompt_value,
    key,
    value,
    *,
    prompt_length,
    step,
    window=None,
    scale=None,
    softcap=None,
):
    """One decoding step of K samples of a prompt that is kept once.

    Args:
      query: [B, K, H, head_dim], of the token fed at `step`.
      prompt_key: [B, H_kv, P, head_dim]: the prompt without its last token. Heads come
        before positions, as the products read them: no step turns the cache round.
      prompt_value: as `prompt_key`.
      key: [B, K, H_kv, S, head_dim]: the samples' own tokens, the prompt's last first.
      value: as `key`.
      prompt_length: i32[B]. Tokens of the prompt that are kept in `prompt_key`.
      step: i32[]. Own tokens 0..step are seen.
      window: sliding window, or None.
      scale: of the logits; None: 1 / sqrt(head_dim).
      softcap: bound of the scaled logits, or None.

    Returns:
      [B, K, H, head_dim] in the dtype of `query`.
    """
    query, num_heads = _group_heads(query, key.shape[2], scale)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    shared = soft_cap(einsum("bkhrd,bhpd->bkhrp", query, prompt_key), softcap)
    own = soft_cap(einsum("bkhrd,bkhsd->bkhrs", query, key), softcap)
    prompt_index = jnp.arange(prompt_key.shape[2])
    own_index = jnp.arange(key.shape[3])
    sees_prompt = prompt_index[None] < prompt_length[:, None]
    sees_own = own_index <= step
    if window is not None:
        distance = prompt_length[:, None] + step - prompt_index[None]
        sees_prompt &= distance < window
        sees_own &= step - own_index < window
    shared = jnp.where(sees_prompt[:, None, None, None, :], shared, _MASKED)
    own = jnp.where(sees_own[None, None, None, None], own, _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1), axis=-1)
    weights = weights.astype(value.dtype)
    num_prompt = prompt_key.shape[2]
    out = jnp.einsum("bkhrp,bhpd->bkhrd", weights[..., :num_prompt], prompt_value)
    out += jnp.einsum("bkhrs,bkhsd->bkhrd", weights[..., num_prompt:], value)
    return _ungroup_heads(out, num_heads)


def auto_attention(query, key, value, position, end, **options):
    """Dense in rows of up to 128 positions, blockwise in longer ones."""
    attend = xla_attention if query.shape[1] <= 128 else blockwise_attention
    return attend(query, key, value, position, end, **options)


IMPLEMENTATIONS = {
    "auto": auto_attention,
    "xla": xla_attention,
    "blockwise": blockwise_attention,
}
"""Implementations by the name that a config gives."""
