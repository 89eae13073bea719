"""Anchor logps stored beside the tokens, per token and by record."""

import dataclasses

import numpy as np
import pytest

import fixtures
from pref_jax.data import anchor_cache, rows


def stamp(record, k, t):
    """A number that names its token."""
    return -(record + 0.1 * k + 0.001 * t)


def score(batch):
    """What the stamps of every token of a batch are, 0 outside the mask."""
    logps = np.zeros(batch.loss_mask.shape, np.float32)
    for b, k, t in zip(*np.nonzero(batch.loss_mask), strict=True):
        logps[b, k, t] = stamp(batch.record[b], k, t)
    return logps


@pytest.fixture
def groups():
    groups = fixtures.random_groups(0, 7, 2)
    return [dataclasses.replace(g, record=10 * g.record + 3) for g in groups]


def parts(groups):
    """The groups in two batches of another order, with empty slots."""
    for members in (groups[4:], groups[:4]):
        yield fixtures.pack_all(members[::-1], 40, rows_multiple=3, spare_groups=1)


def test_every_token_gets_the_logp_that_was_made_for_it(groups):
    stored = anchor_cache.with_anchor_logps(groups, parts(groups), score)
    assert [g.record for g in stored] == [g.record for g in groups]
    for group in stored:
        logps = group.extras["anchor_logps"]
        for k, mask in enumerate(group.loss_masks):
            expected = [m * stamp(group.record, k, t) for t, m in enumerate(mask)]
            assert logps[k].dtype == np.float32
            np.testing.assert_allclose(logps[k], expected, rtol=1e-6)


def test_stored_logps_come_back_in_any_other_packing(groups):
    stored = anchor_cache.with_anchor_logps(groups, parts(groups), score)
    batch = fixtures.pack_all(stored[::-1], 64)
    np.testing.assert_allclose(batch.extras["anchor_logps"], score(batch), rtol=1e-6)


def test_what_a_group_held_before_is_kept(groups):
    before = [dataclasses.replace(g, extras={"explore": g.record}) for g in groups]
    stored = anchor_cache.with_anchor_logps(before, parts(groups), score)
    for group, source in zip(stored, groups, strict=True):
        assert group.extras["explore"] == source.record
        assert group.prompt is source.prompt and group.responses is source.responses
    assert "anchor_logps" not in before[0].extras


def test_a_cut_group_keeps_the_logps_of_what_is_left(groups):
    stored = anchor_cache.with_anchor_logps(groups, parts(groups), score)
    longest = max(stored, key=lambda g: g.num_tokens)
    cut = rows.fit_group(longest, longest.num_tokens - 2, "keep_start")
    for k, logps in enumerate(cut.extras["anchor_logps"]):
        kept = longest.extras["anchor_logps"][k][: len(cut.responses[k])]
        np.testing.assert_array_equal(logps, kept)


def test_two_groups_of_one_record_are_an_error(groups):
    twice = [*groups, groups[0]]
    with pytest.raises(ValueError, match="record numbers of their own; some repeat"):
        anchor_cache.with_anchor_logps(twice, parts(groups), score)


def test_a_group_in_no_batch_is_an_error(groups):
    only = [fixtures.pack_all(groups[:5], 40)]
    with pytest.raises(ValueError, match="2 groups are in no batch, first 53"):
        anchor_cache.with_anchor_logps(groups, only, score)
