"""Rankings against graded relevance: oracles, ties by brute force, lists of nothing."""

import itertools
import math

import numpy as np
import pytest

import more_loss_oracles
from pref_jax.evals.ranking import (
    mean_relevance,
    ndcg,
    recall,
    reciprocal_rank,
    win_mass,
)

MEASURES = {
    "ndcg": (ndcg, {"k": 3}),
    "recall": (recall, {"k": 2}),
    "mean_relevance": (mean_relevance, {"k": 3}),
    "reciprocal_rank": (reciprocal_rank, {}),
}
every_measure = pytest.mark.parametrize("name", MEASURES)


def test_a_list_by_hand():
    """Ranked 2, 0, 3 with relevances 1, 3, 0: gains 1, 7, 0."""
    scores, relevance = [0.5, -1.0, 2.0, 0.1], [3, 0, 1, 0]
    found = 1 / math.log2(2) + 7 / math.log2(3)
    ideal = 7 / math.log2(2) + 1 / math.log2(3)
    assert ndcg(scores, relevance, k=2) == pytest.approx(found / ideal)
    assert ndcg(scores, relevance, k=1) == pytest.approx(1 / 7)
    assert recall(scores, relevance, k=1) == 0.5
    assert recall(scores, relevance, k=9) == 1.0
    assert mean_relevance(scores, relevance, k=2) == 2.0
    assert reciprocal_rank(scores, relevance) == 1.0
    assert reciprocal_rank(scores, [0, 1, 0, 0]) == 0.25


