"""Advantages, the clipped surrogate, a critic, estimates of a KL, two passes."""

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

KEPT = np.array(
    [
        [True, True, True, True],
        [True, False, True, True],
        [False, True, False, False],
        [False, False, False, False],
    ]
)
IDS = np.array([[1, 1, 2, 1], [3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 4, 4]])
VALUES = np.random.default_rng(9).normal(size=KEPT.shape).astype(np.float32)

# Name -> what its rows take beside the rewards: options, and arrays of their shape.
OF_ROWS = {
    "group_advantages": ({"epsilon": 0.01}, {}),
    "centered_advantages": ({}, {}),
    "leave_one_out_advantages": ({}, {}),
    "cluster_advantages": ({}, {"cluster_ids": IDS}),
    "discounted_returns": ({"discount": 0.9}, {}),
    "gae": ({"discount": 0.9, "gae_lambda": 0.7}, {"values": VALUES}),
}
every_row = pytest.mark.parametrize("name", OF_ROWS)
GROUPED = ["group_advantages", "centered_advantages", "leave_one_out_advantages"]


def rewards(seed=0, shape=KEPT.shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(name, rewards, where=None):
    """An advantage of rewards; of `gae`, advantages and returns in one array."""
    options, arrays = OF_ROWS[name]
    found = getattr(losses, name)(rewards, where=where, **options, **arrays)
    return jnp.stack(found) if isinstance(found, tuple) else found


def oracle(name, rewards, where):
    options, arrays = OF_ROWS[name]
    rows = []
    for i, row in enumerate(rewards):
        of_row = {k: x[i] for k, x in arrays.items()}
        function = getattr(oracles, name)
        rows.append(function(row, where=where[i], **options, **of_row))
    rows = np.array(rows)
    return np.moveaxis(rows, 1, 0) if name == "gae" else rows


# --- what holds for all ---------------------------------------------------------------


@every_row
def test_advantages_are_the_oracles(name):
    for where in (KEPT, np.ones_like(KEPT)):
        expected = oracle(name, rewards(), where)
        np.testing.assert_allclose(
            call(name, rewards(), where), expected, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(
        call(name, rewards()), call(name, rewards(), np.ones_like(KEPT))
    )
    with jax.enable_x64(True):
        found = call(name, jnp.asarray(rewards(), jnp.float64), KEPT)
        assert found.dtype == jnp.float64
    expected = oracle(name, rewards().astype(float), KEPT)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@every_row
def test_what_is_dropped_is_zero_and_changes_nothing_whatever_it_holds(name):
    expected = call(name, rewards(), KEPT)
    for value in (np.nan, np.inf, 1e30):
        found = call(name, np.where(KEPT, rewards(), value), KEPT)
        np.testing.assert_array_equal(found, expected)
    assert not np.asarray(expected)[..., ~KEPT].any()


@every_row
def test_advantages_have_no_gradient(name):
    gradient = jax.grad(lambda x: call(name, x, KEPT).sum())
    assert not gradient(jnp.asarray(rewards())).any()


@every_row
def test_jit_and_bfloat16_give_the_same_and_rows_do_not_meet(name):
    expected = call(name, rewards(), KEPT)
    jitted = jax.jit(functools.partial(call, name))(rewards(), KEPT)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5, atol=1e-6)
    narrow = jnp.asarray(rewards(), jnp.bfloat16)
    found = call(name, narrow, KEPT)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, call(name, narrow.astype(jnp.float32), KEPT))
    other = rewards()
    other[1:] += 7.0
    found = call(name, other, KEPT)
    np.testing.assert_array_equal(found[..., 0, :], expected[..., 0, :])


@every_row
def test_wrong_rewards_and_where_are_named(name):
    with pytest.raises(TypeError, match=r"`re\w+` needs floating-point numbers"):
        call(name, np.ones(KEPT.shape, int))
    with pytest.raises(TypeError, match="`where` is inclusion and needs booleans"):
        call(name, rewards(), KEPT.astype(float))
    with pytest.raises(ValueError, match="`where` needs a shape that broadcasts to"):
        call(name, rewards(), np.ones((5, 4), bool))


# --- groups ---------------------------------------------------------------------------


