"""Losses of reward models: arithmetic, outcomes in pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses.loss_cases import assert_golden, nls, s
from pref_jax import losses

# --- arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    [
        (
            "reward_model_loss",
            [[2.0, 1.0], [-1.0, 0.5]],
            {"centering": 0.1},
            [nls(1.0) + 0.1 * 9, nls(-1.5) + 0.1 * 0.25],
            [[-s(-1) + 0.6, s(-1) + 0.6], [-s(1.5) - 0.1, s(1.5) - 0.1]],
        ),
        (
            "reward_model_loss",
            [[2.0, 1.0]],
            {"centering": 0.0, "margin": [0.5]},
            [nls(0.5)],
            [[-s(-0.5), s(-0.5)]],
        ),
        (
            "binary_outcome_loss",
            [1.0, 1.0, -2.0],
            {"labels": [1.0, 0.0, 0.25]},
            [nls(1.0), nls(-1.0), 0.25 * nls(-2.0) + 0.75 * nls(2.0)],
            [s(1.0) - 1, s(1.0), s(-2.0) - 0.25],
        ),
        (
            # Pairs (0, 1), (0, 3), (2, 1), (2, 3).
            "outcome_pairs_loss",
            [[1.0, 0.5, -1.0, 1.0]],
            {"success": np.array([True, False, True, False])},
            [(nls(0.5) + nls(0.0) + nls(-1.5) + nls(-2.0)) / 4],
            [
                [
                    -(s(-0.5) + s(0)) / 4,
                    (s(-0.5) + s(1.5)) / 4,
                    -(s(1.5) + s(2)) / 4,
                    (s(0) + s(2)) / 4,
                ]
            ],
        ),
        (
            # The first two of each kind: (1, 0), (2, 3). The third success is alone.
            "matched_outcomes_loss",
            [[1.0, 0.5, -1.0, 1.0, 7.0]],
            {"success": np.array([False, True, True, False, True])},
            [(nls(-0.5) + nls(-2.0)) / 2],
            [[s(0.5) / 2, -s(0.5) / 2, -s(2) / 2, s(2) / 2, 0.0]],
        ),
    ],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


def test_a_centering_of_zero_is_the_logistic_loss():
    rewards = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    got, metrics = losses.reward_model_loss(rewards, centering=0.0)
    expected, _ = losses.logistic_loss(rewards)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(metrics["loss/preference"], expected)
    np.testing.assert_array_equal(metrics["loss/centering"], [9.0, 9.0])


def test_centering_holds_what_pairs_leave_free():
    """All rewards moved by one number: the slope is twice the weight times the sum."""

    def moved(number):
        rewards = jnp.array([2.0, 1.0]) + number
        return losses.reward_model_loss(rewards, centering=0.25)[0]

    np.testing.assert_allclose(jax.grad(moved)(0.0), 0.25 * 2 * 3.0 * 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(moved)(-1.5), 0.0, atol=1e-6)


def test_binary_outcomes_are_bco_without_a_shift():
    rewards, labels = jnp.array([1.0, -2.0, 0.0]), jnp.array([True, True, False])
    got, metrics = losses.binary_outcome_loss(rewards, labels=labels)
    expected, of_bco = losses.bco_loss(rewards, desirable=labels, delta=0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        metrics["rewards/accuracy"], of_bco["rewards/accuracy"]
    )


def test_outcomes_of_steps_have_any_shape():
    rewards = jnp.zeros((2, 3, 4))
    loss, _ = losses.binary_outcome_loss(rewards, labels=jnp.array([[[1.0]], [[0.0]]]))
    np.testing.assert_allclose(loss, np.full((2, 3, 4), nls(0.0)), rtol=1e-6)


# --- outcomes in pairs ----------------------------------------------------------------


def test_one_success_and_one_failure_are_the_logistic_loss():
    scores = jnp.array([[0.5, 2.0], [1.0, -1.0]])
    success = jnp.array([[False, True], [True, False]])
    loss, metrics = losses.outcome_pairs_loss(scores, success=success)
    expected, of_pair = losses.logistic_loss(jnp.array([[2.0, 0.5], [1.0, -1.0]]))
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(
        metrics["rewards/accuracy"], of_pair["rewards/accuracy"]
    )
    np.testing.assert_array_equal(metrics["pairs/count"], [1.0, 1.0])


def test_matched_outcomes_meet_in_their_order():
    scores = jnp.array([0.3, -1.0, 2.0, 0.7])
    success = jnp.array([True, True, False, False])
    loss, metrics = losses.matched_outcomes_loss(scores, success=success)
    np.testing.assert_allclose(loss, (nls(-1.7) + nls(-1.7)) / 2, rtol=1e-6)
    order = jnp.array([1, 0, 2, 3])
    other, _ = losses.matched_outcomes_loss(scores[order], success=success)
    np.testing.assert_allclose(other, (nls(-3.0) + nls(-0.4)) / 2, rtol=1e-6)
    assert metrics["pairs/count"] == 2.0


@pytest.mark.parametrize("outcome", [True, False])
def test_a_group_without_both_outcomes_has_no_loss_gradient_or_accuracy(outcome):
    def total(scores):
        loss, metrics = losses.outcome_pairs_loss(scores, success=jnp.array(outcome))
        return loss, metrics

    scores = jnp.array([3.0, -1.0, 1e4])
    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(scores)
    assert loss == 0.0 and not gradient.any()
    assert not any(metrics.values()) and len(metrics) == 5


@pytest.mark.parametrize("name", ["outcome_pairs_loss", "matched_outcomes_loss"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_episode_without_a_pair_reaches_no_gradient_whatever_it_holds(name, bad):
    def total(scores, success):
        return getattr(losses, name)(scores, success=success)[0]

    alone = jnp.array([1.0, bad, 2.0])
    assert not jax.grad(total)(alone, np.ones(3, bool)).any()
    # Infinite beside others of its kind: their pairs are finite, and so are slopes.
    if name == "matched_outcomes_loss":
        slope = jax.grad(total)(alone, np.array([True, True, False]))
        np.testing.assert_allclose(slope, [-s(1.0), 0.0, s(1.0)], rtol=1e-6)
    else:
        loss = total(alone, np.array([True, True, False]))
        assert np.isnan(bad) == np.isnan(loss)


def test_an_outcome_that_is_dropped_makes_no_pairs():
    scores = jnp.array([1.0, jnp.nan, 0.0, jnp.nan])
    options = {"success": jnp.array([True, True, False, False])}
    where = jnp.array([True, False, True, False])
    loss, metrics = losses.outcome_pairs_loss(scores, where=where, **options)
    np.testing.assert_allclose(loss, nls(1.0), rtol=1e-6)
    assert metrics["pairs/count"] == 1.0


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("centering", [-0.1, float("nan"), float("inf")])
def test_the_centering_is_not_negative(centering):
    with pytest.raises(ValueError, match="`centering` must be 0 or more, and finite"):
        losses.reward_model_loss(np.zeros(2), centering=centering)


def test_outcomes_are_booleans_of_a_group():
    with pytest.raises(TypeError, match="`success` is inclusion and needs booleans"):
        losses.outcome_pairs_loss(np.zeros(3), success=np.ones(3))
    with pytest.raises(ValueError, match="`scores` needs a last axis of episodes"):
        losses.outcome_pairs_loss(np.float32(0), success=np.array(True))
