"""The oracles of demonstrations, rewards, policy gradients and rankings hold facts.

Duals, orders, identities and sums over small distributions, by solvers and loops of
their own; what the oracles import is checked in `test_loss_oracles.py`.
"""

import itertools
import math

import numpy as np
import pytest

import loss_oracles as lo
import more_loss_oracles as mo

NAN = math.nan
NAMES = list(mo.DIVERGENCES)
CURVED = [name for name in NAMES if name != "total_variation"]


def slope_of(f, x, width=1e-6):
    return (f(x + width) - f(x - width)) / (2 * width)


# --- the f-divergence family ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_at_the_base_policy_every_divergence_is_fine_tuning(name):
    assert mo.divergence_h(0.0, divergence=name) == 0.0
    assert mo.divergence_slope(0.0, divergence=name) == 1.0
    options = {"anchor_logps": -1.5, "beta": 0.3, "divergence": name}
    assert mo.fsft_loss(-1.5, **options) == 0.0
    slope = slope_of(lambda x: mo.fsft_loss(x, **options), -1.5)
    assert slope == pytest.approx(-1.0, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_of_a_divergence_is_its_derivative_and_falls(name):
    places = np.linspace(-6.0, 3.0, 37)
    for v in places:
        slope = slope_of(lambda x: mo.divergence_h(x, divergence=name), float(v))
        found = mo.divergence_slope(float(v), divergence=name)
        assert found == pytest.approx(slope, rel=1e-6)
    slopes = [mo.divergence_slope(float(v), divergence=name) for v in places]
    assert slopes == sorted(slopes, reverse=True)
    assert min(slopes) > 0


# f* of f, as a function that h has to invert; the KLs where they were moved to 0.
CONJUGATES = {
    "total_variation": lambda t: t,
    "chi_squared": lambda t: t + t * t / 4,
    "squared_hellinger": lambda t: t / (1 - t),
    "jensen_shannon": lambda t: -math.log(2 - math.exp(t)),
    "forward_kl": lambda t: math.exp((t + 1) - 1) - 1,
    "reverse_kl": lambda t: -1 - math.log(-(t - 1)) + 1,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_inverts_its_conjugate(name):
    for v in (-0.5, -0.01, 0.0, 0.3, 2.0):
        t = mo.divergence_h(v, divergence=name)
        assert CONJUGATES[name](t) == pytest.approx(v, abs=1e-12)


LOWEST = {
    "chi_squared": -0.9,
    "squared_hellinger": -0.9,
    "jensen_shannon": 0.1 - math.log(2),
    "forward_kl": -0.9,
    "reverse_kl": -math.log(100),
}


@pytest.mark.parametrize("name", CURVED)
def test_below_its_lowest_place_a_divergence_is_its_tangent(name):
    v0 = LOWEST[name]
    value, slope = (
        f(v0, divergence=name) for f in (mo.divergence_h, mo.divergence_slope)
    )
    for v in (v0 - 1e-9, v0 + 1e-9):  # C1 at the joint
        assert mo.divergence_h(v, divergence=name) == pytest.approx(value, abs=2e-7)
        assert mo.divergence_slope(v, divergence=name) == pytest.approx(slope, rel=1e-7)
    above = mo.divergence_slope(v0 + 1e-3, divergence=name)
    assert above < slope - 1e-4  # and the joint is here
    below = mo.divergence_h(v0 - 50.0, divergence=name)
    assert below == pytest.approx(value - 50.0 * slope)
    assert mo.divergence_slope(v0 - 50.0, divergence=name) == slope


def test_the_weights_are_bounded_by_their_tangents():
    bounds = {name: mo.divergence_slope(-1e6, divergence=name) for name in NAMES}
    assert bounds == pytest.approx(
        {
            "total_variation": 1.0,
            "chi_squared": 10**0.5,
            "squared_hellinger": 100.0,
            "jensen_shannon": math.exp(-0.1) / (1 - math.exp(-0.1)),
            "forward_kl": 10.0,
            "reverse_kl": 100.0,
        }
    )


def test_small_beta_is_fine_tuning_and_total_variation_always_is():
    for name in NAMES:
        options = {"anchor_logps": -3.0, "divergence": name}
        near = mo.fsft_loss(-2.0, beta=1e-7, **options)
        assert near == pytest.approx(-1.0, rel=1e-6)
        found = mo.fsft_weight(-2.0, beta=0.7, **options)
        slope = slope_of(lambda x, o=options: mo.fsft_loss(x, beta=0.7, **o), -2.0)
        assert found == pytest.approx(-slope, rel=1e-6)
    options |= {"divergence": "total_variation", "beta": 0.7}
    assert mo.fsft_loss(-2.0, **options) == pytest.approx(-1.0)
    solved = mo.fsft_solved_loss(-2.0, partition=0.4, **options)
    assert solved == pytest.approx(-1.0)
    options["divergence"] = "chi_squared"
    solved = mo.fsft_solved_loss(-2.0, partition=0.0, **options)
    assert solved == mo.fsft_loss(-2.0, **options)


# --- duality on bandits ---------------------------------------------------------------

COUNTS = [2, 5, 1, 4, 3, 2, 3]  # demonstrations of each of seven arms
MU = np.array(COUNTS) / sum(COUNTS)
BASE = np.array([0.20, 0.12, 0.10, 0.18, 0.15, 0.05, 0.20])
BETA = 0.5

# f(u) of D_f(mu || pi) = E_pi[f(mu / pi)], and f*(f'(u)) = u f'(u) - f(u).
GENERATORS = {
    "chi_squared": (lambda u: (u - 1) ** 2, lambda u: u * u - 1),
    "squared_hellinger": (
        lambda u: (math.sqrt(u) - 1) ** 2,
        lambda u: math.sqrt(u) - 1,
    ),
    "jensen_shannon": (
        lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        lambda u: math.log((u + 1) / 2),
    ),
    "forward_kl": (lambda u: u * math.log(u), lambda u: u),
    "reverse_kl": (lambda u: -math.log(u), lambda u: math.log(u) - 1),
}


def on_simplex(rates):
    """The pi of which all rates_i(pi_i), rising in pi_i, are equal: two bisections."""

    def at(level):
        pi = []
        for rate in rates:
            low, high = 1e-12, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if rate(middle) > level else (middle, high)
            pi.append((low + high) / 2)
        return pi

    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle)) > 1 else (middle, high)
    return at((low + high) / 2)


