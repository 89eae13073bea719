"""Losses without an anchor: arithmetic, certainty, what they reduce to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses.loss_cases import assert_golden, nls, s
from pref_jax import losses

SURE = 2 * math.log(0.75)  # two tokens of 3/4: odds of 3
UNSURE = 3 * math.log(0.25)  # three of 1/4: odds of 1/3


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    [
        (
            "simpo_loss",
            [-2.0, -8.0],  # 2 * -1 and 2 * -2, of which 1/2 is asked for
            {"lengths": [2, 4], "beta": 2.0, "gamma": 0.5},
            nls(1.5),
            [-s(-1.5) * 2 / 2, s(-1.5) * 2 / 4],
        ),
        (
            "simpo_loss",
            [-2.0, -8.0],
            {"lengths": [2, 4], "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2},
            0.8 * nls(1.5) + 0.2 * nls(-1.5),
            [-0.8 * s(-1.5) + 0.2 * s(1.5), 0.4 * s(-1.5) - 0.1 * s(1.5)],
        ),
        (
            "orpo_loss",
            [SURE, UNSURE],
            {"lengths": [2, 3], "lambda_": 0.5},
            -math.log(0.75) + 0.5 * math.log(10 / 9),
            # s(-log 9) = 1/10; the slope of log odds by log p is 1 / (1 - p).
            [-(1 + 0.5 * 0.1 * 4) / 2, 0.5 * 0.1 * (4 / 3) / 3],
        ),
        (
            "cpo_loss",
            [-4.0, -14.0],
            {"beta": 0.1, "alpha": 0.5},
            nls(1.0) + 0.5 * 4,
            [-0.1 * s(-1.0) - 0.5, 0.1 * s(-1.0)],
        ),
        (
            "cpo_loss",
            [-4.0, -14.0],
            {"beta": 0.1, "alpha": 0.0, "label_smoothing": 0.2},
            0.8 * nls(1.0) + 0.2 * nls(-1.0),
            [-0.08 * s(-1.0) + 0.02 * s(1.0), 0.08 * s(-1.0) - 0.02 * s(1.0)],
        ),
    ],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


def test_the_terms_of_orpo_are_metrics_before_lambda():
    _, metrics = losses.orpo_loss(
        jnp.array([SURE, UNSURE]), lengths=jnp.array([2, 3]), lambda_=0.5
    )
    assert {name: float(x) for name, x in metrics.items()} == {
        "rewards/chosen": pytest.approx(math.log(3)),
        "rewards/rejected": pytest.approx(-math.log(3)),
        "rewards/margin": pytest.approx(math.log(9)),
        "rewards/accuracy": 1.0,
        "loss/nll": pytest.approx(-math.log(0.75)),
        "loss/odds_ratio": pytest.approx(math.log(10 / 9)),
    }


def test_the_terms_of_cpo_are_metrics_before_alpha():
    _, metrics = losses.cpo_loss(jnp.array([-4.0, -14.0]), beta=0.1, alpha=0.5)
    assert float(metrics["loss/nll"]) == 4.0
    assert float(metrics["loss/preference"]) == pytest.approx(nls(1.0))
    assert float(metrics["rewards/chosen"]) == pytest.approx(-0.4)


@pytest.mark.parametrize("logp", [0.0, -1e-8, 1e-3])
def test_a_certain_response_has_the_odds_of_a_mean_of_minus_1e_7(logp):
    def total(logps):
        loss, metrics = losses.orpo_loss(logps, lengths=jnp.array([2, 3]), lambda_=0.5)
        return loss, metrics

    (_, metrics), gradient = jax.value_and_grad(total, has_aux=True)(
        jnp.array([logp, UNSURE])
    )
    odds = -1e-7 - math.log(-math.expm1(-1e-7))
    assert float(metrics["rewards/chosen"]) == pytest.approx(odds, rel=1e-6)
    assert float(metrics["loss/nll"]) == pytest.approx(-logp / 2)
    # The likelihood alone still moves it.
    apart = s(-(odds + math.log(3)))
    np.testing.assert_allclose(gradient[0], -1 / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient[1], 0.5 * apart * (4 / 3) / 3, rtol=1e-4)


def test_a_likely_response_keeps_its_own_odds():
    """Five times the cap: the odds are still those of the response."""
    mean = -5e-7
    _, metrics = losses.orpo_loss(
        jnp.array([mean, -1.0]), lengths=jnp.ones(2), lambda_=0.5
    )
    odds = mean - math.log(-math.expm1(mean))
    assert float(metrics["rewards/chosen"]) == pytest.approx(odds, rel=1e-6)


def test_a_response_without_tokens_counts_as_one_token():
    logps = jnp.array([-1.0, -2.0])
    for function, options in (
        (losses.simpo_loss, {"beta": 2.0, "gamma": 0.0}),
        (losses.orpo_loss, {"lambda_": 0.5}),
    ):
        got, expected = (
            function(logps, lengths=jnp.full(2, n), **options)[0] for n in (0.0, 1.0)
        )
        assert float(got) == float(expected)


def test_simpo_is_the_logistic_loss_of_mean_logps_with_a_margin():
    rng = np.random.default_rng(0)
    logps = rng.uniform(-9, -1, (5, 2)).astype(np.float32)
    lengths = rng.integers(1, 7, (5, 2))
    got, metrics = losses.simpo_loss(logps, lengths=lengths, beta=2.5, gamma=1.25)
    rewards = (2.5 * logps / lengths).astype(np.float32)
    expected, of_rewards = losses.logistic_loss(rewards, margin=1.25)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for name, value in of_rewards.items():  # without gamma
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6)


def test_cpo_without_its_likelihood_is_dpo_from_a_uniform_anchor():
    logps = np.random.default_rng(0).uniform(-9, -1, (5, 2)).astype(np.float32)
    uniform = np.full_like(logps, -7.0)
    got, _ = losses.cpo_loss(logps, beta=0.3, alpha=0.0, label_smoothing=0.1)
    expected, _ = losses.dpo_loss(
        logps, anchor_logps=uniform, beta=0.3, label_smoothing=0.1
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "simpo_loss",
            {"lengths": np.ones(2), "beta": 1.0, "gamma": -0.5},
            "`gamma` must be 0 or more, and finite; got -0.5",
        ),
        (
            "orpo_loss",
            {"lengths": np.ones(2), "lambda_": -0.1},
            "`lambda_` must be 0 or more, and finite; got -0.1",
        ),
        (
            "cpo_loss",
            {"beta": 1.0, "alpha": -0.1},
            "`alpha` must be 0 or more, and finite; got -0.1",
        ),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(np.zeros(2, np.float32), **options)
