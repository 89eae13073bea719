"""Losses of a pair of responses: chosen in slot 0, rejected in slot 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.rewards import implicit_reward
from pref_jax.types import CHOSEN, REJECTED


def logistic_loss(
    rewards,
    *,
    label_smoothing: float = 0.0,
    where=None,
):
    """Maximum likelihood of a preference under the Bradley-Terry model.

        margin = rewards[..., 0] - rewards[..., 1]
        loss   = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin)

    with s = `label_smoothing`, the probability that a label is flipped (cDPO).

    Source: DPO, arXiv:2305.18290v3, equation 7; smoothing: E. Mitchell, "A note on DPO
    with noisy preferences and relationship to IPO" (2023), equation 3.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta. Chosen in slot 0.
      label_smoothing: in [0, 0.5].
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      loss, f32[...], not reduced; metrics `rewards/chosen`, `rewards/rejected`,
      `rewards/margin`, `rewards/accuracy` (a tie counts one half), each f32[...].

    Raises:
      ValueError: the last axis is not 2, `label_smoothing` is out of range, or `where`
        does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> loss, metrics = logistic_loss(jnp.array([1.0, 0.0]))
    >>> round(float(loss), 4), float(metrics["rewards/accuracy"])
    (0.3133, 1.0)
    """
    checks.check_floating("rewards", rewards)
    checks.check_pair(
        "rewards",
        rewards,
        use_instead="A list of more than two responses needs a listwise loss.",
    )
    checks.check_range(
        "label_smoothing",
        label_smoothing,
        low=0.0,
        high=0.5,
        why="the share of flipped labels; above one half the labels are inverted",
    )
    rewards = checks.at_least_float32(rewards)
    if where is not None:
        checks.check_bool("where", where)
        checks.check_broadcast("where", where, to=rewards.shape[:-1], of="rewards")
        # Before the maths: a NaN in a dropped pair would poison the gradient.
        rewards = jnp.where(jnp.asarray(where)[..., None], rewards, 0.0)
    chosen, rejected = rewards[..., CHOSEN], rewards[..., REJECTED]
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    loss -= label_smoothing * jax.nn.log_sigmoid(-margin)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/accuracy": jnp.heaviside(margin, 0.5),
    }
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
        metrics = {name: jnp.where(where, x, 0.0) for name, x in metrics.items()}
    return loss, metrics


def dpo_loss(
    logps,
    *,
    anchor_logps,
    beta: float,
    label_smoothing: float = 0.0,
    where=None,
):
    """Direct preference optimisation: `implicit_reward`, then `logistic_loss`.

        loss = -log sigmoid(beta * ((logps[..., 0] - anchor_logps[..., 0])
                                    - (logps[..., 1] - anchor_logps[..., 1])))

    Source: DPO, arXiv:2305.18290v3, equation 7.

    Args:
      logps: f32[..., 2], nats: the policy's log-probability of each response, summed
        over its tokens. Chosen in slot 0.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      beta: reward per nat, positive.
      label_smoothing: as in `logistic_loss`.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `implicit_reward` and `logistic_loss`.

    >>> same = jnp.array([[-4.0, -6.0]])
    >>> loss, _ = dpo_loss(same, anchor_logps=same, beta=0.1)
    >>> round(float(loss[0]), 6)
    0.693147
    """
    rewards = implicit_reward(
        logps, anchor_logps=jax.lax.stop_gradient(anchor_logps), beta=beta
    )
    return logistic_loss(rewards, label_smoothing=label_smoothing, where=where)