def kl(p, q):
    return sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))


def primal(name):
    """min over pi of D_f(mu || pi) + beta KL(pi || base), and its pi."""
    f, conjugate = GENERATORS[name]

    def rate(mu, base):  # d/dpi of pi f(mu / pi) + beta pi log(pi / base)
        return lambda pi: BETA * (math.log(pi / base) + 1) - conjugate(mu / pi)

    pi = on_simplex([rate(m, b) for m, b in zip(MU, BASE, strict=True)])
    divergence = sum(p * f(m / p) for m, p in zip(MU, pi, strict=True))
    return divergence + BETA * kl(pi, BASE), pi


def dual(name):
    """max over pi and c of E_mu[h(v)] - c, by Newton in v, and its pi and c.

    v_i = beta log(pi_i / base_i) + c takes every value once, and then
    c = beta log sum_i base_i exp(v_i / beta).
    """
    v, width = np.zeros(len(MU)), 1e-5
    slopes = np.vectorize(lambda x: mo.divergence_slope(x, divergence=name))
    for _ in range(50):
        weights = BASE * np.exp(v / BETA)
        pi = weights / weights.sum()
        bend = (slopes(v + width) - slopes(v - width)) / (2 * width)
        curvature = np.diag(MU * bend - pi / BETA) + np.outer(pi, pi) / BETA
        v = v - np.linalg.solve(curvature, MU * slopes(v) - pi)
    assert min(v) > LOWEST[name] + 0.01  # the tangent plays no part
    c = BETA * math.log((BASE * np.exp(v / BETA)).sum())
    h = [mo.divergence_h(float(x), divergence=name) for x in v]
    return float(MU @ h) - c, pi, c


