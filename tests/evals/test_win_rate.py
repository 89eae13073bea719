"""A length-controlled win rate is a win rate, and length alone does not move it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from pref_jax.evals.preference import (
    Interval,
    LengthControlled,
    bootstrap_interval,
    length_controlled_win_rate,
    win_rate,
)

SOFT = [1, 1, 0.5, 0.9, 0, 0.2, 1, 0, 0.5, 0.75, 0, 1]
DIFFERENCES = [40, 25, -10, 60, -35, 5, 15, -20, 0, 30, 10, -5]
DIFFICULTY = [0.3, -1.2, 0.8, 1.5, -0.4, 0.1, -0.9, 2.0, 0.6, -1.1, 1.3, -0.2]

prompts = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        st.integers(-50, 50),
        st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
    ),
    min_size=2,
    max_size=12,
).filter(lambda rows: len({row[1] for row in rows}) > 1)


def value(outcomes, differences, **options) -> LengthControlled:
    """Few resamples: the tests of the value need no interval."""
    return length_controlled_win_rate(
        outcomes, length_differences=differences, num_resamples=2, **options
    )


def world(seed, *, size, theta, phi, padding=0.0):
    """Outcomes that merit and length cause, and the length differences."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(0.0, 100.0, size) + padding
    logits = theta + phi * np.tanh(differences / 100.0)
    return (rng.random(size) < 1 / (1 + np.exp(-logits))).astype(float), differences


# --- the value ------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=1), st.booleans())
def test_without_length_differences_it_is_the_raw_win_rate(outcomes, with_difficulty):
    differences = np.zeros(len(outcomes))
    difficulty = np.arange(len(outcomes)) % 3 if with_difficulty else None
    found = value(outcomes, differences, difficulty=difficulty)
    assert found.win_rate.mean == pytest.approx(np.mean(outcomes), abs=1e-9)
    assert found.length_effect == 0.0


def test_a_model_against_itself_wins_half():
    found = length_controlled_win_rate([0.5] * 7, length_differences=[0] * 7)
    assert found.win_rate == Interval(0.5, 0.5, 0.5)
    # Sampled twice, with the judge's two orders averaged: each pair and its mirror.
    found = value(
        [*SOFT, *(1 - q for q in SOFT)], [*DIFFERENCES, *(-d for d in DIFFERENCES)]
    )
    assert found.win_rate.mean == pytest.approx(0.5, abs=1e-9)


@given(prompts, st.booleans())
def test_swapping_the_models_gives_the_rest(rows, with_difficulty):
    outcomes, differences, difficulty = np.array(rows).T
    options = {"difficulty": difficulty} if with_difficulty else {}
    found = value(outcomes, differences, **options)
    swapped = value(1 - outcomes, -differences, **options)
    assert swapped.win_rate.mean == pytest.approx(1 - found.win_rate.mean, abs=1e-7)
    assert swapped.win_rate.low == pytest.approx(1 - found.win_rate.high, abs=1e-7)
    assert swapped.intercept == pytest.approx(-found.intercept, abs=1e-4)
    assert swapped.length_effect == pytest.approx(found.length_effect, abs=1e-4)


@given(prompts, st.booleans(), st.sampled_from([0.01, 1.0]))
def test_the_gradient_is_zero_at_the_solution(rows, with_difficulty, penalty):
    outcomes, differences, difficulty = np.array(rows).T
    options = {"difficulty": difficulty} if with_difficulty else {}
    found = value(outcomes, differences, penalty=penalty, **options)
    if math.isinf(found.intercept):
        assert outcomes.mean() in (0.0, 1.0)
        return
    effects = [found.intercept, found.length_effect, found.difficulty_effect]
    assert with_difficulty or found.difficulty_effect == 0
    gradient = [0.0, penalty * effects[1], penalty * effects[2] * with_difficulty]
    std = np.std(differences, ddof=1)
    for q, d, h in zip(outcomes, differences, difficulty, strict=True):
        terms = [1.0, math.tanh(d / std), h * with_difficulty]
        logit = sum(a * b for a, b in zip(effects, terms, strict=True))
        for i, term in enumerate(terms):
            gradient[i] += (oracles.sigmoid(logit) - q) * term
    assert max(map(abs, gradient)) <= 2e-10 * len(outcomes)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
@pytest.mark.parametrize("outcomes", [SOFT, [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1]])
def test_it_is_what_bisection_finds(outcomes, penalty):
    rate, theta, phi = oracles.length_controlled_win_rate(
        outcomes, DIFFERENCES, penalty
    )
    found = value(outcomes, DIFFERENCES, penalty=penalty)
    assert found.win_rate.mean == pytest.approx(rate, rel=1e-8)
    assert found.intercept == pytest.approx(theta, rel=1e-7)
    assert found.length_effect == pytest.approx(phi, rel=1e-7)


# numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1, with q, d, h the three lists above:
#   X = np.stack([np.ones(12), np.tanh(d / d.std(ddof=1)), h], 1)   # or without h
#   ridge = penalty * np.array([0, 1, 1])
#   b = scipy.optimize.root(
#       lambda b: X.T @ (expit(X @ b) - q) + ridge * b, np.zeros(3), tol=1e-14).x
#   rate = expit(b[0] + b[2] * h).mean()
# LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-12) on each prompt
# twice, as won with weight q and as lost with 1 - q, gives the same b to 1e-15.
@pytest.mark.parametrize(
    ("difficulty", "penalty", "coefficients", "rate"),
    [
        (None, 0.01, [-0.10009541599716175, 2.2275521141499866], 0.4749970181142468),
        (
            DIFFICULTY,
            0.01,
            [0.2362446606697514, 2.1423114708830577, -0.9763828296947736],
            0.5036925017891488,
        ),
        (
            DIFFICULTY,
            2.0,
            [0.29612459211904396, 0.5858716295472657, -0.44870023177735935],
            0.5457225692954988,
        ),
    ],
)
def test_it_is_what_scipy_and_scikit_learn_find(
    difficulty, penalty, coefficients, rate
):
    found = value(SOFT, DIFFERENCES, difficulty=difficulty, penalty=penalty)
    got = [found.intercept, found.length_effect, found.difficulty_effect]
    np.testing.assert_allclose(got[: len(coefficients)], coefficients, rtol=1e-7)
    assert found.win_rate.mean == pytest.approx(rate, rel=1e-8)


@given(prompts, st.randoms(use_true_random=False))
def test_neither_order_of_the_prompts_nor_unit_of_length_matters(rows, random):
    rows = np.array(rows)
    expected = value(rows[:, 0], rows[:, 1], difficulty=rows[:, 2])
    shuffled = rows[random.sample(range(len(rows)), len(rows))]
    found = value(shuffled[:, 0], 4 * shuffled[:, 1], difficulty=shuffled[:, 2])
    assert found.win_rate.mean == pytest.approx(expected.win_rate.mean, abs=1e-7)
    assert found.scale == pytest.approx(4 * expected.scale, rel=1e-9)


def test_padding_moves_the_raw_rate_and_not_the_length_controlled():
    plain, differences = world(0, size=800, theta=0.4, phi=1.5)
    padded, longer = world(0, size=800, theta=0.4, phi=1.5, padding=80.0)
    np.testing.assert_allclose(longer - differences, 80.0)
    assert win_rate(padded).low > win_rate(plain).high
    before = length_controlled_win_rate(plain, length_differences=differences)
    after = length_controlled_win_rate(padded, length_differences=longer)
    assert before.win_rate.low < after.win_rate.mean < before.win_rate.high
    assert after.win_rate.low < before.win_rate.mean < after.win_rate.high
    for found in (before, after):
        assert found.win_rate.low < oracles.sigmoid(0.4) < found.win_rate.high
        assert found.length_effect == pytest.approx(1.5, abs=0.5)


def test_length_that_decides_everything_has_a_finite_effect():
    differences = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    outcomes = (differences > 0).astype(float)
    found = value(outcomes, differences)
    assert found.win_rate.mean == pytest.approx(0.5, abs=1e-9)
    assert 5 < found.length_effect < 50
    stronger = value(outcomes, differences, penalty=1.0)
    assert 0 < stronger.length_effect < found.length_effect


@pytest.mark.parametrize("penalty", [1e-6, 1e-2])
@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_fits_converge_where_length_or_difficulty_decides_everything(penalty, shift):
    # 800 lengths, densely: log-odds of thousands far from the turn; a rare outcome.
    differences = np.random.default_rng(8).normal(0.0, 1.0, 800)
    outcomes = (differences > shift).astype(float)
    assert 0 < outcomes.sum() < 800
    by_length = value(outcomes, differences, penalty=penalty)
    by_difficulty = value(
        outcomes, np.zeros(800), difficulty=1000 * differences, penalty=penalty
    )
    assert 0 < by_length.length_effect < math.inf
    assert 0 < by_difficulty.difficulty_effect < math.inf
    assert by_difficulty.win_rate.mean == pytest.approx(outcomes.mean(), abs=1e-9)


