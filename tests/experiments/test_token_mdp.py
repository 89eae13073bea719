"""The token MDP: its solution by enumeration, and what training on it can tell."""

import dataclasses
import itertools
import math
import sys

import jax
import numpy as np
import pytest

from experiments.worlds import token_mdp
from experiments.worlds.token_mdp import (
    END,
    decomposed_regret,
    delay_rewards,
    evaluate,
    make_mdp,
    preference_probabilities,
    prefix_sum,
    recover,
    response_sum,
    shape_rewards,
    solve,
    train_dpo,
    train_sft,
)
from pref_jax import q_values

BETA = 0.5
SIZES = {"num_prompts": 2, "num_tokens": 4, "max_length": 3}
MDP = make_mdp(0, **SIZES)
# Continuations after the tokens so far, level by level: the numbering of the states.
PREFIXES = [
    prefix for h in range(3) for prefix in itertools.product((1, 2, 3), repeat=h)
]
STATE = {prefix: s for s, prefix in enumerate(PREFIXES)}


def completions(prefix):
    """All that may follow, as whole responses: cut at the first END or at 3 tokens."""
    strings = itertools.product(range(4), repeat=3 - len(prefix))
    cut = {
        string[: string.index(END) + 1] if END in string else string
        for string in strings
    }
    return sorted(prefix + string for string in cut)


def along(values, response, *, after=0):
    """Sum of f64[S, V] over the tokens of a response, in plain loops."""
    return sum(
        float(values[STATE[response[:t]], response[t]])
        for t in range(after, len(response))
    )


def random_policy(seed):
    return make_mdp(seed, **SIZES).anchor_logps


def responses_of(mdp):
    return [tuple(int(t) for t in row if t >= 0) for row in mdp.tokens]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def apart(a, b):
    return np.abs(a - b).max()


@pytest.fixture(scope="module")
def best():
    return solve(MDP, beta=BETA)


@pytest.fixture(scope="module")
def dpo():
    pairs = preference_probabilities(MDP)
    return train_dpo(MDP, beta=BETA, weights=pairs, start=MDP.anchor_logps)


@pytest.fixture(scope="module")
def rows():
    return recover(MDP, beta=BETA, seed=0)


def test_the_responses_are_all_strings_that_end_or_are_full():
    responses = responses_of(MDP)
    assert sorted(responses) == completions(())
    assert len(responses) == 1 + 3 + 9 + 27  # ends after 0, 1, 2 tokens; full
    for row, response in zip(MDP.states, responses, strict=True):
        walked = [STATE[response[:t]] for t in range(len(response))]
        assert row[: len(response)].tolist() == walked


def test_the_reference_is_a_distribution_over_the_responses():
    total = np.exp(response_sum(MDP, MDP.anchor_logps)).sum(-1)
    assert total == pytest.approx(1, rel=1e-13)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dynamic_programming_agrees_with_enumeration(beta):
    found = solve(MDP, beta=beta)
    for p, (anchor, rewards) in enumerate(
        zip(MDP.anchor_logps, MDP.rewards, strict=True)
    ):
        for prefix in PREFIXES:
            partition = math.fsum(
                math.exp(
                    along(anchor, response, after=len(prefix))
                    + along(rewards, response, after=len(prefix)) / beta
                )
                for response in completions(prefix)
            )
            value = found.value[p, STATE[prefix]]
            assert value == pytest.approx(beta * math.log(partition), abs=1e-12)
        for response in completions(()):  # pi* = pi_ref exp(r / beta) / Z
            logp = along(anchor, response) + along(rewards, response) / beta
            logp -= found.value[p, 0] / beta
            assert along(found.logps[p], response) == pytest.approx(logp, abs=1e-12)


def test_the_advantages_of_a_response_telescope(best):
    advantages = best.q - best.value[..., None]
    rewards = response_sum(MDP, MDP.rewards)
    total = response_sum(MDP, advantages)
    assert apart(total, rewards - best.value[:, :1]) < 1e-12
    log_ratios = response_sum(MDP, best.logps - MDP.anchor_logps)
    assert apart(BETA * log_ratios, total) < 1e-12


def test_the_sum_before_a_state_is_that_of_the_tokens_that_lead_to_it():
    sums = prefix_sum(MDP, MDP.rewards)
    for p, prefix in itertools.product(range(2), PREFIXES):
        expected = along(MDP.rewards[p], prefix)
        assert sums[p, STATE[prefix]] == pytest.approx(expected, abs=1e-13)


