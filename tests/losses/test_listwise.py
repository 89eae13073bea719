"""Losses of lists: arithmetic, what they reduce to, where they are stationary."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses.loss_cases import assert_golden
from pref_jax import losses, targets

# --- golden values --------------------------------------------------------------------

LOGS = [0.0, math.log(2), math.log(5)]  # of shares 1/8, 2/8, 5/8
P = [1 / 8, 2 / 8, 5 / 8]
Q = [0.5, 0.3, 0.2]
CROSS_ENTROPY = -sum(q * math.log(p) for q, p in zip(Q, P, strict=True))
SLOPES = [p - q for p, q in zip(P, Q, strict=True)]
D = [1 / math.log(1 + rank) for rank in (3, 2, 1)]  # ranks of LOGS: 3, 2, 1

GOLDENS = [
    ("listwise_cross_entropy", LOGS, {"targets": Q}, CROSS_ENTROPY, SLOPES),
    # Targets are divided by their sum.
    (
        "listwise_cross_entropy",
        LOGS,
        {"targets": [4 * q for q in Q]},
        CROSS_ENTROPY,
        SLOPES,
    ),
    # Without any target there is nothing to fit.
    ("listwise_cross_entropy", LOGS, {"targets": [0.0] * 3}, 0.0, [0.0] * 3),
    (
        "adpo_loss",
        [2 * x - 3 for x in LOGS],
        {"anchor_logps": [-3.0] * 3, "targets": Q, "beta": 0.5},
        CROSS_ENTROPY,
        [0.5 * x for x in SLOPES],
    ),
    (
        "plackett_luce_loss",
        LOGS,
        {"ranks": [2, 1, 3]},
        math.log(8 / 2) + math.log(6 / 1),
        # 2 of 8 first, then 1 of 1 + 5, then the last of itself.
        [1 / 8 + 1 / 6 - 1, 2 / 8 - 1, 5 / 8 + 5 / 6],
    ),
    # Of one rank: both of all three, then the last of itself.
    (
        "plackett_luce_loss",
        LOGS,
        {"ranks": [1, 1, 2]},
        math.log(8 / 1) + math.log(8 / 2),
        [2 / 8 - 1, 4 / 8 - 1, 10 / 8],
    ),
    (
        "irpo_loss",
        LOGS,
        {"weights": [2.0, 0.0, 1.0]},
        2 * math.log(8) + math.log(8 / 5),
        [3 / 8 - 2, 3 * 2 / 8, 3 * 5 / 8 - 1],
    ),
    # Odds against the mean of the others: 1 : 7/2, and 5 : 3/2.
    (
        "irpo_mean_loss",
        LOGS,
        {"weights": [2.0, 0.0, 1.0]},
        (2 * math.log(9 / 2) + math.log(13 / 10)) / 3,
        [
            (-2 * 7 / 9 + (3 / 13) * (1 / 3)) / 3,
            (2 * (7 / 9) * (2 / 7) + (3 / 13) * (2 / 3)) / 3,
            (2 * (7 / 9) * (5 / 7) - 3 / 13) / 3,
        ],
    ),
    ("sdpo_loss", LOGS, {}, math.log(8), [1 / 8 - 1, 2 / 8, 5 / 8]),
    (
        "lipo_lambda_loss",
        LOGS,
        {"labels": [2, 0, 1]},  # gains 3, 0, 1
        2 * (D[2] - D[0]) * math.log(1 + 5)
        + 3 * (D[1] - D[0]) * math.log(1 + 2)
        + 1 * (D[2] - D[1]) * math.log(1 + 2 / 5),
        [
            -2 * (D[2] - D[0]) * 5 / 6 - 3 * (D[1] - D[0]) * 2 / 3,
            3 * (D[1] - D[0]) * 2 / 3 + (D[2] - D[1]) * 2 / 7,
            2 * (D[2] - D[0]) * 5 / 6 - (D[2] - D[1]) * 2 / 7,
        ],
    ),
    (
        "listnet_loss",
        LOGS,
        {"labels": [math.log(5), math.log(3), math.log(2)]},  # shares as Q
        CROSS_ENTROPY,
        SLOPES,
    ),
]


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    GOLDENS,
    ids=[f"{i}-{golden[0]}" for i, golden in enumerate(GOLDENS)],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


def test_the_metrics_of_a_fit_are_arithmetic():
    _, metrics = losses.listwise_cross_entropy(jnp.array(LOGS), targets=jnp.array(Q))
    entropy = -sum(q * math.log(q) for q in Q)
    assert {name: float(x) for name, x in metrics.items()} == {
        "targets/kl": pytest.approx(CROSS_ENTROPY - entropy, rel=1e-5),
        "targets/entropy": pytest.approx(entropy, rel=1e-5),
        "rewards/accuracy": 0.0,
    }


@pytest.mark.parametrize(
    ("rewards", "ranks", "accuracy"),
    [
        ([3.0, 2.0, 1.0], [1, 2, 3], 1.0),
        ([1.0, 2.0, 3.0], [1, 2, 3], 0.0),
        ([2.0, 3.0, 1.0], [1, 2, 3], 2 / 3),
        ([2.0, 2.0, 1.0], [1, 2, 3], 2.5 / 3),  # a tie of rewards
        ([3.0, 1.0, 2.0], [1, 1, 2], 0.5),  # a tie of ranks orders no pair
        ([3.0, 2.0, 1.0], [1, 1, 1], 0.5),  # no pair is ordered
    ],
)
def test_accuracy_of_a_list_is_the_share_of_ordered_pairs(rewards, ranks, accuracy):
    _, metrics = losses.plackett_luce_loss(
        jnp.array(rewards), ranks=jnp.array(ranks, jnp.float32)
    )
    assert set(metrics) == {"rewards/accuracy"}
    assert float(metrics["rewards/accuracy"]) == pytest.approx(accuracy)


def test_a_list_of_one_item_has_nothing_to_learn():
    where = jnp.array([False, True, False])
    for name, first, options, _, _ in GOLDENS:
        arrays = {
            k: jnp.asarray(x) if isinstance(x, list) else x for k, x in options.items()
        }

        def total(x, name=name, arrays=arrays):
            return getattr(losses, name)(x, **arrays, where=where)[0]

        value, gradient = jax.value_and_grad(total)(jnp.asarray(first))
        assert not gradient.any() and abs(float(value)) < 1e-6, name


def test_lists_of_s_dpo_need_the_chosen_and_another():
    for where, expected in (
        ([False, True, True], 0.0),
        ([True, False, False], 0.0),
        ([True, False, True], math.log(6)),
    ):
        loss, _ = losses.sdpo_loss(jnp.array(LOGS), where=jnp.array(where))
        assert float(loss) == pytest.approx(expected, abs=1e-7)
    _, metrics = losses.sdpo_loss(jnp.array([1.0, 0.0, 1.0, 2.0]))
    assert float(metrics["rewards/accuracy"]) == pytest.approx(1.5 / 3)


def test_of_equal_rewards_the_lower_slot_ranks_first_in_lipo():
    loss, _ = losses.lipo_lambda_loss(jnp.zeros(3), labels=jnp.array([1.0, 0.0, 0.0]))
    first, second, third = (1 / math.log(1 + rank) for rank in (1, 2, 3))
    expected = ((first - second) + (first - third)) * math.log(2)
    assert float(loss) == pytest.approx(expected)
    loss, _ = losses.lipo_lambda_loss(jnp.zeros(3), labels=jnp.array([0.0, 1.0, 0.0]))
    expected = ((first - second) + (second - third)) * math.log(2)
    assert float(loss) == pytest.approx(expected)


# --- what a loss reduces to -----------------------------------------------------------


def random_lists(num_responses, number=5):
    rng = np.random.default_rng(num_responses)
    return rng.uniform(-3, 3, (number, num_responses)).astype(np.float32)


def assert_equal_in_value_and_gradient(first, second, x):
    """Two functions x -> (loss, metrics) have one loss and one gradient."""

    def run(function):
        def total(x):
            loss, _ = function(x)
            return loss.sum(), loss

        return jax.jit(jax.grad(total, has_aux=True))(x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(first),
        run(second),
    )


ONE_HOT = np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.5])
def test_a_list_of_two_is_the_logistic_loss_with_smoothing(smoothing):
    assert_equal_in_value_and_gradient(
        functools.partial(
            losses.listwise_cross_entropy,
            targets=jnp.array([1 - smoothing, smoothing]),
        ),
        functools.partial(losses.logistic_loss, label_smoothing=smoothing),
        random_lists(2),
    )


def test_adpo_of_a_hard_pair_is_dpo_with_beta_one_over_tau():
    anchor, tau = random_lists(2)[::-1], 2.5
    assert_equal_in_value_and_gradient(
        functools.partial(
            losses.adpo_loss, anchor_logps=anchor, targets=ONE_HOT, beta=1 / tau
        ),
        functools.partial(losses.dpo_loss, anchor_logps=anchor, beta=1 / tau),
        random_lists(2),
    )


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("plackett_luce_loss", {"ranks": np.array([1, 2])}, 1.0),
        ("sdpo_loss", {}, 1.0),
        ("irpo_loss", {"weights": ONE_HOT}, 1.0),
        ("irpo_mean_loss", {"weights": ONE_HOT}, 0.5),
        ("listnet_loss", {"labels": 50 * ONE_HOT}, 1.0),
    ],
)
def test_two_items_of_which_one_is_better_are_a_pair(name, options, factor):
    def scaled(x):
        loss, metrics = getattr(losses, name)(x, **options)
        return loss / factor, metrics

    assert_equal_in_value_and_gradient(scaled, losses.logistic_loss, random_lists(2))


def test_half_of_irpo_is_its_mean_form_for_two_items():
    weights = np.array([0.7, 1.9], np.float32)
    loss = functools.partial(losses.irpo_loss, weights=weights)
    assert_equal_in_value_and_gradient(
        lambda x: (loss(x)[0] / 2, None),
        functools.partial(losses.irpo_mean_loss, weights=weights),
        random_lists(2),
    )


def test_one_relevant_item_is_s_dpo_and_a_one_hot_target():
    first = np.eye(4, dtype=np.float32)[0]
    for function in (
        functools.partial(losses.irpo_loss, weights=first),
        functools.partial(losses.listwise_cross_entropy, targets=first),
    ):
        assert_equal_in_value_and_gradient(function, losses.sdpo_loss, random_lists(4))


def test_lipo_of_two_is_the_logistic_loss_times_what_a_swap_would_change():
    def scaled(x):
        loss, metrics = losses.lipo_lambda_loss(x, labels=ONE_HOT)
        return loss / (1 / math.log(2) - 1 / math.log(3)), metrics

    assert_equal_in_value_and_gradient(scaled, losses.logistic_loss, random_lists(2))


# --- where a loss is stationary -------------------------------------------------------


def test_a_fit_is_stationary_at_its_targets():
    q = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    gradient = jax.grad(
        lambda x: losses.listwise_cross_entropy(x, targets=q)[0],
    )(np.log(q) + 3)
    assert np.abs(gradient).max() < 1e-6
    _, metrics = losses.listwise_cross_entropy(np.log(q) + 3, targets=q)
    assert abs(float(metrics["targets/kl"])) < 1e-6


def test_irpo_is_stationary_at_the_shares_of_the_weights():
    weights = jnp.array([3.0, 0.5, 1.5, 1.0])
    gradient = jax.grad(lambda x: losses.irpo_loss(x, weights=weights)[0])
    assert np.abs(gradient(jnp.log(weights) - 2)).max() < 1e-6
    moved = gradient(jnp.log(weights) + jnp.array([0.1, 0.0, 0.0, 0.0]))
    assert moved[0] > 0.1 and (moved[1:] < 0).all()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_adpo_ends_at_the_anchor_times_the_targets_to_the_power_of_one_over_beta(beta):
    """A tabular policy, from the anchor, by gradient descent alone."""
    anchor = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    q = targets.softmax(jnp.array([0.5, 1.0, 0.0, 0.7]), temperature=1.0)

    @jax.jit
    @jax.grad
    def gradient(logits):
        logps = jax.nn.log_softmax(logits)
        loss, _ = losses.adpo_loss(logps, anchor_logps=anchor, targets=q, beta=beta)
        return loss

    logits = jnp.asarray(anchor)
    for _ in range(400):
        logits = logits - gradient(logits) / beta**2
    best = np.exp(anchor) * np.asarray(q) ** (1 / beta)
    np.testing.assert_allclose(jax.nn.softmax(logits), best / best.sum(), rtol=1e-4)


def test_a_smoothed_ranking_says_what_a_pair_says():
    """K = 2: hard targets smoothed by e are a label smoothing of e / 2."""
    q = targets.smoothed(targets.hard(jnp.array([3.0, 1.0])), smoothing=0.4)
    assert_equal_in_value_and_gradient(
        functools.partial(losses.listwise_cross_entropy, targets=q),
        functools.partial(losses.logistic_loss, label_smoothing=0.2),
        random_lists(2),
    )
