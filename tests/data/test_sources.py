"""Batch number -> batch, and a source that can be stopped and resumed."""

import collections
import dataclasses
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from pref_jax.data import rows, sources
from pref_jax.types import TokenGroup


def groups(number=10, seed=0, **kwargs):
    return fixtures.random_groups(seed, number, 2, **kwargs)


def batches(number=10, **kwargs):
    arguments = {"groups_per_step": 4, "num_steps": 6, "row_length": 40, "seed": 1}
    return sources.training_batches(groups(number), **arguments | kwargs)


def records(batch) -> list[int]:
    return sorted(int(r) for r in batch.record if r >= 0)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- training batches -----------------------------------------------------------------


@given(number=st.integers(4, 11), per_step=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_is_a_permutation_and_nothing_is_lost(number, per_step, seed):
    """Batches run on over the end of an epoch."""
    num_steps = -(-3 * number // per_step)
    run = batches(number, groups_per_step=per_step, num_steps=num_steps, seed=seed)
    stream = [i for b in range(num_steps) for i in run.indices(b)]
    assert all(len(run.indices(b)) == per_step for b in range(num_steps))
    epochs = [stream[e * number : (e + 1) * number] for e in range(3)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)


def test_epochs_and_seeds_have_orders_of_their_own():
    run = batches(groups_per_step=10, num_steps=3)
    orders = [tuple(run.indices(b)) for b in range(3)]
    other = batches(groups_per_step=10, num_steps=3, seed=2)
    orders += [tuple(other.indices(b)) for b in range(3)]
    assert len(set(orders)) == 6


def test_every_step_takes_exactly_its_groups():
    run = batches()
    assert len(run) == 6
    seen = collections.Counter()
    for number in range(6):
        batch = run[number]
        assert batch.valid.all(-1).sum() == 4
        assert records(batch) == sorted(run.indices(number))
        seen.update(records(batch))
    assert sum(seen.values()) == 24 and set(seen.values()) <= {2, 3}


def test_a_batch_is_a_function_of_its_number_alone():
    """In any order, any number of times, and from another object."""
    run, again = batches(), batches()
    first = [run[b] for b in range(6)]
    for number in (5, 0, 3, 0):
        assert_same(run[number], first[number])
        assert_same(again[number], first[number])


def test_the_number_of_steps_changes_no_batch():
    """Only the shape may grow with it."""
    short, long = batches(num_steps=3), batches(num_steps=9)
    for number in range(3):
        assert list(short.indices(number)) == list(long.indices(number))


def test_all_batches_have_one_shape_and_the_tightest():
    run = batches(num_steps=5, rows_multiple=2)
    made = [run[b] for b in range(5)]
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch)) for batch in made}
    assert len(shapes) == 1
    shape = run.shape
    assert (shape.num_rows % 2, shape.row_length, shape.num_responses) == (0, 40, 2)
    rows = [b.valid.all(-1).reshape(shape.num_rows, -1).sum(1) for b in made]
    assert max((row > 0).sum() for row in rows) > shape.num_rows - 2
    assert max(row.max() for row in rows) == shape.groups_per_row
    assert max((b.predict >= 0).sum(1).max() for b in made) == shape.num_predict
    lengths = [len(r) for group in groups() for r in group.responses]
    assert shape.num_targets == max(lengths)


def test_a_longest_response_in_any_slot_fits():
    pair = (np.arange(3), np.arange(5))
    masks = tuple(np.ones(len(response), bool) for response in pair)
    group = TokenGroup(np.arange(2), pair, masks, (1.0, 0.0), 0)
    run = sources.evaluation_batches([group], groups_per_step=1, row_length=12)
    assert run.shape.num_targets == 5
    assert run[0].length.tolist() == [[3, 5]]


def test_more_groups_a_step_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="a step takes 4 groups and there are 3; use"):
        batches(3)


@pytest.mark.parametrize("number", [-1, 6])
def test_a_batch_that_does_not_exist_is_an_error(number):
    with pytest.raises(IndexError, match=f"batch {number} of 6"):
        batches()[number]


# --- evaluation batches ---------------------------------------------------------------


