"""Anchor logps stored beside the tokens, per token, for these groups and this model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fixtures
from pref_jax.data import anchor_cache, rows, sources, token_cache
from pref_jax.data.token_cache import CacheError

KEY = {"model": "abcd"}


def stamp(record, k, t):
    """A number that names its token."""
    return -(record + 0.1 * k + 0.001 * t)


def score(number, batch):
    """What the stamps of every token of a batch are, 0 outside the mask."""
    logps = np.zeros(batch.loss_mask.shape, np.float32)
    for b, k, t in zip(*np.nonzero(batch.loss_mask), strict=True):
        logps[b, k, t] = stamp(batch.record[b], k, t)
    return logps


@pytest.fixture
def groups():
    groups = fixtures.random_groups(0, 7, 2)
    return [dataclasses.replace(g, record=10 * g.record + 3) for g in groups]


@pytest.fixture
def store(tmp_path):
    def store(groups, *, folder="cache", score=score, key=KEY, groups_per_step=3):
        return anchor_cache.with_anchor_logps(
            groups,
            folder=tmp_path / folder,
            batches=sources.evaluation_batches(
                groups, groups_per_step=groups_per_step, row_length=64, rows_multiple=3
            ),
            score=score,
            key=key,
        )

    return store


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def test_every_token_gets_the_logp_that_was_made_for_it(groups, store):
    stored = store(groups)
    assert [g.record for g in stored] == [g.record for g in groups]
    for group in stored:
        logps = group.extras["anchor_logps"]
        for k, mask in enumerate(group.loss_masks):
            expected = [m * stamp(group.record, k, t) for t, m in enumerate(mask)]
            assert logps[k].dtype == np.float32
            np.testing.assert_allclose(logps[k], expected, rtol=1e-6)
    assert [g.record for g in stored[1:6:2]] == [g.record for g in groups[1:6:2]]
    assert rows.measure(stored).num_tokens.tolist() == [g.num_tokens for g in groups]


def test_stored_logps_come_back_in_any_other_packing(groups, store):
    batch = fixtures.pack_all(store(groups)[::-1], 64)
    np.testing.assert_allclose(batch.extras["anchor_logps"], score(0, batch), rtol=1e-6)


def test_record_numbers_may_repeat(groups, tmp_path):
    same = [dataclasses.replace(g, record=i % 2) for i, g in enumerate(groups)]
    batches = sources.evaluation_batches(same, groups_per_step=3, row_length=64)

    def by_place(number, batch):
        """The place of each group in the data, counted by its batch."""
        first = 3 * number
        places = rows.slots([g.num_tokens for g in same[first:][:3]], batches.shape)
        logps = np.zeros(batch.loss_mask.shape, np.float32)
        for i, b in enumerate(places):
            logps[b] = np.where(batch.loss_mask[b], -1.0 - first - i, 0.0)
        return logps

    stored = anchor_cache.with_anchor_logps(
        same, folder=tmp_path, batches=batches, score=by_place, key=KEY
    )
    for i, group in enumerate(stored):
        for logps, mask in zip(
            group.extras["anchor_logps"], group.loss_masks, strict=True
        ):
            np.testing.assert_array_equal(logps, np.where(mask, -1.0 - i, 0.0))


def test_what_a_group_held_before_is_kept(groups, store, tmp_path):
    store(groups)
    before = [dataclasses.replace(g, extras={"explore": g.record}) for g in groups]
    stored = anchor_cache.AnchoredGroups(before, tmp_path / "cache")
    for group, source in zip(stored, groups, strict=True):
        assert group.extras["explore"] == source.record
        assert group.prompt is source.prompt and group.responses is source.responses
    assert "anchor_logps" not in before[0].extras


def test_a_cut_group_keeps_the_logps_of_what_is_left(groups, store):
    longest = max(store(groups), key=lambda g: g.num_tokens)
    cut = rows.fit_group(longest, longest.num_tokens - 2, "keep_start")
    for k, logps in enumerate(cut.extras["anchor_logps"]):
        kept = longest.extras["anchor_logps"][k][: len(cut.responses[k])]
        np.testing.assert_array_equal(logps, kept)


def test_a_complete_cache_is_not_scored_again(groups, store):
    first = [g.extras["anchor_logps"] for g in store(groups)]

    def never(number, batch):
        raise AssertionError("scored again")

    for group, logps in zip(store(groups, score=never), first, strict=True):
        for a, b in zip(group.extras["anchor_logps"], logps, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(
    groups, store, tmp_path, fail_at
):
    store(groups, folder="straight")
    scored = []

    def failing(number, batch):
        if len(scored) == fail_at:
            raise KeyboardInterrupt
        scored.append(1)
        return score(number, batch)

    with pytest.raises(KeyboardInterrupt):
        store(groups, folder="broken", score=failing)

    def counted(number, batch):
        scored.append(1)
        return score(number, batch)

    store(groups, folder="broken", score=counted)
    assert len(scored) == 3  # batches of 3, 3 and 1
    assert files(tmp_path / "broken") == files(tmp_path / "straight")


def change_ids(group):
    return dataclasses.replace(group, prompt=group.prompt + 1)


def change_mask(group):
    masks = tuple(np.zeros_like(mask) for mask in group.loss_masks)
    return dataclasses.replace(group, loss_masks=masks)


@pytest.mark.parametrize("change", [change_ids, change_mask])
def test_other_groups_or_masks_are_refused_by_name(groups, store, change):
    store(groups)
    with pytest.raises(CacheError, match="made from something else: groups was"):
        store([*groups[:-1], change(groups[-1])])


def test_what_changed_of_a_token_cache_is_refused_by_name(groups, store, tmp_path):
    def cached(**changed):
        key = {"tokenizer": "abcd", "chat_template": "efgh"} | changed
        return token_cache.cached_groups(
            tmp_path / "_".join(key.values()),
            key=key,
            make_shards=lambda first: iter([token_cache.Shard(groups, {})]),
        )

    first = store(cached())
    assert [g.record for g in store(cached())] == [g.record for g in first]
    for name in ("tokenizer", "chat_template"):
        with pytest.raises(CacheError, match=f"tokens, {name} was .*, now other"):
            store(cached(**{name: "other"}))


def test_another_rule_of_masks_is_refused_by_name(groups, store, monkeypatch):
    store(groups)
    monkeypatch.setattr(anchor_cache, "_RULE", "all targets, version 2")
    with pytest.raises(CacheError, match="rule was logps of the masked targets"):
        store(groups)


def test_another_model_or_batch_size_is_refused_by_name(groups, store):
    store(groups)
    with pytest.raises(CacheError, match="model was abcd, now other"):
        store(groups, key={"model": "other"})
    with pytest.raises(CacheError, match="groups_per_file was 3, now 2"):
        store(groups, groups_per_step=2)


def test_parameters_are_known_by_every_bit_name_and_shape():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(2)}}
    known = anchor_cache.params_identity(params)
    assert known == anchor_cache.params_identity(jax.device_get(params))
    others = [
        {**params, "a": params["a"].at[1, 2].set(jnp.nextafter(5.0, 6.0))},
        {**params, "a": params["a"].reshape(3, 2)},
        {"a": params["a"], "b": {"d": jnp.ones(2)}},
        {**params, "b": {"c": jnp.ones(2, jnp.bfloat16)}},
        {**params, "a": params["a"][::-1]},
        {**params, "a": params["a"][:, jnp.array([1, 0, 2])]},
        {**params, "b": {"c": -jnp.ones(2)}},
        {**params, "b": {"c": jnp.ones(2, bool)}},
    ]
    assert len({known, *map(anchor_cache.params_identity, others)}) == 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_mesh_does_not_change_what_parameters_are_known_by(dtype):
    params = {"a": jnp.arange(64).reshape(8, 8).astype(dtype)}
    known = anchor_cache.params_identity(params)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec("x", "y"), PartitionSpec(None, "x")):
        split = jax.device_put(params, NamedSharding(mesh, spec))
        assert anchor_cache.params_identity(split) == known
