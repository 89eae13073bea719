"""Advantages, the clipped surrogate and divergences are rlax's, in value and gradient.

rlax takes one sequence without a mask; a masked one is compared with what is left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

rlax = pytest.importorskip("rlax")

from pref_jax import losses  # noqa: E402

LENGTHS = (1, 2, 7, 12)


def draw(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.7), (0.5, 0)])
def test_gae_with_a_value_behind_the_end(length, discount, gae_lambda):
    rewards, values = draw(0, length), draw(1, length + 1)
    expected = rlax.truncated_generalized_advantage_estimation(
        jnp.array(rewards),
        jnp.full(length, discount),
        jnp.full(length, float(gae_lambda)),
        jnp.array(values),
    )
    options = {"discount": discount, "gae_lambda": gae_lambda}
    advantages, returns = losses.gae(
        rewards, values=values[:-1], last_value=values[-1], **options
    )
    assert_same(advantages, expected)
    # The lambda return is the target of a critic.
    assert_same(
        returns,
        rlax.lambda_returns(
            jnp.array(rewards),
            jnp.full(length, discount),
            jnp.array(values[1:]),
            jnp.full(length, float(gae_lambda)),
        ),
    )
    # The same steps among others that are not there.
    where = np.zeros(2 * length, bool)
    where[np.random.default_rng(2).permutation(2 * length)[:length]] = True
    spread = np.full((2, 2 * length), np.nan)
    spread[:, where] = rewards, values[:-1]
    found, _ = losses.gae(
        spread[0], values=spread[1], last_value=values[-1], where=where, **options
    )
    assert_same(found[where], expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_discounted_returns(length, discount):
    rewards = draw(3, length)
    expected = rlax.discounted_returns(
        jnp.array(rewards), jnp.full(length, discount), jnp.zeros(length)
    )
    assert_same(losses.discounted_returns(rewards, discount=discount), expected)


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("clip", [0.1, 0.2, 0.9])
def test_the_clipped_surrogate_by_log_ratios_and_advantages(scale, clip):
    log_ratios, advantages = draw(4, 64, scale=scale), draw(5, 64)

    def ours(log_ratios, advantages):
        loss, _ = losses.clipped_surrogate_loss(
            log_ratios, advantages=advantages, clip_low=clip, clip_high=clip
        )
        return loss.mean()

    def theirs(log_ratios, advantages):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(log_ratios), advantages, clip)

    given = jnp.array(log_ratios), jnp.array(advantages)
    found, expected = (
        jax.value_and_grad(f, argnums=(0, 1))(*given) for f in (ours, theirs)
    )
    assert_same(found[0], expected[0])
    assert_same(found[1][0], expected[1][0])
    assert not found[1][1].any() and not expected[1][1].any()
    assert (np.asarray(found[1][0]) != 0).any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_over_a_distribution_penalties_are_the_divergence_and_its_slope(scale):
    policy, anchor = jnp.array(draw(6, 9, scale=scale)), jnp.array(draw(7, 9))

    def expectation(estimate, policy):
        logps = jax.nn.log_softmax(policy)
        probabilities = jnp.exp(logps)
        return jnp.sum(probabilities * estimate(logps - jax.nn.log_softmax(anchor)))

    expected = rlax.categorical_kl_divergence(policy, anchor)
    slope = jax.grad(rlax.categorical_kl_divergence)(policy, anchor)
    for estimate in (losses.kl_k1, losses.kl_k3):
        assert_same(expectation(estimate, policy), expected)
        assert_same(jax.grad(lambda x, f=estimate: expectation(f, x))(policy), slope)

    # Over samples of the policy as it is, the second has the slope alone.
    def of_samples(policy):
        logps = jax.nn.log_softmax(policy)
        held = jax.lax.stop_gradient(jnp.exp(logps))
        return jnp.sum(held * losses.kl_k2(logps - jax.nn.log_softmax(anchor)))

    assert_same(jax.grad(of_samples)(policy), slope)


@pytest.mark.parametrize("length", LENGTHS)
def test_minus_advantages_as_coefficients_are_the_policy_gradient(length):
    logits, advantages = jnp.array(draw(8, length, 5)), jnp.array(draw(9, length))
    actions = jnp.array(np.random.default_rng(10).integers(0, 5, length))

    def ours(logits):
        logps = jax.nn.log_softmax(logits)[jnp.arange(length), actions]
        return losses.coefficient_loss(logps, coefficients=-advantages)[0].mean()

    def theirs(logits):
        weights = jnp.ones(length)
        return rlax.policy_gradient_loss(logits, actions, advantages, weights)

    found, expected = (jax.value_and_grad(f)(logits) for f in (ours, theirs))
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