@pytest.mark.parametrize("name", CURVED)
def test_the_solved_loss_is_the_dual_of_divergence_plus_kl_to_the_base(name):
    value, pi = primal(name)
    found, policy, c = dual(name)
    assert found == pytest.approx(value, abs=1e-9)
    assert list(policy) == pytest.approx(pi, abs=1e-7)
    losses = [
        mo.fsft_solved_loss(
            math.log(p),
            anchor_logps=math.log(b),
            beta=BETA,
            divergence=name,
            partition=c,
        )
        for p, b in zip(policy, BASE, strict=True)
    ]
    assert -BETA * float(MU @ losses) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", CURVED)
def test_the_partition_of_a_batch_is_that_of_the_dual(name):
    _, policy, c = dual(name)
    arms = [i for i, n in enumerate(COUNTS) for _ in range(n)]
    options = {"beta": BETA, "divergence": name}
    logps = [math.log(policy[i]) for i in arms]
    anchor = [math.log(BASE[i]) for i in arms]
    found = mo.solve_partition(logps, anchor_logps=anchor, **options)
    assert found == pytest.approx(c, abs=1e-7)
    weights = [
        mo.fsft_weight(p, anchor_logps=a, partition=found, **options)
        for p, a in zip(logps, anchor, strict=True)
    ]
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=1e-12)
    rows = [[*logps, NAN]], [[*anchor, NAN]]
    where = [[True] * len(arms) + [False]]
    masked = mo.solve_partition(rows[0], anchor_logps=rows[1], where=where, **options)
    assert masked == found


def test_one_response_has_no_partition_but_its_own():
    options = {"beta": 0.4, "divergence": "squared_hellinger"}
    alone = mo.solve_partition([-2.0], anchor_logps=[-3.0], **options)
    assert alone == pytest.approx(-0.4)
    none = mo.solve_partition([NAN], anchor_logps=[NAN], where=[False], **options)
    assert none == 0.0
    options["divergence"] = "total_variation"
    assert mo.solve_partition([-2.0], anchor_logps=[-3.0], **options) == 0.0


def fitted(name, beta, mu, base):
    """The pi of least mean loss over demonstrations, c left out."""

    def rate(m, b):  # d/dpi of the loss
        return lambda pi: (
            -m
            * mo.fsft_weight(
                math.log(pi), anchor_logps=math.log(b), beta=beta, divergence=name
            )
            / pi
        )

    return on_simplex([rate(m, b) for m, b in zip(mu, base, strict=True)])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chi_squared_stays_near_the_base_and_hellinger_nearer(beta, seed):
    random = np.random.RandomState(seed)
    mu, base = random.dirichlet([1.0] * 10, size=2)
    names = NAMES[:4]  # total variation, chi-squared, Hellinger, Jensen-Shannon
    tv, chi, hellinger, js = (kl(fitted(n, beta, mu, base), base) for n in names)
    assert tv == pytest.approx(kl(mu, base), rel=1e-6)  # fine-tuning: pi = mu
    assert tv > 1.02 * chi
    assert chi > 1.05 * max(hellinger, js)
    assert hellinger == pytest.approx(js, rel=0.15)


def test_dynamic_fine_tuning_weighs_a_token_by_its_probability():
    assert mo.dft_loss(math.log(0.2)) == pytest.approx(-0.2 * math.log(0.2))
    assert mo.dft_slope(math.log(0.2)) == pytest.approx(-0.2)
    # In pi the step does not depend on pi: -pi d log pi = -d pi.
    for p in (0.1, 0.9):
        assert mo.dft_slope(math.log(p)) / p == pytest.approx(-1.0)


# --- reward models --------------------------------------------------------------------


def test_centering_adds_the_square_of_the_sum():
    pair = lo.logistic_loss([0.7, -0.2], margin=0.4)
    found = mo.reward_model_loss([0.7, -0.2], centering=0.1, margin=0.4)
    assert found == pytest.approx(pair + 0.1 * 0.25)
    centred = mo.reward_model_loss([0.7, -0.7], centering=5.0)
    assert centred == lo.logistic_loss([0.7, -0.7])


def test_an_outcome_is_a_cross_entropy_that_is_least_at_its_logit():
    p = 1 / (1 + math.exp(-0.7))
    assert mo.binary_outcome_loss(0.7, labels=1) == pytest.approx(-math.log(p))
    assert mo.binary_outcome_loss(0.7, labels=0.0) == pytest.approx(-math.log(1 - p))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert mo.binary_outcome_loss(0.7, labels=p) == pytest.approx(entropy)
    slope = slope_of(lambda r: mo.binary_outcome_loss(r, labels=p), 0.7)
    assert slope == pytest.approx(0.0, abs=1e-9)


