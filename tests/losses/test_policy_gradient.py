"""The clipped surrogate, a critic, estimates of a KL, and two passes."""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import more_loss_oracles as oracles
from losses.loss_cases import assert_golden
from pref_jax import losses

KEPT = np.array([[True, True, False], [False, True, True], [False, False, False]])
RATIOS = np.random.default_rng(0).normal(size=KEPT.shape).astype(np.float32)

# --- the surrogate --------------------------------------------------------------------

CLIP = {"clip_low": 0.25, "clip_high": 0.5}


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "slope"),
    [
        (1.0, 2.0, {}, -2.0, -2.0),
        (1.0, -2.0, {}, 2.0, 2.0),
        (1.25, 2.0, {}, -2.5, -2.5),
        (2.0, 2.0, {}, -3.0, 0.0),  # no gain from going on
        (2.0, -2.0, {}, 4.0, 4.0),
        (0.5, -2.0, {}, 1.5, 0.0),
        (0.5, 2.0, {}, -1.0, -1.0),
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
        (4.0, 2.0, {"dual_clip": 3.0}, -3.0, 0.0),
        (0.5, 2.0, {"dual_clip": 3.0}, -1.0, -1.0),
    ],
)
def test_the_surrogate_is_arithmetic(ratio, advantage, options, loss, slope):
    options = CLIP | options | {"advantages": [advantage]}
    given = [math.log(ratio)]
    assert_golden("clipped_surrogate_loss", given, options, [loss], [slope])
    options["advantages"] = jnp.array([advantage])
    _, metrics = losses.clipped_surrogate_loss(jnp.array(given), **options)
    held = [x for name, x in metrics.items() if name.startswith("ratio/clipped")]
    assert sum(held).tolist() == [float(slope == 0)]
    assert len(held) == 2 + (options.get("dual_clip") is not None)
    np.testing.assert_allclose(metrics["ratio/value"], [ratio], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_at_a_ratio_of_one_the_gradient_is_minus_the_advantage(clip):
    advantages = jnp.array([2.0, -1.0, 0.0, 0.5])

    def total(log_ratios):
        return losses.clipped_surrogate_loss(
            log_ratios, advantages=advantages, clip_low=clip, clip_high=clip
        )[0].sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(4)), -advantages)


def test_without_an_advantage_no_clip_is_held():
    _, metrics = losses.clipped_surrogate_loss(
        jnp.array([-3.0, 3.0]), advantages=0.0, dual_clip=3.0, **CLIP
    )
    held = [x for name, x in metrics.items() if name.startswith("ratio/clipped")]
    assert len(held) == 3 and not sum(held).any()


def test_a_tie_with_a_clip_is_not_held_back():
    """exp of the number of float32 next to log 2 is 2."""
    two = jnp.log(jnp.float32(2))
    assert jnp.exp(two) == 2.0

    def total(x):
        return losses.clipped_surrogate_loss(
            x, advantages=-1.0, clip_low=0.2, clip_high=0.5, dual_clip=2.0
        )[0]

    assert jax.value_and_grad(total)(two) == (2.0, 2.0)


@pytest.mark.parametrize("traced", ["dual_clip", "clip_high"])
def test_one_clip_alone_may_be_an_argument_of_what_is_compiled(traced):
    options = CLIP | {"dual_clip": 3.0}

    def loss(number):
        return losses.clipped_surrogate_loss(
            jnp.array([2.0, -2.0]), advantages=-1.0, **options | {traced: number}
        )[0]

    expected, _ = losses.clipped_surrogate_loss(
        jnp.array([2.0, -2.0]), advantages=-1.0, **options
    )
    np.testing.assert_allclose(jax.jit(loss)(options[traced]), expected, rtol=1e-6)


def test_open_ends_clip_nothing():
    log_ratios = jnp.array([-20.0, -0.5, 0.5, 20.0])
    options = {"clip_low": 1.0, "clip_high": math.inf}
    for advantage in (2.0, -2.0):
        loss, metrics = losses.clipped_surrogate_loss(
            log_ratios, advantages=advantage, **options
        )
        np.testing.assert_allclose(loss, -advantage * jnp.exp(log_ratios), rtol=1e-6)
        assert not metrics["ratio/clipped_low"].any()
        assert not metrics["ratio/clipped_high"].any()


