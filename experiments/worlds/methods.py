"""The two methods that most experiments begin with: SFT, and DPO on stored logps."""

from __future__ import annotations

import functools

from pref_jax import anchors, rewards
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import nll_loss
from pref_jax.method import Method, on_rewards, on_token_logps, token_weight


def make_sft() -> Method:
    """Supervised fine-tuning: the mean negative log-likelihood of trained tokens."""
    return Method(
        name="SFT",
        anchor=anchors.none(),
        reward=rewards.log_likelihood,
        loss=on_token_logps(nll_loss),
        weight=token_weight,
        couples_responses=False,
    )


def make_dpo(beta: float) -> Method:
    """DPO against the logps of a fixed model, which the batch carries.

    Args:
      beta: reward per nat.

    Source: arXiv:2305.18290v3, equation 7.
    """
    return Method(
        name="DPO",
        anchor=anchors.fixed(),
        reward=functools.partial(rewards.sequence_reward, beta=beta),
        loss=on_rewards(logistic_loss),
        requires=frozenset({"anchor_logps"}),
        paper="arXiv:2305.18290v3",
    )
