"""Losses of single responses: arithmetic, statistics of the batch, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses.loss_cases import assert_golden, nls, s
from pref_jax import losses

LABELS = {"desirable": [True, False]}


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    [
        (
            "kto_loss",
            [1.0, 1.0],
            LABELS | {"kl": 0.25, "desirable_weight": 1.5, "undesirable_weight": 0.5},
            [1.5 * (1 - s(0.75)), 0.5 * (1 - s(-0.75))],
            [-1.5 * s(0.75) * s(-0.75), 0.5 * s(0.75) * s(-0.75)],
        ),
        (
            "kto_loss",
            [-0.5, -0.5],
            LABELS | {"kl": [0.25, 0.0]},
            [1 - s(-0.75), 1 - s(0.5)],
            [-s(0.75) * s(-0.75), s(0.5) * s(-0.5)],
        ),
        (
            "bco_loss",
            [1.0, 1.0],
            LABELS | {"delta": 0.25},
            [nls(0.75), nls(-0.75)],
            [-s(-0.75), s(0.75)],
        ),
        (
            "bco_loss",
            [1.0, -2.0],
            LABELS | {"delta": [-0.5, 1.0]},
            [nls(1.5), nls(3.0)],
            [-s(-1.5), s(-3.0)],
        ),
    ],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


@pytest.mark.parametrize("name", ["kto_loss", "bco_loss"])
def test_accuracy_is_the_labels_side_of_the_statistic(name):
    statistic = {"kto_loss": "kl", "bco_loss": "delta"}[name]
    _, metrics = getattr(losses, name)(
        jnp.array([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]),
        desirable=jnp.array([[True], [False]]),
        **{statistic: 0.5},
    )
    assert set(metrics) == {"rewards/response", "rewards/accuracy"}
    expected = [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]
    assert metrics["rewards/accuracy"].tolist() == expected
    assert metrics["rewards/response"].tolist() == [[1.0, 0.5, 0.0]] * 2


def test_one_label_serves_a_whole_batch():
    rewards = jnp.array([[0.5, -1.0], [2.0, 0.0]])
    for label in (True, False):
        one, _ = losses.bco_loss(rewards, desirable=jnp.array(label), delta=0.25)
        full = jnp.full((2, 2), label)
        every, _ = losses.bco_loss(rewards, desirable=full, delta=0.25)
        np.testing.assert_array_equal(one, every)


def test_kto_of_a_batch_is_held_against_the_kl_of_its_mismatched_pairs():
    """Rewards of mismatched pairs with a mean of 1/2; the statistic has no gradient."""
    mismatched = jnp.array([1.5, -0.5, 0.5])

    def total(rewards, mismatched):
        kl = losses.mean_kl(mismatched)
        labels = jnp.array([True, False, True])
        loss, _ = losses.kto_loss(rewards, desirable=labels, kl=kl)
        return loss.sum(), loss

    rewards = jnp.array([1.0, 1.0, 0.0])
    gradient, loss = jax.grad(total, argnums=(0, 1), has_aux=True)(rewards, mismatched)
    np.testing.assert_allclose(loss, [s(-0.5), s(0.5), s(0.5)], rtol=1e-6)
    slope = s(0.5) * s(-0.5)
    np.testing.assert_allclose(gradient[0], [-slope, slope, -slope], rtol=1e-5)
    assert not gradient[1].any()


def test_bco_of_a_batch_is_held_against_the_shift_of_its_rewards():
    """Means of 3/2 and -1/2: a shift of 1/2, through which no gradient flows."""
    labels = jnp.array([True, True, False])

    def total(rewards):
        delta = losses.reward_shift(rewards, desirable=labels)
        loss, _ = losses.bco_loss(rewards, desirable=labels, delta=delta)
        return loss.sum(), loss

    gradient, loss = jax.grad(total, has_aux=True)(jnp.array([1.0, 2.0, -0.5]))
    np.testing.assert_allclose(loss, [nls(0.5), nls(1.5), nls(1.0)], rtol=1e-6)
    expected = [-s(-0.5), -s(-1.5), s(-1.0)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_the_weights_of_kto_are_positive(name, weight):
    labels = np.ones(2, bool)
    with pytest.raises(ValueError, match=f"`{name}` must be positive .*; got {weight}"):
        losses.kto_loss(np.zeros(2), desirable=labels, kl=0.0, **{name: weight})


@pytest.mark.parametrize("name", ["kto_loss", "bco_loss"])
def test_labels_are_booleans(name):
    options = {"kl": 0.0} if name == "kto_loss" else {"delta": 0.0}
    with pytest.raises(TypeError, match="`desirable` is inclusion and needs booleans"):
        getattr(losses, name)(np.zeros(2), desirable=np.ones(2), **options)
