"""Anchors: the frozen side that responses are compared with.

An anchor is a record of two functions. `scores` says what the frozen side thinks of the
responses; its result never carries a gradient. `refresh` says what the frozen side is
after an update; it is pure and runs inside the train step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.logps import response_mean, response_scores
from pref_jax.numerics import at_least_float32
from pref_jax.types import CHOSEN, PyTree, ResponseBatch, Scores


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What responses are compared with.

    Attributes:
      scores: (model, anchor_params, batch, policy_scores) -> Scores, without gradient.
      refresh: (params, step, anchor_params) -> anchor_params, where `step` counts the
        updates done, this one included.
    """

    scores: Callable[..., Scores]
    refresh: Callable[[PyTree, jax.Array, PyTree], PyTree]


def _never(params, step, anchor_params):
    """A refresh rule that keeps the anchor."""
    del params, step
    return anchor_params


def none() -> Anchor:
    """No anchor: every log-probability is 0.

    >>> anchor = none()
    >>> scores = Scores(logp=jnp.array([[[-1.0, -2.0]]]))
    >>> anchor.scores(None, (), None, scores).logp.tolist()
    [[[0.0, 0.0]]]
    """

    def scores(model, anchor_params, batch, policy_scores):
        del model, anchor_params, batch
        return jax.tree.map(jnp.zeros_like, policy_scores)

    return Anchor(scores, _never)


def fixed(score: Callable[..., Scores] = response_scores) -> Anchor:
    """A model that never changes, live or as logps stored in the batch.

    When the batch carries `extras["anchor_logps"]` those are used and the frozen model
    need not be in memory: give `()` as anchor parameters. Otherwise the frozen
    parameters score the batch.

    Args:
      score: (model, params, batch) -> Scores, as the method's own `score`.

    Raises:
      ValueError: the batch has no stored logps and there are no anchor parameters.
    """

    def scores(model, anchor_params, batch: ResponseBatch, policy_scores):
        del policy_scores
        if "anchor_logps" in batch.extras:
            logp = jnp.where(batch.loss_mask, batch.extras["anchor_logps"], 0.0)
            return jax.lax.stop_gradient(Scores(logp=logp))
        if not jax.tree.leaves(anchor_params):
            raise ValueError(
                "`anchors.fixed` needs either anchor parameters or stored logps in "
                "`batch.extras['anchor_logps']`; got neither. Pass the initial "
                "parameters as the state's anchor, or store the logps first."
            )
        return jax.lax.stop_gradient(score(model, anchor_params, batch))

    return Anchor(scores, _never)


def snapshot(*, every: int, score: Callable[..., Scores] = response_scores) -> Anchor:
    """The policy as it was at the last multiple of `every` updates.

    With targets that stay the same, refreshing again and again moves the policy to the
    best response alone: n full updates end at pi_0 q^(n / beta) (ADPO's dynamic
    anchor, arXiv:2510.18913).

    Args:
      every: updates between two copies, positive.
      score: (model, params, batch) -> Scores, as the method's own `score`.

    Raises:
      ValueError: `every` is not positive; at the first step: there are no anchor
        parameters, or the batch carries stored logps, which would grow stale.

    >>> anchor = snapshot(every=2)
    >>> [float(anchor.refresh(jnp.float32(step), step, jnp.float32(0)))
    ...  for step in (1, 2)]
    [0.0, 2.0]
    """
    if every < 1:
        raise ValueError(f"`every` must be 1 or more updates; got {every}.")

    def refresh(params, step, anchor_params):
        _check_started("snapshot", anchor_params)
        due = step % every == 0
        return jax.tree.map(
            lambda new, old: jnp.where(due, new, old), params, anchor_params
        )

    return Anchor(_moving("snapshot", score), refresh)


