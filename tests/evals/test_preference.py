"""Means, scores and cuts are arithmetic; an interval covers what it says it covers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from pref_jax.evals.preference import (
    Interval,
    accuracy_by_length,
    bootstrap_interval,
    brier_score,
    by_field,
    by_length_difference,
    by_total_length,
    calibration,
    log_loss,
    reward_accuracy,
    reward_margin,
    wins,
)
from pref_jax.losses.pairwise import logistic_loss


def test_wins_are_one_a_half_or_none():
    found = wins([2.0, 1.0, 0.0, -1.0], [1.0, 1.0, 1.0, -2.0])
    assert found.tolist() == [1.0, 0.5, 0.0, 1.0]


def test_the_two_sides_share_every_win():
    rng = np.random.default_rng(0)
    grades, other = rng.integers(0, 3, (2, 50)).astype(float)
    assert (grades == other).any()
    np.testing.assert_array_equal(wins(grades, other) + wins(other, grades), 1.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_grades_that_are_not_floats_are_compared_as_numbers(dtype):
    grades, other = np.array([0, 1, 1], dtype), np.array([1, 1, 0], dtype)
    assert wins(grades, other).tolist() == [0.0, 0.5, 1.0]


def test_a_grade_that_is_not_a_number_wins_nothing_silently():
    assert math.isnan(wins([math.nan], [1.0])[0])
    assert math.isnan(wins([1.0], [math.nan])[0])
    infinite = wins([-math.inf, math.inf, math.inf], [-math.inf, math.inf, 0.0])
    assert infinite.tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match="must be finite; 1 of 2 are not"):
        bootstrap_interval(wins([math.nan, 1.0], [1.0, 0.0]))


def test_wins_need_the_same_prompts():
    with pytest.raises(ValueError, match=r"each prompt; got \(3,\) and \(2,\)"):
        wins([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_mean_is_exact_and_inside_its_interval():
    found = bootstrap_interval([0.0, 0.5, 1.0, 4.0])
    assert isinstance(found, Interval)
    assert found.mean == 5.5 / 4
    assert 0.0 <= found.low < found.mean < found.high <= 4.0


def test_one_value_has_no_width():
    assert bootstrap_interval([2.5]) == Interval(2.5, 2.5, 2.5)


def test_two_values_have_the_percentiles_of_all_resamples():
    # Of two draws from {0, 1} the mean is 0, 1/2 or 1 with 1/4, 1/2 and 1/4: at 60 %
    # both ends, at 20 % neither, lie within reach of the tails.
    wide = bootstrap_interval([0.0, 1.0], confidence=0.6)
    assert wide == Interval(0.5, 0.0, 1.0)
    narrow = bootstrap_interval([0.0, 1.0], confidence=0.2)
    assert narrow == Interval(0.5, 0.5, 0.5)


def test_the_width_is_that_of_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # 200 experiments of 60 prompts with win rate 0.7: 90 % intervals hold the truth in
    # 180 of them, give or take sqrt(200 * 0.9 * 0.1) = 4.2; four deviations allowed.
    rng = np.random.default_rng(2)
    covered = 0
    for experiment in range(200):
        won = (rng.random(60) < 0.7).astype(float)
        interval = bootstrap_interval(
            won, confidence=0.9, num_resamples=400, seed=experiment
        )
        covered += interval.low <= 0.7 <= interval.high
    assert abs(covered - 180) <= 17


def test_the_same_seed_draws_the_same():
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"needs one number a prompt; got shape \(0,\)"),
        (1.0, r"needs one number a prompt; got shape \(\)"),
        ([[1.0, 2.0]], r"needs one number a prompt; got shape \(1, 2\)"),
        ([1.0, math.nan, -math.inf], "must be finite; 2 of 3 are not"),
    ],
)
def test_values_that_have_no_mean_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values)


# --- accuracy, margins, scores --------------------------------------------------------


def rewards_strategy(max_pairs=12):
    values = st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 2))
    return st.lists(st.tuples(values, values), min_size=1, max_size=max_pairs)


def test_accuracy_counts_a_tie_as_one_half():
    found = reward_accuracy([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, -3.0]])
    assert found.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert reward_accuracy(np.full((5, 2), 7.0)).tolist() == [0.5] * 5


def test_the_margin_is_chosen_minus_rejected():
    assert reward_margin([[2.0, 0.5], [-1.0, 3.0]]).tolist() == [1.5, -4.0]


@given(rewards_strategy())
def test_monotone_transforms_keep_the_accuracy(rewards):
    rewards = np.array(rewards)
    expected = reward_accuracy(rewards)
    for transform in (np.arctan, np.cbrt, lambda r: 3.0 * r - 7.0):
        np.testing.assert_array_equal(reward_accuracy(transform(rewards)), expected)
    np.testing.assert_array_equal(reward_accuracy(-rewards), 1 - expected)


@given(rewards_strategy(), st.integers(-64, 64))
def test_a_constant_added_to_both_rewards_changes_nothing(rewards, constant):
    # Quarters and whole numbers: the sums are exact, and so must be the comparison.
    rewards = np.round(np.array(rewards) * 4) / 4
    shifted = rewards + constant
    np.testing.assert_array_equal(reward_accuracy(shifted), reward_accuracy(rewards))
    np.testing.assert_array_equal(reward_margin(shifted), reward_margin(rewards))
    for scorer in (brier_score, log_loss):
        np.testing.assert_array_equal(
            scorer(reward_margin(shifted)), scorer(reward_margin(rewards))
        )


def test_scores_are_arithmetic():
    margins, labels = [0.0, math.log(3.0), -math.log(3.0)], [1.0, 1.0, 0.25]
    # sigmoid of the margins: 1/2, 3/4, 1/4.
    np.testing.assert_allclose(
        brier_score(margins, labels=labels),
        [1 / 4, 1 / 16, 0.0],
        rtol=1e-12,
        atol=1e-30,
    )
    expected = [
        math.log(2.0),
        math.log(4 / 3),
        -0.25 * math.log(1 / 4) - 0.75 * math.log(3 / 4),
    ]
    np.testing.assert_allclose(log_loss(margins, labels=labels), expected, rtol=1e-12)


@given(st.lists(st.tuples(st.floats(-40, 40), st.floats(0, 1)), min_size=1))
def test_scores_match_plain_loops(pairs):
    margins, labels = np.array(pairs).T
    for found, expected in (
        (brier_score(margins, labels=labels), oracles.brier_score(margins, labels)),
        (log_loss(margins, labels=labels), oracles.log_loss(margins, labels)),
    ):
        # Absolute: a sigmoid near 1 is rounded before its square is taken.
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@given(st.lists(st.tuples(st.floats(-40, 40), st.floats(0, 1)), min_size=1))
def test_swapping_pair_and_label_changes_no_score(pairs):
    margins, labels = np.array(pairs).T
    for scorer in (brier_score, log_loss):
        np.testing.assert_allclose(
            scorer(-margins, labels=1 - labels),
            scorer(margins, labels=labels),
            rtol=1e-6,  # 1 - label loses what lies below 1e-16 of a label
            atol=1e-13,
        )


def test_the_log_loss_is_the_loss_that_pairs_are_trained_with():
    rewards = np.random.default_rng(4).normal(size=(20, 2)).astype(np.float32)
    for smoothing in (0.0, 0.2):
        trained, _ = logistic_loss(jnp.asarray(rewards), label_smoothing=smoothing)
        found = log_loss(reward_margin(rewards), labels=np.full(20, 1 - smoothing))
        np.testing.assert_allclose(found, trained, rtol=1e-5)


def test_large_margins_give_finite_scores():
    margins = [1e4, -1e4]
    assert log_loss(margins).tolist() == [0.0, 1e4]
    assert log_loss(margins, labels=[0.5, 0.5]).tolist() == [5e3, 5e3]
    assert brier_score(margins).tolist() == [0.0, 1.0]
    found = calibration(margins)
    assert (found.error, found.count.tolist()) == (0.5, [2])


@pytest.mark.parametrize("function", [reward_accuracy, reward_margin])
def test_rewards_that_cannot_be_compared_are_counted(function):
    with pytest.raises(
        ValueError, match="`rewards` must be numbers; 2 of 3 pairs hold"
    ):
        function([[math.nan, math.nan], [0.0, 1.0], [math.nan, 0.0]])
    for shape in ((3,), (3, 3), (0, 2)):
        with pytest.raises(ValueError, match=r"shape \[N, 2\] \(chosen, rejected\)"):
            function(np.zeros(shape))


def test_infinite_rewards_are_ranked_but_have_no_margin():
    rewards = [[math.inf, 0.0], [-math.inf, -math.inf]]
    assert reward_accuracy(rewards).tolist() == [1.0, 0.5]
    with np.errstate(all="raise"):
        with pytest.raises(ValueError, match="must be finite; 2 of 2 are not"):
            reward_margin(rewards)


@pytest.mark.parametrize("scorer", [brier_score, log_loss, calibration])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0], "`labels` needs one for each of 2 margins; got 1"),
        ([1.5, -0.1], r"`labels` must lie in \[0, 1\] .* 2 of 2 do not"),
        ([math.nan, 1.0], "`labels` must be finite; 1 of 2 are not"),
    ],
)
def test_labels_that_are_no_probabilities_are_an_error(scorer, labels, message):
    with pytest.raises(ValueError, match=message):
        scorer([0.0, 1.0], labels=labels)
    with pytest.raises(ValueError, match="`margins` must be finite; 1 of 2 are not"):
        scorer([0.0, math.inf])


# --- calibration ----------------------------------------------------------------------


def test_calibration_is_arithmetic():
    # Two bins: sigmoid 3/5 (right, wrong) and 4/5 (right, right).
    margins = np.log([1.5, 1.5, 4.0, 4.0]) * [1, -1, 1, 1]
    found = calibration(margins, num_bins=2)
    np.testing.assert_allclose(found.predicted, [0.6, 0.8], rtol=1e-12)
    assert found.observed.tolist() == [0.5, 1.0]
    assert found.count.tolist() == [2, 2]
    assert found.error == pytest.approx(0.5 * 0.1 + 0.5 * 0.2, rel=1e-12)


@given(
    st.lists(st.floats(0, 9), min_size=1, unique_by=lambda m: round(m, 3)),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
)
def test_calibration_matches_plain_loops(sizes, num_bins, seed):
    rng = np.random.default_rng(seed)
    # Whole thousandths, so that sizes differ before and after the sigmoid.
    margins = (np.round(sizes, 3) + 0.001) * rng.choice([-1, 1], len(sizes))
    labels = rng.random(len(sizes))
    expected = oracles.calibration(margins, labels, num_bins)
    found = calibration(margins, labels=labels, num_bins=num_bins)
    np.testing.assert_allclose(np.stack(found[1:], 1), expected, rtol=1e-9)
    error = sum(n / len(sizes) * abs(p - y) for p, y, n in expected)
    assert found.error == pytest.approx(error, rel=1e-9, abs=1e-12)


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.sampled_from([0, 0.5, 1])), min_size=1),
    st.randoms(use_true_random=False),
)
def test_neither_order_nor_side_of_the_pairs_changes_the_calibration(pairs, random):
    margins, labels = np.array(pairs, float).T
    expected = calibration(margins, labels=labels, num_bins=3)
    order = random.sample(range(len(pairs)), len(pairs))
    for found in (
        calibration(margins[order], labels=labels[order], num_bins=3),
        calibration(-margins, labels=1 - labels, num_bins=3),
    ):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_the_chosen_side_does_not_make_a_model_calibrated():
    # Right in three of four at 90 %, all pairs with the chosen response in slot 0.
    margins = math.log(9.0) * np.array([1, 1, 1, -1])
    found = calibration(margins)
    assert found.observed.tolist() == [0.75]
    assert found.error == pytest.approx(0.15, rel=1e-9)


def test_margins_of_nothing_are_half_sure_and_half_right():
    found = calibration(np.zeros(6))
    assert (found.predicted.tolist(), found.observed.tolist()) == ([0.5], [0.5])
    assert (found.error, found.count.tolist()) == (0.0, [6])


def test_labels_drawn_from_the_margins_are_calibrated():
    # 4,000 pairs in 10 bins of 400: |predicted - observed| is below 0.02 on average.
    rng = np.random.default_rng(5)
    margins = rng.normal(0.0, 2.0, 4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-margins))).astype(float)
    assert calibration(margins, labels=labels).error < 0.03
    assert calibration(3 * margins, labels=labels).error > 0.06
    assert calibration(margins, labels=labels).count.tolist() == [400] * 10


def test_no_bins_are_an_error():
    with pytest.raises(ValueError, match="`num_bins` must be 1 or more; got 0"):
        calibration([1.0], num_bins=0)


# --- cuts -----------------------------------------------------------------------------


def told(cells):
    """Name, mean and count of each cell."""
    return [(c.name, c.interval and c.interval.mean, c.count) for c in cells]


def test_accuracy_is_cut_by_which_response_is_longer():
    rewards = [[1, 0], [0, 1], [1, 0], [1, 1], [0, 1]]
    lengths = [[9, 1], [9, 1], [4, 4], [1, 2], [1, 2]]
    assert told(accuracy_by_length(rewards, lengths=lengths)) == [
        ("longer", 0.5, 2),
        ("equal", 1.0, 1),
        ("shorter", 0.25, 2),
    ]


def test_values_are_cut_by_length_at_the_edges():
    values, chosen, rejected = [1, 2, 3, 4, 5], [0, 10, 14, 10, 30], [5, 10, 10, 0, 0]
    lengths = np.stack([chosen, rejected], 1)  # differences -5, 0, 4, 10, 30
    found = by_length_difference(values, lengths=lengths, edges=[0, 4, 20, 25])
    assert told(found) == [
        ("< 0", 1.0, 1),
        ("[0, 4)", 2.0, 1),
        ("[4, 20)", 3.5, 2),
        ("[20, 25)", None, 0),
        (">= 25", 5.0, 1),
    ]
    found = by_total_length(values, lengths=lengths, edges=[6, 21])
    assert told(found) == [("< 6", 1, 1), ("[6, 21)", 3.0, 2), (">= 21", 4.0, 2)]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1),
    st.sets(st.integers(-12, 12), min_size=1, max_size=4),
)
def test_every_prompt_is_in_one_bucket(lengths, edges):
    values, edges = np.arange(len(lengths), dtype=float), sorted(edges)
    for cut in (by_length_difference, by_total_length):
        cells = cut(values, lengths=lengths, edges=edges, num_resamples=2)
        assert sum(cell.count for cell in cells) == len(lengths)
        total = sum(cell.count * cell.interval.mean for cell in cells if cell.interval)
        assert total == pytest.approx(values.sum())
        assert len(cells) == len(edges) + 1
        assert all((cell.interval is None) == (cell.count == 0) for cell in cells)


def test_a_cell_has_the_interval_of_its_own_prompts():
    values, field = [0.0, 1.0, 5.0, 3.0, 7.0], ["a", "a", "b", "b", "b"]
    options = {"confidence": 0.2, "num_resamples": 50, "seed": 3}
    found = by_field(values, field=field, **options)
    for cell, own in zip(found, ([0.0, 1.0], [5.0, 3.0, 7.0]), strict=True):
        assert cell.interval == bootstrap_interval(own, **options)
        assert cell.interval != bootstrap_interval(own)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (["b", "a", "b", "c"], [("a", 2.0, 1), ("b", 2.0, 2), ("c", 4.0, 1)]),
        ([True, False, True, True], [("False", 2.0, 1), ("True", 8 / 3, 3)]),
        ([10, 9, 10, -1], [("-1", 4.0, 1), ("9", 2.0, 1), ("10", 2.0, 2)]),
        (np.array([1, 0, 1, 1], bool), [("False", 2.0, 1), ("True", 8 / 3, 3)]),
        (np.array([3, 3, 2, 2]), [("2", 3.5, 2), ("3", 1.5, 2)]),
    ],
)
def test_values_are_cut_by_a_field(field, expected):
    assert told(by_field([1.0, 2.0, 3.0, 4.0], field=field)) == expected


def test_floats_are_cut_into_buckets_of_equal_mass():
    field = [0.5, 4, 1.5, 3.0]  # a float may be written without its point
    found = by_field([1.0, 2.0, 3.0, 4.0], field=field, num_quantiles=2)
    assert told(found) == [("[0.5, 1.5]", 2.0, 2), ("[3, 4]", 3.0, 2)]
    tied = by_field([1.0, 2.0, 3.0, 4.0], field=[0.0, 0.0, 0.0, 1.0], num_quantiles=4)
    assert told(tied) == [("[0, 0]", 2.0, 3), ("[1, 1]", 4.0, 1)]


@given(
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.5]), min_size=1),
    st.randoms(use_true_random=False),
)
def test_permuting_the_prompts_changes_no_cell(field, random):
    values = np.arange(len(field), dtype=float)
    order = random.sample(range(len(field)), len(field))
    cells = by_field(values, field=field, num_resamples=2)
    moved = by_field(values[order], field=[field[i] for i in order], num_resamples=2)
    assert told(moved) == told(cells)
    lengths = np.stack([field, np.ones(len(field))], 1)
    cells = accuracy_by_length(lengths, lengths=lengths, num_resamples=2)
    moved = accuracy_by_length(lengths[order], lengths=lengths[order], num_resamples=2)
    assert told(moved) == told(cells)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: by_field([1.0, 2.0], field=["a"]),
            ValueError,
            "`field` needs one value for each of 2 prompts; got 1",
        ),
        (
            lambda: by_field([1.0, 2.0], field=["a", None]),
            TypeError,
            "strings, booleans, integers or floats; got NoneType in row 1: None",
        ),
        (
            lambda: by_field([1.0, 2.0], field=["a", 3]),
            TypeError,
            "values of one kind; got str in row 0 and int in row 1: 3",
        ),
        (
            lambda: by_field([1.0, 2.0], field=[1, True]),
            TypeError,
            "values of one kind; got int in row 0 and bool in row 1: True",
        ),
        (
            lambda: by_field([1.0, 2.0], field=[0.5, math.nan]),
            ValueError,
            "`field` must be finite; 1 of 2 are not",
        ),
        (
            lambda: by_field([1.0, 2.0], field=[0.5, 1.5], num_quantiles=0),
            ValueError,
            "`num_quantiles` must be 1 or more; got 0",
        ),
        (
            lambda: by_field([math.nan, 2.0], field=["a", "b"]),
            ValueError,
            "`values` must be finite; 1 of 2 are not",
        ),
        (
            lambda: by_total_length([1.0], lengths=[[1, 2]], edges=[3, 3]),
            ValueError,
            r"`edges` must be finite numbers that rise; got \[3, 3\]",
        ),
        (
            lambda: by_length_difference([1.0], lengths=[[1, 2]], edges=[]),
            ValueError,
            r"`edges` must be finite numbers that rise; got \[\]",
        ),
        (
            lambda: by_length_difference([1.0], lengths=[[1, 2], [3, 4]], edges=[0]),
            ValueError,
            "`lengths` needs a pair for each of 1 prompts; got 2",
        ),
        (
            lambda: accuracy_by_length([[1, 0]], lengths=[[math.nan, 1]]),
            ValueError,
            "`lengths` must be numbers; 1 of 1 pairs hold NaN",
        ),
    ],
)
def test_cuts_that_would_lose_a_prompt_are_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
