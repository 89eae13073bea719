"""Preferences on held-out prompts: accuracy, calibration, cuts, and win rates.

All functions take one number per prompt, so that two models are compared prompt by
prompt, and give intervals by the bootstrap over prompts. Pairs are `[N, 2]`, chosen in
slot 0 and rejected in slot 1, as in the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pref_jax.types import CHOSEN, REJECTED


class Interval(NamedTuple):
    """A mean and a confidence interval for it."""

    mean: float
    low: float
    high: float


class Cell(NamedTuple):
    """One group of prompts of a cut: what it is called, its mean, how many it holds.

    Attributes:
      name: such as `shorter`, `[0, 10)` or a field's value.
      interval: of the mean over the group's prompts; None where the group is empty.
      count: prompts in the group.
    """

    name: str
    interval: Interval | None
    count: int


class Calibration(NamedTuple):
    """Expected calibration error, and the bins that it is the sum of.

    Attributes:
      error: sum over bins of count / N * |predicted - observed|.
      predicted: f64[M], mean predicted probability of the preferred side.
      observed: f64[M], how often the labels agree with that side.
      count: i64[M], pairs in the bin; none is 0.
    """

    error: float
    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


class LengthControlled(NamedTuple):
    """A length-controlled win rate, and the regression that it was read from.

    Attributes:
      win_rate: its value, and an interval for it.
      intercept: theta, the log-odds of a win at equal lengths (and difficulty 0).
      length_effect: phi, log-odds for tanh(difference / scale) = 1.
      difficulty_effect: psi, log-odds for a difficulty of 1; 0 where none was given.
      scale: the deviation that length differences are divided by.
    """

    win_rate: Interval
    intercept: float
    length_effect: float
    difficulty_effect: float
    scale: float


_DRAWN_AT_ONCE = 2**20  # numbers of a bootstrap that are held


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
    values = _one_a_prompt("values", values)
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // values.size)
    means = np.concatenate(
        [
            values[rng.integers(0, values.size, (number, values.size))].mean(-1)
            for start in range(0, num_resamples, at_once)
            for number in [min(at_once, num_resamples - start)]
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


def reward_accuracy(rewards) -> np.ndarray:
    """1 where the chosen response has the higher reward, one half for a tie, else 0.

        accuracy = 1[r_chosen > r_rejected] + 1/2 * 1[r_chosen = r_rejected]

    Source: the accuracy of RewardBench, arXiv:2403.13787; ties as in `wins`.

    Args:
      rewards: float[N, 2], any unit. Chosen in slot 0.

    Returns:
      f64[N]; its mean is the accuracy. `bootstrap_interval` gives the interval.

    Raises:
      ValueError: there are no pairs, the shape is not [N, 2], or a reward is NaN.

    >>> reward_accuracy([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]]).tolist()
    [1.0, 0.5, 0.0]
    """
    rewards = _pairs("rewards", rewards)
    return wins(rewards[:, CHOSEN], rewards[:, REJECTED])


def reward_margin(rewards) -> np.ndarray:
    """How much more reward the chosen response has.

        margin = r_chosen - r_rejected

    Source: DPO, arXiv:2305.18290v3, equation 7, the argument of its sigmoid.

    Args:
      rewards: float[N, 2]. Chosen in slot 0. In nats, if the margins are to be read as
        log-odds by `log_loss`, `brier_score` and `calibration`.

    Returns:
      f64[N], in the unit of the rewards.

    Raises:
      ValueError: as `reward_accuracy`, or a reward is infinite.

    >>> reward_margin([[1.0, 0.0], [0.0, 3.0]]).tolist()
    [1.0, -3.0]
    """
    rewards = _pairs("rewards", rewards)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is an error below
        margins = rewards[:, CHOSEN] - rewards[:, REJECTED]
    return _one_a_prompt("rewards[:, 0] - rewards[:, 1]", margins)


def brier_score(margins, *, labels=None) -> np.ndarray:
    """Squared error of the preference probability that a margin implies.

        score = (sigmoid(margin) - label)^2

    Source: Brier, "Verification of forecasts expressed in terms of probability" (1950),
    for two outcomes, of which one is counted: in [0, 1], 1/4 for a margin of 0.

    Args:
      margins: float[N], nats: the log-odds that the chosen response is preferred.
      labels: float[N] in [0, 1], how often it is; left out, always.

    Returns:
      f64[N].

    Raises:
      ValueError: a margin is not finite, or a label is missing or outside [0, 1].

    >>> brier_score([0.0, 0.0], labels=[1.0, 0.5]).tolist()
    [0.25, 0.0]
    """
    margins = _one_a_prompt("margins", margins)
    labels = _labels(labels, margins)
    # Both tails without overflow: sigmoid(m) = exp(-log(1 + exp(-m))).
    return (np.exp(-np.logaddexp(0.0, -margins)) - labels) ** 2


def log_loss(margins, *, labels=None) -> np.ndarray:
    """Cross-entropy of the labels under the preference probability of a margin.

        loss = -y log sigmoid(margin) - (1 - y) log sigmoid(-margin)

    Source: Bradley-Terry likelihood, DPO, arXiv:2305.18290v3, equation 2; with
    y = 1 - `label_smoothing` it is `pref_jax.losses.pairwise.logistic_loss`.

    Args:
      margins: float[N], nats.
      labels: as in `brier_score`.

    Returns:
      f64[N], nats; log 2 for a margin of 0, never more than |margin| + log 2.

    Raises:
      ValueError: as `brier_score`.

    >>> log_loss([0.0, 10_000.0, -10_000.0]).round(4).tolist()
    [0.6931, 0.0, 10000.0]
    """
    margins = _one_a_prompt("margins", margins)
    labels = _labels(labels, margins)
    return labels * np.logaddexp(0.0, -margins) + (1 - labels) * np.logaddexp(
        0.0, margins
    )


def calibration(margins, *, labels=None, num_bins: int = 10) -> Calibration:
    """Whether a preference that is predicted with probability p is right as often.

        p        = sigmoid(|margin|)
        right    = y if margin > 0, 1 - y if margin < 0, 1/2 if margin = 0
        error    = sum_b count_b / N * |mean_b(p) - mean_b(right)|

    Each pair is read from the side that the model prefers. Read from the chosen side,
    which the data has put in slot 0, each label is 1 and each bin is observed at 1,
    whatever the model. Bins hold equally many pairs, but equal margins share a bin, so
    that the order of the pairs changes nothing; there may then be fewer bins.

    The error of a perfect model is above 0, by about the noise of a bin: compare models
    on the same pairs and with the same number of bins.

    Source: Guo et al., arXiv:1706.04599v2, equation 3; bins of equal mass: Nixon et
    al., arXiv:1904.01685 (cited, not verified).

    Args:
      margins: float[N], nats.
      labels: as in `brier_score`.
      num_bins: positive; the most bins there can be.

    Raises:
      ValueError: as `brier_score`, or `num_bins` is below 1.

    >>> found = calibration(np.log([3.0, 3.0, 3.0, 3.0]), labels=[1, 1, 1, 0])
    >>> found.predicted.round(2).tolist(), found.observed.tolist(), found.count.tolist()
    ([0.75], [0.75], [4])
    """
    margins = _one_a_prompt("margins", margins)
    labels = _labels(labels, margins)
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be 1 or more; got {num_bins}.")
    predicted = np.exp(-np.logaddexp(0.0, -np.abs(margins)))
    right = 0.5 + np.sign(margins) * (labels - 0.5)
    bins = _equal_mass(np.abs(margins), num_bins)
    _, bins, count = np.unique(bins, return_inverse=True, return_counts=True)
    predicted, right = (
        np.bincount(bins, weights=values) / count for values in (predicted, right)
    )
    error = float(count @ np.abs(predicted - right) / margins.size)
    return Calibration(error, predicted, right, count)


def accuracy_by_length(rewards, *, lengths, **bootstrap) -> list[Cell]:
    """Reward accuracy where the chosen response is longer, as long, or shorter.

    A model that only prefers length is right in the first cell, wrong in the last, and
    no better than a coin between them.

    Args:
      rewards: float[N, 2]. Chosen in slot 0.
      lengths: [N, 2], tokens or characters of the two responses.
      **bootstrap: options of `bootstrap_interval`.

    Returns:
      Cells `longer`, `equal`, `shorter`, of the chosen response.

    Raises:
      ValueError: as `reward_accuracy`; `lengths` are not as many, or not finite.

    >>> cells = accuracy_by_length([[1, 0], [0, 1]], lengths=[[9, 5], [5, 9]])
    >>> [(cell.name, cell.interval and cell.interval.mean) for cell in cells]
    [('longer', 1.0), ('equal', None), ('shorter', 0.0)]
    """
    accuracies = reward_accuracy(rewards)
    lengths = _pairs("lengths", lengths, like=accuracies)
    sign = np.sign(lengths[:, CHOSEN] - lengths[:, REJECTED])
    names = {"longer": 1, "equal": 0, "shorter": -1}
    return [
        _cell(name, accuracies[sign == side], bootstrap) for name, side in names.items()
    ]


def by_length_difference(values, *, lengths, edges, **bootstrap) -> list[Cell]:
    """Any per-prompt metric by how much longer the chosen response is.

    Args:
      values: float[N], one number a prompt.
      lengths: [N, 2]. Chosen in slot 0.
      edges: rising numbers e_0 < ... < e_k, in the unit of the lengths. The buckets are
        below e_0, [e_0, e_1), ..., [e_k, infinity): every prompt is in one.
      **bootstrap: options of `bootstrap_interval`.

    Returns:
      k + 2 cells, the empty ones too.

    Raises:
      ValueError: `edges` do not rise or there are none; values or lengths are not
        finite or not as many.

    >>> cells = by_length_difference([1.0, 0.0], lengths=[[9, 5], [5, 5]], edges=[0, 4])
    >>> [(cell.name, cell.count) for cell in cells]
    [('< 0', 0), ('[0, 4)', 1), ('>= 4', 1)]
    """
    values = _one_a_prompt("values", values)
    lengths = _pairs("lengths", lengths, like=values)
    return _by_edges(
        values, lengths[:, CHOSEN] - lengths[:, REJECTED], edges, bootstrap
    )


def by_total_length(values, *, lengths, edges, **bootstrap) -> list[Cell]:
    """Any per-prompt metric by the length of both responses together.

    Args:
      values: float[N], one number a prompt.
      lengths: [N, 2].
      edges: as in `by_length_difference`.
      **bootstrap: options of `bootstrap_interval`.

    Returns:
      As `by_length_difference`.

    Raises:
      ValueError: as `by_length_difference`.

    >>> cells = by_total_length([1.0, 0.0], lengths=[[9, 5], [5, 5]], edges=[12])
    >>> [(cell.name, cell.interval.mean, cell.count) for cell in cells]
    [('< 12', 0.0, 1), ('>= 12', 1.0, 1)]
    """
    values = _one_a_prompt("values", values)
    lengths = _pairs("lengths", lengths, like=values)
    return _by_edges(values, lengths.sum(1), edges, bootstrap)


def by_field(
    values, *, field: Sequence, num_quantiles: int = 4, **bootstrap
) -> list[Cell]:
    """Any per-prompt metric by what a field of the record holds.

    Args:
      values: float[N], one number a prompt.
      field: N values of one kind. Strings, booleans and integers make a cell each.
        Floats are cut into buckets of equally many prompts; equal floats share one.
      num_quantiles: the most buckets that floats are cut into.
      **bootstrap: options of `bootstrap_interval`.

    Returns:
      Cells in rising order of the field's values; a bucket of floats is named by the
      smallest and the largest that it holds.

    Raises:
      ValueError: values or a float are not finite, `field` is not as long, or
        `num_quantiles` is below 1.
      TypeError: a value of `field` is none of these kinds, or not of the others' kind.

    >>> cells = by_field([1.0, 0.0, 0.5], field=["maths", "code", "maths"])
    >>> [(cell.name, cell.interval.mean, cell.count) for cell in cells]
    [('code', 0.0, 1), ('maths', 0.75, 2)]
    """
    values = _one_a_prompt("values", values)
    field = np.asarray(field).tolist() if hasattr(field, "shape") else list(field)
    if len(field) != values.size:
        raise ValueError(
            f"`field` needs one value for each of {values.size} prompts; got "
            f"{len(field)}."
        )
    if num_quantiles < 1:
        raise ValueError(f"`num_quantiles` must be 1 or more; got {num_quantiles}.")
    kinds = [_kind_of_field(row, value) for row, value in enumerate(field)]
    if "float" in kinds:
        # 1 among 1.5 is a float that was written without its point.
        kinds = ["float" if kind == "int" else kind for kind in kinds]
    for row, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise TypeError(
                f"`field` needs values of one kind; got {kinds[0]} in row 0 and {kind} "
                f"in row {row}: {field[row]!r}."
            )
    if kinds[0] != "float":
        return [
            _cell(str(key), values[[value == key for value in field]], bootstrap)
            for key in sorted(set(field))
        ]
    numbers = _one_a_prompt("field", field)
    buckets = _equal_mass(numbers, num_quantiles)
    cells = []
    for bucket in np.unique(buckets):
        inside = numbers[buckets == bucket]
        name = f"[{inside.min():.6g}, {inside.max():.6g}]"
        cells.append(_cell(name, values[buckets == bucket], bootstrap))
    return cells


def win_rate(outcomes, **bootstrap) -> Interval:
    """How often the model is preferred to the other, with a bootstrap interval.

        win rate = mean_n q_n

    Args:
      outcomes: float[N] in [0, 1], one a prompt: 1 won, 0 lost, 1/2 a tie, or a judge's
        probability that the model's answer is better.
      **bootstrap: options of `bootstrap_interval`.

    Raises:
      ValueError: an outcome is not finite or outside [0, 1].

    >>> win_rate([1.0, 0.5, 1.0, 0.5]).mean
    0.75
    """
    return bootstrap_interval(_outcomes(outcomes), **bootstrap)


def length_controlled_win_rate(
    outcomes,
    *,
    length_differences,
    difficulty=None,
    penalty: float = 0.01,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    max_steps: int = 100,
) -> LengthControlled:
    """Win rate as it would be if both answers to every prompt were equally long.

        logit_n  = theta + phi * tanh(d_n / std(d)) + psi * difficulty_n
        minimise   sum_n [log(1 + exp(logit_n)) - q_n logit_n]
                   + penalty / 2 * (phi^2 + psi^2)
        win rate = mean_n sigmoid(theta + psi * difficulty_n)

    theta is free of the penalty: where all differences are 0 the value is the raw win
    rate. If all outcomes are 1, or all 0, theta is infinite and the value 1 or 0. The
    penalty keeps phi finite where length alone tells who wins; the default stands for a
    normal prior on phi of deviation 10 and hardly moves the rest.

    Source: Dubois et al., arXiv:2404.04475v2, the regression of section 3 (its
    place in the paper was not verified; the code of alpaca_eval was read); `std` of N-1
    and `tanh` as in alpaca_eval, src/alpaca_eval/metrics/glm_winrate.py.
    Differs from alpaca_eval: the ridge above in place of a lasso chosen by 5-fold
    cross-validation; no rows of gamed baselines; `difficulty` as given, without the
    table that holds for its 805 prompts alone; differences are model minus baseline, so
    that phi > 0 says that longer answers win.

    Args:
      outcomes: as in `win_rate`.
      length_differences: [N], length of the model's answer minus the other's, in any
        unit: tokens, or characters as in alpaca_eval.
      difficulty: float[N], a number a prompt from a table of its own; left out, psi is
        0.
      penalty: positive.
      confidence: of the two-sided interval.
      num_resamples: draws of N prompts with replacement. Outcome, length and difficulty
        are drawn together and the regression is fitted anew; std(d) stays that of all.
      seed: of the draws.
      max_steps: of Newton's method; it stops when no entry of the gradient of the mean
        objective exceeds 1e-10.

    Raises:
      ValueError: arguments are not finite or not as many, an outcome is outside [0, 1],
        `penalty` is not positive, or all differences are one number other than 0, which
        cannot be told from the model's merit.
      RuntimeError: a fit did not converge within `max_steps`.

    >>> found = length_controlled_win_rate(
    ...     [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], length_differences=[9, 8, -1, -2, 1, 0]
    ... )
    >>> found.win_rate.mean < 1 / 3 and found.length_effect > 0
    True
    >>> equal = length_controlled_win_rate([1.0, 0.5], length_differences=[0, 0])
    >>> round(equal.win_rate.mean, 9)
    0.75
    """
    outcomes = _outcomes(outcomes)
    terms = {"length_differences": length_differences}
    if difficulty is not None:
        terms["difficulty"] = difficulty
    for name, term in terms.items():
        terms[name] = _one_a_prompt(name, term)
        if terms[name].size != outcomes.size:
            raise ValueError(
                f"`{name}` needs one for each of {outcomes.size} outcomes; got "
                f"{terms[name].size}."
            )
    if not 0 < penalty < np.inf:
        raise ValueError(f"`penalty` must be positive; got {penalty}.")
    differences = terms["length_differences"]
    scale = 1.0
    if np.ptp(differences):
        scale = float(np.std(differences, ddof=1))
    elif differences[0]:
        raise ValueError(
            f"`length_differences` are all {differences[0]:g}: what length does cannot "
            f"be told from what the model does. Use `win_rate`."
        )
    terms["length_differences"] = np.tanh(differences / scale)
    features = np.stack([np.ones_like(outcomes), *terms.values()], axis=1)
    rng = np.random.default_rng(seed)
    size = outcomes.size

    def rates(counts):
        fitted = _fit_logistic(features, outcomes, counts, penalty, max_steps)
        # Without the length term; an infinite theta comes with a psi of 0.
        logits = fitted[:, :1] + fitted[:, 2:] @ features[:, 2:].T
        predicted = np.exp(-np.logaddexp(0.0, -logits))
        return (counts * predicted).sum(1) / size, fitted[0]

    (value,), fitted = rates(np.ones((1, size)))
    resampled = []
    at_once = max(1, 2**20 // size)  # resamples whose arrays are in memory together
    for first in range(0, num_resamples, at_once):
        draws = [
            np.bincount(rng.integers(0, size, size), minlength=size)
            for _ in range(first, min(first + at_once, num_resamples))
        ]
        resampled.extend(rates(np.stack(draws).astype(np.float64))[0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    theta, phi, psi = *map(float, fitted), *([0.0] if difficulty is None else [])
    interval = Interval(float(value), float(low), float(high))
    return LengthControlled(interval, theta, phi, psi, scale)


def _fit_logistic(features, outcomes, counts, penalty, max_steps) -> np.ndarray:
    """f64[R, P]: coefficients for each weighting `counts [R, N]` of the prompts.

    Newton's method on the mean objective. A step that does not lower the objective
    enough is halved, down to log(1 + r) / r of its length, with r the largest change of
    a logit in it: the logistic loss is generalised self-concordant, and so short a step
    lowers it always (Sun and Tran-Dinh, Math. Program. 178, 2019, nu = 2;
    not verified).
    """
    total = counts.sum(1)
    ridge = np.full(features.shape[1], penalty)
    ridge[0] = 0.0
    coefficients = np.zeros((len(counts), features.shape[1]))
    won = counts @ outcomes
    # All won, or all lost: no finite theta is best.
    coefficients[won == total, 0] = np.inf
    coefficients[won == 0, 0] = -np.inf
    (rows,) = np.nonzero((won > 0) & (won < total))

    def objective(coefficients):
        logits = coefficients @ features.T
        losses = outcomes * np.logaddexp(0.0, -logits)
        losses += (1 - outcomes) * np.logaddexp(0.0, logits)
        return (share * losses).sum(1) + (penalties / 2 * coefficients**2).sum(1)

    for _ in range(max_steps):
        share = counts[rows] / total[rows, None]
        penalties = ridge / total[rows, None]
        now = coefficients[rows]
        predicted = np.exp(-np.logaddexp(0.0, -now @ features.T))
        gradient = (share * (predicted - outcomes)) @ features + penalties * now
        active = np.abs(gradient).max(axis=1, initial=0.0) > 1e-10
        if not active.any():
            return coefficients
        rows, share, penalties = rows[active], share[active], penalties[active]
        now, gradient, predicted = now[active], gradient[active], predicted[active]
        curvature = share * predicted * (1 - predicted)
        hessian = np.einsum("rn,np,nq->rpq", curvature, features, features)
        hessian += penalties[:, :, None] * np.eye(features.shape[1])
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        change = np.abs(step @ features.T).max(1)
        shortest = np.log1p(change) / np.maximum(change, 1e-300)
        size = np.ones(len(rows))
        before, slope = objective(now), (gradient * step).sum(1)
        while True:
            trial = now - size[:, None] * step
            too_long = objective(trial) > before - 1e-4 * size * slope
            too_long &= size > shortest
            if not too_long.any():
                break
            size = np.where(too_long, np.maximum(size / 2, shortest), size)
        coefficients[rows] = trial
    raise RuntimeError(
        f"the length-controlled regression did not converge in {max_steps} steps for "
        f"{len(rows)} of {len(counts)} samples of the prompts. Raise `penalty` or "
        f"`max_steps`."
    )


def _one_a_prompt(name: str, values) -> np.ndarray:
    """float64[N] with N > 0, all finite."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"`{name}` needs one number a prompt; got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"`{name}` must be finite; {bad} of {values.size} are not.")
    return values


