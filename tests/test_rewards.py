"""Rewards: beta scales once, tokens add up, masked tokens never count."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
import loss_oracles
from pref_jax import losses, rewards
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
    long = dataclasses.replace(batch(), loss_mask=mask)
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


# --- curved rewards: f-DPO ------------------------------------------------------------

CURVED = {
    "forward_kl_reward": {},
    "jensen_shannon_reward": {},
    "alpha_divergence_reward": {"alpha": 0.3},
}
every_curved = pytest.mark.parametrize("name", CURVED)


def curved(name, logps, anchor_logps=None, *, beta=0.5, **options):
    anchor_logps = jnp.zeros_like(logps) if anchor_logps is None else anchor_logps
    function = getattr(rewards, name)
    options = CURVED[name] | options
    return function(logps, anchor_logps=anchor_logps, beta=beta, **options)


@pytest.mark.parametrize(
    ("name", "options", "ratio", "reward", "slope"),
    [
        ("forward_kl_reward", {}, 2.0, 1 - math.exp(-2), math.exp(-2)),
        ("forward_kl_reward", {}, -2.0, 1 - math.exp(2), math.exp(2)),
        (
            "jensen_shannon_reward",
            {},
            2.0,
            math.log(2 / (1 + math.exp(-2))),
            1 / (1 + math.exp(2)),
        ),
        (
            "alpha_divergence_reward",
            {"alpha": 0.25},
            -2.0,
            (math.exp(1.5) - 1) / -0.75,
            math.exp(1.5),
        ),
        (
            "alpha_divergence_reward",
            {"alpha": 0.25},
            2.0,
            (1 - math.exp(-1.5)) / 0.75,
            math.exp(-1.5),
        ),
    ],
)
def test_curved_rewards_and_their_slopes_are_arithmetic(
    name, options, ratio, reward, slope
):
    anchor = jnp.float32(-7.0)
    got = jax.value_and_grad(lambda x: curved(name, x, anchor, beta=0.3, **options))(
        anchor + ratio
    )
    np.testing.assert_allclose(got, [0.3 * reward, 0.3 * slope], rtol=2e-5)


@every_curved
def test_a_curved_reward_is_the_oracles(name):
    rng = np.random.default_rng(0)
    policy, anchor = rng.uniform(-9, 0, (2, 5, 2)).astype(np.float32)
    got = curved(name, policy, anchor)
    oracle = getattr(loss_oracles, name)
    expected = [
        [oracle(p, anchor_logps=a, beta=0.5, **CURVED[name]) for p, a in pair]
        for pair in np.stack([policy, anchor], -1)
    ]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    with jax.enable_x64(True):
        wide = (jnp.asarray(x, jnp.float64) for x in (policy, anchor))
        got = curved(name, *wide)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@every_curved
def test_a_policy_that_is_the_anchor_has_no_reward(name):
    same = jnp.array([-3.0, -900.0])
    np.testing.assert_allclose(curved(name, same, same), 0.0, atol=1e-7)


def test_an_alpha_of_zero_is_the_forward_kl_and_one_is_dpo():
    rng = np.random.default_rng(0)
    policy, anchor = rng.uniform(-4, 0, (2, 6, 2))
    with jax.enable_x64(True):

        def fitted(x, alpha):
            reward = curved("alpha_divergence_reward", x, anchor, alpha=alpha)
            return losses.logistic_loss(reward)[0].sum()

        def dpo(x):
            return losses.dpo_loss(x, anchor_logps=anchor, beta=0.5)[0].sum()

        def forward(x):
            return losses.logistic_loss(curved("forward_kl_reward", x, anchor))[0].sum()

        policy = jnp.asarray(policy)
        for alpha, limit in ((1 - 1e-7, dpo), (0.0, forward)):
            got = jax.value_and_grad(fitted)(policy, alpha)
            expected = jax.value_and_grad(limit)(policy)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, expected
            )


@pytest.mark.parametrize(
    ("name", "scale"), [("forward_kl_reward", 1.0), ("alpha_divergence_reward", 0.7)]
)
def test_an_exponential_goes_on_as_its_tangent_beyond_thirty(name, scale):
    """exp(30) (1 + y - 30) for an exponent y; the slope stays exp(30)."""
    gradient = jax.vmap(jax.value_and_grad(lambda x: curved(name, x, beta=1.0)))
    exponents = np.array([29.0, 30.0, 33.0, 1e4], np.float32)
    values, slopes = gradient(jnp.asarray(-exponents / np.float32(scale)))
    tangent = math.exp(30) * np.array([math.exp(-1), 1.0, 4.0, 1e4 - 29])
    # An exponent of 30 is known to 2e-6.
    np.testing.assert_allclose(values, -tangent / scale, rtol=2e-5)
    expected = math.exp(30) * np.array([math.exp(-1), 1, 1, 1])
    np.testing.assert_allclose(slopes, expected, rtol=2e-5)
    assert np.isfinite(np.square(slopes).sum())


def test_alpha_may_be_an_argument_of_what_is_compiled():
    def reward(alpha):
        return rewards.alpha_divergence_reward(
            jnp.array([-1.0]), anchor_logps=jnp.array([-2.5]), beta=0.1, alpha=alpha
        )

    np.testing.assert_allclose(jax.jit(reward)(0.5), reward(0.5), rtol=1e-6)


@every_curved
@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_a_curved_reward_is_finite_however_far_policy_and_anchor_are(name, ratio):
    def loss(x):
        reward = curved(name, x, jnp.array([0.0, -1e4]))
        value, metrics = losses.logistic_loss(reward)
        return value, metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.array([ratio, -1e4])
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert all(np.isfinite(x) for x in metrics.values())


@every_curved
def test_what_a_curved_reward_drops_reaches_no_gradient(name):
    where = jnp.array([[True, True], [False, False], [True, False]])
    policy = jnp.array([[-1.0, -2.0], [jnp.nan, -1.0], [-3.0, jnp.inf]])
    anchor = jnp.array([[-1.5, -1.0], [-1.0, jnp.nan], [-1.0, -1.0]])

    def total(policy):
        reward = curved(name, policy, anchor, where=where)
        loss, _ = losses.logistic_loss(reward, where=where.all(-1))
        return loss.sum(), reward

    gradient, reward = jax.grad(total, has_aux=True)(policy)
    assert not np.asarray(reward)[~np.array(where)].any()
    assert np.isfinite(gradient).all() and np.asarray(gradient)[0].all()
    assert not np.asarray(gradient)[1:].any()
    kept = curved(name, policy[0], anchor[0])
    np.testing.assert_allclose(reward[0], kept, rtol=1e-6)


@pytest.mark.parametrize("name", ["implicit_reward", *CURVED])
def test_log_ratios_of_bfloat16_are_taken_in_float32(name):
    """They have eight bits: -100.5 less -99 is kept, -1.5 would be lost on the way."""
    policy = jnp.array([-100.5, -3.0], jnp.bfloat16)
    anchor = jnp.array([-99.0, -2.0078125], jnp.bfloat16)
    function = getattr(rewards, name)
    options = CURVED.get(name, {}) | {"beta": 0.3}
    got = function(policy, anchor_logps=anchor, **options)
    assert got.dtype == jnp.float32
    wide = (x.astype(jnp.float32) for x in (policy, anchor))
    expected = function(next(wide), anchor_logps=next(wide), **options)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        *(
            (name, {"beta": 0.0}, ValueError, "`beta` must be positive and finite; got")
            for name in CURVED
        ),
        (
            "alpha_divergence_reward",
            {"alpha": 1.0},
            ValueError,
            r"`alpha` must lie in \[0, 1\).* reverse KL.*; got 1.0",
        ),
        (
            "alpha_divergence_reward",
            {"alpha": -0.1},
            ValueError,
            r"`alpha` must lie in \[0, 1\).*; got -0.1",
        ),
        (
            "forward_kl_reward",
            {"where": np.ones(3)},
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            "jensen_shannon_reward",
            {"where": np.ones(2, bool)},
            ValueError,
            r"`where` needs a shape that broadcasts to \(3,\), that of `logps`",
        ),
        (
            "jensen_shannon_reward",
            {"anchor_logps": np.zeros(2)},
            ValueError,
            "`anchor_logps` needs the shape of `logps`",
        ),
        (
            "forward_kl_reward",
            {"anchor_logps": np.zeros(3, int)},
            TypeError,
            "`anchor_logps` needs floating-point numbers",
        ),
    ],
)
def test_wrong_arguments_of_curved_rewards_are_named(name, change, error, message):
    with pytest.raises(error, match=message):
        curved(name, jnp.zeros(3), **change)


# --- rewards of a method --------------------------------------------------------------


def test_token_rewards_are_zero_where_the_mask_has_none():
    policy, anchor = random_scores(1), random_scores(2)
    spoiled = Scores(logp=jnp.where(batch().loss_mask, policy.logp, jnp.nan))
    got = rewards.token_reward(spoiled, anchor, batch(), beta=0.3)
    expected = 0.3 * np.where(batch().loss_mask, policy.logp - anchor.logp, 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def with_steps():
    """The batch with turns of two tokens, of which the mask drops some."""
    mask = batch().loss_mask
    ids = 1 + np.broadcast_to(np.arange(mask.shape[-1]) // 2, mask.shape)
    return dataclasses.replace(batch(), step_ids=ids.astype(np.int32))


ADAPTIVE = {"beta": 0.5, "entropy_weight": 0.8, "quality_weight": 2.0}


def test_an_adaptive_beta_is_the_equation():
    share, quality = jnp.array([0.25, 0.25, 0.0]), jnp.array([0.4, 1.0, 1.0])
    found = rewards.adaptive_beta(share, quality, **ADAPTIVE)
    tau = [(1 + 0.8 * 0.25 + 2.0 * 0.75 * 0.6) / 0.5, (1 + 0.8 * 0.25) / 0.5, 1 / 0.5]
    np.testing.assert_allclose(found, [1 / t for t in tau], rtol=1e-6)
    cut = rewards.adaptive_beta(share, quality, **ADAPTIVE, low=2.3, high=3.0)
    np.testing.assert_allclose(cut, [1 / 3.0, 1 / 2.4, 1 / 2.3], rtol=1e-6)
    # Unless told, tau lies between 0.1 and 5.
    for beta, expected in ((0.01, 1 / 5.0), (100.0, 1 / 0.1)):
        found = rewards.adaptive_beta(share, quality, **ADAPTIVE | {"beta": beta})
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_adaptive_beta_carries_no_gradient():
    def total(share, quality):
        return rewards.adaptive_beta(share, quality, **ADAPTIVE).sum()

    found = jax.grad(total, argnums=(0, 1))(jnp.array([0.3]), jnp.array([0.2]))
    assert [g.tolist() for g in found] == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "`beta` must be positive"),
        ({"low": 0.0}, ValueError, "`low` must be positive"),
        ({"high": 0.05}, ValueError, "`high` must lie in .0.1, inf. .not below `low`"),
        ({"entropy_weight": -1.0}, ValueError, "`entropy_weight` must be 0 or more"),
        ({"quality_weight": -1.0}, ValueError, "`quality_weight` must be 0 or more"),
        ({"quality": jnp.zeros(3)}, ValueError, "`quality` needs the shape"),
        ({"quality": jnp.zeros(2, int)}, TypeError, "`quality` needs floating"),
        ({"entropy_share": jnp.zeros(2, int)}, TypeError, "`entropy_share` needs fl"),
    ],
)
def test_the_arguments_of_an_adaptive_beta_are_named(change, error, message):
    arguments = {"entropy_share": jnp.zeros(2), "quality": jnp.zeros(2)} | ADAPTIVE
    arguments |= change
    with pytest.raises(error, match=message):
        rewards.adaptive_beta(
            arguments.pop("entropy_share"), arguments.pop("quality"), **arguments
        )


def test_step_rewards_are_by_step_and_add_up_to_the_reward_of_the_response():
    policy, anchor = random_scores(1), random_scores(2)
    spoiled = Scores(logp=jnp.where(batch().loss_mask, policy.logp, jnp.nan))
    num_steps = -(-batch().loss_mask.shape[-1] // 2)
    got = rewards.step_reward(
        spoiled, anchor, with_steps(), beta=0.3, num_steps=num_steps
    )
    assert got.shape == (*batch().valid.shape, num_steps)
    total = rewards.sequence_reward(policy, anchor, batch(), beta=0.3)
    np.testing.assert_allclose(got.sum(-1), total, rtol=1e-5, atol=1e-5)
    tokens = rewards.token_reward(policy, anchor, batch(), beta=0.3)
    second = np.asarray(tokens)[..., 2:4].sum(-1)
    np.testing.assert_allclose(got[..., 1], second, rtol=1e-5, atol=1e-6)


def test_step_rewards_of_token_rewards_are_their_sums():
    tokens = jnp.array([[1.0, 2.0, 4.0, jnp.nan], [8.0, 16.0, 32.0, 64.0]])
    ids = jnp.array([[2, 0, 2, 1], [1, 1, 2, 0]])
    where = jnp.array([[True, True, True, False], [True, False, True, True]])
    got = rewards.step_rewards(tokens, step_ids=ids, num_steps=2, where=where)
    assert got.tolist() == [[0.0, 5.0], [8.0, 32.0]]
    got = rewards.step_rewards(tokens[1], step_ids=ids[1], num_steps=2)
    assert got.tolist() == [24.0, 32.0]


def test_step_rewards_need_step_ids():
    assert batch().step_ids is None
    with pytest.raises(
        ValueError, match="`step_reward` needs `batch.step_ids`; the ba"
    ):
        rewards.step_reward(
            random_scores(1), random_scores(2), batch(), beta=0.3, num_steps=2
        )


def means(logp):
    mask = batch().loss_mask
    return (np.asarray(logp) * mask).sum(-1) / np.maximum(mask.sum(-1), 1)


def test_a_length_normalized_reward_is_of_the_mean_log_ratio():
    policy, anchor = random_scores(1), random_scores(2)
    spoiled = Scores(logp=jnp.where(batch().loss_mask, policy.logp, jnp.nan))
    got = rewards.length_normalized_reward(spoiled, anchor, batch(), beta=0.3)
    expected = 0.3 * (means(policy.logp) - means(anchor.logp))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # Or the anchor gives the mean itself.
    mean = jnp.asarray(np.random.default_rng(0).random(got.shape, np.float32))
    fused = Scores(logp=anchor.logp, mean_logp=mean)
    got = rewards.length_normalized_reward(policy, fused, batch(), beta=0.3)
    expected = 0.3 * (means(policy.logp) - np.asarray(mean))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def tail_logps(logp):
    """Summed logps of the tokens beyond the shorter response's number: [B, 2]."""
    mask = np.asarray(batch().loss_mask)
    shared = mask.sum(-1).min(-1)[:, None, None]
    return np.where(mask & (mask.cumsum(-1) > shared), logp, 0.0).sum(-1)


