"""Losses of diffusion models: errors of pictures, and what they reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import more_loss_oracles as oracles
from losses.loss_cases import assert_golden, nls, s
from pref_jax import losses
from pref_jax.rewards import denoising_error, denoising_reward

SHAPE = (3, 4, 4, 2)
KEPT = np.array([True, False, True])


def pictures(*names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=SHAPE).astype(np.float32) for name in names}


# --- errors and rewards ---------------------------------------------------------------


def test_the_error_is_the_mean_square_over_a_picture():
    prediction, target = pictures("prediction", "target").values()
    found = denoising_error(prediction, target=target)
    expected = [
        oracles.denoising_error(p, target=t)
        for p, t in zip(prediction, target, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    narrow = denoising_error(
        jnp.asarray(prediction, jnp.bfloat16), target=jnp.asarray(target, jnp.bfloat16)
    )
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, rtol=0.02)


def test_the_error_moves_the_prediction_and_not_the_target():
    arrays = pictures("prediction", "target").values()

    def total(prediction, target):
        return denoising_error(prediction, target=target).sum()

    gradient, of_target = jax.grad(total, argnums=(0, 1))(*arrays)
    prediction, target = arrays
    np.testing.assert_allclose(gradient, 2 * (prediction - target) / 32, rtol=1e-5)
    assert not of_target.any()


def test_the_reward_is_how_much_less_is_wrong_than_the_anchor_has():
    reward = denoising_reward(
        jnp.array([0.25, 2.0]), anchor_error=jnp.array([1.0, 0.5]), beta=2.0
    )
    np.testing.assert_array_equal(reward, [1.5, -3.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: denoising_error(np.zeros((2, 2)), target=np.zeros((2, 2))),
            ValueError,
            r"`prediction` needs the shape \[..., H, W, C\]; got f32\[2, 2\]",
        ),
        (
            lambda: denoising_error(np.zeros(SHAPE), target=np.zeros(SHAPE[1:])),
            ValueError,
            "`target` needs the shape of `prediction`",
        ),
        (
            lambda: denoising_error(np.zeros(SHAPE), target=np.zeros(SHAPE, int)),
            TypeError,
            "`target` needs floating-point numbers",
        ),
        (
            lambda: denoising_reward(np.zeros(2), anchor_error=np.zeros(3), beta=1.0),
            ValueError,
            "`anchor_error` needs the shape of `error`",
        ),
        (
            lambda: denoising_reward(np.zeros(2), anchor_error=np.zeros(2), beta=0.0),
            ValueError,
            "`beta` must be positive and finite; got 0.0",
        ),
    ],
)
def test_wrong_errors_and_rewards_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- arithmetic -----------------------------------------------------------------------

# g = 0.5 and -0.25.
PAIR = {"anchor_errors": [[1.0, 0.5]]}


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    [
        (
            "diffusion_dpo_loss",
            [[0.5, 0.75]],
            PAIR | {"beta": 4.0},
            [nls(1.5)],
            [[2 * s(-1.5), -2 * s(-1.5)]],
        ),
        (
            "diffusion_dro_loss",
            [[0.5, 0.75]],
            PAIR | {"threshold": -1.0},
            [-0.75],
            [[1.0, -1.0]],
        ),
        (
            "diffusion_dro_loss",
            [[0.5, 0.75]],
            PAIR | {"threshold": -0.5},
            [-0.5],
            [[0.0, 0.0]],
        ),
        (
            "diffusion_kto_loss",
            [0.5, 0.5],
            {
                "anchor_errors": [1.0, 1.0],
                "beta": 4.0,
                "kl": 0.5,
                "desirable": np.array([True, False]),
                "undesirable_weight": 2.0,
            },
            [1 - s(1.5), 2 * (1 - s(-1.5))],
            [4 * s(1.5) * s(-1.5), -8 * s(1.5) * s(-1.5)],
        ),
    ],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


def test_diffusion_dpo_is_the_logistic_loss_of_half_the_reward():
    errors, anchor = np.random.default_rng(0).random((2, 5, 2)).astype(np.float32)
    found = losses.diffusion_dpo_loss(errors, anchor_errors=anchor, beta=3.0)
    rewards = denoising_reward(errors, anchor_error=anchor, beta=1.5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        found,
        losses.logistic_loss(rewards),
    )


def test_the_mean_gain_of_a_batch_is_the_reference_point_of_its_rewards():
    errors, anchor = np.random.default_rng(1).random((2, 6)).astype(np.float32)
    rewards = denoising_reward(errors, anchor_error=anchor, beta=3.0)
    gain = max(0.0, float((anchor - errors).mean()))
    assert float(losses.mean_kl(rewards)) == pytest.approx(3.0 * gain, abs=1e-6)


# --- Diffusion-DRO --------------------------------------------------------------------


def dro_gradients(threshold, *, sampler_is_the_policy, seed=0):
    """Gradients of Diffusion-DRO and of plain fine-tuning, by the two predictions."""
    arrays = pictures("expert", "state", "noise", "anchor", "of_anchor", seed=seed)
    other = pictures("sampled", seed=9)["sampled"]

    def errors(expert, state):
        target = state if sampler_is_the_policy else other
        on_expert = denoising_error(expert, target=arrays["noise"])
        return jnp.stack([on_expert, denoising_error(state, target=target)], -1)

    def dro(expert, state):
        anchor = [
            denoising_error(arrays["anchor"], target=arrays["noise"]),
            denoising_error(arrays["of_anchor"], target=arrays["state"]),
        ]
        return losses.diffusion_dro_loss(
            errors(expert, state),
            anchor_errors=jnp.stack(anchor, -1),
            threshold=threshold,
        )[0].sum()

    def tuning(expert, state):
        return errors(expert, state)[:, 0].sum()

    given = arrays["expert"], arrays["state"]
    return (jax.grad(f, argnums=(0, 1))(*given) for f in (dro, tuning))


def test_against_its_own_prediction_the_policys_state_has_a_gradient_of_zero():
    of_dro, _ = dro_gradients(-1e3, sampler_is_the_policy=True)
    assert not of_dro[1].any()
    of_dro, _ = dro_gradients(-1e3, sampler_is_the_policy=False)
    assert of_dro[1].any()


def test_below_all_values_of_the_loss_the_gradient_is_that_of_plain_fine_tuning():
    of_dro, of_tuning = dro_gradients(-1e3, sampler_is_the_policy=True)
    for got, expected in zip(of_dro, of_tuning, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert of_dro[0].any()


def test_above_all_values_of_the_loss_nothing_moves():
    of_dro, _ = dro_gradients(1e3, sampler_is_the_policy=False)
    assert not any(x.any() for x in of_dro)


# --- DSPO -----------------------------------------------------------------------------


def dspo_inputs():
    arrays = pictures("predictions", "target", "anchor_predictions")
    rng = np.random.default_rng(2)
    pairs = rng.uniform(0, 2, (2, len(KEPT), 2)).astype(np.float32)
    return arrays | {"errors": pairs[0], "anchor_errors": pairs[1]}


def dspo(arrays, where=None):
    others = {k: x for k, x in arrays.items() if k != "predictions"}
    return losses.dspo_loss(arrays["predictions"], **others, beta=0.8, where=where)


def dspo_oracle(arrays):
    out = []
    for i in range(len(KEPT)):
        one = {k: np.asarray(x)[i] for k, x in arrays.items()}
        rewards = 0.8 * (one.pop("anchor_errors") - one.pop("errors"))
        out.append(
            oracles.dspo_loss(one.pop("predictions"), rewards=rewards, beta=0.8, **one)
        )
    return np.array(out)


def test_dspo_is_the_oracle_and_holds_the_metrics_of_half_rewards():
    arrays = dspo_inputs()
    loss, metrics = dspo(arrays)
    np.testing.assert_allclose(loss, dspo_oracle(arrays), rtol=1e-5)
    rewards = 0.4 * (arrays["anchor_errors"] - arrays["errors"])
    np.testing.assert_allclose(metrics["rewards/chosen"], rewards[:, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], rewards[:, 1], rtol=1e-5)


def test_the_gradient_of_dspo_goes_through_predictions_and_the_preference():
    arrays = {k: x.astype(np.float64) for k, x in dspo_inputs().items()}
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, arrays)
        gradients = jax.device_get(jax.grad(lambda x: dspo(x)[0].sum())(given))
    for name in ("predictions", "errors"):
        direction = np.random.default_rng(3).normal(size=arrays[name].shape)
        sides = [
            dspo_oracle(arrays | {name: arrays[name] + sign * 1e-6 * direction}).sum()
            for sign in (1, -1)
        ]
        found = float((gradients[name] * direction).sum())
        assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)
    for name in ("target", "anchor_predictions", "anchor_errors"):
        assert not gradients[name].any()


def test_a_policy_that_is_the_anchor_has_the_loss_of_plain_fine_tuning():
    arrays = dspo_inputs()
    arrays["anchor_predictions"] = arrays["predictions"]
    loss, _ = dspo(arrays)
    expected = denoising_error(arrays["predictions"], target=arrays["target"])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_what_dspo_drops_changes_nothing_and_has_no_gradient():
    arrays = dspo_inputs()
    spoiled = {
        k: np.where(KEPT.reshape(3, *[1] * (x.ndim - 1)), x, np.nan)
        for k, x in arrays.items()
    }

    def total(arrays):
        loss, metrics = dspo(arrays, KEPT)
        return loss.sum(), (loss, metrics)

    expected = jax.grad(total, has_aux=True)(arrays)
    found = jax.grad(total, has_aux=True)(spoiled)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found[1][0][1] == 0.0 and found[1][0][0] != 0.0
    np.testing.assert_allclose(found[1][0], np.where(KEPT, dspo(arrays)[0], 0), 1e-6)


def test_dspo_under_jit_and_vmap_is_the_same():
    arrays = dspo_inputs()
    expected = dspo(arrays, KEPT)
    for other in (jax.jit(dspo), jax.vmap(dspo)):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            other(arrays, KEPT),
            expected,
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": np.zeros(SHAPE[1:])}, ValueError, "`target` needs the shape of"),
        (
            {"anchor_predictions": np.zeros(SHAPE, int)},
            TypeError,
            "`anchor_predictions` needs floating-point",
        ),
        ({"errors": np.zeros((3, 3))}, ValueError, "`anchor_errors` needs the shape"),
        (
            {"errors": np.zeros((3, 3)), "anchor_errors": np.zeros((3, 3))},
            ValueError,
            r"`errors` needs a last axis of 2",
        ),
        (
            {"errors": np.zeros((2, 2)), "anchor_errors": np.zeros((2, 2))},
            ValueError,
            r"`predictions` needs .* leading axes of `errors`, \(2,\); got f32\[3, 4",
        ),
    ],
)
def test_wrong_arguments_of_dspo_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        dspo(dspo_inputs() | changes)
