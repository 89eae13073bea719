"""Advantages of groups, episodes and steps; returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import more_loss_oracles as oracles
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