def test_desensitized_rewards_count_what_is_longer_alpha_times():
    policy, anchor = random_scores(1), random_scores(2)
    full = rewards.sequence_reward(policy, anchor, batch(), beta=0.3)
    got = rewards.length_desensitized_reward(
        policy, anchor, batch(), beta=0.3, alpha=0.4
    )
    ratio = np.asarray(policy.logp - anchor.logp)
    expected = np.asarray(full) - 0.3 * 0.6 * tail_logps(ratio)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(got - full).max() > 0.1
    got = rewards.length_desensitized_policy_reward(
        policy, anchor, batch(), beta=0.3, alpha=0.4
    )
    expected = np.asarray(full) - 0.3 * 0.6 * tail_logps(np.asarray(policy.logp))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "reward",
    [rewards.length_desensitized_reward, rewards.length_desensitized_policy_reward],
)
def test_desensitized_rewards_with_alpha_1_are_dpos(reward):
    policy, anchor = random_scores(1), random_scores(2)
    spoiled = Scores(logp=jnp.where(batch().loss_mask, policy.logp, jnp.nan))
    got = reward(spoiled, anchor, batch(), beta=0.3, alpha=1.0)
    expected = rewards.sequence_reward(policy, anchor, batch(), beta=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_only_the_policy_form_has_a_reward_at_the_anchor():
    """beta (1 - alpha) times minus the log-probability of the tail."""
    same = random_scores(1)
    got = rewards.length_desensitized_reward(same, same, batch(), beta=0.3, alpha=0.4)
    assert not np.asarray(got).any()
    got = rewards.length_desensitized_policy_reward(
        same, same, batch(), beta=0.3, alpha=0.4
    )
    expected = -0.3 * 0.6 * tail_logps(np.asarray(same.logp))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.asarray(got).max() > 0.1


def test_an_explicit_reward_is_the_heads_number():
    scores = Scores(value=jnp.array([[1.5, -2.0]]))
    assert rewards.explicit_reward(scores, None, None) is scores.value
    message = "`explicit_reward` needs `scores.value`; got None. Give the method a"
    with pytest.raises(ValueError, match=message):
        rewards.explicit_reward(random_scores(1), None, batch())