def test_outcome_pairs_are_all_successes_against_all_failures():
    scores = [0.4, NAN, -0.3, 1.1, 0.4]
    success, where = [1, 1, 0, 1, 0], [True, False, True, True, True]
    pairs = [(0.4, -0.3), (0.4, 0.4), (1.1, -0.3), (1.1, 0.4)]
    expected = sum(math.log1p(math.exp(b - a)) for a, b in pairs) / 4
    options = {"success": success, "where": where}
    assert mo.outcome_pairs_loss(scores, **options) == pytest.approx(expected)
    assert mo.outcome_pairs_count(**options) == 4.0
    assert mo.outcome_pairs_accuracy(scores, **options) == 3.5 / 4
    means = mo.outcome_pairs_means(scores, **options)
    assert means == pytest.approx([(0.4 + 0.4 + 1.1 + 1.1) / 4, (-0.3 + 0.4) / 2])
    in_order = sum(math.log1p(math.exp(b - a)) for a, b in [(0.4, -0.3), (1.1, 0.4)])
    assert mo.matched_outcomes_loss(scores, **options) == pytest.approx(in_order / 2)
    assert mo.outcome_pairs_count(matched=True, **options) == 2.0
    assert mo.outcome_pairs_accuracy(scores, matched=True, **options) == 1.0
    two = mo.outcome_pairs_loss([0.2, 0.9], success=[False, True])
    assert two == pytest.approx(lo.logistic_loss([0.9, 0.2]))
    for outcomes in ([1, 1], [0, 0]):
        assert mo.outcome_pairs_loss([0.2, 0.9], success=outcomes) == 0.0
        assert mo.outcome_pairs_count(success=outcomes) == 0.0
        assert mo.outcome_pairs_accuracy([0.2, 0.9], success=outcomes) == 0.0


# --- advantages -----------------------------------------------------------------------

GROUP = [1.0, 0.0, 0.25, 3.0]
WITH_HOLES = [1.0, NAN, 0.0, 0.25, NAN, 3.0]
HOLES = [True, False, True, True, False, True]
RULES = {
    "group": mo.group_advantages,
    "centered": mo.centered_advantages,
    "leave_one_out": mo.leave_one_out_advantages,
    "whitened": mo.whitened_advantages,
    "discounted": lambda r, **kw: mo.discounted_returns(r, discount=0.9, **kw),
    "cluster": lambda r, **kw: mo.cluster_advantages(r, cluster_ids=[0] * len(r), **kw),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_is_dropped_has_no_advantage_and_no_part_in_others(rule):
    found = RULES[rule](WITH_HOLES, where=HOLES)
    assert [x for x, w in zip(found, HOLES, strict=True) if w] == RULES[rule](GROUP)
    assert (found[1], found[4]) == (0.0, 0.0)
    assert RULES[rule]([NAN], where=[False]) == [0.0]


@pytest.mark.parametrize("rule", ["group", "centered", "leave_one_out", "cluster"])
def test_a_response_alone_has_no_advantage(rule):
    assert RULES[rule]([5.0, NAN], where=[True, False]) == [0.0, 0.0]


def test_leave_one_out_is_n_over_n_minus_one_times_the_centred_reward():
    found = mo.leave_one_out_advantages(GROUP)
    centred = [4 / 3 * (u - sum(GROUP) / 4) for u in GROUP]
    assert found == pytest.approx(centred, rel=1e-12)
    assert mo.centered_advantages(GROUP) == pytest.approx(
        [u - 1.0625 for u in GROUP], rel=1e-12
    )


def test_group_advantages_have_mean_zero_and_the_sample_std_one():
    found = mo.group_advantages(GROUP, epsilon=0.0)
    assert np.mean(found) == pytest.approx(0.0, abs=1e-12)
    assert np.std(found, ddof=1) == pytest.approx(1.0)
    # Of 0 and 1 the std is sqrt(1/2), and epsilon is beside it, not under the root.
    found = mo.group_advantages([0.0, 1.0], epsilon=0.5)
    assert found[1] == pytest.approx(0.5 / (math.sqrt(0.5) + 0.5))
    found = mo.group_advantages([0.0, 1.0])
    assert found[1] == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-6), rel=1e-12)
    assert mo.group_advantages([0.1] * 7) == pytest.approx([0.0] * 7, abs=1e-9)


