"""Losses of pairs: arithmetic, properties, extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from fixed_input import fixed_logps
from pref_jax.losses.pairwise import dpo_loss, logistic_loss

# --- golden values --------------------------------------------------------------------


@pytest.mark.parametrize("margin", [-3.0, -0.5, 0.0, 0.25, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_arithmetic(margin, smoothing):
    rewards = jnp.array([margin + 0.75, 0.75])
    loss, metrics = logistic_loss(rewards, label_smoothing=smoothing)
    kept = math.log(1 + math.exp(-margin))
    flipped = math.log(1 + math.exp(margin))
    expected = (1 - smoothing) * kept + smoothing * flipped
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert {name: float(value) for name, value in metrics.items()} == {
        "rewards/chosen": pytest.approx(margin + 0.75),
        "rewards/rejected": 0.75,
        "rewards/margin": pytest.approx(margin),
        "rewards/accuracy": 0.5 if margin == 0 else float(margin > 0),
    }


def test_the_fixed_input_has_the_sums_that_were_written_down():
    policy, anchor = fixed_logps()
    np.testing.assert_allclose(policy[:, 0], [-3.1, -2.3, -1.5, -4.7])
    np.testing.assert_allclose(policy[:, 1], [-1.8, -3.4, -2.4, -0.5])
    np.testing.assert_allclose(anchor[:, 0], [-3.2, -2.1, -1.2, -3.4])
    np.testing.assert_allclose(anchor[:, 1], [-1.4, -2.8, -2.5, -0.7])


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.7065278), (0.5, 0.7772720)])
def test_dpo_of_the_fixed_input_is_trls(beta, expected):
    """TRL 1.16.0, DPOTrainer with the loss "sigmoid"."""
    policy, anchor = (jnp.asarray(x, jnp.float32) for x in fixed_logps())
    loss, _ = dpo_loss(policy, anchor_logps=anchor, beta=beta)
    assert float(loss.mean()) == pytest.approx(expected, abs=1e-6)


# --- properties -----------------------------------------------------------------------

logps = st.floats(-60, 0, width=32)
pairs = st.lists(st.tuples(logps, logps), min_size=4, max_size=4).map(
    lambda x: np.array(x, np.float32)
)
betas = st.sampled_from([0.05, 0.5])
smoothings = st.sampled_from([0.0, 0.2])


@functools.cache
def compiled(beta, smoothing):
    return jax.jit(
        lambda policy, anchor, where: dpo_loss(
            policy,
            anchor_logps=anchor,
            beta=beta,
            label_smoothing=smoothing,
            where=where,
        )
    )


ALL = np.ones(4, bool)


@given(policy=pairs, anchor=pairs, beta=betas, smoothing=smoothings)
def test_dpo_is_the_oracles(policy, anchor, beta, smoothing):
    loss, _ = compiled(beta, smoothing)(policy, anchor, ALL)
    expected = oracles.dpo_loss(policy, anchor, beta=beta, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=2e-6)


@given(policy=pairs, anchor=pairs, shift=st.floats(-30, 30), beta=betas)
def test_a_constant_on_policy_and_anchor_changes_nothing(policy, anchor, shift, beta):
    shift = np.float32(shift)
    loss, _ = compiled(beta, 0.2)(policy, anchor, ALL)
    moved, _ = compiled(beta, 0.2)(policy + shift, anchor + shift, ALL)
    np.testing.assert_allclose(moved, loss, rtol=1e-5, atol=2e-5)  # sums near 100


@given(rewards=pairs)
def test_swapping_the_pair_negates_the_margin(rewards):
    _, metrics = logistic_loss(rewards)
    _, swapped = logistic_loss(rewards[:, ::-1])
    np.testing.assert_array_equal(swapped["rewards/margin"], -metrics["rewards/margin"])
    np.testing.assert_array_equal(
        swapped["rewards/accuracy"], 1 - metrics["rewards/accuracy"]
    )


@given(policy=pairs, beta=betas, smoothing=smoothings)
def test_the_anchors_own_policy_has_a_loss_of_log_2(policy, beta, smoothing):
    loss, metrics = compiled(beta, smoothing)(policy, policy, ALL)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    assert not np.asarray(metrics["rewards/chosen"]).any()


@given(policy=pairs, anchor=pairs, order=st.permutations(range(4)))
def test_permuting_the_batch_permutes_the_result(policy, anchor, order):
    order = list(order)
    result = compiled(0.5, 0.2)(policy, anchor, ALL)
    permuted = compiled(0.5, 0.2)(policy[order], anchor[order], ALL)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)[order]),
        permuted,
        result,
    )


@given(margins=st.lists(st.floats(-40, 40, width=32), min_size=4, max_size=4))
def test_the_loss_does_not_rise_with_the_margin(margins):
    rewards = np.stack([np.sort(margins), np.zeros(4)], -1).astype(np.float32)
    loss, _ = logistic_loss(rewards)
    assert (np.diff(loss) <= 0).all()


@given(policy=pairs, anchor=pairs, seed=st.integers(0, 9))
def test_dropped_pairs_change_nothing_whatever_they_hold(policy, anchor, seed):
    where = np.random.default_rng(seed).random(4) < 0.5
    spoiled = np.where(where[:, None], policy, np.nan)

    def total(policy):
        loss, metrics = compiled(0.5, 0.2)(policy, anchor, where)
        return loss.sum(), (loss, metrics)

    (value, (loss, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(
        spoiled
    )
    expected, _ = compiled(0.5, 0.2)(policy, anchor, ALL)
    np.testing.assert_array_equal(loss, np.where(where, expected, 0.0))
    for entries in (*metrics.values(), gradient):
        assert np.isfinite(entries).all()
        assert not np.asarray(entries)[~where].any()
    assert np.isfinite(value)


# --- gradients ------------------------------------------------------------------------


def test_gradients_are_those_of_differences_and_the_anchor_has_none():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        policy, anchor = (jnp.asarray(rng.uniform(-6, 0, (3, 2))) for _ in range(2))

        @jax.jit
        def loss(policy, anchor):
            options = {"beta": 0.5, "label_smoothing": 0.3}
            return dpo_loss(policy, anchor_logps=anchor, **options)[0]

        assert loss(policy, anchor).dtype == jnp.float64
        jax.test_util.check_grads(lambda x: loss(x, anchor), (policy,), order=2)

        def total(policy, anchor):
            return dpo_loss(policy, anchor_logps=anchor, beta=0.5)[0].sum()

        grads = jax.grad(total, argnums=(0, 1))(policy, anchor)
        of_policy, of_anchor = jax.device_get(grads)
    assert (of_policy[:, 0] < 0).all() and (of_policy[:, 1] > 0).all()
    np.testing.assert_allclose(of_policy[:, 0], -of_policy[:, 1])
    assert not of_anchor.any()


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, -0.5), (0.5, 0.0)])
def test_the_gradient_at_a_tie_is_one_half(smoothing, expected):
    gradient = jax.grad(lambda x: logistic_loss(x, label_smoothing=smoothing)[0])(
        jnp.zeros(2)
    )
    np.testing.assert_allclose(gradient, [expected, -expected], atol=1e-7)


# --- extremes and equal forms ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_rewards_have_a_finite_loss_and_gradient(dtype):
    rewards = jnp.array([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], dtype)

    def total(rewards):
        loss, metrics = logistic_loss(rewards, label_smoothing=0.1)
        return loss.sum(), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(rewards)
    margin = float(rewards[0, 0]) * 2
    expected = [0.1 * margin, 0.9 * margin, math.log(2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.isfinite(np.float32(gradient)).all()
    assert loss.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in metrics.values())


def test_bfloat16_rewards_are_subtracted_in_float32():
    """256 - 1 needs more than bfloat16's eight bits when the difference is -0.5 off."""
    rewards = jnp.array([256.0, 0.5], jnp.bfloat16)
    _, metrics = logistic_loss(rewards)
    assert float(metrics["rewards/margin"]) == 255.5


