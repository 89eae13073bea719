"""Losses of diffusion models: errors of pictures, and what they reduce to."""

import functools
import math

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
        (
            lambda: denoising_reward(
                np.zeros(2), anchor_error=np.zeros(2, int), beta=1.0
            ),
            TypeError,
            "`anchor_error` needs floating-point numbers",
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


def test_images_of_both_kinds_weigh_alike_by_default():
    loss, _ = losses.diffusion_kto_loss(
        jnp.array([0.5, 0.5]),
        anchor_errors=jnp.array([0.6, 0.4]),
        desirable=jnp.array([True, False]),
        beta=10.0,
        kl=0.0,
    )
    np.testing.assert_allclose(loss, [1 / (1 + math.e)] * 2, rtol=1e-5)


def test_the_gate_is_open_without_a_threshold_and_says_so_of_nan():
    errors = jnp.array([[0.0, 5.0], [0.2, 0.1], [jnp.nan, 0.0]])
    loss, metrics = losses.diffusion_dro_loss(
        errors, anchor_errors=jnp.zeros((3, 2)), threshold=-math.inf
    )
    np.testing.assert_allclose(loss, [-5.0, 0.1, np.nan], rtol=1e-6)
    assert metrics["loss/active"].tolist() == [1.0, 1.0, 1.0]
    gated, metrics = losses.diffusion_dro_loss(
        errors, anchor_errors=jnp.zeros((3, 2)), threshold=-5.0
    )
    assert gated[0] == -5.0 and np.isnan(gated[2])
    assert metrics["loss/active"].tolist() == [0.0, 1.0, 1.0]


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


# --- Diffusion-DRO on a denoiser that samples -----------------------------------------

SIGNAL = np.cos(np.linspace(0.1, 1.5, 5)).astype(np.float32)  # sqrt of abar by time


def denoise(params, image, time):
    """A small denoiser: the noise in images f32[N, 2, 2, 1] at times i32[N]."""
    flat = image.reshape(len(image), -1)
    known = jnp.concatenate([flat, jax.nn.one_hot(time, len(SIGNAL))], -1)
    return (jnp.tanh(known @ params["in"]) @ params["out"]).reshape(image.shape)


def make_denoiser(seed):
    rng = np.random.default_rng(seed)
    sizes = {"in": (9, 8), "out": (8, 4)}
    return {
        name: jnp.asarray(rng.normal(0, 0.5, size), jnp.float32)
        for name, size in sizes.items()
    }


def rollout(params, noise, time):
    """DDIM from noise down to `time`: the state there and the noise predicted there."""

    def step(image, t):
        now = jnp.full(len(image), t)
        signal, error = SIGNAL[t], denoise(params, image, now)
        clean = (image - jnp.sqrt(1 - signal**2) * error) / signal
        following = SIGNAL[t - 1]
        moved = following * clean + jnp.sqrt(1 - following**2) * error
        return jnp.where(now[:, None, None, None] > time, moved, image)

    for t in range(len(SIGNAL) - 1, 0, -1):
        noise = step(noise, t)
    at = jnp.full(len(noise), time)
    return jax.lax.stop_gradient((noise, denoise(params, noise, at)))


def draw(seed):
    """(noised experts, the noise in them, noise to sample from, time)."""
    rng = np.random.default_rng(seed)
    shape, time = (16, 2, 2, 1), int(rng.integers(1, len(SIGNAL)))
    added, drawn = rng.normal(size=(2, *shape)).astype(np.float32)
    expert = np.tanh(rng.normal(1, 0.3, shape)).astype(np.float32)
    noised = SIGNAL[time] * expert + np.sqrt(1 - SIGNAL[time] ** 2) * added
    return noised, added, drawn, time


def dro_of_denoiser(params, sampler, anchor, *, seed, threshold):
    """Loss of 16 experts and 16 fresh rollouts of `sampler`, as it was released."""
    noised, added, drawn, time = draw(seed)
    state, predicted = rollout(sampler, drawn, time)
    at = jnp.full(16, time)

    def errors(params):
        return jnp.stack(
            [
                denoising_error(denoise(params, image, at), target=target)
                for image, target in ((noised, added), (state, predicted))
            ],
            axis=-1,
        )

    loss, metrics = losses.diffusion_dro_loss(
        errors(params), anchor_errors=errors(anchor), threshold=threshold
    )
    tuning, _ = losses.denoising_loss(errors(params)[:, 0])
    return {"dro": loss.mean(), "tuning": tuning.mean()}, metrics


@functools.partial(jax.jit, static_argnames=("objective", "threshold", "seed"))
def dro_gradient(params, sampler, anchor, *, objective, threshold, seed):
    def total(params):
        found, metrics = dro_of_denoiser(
            params, sampler, anchor, seed=seed, threshold=threshold
        )
        return found[objective], metrics

    return jax.grad(total, has_aux=True)(params)


def trained_denoiser(objective, *, threshold, every):
    """Eight steps of descent; the sampler is renewed at every `every`-th, M."""
    params = anchor = sampler = make_denoiser(0)
    for step in range(8):
        sampler = params if step % every == 0 else sampler
        gradient, _ = dro_gradient(
            params,
            sampler,
            anchor,
            objective=objective,
            threshold=threshold,
            seed=step % 3,
        )
        params = jax.tree.map(lambda x, g: x - 0.5 * g, params, gradient)
    return params


def far_apart(a, b):
    return max(float(jnp.abs(a[k] - b[k]).max()) for k in a)


def test_on_fresh_rollouts_a_denoiser_has_the_gradient_of_its_experts_alone():
    """M = 1. A sampler that lags gives the negatives a gradient, the anchor never."""
    params, anchor = make_denoiser(1), make_denoiser(0)
    options = {"threshold": -1e3, "seed": 0}
    found, _ = dro_gradient(params, params, anchor, objective="dro", **options)
    expected, _ = dro_gradient(params, params, anchor, objective="tuning", **options)
    assert far_apart(found, expected) < 1e-6
    assert max(float(jnp.abs(x).max()) for x in expected.values()) > 0.05
    lagging, _ = dro_gradient(params, anchor, anchor, objective="dro", **options)
    assert far_apart(lagging, expected) > 0.05


def test_without_a_threshold_and_with_fresh_rollouts_training_is_fine_tuning():
    tuned = trained_denoiser("tuning", threshold=-1e3, every=1)
    found = trained_denoiser("dro", threshold=-1e3, every=1)
    assert far_apart(found, tuned) < 1e-5
    assert far_apart(make_denoiser(0), tuned) > 0.1
    # Controls: a lagging sampler, and a threshold that closes the gate.
    lagging = trained_denoiser("dro", threshold=-1e3, every=4)
    assert far_apart(lagging, tuned) > 1e-3
    gated = trained_denoiser("dro", threshold=-0.01, every=1)
    assert far_apart(gated, tuned) > 1e-3


def test_the_gate_of_fresh_rollouts_is_the_drift_from_the_anchor():
    """The gain on the policy's own state: e(eps_phi, eps_ref), never below 0."""
    params, anchor = make_denoiser(1), make_denoiser(0)
    _, _, drawn, time = draw(0)
    state, predicted = rollout(params, drawn, time)
    of_anchor = denoise(anchor, state, jnp.full(16, time))
    drift = np.square(predicted - of_anchor).mean((1, 2, 3))
    _, metrics = dro_of_denoiser(params, params, anchor, seed=0, threshold=-1e3)
    np.testing.assert_allclose(metrics["rewards/rejected"], drift, rtol=1e-4)
    assert drift.min() > 1e-3


# --- DSPO -----------------------------------------------------------------------------


def dspo_inputs():
    """Predictions, noise and the anchor's predictions: two images, three pairs."""
    rng = np.random.default_rng(2)
    names = ("predictions", "target", "anchor_predictions")
    shape = (len(KEPT), 2, *SHAPE[1:])
    return {name: rng.normal(size=shape).astype(np.float32) for name in names}


def dspo(arrays, where=None):
    others = {k: x for k, x in arrays.items() if k != "predictions"}
    return losses.dspo_loss(arrays["predictions"], **others, beta=0.8, where=where)


def dspo_oracle(arrays):
    """(losses, rewards beta g), one pair at a time."""
    values, rewards = [], []
    for pair in zip(*(np.asarray(x, float) for x in arrays.values()), strict=True):
        of_pair = dict(zip(arrays, pair, strict=True))
        gains = [
            oracles.denoising_error(anchor, target=noise)
            - oracles.denoising_error(image, target=noise)
            for image, noise, anchor in zip(*pair, strict=True)
        ]
        rewards.append([0.8 * gain for gain in gains])
        chosen = {name: x[0] for name, x in of_pair.items()}
        image = chosen.pop("predictions")
        values.append(oracles.dspo_loss(image, rewards=rewards[-1], beta=0.8, **chosen))
    return np.array(values), np.array(rewards)


def test_dspo_is_the_oracle_and_holds_the_metrics_of_half_rewards():
    arrays = dspo_inputs()
    loss, metrics = dspo(arrays)
    expected, rewards = dspo_oracle(arrays)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for slot, name in enumerate(("chosen", "rejected")):
        got = metrics[f"rewards/{name}"]
        np.testing.assert_allclose(got, rewards[:, slot] / 2, rtol=1e-4)


def test_the_gradient_of_dspo_goes_through_both_predictions_alone():
    arrays = {k: x.astype(np.float64) for k, x in dspo_inputs().items()}
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, arrays)
        gradients = jax.device_get(jax.grad(lambda x: dspo(x)[0].sum())(given))
    for slot in (0, 1):
        direction = np.zeros(arrays["predictions"].shape)
        direction[:, slot] = np.random.default_rng(3).normal(size=SHAPE)
        sides = [
            dspo_oracle(
                arrays | {"predictions": arrays["predictions"] + sign * direction}
            )[0].sum()
            for sign in (1e-6, -1e-6)
        ]
        found = float((gradients["predictions"] * direction).sum())
        assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)
        assert abs(found) > 1e-3
    for name in ("target", "anchor_predictions"):
        assert not gradients[name].any()