def test_whitening_is_of_the_whole_batch_with_its_own_variance():
    batch = [[1.0, 0.0], [0.25, 3.0]]
    found = mo.whitened_advantages(batch)
    assert np.mean(found) == pytest.approx(0.0, abs=1e-12)
    assert np.std(found) == pytest.approx(1.0)
    found = mo.whitened_advantages([0.0, 2e-4])  # variance 1e-8, epsilon as large
    assert found[1] == pytest.approx(1 / math.sqrt(2))
    assert mo.whitened_advantages([2.0, 2.0]) == [0.0, 0.0]


def test_step_advantages_are_of_all_turns_of_all_episodes():
    rewards, where = [[0.5, NAN, NAN], [1.5, -1.0, 0.2]], [[1, 0, 0], [1, 1, 1]]
    turns = [0.5, 1.5, -1.0, 0.2]
    std = np.std(turns, ddof=1)
    expected = [(r - 0.3) / (std + 1e-6) for r in turns]
    found = mo.step_advantages(rewards, where=where)
    assert found[0][1:] == [0.0, 0.0]
    assert [found[0][0], *found[1]] == pytest.approx(expected, rel=1e-12)
    wide = mo.step_advantages(rewards, where=where, epsilon=0.5)
    assert wide[0][0] == pytest.approx(0.2 / (std + 0.5))
    assert mo.step_advantages([[4.0, NAN]], where=[[1, 0]]) == [[0.0, 0.0]]


def test_a_turn_is_held_against_turns_at_the_same_state():
    found = mo.cluster_advantages(
        [1.0, 4.0, NAN, 3.0, 7.0],
        cluster_ids=[5, 2, 5, 5, 9],
        where=[True, True, False, True, True],
    )
    assert found == [-1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_return_is_the_reward_and_the_discounted_next_return():
    rewards = [1.0, -2.0, 0.5]
    assert mo.discounted_returns(rewards, discount=0.5) == [0.125, -1.75, 0.5]
    assert mo.discounted_returns(rewards, discount=1.0) == [-0.5, -1.5, 0.5]
    # What is dropped takes no time: the last reward is one step away, not two.
    found = mo.discounted_returns(
        [1.0, NAN, 0.5], discount=0.5, where=[True, False, True]
    )
    assert found == [1.25, 0.0, 0.5]


ROW = {"values": [0.3, -0.2, 0.9, 0.1], "discount": 0.9}
ROW_REWARDS = [0.5, -1.0, 0.0, 2.0]


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    for last in (0.0, 0.7):
        rewards = [*ROW_REWARDS[:-1], ROW_REWARDS[-1] + 0.9 * last]
        returns = mo.discounted_returns(rewards, discount=0.9)
        found = mo.gae(ROW_REWARDS, gae_lambda=1.0, last_value=last, **ROW)
        expected = [r - v for r, v in zip(returns, ROW["values"], strict=True)]
        assert found[0] == pytest.approx(expected, rel=1e-12)
        assert found[1] == pytest.approx(returns, rel=1e-12)


def test_gae_with_lambda_zero_is_one_step_and_recurs_between():
    v, r = [*ROW["values"], 0.7], ROW_REWARDS
    deltas = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(4)]
    found, returns = mo.gae(r, gae_lambda=0.0, last_value=0.7, **ROW)
    assert found == pytest.approx(deltas, rel=1e-12)
    assert returns == pytest.approx([d + x for d, x in zip(deltas, v, strict=False)])
    found, _ = mo.gae(r, gae_lambda=0.6, last_value=0.7, **ROW)
    for t in range(3):
        assert found[t] == pytest.approx(deltas[t] + 0.54 * found[t + 1])
    assert found[3] == pytest.approx(deltas[3])