def test_an_evaluation_is_a_sum_over_all_responses(best):
    policy = random_policy(1)
    found = evaluate(MDP, policy, beta=BETA)
    for p in range(2):
        reward = kl = 0.0
        for response in completions(()):
            logp = along(policy[p], response)
            reward += math.exp(logp) * along(MDP.rewards[p], response)
            kl += math.exp(logp) * (logp - along(MDP.anchor_logps[p], response))
        assert found.reward[p] == pytest.approx(reward, abs=1e-12)
        assert found.kl[p] == pytest.approx(kl, abs=1e-12)
        assert found.objective[p] == pytest.approx(reward - BETA * kl, abs=1e-12)


def test_the_objective_of_the_optimum_is_its_value_and_no_policy_has_more(best):
    found = evaluate(MDP, best.logps, beta=BETA)
    assert apart(found.objective, best.value[:, 0]) < 1e-12
    assert np.abs(found.regret).max() < 1e-12
    for seed in range(1, 50):
        assert evaluate(MDP, random_policy(seed), beta=BETA).regret.min() > 0.01
    nearby = log_softmax(best.logps + 1e-3 * random_policy(1))
    assert 0 < evaluate(MDP, nearby, beta=BETA).regret.max() < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_the_regret_is_that_of_xpo_for_any_distribution_nu(seed):
    policy = random_policy(seed + 1)
    regret = evaluate(MDP, policy, beta=BETA).regret
    rng = np.random.default_rng(seed)
    one_response = np.eye(len(MDP.tokens))[rng.integers(len(MDP.tokens), size=2)]
    for nu in (rng.dirichlet(np.full(len(MDP.tokens), 0.3), size=2), one_response):
        found = decomposed_regret(MDP, policy, probabilities=nu, beta=BETA)
        assert apart(found, regret) < 1e-12
    # Not by luck: it asks of nu that it is a distribution.
    found = decomposed_regret(MDP, policy, probabilities=2 * nu, beta=BETA)
    assert apart(found, regret) > 1e-3


def test_a_potential_moves_q_and_v_but_neither_the_policy_nor_preferences(best):
    potential = np.random.default_rng(1).normal(size=best.value.shape)
    other = shape_rewards(MDP, potential)
    found = solve(other, beta=BETA)
    assert apart(found.logps, best.logps) < 1e-12
    assert apart(found.q, best.q - potential[..., None]) < 1e-12
    assert apart(found.value, best.value - potential) < 1e-12
    pairs = preference_probabilities(MDP)
    assert apart(preference_probabilities(other), pairs) < 1e-12


def test_delayed_rewards_come_with_the_last_token_alone():
    delayed = delay_rewards(MDP)
    for p in range(2):
        for response in completions(()):
            steps = [STATE[response[:t]] for t in range(len(response))]
            rewards = delayed.rewards[p, steps, response]
            assert np.abs(rewards[:-1]).max(initial=0) < 1e-12
            expected = along(MDP.rewards[p], response)
            assert rewards[-1] == pytest.approx(expected, abs=1e-12)


def test_preferences_are_bradley_terry():
    pairs = preference_probabilities(MDP)
    rewards = [along(MDP.rewards[1], response) for response in responses_of(MDP)]
    for i, j in ((0, 0), (3, 30), (30, 3), (7, 20)):
        expected = 1 / (1 + math.exp(rewards[j] - rewards[i]))
        assert pairs[1, i, j] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_on_all_pairs_ends_at_the_optimum(beta):
    pairs = preference_probabilities(MDP)
    start = random_policy(9)  # not the reference
    fit = train_dpo(MDP, beta=beta, weights=pairs, start=start)
    assert fit.gradient_norm < 1e-11
    logps, best = log_softmax(fit.logits), solve(MDP, beta=beta)
    assert apart(logps, best.logps) < 1e-6
    rewards = beta * response_sum(MDP, logps - MDP.anchor_logps)
    expected = response_sum(MDP, MDP.rewards) - best.value[:, :1]
    assert apart(rewards, expected) < 1e-6
    assert evaluate(MDP, logps, beta=beta).regret.max() < 1e-10


def test_the_shift_of_a_state_survives_training_and_is_all_that_v_shows(dpo):
    shift = np.random.default_rng(3).normal(size=MDP.rewards.shape[:2])
    pairs = preference_probabilities(MDP)
    start = MDP.anchor_logps + shift[..., None]
    shifted = train_dpo(MDP, beta=BETA, weights=pairs, start=start)
    assert apart(log_softmax(shifted.logits), log_softmax(dpo.logits)) < 1e-8
    assert apart(shifted.logits.mean(-1), start.mean(-1)) < 1e-10
    v, shifted_v = (BETA * np.log(np.exp(fit.logits).sum(-1)) for fit in (dpo, shifted))
    assert apart(shifted_v - v, BETA * shift) < 1e-8


