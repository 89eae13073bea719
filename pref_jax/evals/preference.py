"""Preference evaluations: win rate, reward accuracy, means with intervals.

All functions take one number per prompt, so that two models are compared prompt by
prompt, and give intervals by the bootstrap over prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and a confidence interval for it."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values,
    *,
    confidence: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean of per-prompt values, with a percentile bootstrap interval over prompts.

    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979).

    Args:
      values: float[N], one number a prompt. For a paired comparison, differences.
      confidence: of the two-sided interval.
      num_resamples: draws of N prompts with replacement.
      seed: of the draws.

    Raises:
      ValueError: there are no values, or one is not finite.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"`values` needs one number a prompt; got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"`values` must be finite; {bad} of {values.size} are not.")
    rng = np.random.default_rng(seed)
    means = np.array(
        [
            values[rng.integers(0, values.size, values.size)].mean()
            for _ in range(num_resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def wins(grades, other_grades) -> np.ndarray:
    """1 where a prompt's first grade is higher, one half where they tie, else 0.

    Args:
      grades: float[N].
      other_grades: float[N], of the same prompts.

    Returns:
      f64[N]; NaN where a grade is NaN.

    >>> wins([2.0, 1.0, 0.0], [1.0, 1.0, 1.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    grades, other_grades = (np.asarray(g, np.float64) for g in (grades, other_grades))
    if grades.shape != other_grades.shape:
        raise ValueError(
            f"both models need a grade for each prompt; got {grades.shape} and "
            f"{other_grades.shape}."
        )
    # By comparison: two infinite grades tie, and their difference would be NaN.
    won = (grades > other_grades) + 0.5 * (grades == other_grades)
    return np.where(np.isnan(grades) | np.isnan(other_grades), np.nan, won)
