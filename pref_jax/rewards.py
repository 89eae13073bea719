"""How the policy and the anchor become one number per response or token.

`beta` scales here and nowhere else: losses see rewards that are already scaled.
"""

from __future__ import annotations

from pref_jax import checks
from pref_jax.logps import response_sum
from pref_jax.types import ResponseBatch, Scores


def implicit_reward(logps, *, anchor_logps, beta: float):
    """The reward for which the policy is the KL-regularised optimum.

        reward = beta * (logps - anchor_logps)

    Source: DPO, arXiv:2305.18290v3, section 4, equation 5, without the term that is
    the same for all responses of a prompt.

    Args:
      logps: f32[...], nats, of responses or of tokens.
      anchor_logps: as `logps`. The caller stops its gradient.
      beta: reward per nat, positive.

    Returns:
      f32[...].

    Raises:
      ValueError: the shapes differ, or `beta` is not positive.
      TypeError: an argument is not floating-point.

    >>> import jax.numpy as jnp
    >>> logps, anchor_logps = jnp.array(-1.0), jnp.array(-3.0)
    >>> reward = implicit_reward(logps, anchor_logps=anchor_logps, beta=0.1)
    >>> round(float(reward), 4)
    0.2
    """
    for name, array in (("logps", logps), ("anchor_logps", anchor_logps)):
        checks.check_floating(name, array)
    checks.check_same_shape("anchor_logps", anchor_logps, like=logps, of="logps")
    if not beta > 0:
        raise ValueError(f"`beta` must be positive; got {beta}.")
    return beta * (logps - anchor_logps)


def sequence_reward(
    scores: Scores, anchor_scores: Scores, batch: ResponseBatch, *, beta: float
):
    """Implicit reward of each response: the `reward` of DPO and its family.

    The difference is taken token by token and then summed: two long sums that nearly
    cancel would lose what a stored anchor's rounding leaves.

    Returns:
      f32[B, K].
    """
    token_rewards = implicit_reward(
        scores.logp, anchor_logps=anchor_scores.logp, beta=beta
    )
    return response_sum(token_rewards, where=batch.loss_mask)


def log_likelihood(scores: Scores, anchor_scores: Scores, batch: ResponseBatch):
    """The policy's token logps, without an anchor: the `reward` of plain SFT.

    Returns:
      f32[B, K, T].
    """
    del anchor_scores, batch
    return scores.logp
