"""Rewards: beta scales once, tokens add up, masked tokens never count."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from pref_jax import rewards
from pref_jax.types import Scores


@functools.cache
def batch():
    return fixtures.pack_all(fixtures.random_groups(0, 6, 2), 40, spare_groups=1)


def random_scores(seed, scale=3.0):
    shape = batch().loss_mask.shape
    logps = -scale * np.random.default_rng(seed).random(shape, np.float32)
    return Scores(logp=jnp.where(batch().loss_mask, logps, 0.0))


def test_a_reward_is_beta_times_the_log_ratio():
    logps, anchor_logps = jnp.array([-1.5, -2.0]), jnp.array([-2.0, -0.5])
    for beta in (0.1, 0.5, 2.0):
        got = rewards.implicit_reward(logps, anchor_logps=anchor_logps, beta=beta)
        np.testing.assert_allclose(got, [beta * 0.5, beta * -1.5], rtol=1e-6)


def test_the_sequence_reward_is_the_sum_of_its_tokens():
    policy, anchor = random_scores(1), random_scores(2)
    got = rewards.sequence_reward(policy, anchor, batch(), beta=0.3)
    for b, k in np.ndindex(got.shape):
        expected = sum(
            0.3 * (float(policy.logp[b, k, t]) - float(anchor.logp[b, k, t]))
            for t in np.flatnonzero(batch().loss_mask[b, k])
        )
        assert got[b, k] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not np.asarray(got)[~batch().valid].any()


def test_what_the_mask_hides_changes_neither_reward_nor_gradient():
    policy, anchor = random_scores(1), random_scores(2)
    where = jnp.asarray(batch().loss_mask)
    spoiled = Scores(logp=jnp.where(where, policy.logp, jnp.nan))

    def total(logp):
        reward = rewards.sequence_reward(Scores(logp=logp), anchor, batch(), beta=0.3)
        return reward.sum(), reward

    gradient = jax.grad(total, has_aux=True)
    expected, got = gradient(policy.logp), gradient(spoiled.logp)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_allclose(got[0], 0.3 * where, rtol=1e-6)


@given(shift=st.floats(-50, 50), seed=st.integers(0, 5))
def test_a_constant_on_policy_and_anchor_changes_nothing(shift, seed):
    policy, anchor = random_scores(seed), random_scores(seed + 10)
    moved = [Scores(logp=x.logp + np.float32(shift)) for x in (policy, anchor)]
    got = rewards.sequence_reward(*moved, batch(), beta=0.5)
    expected = rewards.sequence_reward(policy, anchor, batch(), beta=0.5)
    # Nine tokens, each rounded near 50 to 2^-19.
    np.testing.assert_allclose(got, expected, atol=9 * 2.0**-18)


def test_small_differences_of_long_responses_survive():
    """The difference is taken before the sum: 1e-3 over 8192 tokens of -10 nats each.

    Summed first, two totals near -82000 keep steps of 2^-7.
    """
    shape, step = (1, 1, 8192), np.float32(2.0**-10)
    mask = np.ones(shape, bool)
    long = fixtures.dataclasses.replace(batch(), loss_mask=mask)
    anchor = Scores(logp=jnp.full(shape, -10.0))
    changes = jnp.zeros(shape).at[0, 0, ::4096].set(step)
    policy = Scores(logp=anchor.logp + changes)
    got = rewards.sequence_reward(policy, anchor, long, beta=1.0)
    assert float(got[0, 0]) == 2 * step


def test_log_likelihood_hands_on_the_policys_token_logps():
    policy = random_scores(1)
    assert rewards.log_likelihood(policy, random_scores(2), batch()) is policy.logp


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "`beta` must be positive and finite; got 0.0"),
        ({"beta": -0.1}, ValueError, "`beta` must be positive and finite; got -0.1"),
        ({"beta": math.nan}, ValueError, "`beta` must be positive and finite; got nan"),
        (
            {"anchor_logps": jnp.zeros((2, 1))},
            ValueError,
            r"`anchor_logps` needs the shape of `logps`, f32\[2, 3\]; got f32\[2, 1\]",
        ),
        (
            {"logps": jnp.zeros((2, 3), jnp.int32)},
            TypeError,
            r"`logps` needs floating-point numbers; got i32\[2, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "logps": jnp.zeros((2, 3)),
        "anchor_logps": jnp.zeros((2, 3)),
        "beta": 0.1,
    } | change
    logps = arguments.pop("logps")
    with pytest.raises(error, match=message):
        rewards.implicit_reward(logps, **arguments)
