"""The oracles of losses hold what papers derive: limits, identities, gradients.

Values that others published are in `losses/test_outside_values.py`, for the library;
the library is compared with the oracles in `losses/test_all_losses.py`.
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

import loss_oracles as lo
import oracles

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("oracles.py", {"math", "numpy"}),
        ("loss_oracles.py", {"math", "numpy", "oracles"}),
        ("more_loss_oracles.py", {"math", "numpy", "oracles", "loss_oracles"}),
    ],
)
def test_an_oracle_imports_nothing_of_the_library(file, allowed):
    imported = set()
    for node in ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name):  # nor by another way in
            assert node.id not in ("__import__", "exec", "eval", "open"), node.lineno
    assert imported == allowed


# --- sources that are fused -----------------------------------------------------------

PIVOT = [-0.06974950, -0.13944919]
SOURCES = [
    [-0.23787796, -0.26214793, -0.36793104],
    [-0.25559500, -0.26778769, -0.33684847],
]


def test_sources_that_are_not_there_are_not_fused():
    where, rest = [True, False, True], [[s[0], s[2]] for s in SOURCES]
    spoilt = [[s[0], math.nan, s[2]] for s in SOURCES]
    for fuse in (lo.fuse_average, lo.fuse_confidence):
        assert fuse(spoilt, where=where) == fuse(rest)
    assert lo.fuse_max_margin(
        spoilt, pivot_logps=PIVOT, where=where
    ) == lo.fuse_max_margin(rest, pivot_logps=PIVOT)


def test_of_sources_as_far_from_the_pivot_the_first_is_taken():
    pivot, logs = math.log(0.5), [math.log(0.25), math.log(0.75)]
    assert lo.fuse_max_margin([logs], pivot_logps=[pivot]) == [logs[0]]
    assert lo.fuse_max_margin([logs[::-1]], pivot_logps=[pivot]) == [logs[1]]


def test_a_certain_source_takes_all_confidence():
    assert lo.fuse_confidence([[0.0, -1.0]]) == pytest.approx([0.0], abs=2e-8)
    assert lo.confidence_weights([-1.0, -3.0], epsilon=1.0) == pytest.approx(
        [2 / 3, 1 / 3]
    )
    assert lo.confidence_weights([0.5, -1.0]) == lo.confidence_weights([0.0, -1.0])


# --- lists: what was checked of IRPO, S-DPO and LiPO ----------------------------------

N = 20
LOG_RATIOS = np.random.RandomState(1).normal(size=N)
BETA = 0.7
SCORES = [BETA * float(r) for r in LOG_RATIOS]
GAINS = [2] * 3 + [1] * 5 + [0] * 12
WEIGHTS = lo.ndcg_weights(GAINS, ranks=range(1, N + 1))


def gradient(loss, at):
    """Central differences."""
    out = []
    for i in range(len(at)):
        up = [x + 1e-5 * (i == j) for j, x in enumerate(at)]
        down = [x - 1e-5 * (i == j) for j, x in enumerate(at)]
        out.append((loss(up) - loss(down)) / 2e-5)
    return out


def weighted_softmax(scores):
    total = math.log(sum(math.exp(s) for s in scores))
    return -sum(w * (s - total) for w, s in zip(WEIGHTS, scores, strict=True))


def test_the_weights_of_irpo_are_gain_over_discount():
    assert WEIGHTS[:4] == pytest.approx([3.0, 3 / math.log2(3), 1.5, 1 / math.log2(5)])
    assert WEIGHTS[8:] == [0.0] * 12
    assert lo.position_weights([1, 3]) == [1.0, 0.5]
    assert lo.reciprocal_rank_weights([2, 3, 1], ranks=[2, 4, 4]) == [1.5, 1.75, 0.25]


def test_irpo_is_a_weighted_softmax_in_value_and_gradient():
    def loss(s):
        return lo.irpo_loss(s, weights=WEIGHTS)

    assert loss(SCORES) == pytest.approx(weighted_softmax(SCORES), rel=1e-12)
    assert gradient(loss, SCORES) == pytest.approx(
        gradient(weighted_softmax, SCORES), abs=1e-8
    )


def test_the_mean_form_of_irpo_is_the_released_formula():
    # -100 before beta on the item itself, as released: e^-70 at this beta.
    loss = 0.0
    for i in range(N):
        d = [LOG_RATIOS[j] - LOG_RATIOS[i] - 100.0 * (i == j) for j in range(N)]
        z = -(math.log(sum(math.exp(BETA * x) for x in d)) - math.log(N - 1))
        loss += WEIGHTS[i] * math.log1p(math.exp(-z)) / N
    assert lo.irpo_mean_loss(SCORES, weights=WEIGHTS) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_the_gradient_of_irpo_weighs_competitors_by_their_softmax(form):
    expected = np.zeros(N)
    for i in range(N):
        others = [j for j in range(N) if j != i]
        odds = {j: math.exp(SCORES[j] - SCORES[i]) for j in others}
        total = sum(odds.values())
        z = -math.log(total if form == "sum" else total / (N - 1))
        scale = WEIGHTS[i] * (1.0 - 1.0 / (1.0 + math.exp(-z)))
        for j in others:
            expected[i] -= scale * odds[j] / total
            expected[j] += scale * odds[j] / total
    loss = lo.irpo_loss if form == "sum" else lo.irpo_mean_loss
    share = 1 if form == "sum" else N
    found = gradient(lambda s: loss(s, weights=WEIGHTS), SCORES)
    assert found == pytest.approx(list(expected / share), abs=1e-8)


def test_irpo_is_stationary_where_shares_are_those_of_the_weights():
    weights = [3.0, 2.0, 0.5]
    at = [math.log(w) + 0.3 for w in weights]
    found = gradient(lambda s: lo.irpo_loss(s, weights=weights), at)
    assert found == pytest.approx([0.0] * 3, abs=1e-9)


def test_equal_scores_win_against_all_with_one_in_n_and_against_their_mean_with_half():
    one = [1.0] + [0.0] * (N - 1)
    assert lo.irpo_loss([0.4] * N, weights=one) == pytest.approx(math.log(N))
    mean = lo.irpo_mean_loss([0.4] * N, weights=one)
    assert mean == pytest.approx(math.log(2) / N)


def test_two_items_with_one_positive_are_a_pair():
    pair_loss = lo.logistic_loss([0.3, -1.1])
    one = [1.0, 0.0]
    assert lo.irpo_loss([0.3, -1.1], weights=one) == pytest.approx(pair_loss)
    assert lo.sdpo_loss([0.3, -1.1]) == pytest.approx(pair_loss)
    assert lo.plackett_luce_loss([0.3, -1.1], ranks=[1, 2]) == pytest.approx(pair_loss)
    assert lo.listwise_cross_entropy([0.3, -1.1], targets=one) == pytest.approx(
        pair_loss
    )


def test_irpo_with_one_positive_is_sdpo():
    one = [1.0] + [0.0] * (N - 1)
    assert lo.irpo_loss(SCORES, weights=one) == pytest.approx(lo.sdpo_loss(SCORES))


def test_lipo_falls_with_the_margin_where_the_released_code_of_irpo_rises():
    weight = 1 / math.log(2) - 1 / math.log(3)

    def per_pair(margin):
        return lo.lipo_lambda_loss([margin, 0.0], labels=[1, 0]) / weight

    # The released code takes the margin with the other sign and subtracts.
    released = {-2.0: (-0.13, -0.12), 0.0: (-0.69, -0.50), 2.0: (-2.13, -0.88)}
    released[10.0] = (-10.0, -1.00)
    for margin, (value, slope) in released.items():
        assert -per_pair(-margin) == pytest.approx(value, abs=0.005)
        # d/dx of log(1 + exp(-x)) is -s(-x); here at x = -margin.
        ends = per_pair(-margin + 1e-6), per_pair(-margin - 1e-6)
        if margin:  # at 0 the ranks change, and the weights with them
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, abs=0.005)


def test_the_weight_of_lipo_is_gain_times_discount_at_the_rank_by_score():
    # By score the order is 2, 0, 1; labels say 0 > 1 > 2.
    expected = 0.0
    for i, j, gain, ranks in ((0, 1, 2, (2, 3)), (0, 2, 3, (2, 1)), (1, 2, 1, (3, 1))):
        change = abs(1 / math.log(1 + ranks[0]) - 1 / math.log(1 + ranks[1]))
        margin = [1.0, 0.5, 2.0][i] - [1.0, 0.5, 2.0][j]
        expected += gain * change * math.log1p(math.exp(-margin))
    loss = lo.lipo_lambda_loss([1.0, 0.5, 2.0], labels=[2, 1, 0])
    assert loss == pytest.approx(expected)


def test_plackett_luce_is_the_product_of_choices():
    s = [math.exp(x) for x in (0.2, 1.0, -0.5)]
    probability = s[2] / sum(s) * s[0] / (s[0] + s[1])
    loss = lo.plackett_luce_loss([0.2, 1.0, -0.5], ranks=[2, 3, 1])
    assert loss == pytest.approx(-math.log(probability))
    tied = s[2] / sum(s) * s[0] / (s[0] + s[1]) * s[1] / (s[0] + s[1])
    loss = lo.plackett_luce_loss([0.2, 1.0, -0.5], ranks=[2, 2, 1])
    assert loss == pytest.approx(-math.log(tied))


LIST_LOSSES = {
    "cross_entropy": lambda u, q, w: lo.listwise_cross_entropy(u, targets=q, where=w),
    "kl": lambda u, q, w: lo.targets_kl(u, targets=q, where=w),
    "entropy": lambda u, q, w: lo.targets_entropy(q, where=w),
    "accuracy": lambda u, q, w: lo.list_accuracy(u, targets=q, where=w),
    "plackett_luce": lambda u, q, w: lo.plackett_luce_loss(u, ranks=q, where=w),
    "irpo": lambda u, q, w: lo.irpo_loss(u, weights=q, where=w),
    "irpo_mean": lambda u, q, w: lo.irpo_mean_loss(u, weights=q, where=w),
    "sdpo": lambda u, q, w: lo.sdpo_loss(u, where=w),
    "lipo": lambda u, q, w: lo.lipo_lambda_loss(u, labels=q, where=w),
    "listnet": lambda u, q, w: lo.listnet_loss(u, labels=q, where=w),
    "adpo": lambda u, q, w: lo.adpo_loss(
        u, anchor_logps=[0.1] * len(u), targets=q, beta=2.0, where=w
    ),
}


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_an_item_that_is_dropped_does_not_count(name):
    loss, nan = LIST_LOSSES[name], math.nan
    kept = loss([0.3, -0.4, 1.2], [0.7, 0.1, 0.2], None)
    dropped = loss(
        [0.3, nan, -0.4, 1.2], [0.7, nan, 0.1, 0.2], [True, False, True, True]
    )
    assert dropped == pytest.approx(kept, rel=1e-12)
    assert math.isfinite(kept)


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_a_list_of_which_nothing_counts_is_nothing(name):
    found = LIST_LOSSES[name]([math.nan] * 2, [math.nan] * 2, [False, False])
    assert found == (0.5 if name == "accuracy" else 0.0)


def test_a_list_needs_its_chosen_item_and_another():
    weights = [1.0, 1.0, 0.0]
    alone, headless = [True, False, False], [False, True, True]
    for where in (alone, headless):
        assert lo.sdpo_loss([0.3, -1.1, 0.4], where=where) == 0.0
    for loss in (lo.irpo_loss, lo.irpo_mean_loss):
        assert loss([0.3, -1.1, 0.4], weights=weights, where=alone) == 0.0
    found = lo.irpo_mean_loss([0.3, -1.1, 0.4], weights=weights, where=headless)
    assert found == pytest.approx(lo.logistic_loss([-1.1, 0.4]) / 2)


def test_targets_of_a_list_are_shares_and_may_be_zero():
    u, q = [0.3, -0.4, 1.2], [0.7, 0.3, 0.0]
    more = [7.0, 3.0, 0.0]
    for loss in (lo.listwise_cross_entropy, lo.targets_kl):
        assert loss(u, targets=more) == pytest.approx(loss(u, targets=q))
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert lo.targets_entropy(more) == pytest.approx(entropy)
    kl = lo.targets_kl(u, targets=more)
    total = math.log(sum(math.exp(x) for x in u))
    expected = 0.7 * (total - 0.3) + 0.3 * (total + 0.4) - entropy
    assert kl == pytest.approx(expected)


def test_listnet_compares_the_chances_to_be_first():
    labels = [1.0, 0.0, 2.0]
    q = [math.exp(x) / sum(math.exp(y) for y in labels) for x in labels]
    u = [0.3, -0.4, 1.2]
    found = lo.listnet_loss(u, labels=labels)
    assert found == pytest.approx(lo.listwise_cross_entropy(u, targets=q))


def test_adpo_of_a_hard_pair_is_dpo_and_kl_is_cross_entropy_minus_entropy():
    logps, anchor = [-3.0, -2.0], [-3.5, -1.0]
    adpo = lo.adpo_loss(logps, anchor_logps=anchor, targets=lo.hard([1, 0]), beta=0.7)
    assert adpo == pytest.approx(lo.dpo_loss(logps, anchor_logps=anchor, beta=0.7))
    u, q = [0.3, -0.4, 1.2], [0.7, 0.1, 0.2]
    cross_entropy = lo.listwise_cross_entropy(u, targets=q)
    kl, entropy = lo.targets_kl(u, targets=q), lo.targets_entropy(q)
    assert kl == pytest.approx(cross_entropy - entropy)
    assert lo.targets_kl([math.log(x) for x in q], targets=q) == pytest.approx(0.0)


def test_the_gradient_of_adpo_is_the_difference_of_shares_times_beta():
    u, q = [0.3, -0.4, 1.2], [0.7, 0.1, 0.2]
    total = sum(math.exp(2.5 * x) for x in u)
    expected = [
        2.5 * (math.exp(2.5 * x) / total - p) for x, p in zip(u, q, strict=True)
    ]
    found = gradient(
        lambda x: lo.adpo_loss(x, anchor_logps=[0.0] * 3, targets=q, beta=2.5), u
    )
    assert found == pytest.approx(expected, abs=1e-8)


def test_list_accuracy_counts_ordered_pairs_and_halves_ties():
    assert lo.list_accuracy([3.0, 2.0, 1.0], targets=[0.5, 0.3, 0.2]) == 1.0
    assert lo.list_accuracy([3.0, 3.0, 4.0], targets=[0.6, 0.2, 0.2]) == 0.25
    assert lo.list_accuracy([3.0, 2.0], targets=[0.5, 0.5]) == 0.5


# --- targets --------------------------------------------------------------------------


def test_targets_are_shares_of_what_counts():
    where, nan = [True, False, True], math.nan
    assert lo.hard([1.0, 3.0, 3.0]) == [0.0, 0.5, 0.5]
    assert lo.hard([1.0, nan, 1.0], where=where) == [0.5, 0.0, 0.5]
    s = 1 / (1 + math.exp(-2))
    assert lo.soft([2.0, 1.0], temperature=0.5) == pytest.approx([s, 1 - s])
    found = lo.softmax([0.0, math.log(3)], temperature=0.5)
    assert found == pytest.approx([0.1, 0.9])
    for target in (
        lo.hard,
        lambda q, where: lo.smoothed(q, smoothing=0.1, where=where),
    ):
        assert target([nan, nan], where=[False, False]) == [0.0, 0.0]
    found = lo.softmax([0.0, nan, math.log(3)], temperature=1.0, where=where)
    assert found == pytest.approx([0.25, 0.0, 0.75])
    found = lo.smoothed([0.25, nan, 0.75], smoothing=0.2, where=where)
    assert found == pytest.approx([0.3, 0.0, 0.7])
    for grades in ([nan, nan], [5.0, nan]):
        alone = [not math.isnan(x) for x in grades]
        for target in (lo.soft, lo.softmax, lo.kde):
            assert target(grades, temperature=1.0, where=alone) == [
                float(alone[0]),
                0.0,
            ]


def test_kde_sees_ranks_of_any_scale_and_is_finite():
    grades = [0.3, -1.0, 2.0, 0.9]
    q = lo.kde(grades, temperature=0.5)
    assert sorted(range(4), key=q.__getitem__) == [1, 0, 3, 2]
    moved = lo.kde([7.0 + 3.0 * x for x in grades], temperature=0.5)
    assert moved == pytest.approx(q, rel=1e-9)
    assert lo.kde([1e8, 0.0, 0.0, 0.0], temperature=1.0)[0] < 0.998
    assert lo.kde([4.0] * 4, temperature=1.0) == pytest.approx([0.25] * 4)
    # By hand: two grades a bandwidth apart, Phi(1) = 0.8413447.
    f = (0.5 + 0.8413447460685429) / 2
    odds = (f / (1 - f)) ** 2  # against 1 - f, its mirror
    two = lo.kde([1.0, 0.0], temperature=1.0, bandwidth=1.0)
    assert two[0] == pytest.approx(odds / (1 + odds))
    # h = 1.06 * 1.4826 * 1 * 3^(-1/5) for the median deviation 1.
    h = 1.06 * 1.4826 * 3**-0.2
    three = lo.kde([0.0, 1.0, 3.0], temperature=1.0)
    assert three == lo.kde([0.0, 1.0, 3.0], temperature=1.0, bandwidth=h)
    # Of an even number the medians are 1.5, the mean of 1 and 2, and 0.5, 1.5 -> 1.
    h = 1.06 * 1.4826 * 1.0 * 4**-0.2
    four = lo.kde([0.0, 1.0, 2.0, 3.0], temperature=1.0)
    assert four == pytest.approx(
        lo.kde([0.0, 1.0, 2.0, 3.0], temperature=1.0, bandwidth=h)
    )
    # F is kept within 1e-3 of 0 and 1.
    ends = lo.kde([0.0] * 999 + [1.0], temperature=1.0, bandwidth=1e-3)
    assert ends[-1] / ends[0] == pytest.approx(999 / (0.4995 / 0.5005))
    ends = lo.kde([0.0] * 999 + [-1.0], temperature=1.0, bandwidth=1e-3)
    assert ends[-1] / ends[0] == pytest.approx(1 / 999 / (0.5005 / 0.4995))
    # Equal medians but for two: the spread is floored, and the bandwidth is not 0.
    floored = lo.kde([0.0, 0.0, 0.0, 1e-6], temperature=1.0)
    h = 1.06e-6 * 4**-0.2
    assert floored == lo.kde([0.0, 0.0, 0.0, 1e-6], temperature=1.0, bandwidth=h)


# --- limits and identities ------------------------------------------------------------


def test_losses_with_their_option_at_nothing_are_dpo():
    logps, anchor = [-3.0, -2.0], [-3.5, -1.0]
    dpo = lo.dpo_loss(logps, anchor_logps=anchor, beta=0.7)
    assert dpo == oracles.dpo_loss([logps], [anchor], beta=0.7)[0]
    r = [0.7 * (p - a) for p, a in zip(logps, anchor, strict=True)]
    options = {"anchor_logps": anchor, "beta": 0.7}
    pairs = [
        lo.logistic_loss(r),
        lo.logistic_loss(r, margin=0.0),
        lo.robust_loss(r, flip_rate=0.0),
        lo.length_regularized_loss(r, lengths=[3, 9], alpha=0.0),
        lo.length_regularized_loss(r, lengths=[3, 3], alpha=0.4),
        lo.rpo_loss(logps, lengths=[3, 9], alpha=0.0, **options),
        lo.length_normalized_dpo_loss(logps, lengths=[1, 1], **options),
        lo.xpo_loss(logps, explore=[True, False], alpha=0.0, **options),
        lo.xpo_loss(logps, explore=[False, False], alpha=0.3, **options),
    ]
    assert pairs == pytest.approx([dpo] * len(pairs), rel=1e-12)


def test_what_an_option_adds_to_a_pair():
    logps, anchor = [-3.0, -2.0], [-3.5, -1.0]
    options = {"anchor_logps": anchor, "beta": 0.7}
    dpo = lo.dpo_loss(logps, **options)
    added = [
        lo.rpo_loss(logps, lengths=[4, 9], alpha=0.2, **options) - dpo,
        lo.xpo_loss(logps, explore=[False, True], alpha=0.3, **options) - dpo,
        lo.xpo_loss(logps, explore=[True, True], alpha=0.3, **options) - dpo,
        lo.cpo_loss(logps, beta=0.7, alpha=0.2) - lo.logistic_loss([-2.1, -1.4]),
    ]
    assert added == pytest.approx([0.2 * 0.75, 0.3 * -2.0, 0.3 * -5.0, 0.6])


def test_a_response_without_tokens_has_length_one():
    options = {"anchor_logps": [-1.0, 0.0], "beta": 0.7}
    losses = [
        [
            lo.length_regularized_loss([1.0, 0.5], lengths=n, alpha=0.1),
            lo.rpo_loss([-3.0, 0.0], lengths=n, alpha=0.2, **options),
            lo.length_normalized_dpo_loss([-3.0, 0.0], lengths=n, **options),
            lo.simpo_loss([-3.0, -1.0], lengths=n, beta=2.0, gamma=0.5),
            lo.orpo_loss([-3.0, -1.0], lengths=n, lambda_=0.5),
        ]
        for n in ([0, 0], [1, 1], [0, 2], [1, 2])
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    regularized, rpo = losses[2][:2]
    assert regularized == pytest.approx(lo.logistic_loss([0.9, 0.5]))
    dpo = lo.dpo_loss([-3.0, 0.0], **options)
    assert rpo == pytest.approx(dpo + 0.2 * 3.0)


def test_a_margin_moves_the_pair():
    assert lo.logistic_loss([1.0, 0.5], margin=0.2) == lo.logistic_loss([0.8, 0.5])
    # A chosen response that is longer by two counts as better already.
    longer = lo.length_regularized_loss([1.0, 0.5], lengths=[5, 3], alpha=0.1)
    assert longer == pytest.approx(lo.logistic_loss([1.2, 0.5]))
    simpo = lo.simpo_loss([-4.0, -9.0], lengths=[2, 3], beta=2.0, gamma=0.5)
    assert simpo == pytest.approx(lo.logistic_loss([-4.0, -6.0], margin=0.5))
    smooth = lo.logistic_loss([1.0, 0.5], margin=0.2, label_smoothing=0.3)
    sides = math.log1p(math.exp(-0.3)), math.log1p(math.exp(0.3))
    assert smooth == pytest.approx(0.7 * sides[0] + 0.3 * sides[1])


def test_the_thresholded_loss_stops_at_its_threshold():
    assert lo.thresholded_loss([0.4, 0.1], threshold=-0.001) == -0.001
    assert lo.thresholded_loss([0.1, 0.4], threshold=-0.001) == pytest.approx(0.3)
    # max(D + m, 0) = max(D, -m) + m: the released form is the hinge loss.
    for r in ([0.4, 0.1], [0.1, 0.4], [0.1, 0.1002]):
        shifted = lo.thresholded_loss(r, threshold=-0.001) + 0.001
        assert lo.hinge_loss(r, margin=0.001) == pytest.approx(shifted)


def test_reward_aware_preference_is_a_divergence():
    assert lo.reward_aware_loss([0.9, 0.3], grades=[4, 2], eta=0.3) == pytest.approx(
        0.0
    )
    p, q = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(0.5))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = lo.reward_aware_loss([0.0, 0.5], grades=[3, 1], eta=0.5)
    assert found == pytest.approx(kl)


def test_sppo_with_even_odds_keeps_the_policy():
    assert lo.sppo_loss([0.3, -0.2], beta=0.1, win_rates=(0.5, 0.5)) == pytest.approx(
        0.13
    )
    found = lo.sppo_loss([0.3, -0.2], beta=0.5, win_rates=(0.8, 0.1))
    assert found == pytest.approx((0.3 - 0.6) ** 2 + (-0.2 + 0.8) ** 2)


def test_discopop_is_finite_where_a_factor_is_not():
    assert lo.discopop_loss([-1e4, 0.0], tau=0.05) == pytest.approx(1e4)
    assert lo.discopop_loss([1e4, 0.0], tau=0.05) == 0.0


def test_kto_weighs_both_sides_and_kl_is_what_it_is_held_against():
    s = 1 / (1 + math.exp(-0.3))
    for r, side, loss in ((0.5, True, 1.5 * (1 - s)), (0.5, False, 0.7 * s)):
        found = lo.kto_loss(
            r, desirable=side, kl=0.2, desirable_weight=1.5, undesirable_weight=0.7
        )
        assert found == pytest.approx(loss)
    for side in (True, False):
        even = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        given = lo.kto_loss(0.5, desirable=side, kl=0.2, **even)
        assert lo.kto_loss(0.5, desirable=side, kl=0.2) == given
    assert lo.unpaired_accuracy(0.5, desirable=True, against=0.2) == 1.0
    assert lo.unpaired_accuracy(0.5, desirable=False, against=0.2) == 0.0
    assert lo.unpaired_accuracy(0.2, desirable=False, against=0.2) == 0.5


def test_bco_holds_a_reward_against_the_shift():
    found = [lo.bco_loss(0.5, desirable=side, delta=0.2) for side in (True, False)]
    expected = [math.log1p(math.exp(-0.3)), math.log1p(math.exp(0.3))]
    assert found == pytest.approx(expected)


def test_the_mean_kl_is_not_negative_and_the_shift_is_the_mean_of_two_means():
    where, nan = [True, True, False, True], math.nan
    assert lo.mean_kl([0.5, 0.25, nan, -0.15], where=where) == pytest.approx(0.2)
    assert lo.mean_kl([[-0.5, 0.25], [nan, -0.15]], where=[where[:2], where[2:]]) == 0.0
    shift = lo.reward_shift(
        [0.5, 0.25, nan, -0.15], desirable=[True, True, False, False], where=where
    )
    assert shift == pytest.approx((0.375 - 0.15) / 2)
    shift = lo.reward_shift([0.5, 0.1, -0.3], desirable=[True, False, False])
    assert shift == pytest.approx((0.5 - 0.1) / 2)
    assert lo.mean_kl([nan], where=[False]) == 0.0


def test_aot_matches_ranks_and_answers_in_the_order_of_the_batch():
    nan = math.nan
    logps = [[3.0, 0.0], [nan, nan], [1.0, 0.0], [2.0, 0.0]]  # gaps 3, 1, 2
    anchor = [[0.1, 0.0], [nan, 9.0], [0.2, 0.0], [0.3, 0.0]]  # gaps .1, .2, .3
    where = [True, False, True, True]
    expected = [lo.logistic_loss([0.5 * a, 0]) for a in (2.7, 0.9, 1.8)]
    found = lo.aot_loss(logps, anchor_logps=anchor, beta=0.5, where=where)
    assert found[1] == 0.0
    assert [found[0], *found[2:]] == pytest.approx(expected)
    rewards = [[3.0, 0.1], [nan, 9.0], [1.0, 0.2], [2.0, 0.3]]
    expected = [lo.logistic_loss([a, 0]) for a in (2.7, 0.9, 1.8)]
    found = lo.aot_unpaired_loss(rewards, where=where)
    assert found[1] == 0.0
    assert [found[0], *found[2:]] == pytest.approx(expected)


def test_orpo_is_finite_at_certainty():
    certain = lo.orpo_loss([0.0, -3.0], lengths=[2, 2], lambda_=0.1)
    assert certain == lo.orpo_loss([-2e-7, -3.0], lengths=[2, 2], lambda_=0.1)
    assert math.isfinite(certain)
    # Odds of 3 against 1/3: log(1 + 1/9).
    logs = [2 * math.log(0.75), 3 * math.log(0.25)]
    found = lo.orpo_odds_ratio(logs, lengths=[2, 3])
    assert found == pytest.approx(math.log(10 / 9))


DIVERGENCES = [
    (lo.implicit_reward, {}, lambda u: u * math.log(u), 1.0),
    (lo.forward_kl_reward, {}, lambda u: -math.log(u), -1.0),
    (
        lo.jensen_shannon_reward,
        {},
        lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        0.0,
    ),
    (
        lo.alpha_divergence_reward,
        {"alpha": 0.3},
        lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.7 * (0.7 - 1)),
        0.0,
    ),
]


@pytest.mark.parametrize(("reward", "options", "f", "shift"), DIVERGENCES)
def test_a_reward_is_the_derivative_of_its_divergence(reward, options, f, shift):
    for u in (0.3, 1.0, 4.0):
        slope = (f(u + 1e-6) - f(u - 1e-6)) / 2e-6 - shift
        found = reward(math.log(u) - 1.5, anchor_logps=-1.5, beta=0.2, **options)
        assert found == pytest.approx(0.2 * slope, abs=1e-8)


def test_the_alpha_divergence_lies_between_both_kls():
    x = {"anchor_logps": -1.5, "beta": 0.2}
    near = lo.alpha_divergence_reward(-2.0, alpha=1 - 1e-7, **x)
    assert near == pytest.approx(lo.implicit_reward(-2.0, **x), rel=1e-6)
    near = lo.alpha_divergence_reward(-2.0, alpha=1e-9, **x)
    assert near == pytest.approx(lo.forward_kl_reward(-2.0, **x), rel=1e-6)


def test_an_exponential_goes_on_as_its_tangent():
    x = {"anchor_logps": 0.0, "beta": 1.0}
    assert lo.forward_kl_reward(-30.0, **x) == 1.0 - math.exp(30.0)
    assert lo.forward_kl_reward(-30.25, **x) == 1.0 - 1.25 * math.exp(30.0)
    assert lo.forward_kl_reward(-33.0, **x) == 1.0 - 4.0 * math.exp(30.0)
    found = lo.alpha_divergence_reward(-66.0, alpha=0.5, **x)
    assert found == (1.0 - 4.0 * math.exp(30.0)) / 0.5


# --- tokens ---------------------------------------------------------------------------


def test_targets_are_one_place_to_the_left():
    targets, where = lo.shift_targets([5, 6, 7, 8], mask=[False, False, True, True])
    assert targets[:3] == [6, 7, 8]
    assert where == [False, True, True, False]


def test_the_tail_of_the_longer_response_counts_alpha_times():
    where = [[False, True, True, False, True, True], [True, False, True] + [False] * 3]
    weights = lo.length_desensitized_weights(where, alpha=0.25)
    assert weights == [[0, 1, 1, 0, 0.25, 0.25], [1, 0, 1, 0, 0, 0]]
    total = lo.response_sum([math.nan, 1, 2, math.nan, 4, 8], where=where[0])
    assert total == 15.0
    values = [math.nan, 1, 2, math.nan, 4, 8]
    assert lo.response_sum(values, where=where[0], weights=weights[0]) == 6.0
    assert lo.response_mean(values, where=where[0]) == 3.75
    assert lo.response_mean(values, where=[False] * 6) == 0.0
    assert lo.response_mean([4.0, math.nan], where=[True, False]) == 4.0


def test_steps_count_from_one():
    values, ids = [1.0, 2.0, 3.0, 4.0, math.nan], [0, 1, 1, 3, 3]
    options = {"step_ids": ids, "num_steps": 3, "where": [True] * 4 + [False]}
    assert lo.step_sum(values, **options) == [5.0, 0.0, 4.0]
    assert lo.step_rewards(values, **options) == [5.0, 0.0, 4.0]
    assert lo.step_mean(values, **options) == [2.5, 0.0, 4.0]


def test_token_rewards_telescope_and_leave_no_bellman_residual():
    random = np.random.RandomState(2)
    logits, anchor_logits = random.normal(size=(2, 6, 5))
    ids, beta, where = [0, 3, 1, 4, 2, 2], 0.3, [False, True, True, False, True, False]
    q, values = [], []
    for x, a in zip(logits, ids, strict=True):
        all_q, value, advantage = lo.logit_values(x, beta=beta)
        assert all_q == pytest.approx([beta * float(y) for y in x])
        assert sum(math.exp(y / beta) for y in advantage) == pytest.approx(1.0)
        assert value == pytest.approx(beta * math.log(sum(math.exp(y) for y in x)))
        q.append(all_q[a])
        values.append(value)
    policy = lo.token_logps(logits, targets=ids)
    anchor = lo.token_logps(anchor_logits, targets=ids)
    for terminal in (None, 0.9):
        options = {"anchor_logps": anchor, "values": values, "beta": beta}
        options |= {"where": where}
        if terminal is not None:
            options["terminal_value"] = terminal
        r = lo.token_rewards(policy, **options)
        ratios = [p - a for p, a in zip(policy, anchor, strict=True)]
        total = beta * lo.response_sum(ratios, where=where)
        assert sum(r) == pytest.approx(total + values[1] - (terminal or 0.0))
        assert [r[t] for t in (0, 3, 5)] == [0.0] * 3
        residual = lo.soft_bellman_residual(q, rewards=r, **options)
        assert residual == pytest.approx([0.0] * 6, abs=1e-12)
        more = [x + 1.0 for x in r]
        residual = lo.soft_bellman_residual(q, rewards=more, **options)
        assert residual == pytest.approx([-1.0 * w for w in where])
