"""What looks across the batch: statistics, sorting, and no part of a batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loss_oracles
import more_loss_oracles
from losses.loss_cases import as_the_oracle_has_it, assert_golden, nls, s
from losses.more_loss_cases import DIVERGENCES
from pref_jax import checks, losses

# --- statistics -----------------------------------------------------------------------

REWARDS = np.array([3.0, 1.0, -1.0, np.nan], np.float32)
KEPT = np.array([True, True, True, False])
DESIRABLE = np.array([True, True, False, True])


def test_the_mean_kl_is_the_mean_of_what_counts_and_not_below_zero():
    assert float(losses.mean_kl(REWARDS, where=KEPT)) == 1.0
    assert float(losses.mean_kl(-REWARDS, where=KEPT)) == 0.0
    assert float(losses.mean_kl(REWARDS[:2])) == 2.0
    assert float(losses.mean_kl(REWARDS.reshape(2, 2), where=KEPT.reshape(2, 2))) == 1.0
    assert float(losses.mean_kl(REWARDS, where=np.zeros(4, bool))) == 0.0
    assert np.isnan(losses.mean_kl(REWARDS))


def test_the_shift_is_the_middle_of_the_two_means():
    shift = functools.partial(losses.reward_shift, desirable=DESIRABLE)
    assert float(shift(REWARDS, where=KEPT)) == (2.0 - 1.0) / 2
    assert float(losses.reward_shift(REWARDS[:3], desirable=DESIRABLE[:3])) == 0.5
    # A label without entries has a mean of 0.
    assert float(shift(REWARDS, where=np.array([True, True, False, False]))) == 1.0
    assert float(shift(REWARDS, where=np.array([False, False, True, False]))) == -0.5
    assert float(shift(REWARDS, where=np.zeros(4, bool))) == 0.0
    square = REWARDS.reshape(2, 2)
    got = losses.reward_shift(
        square, desirable=np.array(True), where=KEPT.reshape(2, 2)
    )
    assert float(got) == 0.5


def test_statistics_are_the_oracles():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=9).astype(np.float32)
    labels, where = rng.random((2, 9)) < 0.6
    got = losses.mean_kl(rewards, where=where)
    assert float(got) == pytest.approx(loss_oracles.mean_kl(rewards, where=where))
    got = losses.reward_shift(rewards, desirable=labels, where=where)
    expected = loss_oracles.reward_shift(rewards, desirable=labels, where=where)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def statistics():
    return [
        pytest.param(losses.mean_kl, id="mean_kl"),
        pytest.param(
            functools.partial(losses.reward_shift, desirable=DESIRABLE),
            id="reward_shift",
        ),
    ]


@pytest.mark.parametrize("statistic", statistics())
def test_a_statistic_has_no_gradient_and_is_in_float32_or_wider(statistic):
    gradient = jax.grad(lambda x: statistic(x, where=KEPT))(jnp.asarray(REWARDS))
    assert not gradient.any()
    # 256 + 1 needs more than the eight bits of bfloat16.
    narrow = jnp.array([256.0, 1.0, 1.0, 0.0], jnp.bfloat16)
    got = statistic(narrow, where=KEPT)
    assert got.dtype == jnp.float32 and got.shape == ()
    assert got == statistic(narrow.astype(jnp.float32), where=KEPT)
    with jax.enable_x64(True):
        assert statistic(jnp.asarray(REWARDS, jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize("statistic", statistics())
def test_the_arguments_of_a_statistic_are_named(statistic):
    with pytest.raises(TypeError, match="`rewards` needs floating-point numbers"):
        statistic(np.ones(4, int))
    with pytest.raises(TypeError, match="`where` is inclusion and needs booleans"):
        statistic(REWARDS, where=np.ones(4))
    with pytest.raises(ValueError, match=r"`where` needs a shape that broadcasts to"):
        statistic(REWARDS, where=np.ones(3, bool))


def test_the_labels_of_a_shift_are_named():
    with pytest.raises(TypeError, match="`desirable` is inclusion and needs booleans"):
        losses.reward_shift(REWARDS, desirable=np.ones(4))
    with pytest.raises(ValueError, match=r"`desirable` needs a shape .* to \(4,\)"):
        losses.reward_shift(REWARDS, desirable=np.ones(3, bool))


# --- optimal transport ----------------------------------------------------------------

# Gaps of the policy 2, 1, 3; of the anchor 0.5, 0.25, -1: of rank -1 < 0.25 < 0.5.
LOGPS = [[-1.0, -3.0], [-2.0, -3.0], [-1.0, -4.0]]
ANCHOR = [[-2.0, -2.5], [-2.0, -2.25], [-3.0, -2.0]]
EXCESS = [0.5 * (2 - 0.25), 0.5 * (1 + 1), 0.5 * (3 - 0.5)]
# Rejected rewards 0.25, -1, 2 beside chosen 1, 3, 2.
PAIRS = [[1.0, 0.25], [3.0, -1.0], [2.0, 2.0]]
BY_RANK = [1.0 + 1.0, 3.0 - 2.0, 2.0 - 0.25]


def test_aot_is_arithmetic_in_the_order_of_the_batch():
    assert_golden(
        "aot_loss",
        LOGPS,
        {"anchor_logps": ANCHOR, "beta": 0.5},
        [nls(x) for x in EXCESS],
        [[-0.5 * s(-x), 0.5 * s(-x)] for x in EXCESS],
    )
    assert_golden(
        "aot_loss",
        LOGPS,
        {"anchor_logps": ANCHOR, "beta": 0.5, "label_smoothing": 0.2},
        [0.8 * nls(x) + 0.2 * nls(-x) for x in EXCESS],
        [[-0.4 * s(-x) + 0.1 * s(x), 0.4 * s(-x) - 0.1 * s(x)] for x in EXCESS],
    )


def test_aot_of_unpaired_responses_is_arithmetic_in_the_order_of_the_chosen():
    slopes = [s(-x) for x in BY_RANK]
    assert_golden(
        "aot_unpaired_loss",
        PAIRS,
        {},
        [nls(x) for x in BY_RANK],
        # The rejected 0.25 was met by the third, -1 by the first, 2 by the second.
        [[-slopes[0], slopes[2]], [-slopes[1], slopes[0]], [-slopes[2], slopes[1]]],
    )
    loss, _ = losses.aot_unpaired_loss(jnp.array(PAIRS), label_smoothing=0.2)
    expected = [0.8 * nls(x) + 0.2 * nls(-x) for x in BY_RANK]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_metrics_of_aot_are_of_the_pairs_as_they_came():
    _, metrics = losses.aot_loss(
        jnp.array(LOGPS), anchor_logps=jnp.array(ANCHOR), beta=0.5
    )
    np.testing.assert_allclose(metrics["rewards/chosen"], [0.5, 0.0, 1.0])
    np.testing.assert_allclose(metrics["rewards/rejected"], [-0.25, -0.375, -1.0])
    np.testing.assert_allclose(metrics["rewards/margin"], [0.75, 0.375, 2.0])
    _, metrics = losses.aot_unpaired_loss(jnp.array(PAIRS))
    np.testing.assert_allclose(metrics["rewards/margin"], [0.75, 4.0, 0.0])
    np.testing.assert_allclose(metrics["rewards/accuracy"], [1.0, 1.0, 0.5])


def test_a_dropped_pair_leaves_both_sorts():
    where = jnp.array([True, False, True])
    loss, _ = losses.aot_loss(
        jnp.array(LOGPS), anchor_logps=jnp.array(ANCHOR), beta=0.5, where=where
    )
    expected = [nls(0.5 * (2 + 1)), 0.0, nls(0.5 * (3 - 0.5))]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss, _ = losses.aot_unpaired_loss(jnp.array(PAIRS), where=where)
    np.testing.assert_allclose(loss, [nls(1 - 0.25), 0.0, nls(0.0)], rtol=1e-5)


def test_of_equal_gaps_the_first_pair_has_the_lower_rank():
    logps = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    anchor = jnp.array([[0.75, 0.0], [0.5, 0.0], [0.25, 0.0]])
    loss, _ = losses.aot_loss(logps, anchor_logps=anchor, beta=1.0)
    np.testing.assert_allclose(loss, [nls(0.5), nls(0.25), nls(0.25)], rtol=1e-6)
    pairs = jnp.array([[1.0, 0.75], [1.0, 0.5], [0.5, 0.25]])
    loss, _ = losses.aot_unpaired_loss(pairs)
    np.testing.assert_allclose(loss, [nls(0.5), nls(0.25), nls(0.25)], rtol=1e-6)


def test_ties_go_by_slot_in_a_large_batch_too():
    """Sorts that are not stable agree with those that are on a few entries alone."""
    ties = np.zeros((200, 2), np.float32)
    anchor = np.stack([np.arange(200) / 100, np.zeros(200)], -1).astype(np.float32)
    loss, _ = losses.aot_loss(ties, anchor_logps=anchor, beta=1.0)
    expected = [nls(-x) for x in anchor[:, 0].tolist()]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def random_logps():
    rng = np.random.default_rng(0)
    return rng.uniform(-9, -1, (2, 6, 2)).astype(np.float32)


def test_aot_is_dpo_where_the_orders_agree_and_not_elsewhere():
    policy, anchor = random_logps()
    gaps = policy[:, 0] - policy[:, 1]
    agreeing = np.stack([0.3 * gaps, np.zeros(6)], -1).astype(np.float32)

    def gradient(function, anchor):
        def total(x):
            loss, _ = function(x, anchor_logps=anchor, beta=0.5, label_smoothing=0.1)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(policy)

    got, expected = (gradient(f, agreeing) for f in (losses.aot_loss, losses.dpo_loss))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )
    got, expected = (gradient(f, anchor) for f in (losses.aot_loss, losses.dpo_loss))
    assert np.abs(got[1] - expected[1]).max() > 0.1


def test_unpaired_aot_is_the_logistic_loss_where_the_orders_agree():
    rewards = np.sort(random_logps()[0], axis=0)
    got, _ = losses.aot_unpaired_loss(rewards)
    np.testing.assert_allclose(got, losses.logistic_loss(rewards)[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 2)])
def test_aot_takes_one_whole_batch(shape):
    logps = np.zeros(shape, np.float32)
    message = r"the shape \[B, 2\], the whole batch: `{}` sorts it; got f32\[.*vmap"
    with pytest.raises(ValueError, match="`logps` needs " + message.format("aot_loss")):
        losses.aot_loss(logps, anchor_logps=logps, beta=0.5)
    expected = "`rewards` needs " + message.format("aot_unpaired_loss")
    with pytest.raises(ValueError, match=expected):
        losses.aot_unpaired_loss(logps)


# --- the partition of demonstrations --------------------------------------------------

every_divergence = pytest.mark.parametrize(
    "divergence", DIVERGENCES, ids=lambda d: d.name
)


def demonstrations(seed=0):
    rng = np.random.default_rng(seed)
    logps, anchor_logps = rng.uniform(-9, -0.5, (2, 4, 3))
    return logps, anchor_logps, rng.random((4, 3)) < 0.7


@every_divergence
def test_the_partition_is_the_oracles_and_gives_weights_of_mean_one(divergence):
    logps, anchor_logps, where = demonstrations()
    options = {"beta": 0.3, "divergence": divergence}
    name = as_the_oracle_has_it(divergence)
    with jax.enable_x64(True):
        given = {"anchor_logps": anchor_logps, "where": where}
        c = losses.solve_partition(jnp.asarray(logps), **given, **options)
        _, metrics = losses.fsft_solved_loss(
            jnp.asarray(logps), partition=c, **given, **options
        )
    expected = more_loss_oracles.solve_partition(
        logps, anchor_logps=anchor_logps, where=where, beta=0.3, divergence=name
    )
    assert float(c) == pytest.approx(expected, abs=1e-12)
    weights = np.asarray(metrics["sft/weight"])[where]
    assert weights.mean() == pytest.approx(1.0, abs=1e-12)


@every_divergence
def test_the_partition_in_float32_is_near_the_oracles_far_from_the_anchor(divergence):
    logps = np.array([-1.0, -400.0, -90.0, -3.0], np.float32)
    anchor_logps = np.array([-300.0, -1.0, -2.0, -3.0], np.float32)
    got = losses.solve_partition(
        logps, anchor_logps=anchor_logps, beta=0.5, divergence=divergence
    )
    expected = more_loss_oracles.solve_partition(
        logps,
        anchor_logps=anchor_logps,
        beta=0.5,
        divergence=as_the_oracle_has_it(divergence),
    )
    assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_partition_moves_against_the_rewards_has_no_gradient_and_drops_nan():
    logps, anchor_logps, where = demonstrations()
    options = {"beta": 0.5, "divergence": losses.JENSEN_SHANNON}

    def solve(logps, where=where):
        return losses.solve_partition(
            logps, anchor_logps=anchor_logps, where=where, **options
        )

    c = solve(logps)
    assert float(solve(logps + 2.0)) == pytest.approx(float(c) - 1.0, rel=1e-5)
    assert solve(np.where(where, logps, np.nan)) == c
    assert not jax.grad(solve)(jnp.asarray(logps, jnp.float32)).any()
    assert solve(logps, where=np.zeros((4, 3), bool)) == 0.0
    assert np.isnan(solve(np.full((4, 3), np.nan)))


def test_a_divergence_of_ones_own_without_an_end_is_solved_too():
    """h(v) = 1 - exp(-v), not continued: mean of exp(-v - c) = 1 by hand."""
    own = losses.Divergence(
        "own", lambda v: -jnp.expm1(-v), lambda v: jnp.exp(-v), -math.inf
    )
    logps, anchor_logps = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -1.0])
    options = {"anchor_logps": anchor_logps, "beta": 0.5, "divergence": own}
    expected = math.log((math.exp(-1.0) + math.exp(0.5)) / 2)
    got = losses.solve_partition(logps, **options)
    assert float(got) == pytest.approx(expected, rel=1e-5)


@every_divergence
def test_a_policy_that_is_the_anchor_has_no_partition(divergence):
    logps = jnp.array([-1.0, -2.0, -0.3])
    got = losses.solve_partition(
        logps, anchor_logps=logps, beta=0.5, divergence=divergence
    )
    assert got == 0.0


# --- advantages -----------------------------------------------------------------------


def test_whitened_advantages_are_the_oracles():
    rng = np.random.default_rng(1)
    advantages, where = rng.normal(3, 2, (5, 4)), rng.random((5, 4)) < 0.7
    got = losses.whitened_advantages(np.where(where, advantages, np.nan), where=where)
    expected = more_loss_oracles.whitened_advantages(advantages, where=where)
    np.testing.assert_allclose(np.ravel(got), expected, rtol=1e-5, atol=1e-6)
    kept = np.asarray(got)[where]
    assert kept.mean() == pytest.approx(0.0, abs=1e-6)
    assert kept.std() == pytest.approx(1.0, rel=1e-5)


def test_a_smallest_variance_keeps_noise_from_being_whitened():
    got = losses.whitened_advantages(jnp.array([1e-5, -1e-5]))
    expected = 1e-5 / math.sqrt(1e-10 + 1e-8)
    np.testing.assert_allclose(got, [expected, -expected], rtol=1e-5)


def test_whitened_advantages_of_equals_are_zero_and_have_no_gradient():
    for equal in (0.1, 123.4):
        got = losses.whitened_advantages(jnp.full((3, 7), equal))
        assert not got.any()
    assert not losses.whitened_advantages(jnp.ones(3), where=np.zeros(3, bool)).any()
    gradient = jax.grad(lambda x: (x * losses.whitened_advantages(x)).sum())
    x = jnp.array([1.0, 2.0, 4.0])
    np.testing.assert_array_equal(gradient(x), losses.whitened_advantages(x))


# --- a part of a batch ----------------------------------------------------------------

CALLS = {
    "mean_kl": lambda x: losses.mean_kl(x),
    "reward_shift": lambda x: losses.reward_shift(x, desirable=jnp.array(True)),
    "aot_loss": lambda x: losses.aot_loss(x, anchor_logps=x, beta=0.5)[0],
    "aot_unpaired_loss": lambda x: losses.aot_unpaired_loss(x)[0],
    "solve_partition": lambda x: losses.solve_partition(
        x, anchor_logps=x, beta=0.5, divergence=losses.CHI_SQUARED
    ),
    "whitened_advantages": lambda x: losses.whitened_advantages(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_looks_across_the_batch_refuses_a_part_by_name(name):
    batch = jnp.zeros((4, 2))
    message = f"`{name}` looks across the whole batch, and .* in 3 micro-batches: "
    with checks.microbatches(3), pytest.raises(ValueError, match=message):
        jax.eval_shape(CALLS[name], batch)
    with checks.microbatches(1):
        jax.eval_shape(CALLS[name], batch)
    jax.eval_shape(CALLS[name], batch)  # and outside of it


def test_a_step_in_parts_is_over_even_after_an_error():
    with pytest.raises(KeyError), checks.microbatches(2):
        raise KeyError
    checks.check_whole_batch("this")
    with checks.microbatches(2):
        with checks.microbatches(1):
            checks.check_whole_batch("this")
        with pytest.raises(ValueError, match="`this` looks across .* 2 micro-batches"):
            checks.check_whole_batch("this")
