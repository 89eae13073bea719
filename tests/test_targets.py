"""Targets: arithmetic, oracles, what is dropped, no gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loss_oracles
from pref_jax import targets

NAN = math.nan


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    """The normal distribution function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def softmax(values):
    total = sum(math.exp(x) for x in values)
    return [math.exp(x) / total for x in values]


# --- golden values --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grades", "where", "expected"),
    [
        ([3.0, 1.0, 2.0], None, [1.0, 0.0, 0.0]),
        ([3.0, 1.0, 3.0], None, [0.5, 0.0, 0.5]),
        ([2.0, 2.0, 2.0], None, [1 / 3] * 3),
        ([-3.0, -1.0, 9.0], [True, True, False], [0.0, 1.0, 0.0]),
        ([-1.0, -1.0, NAN], [True, True, False], [0.5, 0.5, 0.0]),
        ([1.0, 2.0, 3.0], [False] * 3, [0.0] * 3),
    ],
)
def test_a_hard_target_is_shared_by_the_best_that_are_there(grades, where, expected):
    where = None if where is None else jnp.array(where)
    got = targets.hard(jnp.array(grades), where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_grade_that_is_not_a_number_is_seen():
    for function in (targets.hard, functools.partial(targets.softmax, temperature=1.0)):
        assert np.isnan(function(jnp.array([1.0, NAN]))).all()


def test_a_soft_target_is_the_probability_of_winning():
    got = targets.soft(jnp.array([[2.0, 1.0], [0.0, 3.0]]), temperature=0.5)
    expected = [[sigmoid(2.0), sigmoid(-2.0)], [sigmoid(-6.0), sigmoid(6.0)]]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    alone = targets.soft(
        jnp.array([NAN, 3.0]), temperature=0.5, where=jnp.array([False, True])
    )
    assert alone.tolist() == [0.0, 1.0]


def test_a_softmax_target_is_by_the_exponential_of_the_grade():
    grades = [2 * math.log(1), 2 * math.log(2), 2 * math.log(5)]
    got = targets.softmax(jnp.array(grades), temperature=2.0)
    np.testing.assert_allclose(got, [1 / 8, 2 / 8, 5 / 8], rtol=1e-5)
    got = targets.softmax(
        jnp.array([*grades, NAN]),
        temperature=2.0,
        where=jnp.array([True, False, True, False]),
    )
    np.testing.assert_allclose(got, [1 / 6, 0, 5 / 6, 0], rtol=1e-5)
    # Grades far from 0, and far apart.
    got = targets.softmax(jnp.array([1e4, 1e4, -1e4]), temperature=0.01)
    assert got.tolist() == [0.5, 0.5, 0.0]


def test_smoothing_mixes_with_the_uniform_distribution():
    got = targets.smoothed(jnp.array([1.0, 0.0, 0.0, 0.0]), smoothing=0.2)
    np.testing.assert_allclose(got, [0.85, 0.05, 0.05, 0.05], rtol=1e-6)
    got = targets.smoothed(
        jnp.array([0.25, 0.75, NAN]),
        smoothing=0.4,
        where=jnp.array([True, True, False]),
    )
    np.testing.assert_allclose(got, [0.35, 0.65, 0.0], rtol=1e-6)
    q = jnp.array([0.25, 0.75])
    assert targets.smoothed(q, smoothing=0.0).tolist() == [0.25, 0.75]
    assert targets.smoothed(q, smoothing=1.0).tolist() == [0.5, 0.5]


def of_ranks(ranks, temperature):
    ranks = [min(max(f, 1e-3), 1 - 1e-3) for f in ranks]
    return softmax([math.log(f / (1 - f)) / temperature for f in ranks])


def test_kde_is_the_softmax_of_smoothed_ranks():
    grades, h = [0.0, 1.0, 3.0], 2.0
    ranks = [sum(phi((a - b) / h) for b in grades) / 3 for a in grades]
    got = targets.kde(jnp.array(grades), temperature=0.5, bandwidth=h)
    np.testing.assert_allclose(got, of_ranks(ranks, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("grades", "where", "deviation"),
    [
        ([0.0, 1.0, 3.0], [True] * 3, 1.0),  # |R - 1|: 0, 1, 2
        ([0.0, 1.0, 3.0, 5.0], [True] * 4, 1.5),  # |R - 2|: 1, 1, 2, 3
        ([0.0, 1.0, 9.0, 5.0, 3.0], [True, True, False, True, True], 1.5),
        ([0.0, 1.0, NAN, 3.0], [True, True, False, True], 1.0),
        ([4.0, -2.0], [True, False], 0.0),
    ],
)
def test_the_bandwidth_of_kde_is_silvermans_on_the_median_deviation(
    grades, where, deviation
):
    kept = [x for x, keep in zip(grades, where, strict=True) if keep]
    h = 1.06 * max(1.4826 * deviation, 1e-6) * len(kept) ** -0.2
    ranks = [sum(phi((a - b) / h) for b in kept) / len(kept) for a in kept]
    got = targets.kde(jnp.array(grades), temperature=2.0, where=jnp.array(where))
    np.testing.assert_allclose(
        np.asarray(got)[np.array(where)], of_ranks(ranks, 2.0), rtol=1e-5
    )
    assert not np.asarray(got)[~np.array(where)].any()


def test_the_ranks_of_kde_are_cut_on_both_sides():
    """Of 2000 the highest has a rank of 1 - 1/4000, the lowest of 1/4000."""
    with jax.enable_x64(True):
        grades = jnp.arange(2000.0)
        got = np.asarray(targets.kde(grades, temperature=1.0, bandwidth=1e-3))
    rank = (np.arange(2000) + 0.5) / 2000
    rank = np.clip(rank, 1e-3, 1 - 1e-3)
    odds = rank / (1 - rank)
    np.testing.assert_allclose(got, odds / odds.sum(), rtol=1e-9)


def test_equal_grades_are_equal_under_kde():
    got = targets.kde(jnp.full(4, 7.0), temperature=0.5)
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)


def test_moving_and_scaling_grades_changes_nothing_under_kde():
    grades = jnp.array([0.3, -1.0, 2.0, 0.9])
    got = targets.kde(3 * grades + 7, temperature=0.5)
    np.testing.assert_allclose(got, targets.kde(grades, temperature=0.5), rtol=1e-4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (targets.ndcg_weights, [3 / math.log2(2), 1 / math.log2(3), 0.0, 7 / 2]),
        (targets.reciprocal_rank_weights, [3 / 1, 1 / 2, 0.0, 7 / 3]),
    ],
)
def test_weights_of_items_are_gain_over_discount(function, expected):
    relevance, ranks = jnp.array([2, 1, 0, 3]), jnp.array([1, 2, 4, 3])
    got = function(relevance, ranks=ranks)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_weights_of_positions_are_the_discount_alone():
    got = targets.position_weights(jnp.array([1, 2, 7]))
    np.testing.assert_allclose(got, [1.0, 1 / math.log2(3), 1 / 3], rtol=1e-6)