@given(number=st.integers(1, 11), per_step=st.integers(1, 12))
def test_an_evaluation_sees_every_group_once_in_order(number, per_step):
    run = sources.evaluation_batches(
        groups(number), groups_per_step=per_step, row_length=40, rows_multiple=2
    )
    made = [run[b] for b in range(len(run))]
    assert [r for batch in made for r in records(batch)] == list(range(number))
    assert len({batch.tokens.shape for batch in made}) == 1
    for batch in made:
        np.testing.assert_array_equal(batch.valid.all(-1), batch.record >= 0)
        assert not batch.loss_mask[batch.record < 0].any()


# --- fitting --------------------------------------------------------------------------


def test_fitting_counts_what_it_drops_and_cuts():
    """12 positions: the first fits, the second is cut or dropped, the third dropped."""

    def group(record, prompt, response):
        masks = (np.ones(response, bool),)
        return TokenGroup(
            np.arange(prompt), (np.arange(response),), masks, (1.0,), record
        )

    three = [group(0, 4, 8), group(1, 5, 9), group(2, 15, 13)]
    for policy, kept, counts in (
        ("drop", [0], {"groups": 3, "dropped": 2, "cut": 0}),
        ("keep_start", [0, 1], {"groups": 3, "dropped": 1, "cut": 1}),
        ("keep_end", [0, 1], {"groups": 3, "dropped": 1, "cut": 1}),
    ):
        fitted, got = sources.fit_groups(three, 12, policy=policy)
        assert [group.record for group in fitted] == kept
        assert got == counts
        assert max(group.num_tokens for group in fitted) <= 12
    fitted, got = sources.fit_groups(three, 40, policy="drop", max_positions=13)
    assert [group.record for group in fitted] == [0]
    assert got == {"groups": 3, "dropped": 2, "cut": 0}


def test_a_policy_that_is_not_known_is_an_error_though_all_groups_fit():
    for all_groups in (groups(), sources.Mixture([groups()], [1.0])):
        with pytest.raises(ValueError, match="`policy` must be one of drop, .*'cut'"):
            sources.fit_groups(all_groups, 1000, policy="cut")


def test_a_run_without_a_group_that_fits_is_an_error():
    shortest = min(group.num_tokens for group in groups())
    message = (
        f"no group fits a row: 10 groups, the shortest takes {shortest} positions, "
        f"`row_length` is 2, the model's longest text of any length and the policy "
        f"'keep_end'"
    )
    with pytest.raises(ValueError, match=message):
        sources.fit_groups(groups(), 2, policy="keep_end")
    with pytest.raises(ValueError, match="no group fits a row: 0 groups"):
        sources.fit_groups([], 2, policy="drop")


def test_the_longest_group_fits_the_row_length_made_for_it():
    longest = max(group.num_tokens for group in groups())
    assert sources.longest_group(groups(), multiple=1) == longest
    length = sources.longest_group(groups(), multiple=32)
    assert length % 32 == 0 and length - 32 < longest <= length


# --- the source -----------------------------------------------------------------------


def test_a_source_hands_out_every_batch_in_order():
    run = batches()
    source = sources.OfflineSource(run)
    for number in range(6):
        assert source.get_state() == number
        assert_same(source("ignored"), run[number])
    with pytest.raises(StopIteration):
        source(None)


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_a_resumed_source_goes_on_where_it_stopped(stop):
    run = batches()
    straight = sources.OfflineSource(run)
    expected = [straight(None) for _ in range(6)]
    first = sources.OfflineSource(run)
    for _ in range(stop):
        first(None)  # batches that were prepared ahead do not count
    second = sources.OfflineSource(batches())
    second.set_state(first.get_state())
    for number in range(stop, 6):
        assert_same(second(None), expected[number])


def test_a_source_can_be_set_back():
    source = sources.OfflineSource(["a", "b", "c"])
    assert [source(None), source(None)] == ["a", "b"]
    source.set_state(0)
    assert [source(None), source(None), source(None)] == ["a", "b", "c"]


def test_batches_come_in_order_though_some_take_longer_to_make():
    class Uneven(collections.abc.Sequence):
        def __len__(self):
            return 12

        def __getitem__(self, number):
            time.sleep(0.05 if number % 3 == 0 else 0.0)
            return number

    source = sources.OfflineSource(Uneven())
    assert [source(None) for _ in range(12)] == list(range(12))


def test_batches_are_prepared_ahead():
    made = []

    class Watched(collections.abc.Sequence):
        def __len__(self):
            return 9

        def __getitem__(self, number):
            made.append(number)
            return number

    source = sources.OfflineSource(Watched())
    assert source(None) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3 and source.get_state() == 1
    assert source.prefetchable