def ema(*, decay: float, score: Callable[..., Scores] = response_scores) -> Anchor:
    """A running average of the policy's parameters.

        anchor <- decay anchor + (1 - decay) params,  after each update

    Source: ADPO, arXiv:2510.18913, its anchor that follows slowly.

    Args:
      decay: in [0, 1). At 0 the anchor is the policy itself.
      score: (model, params, batch) -> Scores, as the method's own `score`.

    Raises:
      ValueError: `decay` is out of range; at the first step: as `snapshot`.

    >>> float(ema(decay=0.75).refresh(jnp.float32(4.0), 1, jnp.float32(0.0)))
    1.0
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must lie in [0, 1); got {decay}.")

    def refresh(params, step, anchor_params):
        del step
        _check_started("ema", anchor_params)
        return jax.tree.map(
            lambda new, old: old + (1 - decay) * (new - old), params, anchor_params
        )

    return Anchor(_moving("ema", score), refresh)


def _moving(name, score):
    """Scores by parameters that change, for which nothing stored can stand in."""

    def scores(model, anchor_params, batch: ResponseBatch, policy_scores):
        del policy_scores
        if "anchor_logps" in batch.extras:
            raise ValueError(
                f"`anchors.{name}` moves, and the batch carries "
                f"`extras['anchor_logps']` of one that does not. Build the source "
                f"without them."
            )
        _check_started(name, anchor_params)
        return jax.lax.stop_gradient(score(model, anchor_params, batch))

    return scores


def _check_started(name, anchor_params):
    if not jax.tree.leaves(anchor_params):
        raise ValueError(
            f"`anchors.{name}` needs anchor parameters to start from; got none. "
            f"Pass the initial parameters as the state's anchor."
        )


def clip_to_initial(source_logps, *, initial_logps):
    """No source may say less for the chosen, or more for the rejected, than the start.

        chosen:    max(source_logps, initial_logps)
        rejected:  min(source_logps, initial_logps)

    The label enters the anchor here: the clipped anchor is a margin that each pair must
    win by, never a negative one.

    Source: InfiFPO, arXiv:2505.13878, equation 11, in logarithms.
    Checked: one value computed from the authors' sample row, by hand.

    Args:
      source_logps: f32[..., 2, M], nats: mean log-probability of a token, each source
        by its own tokenizer. Chosen in slot 0.
      initial_logps: f32[..., 2], the same of the policy before training.

    Returns:
      f32[..., 2, M].

    Raises:
      ValueError: the shapes do not fit.

    >>> clip_to_initial(jnp.array([[-3.0, -1.0], [-3.0, -1.0]]),
    ...                 initial_logps=jnp.array([-2.0, -2.0])).tolist()
    [[-2.0, -1.0], [-3.0, -2.0]]
    """
    if jnp.ndim(source_logps) < 2 or source_logps.shape[-2] != 2:
        raise ValueError(
            f"`source_logps` needs the shape [..., 2, M] (chosen, rejected; sources); "
            f"got {checks.describe(source_logps)}."
        )
    checks.check_same_shape(
        "initial_logps", initial_logps, like=source_logps[..., 0], of="source_logps"
    )
    initial = initial_logps[..., None]
    is_chosen = jnp.arange(2)[:, None] == CHOSEN
    is_chosen = jnp.broadcast_to(is_chosen, source_logps.shape)
    higher = jnp.maximum(source_logps, initial)
    return jnp.where(is_chosen, higher, jnp.minimum(source_logps, initial))


def _read_sources(source_logps, pivot_logps, where):
    """What all fusions check: logps with 0 where no source is, pivot, bool[..., M]."""
    checks.check_floating("source_logps", source_logps)
    checks.check_floating("pivot_logps", pivot_logps)
    source_logps, pivot_logps = jax.lax.stop_gradient((source_logps, pivot_logps))
    source_logps = at_least_float32(source_logps)
    checks.check_same_shape(
        "pivot_logps", pivot_logps, like=source_logps[..., 0], of="source_logps"
    )
    if where is None:
        where = jnp.ones(source_logps.shape, bool)
    checks.check_bool("where", where)
    checks.check_broadcast("where", where, to=source_logps.shape, of="source_logps")
    where = jnp.broadcast_to(where, source_logps.shape)
    return jnp.where(where, source_logps, 0.0), pivot_logps, where


def _weighted_mean_of_sources(source_logps, weights, pivot_logps):
    total = weights.sum(-1)
    mean = (source_logps * weights).sum(-1) / jnp.where(total == 0, 1.0, total)
    return jnp.where(total == 0, pivot_logps, mean)


def fuse_max_margin(source_logps, *, pivot_logps, where=None):
    """The one source whose probability lies farthest from the pivot's.

        fused = source_logps[i],  i = argmax_j |exp(source_logps[j]) - exp(pivot_logps)|

    Chosen for each response by itself; of equal margins the first source is taken.

    Source: InfiFPO, arXiv:2505.13878, equation 12.
    Checked: one value computed from the authors' sample row, by hand.

    Args:
      source_logps: f32[..., M], nats: mean log-probability of a token of the response,
        each source by its own tokenizer; clipped as a rule (`clip_to_initial`).
      pivot_logps: f32[...], the same of the pivot: the policy before training, or as it
        is.
      where: bool, broadcastable to `source_logps`. False: this source did not score
        the response. Without any source the pivot stands in.

    Returns:
      f32[...], without gradient: an anchor for `dpo_loss` on mean log-probabilities.

    Raises:
      ValueError: a shape does not fit.
      TypeError: a log-probability is not floating-point or `where` is not boolean.

    >>> fuse_max_margin(jnp.array([-3.0, -1.0]), pivot_logps=jnp.array(-2.0)).tolist()
    -1.0
    """
    source_logps, pivot_logps, where = _read_sources(source_logps, pivot_logps, where)
    pivot = pivot_logps[..., None]
    # |exp(a) - exp(b)| without cancellation.
    higher, apart = jnp.maximum(source_logps, pivot), jnp.abs(source_logps - pivot)
    margin = jnp.where(where, -jnp.exp(higher) * jnp.expm1(-apart), -1.0)
    best = margin.argmax(-1, keepdims=True)
    fused = jnp.take_along_axis(source_logps, best, axis=-1).squeeze(-1)
    return jnp.where(where.any(-1), fused, pivot_logps)


def fuse_average(source_logps, *, pivot_logps, where=None):
    """The mean of the sources: the geometric mean of their probabilities.

        fused = 1/M sum_i source_logps[i]

    Source: InfiFPO, arXiv:2505.13878, appendix D.
    Checked: one value computed from the authors' sample row, by hand.

    Args, returns and errors as `fuse_max_margin`; the pivot stands in where no source
    is.

    >>> fuse_average(jnp.array([-3.0, -1.0]), pivot_logps=jnp.array(-9.0)).tolist()
    -2.0
    """
    source_logps, pivot_logps, where = _read_sources(source_logps, pivot_logps, where)
    weights = where.astype(source_logps.dtype)
    return _weighted_mean_of_sources(source_logps, weights, pivot_logps)


def fuse_confidence(source_logps, *, pivot_logps, where=None, epsilon: float = 1e-8):
    """The mean of the sources, weighted by how sure each is of the response.

        fused = sum_i g[i] source_logps[i],  g[i] proportional to
                1 / (-source_logps[i] + epsilon)

    Source: InfiFPO, arXiv:2505.13878, appendix D: the printed ratio; the text says
    softmax.
    Checked: one value computed from the authors' sample row, by hand.

    Args:
      source_logps: as in `fuse_max_margin`; above 0 counts as 0 in the weights.
      pivot_logps: as in `fuse_max_margin`; stands in where no source is.
      where: as in `fuse_max_margin`.
      epsilon: nats, positive: keeps the weight of a certain source finite.

    Returns:
      f32[...], without gradient.

    Raises:
      ValueError, TypeError: as `fuse_max_margin`; or `epsilon` is not positive.

    >>> fused = fuse_confidence(jnp.array([-3.0, -1.0]), pivot_logps=jnp.array(-9.0))
    >>> round(float(fused), 4)
    -1.5
    """
    checks.check_positive("epsilon", epsilon)
    source_logps, pivot_logps, where = _read_sources(source_logps, pivot_logps, where)
    confidence = 1 / (epsilon - jnp.minimum(source_logps, 0.0))
    weights = jnp.where(where, confidence, 0.0)
    return _weighted_mean_of_sources(source_logps, weights, pivot_logps)


def fused(
    fuse: Callable = fuse_max_margin,
    *,
    clip: bool = True,
    pivot_is_policy: bool = False,
    score: Callable[..., Scores] = response_scores,
) -> Anchor:
    """One frozen number a response, from what M other models say of it (InfiFPO).

    Reads `extras["source_logps"]` and `extras["source_lengths"]`, divides each by its
    own length, clips at the policy before training and fuses. Only whole-response
    numbers cross models: no tokenizer has to match. The policy before training is
    `fixed`: live parameters or `extras["anchor_logps"]`.

    Source: InfiFPO, arXiv:2505.13878, equations 10 to 12.
    Reduces to: with one source and no clipping, length-normalised DPO against it.

    Args:
      fuse: (source_logps, *, pivot_logps, where) -> f32[...]: `fuse_max_margin`,
        `fuse_average`, `fuse_confidence` or one's own.
      clip: whether to `clip_to_initial`; then the batch holds pairs.
      pivot_is_policy: measure the margin from the policy as it is, without gradient,
        instead of before training (the paper's text allows both).
      score: (model, params, batch) -> Scores, as the method's own `score`.

    Returns:
      An anchor whose scores fill `mean_logp`, for `rewards.length_normalized_reward`.

    Raises:
      ValueError: at the first step: the batch lacks an extra, or as `fixed`.
    """
    initial_anchor = fixed(score)

    def scores(model, anchor_params, batch: ResponseBatch, policy_scores):
        for name in ("source_logps", "source_lengths"):
            if name not in batch.extras:
                raise ValueError(
                    f"`anchors.fused` needs `batch.extras['{name}']`; the batch has "
                    f"{', '.join(sorted(batch.extras)) or 'no extras'}. Score the "
                    f"responses by the source models first."
                )
        before = initial_anchor.scores(model, anchor_params, batch, policy_scores)
        initial = response_mean(before.logp, where=batch.loss_mask)
        lengths = batch.extras["source_lengths"]
        there = lengths > 0
        sources = batch.extras["source_logps"] / jnp.maximum(lengths, 1.0)
        if clip:
            sources = clip_to_initial(sources, initial_logps=initial)
        pivot = initial
        if pivot_is_policy:
            pivot = response_mean(policy_scores.logp, where=batch.loss_mask)
        mean_logp = fuse(sources, pivot_logps=pivot, where=there)
        mean_logp = jnp.where(there.any(-1), mean_logp, initial)
        return jax.lax.stop_gradient(Scores(mean_logp=mean_logp))

    return Anchor(scores, _never)
