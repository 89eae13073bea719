"""What looks across the whole batch: statistics for unpaired losses, and AOT.

Given a part of the batch these are other numbers, so inside a step that accumulates
gradients over micro-batches they are an error, seen while the step is traced: one that
was compiled on its own before is not seen. Devices need no care: under `jax.jit` an
array is the global batch however it is sharded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import (
    all_equal,
    fill,
    inclusion,
    pair_metrics,
    read_pair,
    results,
)
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import Divergence
from pref_jax.numerics import at_least_float32
from pref_jax.rewards import implicit_reward
from pref_jax.types import CHOSEN, REJECTED

_BISECTIONS = 64  # more than float32 has digits, as many as float64 needs
_SMALLEST_VARIANCE = 1e-8


def _mean(values, include):
    """Mean over the entries of `include`; 0 if there are none."""
    total = jnp.where(include, values, 0.0).sum()
    return total / jnp.maximum(include.sum(), 1)


def _read_statistic(function, name, array, where):
    """f32[...] without gradient, and which entries count; for the whole batch alone."""
    checks.check_whole_batch(function)
    checks.check_floating(name, array)
    array = jax.lax.stop_gradient(at_least_float32(array))
    where = inclusion(where, shape=array.shape, of=name)
    counted = jnp.ones(array.shape, bool) if where is None else where
    return fill(array, counted), counted


def mean_kl(rewards, *, where=None):
    """KTO's reference point: beta times an estimate of KL(policy || anchor).

        kl = max(0, mean(rewards))

    over responses that do not belong to their prompts: each prompt of the batch with
    the response of another.

    Source: KTO, arXiv:2402.01306, the estimate of z_0 in its equation 7.
    Checked: against TRL 1.16.0 (its KTO trainer).

    Args:
      rewards: f32[...], nats, scaled by beta, of mismatched prompts and responses.
      where: bool, broadcastable to `rewards`. False: not counted.

    Returns:
      f32[], without gradient; 0 if nothing is counted.

    Raises:
      ValueError: `where` does not fit, or this is a part of a batch only.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> rewards, where = jnp.array([1.0, 2.0, -9.0]), jnp.array([True, True, False])
    >>> float(mean_kl(rewards, where=where))
    1.5
    """
    rewards, where = _read_statistic("mean_kl", "rewards", rewards, where)
    return jnp.maximum(_mean(rewards, where), 0.0)


def reward_shift(rewards, *, desirable, where=None):
    """BCO's shift of this batch: the middle between the two labels' mean rewards.

        delta = (mean of the desirable + mean of the undesirable) / 2

    Source: BCO, arXiv:2404.04656, which keeps a running mean of it.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[...], nats, scaled by beta.
      desirable: bool, broadcastable to `rewards`.
      where: bool, broadcastable to `rewards`. False: not counted.

    Returns:
      f32[], without gradient. A label without entries counts as a mean of 0.

    Raises:
      ValueError: a shape does not fit, or this is a part of a batch only.
      TypeError: `rewards` is not floating-point, or `desirable` or `where` is not
        boolean.

    >>> rewards, desirable = jnp.array([3.0, 1.0, -1.0]), jnp.array([True, True, False])
    >>> float(reward_shift(rewards, desirable=desirable))
    0.5
    """
    rewards, where = _read_statistic("reward_shift", "rewards", rewards, where)
    checks.check_bool("desirable", desirable)
    checks.check_broadcast("desirable", desirable, to=rewards.shape, of="rewards")
    desirable = jnp.broadcast_to(desirable, rewards.shape)
    return (_mean(rewards, where & desirable) + _mean(rewards, where & ~desirable)) / 2


def _of_same_rank(values, others, where):
    """For each of f32[B]: the one of `others` that stands at the same rank.

    Dropped entries stand last in both, so that ranks count the rest.
    """

    def order(x):
        return jnp.argsort(fill(x, where, jnp.inf))

    return jnp.zeros_like(others).at[order(values)].set(others[order(others)])


def _read_batch(name, array, where, loss):
    checks.check_whole_batch(loss)
    array, where = read_pair(name, array, where)
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` needs the shape [B, 2], the whole batch: `{loss}` sorts it; got "
            f"{checks.describe(array)}. For several batches use `jax.vmap`."
        )
    return array, where


def aot_loss(
    logps,
    *,
    anchor_logps,
    beta: float,
    label_smoothing: float = 0.0,
    where=None,
):
    """Optimal transport: the policy's margins should dominate the anchor's, sorted.

        loss = logistic(beta (g[b] - the anchor's gap of the same rank)),
        g[b] = logps[b, w] - logps[b, l]

    with the policy's and the anchor's gaps sorted over the batch.

    Source: AOT, arXiv:2406.05882, the paired form with the logistic loss.
    Convention: TRL's `aot`. What its earlier versions and EasyDeL call `aot_pair` is
    `aot_unpaired_loss`.
    Looks across the batch: all of it, [B, 2]. TRL sorts what each device holds.
    Reduces to: `dpo_loss` where the two gaps have one order.
    Checked: against TRL 1.16.0 (`aot`) in value and gradient.

    Args:
      logps: f32[B, 2], nats, summed over the tokens of each response. Chosen in slot 0.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      beta: reward per nat, positive.
      label_smoothing: as in `logistic_loss`.
      where: bool[B]. False drops the pair from both sorts.

    Returns:
      loss, f32[B], not reduced, in the order of the batch; metrics as `logistic_loss`,
      of each pair's own implicit rewards.

    Raises:
      ValueError, TypeError: as `dpo_loss`; or the shape is not [B, 2], or this is a
        part of a batch only.

    >>> logps = jnp.array([[-1.0, -2.0], [-1.0, -4.0]])
    >>> anchor_logps = jnp.array([[-1.0, -4.0], [-1.0, -2.0]])
    >>> loss, _ = aot_loss(logps, anchor_logps=anchor_logps, beta=0.1)
    >>> [round(float(x), 4) for x in loss]
    [0.6931, 0.6931]
    """
    anchor_logps = jax.lax.stop_gradient(anchor_logps)
    rewards = implicit_reward(logps, anchor_logps=anchor_logps, beta=beta)
    rewards, _ = _read_batch("logps", rewards, where, "aot_loss")
    logps, where = read_pair("logps", logps, where)
    anchor_logps, _ = read_pair("anchor_logps", anchor_logps, where)
    gap = logps[:, CHOSEN] - logps[:, REJECTED]
    anchor_gap = anchor_logps[:, CHOSEN] - anchor_logps[:, REJECTED]
    matched = jnp.stack([gap, _of_same_rank(gap, anchor_gap, where)], axis=-1)
    loss, _ = logistic_loss(beta * matched, label_smoothing=label_smoothing)
    return results(loss, pair_metrics(rewards), where)


def aot_unpaired_loss(
    rewards,
    *,
    label_smoothing: float = 0.0,
    where=None,
):
    """Optimal transport: chosen rewards should dominate rejected ones, both sorted.

        loss = logistic(rewards[b, w] - the rejected reward of the same rank)

    with the chosen and the rejected rewards sorted over the batch, whichever prompt
    they answer.

    Source: AOT, arXiv:2406.05882, the unpaired form with the logistic loss.
    Convention: TRL's `aot_unpaired`; `aot_pair` of its earlier versions and EasyDeL.
    Looks across the batch: all of it, [B, 2].
    Reduces to: `logistic_loss` where the two have one order.
    Checked: against TRL 1.16.0 (`aot_unpaired`) in value and gradient.

    Args:
      rewards: f32[B, 2], nats; already scaled by beta.
      label_smoothing: as in `logistic_loss`.
      where: bool[B]. False drops both responses.

    Returns:
      loss, f32[B], not reduced, in the order of the chosen responses; metrics as
      `logistic_loss`, of the pairs as they came.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or the shape is not [B, 2], or this is
        a part of a batch only.

    >>> rewards = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    >>> loss, _ = aot_unpaired_loss(rewards)
    >>> [round(float(x), 4) for x in loss]
    [0.6931, 0.6931]
    """
    rewards, where = _read_batch("rewards", rewards, where, "aot_unpaired_loss")
    chosen, rejected = rewards[:, CHOSEN], rewards[:, REJECTED]
    matched = _of_same_rank(chosen, rejected, where)
    loss, _ = logistic_loss(
        jnp.stack([chosen, matched], axis=-1), label_smoothing=label_smoothing
    )
    return results(loss, pair_metrics(rewards), where)


def solve_partition(
    logps, *, anchor_logps, beta: float, divergence: Divergence, where=None
):
    """The partition term of `fsft_solved_loss`, one number for the batch.

        c with mean of h'(beta (logps - anchor_logps) + c) = 1

    The stationary point of the objective in c. h' falls, so that there is one, between
    minus the largest and minus the smallest implicit reward; found by bisection.

    Source: derived, with the objective of `fsft_loss`.
    Checked: one source, and the dual of a bandit solved exactly.

    Args:
      logps: f32[...], nats, as in `fsft_loss`.
      anchor_logps: as `logps`, of the model before SFT.
      beta: reward per nat, positive.
      divergence: as in `fsft_loss`.
      where: bool, broadcastable to `logps`. False: not counted.

    Returns:
      f32[], without gradient; 0 where 0 solves it: for `TOTAL_VARIATION`, whose loss
      does not depend on it, for a policy that is the anchor, and if nothing is counted.

    Raises:
      ValueError, TypeError: as `fsft_loss`; or this is a part of a batch only.

    >>> from pref_jax.losses.supervised import CHI_SQUARED
    >>> logps, anchor_logps = jnp.array([-1.0, -1.0]), jnp.array([-2.0, -2.0])
    >>> c = solve_partition(
    ...     logps, anchor_logps=anchor_logps, beta=0.5, divergence=CHI_SQUARED
    ... )
    >>> round(float(c), 4)
    -0.5
    """
    rewards = implicit_reward(logps, anchor_logps=anchor_logps, beta=beta)
    rewards, counted = _read_statistic("solve_partition", "logps", rewards, where)

    def mean_slope(c):
        _, slope = divergence(rewards + c)
        return _mean(slope, counted)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        too_low = mean_slope(middle) > 1
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    most = jnp.where(counted, rewards, -jnp.inf).max()
    least = jnp.where(counted, rewards, jnp.inf).min()
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (-most, -least))
    solved = (mean_slope(0.0) == 1) | ~counted.any()
    return jnp.where(solved, 0.0, (low + high) / 2)


def whitened_advantages(advantages, *, where=None):
    """Advantages with mean 0 and variance 1 over all entries of the batch.

        (a - mean) / sqrt(variance + 1e-8)

    Source: REINFORCE++, arXiv:2501.03262, its global normalisation (the equation's
    number is not verified).
    Convention: population variance; verl takes n - 1.
    Checked: one source, the paper's equation.

    Args:
      advantages: f32[...]; over tokens if every token is to count alike.
      where: bool, broadcastable to `advantages`. False: not counted, and 0.

    Returns:
      f32[...], without gradient; 0 for equal advantages.

    Raises:
      ValueError: `where` does not fit, or this is a part of a batch only.
      TypeError: `advantages` is not floating-point or `where` is not boolean.

    >>> whitened = whitened_advantages(jnp.array([1.0, 3.0]))
    >>> [round(float(a), 4) for a in whitened]
    [-1.0, 1.0]
    """
    advantages, counted = _read_statistic(
        "whitened_advantages", "advantages", advantages, where
    )
    centred = jnp.where(counted, advantages - _mean(advantages, counted), 0.0)
    variance = _mean(jnp.square(centred), counted)
    whitened = centred * jax.lax.rsqrt(variance + _SMALLEST_VARIANCE)
    return jnp.where(all_equal(advantages, counted, None), 0.0, whitened)