# --- what all of them share -----------------------------------------------------------

DISTRIBUTIONS = {
    "hard": (targets.hard, loss_oracles.hard, {}),
    "softmax": (targets.softmax, loss_oracles.softmax, {"temperature": 0.7}),
    "kde": (targets.kde, loss_oracles.kde, {"temperature": 0.7}),
    "kde-bandwidth": (
        targets.kde,
        loss_oracles.kde,
        {"temperature": 0.7, "bandwidth": 0.8},
    ),
    "smoothed": (targets.smoothed, loss_oracles.smoothed, {"smoothing": 0.3}),
    "soft": (targets.soft, loss_oracles.soft, {"temperature": 0.7}),
}
KEPT = np.array(
    [[True] * 4, [True, False, True, True], [False, True, True, False]]
    + [[False, False, True, False], [False] * 4]
)


def drawn(name):
    """Grades f32[5, K], which are distributions for `smoothed`; and where."""
    rng = np.random.default_rng(0)
    grades = rng.normal(size=(5, 4)).astype(np.float32)
    where = KEPT
    if name == "smoothed":
        grades = np.where(where, np.exp(grades), 0.0)
        total = grades.sum(-1, keepdims=True)
        grades = (grades / np.where(total == 0, 1, total)).astype(np.float32)
    if name == "soft":
        grades, where = grades[:, :2], where[:, :2]
    return grades, where


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_target_is_the_oracles(name):
    function, oracle, options = DISTRIBUTIONS[name]
    grades, where = drawn(name)
    spoiled = np.where(where, grades, np.nan)
    got = function(jnp.asarray(spoiled), **options, where=where)
    assert got.dtype == jnp.float32
    for values, kept, found in zip(grades, where, got, strict=True):
        expected = oracle(values.tolist(), **options, where=kept.tolist())
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    sums = np.asarray(got).sum(-1)
    np.testing.assert_allclose(sums, where.any(-1), rtol=1e-6)
    assert not np.asarray(got)[~where].any()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_target_has_no_gradient_and_float64_stays(name):
    function, _, options = DISTRIBUTIONS[name]
    grades, where = drawn(name)
    weights = np.arange(grades.size, dtype=np.float32).reshape(grades.shape)
    gradient = jax.grad(
        lambda x: (weights * function(x, **options, where=where)).sum()
    )(jnp.asarray(grades))
    assert not gradient.any()
    with jax.enable_x64(True):
        got = function(jnp.asarray(grades, jnp.float64), **options, where=where)
        assert got.dtype == jnp.float64
        got = np.asarray(got)
    oracle = DISTRIBUTIONS[name][1]
    expected = [
        oracle(x.tolist(), **options, where=w.tolist())
        for x, w in zip(grades.astype(float), where, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_weights_have_no_gradient():
    relevance, ranks = jnp.array([2.0, 1.0]), jnp.array([1.0, 2.0])
    for function in (targets.ndcg_weights, targets.reciprocal_rank_weights):
        grads = jax.grad(lambda r, k, f=function: f(r, ranks=k).sum(), argnums=(0, 1))(
            relevance, ranks
        )
        assert not any(np.asarray(x).any() for x in grads)
    gradient = jax.grad(lambda k: targets.position_weights(k).sum())(ranks)
    assert not gradient.any()


def test_whole_numbers_and_bfloat16_are_widened():
    whole = targets.softmax(jnp.array([1, 2]), temperature=1.0)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(whole, softmax([1, 2]), rtol=1e-6)
    narrow = jnp.array([1.0, 2.5, 4.0], jnp.bfloat16)
    got = targets.kde(narrow, temperature=1.0)
    expected = targets.kde(narrow.astype(jnp.float32), temperature=1.0)
    np.testing.assert_array_equal(got, expected)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: targets.hard(jnp.float32(1.0)),
            ValueError,
            "`grades` needs a last axis of responses; got a number",
        ),
        (
            lambda: targets.smoothed(jnp.float32(1.0), smoothing=0.1),
            ValueError,
            "`targets` needs a last axis of responses; got a number",
        ),
        (
            lambda: targets.position_weights(jnp.float32(1.0)),
            ValueError,
            "`ranks` needs a last axis of responses; got a number",
        ),
        (
            lambda: targets.hard(jnp.zeros(3), where=jnp.ones(3)),
            TypeError,
            "`where` is inclusion and needs booleans",
        ),
        (
            lambda: targets.hard(jnp.zeros(3), where=jnp.ones(2, bool)),
            ValueError,
            r"`where` needs a shape that broadcasts to \(3,\), that of `grades`",
        ),
        (
            lambda: targets.smoothed(
                jnp.zeros(3), smoothing=0.1, where=jnp.ones(2, bool)
            ),
            ValueError,
            r"broadcasts to \(3,\), that of `targets`",
        ),
        (
            lambda: targets.soft(jnp.zeros(3), temperature=1.0),
            ValueError,
            r"`grades` needs a last axis of 2 .*\n.*For a list use `softmax`",
        ),
        (
            lambda: targets.softmax(jnp.zeros(3), temperature=0.0),
            ValueError,
            "`temperature` must be positive and finite; got 0.0",
        ),
        (
            lambda: targets.kde(jnp.zeros(3), temperature=-1.0),
            ValueError,
            "`temperature` must be positive and finite; got -1.0",
        ),
        (
            lambda: targets.kde(jnp.zeros(3), temperature=1.0, bandwidth=0.0),
            ValueError,
            "`bandwidth` must be positive and finite; got 0.0",
        ),
        (
            lambda: targets.smoothed(jnp.zeros(3), smoothing=1.5),
            ValueError,
            r"`smoothing` must lie in \[0.0, 1.0\] .*; got 1.5",
        ),
        (
            lambda: targets.smoothed(jnp.zeros(3), smoothing=-0.5),
            ValueError,
            r"`smoothing` must lie in \[0.0, 1.0\] .*; got -0.5",
        ),
        (
            lambda: targets.ndcg_weights(jnp.zeros(3), ranks=jnp.ones(2)),
            ValueError,
            r"`ranks` needs the shape of `relevance`, f32\[3\]; got f32\[2\]",
        ),
        (
            lambda: targets.reciprocal_rank_weights(jnp.zeros(3), ranks=jnp.ones(2)),
            ValueError,
            r"`ranks` needs the shape of `relevance`, f32\[3\]; got f32\[2\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