def test_advantages_of_a_group_by_hand():
    group = jnp.array([3.0, 0.0, 0.0])
    found = losses.centered_advantages(group)
    np.testing.assert_allclose(found, [2.0, -1.0, -1.0])
    found = losses.group_advantages(group, epsilon=1e-6)  # a deviation of sqrt(6 / 2)
    np.testing.assert_allclose(found, np.array([2.0, -1.0, -1.0]) / 3**0.5, rtol=1e-5)
    found = losses.leave_one_out_advantages(group)
    np.testing.assert_allclose(found, [3.0, -1.5, -1.5])


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_has_advantages_that_add_up_to_zero(name):
    total = np.asarray(call(name, rewards(), KEPT)).sum(-1)
    np.testing.assert_allclose(total, np.zeros(4), atol=1e-5)


@pytest.mark.parametrize("equal", [0.1, 0.7, 123.4, -3e7])
@pytest.mark.parametrize("number", [1, 7])
def test_equal_rewards_have_advantages_of_exactly_zero(equal, number):
    """The mean of equal numbers is rounded: divided by epsilon it would be noise."""
    group = jnp.full((2, 10), equal)
    where = np.arange(10) < number
    assert not losses.group_advantages(group, where=where).any()
    assert not losses.group_advantages(group).any()
    assert not losses.step_advantages(group, where=where).any()
    mixed = jnp.where(where, group, 5.0)  # what is not there is not compared
    assert not losses.group_advantages(mixed, where=where).any()


@pytest.mark.parametrize("value", [0.1, 0.7, 9.9, 1000.1])
def test_rewards_of_equals_leave_no_rounding_to_be_amplified(value):
    given = np.full((3, 8), value, np.float32) * np.array([[1], [2], [3]], np.float32)
    ids = np.zeros((3, 8), int)
    for found in (
        losses.centered_advantages(given),
        losses.leave_one_out_advantages(given),
        losses.cluster_advantages(given, cluster_ids=ids),
        losses.whitened_advantages(losses.centered_advantages(given)),
    ):
        assert not found.any()


@pytest.mark.parametrize("name", GROUPED)
def test_two_responses_are_a_group(name):
    found = getattr(losses, name)(
        jnp.array([3.0, 1.0, jnp.nan]), where=jnp.array([True, True, False])
    )
    one = {"group_advantages": 2**-0.5, "centered_advantages": 1.0}.get(name, 2.0)
    np.testing.assert_allclose(found, [one, -one, 0.0], rtol=1e-5)


def test_leaving_one_out_is_centring_times_n_over_n_minus_1():
    found = losses.leave_one_out_advantages(rewards(), where=KEPT)
    n = KEPT.sum(-1, keepdims=True)
    scaled = (
        losses.centered_advantages(rewards(), where=KEPT) * n / np.maximum(n - 1, 1)
    )
    np.testing.assert_allclose(found, scaled, rtol=1e-6)


def test_standardised_rewards_have_a_deviation_of_one_and_no_unit():
    given = rewards(3, (5, 6))
    found = np.asarray(losses.group_advantages(given, epsilon=1e-6))
    np.testing.assert_allclose(found.std(-1, ddof=1), np.ones(5), rtol=1e-5)
    scaled = losses.group_advantages(100 * given + 7, epsilon=1e-6)
    np.testing.assert_allclose(scaled, found, rtol=1e-3, atol=1e-5)


