"""Rankings are scikit-learn's where it has them: ties, short lists, every k."""

import numpy as np
import pytest

metrics = pytest.importorskip("sklearn.metrics")

from pref_jax.evals import ranking  # noqa: E402

NUM_LISTS, NUM_ITEMS = 40, 7


def lists(*, ties, seed=0):
    """Scores, relevance with a relevant item in each list, and which items are there.

    At least two of each list are: scikit-learn refuses shorter ones.
    """
    rng = np.random.default_rng(seed)
    shape = NUM_LISTS, NUM_ITEMS
    scores = rng.integers(0, 3, shape) if ties else rng.normal(size=shape)
    relevance = rng.integers(0, 4, shape)
    where = rng.random(shape) < 0.7
    where[:, :2] = True
    relevance[:, 0] = np.maximum(relevance[:, 0], 1)
    return scores.astype(float), relevance.astype(float), where


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 3, NUM_ITEMS, 20])
def test_ndcg(ties, k):
    scores, relevance, where = lists(ties=ties)
    found = ranking.ndcg(scores, relevance, k=k, where=where)
    for value, score, grade, kept in zip(found, scores, relevance, where, strict=True):
        gains = np.exp2(grade[kept]) - 1
        expected = metrics.ndcg_score([gains], [score[kept]], k=k)
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_recall(k):
    """With the first k as what is predicted; scikit-learn has no ties here."""
    scores, relevance, where = lists(ties=False, seed=1)
    found = ranking.recall(scores, relevance, k=k, where=where)
    for value, score, grade, kept in zip(found, scores, relevance, where, strict=True):
        first = np.argsort(np.argsort(-score[kept])) < k
        expected = metrics.recall_score(grade[kept] > 0, first)
        assert value == pytest.approx(expected, rel=1e-12)


def test_the_reciprocal_rank_with_one_relevant_item():
    scores, _, where = lists(ties=False, seed=2)
    relevance = np.zeros_like(scores)
    relevance[:, 1] = 1
    found = ranking.reciprocal_rank(scores, relevance, where=where)
    for value, score, grade, kept in zip(found, scores, relevance, where, strict=True):
        expected = metrics.label_ranking_average_precision_score(
            [grade[kept] > 0], [score[kept]]
        )
        assert value == pytest.approx(expected, rel=1e-12)
