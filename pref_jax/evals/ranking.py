"""Rankings against graded relevance: NDCG, recall, reciprocal rank, win mass.

One number a list, NumPy only. A list has K items on its last axis; `where` is
bool[..., K], False: the item is not in the list. Items of equal score are a tie: a
measure is then its mean over all orders of the tied, so that an order of the items in
memory earns nothing.
"""

from __future__ import annotations

import numpy as np

_MOST_RELEVANT = 1000  # 2 to the power of it is finite


def _read(where, **arrays):
    """(two arrays of one shape, there): f64[..., K] and bool[..., K]."""
    (name, array), (other_name, other) = (
        (name, np.asarray(array, float)) for name, array in arrays.items()
    )
    if not array.ndim or array.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}` need one shape [..., K]; got {array.shape} "
            f"and {other.shape}."
        )
    there = np.ones(array.shape, bool)
    if where is not None:
        where = np.asarray(where)
        if where.dtype != bool:
            raise TypeError(f"`where` needs booleans; got {where.dtype}.")
        try:
            there = np.broadcast_to(where, array.shape)
        except ValueError:
            raise ValueError(
                f"`where` needs a shape that broadcasts to {array.shape}, that of "
                f"`{name}`; got {where.shape}."
            ) from None
    for label, values in ((name, array), (other_name, other)):
        bad = np.argwhere(there & np.isnan(values))
        if len(bad):
            raise ValueError(f"`{label}` is NaN at {tuple(map(int, bad[0]))}.")
    return array, other, there


def _read_graded(scores, relevance, where):
    """As `_read`; what is not there has a relevance of 0."""
    scores, relevance, there = _read(where, scores=scores, relevance=relevance)
    relevance = np.where(there, relevance, 0.0)
    wrong = (relevance < 0) | (relevance > _MOST_RELEVANT)
    if wrong.any():
        raise ValueError(
            f"`relevance` must lie in [0, {_MOST_RELEVANT}]; got {relevance[wrong][0]}."
        )
    return scores, relevance, there


def _check_k(k: int) -> None:
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"`k` must be an integer of 1 or more; got {k}.")


def _mean_gain(scores, gains, there, discounts):
    """Sum over ranks of discount times gain, averaged over the orders of ties.

    A run of tied items shares the mean gain of the run at each of its ranks. What is
    not there stands behind, with a gain of 0.
    """
    order = np.lexsort((-scores, ~there))
    scores, gains = (np.take_along_axis(x, order, -1) for x in (scores, gains))
    begins = np.ones(scores.shape, bool)
    begins[..., 1:] = scores[..., 1:] != scores[..., :-1]
    # The first of what is not there may have the score of the last that is.
    begins |= np.arange(scores.shape[-1]) == there.sum(-1, keepdims=True)
    run = begins.cumsum().reshape(scores.shape)  # from 1; bincount leaves slot 0 empty
    total, size = np.bincount(run.ravel(), gains.ravel()), np.bincount(run.ravel())
    return (total[run] / size[run] * discounts).sum(-1)


def ndcg(scores, relevance, *, k: int, where=None):
    """Normalised discounted cumulative gain of the first k items.

        DCG  = sum over ranks r <= k of (2^relevance - 1) / log2(1 + r)
        NDCG = DCG by scores / DCG by relevance

    Source: Burges et al., ICML 2005; as in the code of IRPO, arXiv:2504.15477.

    Args:
      scores: f64[..., K]; the highest is ranked first.
      relevance: as `scores`, graded, 0 or more.
      k: ranks that count.
      where: bool, broadcastable to `scores`.

    Returns:
      f64[...]; NaN for a list without a relevant item.

    Raises:
      ValueError: the shapes differ, `where` does not fit, `k` is not an integer of 1 or
        more, a number is NaN or a relevance is negative or above 1000.
      TypeError: `where` is not boolean.

    >>> round(float(ndcg([1.0, 2.0], [1, 0], k=2)), 4)
    0.6309
    """
    _check_k(k)
    scores, relevance, there = _read_graded(scores, relevance, where)
    ranks = np.arange(1, scores.shape[-1] + 1)
    discounts = (ranks <= k) / np.log2(1 + ranks)
    gains = np.exp2(relevance) - 1
    ideal = _mean_gain(gains, gains, there, discounts)
    found = _mean_gain(scores, gains, there, discounts)
    return found / np.where(ideal == 0, np.nan, ideal)


def recall(scores, relevance, *, k: int, where=None):
    """Share of the relevant items that stand among the first k.

    Args:
      scores: f64[..., K]; the highest is ranked first.
      relevance: as `scores`; relevant is what is above 0.
      k: ranks that count.
      where: bool, broadcastable to `scores`.

    Returns:
      f64[...]; NaN for a list without a relevant item.

    Raises:
      ValueError, TypeError: as `ndcg`.

    >>> float(recall([3.0, 2.0, 1.0], [1, 0, 1], k=2))
    0.5
    """
    _check_k(k)
    scores, relevance, there = _read_graded(scores, relevance, where)
    relevant = (relevance > 0).astype(float)
    first = (np.arange(scores.shape[-1]) < k).astype(float)
    number = relevant.sum(-1)
    found = _mean_gain(scores, relevant, there, first)
    return found / np.where(number == 0, np.nan, number)


def mean_relevance(scores, relevance, *, k: int, where=None):
    """Mean relevance of the first k items, or of all where a list is shorter.

    Args, returns and errors as `ndcg`; NaN for an empty list only.

    >>> float(mean_relevance([3.0, 2.0, 1.0], [2, 1, 0], k=2))
    1.5
    """
    _check_k(k)
    scores, relevance, there = _read_graded(scores, relevance, where)
    first = (np.arange(scores.shape[-1]) < k).astype(float)
    number = np.minimum(there.sum(-1), k)
    found = _mean_gain(scores, relevance, there, first)
    return found / np.where(number == 0, np.nan, number)


def reciprocal_rank(scores, relevance, *, where=None):
    """One over the rank of the first relevant item: averaged over lists, the MRR.

    Of a tie that holds the first relevant item, the mean over its orders.

    Args:
      scores: f64[..., K]; the highest is ranked first.
      relevance: as `scores`; relevant is what is above 0.
      where: bool, broadcastable to `scores`.

    Returns:
      f64[...]; NaN for a list without a relevant item.

    Raises:
      ValueError, TypeError: as `ndcg`.

    >>> float(reciprocal_rank([3.0, 2.0, 1.0], [0, 1, 1]))
    0.5
    """
    scores, relevance, there = _read_graded(scores, relevance, where)
    relevant = relevance > 0
    best = np.where(relevant, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    above = (there & (scores > best)).sum(-1)
    tied = (there & (scores == best)).sum(-1)
    hits = (relevant & (scores == best)).sum(-1)
    # The first of `hits` among `tied` stands at a place when misses alone come before:
    # the chance of that, one place after the other.
    chance, found = np.ones(tied.shape), np.zeros(tied.shape)
    for place in range(1, scores.shape[-1] + 1):
        hit = hits / np.maximum(tied - place + 1, 1)
        found += chance * hit / (above + place)
        chance *= 1 - hit
    return np.where(relevant.any(-1), found, np.nan)


def win_mass(logps, grades, *, where=None):
    """Probability that a policy gives to the best response of a list.

        win mass = softmax(logps)[i],  i = argmax of the grades

    Equal bests add up. Chance is one over the number of items.

    Source: ADPO, arXiv:2510.18913v2, "probability mass on the ground-truth best item".
    Of the policy itself, not of the anchored softmax; the paper's choice is not
    verified.

    Args:
      logps: f64[..., K], nats, of the policy; normalised here over the list.
      grades: as `logps`: true rewards.
      where: bool, broadcastable to `logps`.

    Returns:
      f64[...]; NaN for an empty list, and for one that the policy never gives.

    Raises:
      ValueError: the shapes differ, `where` does not fit or a number is NaN.
      TypeError: `where` is not boolean.

    >>> round(float(win_mass([0.0, 0.0, 0.0], [1.0, 5.0, 2.0])), 4)
    0.3333
    """
    logps, grades, there = _read(where, logps=logps, grades=grades)
    logps = np.where(there, logps, -np.inf)
    best = np.where(there, grades, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    of_best = np.where(there & (grades == best), logps, -np.inf)
    with np.errstate(invalid="ignore"):  # a list without mass: -inf less -inf
        return np.exp(
            np.logaddexp.reduce(of_best, axis=-1) - np.logaddexp.reduce(logps, axis=-1)
        )
