"""Hidden states -> token statistics -> one entry per response token.

Scoring is where the memory goes: logits of a whole batch, [G, L, V], are never built.
Only the positions of `predict` are unembedded, a chunk of the vocabulary at a time, and
the backward pass rebuilds each chunk's logits instead of keeping them. Rows end here:
all results are gathered into [B, K, T], and no later code sees a row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax import checks
from pref_jax.axes import constrain, gather, parts, per_device, row_shards
from pref_jax.numerics import at_least_float32, soft_cap
from pref_jax.types import ResponseBatch, Scores

STATISTICS = ("logp", "logsumexp", "chosen_logit", "entropy", "log_sum_sq")
"""What `token_stats` can compute, by name."""

_CHUNK_ELEMENTS = 2**21  # logits of a chunk on a device, 8 MiB in float32, unless
_CHUNK_ENTRIES = 1024  # entries of the vocabulary are more: narrower products are slow
_LANES = 128  # and a chunk is a multiple of this: entries that a TPU has side by side
_LOWEST = np.finfo(np.float32).min  # below every logit, and finite


def token_stats(
    hidden,
    unembedding,
    targets,
    predict,
    *,
    want: tuple[str, ...] = ("logp",),
    chunk: int | None = None,
    softcap: float | None = None,
) -> dict[str, jax.Array]:
    """Statistics of the next-token distribution at the positions that are scored.

        logits = hidden[g, predict[g, p]] @ unembedding.T        (float32)
        logits = softcap * tanh(logits / softcap)                (with a softcap)
        logp   = logits[target] - logsumexp(logits)

    Args:
      hidden: [G, L, D], float32 or bfloat16; the products are made in its dtype and
        accumulated in float32.
      unembedding: [V, D].
      targets: i32[G, L].
      predict: i32[G, P]. Positions to unembed; -1 in padding.
      want: names of `STATISTICS`. Nats throughout.
      chunk: entries of the vocabulary, or of the part that a device has of it, whose
        logits are there at once. None: as many as keep the logits of a chunk, for the
        tokens of a device, near 2 million numbers, but 1024 at least. If one chunk is
        enough nothing is recomputed in the backward pass.
      softcap: bound of the logits, `model.logit_softcap`; None: unbounded.

    Returns:
      {name: f32[G, P]}, 0 where `predict` is -1.

    Raises:
      ValueError: a name in `want` is not known, or shapes disagree.

    >>> hidden = jnp.array([[[0.0, 1.0], [2.0, 0.0]]])
    >>> unembedding = jnp.eye(2)
    >>> stats = token_stats(hidden, unembedding, jnp.array([[1, 1]]),
    ...                     jnp.array([[0, -1]]), want=("logp", "entropy"))
    >>> [round(float(x), 4) for x in stats["logp"][0]]
    [-0.3133, 0.0]
    """
    unknown = [name for name in want if name not in STATISTICS]
    if unknown:
        raise ValueError(
            f"`want` may name {', '.join(STATISTICS)}; got {', '.join(unknown)}."
        )
    if hidden.shape[-1] != unembedding.shape[-1]:
        raise ValueError(
            f"`hidden` and `unembedding` need one width; got "
            f"{checks.describe(hidden)} and {checks.describe(unembedding)}."
        )
    checks.check_same_shape("targets", targets, like=hidden[..., 0], of="hidden")
    hidden, targets = _scored(hidden, predict), _scored(targets, predict)
    parts_of = _vocabulary_parts(unembedding, hidden)
    size = parts_of.shape[2]
    chunk = _default_chunk(hidden.shape[1], size) if chunk is None else chunk
    with jax.named_scope("token_stats"):
        if chunk >= size:
            stats = _statistics(hidden, parts_of, targets, want, softcap)
        else:
            stats = _chunked_statistics(hidden, parts_of, targets, want, softcap, chunk)
    keep = predict >= 0
    return {
        name: jnp.where(keep, stats[name].reshape(predict.shape), 0.0) for name in want
    }


def _scored(x, predict):
    """What stands at the scored positions, [G, L, ...] -> [S, N, ...].

    S counts the devices that hold different rows, N the tokens of each: every device
    adds up its own gradient of the unembedding, and all meet once, after the loop.
    """
    index = jnp.maximum(predict, 0).reshape(*predict.shape, *[1] * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, axis=1)
    shards = row_shards(len(predict))
    return x.reshape(shards, predict.size // shards, *x.shape[2:])


def _vocabulary_parts(unembedding, hidden):
    """[V, D] -> [S, T, V / T, D] in the dtype of `hidden`: T devices split V."""
    unembedding = gather(unembedding.astype(hidden.dtype), ("vocab", "embed"))
    num_entries, width = unembedding.shape
    num_parts = parts("vocab") if num_entries % parts("vocab") == 0 else 1
    shape = (num_parts, num_entries // num_parts, width)
    copies = jnp.broadcast_to(unembedding.reshape(shape)[None], (len(hidden), *shape))
    return constrain(copies, "rows", "vocab", None, None)


def _default_chunk(num_tokens: int, num_entries: int) -> int:
    """Entries of a chunk, by the tokens and the part of the vocabulary of a device."""
    most = max(_CHUNK_ENTRIES, _CHUNK_ELEMENTS // num_tokens)
    if num_entries <= most:
        return num_entries
    alike = -(-num_entries // -(-num_entries // most))
    return -(-alike // _LANES) * _LANES


def _chunk_logits(hidden, parts_of, first, chunk, softcap):
    """Logits f32[S, N, T, C] of the entries from `first`; their numbers; which count.

    The last chunk begins early enough to be whole: what it repeats does not count.
    """
    num_parts, size = parts_of.shape[1:3]
    begin = jnp.minimum(first, size - chunk)
    matrix = jax.lax.dynamic_slice_in_dim(parts_of, begin, chunk, axis=2)
    logits = jnp.einsum(
        "snd,stcd->sntc", hidden, matrix, preferred_element_type=jnp.float32
    )
    own = begin + jnp.arange(chunk)
    entry = jnp.arange(num_parts)[:, None] * size + own[None]
    return (
        soft_cap(logits, softcap),
        entry[None, None],
        (own >= first)[None, None, None],
        (matrix, begin),
    )


def _first_entries(parts_of, chunk):
    return jnp.arange(0, parts_of.shape[2], chunk)


def _no_sums(hidden, parts_of, names):
    """Sums over no entries yet, f32[S, N, T] each, on the devices that add them up."""
    shape = (*hidden.shape[:2], parts_of.shape[1])
    sums = {name: jnp.zeros(shape, jnp.float32) for name in names}
    sums["highest"] = jnp.full(shape, _LOWEST)
    return {name: constrain(x, "rows", None, "vocab") for name, x in sums.items()}


def _add_weights(sums, logits, counts):
    """Sums of exp(logit - highest) over one more chunk.

    Returns:
      the new `highest` and `total`, the weight of each entry f32[S, N, T, C], and what
      older sums of weights shrink by.
    """
    highest = jnp.where(counts, logits, _LOWEST).max(axis=-1)
    highest = jnp.maximum(sums["highest"], highest)
    weights = jnp.where(counts, jnp.exp(logits - highest[..., None]), 0.0)
    shrink = jnp.exp(sums["highest"] - highest)
    total = sums["total"] * shrink + weights.sum(-1)
    return {"highest": highest, "total": total}, weights, shrink


def _join_parts(sums):
    """Over all parts: the highest logit and the log of the total, f32[S, N].

    Apart they are more exact than their sum, the log-sum-exp. And what weights of each
    part are multiplied by to be weights of all, f32[S, N, T].
    """
    highest = sums["highest"].max(-1)
    shrink = jnp.exp(sums["highest"] - highest[..., None])
    return highest, jnp.log((sums["total"] * shrink).sum(-1)), shrink


def _statistics(hidden, parts_of, targets, want, softcap):
    """{name: f32[S, N]} from hidden [S, N, D] and its unembedding [S, T, V / T, D]."""
    size = parts_of.shape[2]
    logits, entry, _, _ = _chunk_logits(hidden, parts_of, 0, size, softcap)
    over = (2, 3)
    logsumexp = jax.nn.logsumexp(logits, axis=over)
    # By comparison, not by index: a vocabulary split over devices is never gathered.
    chosen = jnp.where(entry == targets[..., None, None], logits, 0.0).sum(over)
    stats = {"logp": chosen - logsumexp, "logsumexp": logsumexp, "chosen_logit": chosen}
    if "entropy" in want:
        probability = jnp.exp(logits - logsumexp[..., None, None])
        stats["entropy"] = logsumexp - (probability * logits).sum(over)
    if "log_sum_sq" in want:
        stats["log_sum_sq"] = jax.nn.logsumexp(2 * logits, axis=over) - 2 * logsumexp
    return stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked_statistics(hidden, parts_of, targets, want, softcap, chunk):
    """As `_statistics`, with the logits of one chunk at a time."""
    return _chunked_forward(hidden, parts_of, targets, want, softcap, chunk)[0]


def _chunked_forward(hidden, parts_of, targets, want, softcap, chunk):
    """Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867."""
    names = ["total", "chosen"]
    names += ["below"] if "entropy" in want else []
    names += ["square"] if "log_sum_sq" in want else []

    def body(sums, first):
        logits, entry, counts, _ = _chunk_logits(
            hidden, parts_of, first, chunk, softcap
        )
        new, weights, shrink = _add_weights(sums, logits, counts)
        is_target = counts & (entry == targets[..., None, None])
        new["chosen"] = sums["chosen"] + jnp.where(is_target, logits, 0.0).sum(-1)
        if "below" in sums:
            # Of logits below the highest: sums of logits would lose a small entropy.
            old = sums["below"] + sums["total"] * (new["highest"] - sums["highest"])
            below = weights * (new["highest"][..., None] - logits)
            new["below"] = old * shrink + below.sum(-1)
        if "square" in sums:
            new["square"] = sums["square"] * shrink**2 + (weights**2).sum(-1)
        return new, None

    sums = _no_sums(hidden, parts_of, names)
    sums, _ = jax.lax.scan(body, sums, _first_entries(parts_of, chunk))
    highest, log_total, shrink = _join_parts(sums)
    logsumexp, chosen = highest + log_total, sums["chosen"].sum(-1)
    stats = {"logp": chosen - logsumexp, "logsumexp": logsumexp, "chosen_logit": chosen}
    if "below" in sums:
        below = sums["below"] + sums["total"] * (highest[..., None] - sums["highest"])
        mean_below = (below * shrink).sum(-1) * jnp.exp(-log_total)
        stats["entropy"] = mean_below + log_total
    if "square" in sums:
        square = (sums["square"] * shrink**2).sum(-1)
        stats["log_sum_sq"] = jnp.log(square) - 2 * log_total
    return stats, (hidden, parts_of, targets, stats, highest, log_total)


def _chunked_backward(want, softcap, chunk, residuals, grads):
    """From each chunk's logits, computed again.

    With p the probability of an entry, x its logit and 1 at the target:

        d logp = 1 - p                      d chosen_logit = 1      d logsumexp = p
        d entropy = p (sum_v p x - x)       d log_sum_sq = 2 p^2 / sum_v p^2 - 2 p
    """
    hidden, parts_of, targets, stats, *total = residuals

    def of_token(x):
        return x[..., None, None]

    highest, log_total = map(of_token, total)
    at_target = of_token(grads["logp"] + grads["chosen_logit"])
    per_probability = of_token(grads["logsumexp"] - grads["logp"])
    if "entropy" in stats:
        mean_below = of_token(stats["entropy"]) - log_total
    if "log_sum_sq" in stats:
        per_square = of_token(2 * grads["log_sum_sq"] * jnp.exp(-stats["log_sum_sq"]))
        per_probability -= of_token(2 * grads["log_sum_sq"])

    def body(carry, first):
        d_hidden, d_parts = carry
        logits, entry, counts, (matrix, begin) = _chunk_logits(
            hidden, parts_of, first, chunk, softcap
        )
        log_probability = logits - highest - log_total
        probability = jnp.where(counts, jnp.exp(log_probability), 0.0)
        slope = probability * per_probability
        if "entropy" in stats:
            rise = highest - logits - mean_below
            slope += probability * rise * of_token(grads["entropy"])
        if "log_sum_sq" in stats:
            slope += probability**2 * per_square
        slope += jnp.where(counts & (entry == of_token(targets)), at_target, 0.0)
        if softcap is not None:
            slope *= 1 - (logits / softcap) ** 2  # slope of the cap
        slope = slope.astype(hidden.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_hidden += einsum("sntc,stcd->stnd", slope, matrix)
        # States first: turning a result round is cheaper than turning the slopes.
        d_matrix = einsum("snd,sntc->sdtc", hidden, slope).astype(d_parts.dtype)
        d_matrix = jnp.moveaxis(d_matrix, 1, -1)
        # What the last chunk repeats has a slope of 0.
        d_matrix += jax.lax.dynamic_slice_in_dim(d_parts, begin, chunk, axis=2)
        return (
            d_hidden,
            jax.lax.dynamic_update_slice_in_dim(d_parts, d_matrix, begin, axis=2),
        ), None

    shape = (*parts_of.shape[:2], *hidden.shape[1:])  # [S, T, N, D]
    zeros = (jnp.zeros(shape, jnp.float32), jnp.zeros_like(parts_of))
    zeros = tuple(constrain(x, "rows", "vocab", None, None) for x in zeros)
    carry, _ = jax.lax.scan(body, zeros, _first_entries(parts_of, chunk))
    d_hidden, d_parts = carry
    return d_hidden.sum(1).astype(hidden.dtype), d_parts, None


_chunked_statistics.defvjp(_chunked_forward, _chunked_backward)


def gather_responses(values, batch: ResponseBatch):
    """Bring [G, P] values at the scored positions to [B, K, T].

    Args:
      values: f32[G, P], in the order of `batch.predict`.
      batch: says where each branch lies.

    Returns:
      f32[B, K, T]; 0 where `batch.loss_mask` is False.
    """
    row_length = batch.tokens.shape[1]

    def gather_own(values, predict, start, loss_mask):
        num_rows = len(values)
        # One column more takes what padding writes.
        index = jnp.where(predict < 0, row_length, predict)
        rows = jnp.zeros((num_rows, row_length + 1), values.dtype)
        rows = rows.at[jnp.arange(num_rows)[:, None], index].set(values)
        offset = jnp.arange(loss_mask.shape[-1])[None, None]
        where_from = jnp.minimum(start[..., None] + offset, row_length)
        flat = jnp.take_along_axis(rows, where_from.reshape(num_rows, -1), axis=1)
        return jnp.where(loss_mask, flat.reshape(loss_mask.shape), 0.0)

    of_rows, of_groups = ("rows", None), ("rows", None, None)
    names = (of_rows, of_rows, of_rows, of_groups)
    arguments = (values, batch.predict, batch.start, batch.loss_mask)
    return per_device(gather_own, names, of_groups)(*arguments)


def response_scores(
    model, params, batch: ResponseBatch, *, want=("logp",), chunk: int | None = None
) -> Scores:
    """Score every response of a batch: the default `score` of a `Method`.

    Args:
      model: a `pref_jax.types.Model`.
      params: its parameters.
      batch: the rows.
      want: names of `STATISTICS`.
      chunk: as in `token_stats`.

    Returns:
      `Scores` with the fields of `want`, each f32[B, K, T].
    """
    hidden = model.hidden(params, batch.tokens, batch.position, batch.end)
    stats = token_stats(
        hidden,
        model.unembedding(params),
        batch.targets,
        batch.predict,
        want=want,
        chunk=chunk,
        softcap=model.logit_softcap,
    )
    return Scores(**{k: gather_responses(v, batch) for k, v in stats.items()})


def response_sum(token_values, *, where, weights=None):
    """Sum over the tokens of each response.

    Args:
      token_values: f32[..., T].
      where: bool, broadcastable to `token_values`. False: the token does not count,
        whatever it holds.
      weights: f32, broadcastable to `token_values`, such as
        `length_desensitized_weights`. None: 1. No gradient reaches them.

    Returns:
      f32[...].

    Raises:
      ValueError: `where` or `weights` does not fit.
      TypeError: `where` is not boolean.

    >>> float(response_sum(jnp.array([1.0, 2.0, 4.0]),
    ...                    where=jnp.array([True, True, False])))
    3.0
    """
    checks.check_bool("where", where)
    shape = jnp.shape(token_values)
    checks.check_broadcast("where", where, to=shape, of="token_values")
    values = jnp.where(where, at_least_float32(token_values), 0.0)
    if weights is not None:
        checks.check_broadcast("weights", weights, to=shape, of="token_values")
        weights = jnp.broadcast_to(jax.lax.stop_gradient(weights), shape)
        values = values * jnp.where(where, weights, 0.0)
    return values.sum(-1)


def response_mean(token_values, *, where):
    """Mean over the tokens of each response; 0 for a response without tokens.

    Args:
      token_values: f32[..., T].
      where: bool, broadcastable to `token_values`. False: the token does not count.

    Returns:
      f32[...].

    Raises:
      ValueError: `where` does not fit.
      TypeError: `where` is not boolean.

    >>> float(response_mean(jnp.array([1.0, 2.0, 4.0]),
    ...                     where=jnp.array([True, True, False])))
    1.5
    """
    total = response_sum(token_values, where=where)
    number = jnp.broadcast_to(where, jnp.shape(token_values)).sum(-1)
    return total / jnp.maximum(number, 1)


def step_sum(token_values, *, step_ids, num_steps: int, where=None):
    """Sum over the tokens of each step of a response: of a turn, or of a list item.

    Args:
      token_values: f32[..., T].
      step_ids: i32, broadcastable to `token_values`: 1..S, or 0 for a token of no step.
        An id above S is counted nowhere.
      num_steps: S.
      where: bool, broadcastable to `token_values`. False: the token does not count.

    Returns:
      f32[..., S]; 0 for a step without tokens.

    Raises:
      ValueError: `step_ids` or `where` does not fit.
      TypeError: `step_ids` are not integers or `where` is not boolean.

    >>> step_sum(jnp.array([1.0, 2.0, 4.0]), step_ids=jnp.array([1, 0, 1]),
    ...          num_steps=2).tolist()
    [5.0, 0.0]
    """
    member = _step_members(token_values, step_ids, num_steps, where)
    return _member_sum(token_values, member)


def step_mean(token_values, *, step_ids, num_steps: int, where=None):
    """Mean over the tokens of each step; 0 for a step without tokens.

    Args and errors as `step_sum`.

    Returns:
      f32[..., S].

    >>> step_mean(jnp.array([1.0, 2.0, 4.0]), step_ids=jnp.array([1, 0, 1]),
    ...           num_steps=2).tolist()
    [2.5, 0.0]
    """
    member = _step_members(token_values, step_ids, num_steps, where)
    return _member_sum(token_values, member) / jnp.maximum(member.sum(-1), 1)


def spread_steps(step_values, *, step_ids, where=None):
    """Gives every token the value of its step, such as the advantage of the step.

    Args:
      step_values: f32[..., S].
      step_ids: i32[..., T], of the same leading axes: 1..S, or 0 for a token of no
        step.
      where: bool, broadcastable to `step_ids`. False: the token gets 0.

    Returns:
      f32[..., T]; 0 for a token of no step, and for an id above S.

    Raises:
      ValueError: the leading axes differ, or `where` does not fit.
      TypeError: `step_ids` are not integers or `where` is not boolean.

    >>> spread_steps(jnp.array([0.5, 2.0]), step_ids=jnp.array([1, 1, 0, 2])).tolist()
    [0.5, 0.5, 0.0, 2.0]
    """
    checks.check_integers("step_ids", step_ids)
    step_values, step_ids = at_least_float32(step_values), jnp.asarray(step_ids)
    same = step_values.shape[:-1] == step_ids.shape[:-1]
    if not (same and step_values.ndim and step_ids.ndim):
        raise ValueError(
            f"`step_values` [..., S] and `step_ids` [..., T] need the same leading "
            f"axes; got {checks.describe(step_values)} and {checks.describe(step_ids)}."
        )
    of_a_step = (step_ids >= 1) & (step_ids <= step_values.shape[-1])
    if where is not None:
        checks.check_bool("where", where)
        checks.check_broadcast("where", where, to=step_ids.shape, of="step_ids")
        of_a_step &= where
    # Slot 0 is for tokens of no step: nothing else reaches them, nor its gradient.
    zero = jnp.zeros_like(step_values[..., :1])
    values = jnp.concatenate([zero, step_values], axis=-1)
    return jnp.take_along_axis(values, jnp.where(of_a_step, step_ids, 0), axis=-1)


def episode_sum(values, *, episode_ids, num_episodes: int, where=None):
    """Adds up what stands in separate groups: the steps of an episode.

        out[e] = sum of values[b] over b with episode_ids[b] == e

    Args:
      values: f32[B], of steps.
      episode_ids: i32[B]: 0..E - 1. A step of another id is counted nowhere.
      num_episodes: E.
      where: bool, broadcastable to `values`. False: the step does not count.

    Returns:
      f32[E]; 0 for an episode without steps.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `episode_ids` are not integers or `where` is not boolean.

    >>> values, ids = jnp.array([1.0, 2.0, 4.0]), jnp.array([1, 0, 1])
    >>> episode_sum(values, episode_ids=ids, num_episodes=2).tolist()
    [2.0, 5.0]
    """
    values = at_least_float32(values)
    if values.ndim != 1:
        raise ValueError(f"`values` needs one axis; got {checks.describe(values)}.")
    checks.check_same_shape("episode_ids", episode_ids, like=values, of="values")
    checks.check_integers("episode_ids", episode_ids)
    if where is not None:
        checks.check_bool("where", where)
        checks.check_broadcast("where", where, to=values.shape, of="values")
        values = jnp.where(where, values, 0.0)
    return jax.ops.segment_sum(values, episode_ids, num_episodes)


def episode_mean(values, *, episode_ids, num_episodes: int, where=None):
    """The mean over the steps of each episode; 0 for an episode without steps.

    Args and errors as `episode_sum`.

    Returns:
      f32[E].

    >>> values, ids = jnp.array([1.0, 2.0, 4.0]), jnp.array([1, 0, 1])
    >>> episode_mean(values, episode_ids=ids, num_episodes=2).tolist()
    [2.0, 2.5]
    """
    options = {"episode_ids": episode_ids, "num_episodes": num_episodes, "where": where}
    number = episode_sum(jnp.ones(jnp.shape(values)), **options)
    return episode_sum(values, **options) / jnp.maximum(number, 1)


def _member_sum(token_values, member):
    """[..., T] and bool[..., S, T] -> f32[..., S]."""
    values = jnp.expand_dims(at_least_float32(token_values), -2)
    return jnp.where(member, values, 0.0).sum(-1)


def _step_members(token_values, step_ids, num_steps, where):
    """bool[..., S, T]: token t belongs to step s + 1 and counts."""
    checks.check_integers("step_ids", step_ids)
    shape = jnp.shape(token_values)
    checks.check_broadcast("step_ids", step_ids, to=shape, of="token_values")
    ids = jnp.broadcast_to(step_ids, shape)[..., None, :]
    member = ids == jnp.arange(1, num_steps + 1)[:, None].reshape(
        (1,) * (len(shape) - 1) + (num_steps, 1)
    )
    if where is None:
        return member
    checks.check_bool("where", where)
    checks.check_broadcast("where", where, to=shape, of="token_values")
    return member & jnp.broadcast_to(where, shape)[..., None, :]


def length_desensitized_weights(where, *, alpha: float):
    """How much each token of a pair counts: what is longer than the other counts less.

        n      = the smaller number of tokens of the two
        weight = 1 for the first n tokens of a response, alpha for those beyond

    Source: LD-DPO, arXiv:2409.06411, equations 8 to 11, in logarithms. Tokens are
    counted from the first of the response, wherever the response begins.
    Reduces to: DPO at alpha = 1; both responses cut to n tokens at alpha = 0.
    Checked: against TRL 1.16.0 (`ld_alpha`) in value and gradient.

    Args:
      where: bool[..., 2, T]. True: the token is one of the response's.
      alpha: in [0, 1].

    Returns:
      f32[..., 2, T], 0 where `where` is False. For policy and anchor alike.

    Raises:
      ValueError: the axis before the last is not 2, or `alpha` is out of range.
      TypeError: `where` is not boolean.

    >>> where = jnp.array([[True, True, True], [False, True, False]])
    >>> length_desensitized_weights(where, alpha=0.5).tolist()
    [[1.0, 0.5, 0.5], [0.0, 1.0, 0.0]]
    """
    checks.check_bool("where", where)
    checks.check_range("alpha", alpha, low=0.0, high=1.0, why="1 is DPO, 0 cuts")
    if jnp.ndim(where) < 2 or where.shape[-2] != 2:
        raise ValueError(
            f"`where` needs the shape [..., 2, T] (chosen, rejected); got "
            f"{checks.describe(where)}."
        )
    count = where.cumsum(-1)
    shared = count[..., -1].min(-1)[..., None, None]
    return jnp.where(where, jnp.where(count <= shared, 1.0, alpha), 0.0)


def wpo_weights(token_logps, *, log_sum_sq, where):
    """How likely the policy is to have written a response itself: 1 on average.

        weight = exp(mean over tokens of (token_logps - log_sum_sq))

    A pair's loss is multiplied by the product of its two weights. A token of average
    probability under the policy, sum_v p_v^2, counts 1.

    Source: WPO, arXiv:2406.11827, equation 2 and its sampled alignment.
    Convention: not cut at 1, as in TRL 1.16; earlier versions cut the product.
    Checked: against TRL 1.16.0 (`use_weighting`) in value and gradient.

    Args:
      token_logps: f32[..., T], nats.
      log_sum_sq: f32[..., T]: log of the sum of the squared probabilities, a statistic
        of `token_stats`.
      where: bool, broadcastable to `token_logps`. False: the token does not count.

    Returns:
      f32[...], without gradient; 1 for a response without tokens.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `where` is not boolean.

    >>> weights = wpo_weights(jnp.array([[-1.0, -3.0], [-2.0, -2.0]]),
    ...                       log_sum_sq=jnp.full((2, 2), -2.0),
    ...                       where=jnp.ones((2, 2), bool))
    >>> weights.tolist()
    [1.0, 1.0]
    """
    checks.check_same_shape(
        "log_sum_sq", log_sum_sq, like=token_logps, of="token_logps"
    )
    mean = response_mean(token_logps - log_sum_sq, where=where)
    return jax.lax.stop_gradient(jnp.exp(mean))


def shift_targets(ids, *, mask):
    """Align raw logits with what they predict: for arrays of one's own, in [..., T].

    The logits at position t speak of the token at t + 1:

        targets[t] = ids[t + 1],  where[t] = mask[t + 1]

    and the last position predicts none. Works for padding on either side, since `mask`
    says which tokens are the response's.
    (Rows built by `pref_jax.data` are shifted already.)

    Args:
      ids: i32[..., T], prompt, response and padding.
      mask: bool[..., T]. True: this token is one of the response's.

    Returns:
      targets i32[..., T] and where bool[..., T], for `token_logps`.

    Raises:
      ValueError: the shapes differ.
      TypeError: `mask` is not boolean.

    >>> ids, mask = jnp.array([5, 6, 7]), jnp.array([False, True, True])
    >>> targets, where = shift_targets(ids, mask=mask)
    >>> targets.tolist(), where.tolist()
    ([6, 7, 0], [True, True, False])
    """
    checks.check_bool("mask", mask)
    checks.check_same_shape("mask", mask, like=ids, of="ids")
    padding = [(0, 0)] * (jnp.ndim(ids) - 1) + [(0, 1)]
    return tuple(jnp.pad(x[..., 1:], padding) for x in (ids, mask))


def token_logps(logits, *, targets):
    """Log-probability of each target under raw logits, in float32.

        logps = logits[target] - logsumexp(logits)

    For logits that are in memory anyway, as in a notebook; training never builds them
    (`token_stats`).

    Args:
      logits: [..., T, V].
      targets: i32[..., T], of `shift_targets`.

    Returns:
      f32[..., T], nats.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: `logits` is not floating-point.

    >>> round(float(token_logps(jnp.array([0.0, 1.0]), targets=jnp.array(1))), 4)
    -0.3133
    """
    checks.check_floating("logits", logits)
    checks.check_same_shape("targets", targets, like=logits[..., 0], of="logits")
    logps = jax.nn.log_softmax(at_least_float32(logits))
    return jnp.take_along_axis(logps, targets[..., None], axis=-1).squeeze(-1)


def token_kl(
    model, params, batch: ResponseBatch, *, anchor_params, chunk: int | None = None
):
    """Exact KL divergence of each next-token distribution from the anchor's.

        kl[t] = sum_v p(v) (log p(v) - log q(v)),  p the policy, q the anchor

    over the whole vocabulary, at the positions that predict the batch's responses. For
    evaluation: the forward pass is chunked, a gradient would keep every chunk.

    Args:
      model: a `pref_jax.types.Model`, of policy and anchor alike.
      params: of the policy.
      batch: responses, as a rule sampled from the policy.
      anchor_params: of the anchor.
      chunk: as in `token_stats`.

    Returns:
      f32[B, K, T], nats; 0 outside the mask.
    """

    def states(p):
        hidden = model.hidden(p, batch.tokens, batch.position, batch.end)
        hidden = _scored(hidden, batch.predict)
        return hidden, _vocabulary_parts(model.unembedding(p), hidden)

    of_policy, of_anchor = states(params), states(anchor_params)
    num_tokens, size = of_policy[0].shape[1], of_policy[1].shape[2]
    chunk = min(size, chunk or _default_chunk(num_tokens, size))

    def body(sums, first):
        p, q = sums
        x, _, counts, _ = _chunk_logits(*of_policy, first, chunk, model.logit_softcap)
        y, _, _, _ = _chunk_logits(*of_anchor, first, chunk, model.logit_softcap)
        new_p, weights, shrink = _add_weights(p, x, counts)
        new_p["ratio"] = p["ratio"] * shrink + (weights * (x - y)).sum(-1)
        return (new_p, _add_weights(q, y, counts)[0]), None

    sums = (
        _no_sums(*of_policy, ["total", "ratio"]),
        _no_sums(*of_anchor, ["total"]),
    )
    (p, q), _ = jax.lax.scan(body, sums, _first_entries(of_policy[1], chunk))
    (top_p, log_p, shrink), (top_q, log_q, _) = _join_parts(p), _join_parts(q)
    ratio = (p["ratio"] * shrink).sum(-1) * jnp.exp(-log_p)
    kl = ratio - (top_p - top_q) - (log_p - log_q)
    return gather_responses(kl.reshape(batch.predict.shape), batch)