@every_measure
def test_without_ties_measures_are_the_oracles(name):
    function, options = MEASURES[name]
    oracle = getattr(more_loss_oracles, name)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 6))
    relevance = rng.integers(0, 4, (40, 6))
    relevance[:, 2] = np.maximum(relevance[:, 2], 1)
    where = rng.random((40, 6)) < 0.7
    where[:, 2] = True
    expected = [
        oracle(*row, where=kept, **options)
        for *row, kept in zip(scores, relevance, where, strict=True)
    ]
    got = function(scores, relevance, where=where, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    shaped = [x.reshape(5, 8, 6) for x in (scores, relevance, where)]
    got = function(*shaped[:2], where=shaped[2], **options)
    assert got.shape == (5, 8)
    np.testing.assert_allclose(got.ravel(), expected, rtol=1e-12)


@every_measure
def test_a_tie_is_the_mean_over_all_orders_of_the_items(name):
    function, options = MEASURES[name]
    oracle = getattr(more_loss_oracles, name)
    rng = np.random.default_rng(1)
    for _ in range(12):
        scores, relevance = rng.integers(0, 3, 5), rng.integers(0, 3, 5)
        relevance[rng.integers(5)] = 1
        orders = map(list, itertools.permutations(range(5)))
        expected = np.mean(
            [oracle(scores[order], relevance[order], **options) for order in orders]
        )
        got = function(scores, relevance, **options)
        assert got == pytest.approx(expected, rel=1e-12)


@every_measure
def test_ties_of_short_lists_are_those_of_each_list_alone(name):
    function, options = MEASURES[name]
    rng = np.random.default_rng(3)
    scores, relevance = rng.integers(0, 3, (2, 9, 6))
    where = rng.random((9, 6)) < 0.6
    got = function(scores, relevance, where=where, **options)
    for value, score, grade, kept in zip(got, scores, relevance, where, strict=True):
        alone = function(score[kept], grade[kept], **options)
        np.testing.assert_allclose(value, alone, rtol=1e-12)


def test_the_most_relevant_item_has_a_finite_gain():
    assert ndcg([1.0, 0.0], [1000, 999], k=2) == 1.0


@every_measure
def test_items_that_are_not_there_change_nothing_whatever_they_hold(name):
    function, options = MEASURES[name]
    scores = np.array([2.0, np.nan, 1.0, np.inf])
    relevance = np.array([0.0, -3.0, 2.0, np.nan])
    where = np.array([True, False, True, False])
    got = function(scores, relevance, where=where, **options)
    assert got == function(scores[where], relevance[where], **options)


@every_measure
def test_a_list_without_a_relevant_item_is_not_counted(name):
    function, options = MEASURES[name]
    got = function([[2.0, 1.0], [2.0, 1.0]], [[0, 0], [1, 0]], **options)
    assert np.isfinite(got[1])
    if name == "mean_relevance":
        assert got[0] == 0.0
        got = function([2.0], [1.0], where=np.array([False]), **options)
        assert np.isnan(got)
    else:
        assert np.isnan(got[0])


@every_measure
def test_the_best_order_is_best_and_a_shift_of_scores_changes_nothing(name):
    function, options = MEASURES[name]
    relevance = [3, 2, 1, 0]
    best = function([4.0, 3.0, 2.0, 1.0], relevance, **options)
    for order in itertools.permutations([4.0, 3.0, 2.0, 1.0]):
        got = function(order, relevance, **options)
        assert got <= best
        moved = [2 * x - 7 for x in order]
        assert function(moved, relevance, **options) == got
    if name in ("ndcg", "reciprocal_rank"):
        assert best == 1.0


@pytest.mark.parametrize("function", [ndcg, recall, mean_relevance])
def test_no_measure_counts_fewer_ranks_than_one(function):
    with pytest.raises(ValueError, match="`k` must be an integer of 1 or more; got 0"):
        function([1.0, 0.0], [1, 0], k=0)


@every_measure
def test_a_list_of_one_item_is_a_list(name):
    function, options = MEASURES[name]
    assert function([0.3], [1], **options) == 1.0
    there = np.array([True, False])
    assert function([0.3, 9.0], [1, 0], where=there, **options) == 1.0


@every_measure
def test_lists_of_no_item_have_no_measure(name):
    function, options = MEASURES[name]
    assert np.isnan(function(np.zeros((2, 0)), np.zeros((2, 0)), **options)).all()
    assert np.isnan(win_mass(np.zeros((2, 0)), np.zeros((2, 0)))).all()


def test_an_item_that_is_not_there_ties_with_none():
    """The last that is there has the score of the first that is not."""
    scores, relevance = [2.0, 1.0, 1.0, 1.0], [0, 1, 0, 0]
    where = np.array([True, True, False, False])
    expected = ndcg(scores[:2], relevance[:2], k=4)
    assert ndcg(scores, relevance, k=4, where=where) == pytest.approx(expected)
    assert recall(scores, relevance, k=2, where=where) == 1.0


def test_win_mass_is_the_probability_of_the_best():
    logps = np.log([0.1, 0.2, 0.1])
    assert win_mass(logps, [0.0, 7.0, 6.0]) == pytest.approx(0.5)
    assert win_mass(logps, [-3.0, -7.0, -4.0]) == pytest.approx(0.25)
    assert win_mass(logps - 1e4, [0.0, 7.0, 6.0]) == pytest.approx(0.5)
    assert win_mass(logps, [7.0, 7.0, 6.0]) == pytest.approx(0.75)  # equals add up
    where = np.array([[True, False, True], [False, False, False]])
    got = win_mass(np.stack([logps, logps]), np.array([[0, 9, 1]] * 2), where=where)
    assert got[0] == pytest.approx(0.5) and np.isnan(got[1])
    assert win_mass([0.0, -np.inf], [1.0, 0.0]) == 1.0


def test_what_is_not_in_a_list_and_other_lists_change_no_win_mass():
    where = np.array([True, True, False])
    for spoiled in (np.nan, np.inf, -np.inf, 1e30, -1e30):
        assert win_mass([0.0, 0, 0], [1, 2, spoiled], where=where) == pytest.approx(0.5)
        assert win_mass([0.0, 0, spoiled], [1, 2, 0], where=where) == pytest.approx(0.5)
    grades = [[1, 1.0001], [-1e15, 0]]
    np.testing.assert_allclose(win_mass(np.zeros((2, 2)), grades), [0.5, 0.5])
    assert win_mass([0.0, 0.0], [-np.inf, -3.0]) == pytest.approx(0.5)
    assert np.isnan(win_mass([-np.inf, -np.inf], [1.0, 2.0]))
    with pytest.raises(ValueError, match=r"`grades` is NaN at \(1,\)"):
        win_mass([0.0, 0.0], [1.0, np.nan])


def test_win_mass_is_the_oracles_of_normalised_probabilities():
    rng = np.random.default_rng(2)
    logps, grades = rng.normal(size=(2, 20, 5))
    p = np.exp(logps) / np.exp(logps).sum(-1, keepdims=True)
    expected = [more_loss_oracles.win_mass(*x) for x in zip(p, grades, strict=True)]
    np.testing.assert_allclose(win_mass(logps, grades), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "relevance", "options", "error", "message"),
    [
        ([1.0], [1, 0], {}, ValueError, r"need one shape .*; got \(1,\) and \(2,\)"),
        ([1.0, 0.0], [1], {}, ValueError, r"need one shape .*; got \(2,\) and \(1,\)"),
        (1.0, 1.0, {}, ValueError, r"need one shape \[..., K\]"),
        ([1.0, np.nan], [1, 0], {}, ValueError, r"`scores` is NaN at \(1,\)"),
        ([1.0, 0.0], [np.nan, 0], {}, ValueError, r"`relevance` is NaN at \(0,\)"),
        ([1.0, 0.0], [-1, 0], {}, ValueError, r"must lie in \[0, 1000\]; got -1.0"),
        ([1.0, 0.0], [0, 1e4], {}, ValueError, r"must lie in \[0, 1000\]; got 10000.0"),
        ([1.0, 0.0], [1, 0], {"k": 0}, ValueError, "`k` must be .* 1 or more; got 0"),
        ([1.0, 0.0], [1, 0], {"k": 1.5}, ValueError, "`k` must be .*; got 1.5"),
        ([1.0], [1], {"where": np.ones(1)}, TypeError, "`where` needs booleans; got f"),
        (
            [1.0],
            [1],
            {"where": np.ones(2, bool)},
            ValueError,
            r"`where` needs .* broadcasts to \(1,\), that of `scores`; got \(2,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(scores, relevance, options, error, message):
    with pytest.raises(error, match=message):
        ndcg(scores, relevance, **({"k": 1} | options))
