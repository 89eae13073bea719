"""Claims are judged by intervals that hold the truth as often as they say."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.worlds.claims import (
    FAILS,
    HOLDS,
    NOT_TESTABLE,
    judged,
    t_interval,
)
from pref_jax.evals.preference import bootstrap_interval


def test_the_interval_is_that_of_students_test():
    values = np.random.default_rng(0).normal(0.3, 1.0, 5)
    found = t_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    narrow = t_interval(values, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_of_five_values_it_covers_what_it_says_and_a_bootstrap_does_not():
    drawn = np.random.default_rng(1).normal(size=(1000, 5))

    def covered(interval, rows):
        found = [interval(values) for values in rows]
        return np.mean([f.low < 0 < f.high for f in found])

    # Three deviations of a share of a thousand, and of four hundred.
    assert covered(t_interval, drawn) == pytest.approx(0.95, abs=0.021)
    few = covered(lambda x: bootstrap_interval(x, num_resamples=400), drawn[:400])
    assert few == pytest.approx(0.84, abs=0.055)


@pytest.mark.parametrize("values", [[1.0], [], [[1.0, 2.0]], [1.0, math.nan]])
def test_what_has_no_interval_is_an_error(values):
    with pytest.raises(ValueError, match="needs two finite numbers or more"):
        t_interval(values)


def test_a_claim_holds_if_the_interval_is_above_zero_and_seeds_are_enough():
    def verdict(values):
        return judged("c", "n", values, "u").verdict

    assert verdict([0.1, 0.2, 0.3, 0.2, 0.1]) == HOLDS
    # Its bootstrap would be above zero.
    wide = [0.0, 0.0, 0.1, 0.2, 0.3]
    assert bootstrap_interval(wide).low > 0 and verdict(wide) == FAILS
    assert verdict([0.1, 0.2, 0.3, 0.2]) == NOT_TESTABLE