def test_gae_reads_no_token_that_is_dropped():
    options = {"discount": 0.9, "gae_lambda": 0.6, "last_value": 0.7}
    kept = mo.gae([0.5, 2.0], values=[0.3, 0.1], **options)
    found = mo.gae(
        [NAN, 0.5, NAN, 2.0, NAN],
        values=[NAN, 0.3, NAN, 0.1, NAN],
        where=[False, True, False, True, False],
        **options,
    )
    for with_holes, whole in zip(found, kept, strict=True):
        assert with_holes == [0.0, whole[0], 0.0, whole[1], 0.0]


# --- surrogates -----------------------------------------------------------------------

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def test_the_surrogate_is_clipped_only_where_that_is_worse():
    for rho, a, loss, clipped in (
        (1.1, 2.0, -2.2, 0.0),
        (1.5, 2.0, -2.6, 1.0),
        (0.5, 2.0, -1.0, 0.0),
        (1.5, -2.0, 3.0, 0.0),
        (0.5, -2.0, 1.6, 1.0),
        (1.5, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0),
    ):
        options = {"advantages": a, **CLIP}
        found = mo.clipped_surrogate_loss(math.log(rho), **options)
        assert found == pytest.approx(loss)
        assert mo.surrogate_is_clipped(math.log(rho), **options) == clipped
        slope = slope_of(
            lambda x, o=options: mo.clipped_surrogate_loss(x, **o), math.log(rho)
        )
        assert slope == pytest.approx(0.0 if clipped else -a * rho, abs=1e-8)


def test_a_dual_clip_bounds_the_loss_of_bad_responses_alone():
    for rho, a, loss in ((5.0, -2.0, 6.0), (2.0, -2.0, 4.0), (5.0, 2.0, -2.6)):
        found = mo.clipped_surrogate_loss(
            math.log(rho), advantages=a, dual_clip=3.0, **CLIP
        )
        assert found == pytest.approx(loss)


def test_a_dual_clip_is_a_ratio_that_is_cut_off_before_the_clip():
    for rho, a in itertools.product((0.1, 0.9, 1.2, 2.0, 5.0), (-2.0, 0.0, 2.0)):
        cut, cap = min(rho, 3.0) * a, min(max(rho, 0.8), 1.3) * a
        found = mo.clipped_surrogate_loss(
            math.log(rho), advantages=a, dual_clip=3.0, **CLIP
        )
        assert found == pytest.approx(-min(cut, cap))


def test_a_sequence_ratio_is_a_geometric_mean_and_a_turn_ratio_a_product():
    ratios = [1.2, NAN, 0.9, 1.5]
    logs = [math.log(x) for x in ratios]
    where = [True, False, True, True]
    found = mo.sequence_log_ratios(logs, where=where)
    assert math.exp(found) == pytest.approx((1.2 * 0.9 * 1.5) ** (1 / 3))
    turns = mo.turn_log_ratios(logs, step_ids=[1, 1, 3, 3], num_steps=3, where=where)
    assert [math.exp(x) for x in turns] == pytest.approx([1.2, 1.0, 0.9 * 1.5])


def test_the_value_loss_is_the_worse_of_the_value_and_the_clipped_one():
    for v, target, expected in (
        (1.05, 2.0, 0.95**2 / 2),  # inside the clip
        (1.5, 2.0, 0.8**2 / 2),  # towards the target, no further than 1.2
        (1.5, 0.0, 1.5**2 / 2),  # away from it, as far as it went
        (0.5, 0.0, 0.8**2 / 2),
    ):
        found = mo.value_loss(v, returns=target, old_values=1.0, clip=0.2)
        assert found == pytest.approx(expected)


P, Q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.3, 0.3, 0.1, 0.3])


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    x = np.log(P / Q)
    means = {
        k: sum(float(p) * f(float(a)) for p, a in zip(P, x, strict=True))
        for k, f in (("k1", mo.kl_k1), ("k2", mo.kl_k2), ("k3", mo.kl_k3))
    }
    assert means["k1"] == pytest.approx(kl(P, Q), rel=1e-12)
    assert means["k3"] == pytest.approx(kl(P, Q), rel=1e-12)
    second = sum(P * x * x) / 2
    assert means["k2"] == pytest.approx(second, rel=1e-12)
    assert abs(second - kl(P, Q)) > 0.01


