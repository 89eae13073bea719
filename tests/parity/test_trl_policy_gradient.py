"""The surrogate, at its levels and averaged as papers do, is TRL's in float64.

GRPO, Dr. GRPO, DAPO, GSPO, with the divergence from an anchor, and RLOO: the loss that
TRL's trainer returns, and its gradient by token logps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from parity import trl_losses  # noqa: E402
from parity.agreement import assert_same  # noqa: E402
from pref_jax import losses  # noqa: E402
from pref_jax.logps import response_sum  # noqa: E402
from pref_jax.train.step import weighted_mean  # noqa: E402

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
MAX_LENGTH = 14


def draw(scale):
    """(token logps, those of the sampling policy and of an anchor, mask, advantages)"""
    rng = np.random.default_rng(11)
    behaviour = -rng.exponential(size=(12, 9))
    token_logps = behaviour + scale * rng.normal(size=(12, 9))
    anchor = behaviour + 0.3 * rng.normal(size=(12, 9))
    mask = np.arange(9) < rng.integers(1, 10, (12, 1))
    rewards = rng.normal(size=(3, 4))
    with jax.enable_x64(True):
        advantages = losses.group_advantages(rewards, epsilon=1e-4)
    return token_logps, behaviour, anchor, mask, np.asarray(advantages).ravel()


def tokens_of_a_response_share_one(loss, mask):
    weights = mask / mask.sum(-1, keepdims=True)
    return weighted_mean(loss, jnp.asarray(weights))


def every_token_counts_alike(loss, mask):
    return weighted_mean(loss, jnp.asarray(mask, loss.dtype))


def over_a_constant_length(loss, mask):
    return (response_sum(loss, where=mask) / MAX_LENGTH).mean()


AVERAGES = {
    "grpo": tokens_of_a_response_share_one,
    "bnpo": every_token_counts_alike,
    "dapo": every_token_counts_alike,
    "dr_grpo": over_a_constant_length,
}


@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
@pytest.mark.parametrize("loss_type", AVERAGES)
def test_on_tokens_it_is_grpos(loss_type, dual_clip, beta, scale):
    token_logps, behaviour, anchor, mask, advantages = draw(scale)

    def ours(x):
        loss, _ = losses.clipped_surrogate_loss(
            x - behaviour,
            advantages=advantages[:, None],
            dual_clip=dual_clip,
            where=mask,
            **CLIP,
        )
        loss += beta * losses.kl_k3(x - anchor, where=mask)
        return AVERAGES[loss_type](loss, mask)

    def theirs(x):
        return trl_losses.grpo(
            x,
            torch.tensor(mask),
            behaviour_logps=torch.tensor(behaviour),
            anchor_logps=torch.tensor(anchor),
            advantages=torch.tensor(advantages),
            loss_type=loss_type,
            delta=dual_clip,
            beta=beta,
            max_length=MAX_LENGTH,
            **CLIP,
        )

    assert_same(ours, theirs, token_logps)


@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0])
def test_on_the_mean_of_a_response_it_is_gspos(scale):
    token_logps, behaviour, _, mask, advantages = draw(scale)

    def ours(x):
        ratios = losses.sequence_log_ratios(x - behaviour, where=mask)
        loss, _ = losses.clipped_surrogate_loss(ratios, advantages=advantages, **CLIP)
        return loss.mean()

    def theirs(x):
        return trl_losses.grpo(
            x,
            torch.tensor(mask),
            behaviour_logps=torch.tensor(behaviour),
            advantages=torch.tensor(advantages),
            loss_type="grpo",
            level="sequence",
            **CLIP,
        )

    assert_same(ours, theirs, token_logps)


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_on_the_sum_of_a_response_it_is_rloos(scale):
    token_logps, behaviour, _, mask, _ = draw(scale)
    rewards = np.random.default_rng(12).normal(size=(3, 4))
    with jax.enable_x64(True):
        advantages = np.asarray(losses.leave_one_out_advantages(rewards)).ravel()

    def ours(x):
        ratios = response_sum(x - behaviour, where=mask)
        loss, _ = losses.clipped_surrogate_loss(ratios, advantages=advantages, **CLIP)
        return loss.mean()

    def theirs(x):
        return trl_losses.rloo(
            x,
            torch.tensor(mask),
            behaviour_logps=torch.tensor((behaviour * mask).sum(-1)),
            advantages=torch.tensor(advantages),
            **CLIP,
        )

    assert_same(ours, theirs, token_logps)
