"""Losses of reward models: explicit or implicit, of responses, steps and episodes.

s(x)   sigmoid(x)
[w]    of the chosen response, slot 0
[l]    of the rejected response, slot 1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import (
    accuracy,
    fill,
    inclusion,
    pair_metrics,
    read_constant,
    read_pair,
    results,
)
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.numerics import at_least_float32


def reward_model_loss(rewards, *, centering: float, margin=None, where=None):
    """Bradley-Terry on a head's numbers, kept near zero, where pairs leave them free.

        loss = -log s(rewards[w] - rewards[l] - margin)
               + centering (rewards[w] + rewards[l])^2

    Source: arXiv:2312.09244, its centred reward models (the equation's number is not
    verified); margin: Llama 2, arXiv:2307.09288, section 3.2.2.
    Convention: TRL's `center_rewards_coefficient`.
    Reduces to: `logistic_loss` at a centering of 0.
    Checked: against TRL 1.16.0 (its reward trainer) in value and gradient.

    Args:
      rewards: f32[..., 2], of a reward head. Chosen in slot 0.
      centering: weight of the square, 0 or more.
      margin: as in `logistic_loss`.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      As `logistic_loss`, and the metrics `loss/preference` and `loss/centering`, the
      two terms before the weight.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `centering` is negative.

    >>> loss, metrics = reward_model_loss(jnp.array([2.0, 1.0]), centering=0.01)
    >>> round(float(loss), 4), float(metrics["loss/centering"])
    (0.4033, 9.0)
    """
    checks.check_not_negative("centering", centering)
    preference, metrics = logistic_loss(rewards, margin=margin, where=where)
    rewards, where = read_pair("rewards", rewards, where)
    square = jnp.square(rewards.sum(-1))
    metrics |= {"loss/preference": preference, "loss/centering": square}
    return results(preference + centering * square, metrics, where)


def binary_outcome_loss(rewards, *, labels, where=None):
    """Did it succeed? Cross-entropy of single rewards, without pairs.

        loss = -labels log s(rewards) - (1 - labels) log s(-rewards)

    On a head's number a step: a process reward model. On beta times the log-ratio of a
    response: an implicit one (PRIME).

    Source: PRIME, arXiv:2502.01456, the loss of its implicit process reward model (the
    equation's number is not verified).
    Reduces to: `bco_loss` without a shift, for labels of 0 and 1.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[...], of responses or steps.
      labels: broadcastable to `rewards`, in [0, 1]; no gradient.
      where: bool, broadcastable to `rewards`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metrics `rewards/response`, and `rewards/accuracy`,
      whether the reward has the sign of its label (ties, and labels of one half, count
      one half).

    Raises:
      ValueError: a shape does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> loss, _ = binary_outcome_loss(jnp.array([0.0, 1.0]), labels=jnp.array([1, 0]))
    >>> [round(float(x), 4) for x in loss]
    [0.6931, 1.3133]
    """
    checks.check_floating("rewards", rewards)
    rewards = at_least_float32(rewards)
    where = inclusion(where, shape=rewards.shape, of="rewards")
    rewards = fill(rewards, where)
    labels = read_constant("labels", labels, like=rewards, of="rewards")
    loss = -labels * jax.nn.log_sigmoid(rewards)
    loss -= (1 - labels) * jax.nn.log_sigmoid(-rewards)
    metrics = {
        "rewards/response": rewards,
        "rewards/accuracy": accuracy(rewards * (2 * labels - 1)),
    }
    return results(loss, metrics, where)


def outcome_pairs_loss(scores, *, success, where=None):
    """Every episode that succeeded against every one that failed, in a group.

        loss = mean of -log s(scores[i] - scores[j]),  i succeeded, j failed

    Source: OPRL, arXiv:2509.19199v1, equation 2, with all pairs of a group as in the
    released code.
    Convention: the mean of a group's pairs. The released code pools the pairs of a
    batch: weight the groups by their number, `pairs/count`.
    Reduces to: `logistic_loss` for one success and one failure.
    Checked: two sources, the paper and the authors' code as read; no outside value.

    Args:
      scores: f32[..., N], implicit rewards of N episodes of one task: summed over turns
        (the paper) or averaged (the released code).
      success: bool, broadcastable to `scores`.
      where: bool, broadcastable to `scores`. False: the episode is not there.

    Returns:
      loss, f32[...], not reduced, 0 for a group without a pair; the metrics of a pair,
      each the mean over the pairs of the group, and `pairs/count`, their number.
      Without a pair they are 0: weight them by the number.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `scores` is not floating-point, or `success` or `where` is not boolean.

    >>> loss, metrics = outcome_pairs_loss(
    ...     jnp.zeros(3), success=jnp.array([True, False, False])
    ... )
    >>> round(float(loss), 4), float(metrics["pairs/count"])
    (0.6931, 2.0)
    """
    scores, succeeded, failed = _read_outcomes(scores, success, where)
    return _mean_of_pairs(scores, succeeded[..., :, None] & failed[..., None, :])


def matched_outcomes_loss(scores, *, success, where=None):
    """The first episode that succeeded against the first that failed, and so on.

        loss = mean over n of -log s(scores[i_n] - scores[j_n])

    with i_n the n-th episode of a group that succeeded and j_n the n-th that failed, as
    long as there are both. No episode counts twice.

    Source: OPRL, arXiv:2509.19199v1, equation 2, with the one-to-one pairs that a
    comment of the released code speaks of; how the paper pairs is not verified.
    Convention: as `outcome_pairs_loss`.
    Reduces to: `logistic_loss` for one success and one failure.
    Checked: one source, the paper's equation.

    Args:
      scores: as in `outcome_pairs_loss`; which episodes meet depends on their order.
      success: as in `outcome_pairs_loss`.
      where: as in `outcome_pairs_loss`.

    Returns:
      As `outcome_pairs_loss`.

    Raises:
      ValueError, TypeError: as `outcome_pairs_loss`.

    >>> loss, metrics = matched_outcomes_loss(
    ...     jnp.zeros(3), success=jnp.array([True, False, False])
    ... )
    >>> float(metrics["pairs/count"])
    1.0
    """
    scores, succeeded, failed = _read_outcomes(scores, success, where)
    same_place = succeeded.cumsum(-1)[..., :, None] == failed.cumsum(-1)[..., None, :]
    pair = succeeded[..., :, None] & failed[..., None, :] & same_place
    return _mean_of_pairs(scores, pair)


def _read_outcomes(scores, success, where):
    """f32[..., N] with 0 for what is not there, and who succeeded and who failed."""
    checks.check_floating("scores", scores)
    checks.check_bool("success", success)
    scores = at_least_float32(scores)
    if not scores.ndim:
        raise ValueError("`scores` needs a last axis of episodes; got a number.")
    checks.check_broadcast("success", success, to=scores.shape, of="scores")
    success = jnp.broadcast_to(success, scores.shape)
    where = inclusion(where, shape=scores.shape, of="scores")
    there = jnp.ones(scores.shape, bool) if where is None else where
    return fill(scores, there), success & there, ~success & there


def _mean_of_pairs(scores, pair):
    """Bradley-Terry over the pairs (i, j) of bool[..., N, N], and the metrics."""
    number = pair.sum((-2, -1), dtype=scores.dtype)
    chosen, rejected = (
        jnp.where(pair, x, 0.0) for x in (scores[..., :, None], scores[..., None, :])
    )

    def mean(values):
        return jnp.where(pair, values, 0.0).sum((-2, -1)) / jnp.maximum(number, 1)

    rewards = jnp.stack([chosen, rejected], axis=-1)
    metrics = {name: mean(x) for name, x in pair_metrics(rewards).items()}
    loss = mean(-jax.nn.log_sigmoid(chosen - rejected))
    return loss, metrics | {"pairs/count": number}