def test_all_dropped_gives_zeros():
    rewards = jnp.full((3, 2), jnp.nan)

    def total(rewards):
        loss, metrics = logistic_loss(rewards, where=jnp.zeros(3, bool))
        return loss.sum(), (loss, metrics)

    gradient, outputs = jax.grad(total, has_aux=True)(rewards)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((gradient, outputs)))


def test_nan_in_a_counted_pair_stays():
    loss, _ = logistic_loss(jnp.array([[jnp.nan, 0.0], [1.0, 0.0]]), where=ALL[:2])
    assert np.isnan(loss[0]) and np.isfinite(loss[1])


def test_leading_axes_vmap_and_jit_agree():
    rng = np.random.default_rng(0)
    policy, anchor = rng.uniform(-9, 0, (2, 3, 5, 2)).astype(np.float32)
    where = rng.random((3, 5)) < 0.7

    def function(policy, anchor, where):
        return dpo_loss(policy, anchor_logps=anchor, beta=0.3, where=where)

    expected = function(policy, anchor, where)
    one_by_one = [
        [function(policy[i, j], anchor[i, j], where[i, j])[0] for j in range(5)]
        for i in range(3)
    ]
    np.testing.assert_allclose(expected[0], one_by_one, rtol=1e-6)
    for transformed in (jax.jit(function), jax.vmap(jax.vmap(function))):
        got = transformed(policy, anchor, where)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
            got,
            expected,
        )
    assert {x.shape for x in jax.tree.leaves(expected)} == {(3, 5)}


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "options", "error", "message"),
    [
        (
            np.zeros((8, 3)),
            {},
            ValueError,
            r"`rewards` needs a last axis of 2 \(chosen, rejected\); got f\d+\[8, 3\]",
        ),
        (np.float32(0), {}, ValueError, r"last axis of 2 .*; got f32\[\]"),
        (np.zeros((8, 3)), {}, ValueError, "more than two responses needs a listwise"),
        (np.zeros(2, int), {}, TypeError, "`rewards` needs floating-point numbers"),
        (
            np.zeros(2),
            {"label_smoothing": 0.6},
            ValueError,
            r"`label_smoothing` must lie in \[0.0, 0.5\] .*; got 0.6",
        ),
        (
            np.zeros(2),
            {"label_smoothing": -0.1},
            ValueError,
            r"`label_smoothing` must lie in \[0.0, 0.5\] .*; got -0.1",
        ),
        (
            np.zeros((4, 2)),
            {"where": np.ones(4)},
            TypeError,
            "`where` is inclusion and needs booleans; got f.*Pass `where > 0`",
        ),
        (
            np.zeros((4, 2)),
            {"where": np.ones((4, 2), bool)},
            ValueError,
            r"broadcasts to \(4,\), that of `rewards`; got bool\[4, 2\]",
        ),
    ],
)
def test_wrong_arguments_are_named(rewards, options, error, message):
    with pytest.raises(error, match=message):
        logistic_loss(rewards, **options)


def test_dpo_names_its_own_arguments():
    with pytest.raises(ValueError, match="`anchor_logps` needs the shape of `logps`"):
        dpo_loss(jnp.zeros((3, 2)), anchor_logps=jnp.zeros((2,)), beta=0.1)
    with pytest.raises(ValueError, match="`beta` must be positive and finite; got 0"):
        dpo_loss(jnp.zeros((3, 2)), anchor_logps=jnp.zeros((3, 2)), beta=0)
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        dpo_loss(jnp.zeros((3, 2)), jnp.zeros((3, 2)), beta=0.1)