def test_k2_and_k3_are_not_negative_and_agree_near_zero():
    for x in (-3.0, -0.5, 0.0, 0.5, 3.0):
        assert mo.kl_k3(x) == pytest.approx(math.exp(-x) - 1 + x)
        assert mo.kl_k3(x) >= 0
        assert mo.kl_k2(x) == pytest.approx(x * x / 2)
    assert mo.kl_k3(0.0) == 0.0
    assert mo.kl_k3(1e-5) == pytest.approx(mo.kl_k2(1e-5), rel=1e-5)


def test_coefficients_are_the_slopes_of_the_first_pass():
    scores, success = [0.4, -0.3, 1.1], [True, False, True]

    def loss(s):
        return mo.outcome_pairs_loss(s, success=success)

    found = mo.score_coefficients(scores, loss_fn=loss)
    up = [1 / (1 + math.exp(scores[i] + 0.3)) / 2 for i in (0, 2)]
    assert found == pytest.approx([-up[0], sum(up), -up[1]], abs=1e-11)
    second = [
        slope_of(lambda x, c=c: mo.coefficient_loss(x, coefficients=c), -2.0)
        for c in found
    ]
    assert second == pytest.approx(found)


# --- pictures -------------------------------------------------------------------------

NOISE = np.array([[[0.5, -1.0]], [[0.0, 2.0]]])
PREDICTED = np.array([[[0.25, -1.0]], [[0.5, 1.0]]])
ANCHORED = np.array([[[1.5, -1.0]], [[0.5, 1.5]]])


def test_the_error_of_a_picture_is_a_mean_and_a_reward_is_an_improvement():
    error = mo.denoising_error(PREDICTED, target=NOISE)
    anchor = mo.denoising_error(ANCHORED, target=NOISE)
    assert (error, anchor) == (1.3125 / 4, 1.5 / 4)
    found = mo.denoising_reward(error, anchor_error=anchor, beta=10.0)
    assert found == pytest.approx(10 * 0.1875 / 4)


def test_preferences_of_pictures_are_preferences_of_improvements():
    errors, anchor = [0.3, 0.5], [0.35, 0.4]  # improvements 0.05 and -0.1
    dpo = mo.diffusion_dpo_loss(errors, anchor_errors=anchor, beta=20.0)
    assert dpo == pytest.approx(math.log1p(math.exp(-0.5 * 20.0 * 0.15)))
    options = {"anchor_errors": 0.35, "beta": 20.0, "kl": 0.02}
    s = 1 / (1 + math.exp(-20.0 * 0.03))
    for side, weight, loss in ((True, 1.0, 1 - s), (False, 1.0, s)):
        found = mo.diffusion_kto_loss(0.3, desirable=side, **options)
        assert found == pytest.approx(weight * loss)
        found = mo.diffusion_kto_loss(
            0.3, desirable=side, desirable_weight=2.0, undesirable_weight=2.0, **options
        )
        assert found == pytest.approx(2 * loss)
        kto = lo.kto_loss(20.0 * 0.05, desirable=side, kl=20.0 * 0.02)
        assert found == pytest.approx(2 * kto)
    for threshold, loss in ((-0.001, -0.001), (-0.2, -0.15)):
        found = mo.diffusion_dro_loss(errors, anchor_errors=anchor, threshold=threshold)
        assert found == pytest.approx(loss)
    found = mo.diffusion_dro_loss([0.5, 0.3], anchor_errors=[0.4, 0.35], threshold=0.0)
    assert found == pytest.approx(0.15)


def test_online_negatives_of_the_policy_itself_are_a_gate_and_not_a_gradient():
    # The sample's noise is the policy's own prediction: its error is 0 and stays flat.
    drift = mo.denoising_error(PREDICTED, target=ANCHORED)
    own = mo.denoising_error(PREDICTED, target=PREDICTED)
    found = mo.diffusion_dro_loss(
        [0.3, own], anchor_errors=[0.35, drift], threshold=-0.001
    )
    assert found == pytest.approx(0.3 - 0.35 + drift)
    moved = PREDICTED + np.array([[[1e-6, 0.0]], [[0.0, 0.0]]])
    change = mo.denoising_error(moved, target=PREDICTED) - own
    assert abs(change) < 1e-12