def test_a_source_is_not_set_beyond_its_end():
    source = sources.OfflineSource(["a", "b"])
    source.set_state(2)
    with pytest.raises(StopIteration):
        source(None)
    for number in (-1, 3):
        with pytest.raises(
            ValueError, match=f"there are 2 batches; got number {number}"
        ):
            source.set_state(number)


def test_an_error_while_a_batch_is_made_reaches_the_caller():
    spoiled = dataclasses.replace(groups()[0], prompt=np.zeros(0, np.int32))
    run = batches()
    broken = dataclasses.replace(run, groups=[spoiled, *run.groups[1:]])
    source = sources.OfflineSource(broken)
    with pytest.raises(ValueError, match="record 0 has an empty prompt"):
        for _ in range(6):
            source(None)


# --- mixtures -------------------------------------------------------------------------


def mixture(sizes=(40, 5, 11), weights=(2.0, 1.0, 1.0)):
    parts, number = [], 0
    for size in sizes:
        drawn = fixtures.random_groups(number, size, 2)
        parts.append(
            [dataclasses.replace(g, record=number + i) for i, g in enumerate(drawn)]
        )
        number += size
    return sources.Mixture(parts, weights)


@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    groups_per_step=st.integers(1, 9),
)
def test_every_part_has_its_share_after_every_batch(weights, groups_per_step):
    taken = sources._shares(weights, groups_per_step, 40)
    share = np.array(weights) / sum(weights)
    for b in range(41):
        assert taken[b].sum() == b * groups_per_step
        assert (abs(taken[b] - share * b * groups_per_step) <= len(weights)).all()
    assert (np.diff(taken, axis=0) >= 0).all()


def test_a_mixture_takes_its_shares_and_each_part_goes_through_its_epochs():
    mixed = mixture()
    run = sources.training_batches(
        mixed, groups_per_step=4, num_steps=30, row_length=64, seed=0
    )
    seen = [i for b in range(30) for i in run.indices(b)]
    of_part = [[i for i in seen if low <= i < high] for low, high in PART_RANGES]
    assert [len(part) for part in of_part] == [60, 30, 30]
    for part, (low, high) in zip(of_part, PART_RANGES, strict=True):
        for first in range(0, len(part) - (high - low) + 1, high - low):
            epoch = part[first : first + high - low]
            assert sorted(epoch) == list(range(low, high))
    records = sorted(r for b in range(2) for r in run[b].record.tolist() if r >= 0)
    assert records == sorted(mixed[i].record for i in seen[:8])


PART_RANGES = ((0, 40), (40, 45), (45, 56))


def test_a_mixture_of_one_part_is_that_part():
    plain = fixtures.random_groups(0, 10, 2)
    options = {"groups_per_step": 3, "num_steps": 9, "row_length": 64, "seed": 5}
    alone = sources.training_batches(plain, **options)
    mixed = sources.training_batches(sources.Mixture([plain], [7.0]), **options)
    for number in range(9):
        assert alone.indices(number) == mixed.indices(number)


def test_a_mixture_reads_as_its_parts_one_after_the_other():
    mixed = mixture()
    assert [g.record for g in mixed] == list(range(56))
    assert [mixed[i].record for i in (-1, 39, 40, 44, 45)] == [55, 39, 40, 44, 45]
    assert [g.record for g in mixed[38:42]] == [38, 39, 40, 41]
    with pytest.raises(IndexError, match="group 56 of 56"):
        mixed[56]
    expected = [g.num_tokens for part in mixed.parts for g in part]
    assert rows.measure(mixed).num_tokens.tolist() == expected


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((3, 4), (1.0,), "got 2 parts and 1 weights"),
        ((), (), "got 0 parts"),
        ((3, 0), (1.0, 1.0), "part 1 of the mixture has no groups"),
        ((3, 4), (1.0, 0.0), "`weights` must be positive"),
        ((3, 4), (1.0, float("nan")), "`weights` must be positive"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_an_error(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mixture(sizes, weights)


def test_parts_of_a_mixture_have_the_same_number_of_responses():
    parts = [fixtures.random_groups(0, 3, 2), fixtures.random_groups(0, 3, 1)]
    with pytest.raises(ValueError, match=r"have \[2, 1\] responses a group"):
        sources.Mixture(parts, (1.0, 1.0))
