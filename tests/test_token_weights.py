"""Token values of one's own: targets, sums, means, steps, and weights of tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loss_oracles
from pref_jax import logps

NAN = math.nan
VALUES = jnp.array([[1.0, 2.0, 4.0, NAN], [NAN, 8.0, 16.0, 32.0]])
WHERE = jnp.array([[True, True, True, False], [False, True, True, True]])


def random_tokens(seed=0, shape=(3, 2, 7)):
    rng = np.random.default_rng(seed)
    where = rng.random(shape) < 0.7
    where[0, 0] = False  # a response without tokens
    return rng.normal(size=shape).astype(np.float32), where


def by_response(function, *arrays):
    """A function of one response over the leading axes of arrays."""
    return [function(*rows) for rows in zip(*arrays, strict=True)]


# --- targets of raw logits ------------------------------------------------------------


def test_targets_are_the_next_ids_and_the_last_position_has_none():
    ids = jnp.array([[5, 6, 7, 8], [9, 3, 4, 0]])
    mask = jnp.array([[False, False, True, True], [False, True, True, False]])
    targets, where = logps.shift_targets(ids, mask=mask)
    assert targets.tolist() == [[6, 7, 8, 0], [3, 4, 0, 0]]
    assert where.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert targets.dtype == ids.dtype and where.dtype == bool


def test_padding_on_either_side_gives_the_same_response():
    """Three prompt tokens and two of the response, in rows of seven."""
    logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    ids, mask = np.array([4, 2, 7, 1, 8]), np.array([False, False, False, True, True])
    totals = []
    for before, after in ((0, 2), (2, 0)):
        pad = (before, after)
        targets, where = logps.shift_targets(np.pad(ids, pad), mask=np.pad(mask, pad))
        tokens = logps.token_logps(np.pad(logits, (pad, (0, 0))), targets=targets)
        totals.append(float(logps.response_sum(tokens, where=where)))
    by_hand = sum(
        logits[t, y] - math.log(sum(math.exp(x) for x in logits[t]))
        for t, y in ((2, 1), (3, 8))
    )
    assert totals == pytest.approx([by_hand] * 2, rel=1e-5)


def test_token_logps_are_the_oracles_in_float32_or_wider():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    got = logps.token_logps(logits, targets=targets)
    expected = by_response(
        lambda x, y: loss_oracles.token_logps(x, targets=y), logits, targets
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    narrow = jnp.asarray(logits, jnp.bfloat16)
    got = logps.token_logps(narrow, targets=targets)
    assert got.dtype == jnp.float32
    wide = logps.token_logps(narrow.astype(jnp.float32), targets=targets)
    np.testing.assert_array_equal(got, wide)
    huge = logps.token_logps(jnp.array([1e4, -1e4]), targets=jnp.array(1))
    assert float(huge) == -2e4


# --- sums and means -------------------------------------------------------------------


def test_sums_and_means_are_over_the_tokens_that_count():
    assert logps.response_sum(VALUES, where=WHERE).tolist() == [7.0, 56.0]
    weights = jnp.array([[1.0, 0.5, 0.25, NAN], [NAN, 0.5, 0.0, 2.0]])
    got = logps.response_sum(VALUES, where=WHERE, weights=weights)
    assert got.tolist() == [3.0, 68.0]
    means = logps.response_mean(VALUES, where=WHERE)
    np.testing.assert_allclose(means, [7 / 3, 56 / 3], rtol=1e-6)
    shared = logps.response_sum(VALUES[:, 1:3], where=jnp.array([True, False]))
    assert shared.tolist() == [2.0, 8.0]
    one = logps.response_mean(VALUES[:, 1:3], where=jnp.array([True, False]))
    assert one.tolist() == [2.0, 8.0]
    none = jnp.zeros((2, 4), bool)
    assert logps.response_sum(VALUES, where=none).tolist() == [0.0, 0.0]
    assert logps.response_mean(VALUES, where=none).tolist() == [0.0, 0.0]


def test_weights_of_a_sum_broadcast_and_have_no_gradient():
    def total(values, weights):
        return logps.response_sum(values, where=WHERE, weights=weights).sum()

    weights = jnp.array([2.0, 3.0, 5.0, 7.0])
    gradients = jax.grad(total, argnums=(0, 1))(VALUES, weights)
    np.testing.assert_array_equal(gradients[0], [[2, 3, 5, 0], [0, 3, 5, 7]])
    assert not gradients[1].any()


def test_the_gradient_of_a_mean_is_one_over_the_number_of_tokens():
    gradient = jax.grad(lambda x: logps.response_mean(x, where=WHERE).sum())(VALUES)
    np.testing.assert_allclose(gradient, np.where(WHERE, 1 / 3, 0.0), rtol=1e-6)


# --- steps ----------------------------------------------------------------------------


def test_steps_are_counted_from_one_and_zero_is_none():
    ids = jnp.array([[1, 0, 3, 3], [0, 2, 2, 5]])
    got = logps.step_sum(VALUES, step_ids=ids, num_steps=3, where=WHERE)
    assert got.tolist() == [[1.0, 0.0, 4.0], [0.0, 24.0, 0.0]]
    got = logps.step_mean(VALUES, step_ids=ids, num_steps=3, where=WHERE)
    assert got.tolist() == [[1.0, 0.0, 4.0], [0.0, 12.0, 0.0]]


def test_the_steps_of_one_response_serve_all():
    values, ids = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), jnp.array([2, 1, 2])
    got = logps.step_sum(values, step_ids=ids, num_steps=2)
    assert got.tolist() == [[2.0, 5.0], [16.0, 40.0]]
    got = logps.step_mean(values, step_ids=ids, num_steps=2)
    assert got.tolist() == [[2.0, 2.5], [16.0, 20.0]]
    where = jnp.array([False, True, True])
    got = logps.step_sum(values, step_ids=ids, num_steps=2, where=where)
    assert got.tolist() == [[2.0, 4.0], [16.0, 32.0]]


@pytest.mark.parametrize("name", ["step_sum", "step_mean"])
def test_steps_are_the_oracles(name):
    values, where = random_tokens()
    ids = np.random.default_rng(1).integers(0, 4, values.shape)
    options = {"num_steps": 3}
    got = getattr(logps, name)(values, step_ids=ids, where=where, **options)
    assert got.shape == (3, 2, 3)
    oracle = getattr(loss_oracles, name)
    for index in np.ndindex(3, 2):
        expected = oracle(
            values[index], step_ids=ids[index], where=where[index], **options
        )
        np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["step_sum", "step_mean"])
def test_what_is_not_counted_in_a_step_reaches_no_gradient(name):
    ids = jnp.array([[1, 2, 1, 1], [1, 1, 0, 1]])
    function = functools.partial(
        getattr(logps, name), step_ids=ids, num_steps=2, where=WHERE
    )
    gradient = jax.grad(lambda x: function(x).sum())(VALUES)
    one = 1.0 if name == "step_sum" else 0.5
    np.testing.assert_allclose(gradient, [[one, 1, one, 0], [0, one, 0, one]])


def test_tokens_get_the_value_of_their_step_and_others_zero():
    ids = jnp.array([[1, 0, 3, 3], [0, 2, 2, 5]])
    values = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    got = logps.spread_steps(values, step_ids=ids)
    assert got.tolist() == [[1.0, 0.0, 4.0, 4.0], [0.0, 16.0, 16.0, 0.0]]
    got = logps.spread_steps(values, step_ids=-ids)
    assert not got.any()
    where = ids != 3
    got = logps.spread_steps(values.at[0, 2].set(jnp.nan), step_ids=ids, where=where)
    assert got.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 16.0, 16.0, 0.0]]


def test_the_mean_of_what_was_spread_is_what_there_was():
    rng = np.random.default_rng(3)
    ids = np.concatenate([rng.permutation([1, 2, 3]), rng.integers(0, 4, 4)])
    values = rng.normal(size=(2, 3)).astype(np.float32)
    ids = np.broadcast_to(ids, (2, 7))
    spread = logps.spread_steps(values, step_ids=ids)
    got = logps.step_mean(spread, step_ids=ids, num_steps=3)
    np.testing.assert_allclose(got, values, rtol=1e-6)
    weight = rng.normal(size=(2, 7)).astype(np.float32)
    slope = jax.grad(lambda x: (weight * logps.spread_steps(x, step_ids=ids)).sum())
    expected = logps.step_sum(weight, step_ids=ids, num_steps=3)
    np.testing.assert_allclose(slope(values), expected, rtol=1e-6)


def test_the_turns_of_an_episode_add_up_wherever_they_stand():
    values = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    ids = jnp.array([2, 0, 2, -1, 4, 0])
    got = logps.episode_sum(values, episode_ids=ids, num_episodes=4)
    assert got.tolist() == [34.0, 0.0, 5.0, 0.0]  # -1 and 4 are no episodes
    where = jnp.array([True, True, False, True, True, True])
    spoiled = values.at[2].set(jnp.nan)
    options = {"episode_ids": ids, "num_episodes": 4, "where": where}
    got = logps.episode_sum(spoiled, **options)
    assert got.tolist() == [34.0, 0.0, 1.0, 0.0]
    slope = jax.grad(lambda x: logps.episode_sum(x, **options).sum())(spoiled)
    assert slope.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_mean_over_the_steps_of_an_episode_is_of_those_that_count():
    values = jnp.array([1.0, 2.0, jnp.nan, 8.0])
    ids, where = jnp.array([2, 0, 2, 2]), jnp.array([True, True, False, True])
    options = {"episode_ids": ids, "num_episodes": 4, "where": where}
    assert logps.episode_mean(values, **options).tolist() == [2.0, 0.0, 4.5, 0.0]


def test_sums_of_bfloat16_are_of_float32():
    ones = jnp.ones(1000, jnp.bfloat16)
    ids, all_there = jnp.zeros(1000, int), jnp.ones(1000, bool)
    for total in (
        logps.episode_sum(ones, episode_ids=ids, num_episodes=1)[0],
        logps.step_sum(ones, step_ids=ids + 1, num_steps=1)[0],
        logps.response_sum(ones, where=all_there),
    ):
        assert (total, total.dtype) == (1000.0, jnp.float32)
    one = logps.spread_steps(ones[:1], step_ids=ids + 1)
    assert (one.sum(), one.dtype) == (1000.0, jnp.float32)


# --- weights --------------------------------------------------------------------------


def test_tokens_beyond_the_shorter_response_count_alpha():
    where = jnp.array(
        [
            [[False, True, True, True, True], [False, False, True, True, False]],
            [[True, False, False, False, False], [True, True, False, True, True]],
        ]
    )
    got = logps.length_desensitized_weights(where, alpha=0.25)
    expected = [
        [[0, 1, 1, 0.25, 0.25], [0, 0, 1, 1, 0]],
        [[1, 0, 0, 0, 0], [1, 0.25, 0, 0.25, 0.25]],
    ]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.float32
    got = logps.length_desensitized_weights(where, alpha=1.0)
    np.testing.assert_array_equal(got, where.astype(jnp.float32))
    got = logps.length_desensitized_weights(where, alpha=0.0)
    np.testing.assert_array_equal(got, np.array(expected) == 1)


def test_pairs_may_have_any_leading_axes():
    _, where = random_tokens(shape=(3, 4, 2, 7))
    got = logps.length_desensitized_weights(where, alpha=0.4)
    for index in np.ndindex(3, 4):
        alone = logps.length_desensitized_weights(where[index], alpha=0.4)
        np.testing.assert_array_equal(got[index], alone)
        expected = loss_oracles.length_desensitized_weights(where[index], alpha=0.4)
        np.testing.assert_allclose(alone, expected, rtol=1e-6)


def test_length_desensitized_weights_are_the_oracles():
    _, where = random_tokens()
    got = logps.length_desensitized_weights(where, alpha=0.4)
    expected = [loss_oracles.length_desensitized_weights(w, alpha=0.4) for w in where]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_likely_response_has_a_large_weight_under_wpo():
    tokens = jnp.array([[-1.0, -3.0, NAN], [-1.0, -1.0, -4.0], [NAN, NAN, NAN]])
    log_sum_sq = jnp.array([[-2.0, -2.5, NAN], [-2.0, -2.0, -2.0], [NAN, NAN, NAN]])
    where = jnp.array([[True, True, False], [True, True, True], [False] * 3])
    got = logps.wpo_weights(tokens, log_sum_sq=log_sum_sq, where=where)
    expected = [math.exp((1.0 - 0.5) / 2), math.exp((1 + 1 - 2) / 3), 1.0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_weights_of_wpo_are_the_oracles_and_have_no_gradient():
    tokens, where = random_tokens()
    log_sum_sq, _ = random_tokens(1)

    def total(tokens, log_sum_sq):
        weights = logps.wpo_weights(tokens, log_sum_sq=log_sum_sq, where=where)
        return weights.sum(), weights

    gradients, got = jax.grad(total, argnums=(0, 1), has_aux=True)(tokens, log_sum_sq)
    assert not any(np.asarray(x).any() for x in gradients)
    for index in np.ndindex(3, 2):
        expected = loss_oracles.wpo_weights(
            tokens[index], log_sum_sq=log_sum_sq[index], where=where[index]
        )
        assert float(got[index]) == pytest.approx(expected, rel=1e-5)


def test_a_policy_that_is_sure_of_every_token_has_a_weight_of_one():
    """log p = 0 and sum p^2 = 1; so has one that is uniform: both are log 1 / V."""
    where = jnp.ones((2, 4), bool)
    uniform = jnp.array([[0.0] * 4, [-math.log(50)] * 4])
    got = logps.wpo_weights(uniform, log_sum_sq=uniform, where=where)
    assert got.tolist() == [1.0, 1.0]


# --- errors ---------------------------------------------------------------------------

ZEROS, ALL = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: logps.shift_targets(np.zeros((2, 3), int), mask=np.ones((2, 3))),
            TypeError,
            "`mask` is inclusion and needs booleans",
        ),
        (
            lambda: logps.shift_targets(np.zeros((2, 3), int), mask=ALL[0]),
            ValueError,
            r"`mask` needs the shape of `ids`, i\d+\[2, 3\]; got bool\[3\]",
        ),
        (
            lambda: logps.token_logps(np.zeros((3, 5), int), targets=np.zeros(3, int)),
            TypeError,
            "`logits` needs floating-point numbers",
        ),
        (
            lambda: logps.token_logps(np.zeros((3, 5)), targets=np.zeros(2, int)),
            ValueError,
            r"`targets` needs the shape of `logits`",
        ),
        (
            lambda: logps.response_sum(ZEROS, where=ALL, weights=np.ones(2)),
            ValueError,
            r"`weights` needs a shape that broadcasts to \(2, 3\)",
        ),
        (
            lambda: logps.response_mean(ZEROS, where=np.ones((2, 3))),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: logps.step_sum(ZEROS, step_ids=np.ones(2, int), num_steps=1),
            ValueError,
            r"`step_ids` needs a shape that broadcasts to \(2, 3\)",
        ),
        (
            lambda: logps.step_mean(
                ZEROS, step_ids=np.ones(3, int), num_steps=1, where=np.ones(3)
            ),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: logps.step_sum(
                ZEROS, step_ids=np.ones(3, int), num_steps=1, where=ALL[:, :2]
            ),
            ValueError,
            r"`where` needs a shape that broadcasts to \(2, 3\), that of `token_val",
        ),
        (
            lambda: logps.spread_steps(ZEROS, step_ids=np.ones(3, int)),
            ValueError,
            r"need the same leading axes; got f32\[2, 3\] and i\d+\[3\]",
        ),
        (
            lambda: logps.spread_steps(ZEROS, step_ids=ZEROS),
            TypeError,
            r"`step_ids` needs integers; got f32\[2, 3\]",
        ),
        (
            lambda: logps.step_sum(ZEROS, step_ids=ZEROS, num_steps=1),
            TypeError,
            r"`step_ids` needs integers; got f32\[2, 3\]",
        ),
        (
            lambda: logps.spread_steps(ZEROS[0], step_ids=np.int32(1)),
            ValueError,
            r"need the same leading axes; got f32\[3\] and i32\[\]",
        ),
        (
            lambda: logps.spread_steps(np.float32(0), step_ids=np.ones(3, int)),
            ValueError,
            r"need the same leading axes; got f32\[\] and i\d+\[3\]",
        ),
        (
            lambda: logps.spread_steps(
                ZEROS, step_ids=np.ones((2, 4), int), where=np.ones((2, 3), bool)
            ),
            ValueError,
            r"`where` needs a shape that broadcasts to \(2, 4\), that of `step_ids`",
        ),
        (
            lambda: logps.spread_steps(np.float32(0), step_ids=np.int32(1)),
            ValueError,
            r"need the same leading axes; got f32\[\] and i32\[\]",
        ),
        (
            lambda: logps.spread_steps(
                ZEROS, step_ids=np.ones((2, 4), int), where=np.ones((2, 4))
            ),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: logps.episode_sum(ZEROS, episode_ids=ZEROS, num_episodes=1),
            ValueError,
            r"`values` needs one axis; got f32\[2, 3\]",
        ),
        (
            lambda: logps.episode_sum(
                ZEROS[0], episode_ids=np.ones(2, int), num_episodes=1
            ),
            ValueError,
            "`episode_ids` needs the shape of `values`",
        ),
        (
            lambda: logps.episode_sum(ZEROS[0], episode_ids=ZEROS[0], num_episodes=1),
            TypeError,
            r"`episode_ids` needs integers; got f32\[3\]",
        ),
        (
            lambda: logps.episode_sum(
                ZEROS[0],
                episode_ids=np.ones(3, int),
                num_episodes=1,
                where=np.ones(3),
            ),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: logps.episode_sum(
                ZEROS[0], episode_ids=np.ones(3, int), num_episodes=1, where=ALL
            ),
            ValueError,
            r"`where` needs a shape that broadcasts to \(3,\), that of `values`",
        ),
        (
            lambda: logps.length_desensitized_weights(np.ones((2, 3)), alpha=0.5),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: logps.length_desensitized_weights(np.ones((3, 3), bool), alpha=0.5),
            ValueError,
            r"`where` needs the shape \[..., 2, T\] .*; got bool\[3, 3",
        ),
        (
            lambda: logps.length_desensitized_weights(np.ones(2, bool), alpha=0.5),
            ValueError,
            r"`where` needs the shape \[..., 2, T\] .*; got bool\[2\]",
        ),
        (
            lambda: logps.length_desensitized_weights(ALL, alpha=1.5),
            ValueError,
            r"`alpha` must lie in \[0.0, 1.0\] .*; got 1.5",
        ),
        (
            lambda: logps.length_desensitized_weights(ALL, alpha=-0.5),
            ValueError,
            r"`alpha` must lie in \[0.0, 1.0\] .*; got -0.5",
        ),
        (
            lambda: logps.wpo_weights(ZEROS, log_sum_sq=ZEROS[0], where=ALL),
            ValueError,
            r"`log_sum_sq` needs the shape of `token_logps`",
        ),
        (
            lambda: logps.wpo_weights(ZEROS, log_sum_sq=ZEROS, where=np.ones((2, 3))),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