def test_a_policy_that_is_the_anchor_has_the_loss_of_plain_fine_tuning():
    arrays = dspo_inputs()
    arrays["anchor_predictions"] = arrays["predictions"]
    loss, _ = dspo(arrays)
    errors = denoising_error(arrays["predictions"], target=arrays["target"])
    expected, _ = losses.denoising_loss(errors[:, 0])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_what_dspo_drops_changes_nothing_and_has_no_gradient():
    arrays = dspo_inputs()
    there = KEPT[:, None, None, None, None]
    spoiled = {k: np.where(there, x, np.nan) for k, x in arrays.items()}

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
        ({"target": np.zeros(SHAPE)}, ValueError, "`target` needs the shape of"),
        (
            {"anchor_predictions": np.zeros((3, 2, *SHAPE[1:]), int)},
            TypeError,
            "`anchor_predictions` needs floating-point",
        ),
        (
            {"anchor_predictions": np.zeros(SHAPE)},
            ValueError,
            "`anchor_predictions` needs the shape of `predictions`",
        ),
        (
            {"predictions": np.zeros(SHAPE)},
            ValueError,
            r"\[..., 2, H, W, C\] .*; got f",
        ),
        (
            {"predictions": np.zeros((2, 4, 4))},
            ValueError,
            r"needs the shape \[..., 2, ",
        ),
    ],
)
def test_wrong_arguments_of_dspo_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        dspo(dspo_inputs() | changes)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        losses.dspo_loss(**dspo_inputs(), beta=0.0)