def test_dspo_regresses_the_winner_on_noise_that_is_pulled_away_from_the_anchor():
    options = {"target": NOISE, "anchor_predictions": ANCHORED}
    plain = mo.dspo_loss(PREDICTED, rewards=[0.0, 0.0], beta=0.0, **options)
    assert plain == pytest.approx(mo.denoising_error(PREDICTED, target=NOISE))
    s = 1 / (1 + math.exp(-0.5 * (0.8 - 0.2)))
    target = NOISE + 0.4 * (1 - s) * (PREDICTED - ANCHORED)
    found = mo.dspo_loss(PREDICTED, rewards=[0.8, 0.2], beta=0.4, **options)
    assert found == pytest.approx(mo.denoising_error(PREDICTED, target=target))
    won = mo.dspo_loss(PREDICTED, rewards=[99.0, 0.0], beta=0.4, **options)
    assert won == pytest.approx(plain)


# --- rankings -------------------------------------------------------------------------

SCORES, RELEVANCE = [0.1, 0.9, 0.5, 0.5], [2.0, 0.0, 1.0, 0.0]  # order 1, 2, 3, 0


def test_ndcg_by_hand():
    ideal = 3.0 + 1 / math.log2(3)
    for k, dcg in (
        (1, 0.0),
        (2, 1 / math.log2(3)),
        (4, 1 / math.log2(3) + 3 / 2.321928),
    ):
        best = 3.0 if k == 1 else ideal
        found = mo.ndcg(SCORES, RELEVANCE, k=k)
        assert found == pytest.approx(dcg / best, rel=1e-6)
    assert mo.ndcg(RELEVANCE, RELEVANCE, k=3) == 1.0
    assert mo.ndcg([0.3, 0.1], [0.0, 0.0], k=2) == 0.0


def test_no_order_has_more_gain_than_that_by_relevance():
    found = [
        mo.ndcg(scores, RELEVANCE, k=3) for scores in itertools.permutations(range(4))
    ]
    assert max(found) == 1.0
    assert min(found) >= 0.0


def test_ranks_of_the_relevant_by_hand():
    assert [mo.recall(SCORES, RELEVANCE, k=k) for k in (1, 2, 3, 4, 9)] == [
        0.0,
        0.5,
        0.5,
        1.0,
        1.0,
    ]
    assert mo.reciprocal_rank(SCORES, RELEVANCE) == 0.5
    assert [mo.mean_relevance(SCORES, RELEVANCE, k=k) for k in (1, 2, 4, 9)] == [
        0.0,
        0.5,
        0.75,
        0.75,
    ]
    nothing = [0.0, 0.0]
    assert mo.recall([0.3, 0.1], nothing, k=1) == 0.0
    assert mo.reciprocal_rank([0.3, 0.1], nothing) == 0.0


def test_equal_scores_rank_in_the_order_of_the_slots():
    assert mo.reciprocal_rank([0.5, 0.5, 0.5], [0, 1, 0]) == 0.5
    assert mo.recall([0.5, 0.5], [1, 0], k=1) == 1.0
    assert mo.win_mass([0.2, 0.7, 0.1], [1.0, 3.0, 3.0]) == 0.7


def test_an_item_that_is_dropped_is_not_ranked():
    scores, relevance = [0.1, NAN, 0.9, 0.5, 0.5], [2.0, NAN, 0.0, 1.0, 0.0]
    where = [True, False, True, True, True]
    for metric in (mo.ndcg, mo.recall, mo.mean_relevance):
        found = metric(scores, relevance, k=2, where=where)
        assert found == metric(SCORES, RELEVANCE, k=2)
    assert mo.reciprocal_rank(scores, relevance, where=where) == 0.5
    assert (
        mo.win_mass([NAN, 0.3, 0.7], [NAN, 2.0, 1.0], where=[False, True, True]) == 0.3
    )
    assert mo.win_mass([NAN], [NAN], where=[False]) == 0.0
    assert mo.mean_relevance([NAN], [NAN], k=1, where=[False]) == 0.0


def test_win_mass_is_the_probability_of_the_best_item():
    assert mo.win_mass([0.2, 0.5, 0.3], [0.4, -1.0, 2.0]) == 0.3