def _pairs(name: str, pairs, *, like: np.ndarray | None = None) -> np.ndarray:
    """float64[N, 2] without NaN, as many as `like`."""
    pairs = np.asarray(pairs, np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(
            f"`{name}` needs shape [N, 2] (chosen, rejected); got {pairs.shape}."
        )
    bad = int(np.isnan(pairs).any(1).sum())
    if bad:
        raise ValueError(
            f"`{name}` must be numbers; {bad} of {len(pairs)} pairs hold NaN."
        )
    if like is not None and len(pairs) != like.size:
        raise ValueError(
            f"`{name}` needs a pair for each of {like.size} prompts; got {len(pairs)}."
        )
    return pairs


def _outcomes(outcomes) -> np.ndarray:
    outcomes = _one_a_prompt("outcomes", outcomes)
    bad = int(((outcomes < 0) | (outcomes > 1)).sum())
    if bad:
        raise ValueError(
            f"`outcomes` must lie in [0, 1] (1 won, 0 lost, 0.5 a tie); {bad} of "
            f"{outcomes.size} do not."
        )
    return outcomes


def _labels(labels, margins: np.ndarray) -> np.ndarray:
    """float64[N] in [0, 1]: how often the chosen response is preferred."""
    if labels is None:
        return np.ones_like(margins)
    labels = _one_a_prompt("labels", labels)
    if labels.size != margins.size:
        raise ValueError(
            f"`labels` needs one for each of {margins.size} margins; got {labels.size}."
        )
    bad = int(((labels < 0) | (labels > 1)).sum())
    if bad:
        raise ValueError(
            f"`labels` must lie in [0, 1] (how often the chosen response is "
            f"preferred); {bad} of {labels.size} do not."
        )
    return labels


def _equal_mass(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each value: bins hold equally many, equal values share the first."""
    return np.searchsorted(np.sort(values), values) * num_bins // values.size


def _by_edges(values, sizes, edges, bootstrap) -> list[Cell]:
    edges = list(edges)
    numbers = np.asarray(edges, np.float64)
    if not edges or not np.isfinite(numbers).all() or (np.diff(numbers) <= 0).any():
        raise ValueError(f"`edges` must be finite numbers that rise; got {edges}.")
    names = [f"< {edges[0]}"]
    names += [f"[{low}, {high})" for low, high in zip(edges, edges[1:], strict=False)]
    names += [f">= {edges[-1]}"]
    sizes = _one_a_prompt("lengths", sizes)
    buckets = np.searchsorted(numbers, sizes, side="right")
    return [
        _cell(name, values[buckets == bucket], bootstrap)
        for bucket, name in enumerate(names)
    ]


def _cell(name: str, values: np.ndarray, bootstrap: dict) -> Cell:
    if not values.size:
        return Cell(name, None, 0)
    return Cell(name, bootstrap_interval(values, **bootstrap), values.size)


def _kind_of_field(row: int, value) -> str:
    kinds = {
        "bool": (bool, np.bool_),  # before int, which it is an instance of
        "int": (int, np.integer),
        "float": (float, np.floating),
        "str": str,
    }
    for kind, types in kinds.items():
        if isinstance(value, types):
            return kind
    raise TypeError(
        f"`field` needs strings, booleans, integers or floats; got "
        f"{type(value).__name__} in row {row}: {value!r}."
    )