def test_one_known_reward_a_prompt_fixes_v_where_all_reward_comes_at_the_end(dpo):
    advantages = BETA * (log_softmax(dpo.logits) - MDP.anchor_logps)
    known = response_sum(MDP, MDP.rewards)[:, 0]  # of the first response alone
    first = known - response_sum(MDP, advantages)[:, 0]  # V*(s_1)
    found = first[:, None] + prefix_sum(MDP, advantages)
    assert apart(found, solve(delay_rewards(MDP), beta=BETA).value) < 1e-6
    assert apart(found, solve(MDP, beta=BETA).value) > 0.1  # reward at each token


def test_flipped_labels_lead_to_the_optimum_of_minus_the_reward(best):
    flipped = preference_probabilities(MDP).swapaxes(1, 2)
    fit = train_dpo(MDP, beta=BETA, weights=flipped, start=MDP.anchor_logps)
    negated = dataclasses.replace(MDP, rewards=-MDP.rewards)
    worst = solve(negated, beta=BETA).logps
    assert apart(log_softmax(fit.logits), worst) < 1e-6
    assert apart(log_softmax(fit.logits), best.logps) > 1


def test_hard_labels_overshoot_the_optimum(best):
    rewards = response_sum(MDP, MDP.rewards)
    hard = (rewards[:, :, None] > rewards[:, None, :]).astype(float)
    fit = train_dpo(MDP, beta=BETA, weights=hard, start=MDP.anchor_logps)
    logps = log_softmax(fit.logits)
    found = BETA * response_sum(MDP, logps - MDP.anchor_logps)
    assert np.ptp(found, axis=-1).min() > 3 * np.ptp(rewards, axis=-1).max()
    assert evaluate(MDP, logps, beta=BETA).regret.max() > 0.1


def test_responses_without_a_pair_leave_the_policy_to_its_start(best):
    covered = np.arange(len(MDP.tokens)) % 2 == 0
    pairs = preference_probabilities(MDP) * (covered[:, None] & covered)
    fits = [
        train_dpo(MDP, beta=BETA, weights=pairs, start=start)
        for start in (MDP.anchor_logps, random_policy(9))
    ]
    logps = [log_softmax(fit.logits) for fit in fits]
    assert apart(*logps) > 0.1
    for policy in logps:
        found = BETA * response_sum(MDP, policy - MDP.anchor_logps)
        error = found - response_sum(MDP, MDP.rewards) + best.value[:, :1]
        # Right among the covered up to one number a prompt, which is not zero.
        assert np.ptp(error[:, covered], axis=-1).max() < 1e-6
        assert np.abs(error[:, covered]).min() > 0.01


def test_sft_on_samples_of_the_optimum_gives_its_policy_but_not_its_value(best):
    samples = np.exp(response_sum(MDP, best.logps))
    fit = train_sft(MDP, weights=samples, start=MDP.anchor_logps)
    assert apart(log_softmax(fit.logits), best.logps) < 1e-3
    assert apart(BETA * np.log(np.exp(fit.logits).sum(-1)), best.value) > 0.1


def test_sft_on_counts_gives_their_shares_at_each_state():
    counts = np.random.default_rng(0).integers(1, 9, size=(2, len(MDP.tokens)))
    fit = train_sft(MDP, weights=counts.astype(float), start=MDP.anchor_logps)
    policy = np.exp(log_softmax(fit.logits))
    for p, prefix in itertools.product(range(2), PREFIXES):
        visits = np.zeros(4)
        for response, count in zip(responses_of(MDP), counts[p], strict=True):
            if len(response) > len(prefix) and response[: len(prefix)] == prefix:
                visits[response[len(prefix)]] += count
        expected = visits / visits.sum()
        assert policy[p, STATE[prefix]] == pytest.approx(expected, abs=1e-6)


def test_training_recovers_what_worlds_of_the_same_preferences_share(rows):
    for row in rows:
        errors = np.array([row.dpo_error, row.sft_error])
        if row.identified:
            assert row.worlds_apart < 1e-12, row
            assert errors.max() < 1e-3, row
            assert row.runs_apart < 1e-6, row
        else:
            assert min(row.worlds_apart, *errors) > 0.1, row
    assert max(row.dpo_error for row in rows if row.identified) < 1e-6


