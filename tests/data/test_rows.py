"""Groups to rows: what fits, where it lies, what it sees, and how it reads."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from pref_jax.data import rows
from pref_jax.types import TokenGroup


def group(prompt, *responses, masks=None, record=0, **kwargs) -> TokenGroup:
    """A group of ids that are readable: prompts below 100, responses above."""
    masks = masks or [[True] * len(r) for r in responses]
    return TokenGroup(
        np.array(prompt, np.int32),
        tuple(np.array(r, np.int32) for r in responses),
        tuple(np.array(m, bool) for m in masks),
        tuple(float(k == 0) for k in range(len(responses))),
        record,
        **kwargs,
    )


# The row of the module's docstring: prompts of 5 and 3 tokens, branches of 4 and 2, and
# of 3 and 5 targets.
EXAMPLE = [
    group(
        [1, 2, 3, 4, 5],
        [101, 102, 103, 104],
        [111, 112],
        masks=[[True, True, False, True], [True, True]],
        record=7,
    ),
    group([21, 22, 23], [121, 122, 123], [131, 132, 133, 134, 135], record=3),
]
EXAMPLE_SHAPE = rows.RowShape(
    num_rows=2,
    row_length=26,
    groups_per_row=2,
    num_predict=14,
    num_responses=2,
    num_targets=6,
)


# --- the layout -----------------------------------------------------------------------


def test_the_example_lies_as_it_is_drawn():
    batch = rows.pack(EXAMPLE, EXAMPLE_SHAPE)
    first, second = [1, 2, 3, 4], [21, 22]
    a, b = [5, 101, 102, 103, 104], [5, 111, 112]
    c, d = [23, 121, 122, 123], [23, 131, 132, 133, 134, 135]
    tokens = [*first, *a, *b, *second, *c, *d, 0, 0]
    assert batch.tokens[0].tolist() == tokens
    assert batch.position[0].tolist() == (
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 0, 0]
    )
    ends = [(12, 4), (9, 5), (12, 3), (24, 2), (18, 4), (24, 6), (25, 1), (26, 1)]
    assert batch.end[0].tolist() == [end for end, count in ends for _ in range(count)]
    targets = [0] * 4 + [*a[1:], 0, *b[1:], 0] + [0] * 2 + [*c[1:], 0, *d[1:], 0, 0, 0]
    assert batch.targets[0].tolist() == targets
    # Positions that predict a trained target: all but the third of branch a.
    predict = [4, 5, 7, 9, 10, 14, 15, 16, 18, 19, 20, 21, 22, -1]
    assert batch.predict[0].tolist() == predict


def test_the_example_says_where_its_branches_are():
    batch = rows.pack(EXAMPLE, EXAMPLE_SHAPE)
    assert batch.start.tolist() == [[4, 9], [14, 18], [0, 0], [0, 0]]
    assert batch.length.tolist() == [[4, 2], [3, 5], [0, 0], [0, 0]]
    assert batch.valid.tolist() == [[True] * 2] * 2 + [[False] * 2] * 2
    assert batch.labels.tolist() == [[1, 0]] * 2 + [[0, 0]] * 2
    assert batch.record.tolist() == [7, 3, -1, -1]
    assert batch.loss_mask.shape == (4, 2, 6)
    assert batch.loss_mask[0, 0].tolist() == [True, True, False, True, False, False]
    assert batch.loss_mask.sum(-1).tolist() == [[3, 2], [3, 5], [0, 0], [0, 0]]
    assert batch.step_ids is None and batch.extras == {}
    # A row without groups is padding: every token sees itself alone.
    assert batch.end[1].tolist() == list(range(1, 27))
    assert (batch.predict[1] == -1).all()


def test_the_example_reads_as_text():
    batch = rows.pack(EXAMPLE, dataclasses.replace(EXAMPLE_SHAPE, num_rows=1))

    def decode(ids):
        return " ".join(f"t{i}" for i in ids)

    assert rows.show_batch(batch, decode, rows=5) == "\n".join(
        [
            "row 0: records 7, 3",
            "index  pos  end  part  token -> target (* trained)",
            "    0    0   12    1p  't1'",
            "    1    1   12    1p  't2'",
            "    2    2   12    1p  't3'",
            "    3    3   12    1p  't4'",
            "    4    4    9    1a  't5' -> * 't101'",
            "    5    5    9    1a  't101' -> * 't102'",
            "    6    6    9    1a  't102' ->   't103'",
            "    7    7    9    1a  't103' -> * 't104'",
            "    8    8    9    1a  't104'",
            "    9    4   12    1b  't5' -> * 't111'",
            "   10    5   12    1b  't111' -> * 't112'",
            "   11    6   12    1b  't112'",
            "   12    0   24    2p  't21'",
            "   13    1   24    2p  't22'",
            "   14    2   18    2a  't23' -> * 't121'",
            "   15    3   18    2a  't121' -> * 't122'",
            "   16    4   18    2a  't122' -> * 't123'",
            "   17    5   18    2a  't123'",
            "   18    2   24    2b  't23' -> * 't131'",
            "   19    3   24    2b  't131' -> * 't132'",
            "   20    4   24    2b  't132' -> * 't133'",
            "   21    5   24    2b  't133' -> * 't134'",
            "   22    6   24    2b  't134' -> * 't135'",
            "   23    7   24    2b  't135'",
            "   24    0   25     .",
            "   25    0   26     .",
        ]
    )


def test_rows_are_shown_as_many_as_asked_for():
    groups = fixtures.random_groups(0, 8, 2)
    batch = fixtures.pack_all(groups, 40, spare_groups=1)
    assert len(batch.tokens) > 2
    text = rows.show_batch(batch, str, rows=2)
    assert [line for line in text.splitlines() if line.startswith("row ")] == [
        f"row {g}: records {', '.join(str(r) for r in records if r >= 0)}"
        for g, records in enumerate(batch.record.reshape(len(batch.tokens), -1)[:2])
    ]


def test_rates_count_tokens_without_padding_and_prompts():
    assert rows.count_batch(rows.pack(EXAMPLE, EXAMPLE_SHAPE)) == {
        "tokens": sum(group.num_tokens for group in EXAMPLE),
        "examples": 2,
    }


@given(seed=st.integers(0, 99), num_responses=st.integers(1, 3))
def test_every_token_of_every_group_can_be_read_back(seed, num_responses):
    groups = fixtures.random_groups(seed, 6, num_responses)
    batch = fixtures.pack_all(groups, 48, spare_groups=1)
    assert sorted(batch.record[batch.record >= 0]) == list(range(6))
    per_row = len(batch.valid) // len(batch.tokens)
    for b in np.flatnonzero(batch.valid.all(-1)):
        g, source = b // per_row, groups[batch.record[b]]
        for k, response in enumerate(source.responses):
            start, n = batch.start[b, k], batch.length[b, k]
            last = start + n  # the state that has read all of the response
            # By the rule of attention alone: what does the last token see?
            index = np.arange(batch.tokens.shape[1])
            seen = np.flatnonzero((index <= last) & (last < batch.end[g]))
            text = [*source.prompt, *response]
            assert batch.tokens[g, seen].tolist() == text
            assert batch.position[g, seen].tolist() == list(range(len(text)))
            assert batch.targets[g, start:last].tolist() == response.tolist()
            mask = source.loss_masks[k]
            assert batch.loss_mask[b, k, :n].tolist() == mask.tolist()
            assert set(start + np.flatnonzero(mask)) <= set(batch.predict[g])
    assert (batch.predict >= 0).sum() == batch.loss_mask.sum()
    scored = [row[row >= 0].tolist() for row in batch.predict]
    assert scored == [sorted(row) for row in scored]


def test_masks_come_from_the_group_and_never_from_ids():
    """An end token that equals the padding id 0 is a target as any other."""
    zeros = group([0, 0], [0, 0, 0], [0])
    batch = fixtures.pack_all([zeros], 16)
    assert batch.loss_mask.sum(-1).tolist() == [[3, 1]]
    assert (batch.predict >= 0).sum() == 4


def test_steps_and_stored_logps_lie_beside_their_tokens():
    steps = (np.array([1, 0, 2]), np.array([1]))
    stored = (np.array([-1.0, -2.0, -3.0]), np.array([-4.0]))
    given_ = group(
        [1], [101, 102, 103], [111], step_ids=steps, extras={"anchor_logps": stored}
    )
    batch = fixtures.pack_all([given_], 16, spare_groups=1)
    expected = [[[1, 0, 2], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.step_ids.tolist() == expected
    expected = [[[-1.0, -2.0, -3.0], [-4.0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.extras["anchor_logps"].tolist() == expected
    assert batch.extras["anchor_logps"].dtype == np.float32


def of_sources(record, logps, lengths):
    """A pair with what source models say of its two responses."""
    extras = {"source_logps": np.array(logps), "source_lengths": np.array(lengths)}
    return group([1], [101, 102, 103], [111], record=record, extras=extras)


def test_what_source_models_say_lies_beside_its_responses():
    groups = [
        of_sources(4, [[-1.5, -2.5], [-3.5, -4.5]], [[2, 3], [1, 0]]),
        of_sources(7, [[-5.5, 0.0], [-7.5, -8.5]], [[4, 0], [5, 6]]),
    ]
    batch = fixtures.pack_all(groups, 16, spare_groups=1)
    assert batch.record.tolist() == [4, 7, -1]
    logps = batch.extras["source_logps"]
    assert logps.tolist() == [
        [[-1.5, -2.5], [-3.5, -4.5]],
        [[-5.5, 0.0], [-7.5, -8.5]],
        [[0.0, 0.0], [0.0, 0.0]],
    ]
    lengths = batch.extras["source_lengths"]
    assert lengths.tolist() == [[[2, 3], [1, 0]], [[4, 0], [5, 6]], [[0, 0], [0, 0]]]
    assert logps.dtype == lengths.dtype == np.float32


def test_marks_of_responses_and_of_pairs_lie_beside_them():
    extras = {"explore": np.array([0, 1]), "margin": np.array(2.5)}
    batch = fixtures.pack_all(
        [group([1], [101], [111], extras=extras)], 16, spare_groups=1
    )
    assert batch.extras["explore"].tolist() == [[0, 1], [0, 0]]
    assert batch.extras["margin"].tolist() == [2.5, 0.0]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (
            {"advantages": 1.0},
            "record 4 has the extra 'advantages'; there are advantage",
        ),
        (
            {"coefficient": 1.0},
            r"record 4 has coefficient of the shape \(\); 2 .* \(2,\)",
        ),
        (
            {"episode": [1, 2]},
            r"record 4 has episode of the shape \(2,\); .* need \(\)",
        ),
    ],
)
def test_an_extra_of_another_name_or_shape_is_named(extras, message):
    with pytest.raises(ValueError, match=message):
        fixtures.pack_all([group([1], [101], [111], record=4, extras=extras)], 16)


def test_all_groups_have_the_same_sources():
    one = of_sources(4, [[-1.0], [-2.0]], [[1], [1]])
    two = of_sources(7, [[-1.0, -1.0], [-2.0, -2.0]], [[1, 1], [1, 1]])
    message = (
        r"record 4 has source_\w+ of the shape \(2, 1\), record 7 has source_\w+ of "
        r"\(2, 2\); all need \[K, M\] .* a response the length 0"
    )
    with pytest.raises(ValueError, match=message):
        fixtures.pack_all([one, two], 32)
    uneven = of_sources(5, [[-1.0, -1.0], [-2.0, -2.0]], [[1], [1]])
    with pytest.raises(ValueError, match=r"record 5 has .* record 5 has .*; all need"):
        fixtures.pack_all([uneven], 32)


# --- what fits ------------------------------------------------------------------------


def test_first_fit_takes_the_first_row_with_room():
    assert rows.first_fit([4, 7, 6, 3, 1], 10) == [[0, 2], [1, 3]] + [[4]]
    assert rows.first_fit([10, 10], 10) == [[0], [1]]
    assert rows.first_fit([], 10) == []


@given(lengths=st.lists(st.integers(1, 10), max_size=20))
def test_first_fit_places_everything_once_and_leaves_no_room_unused(lengths):
    packed = rows.first_fit(lengths, 10)
    assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
    for number, row in enumerate(packed):
        assert row == sorted(row) and sum(lengths[i] for i in row) <= 10
        for i in row:  # no earlier row had room when i came
            for earlier in packed[:number]:
                before = sum(lengths[j] for j in earlier if j < i)
                assert before + lengths[i] > 10


def test_first_fit_refuses_what_is_longer_than_a_row():
    message = "group 1 takes 11 positions, a row has 10; pass it through `fit_group`"
    with pytest.raises(ValueError, match=message):
        rows.first_fit([3, 11], 10)


LONG = group(
    [1, 2, 3, 4, 5],
    [101, 102, 103, 104, 105, 106],
    [111, 112, 113],
    masks=[[True, False, True, True, True, True], [True, True, True]],
    step_ids=(np.arange(6), np.arange(3)),
    extras={"anchor_logps": (np.arange(6.0), np.arange(3.0))},
)


def test_a_group_counts_its_prompt_once_and_every_branch_with_its_opening():
    assert LONG.num_tokens == 4 + (6 + 1) + (3 + 1)


@pytest.mark.parametrize("policy", rows.FIT_POLICIES)
def test_a_group_that_fits_is_left_alone(policy):
    assert rows.fit_group(LONG, 15, policy) is LONG


def test_drop_leaves_a_longer_group_out():
    assert rows.fit_group(LONG, 14, "drop") is None


@pytest.mark.parametrize(
    ("row_length", "lengths"),
    [(14, (5, 3)), (12, (3, 3)), (11, (2, 3)), (10, (2, 2)), (8, (1, 1))],
)
def test_keep_start_cuts_the_longest_response_first(row_length, lengths):
    cut = rows.fit_group(LONG, row_length, "keep_start")
    assert cut.num_tokens == row_length
    assert sorted(map(len, cut.responses)) == sorted(lengths)
    assert cut.prompt.tolist() == LONG.prompt.tolist()
    for name in ("responses", "loss_masks", "step_ids"):
        before, after = getattr(LONG, name), getattr(cut, name)
        for x, y, response in zip(before, after, cut.responses, strict=True):
            assert y.tolist() == x[: len(response)].tolist()
    stored = cut.extras["anchor_logps"]
    assert [len(x) for x in stored] == [len(r) for r in cut.responses]
    assert (cut.labels, cut.record) == (LONG.labels, LONG.record)


def test_keep_start_does_not_cut_what_source_models_scored_whole():
    scored = of_sources(4, [[-1.0], [-2.0]], [[1], [1]])
    assert scored.num_tokens == 6
    message = (
        "record 4 has source_logps, source_lengths of whole responses, and the policy "
        "`keep_start` would cut one. Use `drop`, or a longer row"
    )
    with pytest.raises(ValueError, match=message):
        rows.fit_group(scored, 5, "keep_start")
    assert rows.fit_group(scored, 6, "keep_start") is scored
    assert rows.fit_group(scored, 5, "drop") is None
    longer = dataclasses.replace(scored, prompt=np.array([1, 2, 3], np.int32))
    kept = rows.fit_group(longer, 7, "keep_end")
    assert kept.num_tokens == 7 and kept.extras is longer.extras


def test_keep_start_empties_no_response():
    assert rows.fit_group(LONG, 7, "keep_start") is None
    assert rows.fit_group(group([1], [101, 102]), 2, "keep_start").num_tokens == 2
    assert rows.fit_group(group([1], [101, 102]), 1, "keep_start") is None


def test_keep_start_leaves_every_response_a_trained_target():
    """A pair of which one half trains nothing would be a silent zero."""
    late = group([1], [101, 102, 103], [111], masks=[[False, False, True], [True]])
    assert late.num_tokens == 6
    assert rows.fit_group(late, 5, "keep_start") is None


@pytest.mark.parametrize(
    ("row_length", "prompt"),
    [(14, [1, 3, 4, 5]), (13, [1, 4, 5]), (12, [1, 5]), (11, None), (3, None)],
)
def test_keep_end_cuts_the_prompt_after_its_first_token(row_length, prompt):
    cut = rows.fit_group(LONG, row_length, "keep_end")
    assert (cut if prompt is None else cut.prompt.tolist()) == prompt
    if cut is not None:
        assert cut.num_tokens == row_length
        assert cut.responses is LONG.responses and cut.extras is LONG.extras


@pytest.mark.parametrize(
    ("policy", "max_positions", "prompt", "lengths"),
    [
        ("drop", 11, 5, (6, 3)),  # 5 + 6: a prompt and its longest response
        ("drop", 10, None, None),
        ("keep_start", 10, 5, (5, 3)),
        ("keep_start", 7, 5, (2, 2)),
        ("keep_start", 5, None, None),
        ("keep_end", 10, 4, (6, 3)),
        ("keep_end", 8, 2, (6, 3)),
        ("keep_end", 7, None, None),
    ],
)
def test_no_text_is_longer_than_the_model(policy, max_positions, prompt, lengths):
    cut = rows.fit_group(LONG, 15, policy, max_positions=max_positions)
    if prompt is None:
        assert cut is None
        return
    assert len(cut.prompt) == prompt
    assert tuple(map(len, cut.responses)) == lengths
    assert (cut is LONG) == (max_positions == 11)


def test_a_short_row_and_a_short_model_cut_what_each_needs():
    cut = rows.fit_group(LONG, 12, "keep_start", max_positions=9)
    assert tuple(map(len, cut.responses)) == (3, 3)  # of the row
    cut = rows.fit_group(LONG, 14, "keep_start", max_positions=9)
    assert tuple(map(len, cut.responses)) == (4, 3)  # of the model
    assert len(rows.fit_group(LONG, 14, "keep_end", max_positions=9).prompt) == 3
    assert len(rows.fit_group(LONG, 12, "keep_end", max_positions=10).prompt) == 2


@given(
    seed=st.integers(0, 99),
    row_length=st.integers(1, 60),
    policy=st.sampled_from(rows.FIT_POLICIES),
    num_responses=st.integers(1, 3),
)
def test_a_fitted_group_fits_and_shares_its_prompt(
    seed, row_length, policy, num_responses
):
    source = fixtures.random_groups(
        seed, 1, num_responses, prompt=(1, 20), response=(1, 20)
    )[0]
    cut = rows.fit_group(source, row_length, policy)
    if cut is None:
        assert source.num_tokens > row_length
        return
    assert cut.num_tokens <= row_length
    assert len(cut.prompt) >= 1 and cut.prompt[-1] == source.prompt[-1]
    assert cut.prompt[0] == source.prompt[0]
    assert min(len(r) for r in cut.responses) >= 1
    # Nothing is cut beyond need.
    assert cut is source or cut.num_tokens == row_length


def test_a_policy_that_is_not_known_is_an_error():
    with pytest.raises(
        ValueError, match="`policy` must be one of drop, keep_start, ke"
    ):
        rows.fit_group(LONG, 10, "truncate")
    with pytest.raises(ValueError, match="got 'truncate'"):
        rows.fit_group(LONG, 1000, "truncate")  # it fits: the policy is not needed


# --- one shape for a run --------------------------------------------------------------


def plan(batches, num_tokens, **kwargs):
    arguments = {
        "num_tokens": num_tokens,
        "num_predict": [n // 2 for n in num_tokens],
        "num_targets": 9,
        "num_responses": 2,
        "row_length": 10,
    }
    return rows.plan_shape(batches, **arguments | kwargs)


def test_the_shape_is_the_smallest_that_every_batch_fits():
    shape = plan([[0, 1], [2, 3], [4, 5, 6]], [6, 6, 6, 4, 2, 2, 2])
    assert shape == rows.RowShape(
        num_rows=2,  # 6 + 6 does not fit a row
        row_length=10,
        groups_per_row=3,  # 2 + 2 + 2
        num_predict=5,  # 6 and 4 share a row: 3 + 2
        num_responses=2,
        num_targets=9,
    )


@pytest.mark.parametrize(("multiple", "num_rows"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_rows_are_rounded_up_to_a_multiple(multiple, num_rows):
    shape = plan([[0, 1, 2]], [6, 6, 6], rows_multiple=multiple)
    assert shape.num_rows == num_rows


def test_a_batch_may_leave_rows_and_slots_empty():
    shape = plan([[0, 1], [0]], [6, 6])
    assert shape.num_rows == 2
    batch = rows.pack([group([1, 2], [101], [111], record=5)], shape)
    assert batch.record.tolist() == [5, -1]
    empty = rows.pack([], shape)
    assert not empty.valid.any() and (empty.predict == -1).all()


# --- errors ---------------------------------------------------------------------------

PAIR = group([1, 2], [101], [111], record=4)


@pytest.mark.parametrize(
    ("groups", "change", "message"),
    [
        ([*EXAMPLE, PAIR], {"num_rows": 1}, "3 groups need 2 rows of up to 2 groups; "),
        (EXAMPLE, {"groups_per_row": 1}, "2 groups need 1 rows of up to 2 groups; the"),
        (
            EXAMPLE,
            {"num_predict": 12},
            "row 0 scores 13 positions; the shape has 12. P",
        ),
        (
            EXAMPLE,
            {"num_targets": 4},
            "record 3 has 2 responses of up to 5 tokens; the",
        ),
        (EXAMPLE, {"num_responses": 3}, "record 7 has 2 responses .*; the shape has 3"),
        (EXAMPLE, {"row_length": 11}, "group 0 takes 12 positions, a row has 11"),
        ([group([], [101], [111], record=4)], {}, "record 4 has an empty prompt or an"),
        (
            [group([1], [101], [], record=4)],
            {},
            "record 4 has an empty prompt or an em",
        ),
        (
            [PAIR, dataclasses.replace(PAIR, record=5, extras={"anchor_logps": ()})],
            {},
            r"record 5 has the extras \['anchor_logps'\], record 4 has \[\]; all must",
        ),
    ],
)
def test_what_does_not_fit_the_shape_is_an_error(groups, change, message):
    with pytest.raises(ValueError, match=message):
        rows.pack(groups, dataclasses.replace(EXAMPLE_SHAPE, **change))


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(PAIR, loss_masks=(np.ones(3, bool), np.ones(1, bool))),
        group([1], [101, 102], [111], masks=[[True], [True]]),
        group([1], [101, 102], [111], extras={"anchor_logps": ([-1.0], [-1.0])}),
        group([1], [101, 102], [111], step_ids=(np.ones(1, int), np.ones(1, int))),
        dataclasses.replace(PAIR, labels=(1.0,)),
    ],
    ids=["long mask", "short mask", "short logps", "short steps", "short labels"],
)
def test_fields_that_disagree_in_length_are_an_error(wrong):
    """NumPy would stretch a single entry over the whole response."""
    with pytest.raises(ValueError, match=f"record {wrong.record}"):
        rows.pack([wrong], EXAMPLE_SHAPE)


@pytest.mark.parametrize("first", [0, 1])
def test_groups_with_and_without_steps_do_not_share_a_batch(first):
    steps = dataclasses.replace(PAIR, record=5, step_ids=(np.ones(1, int),) * 2)
    groups = [PAIR, steps] if first == 0 else [steps, PAIR]
    with pytest.raises(ValueError, match="record .*step_ids"):
        rows.pack(groups, EXAMPLE_SHAPE)
