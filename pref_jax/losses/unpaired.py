"""Losses of single responses that are marked desirable or not: no pairs needed.

Each response is an entry: `rewards` has any shape. Both losses compare a reward with a
statistic of the batch, which the caller passes: `losses.batch_coupled` computes it.

    s(x)   sigmoid(x)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import (
    accuracy,
    fill,
    inclusion,
    read_constant,
    results,
)
from pref_jax.numerics import at_least_float32


def _read(rewards, desirable, where):
    """(rewards without what is dropped, labels of their shape, where)."""
    checks.check_floating("rewards", rewards)
    checks.check_bool("desirable", desirable)
    rewards = at_least_float32(rewards)
    checks.check_broadcast("desirable", desirable, to=rewards.shape, of="rewards")
    where = inclusion(where, shape=rewards.shape, of="rewards")
    return fill(rewards, where), jnp.broadcast_to(desirable, rewards.shape), where


def _metrics(rewards, signed):
    return {"rewards/response": rewards, "rewards/accuracy": accuracy(signed)}


def kto_loss(
    rewards,
    *,
    desirable,
    kl,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where=None,
):
    """Prospect theory: gains and losses against what the policy gets on average.

        desirable:    loss = desirable_weight   (1 - s(rewards - kl))
        undesirable:  loss = undesirable_weight (1 - s(kl - rewards))

    Source: KTO, arXiv:2402.01306, equation 7.
    Looks across the batch: through `kl`, an estimate of beta KL(policy || anchor), by
    the authors `mean_kl` of the rewards of mismatched prompts and responses. It
    carries no gradient.
    Checked: against TRL 1.16.0 (its KTO trainer) in value and gradient.

    Args:
      rewards: f32[...], nats; already scaled by beta. One entry a response.
      desirable: bool, broadcastable to `rewards`.
      kl: f32, broadcastable to `rewards`, in its unit, 0 or more.
      desirable_weight: lambda_D, positive.
      undesirable_weight: lambda_U, positive. The paper balances the two by the numbers
        of examples.
      where: bool, broadcastable to `rewards`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metrics `rewards/response` and `rewards/accuracy`,
      whether the reward lies on its label's side of `kl` (a tie counts one half).

    Raises:
      ValueError: a weight is not positive, or a shape does not fit.
      TypeError: `rewards` is not floating-point, or `desirable` or `where` is not
        boolean.

    >>> loss, _ = kto_loss(
    ...     jnp.array([0.5, 0.5]), desirable=jnp.array([True, False]), kl=0.5
    ... )
    >>> loss.tolist()
    [0.5, 0.5]
    """
    checks.check_positive("desirable_weight", desirable_weight)
    checks.check_positive("undesirable_weight", undesirable_weight)
    rewards, desirable, where = _read(rewards, desirable, where)
    gain = rewards - read_constant("kl", kl, like=rewards, of="rewards")
    signed = jnp.where(desirable, gain, -gain)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    loss = weight * jax.nn.sigmoid(-signed)
    return results(loss, _metrics(rewards, signed), where)


def bco_loss(rewards, *, desirable, delta, where=None):
    """A binary classifier of responses, whose logit is the reward less a shift.

        desirable:    loss = -log s(rewards - delta)
        undesirable:  loss = -log s(delta - rewards)

    Source: BCO, arXiv:2404.04656 (the equation's number is not verified); its weights
    for data of two distributions are a choice of `Method.weight`.
    Looks across the batch: through `delta`, a running mean of `reward_shift`. It
    carries no gradient.
    Convention: TRL's `bco_pair` leaves the shift out (delta = 0) and adds up the two of
    a pair; EasyDeL shifts by the batch's mean.
    Checked: against TRL 1.16.0 (`bco_pair`) in value and gradient, without a shift.

    Args:
      rewards: f32[...], nats; already scaled by beta. One entry a response.
      desirable: bool, broadcastable to `rewards`.
      delta: f32, broadcastable to `rewards`, in its unit.
      where: bool, broadcastable to `rewards`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metrics `rewards/response` and `rewards/accuracy`,
      whether the reward lies on its label's side of `delta` (a tie counts one half).

    Raises:
      ValueError: a shape does not fit.
      TypeError: `rewards` is not floating-point, or `desirable` or `where` is not
        boolean.

    >>> loss, _ = bco_loss(
    ...     jnp.array([1.5, 0.5]), desirable=jnp.array([True, False]), delta=0.5
    ... )
    >>> [round(float(x), 4) for x in loss]
    [0.3133, 0.6931]
    """
    rewards, desirable, where = _read(rewards, desirable, where)
    logit = rewards - read_constant("delta", delta, like=rewards, of="rewards")
    signed = jnp.where(desirable, logit, -logit)
    return results(-jax.nn.log_sigmoid(signed), _metrics(rewards, signed), where)