@pytest.mark.parametrize("name", ["advantages", "returns", "coefficients"])
def test_advantages_of_responses_beside_tokens_are_not_guessed(name):
    """[B, K] beside [B, K, T] would broadcast along the wrong axes where B = K = T."""
    tokens, responses = np.zeros((4, 4, 4), np.float32), np.ones((4, 4), np.float32)
    call = {
        "advantages": lambda x: losses.clipped_surrogate_loss(
            tokens, advantages=x, **CLIP
        ),
        "returns": lambda x: losses.value_loss(tokens, returns=x),
        "coefficients": lambda x: losses.coefficient_loss(tokens, coefficients=x),
    }[name]
    message = rf"`{name}` needs one number, or as many axes as .*`{name}\[..., None\]`"
    with pytest.raises(ValueError, match=message):
        call(responses)
    loss, _ = call(responses[..., None])
    assert loss.shape == (4, 4, 4)


def test_no_gradient_reaches_the_advantages():
    def total(advantages):
        return losses.clipped_surrogate_loss(
            jnp.array([0.1, -0.1]), advantages=advantages, **CLIP
        )[0].sum()

    assert not jax.grad(total)(jnp.array([1.0, -1.0])).any()


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens():
    found = losses.sequence_log_ratios(np.where(KEPT, RATIOS, np.nan), where=KEPT)
    expected = [
        oracles.sequence_log_ratios(r, where=w)
        for r, w in zip(RATIOS, KEPT, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(lambda x: losses.sequence_log_ratios(x, where=KEPT).sum())
    share = KEPT / np.maximum(KEPT.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(gradient(jnp.asarray(RATIOS)), share, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, r"`clip_low` must lie in \[0.0, 1.0\]"),
        ({"clip_low": 1.1}, r"`clip_low` must lie in \[0.0, 1.0\]"),
        ({"clip_high": -0.1}, r"`clip_high` must lie in \[0.0, inf\]"),
        ({"clip_high": math.nan}, r"`clip_high` must lie in \[0.0, inf\]"),
        ({"dual_clip": 1.5}, "`dual_clip` must be above 1 . `clip_high`, 1.5; got 1.5"),
        ({"dual_clip": 1.2}, "`dual_clip` must be above 1 . `clip_high`, 1.5; got 1.2"),
        ({"dual_clip": math.nan}, "`dual_clip` must be above .*; got nan"),
        ({"dual_clip": 0.5, "clip_high": 0.0}, "`dual_clip` must be above .*; got 0.5"),
    ],
)
def test_clips_are_in_range(options, message):
    with pytest.raises(ValueError, match=message):
        losses.clipped_surrogate_loss(np.zeros(2), advantages=1.0, **(CLIP | options))


# --- the critic -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "returns", "old", "loss", "slope"),
    [
        (1.25, 2.0, 1.0, 0.28125, -0.75),  # within the clip
        (2.0, 1.0, 1.5, 0.5, 1.0),  # away from the returns: the clip is the better
        (2.0, 3.0, 1.0, 0.5 * 1.75**2, 0.0),  # towards them: held at 1.25
        (0.0, -1.0, 1.0, 0.5 * 1.75**2, 0.0),
    ],
)
def test_the_loss_of_a_critic_is_arithmetic(value, returns, old, loss, slope):
    options = {"returns": [returns], "old_values": [old], "clip": 0.25}
    assert_golden("value_loss", [value], options, [loss], [slope])


def test_a_critic_without_a_clip_has_its_squared_error():
    assert_golden("value_loss", [2.0, 0.0], {"returns": 3.0}, [0.5, 4.5], [-1.0, -3.0])
    assert losses.value_loss(jnp.zeros(2), returns=1.0)[1] == {}
    for half in ({"clip": 0.1}, {"old_values": 0.0}):
        with pytest.raises(ValueError, match="`old_values` and `clip` belong together"):
            losses.value_loss(jnp.zeros(2), returns=1.0, **half)


