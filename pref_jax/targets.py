"""Grades of K responses -> what a listwise loss should fit: distributions and weights.

A distribution sums to 1 over the responses that are there and is 0 elsewhere. Nothing
here carries a gradient. `where` is bool[..., K]: False, the response is not there.

    R    grades, in the unit of whoever gave them
    n    the number of responses that are there
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.numerics import at_least_float32

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_SMALLEST_DEVIATION = 1e-6
_SMALLEST_RANK = 1e-3


def _read(name, array, where):
    """f32[..., K] without gradient and with 0 in what is dropped, and bool[..., K]."""
    array = at_least_float32(array)
    if not array.ndim:
        raise ValueError(f"`{name}` needs a last axis of responses; got a number.")
    there = jnp.ones(array.shape, bool)
    if where is not None:
        checks.check_bool("where", where)
        checks.check_broadcast("where", where, to=array.shape, of=name)
        there = jnp.broadcast_to(where, array.shape)
    return jnp.where(there, jax.lax.stop_gradient(array), 0.0), there


def hard(grades, *, where=None):
    """All on the best response; equal bests share.

    Args:
      grades: [..., K].
      where: bool, broadcastable to `grades`.

    Returns:
      f32[..., K].

    Raises:
      ValueError: `where` does not fit.
      TypeError: `where` is not boolean.

    >>> hard(jnp.array([3.0, 1.0, 3.0])).tolist()
    [0.5, 0.0, 0.5]
    """
    grades, there = _read("grades", grades, where)
    best = jnp.where(there, grades, -jnp.inf).max(-1, keepdims=True)
    is_best = (there & (grades == best)).astype(grades.dtype)
    shares = is_best / jnp.maximum(is_best.sum(-1, keepdims=True), 1)
    # Nothing equals NaN: a list with one would have no target, and be left out unseen.
    return jnp.where(there & jnp.isnan(best), best, shares)


def soft(grades, *, temperature: float, where=None):
    """Of a pair, the Bradley-Terry probability that each response is the better.

        q = (sigmoid((R[0] - R[1]) / temperature), 1 - that)

    Source: ADPO, arXiv:2510.18913v6, the pairwise soft target (the equation's number
    is not verified).
    Checked: one source, the paper's equation.

    Args:
      grades: [..., 2].
      temperature: in the unit of the grades, positive.
      where: bool, broadcastable to `grades`.

    Returns:
      f32[..., 2].

    Raises:
      ValueError: the last axis is not 2, or `temperature` is not positive.
      TypeError: `where` is not boolean.

    >>> soft(jnp.array([1.0, 1.0]), temperature=0.5).tolist()
    [0.5, 0.5]
    """
    checks.check_pair("grades", grades, use_instead="For a list use `softmax`.")
    return softmax(grades, temperature=temperature, where=where)


def softmax(grades, *, temperature: float, where=None):
    """Better responses get more, by the exponential of their grade.

        q = softmax(R / temperature)

    Source: ADPO, arXiv:2510.18913v6, the listwise target, whose beta_r is the
    temperature (the equation's number is not verified).
    Checked: one source, the paper's equation.

    Args:
      grades: [..., K], finite.
      temperature: in the unit of the grades, positive.
      where: bool, broadcastable to `grades`.

    Returns:
      f32[..., K].

    Raises:
      ValueError: `temperature` is not positive, or `where` does not fit.
      TypeError: `where` is not boolean.

    >>> softmax(jnp.array([0.0, 0.0, 9.0]), temperature=1.0,
    ...         where=jnp.array([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    checks.check_positive("temperature", temperature)
    grades, there = _read("grades", grades, where)
    top = jnp.where(there, grades, -jnp.inf).max(-1, keepdims=True)
    unscaled = jnp.where(there, jnp.exp((grades - top) / temperature), 0.0)
    return unscaled / jnp.maximum(unscaled.sum(-1, keepdims=True), 1)


def smoothed(targets, *, smoothing: float, where=None):
    """A distribution mixed with the uniform one.

        q = (1 - e) targets + e / n,  e = `smoothing`

    At K = 2 and a hard target this is a label smoothing of e / 2.

    Args:
      targets: f32[..., K], sums to 1 over the responses that are there.
      smoothing: in [0, 1].
      where: bool, broadcastable to `targets`.

    Returns:
      f32[..., K].

    Raises:
      ValueError: `smoothing` is out of range, or `where` does not fit.
      TypeError: `where` is not boolean.

    >>> smoothed(jnp.array([1.0, 0.0]), smoothing=0.5).tolist()
    [0.75, 0.25]
    """
    checks.check_range("smoothing", smoothing, low=0.0, high=1.0, why="a share")
    targets, there = _read("targets", targets, where)
    number = jnp.maximum(there.sum(-1, keepdims=True), 1)
    mixed = (1 - smoothing) * targets + smoothing / number
    return jnp.where(there, mixed, 0.0)


def _median(values, there):
    """Median over the last axis of the values that are there, else inf: f32[..., 1]."""
    ordered = jnp.sort(jnp.where(there, values, jnp.inf), axis=-1)
    number = there.sum(-1, keepdims=True)
    low = jnp.take_along_axis(ordered, (number - 1) // 2, axis=-1)
    high = jnp.take_along_axis(ordered, number // 2, axis=-1)
    return (low + high) / 2


def kde(grades, *, temperature: float, bandwidth: float | None = None, where=None):
    """Softmax of smoothed ranks: an outlier cannot take all, however far out it is.

        F[i] = mean over j of Phi((R[i] - R[j]) / bandwidth), cut to [1e-3, 1 - 1e-3]
        q    = softmax(log(F / (1 - F)) / temperature)

    with Phi the normal distribution function. Moving or scaling all grades changes
    nothing if the bandwidth is not given.

    Source: ADPO, arXiv:2510.18913v1, which names smoothing of ranks by kernel density
    against heavy tails; the formula is ours, the paper's is not verified.
    Checked: no source: ours.

    Args:
      grades: [..., K], finite.
      temperature: positive, in log-odds of the rank.
      bandwidth: in the unit of the grades, positive. None: 1.06 d n^(-1/5), with d
        1.4826 times the median absolute deviation of the list, and at least 1e-6.
      where: bool, broadcastable to `grades`.

    Returns:
      f32[..., K].

    Raises:
      ValueError: `temperature` or `bandwidth` is not positive, or `where` does not fit.
      TypeError: `where` is not boolean.

    >>> [round(q, 3) for q in kde(jnp.array([0.0, 1.0, 1e8]), temperature=1.0).tolist()]
    [0.052, 0.124, 0.825]
    """
    if bandwidth is not None:
        checks.check_positive("bandwidth", bandwidth)
    grades, there = _read("grades", grades, where)
    number = jnp.maximum(there.sum(-1, keepdims=True), 1)
    if bandwidth is None:
        spread = jnp.abs(grades - _median(grades, there))
        deviation = _MAD_TO_DEVIATION * _median(spread, there)
        deviation = jnp.maximum(deviation, _SMALLEST_DEVIATION)
        bandwidth = 1.06 * deviation * number.astype(grades.dtype) ** -0.2
        bandwidth = bandwidth[..., None]
    gap = (grades[..., :, None] - grades[..., None, :]) / bandwidth
    below = jnp.where(there[..., None, :], jax.scipy.special.ndtr(gap), 0.0)
    rank = jnp.clip(below.sum(-1) / number, _SMALLEST_RANK, 1 - _SMALLEST_RANK)
    log_odds = jnp.log(rank) - jnp.log1p(-rank)
    return softmax(log_odds, temperature=temperature, where=there)


def ndcg_weights(relevance, *, ranks):
    """Gain of the relevance over the discount of the position.

        weight = (2^relevance - 1) / log2(1 + rank)

    Source: IRPO, arXiv:2504.15477 (the equation's number is not verified).
    Checked: two sources, the paper's and the authors' code as read.

    Args:
      relevance: [..., K], graded, 0 or more.
      ranks: as `relevance`: the place of each item in the target order, 1 first.

    Returns:
      f32[..., K], not normalised.

    Raises:
      ValueError: the shapes do not fit.

    >>> ndcg_weights(jnp.array([2.0, 1.0, 0.0]), ranks=jnp.array([1, 3, 2])).tolist()
    [3.0, 0.5, 0.0]
    """
    return _gain(relevance, ranks) * position_weights(ranks)


def reciprocal_rank_weights(relevance, *, ranks):
    """Gain of the relevance over the rank: an ablation of IRPO.

        weight = (2^relevance - 1) / rank

    Source: the code released with IRPO, arXiv:2504.15477.
    Checked: one source, the authors' code as read.

    Args:
      relevance: [..., K], graded, 0 or more.
      ranks: as `relevance`: the place of each item in the target order, 1 first.

    Returns:
      f32[..., K], not normalised.

    Raises:
      ValueError: the shapes do not fit.

    >>> relevance, ranks = jnp.array([2.0, 1.0]), jnp.array([1, 2])
    >>> reciprocal_rank_weights(relevance, ranks=ranks).tolist()
    [3.0, 0.5]
    """
    return _gain(relevance, ranks) / _read("ranks", ranks, None)[0]


def position_weights(ranks):
    """The discount of the position alone, relevant or not: an ablation of IRPO.

        weight = 1 / log2(1 + rank)

    Source: the code released with IRPO, arXiv:2504.15477.
    Checked: one source, the authors' code as read.

    Args:
      ranks: [..., K]: the place of each item in the target order, 1 first.

    Returns:
      f32[..., K], not normalised.

    >>> position_weights(jnp.array([1, 3])).tolist()
    [1.0, 0.5]
    """
    return 1 / jnp.log2(1 + _read("ranks", ranks, None)[0])


def _gain(relevance, ranks):
    checks.check_same_shape("ranks", ranks, like=relevance, of="relevance")
    return jnp.exp2(_read("relevance", relevance, None)[0]) - 1
