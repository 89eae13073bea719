"""Means and wins are arithmetic, and an interval covers what it says it covers."""

import math

import numpy as np
import pytest

from pref_jax.evals.preference import Interval, bootstrap_interval, wins


def test_wins_are_one_a_half_or_none():
    found = wins([2.0, 1.0, 0.0, -1.0], [1.0, 1.0, 1.0, -2.0])
    assert found.tolist() == [1.0, 0.5, 0.0, 1.0]


def test_the_two_sides_share_every_win():
    rng = np.random.default_rng(0)
    grades, other = rng.integers(0, 3, (2, 50)).astype(float)
    assert (grades == other).any()
    np.testing.assert_array_equal(wins(grades, other) + wins(other, grades), 1.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_grades_that_are_not_floats_are_compared_as_numbers(dtype):
    grades, other = np.array([0, 1, 1], dtype), np.array([1, 1, 0], dtype)
    assert wins(grades, other).tolist() == [0.0, 0.5, 1.0]


def test_a_grade_that_is_not_a_number_wins_nothing_silently():
    assert math.isnan(wins([math.nan], [1.0])[0])
    assert math.isnan(wins([1.0], [math.nan])[0])
    infinite = wins([-math.inf, math.inf, math.inf], [-math.inf, math.inf, 0.0])
    assert infinite.tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match="must be finite; 1 of 2 are not"):
        bootstrap_interval(wins([math.nan, 1.0], [1.0, 0.0]))


def test_wins_need_the_same_prompts():
    with pytest.raises(ValueError, match=r"each prompt; got \(3,\) and \(2,\)"):
        wins([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_mean_is_exact_and_inside_its_interval():
    found = bootstrap_interval([0.0, 0.5, 1.0, 4.0])
    assert isinstance(found, Interval)
    assert found.mean == 5.5 / 4
    assert 0.0 <= found.low < found.mean < found.high <= 4.0


def test_one_value_has_no_width():
    assert bootstrap_interval([2.5]) == Interval(2.5, 2.5, 2.5)


def test_two_values_have_the_percentiles_of_all_resamples():
    # Of two draws from {0, 1} the mean is 0, 1/2 or 1 with 1/4, 1/2 and 1/4: at 60 %
    # both ends, at 20 % neither, lie within reach of the tails.
    wide = bootstrap_interval([0.0, 1.0], confidence=0.6)
    assert wide == Interval(0.5, 0.0, 1.0)
    narrow = bootstrap_interval([0.0, 1.0], confidence=0.2)
    assert narrow == Interval(0.5, 0.5, 0.5)


def test_the_width_is_that_of_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # 200 experiments of 60 prompts with win rate 0.7: 90 % intervals hold the truth in
    # 180 of them, give or take sqrt(200 * 0.9 * 0.1) = 4.2; four deviations allowed.
    rng = np.random.default_rng(2)
    covered = 0
    for experiment in range(200):
        won = (rng.random(60) < 0.7).astype(float)
        interval = bootstrap_interval(
            won, confidence=0.9, num_resamples=400, seed=experiment
        )
        covered += interval.low <= 0.7 <= interval.high
    assert abs(covered - 180) <= 17


def test_the_same_seed_draws_the_same():
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"needs one number a prompt; got shape \(0,\)"),
        (1.0, r"needs one number a prompt; got shape \(\)"),
        ([[1.0, 2.0]], r"needs one number a prompt; got shape \(1, 2\)"),
        ([1.0, math.nan, -math.inf], "must be finite; 2 of 3 are not"),
    ],
)
def test_values_that_have_no_mean_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values)