@pytest.mark.parametrize("clip", [0.0, -0.5])
def test_the_clip_of_a_critic_is_positive(clip):
    with pytest.raises(ValueError, match="`clip` must be positive and finite"):
        losses.value_loss(np.zeros(2), returns=0.0, old_values=0.0, clip=clip)


# --- estimates of a KL ----------------------------------------------------------------

ESTIMATES = ["kl_k1", "kl_k2", "kl_k3"]
every_estimate = pytest.mark.parametrize("name", ESTIMATES)
SLOPES = {
    "kl_k1": lambda x: 1.0,
    "kl_k2": lambda x: x,
    "kl_k3": lambda x: -math.expm1(-x),
}


@every_estimate
def test_estimates_and_their_slopes_are_the_oracles(name):
    small = [1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.999, 1.0, 1.001, 1.9]
    x = np.array([-29.0, -2.0, *(-v for v in small), 0.0, *small, 5.0, 30.0])
    function = getattr(losses, name)
    expected = [getattr(oracles, name)(v) for v in x]
    if name == "kl_k3":  # float64 cancels near 0
        with decimal.localcontext(prec=60):
            exact = [decimal.Decimal(v) for v in x]
            expected = [float((-v).exp() - 1 + v) for v in exact]
    slopes = [SLOPES[name](v) for v in x]
    for enabled, rtol in ((False, 3e-6), (True, 1e-14)):
        with jax.enable_x64(enabled):
            given = jnp.asarray(x)
            value = function(given)
            slope = jax.grad(lambda x: function(x).sum())(given)
        np.testing.assert_allclose(value, expected, rtol=rtol)
        np.testing.assert_allclose(slope, slopes, rtol=rtol)


@every_estimate
def test_what_an_estimate_drops_is_zero_and_has_no_gradient(name):
    function = functools.partial(getattr(losses, name), where=KEPT)
    given = np.where(KEPT, RATIOS, np.nan)
    value, gradient = function(given), jax.grad(lambda x: function(x).sum())(given)
    np.testing.assert_array_equal(value, function(RATIOS))
    assert not np.asarray(value)[~KEPT].any() and not gradient[~KEPT].any()
    assert np.isnan(getattr(losses, name)(jnp.nan))
    with pytest.raises(TypeError, match="`log_ratios` needs floating-point numbers"):
        getattr(losses, name)(np.zeros(3, int))
    with pytest.raises(ValueError, match="`where` needs a shape that broadcasts to"):
        function(np.zeros((5, 4)))


@every_estimate
def test_estimates_of_far_log_ratios_are_finite(name):
    given = jnp.array([-1e4, -100.0, 100.0, 1e4])
    function = getattr(losses, name)
    value, gradient = function(given), jax.grad(lambda x: function(x).sum())(given)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    if name != "kl_k1":
        assert (value >= 0).all()


def test_over_a_distribution_the_first_and_the_third_are_the_divergence():
    with jax.enable_x64(True):
        log_p, log_q = (
            jax.nn.log_softmax(jnp.asarray(x, jnp.float64))
            for x in ([0.3, -1.0, 2.0], [0.0, 0.5, 1.0])
        )
        means = {
            name: float((jnp.exp(log_p) * getattr(losses, name)(log_p - log_q)).sum())
            for name in ESTIMATES
        }
        divergence = float((jnp.exp(log_p) * (log_p - log_q)).sum())
    assert means["kl_k1"] == pytest.approx(divergence, rel=1e-12)
    assert means["kl_k3"] == pytest.approx(divergence, rel=1e-12)
    assert abs(means["kl_k2"] / divergence - 1) > 0.01