def test_steps_are_standardised_over_all_episodes_of_a_group():
    given, where = (
        rewards(4, (2, 3, 4)),
        np.random.default_rng(5).random((2, 3, 4)) < 0.6,
    )
    spoiled = np.where(where, given, np.nan)
    found = losses.step_advantages(spoiled, where=where, epsilon=0.01)
    expected = [
        oracles.step_advantages(r, where=w, epsilon=0.01)
        for r, w in zip(given, where, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    flat = losses.group_advantages(
        given.reshape(2, 12), where=where.reshape(2, 12), epsilon=0.01
    )
    np.testing.assert_allclose(found.reshape(2, 12), flat, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"`step_rewards` needs at least 2 axes; got f"
    ):
        losses.step_advantages(np.zeros(3, np.float32))


def test_below_the_floor_steps_say_nothing():
    noise = 1e-5 * rewards(6, (2, 3, 4))
    given = np.stack([noise[0], rewards(7, (3, 4))])
    found = losses.step_advantages(given, floor=1e-4)
    assert not found[0].any()
    np.testing.assert_array_equal(found[1], losses.step_advantages(given)[1])
    assert np.abs(losses.step_advantages(given)[0]).max() > 0.5
    where = np.ones((3, 4), bool)
    where[1, 2] = False
    spoiled = np.where(where, noise[0], 7.0)
    assert not losses.step_advantages(spoiled, where=where, floor=1e-4).any()
    at_the_floor = jnp.array([[-0.5, 0.25]])
    assert losses.step_advantages(at_the_floor, floor=0.5).all()
    with pytest.raises(ValueError, match="`floor` must be 0 or more"):
        losses.step_advantages(given, floor=-1.0)


def test_the_advantage_of_a_step_is_its_episodes_and_alpha_times_its_own():
    episodes, steps = jnp.array([1.0, -2.0]), jnp.array([[0.5, 4.0], [3.0, jnp.nan]])
    where = jnp.array([[True, True], [True, False]])

    def call(episodes, steps):
        return losses.combined_advantages(
            episodes, step_advantages=steps, alpha=0.5, where=where
        )

    assert call(episodes, steps).tolist() == [[1.25, 3.0], [-0.5, 0.0]]
    options = {"step_advantages": steps[None], "where": where}
    found = losses.combined_advantages(episodes[None], alpha=1.0, **options)
    assert found.tolist() == [[[1.5, 5.0], [1.0, 0.0]]]
    slopes = jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1))(episodes, steps)
    assert not any(slope.any() for slope in slopes)
    narrow = call(episodes.astype(jnp.bfloat16), steps.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    assert narrow.tolist() == [[1.25, 3.0], [-0.5, 0.0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "`alpha` must be 0 or more"),
        ({"step_advantages": np.ones(3, np.float32)}, ValueError, "at least 2 axes"),
        (
            {"step_advantages": np.ones((3, 2), np.float32)},
            ValueError,
            r"`episode_advantages` needs the axes of `step_advantages` but the last, "
            r"\(3,\); got f32\[2\]",
        ),
        (
            {"step_advantages": np.ones((1, 2), np.float32)},
            ValueError,
            r"but the last, \(1,\); got f32\[2\]",
        ),
        (
            {"step_advantages": np.ones((2, 2), int)},
            TypeError,
            "`step_advantages` needs floating-point",
        ),
        ({"where": np.ones((2, 2))}, TypeError, "`where` is inclusion and needs"),
    ],
)
def test_wrong_advantages_of_steps_are_named(changes, error, message):
    options = {"step_advantages": np.ones((2, 2), np.float32), "alpha": 1.0} | changes
    with pytest.raises(error, match=message):
        losses.combined_advantages(np.ones(2, np.float32), **options)
    with pytest.raises(TypeError, match="`episode_advantages` needs floating-point"):
        losses.combined_advantages(
            np.ones(2, int), step_advantages=np.ones((2, 2), np.float32), alpha=1.0
        )


@pytest.mark.parametrize("name", ["group_advantages", "step_advantages"])
@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_epsilon_is_positive(name, epsilon):
    with pytest.raises(ValueError, match="`epsilon` must be positive and finite"):
        getattr(losses, name)(rewards(), epsilon=epsilon)


def test_by_default_epsilon_is_of_no_account_beside_usual_rewards():
    given = jnp.array([[0.0, 1.0, 1.0, 0.0]])
    expected = np.array([[-1, 1, 1, -1]]) * 0.5 * 3**0.5
    for name in ("group_advantages", "step_advantages"):
        found = getattr(losses, name)(given)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["group_advantages", "discounted_returns"])
def test_a_number_is_no_group(name):
    with pytest.raises(
        ValueError, match=r"`rewards` needs at least 1 axes; got f32\[\]"
    ):
        call(name, np.float32(0.0))


def test_a_group_of_no_one_has_no_advantages():
    assert losses.group_advantages(np.zeros((2, 0), np.float32)).shape == (2, 0)
    found = losses.step_advantages(np.zeros((2, 3, 0), np.float32))
    assert found.shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros(3, int), ValueError, r"`cluster_ids` needs a shape that broadcasts"),
        (np.zeros(4), TypeError, r"`cluster_ids` needs integers; got f32\[4\]"),
    ],
)
def test_wrong_clusters_are_named(ids, error, message):
    with pytest.raises(error, match=message):
        losses.cluster_advantages(rewards(), cluster_ids=ids)


def test_advantages_promote_nothing_by_themselves():
    """Counts are of the type of the rewards, and numbers of NumPy do not widen them."""
    with jax.numpy_dtype_promotion("strict"):
        for name in GROUPED:
            assert call(name, jnp.asarray(rewards()), KEPT).dtype == jnp.float32
    with jax.enable_x64(True):
        options = {"discount": np.float64(0.9), "gae_lambda": np.float64(0.5)}
        found, _ = losses.gae(rewards(), values=VALUES, **options)
        assert found.dtype == jnp.float32