def test_what_is_identified_is_the_advantage_and_its_sums(rows):
    assert {row.quantity: row.identified for row in rows} == {
        "pi*(a|s)": True,
        "Q*(s, a) - V*(s)": True,
        "r(y) - V*(s_1)": True,
        "r(y) - r(y'), same prompt": True,
        "V*(s) - V*(s_1), reward at the end": True,
        "V*(s) - V*(s_1), reward at each token": False,
        "r(y) - r(y'), two prompts": False,
        "V*(s)": False,
        "Q*(s, a)": False,
        "r(s, a)": False,
    }


def test_runs_that_agree_may_agree_on_what_is_wrong(rows):
    apart = {row.quantity: row.runs_apart for row in rows if not row.identified}
    # Read off the policy: no run differs, and the truth is still another.
    assert apart["V*(s) - V*(s_1), reward at each token"] < 1e-6
    assert apart["r(y) - r(y'), two prompts"] < 1e-6
    # Read off the logits: the start shows.
    assert min(apart[name] for name in ("V*(s)", "Q*(s, a)", "r(s, a)")) > 0.1


@pytest.mark.slow
def test_the_command_prints_the_table(monkeypatch, capsys):
    command = "token_mdp --max-length 1 --num-tokens 3 --beta 1"
    monkeypatch.setattr(sys, "argv", command.split())
    token_mdp.main()
    printed = capsys.readouterr().out
    assert "2 prompts with 3 responses each; beta 1" in printed
    assert all(word in printed for word in ("V*(s)", "yes", "no"))


def along_responses(values):
    """f64[P, S, V] or f64[P, S] along responses, f64[P, N, H], and which count."""
    where = np.broadcast_to(MDP.tokens >= 0, (len(MDP.rewards), *MDP.tokens.shape))
    if values.ndim == 2:
        values = np.repeat(values[..., None], MDP.rewards.shape[-1], axis=-1)
    return np.where(where, values[:, MDP.states, MDP.tokens], np.nan), where


def test_the_rewards_that_the_optimum_implies_are_those_of_the_world(best):
    """Of every token, by the library, in float64; a NaN where no token is."""
    logps, where = along_responses(best.logps)
    anchor_logps, _ = along_responses(MDP.anchor_logps)
    values, _ = along_responses(best.value)
    with jax.enable_x64(True):
        rewards = q_values.token_rewards(
            logps, anchor_logps=anchor_logps, values=values, beta=BETA, where=where
        )
    expected, _ = along_responses(MDP.rewards)
    np.testing.assert_allclose(rewards, np.where(where, expected, 0.0), atol=1e-12)


def test_logits_that_are_q_have_no_bellman_residual(best):
    """With beta log pi_ref in Q, as in the library, V is the log-sum-exp of Q."""
    q = best.q + BETA * MDP.anchor_logps
    with jax.enable_x64(True):
        read = q_values.logit_values(q / BETA, beta=BETA)
        np.testing.assert_allclose(read.value, best.value, atol=1e-12)
        np.testing.assert_allclose(read.advantage, BETA * best.logps, atol=1e-12)
        arrays = [
            along_responses(np.asarray(x))[0]
            for x in (read.q, MDP.rewards, MDP.anchor_logps, read.value)
        ]
        where = along_responses(best.value)[1]
        residuals = [
            q_values.soft_bellman_residual(
                arrays[0],
                rewards=arrays[1],
                anchor_logps=arrays[2],
                values=values,
                beta=BETA,
                where=where,
            )
            for values in (arrays[3], arrays[3] + 1)
        ]
    np.testing.assert_allclose(residuals[0], 0.0, atol=1e-12)
    # Values that are 1 too high: 1 less for every token that another one follows.
    followed = where & np.pad(where, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    np.testing.assert_allclose(residuals[1], -1.0 * followed, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_mdp(0, **SIZES | {"num_tokens": 1}), "`num_tokens` must be at"),
        (lambda: make_mdp(0, **SIZES | {"max_length": 0}), "at least 1; got 0"),
        (lambda: solve(MDP, beta=0.0), "`beta` must be positive; got 0"),
        (
            lambda: recover(make_mdp(0, **SIZES | {"num_prompts": 1}), beta=1, seed=0),
            "`mdp` must have two prompts",
        ),
        (
            lambda: train_sft(MDP, weights=np.ones(40), start=MDP.anchor_logps),
            "`weights` needs the shape of `the responses`",
        ),
        (
            lambda: train_dpo(
                MDP, beta=1, weights=np.ones((2, 40)), start=MDP.anchor_logps
            ),
            "`weights` needs the shape of `the pairs`",
        ),
        (
            lambda: train_sft(MDP, weights=np.ones((2, 40)), start=np.zeros((13, 4))),
            "`start` needs the shape of `mdp.rewards`",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