def test_over_samples_of_the_policy_the_slope_of_the_second_is_the_divergences():
    with jax.enable_x64(True):
        log_q = jax.nn.log_softmax(jnp.array([0.0, 0.5, 1.0]))
        logits = jnp.array([0.3, -1.0, 2.0])
        p = jax.nn.softmax(logits)

        def divergence(logits):
            log_p = jax.nn.log_softmax(logits)
            return (jnp.exp(log_p) * (log_p - log_q)).sum()

        def estimate(logits, name):
            log_ratios = jax.nn.log_softmax(logits) - log_q
            return (p * getattr(losses, name)(log_ratios)).sum()

        expected = jax.grad(divergence)(logits)
        found = {name: jax.grad(estimate)(logits, name) for name in ESTIMATES}
    np.testing.assert_allclose(found["kl_k2"], expected, rtol=1e-10)
    np.testing.assert_allclose(found["kl_k1"], np.zeros(3), atol=1e-12)
    assert np.abs(found["kl_k3"] - expected).max() > 0.01


# --- a coefficient --------------------------------------------------------------------


def test_the_loss_of_coefficients_is_arithmetic():
    options = {"coefficients": [0.5, -2.0]}
    assert_golden("coefficient_loss", [-2.0, -3.0], options, [-1.0, 6.0], [0.5, -2.0])


def test_minus_the_advantage_as_coefficient_is_the_surrogate_at_a_ratio_of_one():
    advantages, logps = jnp.array([1.0, -0.5]), jnp.array([-2.0, -3.0])

    def first(x):
        return losses.coefficient_loss(x, coefficients=-advantages)[0].sum()

    def second(x):
        options = {"advantages": advantages, "clip_low": 0.2, "clip_high": 0.2}
        return losses.clipped_surrogate_loss(x - logps, **options)[0].sum()

    np.testing.assert_array_equal(jax.grad(first)(logps), jax.grad(second)(logps))


# --- two passes -----------------------------------------------------------------------


def episodes(seed=0):
    """Log-ratios [N, S] of turns as a function of parameters, and which exist."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(5, 3, 4)).astype(np.float32)
    where = np.arange(3) < np.array([3, 1, 2, 3, 2])[:, None]
    success = np.array([True, False, True, False, False])

    def log_ratios(params):
        return jnp.tanh(jnp.asarray(features) @ params) * params.sum()

    return log_ratios, where, success, jnp.array([0.3, -0.5, 1.0, 0.2])


def test_the_gradient_in_two_passes_is_the_gradient_in_one():
    log_ratios, where, success, params = episodes()
    beta = 0.7

    def loss_fn(scores):
        return losses.outcome_pairs_loss(scores, success=success)

    def one_pass(params):
        return loss_fn(beta * jnp.where(where, log_ratios(params), 0.0).sum(-1))[0]

    value, expected = jax.value_and_grad(one_pass)(params)
    scores = beta * jnp.where(where, log_ratios(params), 0.0).sum(-1)
    coefficients, loss, metrics = losses.score_coefficients(scores, loss_fn=loss_fn)
    assert loss == value and metrics["pairs/count"] == 6.0
    # Turn by turn, as groups of their own in another order.
    turns = np.random.default_rng(1).permutation(np.argwhere(where))

    def of_turns(params, turns):
        i, t = turns.T
        logps = log_ratios(params)[i, t]
        loss, _ = losses.coefficient_loss(logps, coefficients=beta * coefficients[i])
        return loss.sum()

    found = sum(jax.grad(of_turns)(params, part) for part in np.split(turns, [4, 7]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.05


def test_coefficients_are_slopes_without_a_gradient_of_their_own():
    def loss_fn(scores):
        return jnp.square(scores).sum(-1), {"sum": scores.sum(-1)}

    def coefficients(scores):
        return losses.score_coefficients(scores, loss_fn=loss_fn)

    scores = jnp.array([[1.0, -2.0], [0.5, 0.0]])
    found, loss, metrics = coefficients(scores)
    np.testing.assert_array_equal(found, 2 * scores)
    np.testing.assert_array_equal(loss, [5.0, 0.25])
    np.testing.assert_array_equal(metrics["sum"], [-1.0, 0.5])
    for part in range(3):
        slope = jax.grad(
            lambda x, i=part: sum(map(jnp.sum, jax.tree.leaves(coefficients(x)[i])))
        )
        assert not slope(scores).any()
