"""Losses of pairs: arithmetic, properties, extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from fixed_input import fixed_logps
from losses.loss_cases import assert_golden, nls, s
from pref_jax import losses
from pref_jax.losses.pairwise import dpo_loss, logistic_loss

# --- golden values --------------------------------------------------------------------

MOVED = {"anchor_logps": [-5.0, -6.5], "beta": 0.5}  # of [-4, -6]: rewards 0.5, 0.25
LOGPS = [-4.0, -6.0]
P, Q = s(1.0), s(0.75)
SLOPE = 0.5 * s(-0.25)  # of DPO on them
G, DG = s(2.0), s(2.0) * s(-2.0) / 0.25  # DiscoPOP at h = 1/2, tau = 1/4
EXO = s(0.5) * s(-0.5) * (math.log(s(0.5) / 0.9) - math.log(s(-0.5) / 0.1))

GOLDENS = [
    ("logistic_loss", [1.0, 0.25], {}, nls(0.75), [-s(-0.75), s(-0.75)]),
    (
        "logistic_loss",
        [1.5, 0.5],
        {"margin": 0.25, "label_smoothing": 0.2},
        0.8 * nls(0.75) + 0.2 * nls(-0.75),
        [-0.8 * s(-0.75) + 0.2 * s(0.75), 0.8 * s(-0.75) - 0.2 * s(0.75)],
    ),
    ("dpo_loss", LOGPS, MOVED, nls(0.25), [-SLOPE, SLOPE]),
    (
        "dpo_loss",
        LOGPS,
        MOVED | {"label_smoothing": 0.3},
        0.7 * nls(0.25) + 0.3 * nls(-0.25),
        [-0.7 * SLOPE + 0.15 * s(0.25), 0.7 * SLOPE - 0.15 * s(0.25)],
    ),
    (
        "robust_loss",
        [1.0, 0.25],
        {"flip_rate": 0.2},
        (0.8 * nls(0.75) - 0.2 * nls(-0.75)) / 0.6,
        [-(0.8 * s(-0.75) + 0.2 * s(0.75)) / 0.6]
        + [(0.8 * s(-0.75) + 0.2 * s(0.75)) / 0.6],
    ),
    ("ipo_loss", [3.0, 0.5], {"beta": 0.1}, 6.25, [-5.0, 5.0]),
    ("ipo_loss", [3.0, 0.5], {"beta": 0.5}, 2.25, [3.0, -3.0]),
    ("hinge_loss", [1.0, 0.5], {"margin": 1.0}, 0.5, [-1.0, 1.0]),
    ("hinge_loss", [2.0, 0.5], {"margin": 1.0}, 0.0, [0.0, 0.0]),
    ("hinge_loss", [1.5, 0.5], {"margin": 1.0}, 0.0, [0.0, 0.0]),
    ("thresholded_loss", [0.5, 0.0], {"threshold": -0.25}, -0.25, [0.0, 0.0]),
    ("thresholded_loss", [0.0, 0.5], {"threshold": -0.25}, 0.5, [-1.0, 1.0]),
    ("thresholded_loss", [0.25, 0.0], {"threshold": -0.25}, -0.25, [0.0, 0.0]),
    ("thresholded_loss", [0.0, 0.5], {"threshold": 0.75}, 0.75, [0.0, 0.0]),
    (
        "length_regularized_loss",
        [1.0, 0.5],
        {"lengths": [7, 3], "alpha": 0.1},
        nls(0.9),
        [-s(-0.9), s(-0.9)],
    ),
    (
        "rpo_loss",
        LOGPS,
        MOVED | {"lengths": [8, 2], "alpha": 0.3},
        nls(0.25) + 0.3 * 0.5,
        [-SLOPE - 0.3 / 8, SLOPE],
    ),
    (
        "reward_aware_loss",
        [1.0, 0.25],
        {"grades": [3.0, 1.0], "eta": 0.5},
        P * math.log(P / Q) + (1 - P) * math.log((1 - P) / (1 - Q)),
        [Q - P, P - Q],
    ),
    (
        "nca_loss",
        [0.5, -1.0],
        {},
        nls(0.5) + nls(-0.5) / 2 + nls(1.0) / 2,
        [-s(-0.5) + s(0.5) / 2, s(-1.0) / 2],
    ),
    (
        "apo_zero_loss",
        [0.5, -1.0],
        {},
        1 - s(0.5) + s(-1.0),
        [-s(0.5) * s(-0.5), s(-1.0) * s(1.0)],
    ),
    (
        "apo_down_loss",
        [0.5, -1.0],
        {},
        s(0.5) + 1 - s(1.5),
        [s(0.5) * s(-0.5) - s(1.5) * s(-1.5), s(1.5) * s(-1.5)],
    ),
    (
        "exo_loss",
        [1.0, 0.5],
        {"label_smoothing": 0.1},
        s(0.5) * math.log(s(0.5) / 0.9) + s(-0.5) * math.log(s(-0.5) / 0.1),
        [EXO, -EXO],
    ),
    ("sppo_loss", [0.3, -0.2], {"beta": 0.5}, 0.49 + 0.64, [-1.4, 1.6]),
    (
        "sppo_loss",
        [0.3, -0.2],
        {"beta": 0.5, "win_rates": [0.75, 0.5]},
        0.04 + 0.04,
        [-0.4, -0.4],
    ),
    (
        "discopop_loss",
        [1.0, 0.5],
        {"tau": 0.25},
        (1 - G) * nls(0.5) + G * math.exp(-0.5),
        [
            DG * (math.exp(-0.5) - nls(0.5)) - (1 - G) * s(-0.5) - G * math.exp(-0.5),
            -DG * (math.exp(-0.5) - nls(0.5)) + (1 - G) * s(-0.5) + G * math.exp(-0.5),
        ],
    ),
    (
        "length_normalized_dpo_loss",
        [-4.0, -9.0],
        {"anchor_logps": [-6.0, -6.0], "lengths": [2, 3], "beta": 0.5},
        nls(1.0),
        [-s(-1.0) * 0.5 / 2, s(-1.0) * 0.5 / 3],
    ),
    (
        "xpo_loss",
        LOGPS,
        MOVED | {"explore": [False, True], "alpha": 0.1},
        nls(0.25) - 0.6,
        [-SLOPE, SLOPE + 0.1],
    ),
]


@pytest.mark.parametrize(
    ("name", "first", "options", "loss", "gradient"),
    GOLDENS,
    ids=[f"{i}-{golden[0]}" for i, golden in enumerate(GOLDENS)],
)
def test_losses_and_gradients_are_arithmetic(name, first, options, loss, gradient):
    assert_golden(name, first, options, loss, gradient)


def test_the_terms_of_a_sum_are_metrics_before_alpha():
    options = {k: jnp.asarray(x) for k, x in MOVED.items() if k != "beta"}
    options |= {"beta": 0.5, "alpha": 0.25}
    _, metrics = losses.rpo_loss(jnp.array(LOGPS), lengths=jnp.array([8, 2]), **options)
    assert float(metrics["loss/preference"]) == pytest.approx(nls(0.25))
    assert float(metrics["loss/nll"]) == 0.5
    _, metrics = losses.xpo_loss(
        jnp.array(LOGPS), explore=jnp.array([True, True]), **options
    )
    assert float(metrics["loss/preference"]) == pytest.approx(nls(0.25))
    assert float(metrics["loss/bonus"]) == -10.0


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


def test_the_policy_gains_by_the_chosen_and_loses_by_the_rejected():
    policy, anchor = np.random.default_rng(0).uniform(-6, 0, (2, 4, 2))

    def total(policy, anchor):
        return dpo_loss(policy, anchor_logps=anchor, beta=0.5)[0].sum()

    gradients = jax.grad(total, argnums=(0, 1))(jnp.array(policy), jnp.array(anchor))
    of_policy, of_anchor = jax.device_get(gradients)
    assert (of_policy[:, 0] < 0).all() and (of_policy[:, 1] > 0).all()
    np.testing.assert_allclose(of_policy[:, 0], -of_policy[:, 1], rtol=1e-6)
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


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "logistic_loss",
            {"margin": np.zeros(3)},
            ValueError,
            r"`margin` needs a shape .* to \(4,\), .* `rewards\[..., 0\]`; got",
        ),
        ("robust_loss", {"flip_rate": 0.5}, ValueError, r"in \[0, 0.5\).*; got 0.5"),
        ("robust_loss", {"flip_rate": -0.1}, ValueError, r"`flip_rate` .*; got -0.1"),
        ("hinge_loss", {"margin": -1.0}, ValueError, "`margin` must be 0 or more"),
        ("thresholded_loss", {"threshold": math.inf}, ValueError, "or -inf; got inf"),
        (
            "length_regularized_loss",
            {"lengths": np.ones((4, 2)), "alpha": -1.0},
            ValueError,
            "`alpha` must be 0 or more, and finite; got -1.0",
        ),
        (
            "reward_aware_loss",
            {"grades": np.ones((4, 2)), "eta": 0.0},
            ValueError,
            "`eta` must be positive and finite; got 0.0",
        ),
        (
            "exo_loss",
            {"label_smoothing": 0.0},
            ValueError,
            "`label_smoothing` must be positive: .* infinite; got 0",
        ),
        ("discopop_loss", {"tau": 0.0}, ValueError, "`tau` must be positive and finit"),
        (
            "discopop_loss",
            {"tau": 1.5},
            ValueError,
            r"`tau` .* \[0.0, 1.0\].*; got 1.5",
        ),
    ],
)
def test_options_out_of_range_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(losses, name)(np.zeros((4, 2), np.float32), **options)


def test_the_options_of_rpo_and_xpo_are_checked():
    logps = np.zeros((4, 2), np.float32)
    options = {"anchor_logps": logps, "beta": 0.1}
    for name, array in (("rpo_loss", "lengths"), ("xpo_loss", "explore")):
        arrays = {array: np.ones((4, 2), bool)}
        with pytest.raises(ValueError, match="`alpha` must be 0 or more"):
            getattr(losses, name)(logps, **options, **arrays, alpha=-0.1)
    with pytest.raises(TypeError, match="`explore` is inclusion and needs booleans"):
        losses.xpo_loss(logps, **options, explore=np.ones((4, 2)), alpha=0.1)


def test_limits_are_allowed():
    """Half the labels flipped leaves nothing to learn; no margin and no bonus are."""
    rewards = np.array([1.0, 0.0], np.float32)
    loss, _ = logistic_loss(rewards, label_smoothing=0.5)
    assert float(loss) == pytest.approx((nls(1.0) + nls(-1.0)) / 2)
    loss, _ = losses.exo_loss(rewards, label_smoothing=0.5)
    p = s(1.0)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert float(loss) == pytest.approx(expected)
    assert float(losses.hinge_loss(rewards, margin=0.0)[0]) == 0.0
    loss, _ = losses.discopop_loss(rewards, tau=1.0)
    expected = s(-1.0) * nls(1.0) + s(1.0) * math.exp(-1.0)
    assert float(loss) == pytest.approx(expected)


# --- what a loss reduces to -----------------------------------------------------------


def of_random_pairs(seed=0, number=6):
    """Policy and anchor logps and rewards of a few pairs."""
    rng = np.random.default_rng(seed)
    policy, anchor = rng.uniform(-9, -1, (2, number, 2)).astype(np.float32)
    return policy, anchor, (0.5 * (policy - anchor)).astype(np.float32)


def assert_equal_in_value_and_gradient(first, second, x, rtol=1e-5):
    """Two functions x -> loss are one, and so are their gradients."""
    got, expected = (
        jax.value_and_grad(lambda x, f=f: (f(x).sum(), f(x)), has_aux=True)(x)
        for f in (first, second)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        got,
        expected,
    )


def test_no_flips_no_length_no_term_and_equal_lengths_are_dpo():
    policy, anchor, rewards = of_random_pairs()
    ragged = np.random.default_rng(1).integers(1, 9, rewards.shape)
    equal = np.full(rewards.shape, 4)
    explore = np.ones(rewards.shape, bool)
    options = {"anchor_logps": anchor, "beta": 0.5}
    for function in (
        lambda x: losses.robust_loss(x, flip_rate=0.0)[0],
        lambda x: losses.length_regularized_loss(x, lengths=ragged, alpha=0.0)[0],
        lambda x: losses.length_regularized_loss(x, lengths=equal, alpha=0.7)[0],
        lambda x: logistic_loss(x, margin=0.0)[0],
    ):
        expected = lambda x: logistic_loss(x)[0]  # noqa: E731
        assert_equal_in_value_and_gradient(function, expected, rewards)
    for function in (
        lambda x: losses.rpo_loss(x, lengths=ragged, alpha=0.0, **options)[0],
        lambda x: losses.xpo_loss(x, explore=explore, alpha=0.0, **options)[0],
        lambda x: losses.length_normalized_dpo_loss(
            x, anchor_logps=anchor, lengths=equal, beta=2.0
        )[0],
    ):
        expected = lambda x: dpo_loss(x, **options)[0]  # noqa: E731
        assert_equal_in_value_and_gradient(function, expected, policy)


def test_a_response_without_tokens_counts_as_one_token():
    """Its log-probability is 0; a division would make it NaN."""
    policy, anchor, _ = of_random_pairs()
    options = {"anchor_logps": anchor, "beta": 0.5}
    for function in (losses.rpo_loss, losses.length_normalized_dpo_loss):
        more = {"alpha": 1.0} if function is losses.rpo_loss else {}
        got, expected = (
            function(policy, lengths=np.full(policy.shape, n), **options, **more)[0]
            for n in (0, 1)
        )
        np.testing.assert_array_equal(got, expected)


def test_the_robust_loss_is_unbiased():
    """Its mean over flipped and kept labels is the logistic loss of the true ones."""
    _, _, rewards = of_random_pairs()
    kept, flipped = (
        losses.robust_loss(x, flip_rate=0.3)[0] for x in (rewards, rewards[:, ::-1])
    )
    mean = 0.7 * kept + 0.3 * flipped
    np.testing.assert_allclose(mean, logistic_loss(rewards)[0], rtol=1e-5)


def test_the_thresholded_loss_is_the_hinge_less_its_margin():
    rewards = np.array([[1.0, 0.0], [0.5, 0.0], [0.25, 0.0], [0.0, 1.0]], np.float32)
    assert_equal_in_value_and_gradient(
        lambda x: losses.thresholded_loss(x, threshold=-0.5)[0],
        lambda x: losses.hinge_loss(x, margin=0.5)[0] - 0.5,
        rewards,
    )


def test_reward_aware_is_zero_at_the_grades_margin_and_grows_into_logistic():
    grades = np.array([[3.0, 1.0], [2.0, 1.5]], np.float32)
    value, gradient = jax.value_and_grad(
        lambda x: losses.reward_aware_loss(x, grades=grades, eta=0.4)[0].sum()
    )(0.4 * grades)
    assert abs(float(value)) < 1e-6 and np.abs(gradient).max() < 1e-6
    _, _, rewards = of_random_pairs(number=2)
    assert (losses.reward_aware_loss(rewards, grades=grades, eta=0.4)[0] > 0).all()
    assert_equal_in_value_and_gradient(
        lambda x: losses.reward_aware_loss(x, grades=grades, eta=1e3)[0],
        lambda x: logistic_loss(x)[0],
        rewards,
    )


def test_exo_is_zero_at_the_log_odds_of_a_kept_label():
    rewards = jnp.array([math.log(0.8 / 0.2), 0.0])
    value, gradient = jax.value_and_grad(
        lambda x: losses.exo_loss(x, label_smoothing=0.2)[0]
    )(rewards)
    assert abs(float(value)) < 1e-6 and np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("marked", [0, 1])
def test_the_bonus_of_xpo_follows_the_mark_and_not_the_label(marked):
    policy, anchor, _ = of_random_pairs()
    mark = np.arange(2) == marked
    options = {"anchor_logps": anchor, "beta": 0.5}

    def bonus(x):
        explored, _ = losses.xpo_loss(x, explore=mark[None], alpha=0.3, **options)
        return (explored - dpo_loss(x, **options)[0]).sum()

    gradient = jax.grad(bonus)(policy)
    expected = np.broadcast_to(0.3 * mark, policy.shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_bonus_stays_with_its_response_when_the_labels_are_swapped():
    policy, anchor, _ = of_random_pairs()
    mark = np.random.default_rng(3).random(policy.shape) < 0.5
    assert mark.any(1).any() and not mark.all()
    metrics = [
        losses.xpo_loss(
            policy[:, order],
            anchor_logps=anchor[:, order],
            explore=mark[:, order],
            beta=0.5,
            alpha=0.3,
        )[1]
        for order in ([0, 1], [1, 0])
    ]
    expected = np.where(mark, policy, 0).sum(1)
    for found in metrics:
        np.testing.assert_allclose(found["loss/bonus"], expected, rtol=1e-6)