def test_whole_steps_that_would_overshoot_are_shortened():
    # Newton's whole steps end in logits of thousands and a Hessian of 0 here.
    difficulty = [-68.1, 84.6, 108.2, -86.0, -75.4]
    found = value([1, 1, 1, 1, 0], [15, 16, 48, -39, 39], difficulty=difficulty)
    assert 0 < found.win_rate.mean < 1
    assert found.length_effect < 0  # of two alike in difficulty, the longer lost


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("difficulty", [None, DIFFICULTY])
def test_who_wins_everything_wins_everything(outcome, difficulty):
    found = value([outcome] * 12, DIFFERENCES, difficulty=difficulty)
    assert found.win_rate == Interval(outcome, outcome, outcome)
    assert found.intercept == (math.inf if outcome else -math.inf)
    assert found.length_effect == found.difficulty_effect == 0


def test_one_prompt_is_its_outcome():
    for outcome in (0.0, 0.3, 1.0):
        found = value([outcome], [0])
        np.testing.assert_allclose(found.win_rate, outcome, atol=1e-9)


# --- the interval ---------------------------------------------------------------------


def test_the_raw_win_rate_is_a_mean_with_its_interval():
    assert win_rate(SOFT, seed=1, num_resamples=50) == bootstrap_interval(
        SOFT, seed=1, num_resamples=50
    )
    assert win_rate(SOFT).mean == pytest.approx(6.85 / 12, rel=1e-12)


def test_each_resample_is_fitted_anew():
    outcomes, differences = np.array(SOFT), np.array(DIFFERENCES)
    rng = np.random.default_rng(6)
    rates = []
    for _ in range(9):
        drawn = rng.integers(0, 12, 12)
        rate, _, _ = oracles.length_controlled_win_rate(
            outcomes[drawn], differences[drawn], 0.1, np.std(differences, ddof=1)
        )
        rates.append(rate)
    found = length_controlled_win_rate(
        outcomes,
        length_differences=differences,
        penalty=0.1,
        confidence=0.5,
        num_resamples=9,
        seed=6,
    )
    # Of nine values, the quarters are the third and the seventh.
    expected = sorted(rates)[2], sorted(rates)[6]
    np.testing.assert_allclose(found.win_rate[1:], expected, rtol=1e-6)


def test_without_length_differences_the_interval_is_the_raw_one():
    # 3,000 prompts: the resamples are fitted in more than one part.
    outcomes = np.random.default_rng(7).integers(0, 3, 3000) / 2
    options = {"num_resamples": 400, "confidence": 0.9, "seed": 2}
    found = length_controlled_win_rate(
        outcomes, length_differences=np.zeros(3000), **options
    )
    np.testing.assert_allclose(found.win_rate, win_rate(outcomes, **options), atol=1e-8)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # 100 worlds of 120 prompts; 90 % intervals hold the truth in 90 of them, give or
    # take 3; four deviations allowed.
    covered = 0
    for seed in range(100):
        outcomes, differences = world(seed, size=120, theta=0.6, phi=1.0, padding=50.0)
        found = length_controlled_win_rate(
            outcomes,
            length_differences=differences,
            confidence=0.9,
            num_resamples=300,
            seed=seed,
        )
        covered += found.win_rate.low <= oracles.sigmoid(0.6) <= found.win_rate.high
    assert abs(covered - 90) <= 12


# --- errors ---------------------------------------------------------------------------


def test_a_fit_that_does_not_converge_is_an_error():
    with pytest.raises(
        RuntimeError, match="not converge in 1 steps for 1 of 1 samples"
    ):
        value(SOFT, DIFFERENCES, max_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outcomes": [0.0, 1.5]}, r"`outcomes` must lie in \[0, 1\] .* 1 of 2 do not"),
        ({"outcomes": [0.0, math.nan]}, "`outcomes` must be finite; 1 of 2 are not"),
        ({"length_differences": [1.0]}, "one for each of 2 outcomes; got 1"),
        (
            {"length_differences": [1.0, math.inf]},
            "`length_differences` must be finite; 1 of 2",
        ),
        ({"difficulty": [1.0] * 3}, "`difficulty` needs one for each of 2 .* got 3"),
        ({"difficulty": [math.nan, 1]}, "`difficulty` must be finite; 1 of 2 are not"),
        ({"length_differences": [7, 7]}, "are all 7: what length does cannot be told"),
        ({"penalty": 0.0}, "`penalty` must be positive; got 0.0"),
    ],
)
def test_prompts_that_cannot_be_compared_are_an_error(options, message):
    arguments = {"outcomes": [1.0, 0.0], "length_differences": [3, -2]} | options
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(arguments.pop("outcomes"), **arguments)
    if "outcomes" in options:
        with pytest.raises(ValueError, match=message):
            win_rate(options["outcomes"])