def test_one_cluster_is_the_whole_group_and_a_cluster_of_one_is_zero():
    found = losses.cluster_advantages(rewards(), cluster_ids=np.array(3), where=KEPT)
    expected = losses.centered_advantages(rewards(), where=KEPT)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found = losses.cluster_advantages(rewards(), cluster_ids=np.arange(4))
    assert not found.any()


# --- returns --------------------------------------------------------------------------


def test_returns_by_hand_pass_over_what_is_not_there():
    found = losses.discounted_returns(
        jnp.array([1.0, jnp.nan, 2.0, 4.0]),
        discount=0.5,
        where=jnp.array([True, False, True, True]),
    )
    np.testing.assert_array_equal(found, [1 + 0.5 * 4, 0.0, 2 + 0.5 * 4, 4.0])


def test_lists_of_any_shape_have_returns_and_advantages():
    given = rewards(8, (3, 5))
    found = losses.discounted_returns(given, discount=0.9)
    advantages, _ = losses.gae(
        given, values=given, discount=0.9, gae_lambda=0.7, last_value=given[:, 0]
    )
    for i, row in enumerate(given):
        alone = losses.discounted_returns(row, discount=0.9)
        np.testing.assert_allclose(found[i], alone, rtol=1e-6)
        alone, _ = losses.gae(
            row, values=row, discount=0.9, gae_lambda=0.7, last_value=row[0]
        )
        np.testing.assert_allclose(advantages[i], alone, rtol=1e-5, atol=1e-6)


def test_gae_by_hand():
    """delta = 1 + 1/2 * 2 - 1 = 1 and 3 + 1/2 * 6 - 2 = 4; a decay of 1/4."""
    advantages, returns = losses.gae(
        jnp.array([1.0, 3.0]),
        values=jnp.array([1.0, 2.0]),
        discount=0.5,
        gae_lambda=0.5,
        last_value=6.0,
    )
    np.testing.assert_array_equal(advantages, [1 + 4 / 4, 4.0])
    np.testing.assert_array_equal(returns, [3.0, 6.0])


def test_gae_with_a_lambda_of_one_is_the_return_less_the_value():
    options = {"discount": 0.9, "where": KEPT}
    advantages, returns = losses.gae(
        rewards(), values=VALUES, gae_lambda=1.0, **options
    )
    expected = losses.discounted_returns(rewards(), **options)
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)
    expected = np.where(KEPT, expected - VALUES, 0.0)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_gae_with_a_lambda_of_zero_is_one_step():
    advantages, _ = losses.gae(
        rewards(), values=VALUES, discount=0.9, gae_lambda=0.0, last_value=2.0
    )
    after = np.concatenate([VALUES[:, 1:], np.full((4, 1), 2.0)], -1)
    expected = rewards() + 0.9 * after - VALUES
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_the_last_value_is_that_of_each_episode():
    last = np.array([1.0, -1.0, 0.0, 2.0], np.float32)
    options = {"discount": 0.9, "gae_lambda": 0.7}
    found = losses.gae(rewards(), values=VALUES, last_value=last, where=KEPT, **options)
    for i in range(4):
        expected = oracles.gae(
            rewards()[i], values=VALUES[i], last_value=last[i], where=KEPT[i], **options
        )
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_shares_are_shares_and_values_are_of_the_shape(wrong):
    for name in ("discount", "gae_lambda"):
        options = {"discount": 1.0, "gae_lambda": 1.0} | {name: wrong}
        with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0.0, 1.0\]"):
            losses.gae(rewards(), values=VALUES, **options)
    with pytest.raises(ValueError, match=r"`discount` must lie in \[0.0, 1.0\]"):
        losses.discounted_returns(rewards(), discount=wrong)
    with pytest.raises(ValueError, match="`values` needs the shape of `rewards`"):
        losses.gae(rewards(), values=VALUES[0], discount=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"`last_value` needs a shape .* to \(4,\)"):
        losses.gae(
            rewards(),
            values=VALUES,
            discount=1.0,
            gae_lambda=1.0,
            last_value=np.zeros(3),
        )


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
    given = rewards()
    found = losses.sequence_log_ratios(np.where(KEPT, given, np.nan), where=KEPT)
    expected = [
        oracles.sequence_log_ratios(r, where=w)
        for r, w in zip(given, KEPT, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(lambda x: losses.sequence_log_ratios(x, where=KEPT).sum())
    share = KEPT / np.maximum(KEPT.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(gradient(jnp.asarray(given)), share, rtol=1e-6)


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
    given = np.where(KEPT, rewards(), np.nan)
    value, gradient = function(given), jax.grad(lambda x: function(x).sum())(given)
    np.testing.assert_array_equal(value, function(rewards()))
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
