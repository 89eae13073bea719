"""Process rewards from outcomes, and policies trained on them: OPRL, arXiv:2509.19199.

On a tree that is solved exactly, on arrays, and on a decoder whose episodes stand once
as branches of the task and once as groups of single turns.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fixtures
import tiny_stage
from experiments.worlds import token_mdp
from pref_jax import anchors, losses, rewards
from pref_jax.logps import episode_sum, response_scores, spread_steps
from pref_jax.method import Method, objective
from pref_jax.train.step import weighted_mean
from pref_jax.types import TokenGroup

BETA = 0.5
MDP = token_mdp.make_mdp(0, num_prompts=2, num_tokens=4, max_length=3)
PREFERENCES = token_mdp.preference_probabilities(MDP)

# --- on the exact tree ----------------------------------------------------------------


def fitted_rewards(mdp, step_length, weights=PREFERENCES):
    """Step rewards f64[P, N, T] of a model fitted from a random start."""
    start = token_mdp.make_mdp(5, num_prompts=2, num_tokens=4, max_length=3)
    fit = token_mdp.train_process_reward(
        mdp,
        beta=BETA,
        step_length=step_length,
        weights=weights,
        start=start.anchor_logps,
    )
    logps = fit.logits - np.logaddexp.reduce(fit.logits, axis=-1, keepdims=True)
    return rewards_of(mdp, logps, step_length)


def rewards_of(mdp, logps, step_length):
    with jax.enable_x64(True):
        return np.asarray(
            token_mdp.process_rewards(mdp, logps, beta=BETA, step_length=step_length)
        )


def soft_advantages(mdp, step_length):
    """Q*(s, turn) - V*(s) by its definition: rewards of a turn, V* behind and before.

    f64[P, N, T], in plain loops.
    """
    value = token_mdp.solve(mdp, beta=BETA).value
    num_turns = math.ceil(mdp.tokens.shape[1] / step_length)
    out = np.zeros((*value.shape[:1], len(mdp.tokens), num_turns))
    for p, n, turn in np.ndindex(out.shape):
        places = [
            (mdp.states[n, h], mdp.tokens[n, h])
            for h in range(turn * step_length, (turn + 1) * step_length)
            if h < mdp.tokens.shape[1] and mdp.tokens[n, h] >= 0
        ]
        if places:
            behind = mdp.next_states[places[-1]]
            ended = behind == len(mdp.next_states)
            q = sum(mdp.rewards[p, s, a] for s, a in places)
            q += 0.0 if ended else value[p, behind]
            out[p, n, turn] = q - value[p, places[0][0]]
    return out


@pytest.mark.parametrize("step_length", [1, 2])
@pytest.mark.parametrize("acting", [0, 3])
def test_fitted_process_rewards_are_the_soft_advantages_of_turns(step_length, acting):
    """Test (1). The reference is the policy that acted, whichever that is."""
    policy = token_mdp.make_mdp(acting, num_prompts=2, num_tokens=4, max_length=3)
    mdp = dataclasses.replace(MDP, anchor_logps=policy.anchor_logps)
    found = fitted_rewards(mdp, step_length)
    expected = soft_advantages(mdp, step_length)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    start = token_mdp.solve(mdp, beta=BETA).value[:, :1]
    returns = token_mdp.response_sum(mdp, mdp.rewards) - start
    np.testing.assert_allclose(found.sum(-1), returns, atol=1e-6)
    assert np.abs(expected).max() > 0.5


def test_rewards_of_another_reference_or_of_outcomes_at_random_are_not():
    """Controls of the test above: it can fail."""
    expected = soft_advantages(MDP, 1)
    policy = token_mdp.make_mdp(3, num_prompts=2, num_tokens=4, max_length=3)
    other = dataclasses.replace(MDP, anchor_logps=policy.anchor_logps)
    assert np.abs(fitted_rewards(other, 1) - expected).max() > 0.5
    chance = np.full_like(PREFERENCES, 0.5)
    found = fitted_rewards(MDP, 1, weights=chance)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


# --- on arrays: a group of episodes, the log-ratios of their turns --------------------

SUCCESS = np.array([True, False, True, False, False])
TURNS = np.arange(3) < np.array([3, 1, 2, 3, 2])[:, None]
OUTCOMES = np.where(SUCCESS, 10.0, 0.0).astype(np.float32)


def turn_logps(seed=0):
    return np.random.default_rng(seed).normal(-4, 1, TURNS.shape).astype(np.float32)


def scores(logps, acting_logps):
    """Implicit reward of each episode: the sum over its turns."""
    acting_logps = jax.lax.stop_gradient(acting_logps)
    of_turns = rewards.implicit_reward(logps, anchor_logps=acting_logps, beta=BETA)
    return jnp.where(TURNS, of_turns, 0.0).sum(-1)


def process_reward_loss(logps, acting_logps, success=SUCCESS):
    return losses.outcome_pairs_loss(scores(logps, acting_logps), success=success)[0]


def test_where_the_model_is_the_policy_rewards_are_zero_and_the_loss_is_log_2():
    """Test (2)."""
    logps = turn_logps()
    assert not scores(logps, logps).any()
    value, gradient = jax.value_and_grad(process_reward_loss)(logps, logps)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    assert np.abs(gradient).max() > 0.05


def test_the_gradient_is_the_papers():
    """Test (3): -beta s(-(S+ - S-)) (grad log pi(tau+) - grad log pi(tau-))."""
    logps, acting = turn_logps(1), turn_logps(2)
    total = BETA * np.where(TURNS, logps - acting, 0.0).sum(-1)
    expected = np.zeros(TURNS.shape)
    pairs = [(i, j) for i in (0, 2) for j in (1, 3, 4)]
    for i, j in pairs:
        slope = BETA / (1 + math.exp(total[i] - total[j])) / len(pairs)
        expected[i] -= slope * TURNS[i]
        expected[j] += slope * TURNS[j]
    found = jax.grad(process_reward_loss)(logps, acting)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_the_order_of_episodes_and_eight_devices_change_nothing():
    """Test (5)."""
    rng = np.random.default_rng(3)
    of_groups = rng.normal(size=(16, 5)).astype(np.float32)
    success = rng.random((16, 5)) < 0.5

    def loss_and_slope(scores, success):
        def total(scores):
            loss, _ = losses.outcome_pairs_loss(scores, success=success)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(scores)

    slope, loss = loss_and_slope(of_groups, success)
    order = rng.permuted(np.tile(np.arange(5), (16, 1)), axis=1)
    moved = [np.take_along_axis(x, order, -1) for x in (of_groups, success)]
    moved_slope, moved_loss = loss_and_slope(*moved)
    np.testing.assert_allclose(moved_loss, loss, rtol=1e-6)
    expected = np.take_along_axis(np.asarray(slope), order, -1)
    np.testing.assert_allclose(moved_slope, expected, rtol=1e-5, atol=1e-7)
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((of_groups, success), rows)
    on_eight = jax.jit(loss_and_slope)(*spread)
    for found, one in zip(on_eight, (slope, loss), strict=True):
        assert len(found.sharding.device_set) == 8
        np.testing.assert_allclose(found, one, rtol=1e-6, atol=1e-7)


RULES = {
    "RLOO": losses.leave_one_out_advantages,
    "GRPO": losses.group_advantages,
    "Dr. GRPO": losses.centered_advantages,
}


def policy_loss(log_ratios, outcomes, of_turns, *, rule, alpha):
    """Turn-level surrogate on outcomes and process rewards, both by one rule."""
    of_episodes = rule(outcomes)
    of_steps = rule(of_turns.reshape(-1), where=TURNS.reshape(-1)).reshape(TURNS.shape)
    advantages = losses.combined_advantages(
        of_episodes, step_advantages=of_steps, alpha=alpha, where=TURNS
    )
    loss, _ = losses.clipped_surrogate_loss(
        log_ratios, advantages=advantages, clip_low=0.2, clip_high=0.2, where=TURNS
    )
    return loss.sum() / TURNS.sum()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_alpha_of_zero_is_the_vanilla_arm_bit_for_bit(rule):
    """Test (7), through the advantages, the loss and its gradient."""

    def vanilla(log_ratios):
        advantages = jnp.broadcast_to(rule(OUTCOMES)[:, None], TURNS.shape)
        loss, _ = losses.clipped_surrogate_loss(
            log_ratios, advantages=advantages, clip_low=0.2, clip_high=0.2, where=TURNS
        )
        return loss.sum() / TURNS.sum()

    def oprl(log_ratios, alpha):
        of_turns = jnp.asarray(turn_logps(4))
        return policy_loss(log_ratios, OUTCOMES, of_turns, rule=rule, alpha=alpha)

    log_ratios = 0.1 * (turn_logps(5) + 4)
    expected = jax.jit(jax.value_and_grad(vanilla))(log_ratios)
    found = jax.jit(jax.value_and_grad(functools.partial(oprl, alpha=0.0)))(log_ratios)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert oprl(log_ratios, alpha=1.0) != expected[0]


@pytest.mark.parametrize("outcome", [True, False])
def test_a_group_without_both_outcomes_teaches_nothing(outcome):
    """Test (8): zero gradient, no NaN; and equal outcomes give advantages of zero."""
    logps, acting = turn_logps(1), turn_logps(2)
    success = np.full(5, outcome)
    gradient = jax.grad(process_reward_loss)(logps, acting, success=success)
    np.testing.assert_array_equal(gradient, 0.0)
    for rule in RULES.values():
        np.testing.assert_array_equal(rule(np.full(5, 10.0 * outcome)), 0.0)
    same = losses.step_advantages(np.full(TURNS.shape, 0.3), where=TURNS)
    np.testing.assert_array_equal(same, 0.0)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_gradient_crosses_between_the_process_reward_and_the_policy(rule):
    """Test (9), on logps as parameters."""
    phi, theta = turn_logps(6), turn_logps(7)
    to_phi, to_theta = jax.grad(process_reward_loss, argnums=(0, 1))(phi, theta)
    assert to_phi.any() and not to_theta.any()

    def of_policy(phi, theta):
        acting = jax.lax.stop_gradient(theta)
        of_turns = rewards.implicit_reward(phi, anchor_logps=acting, beta=BETA)
        return policy_loss(theta - acting, OUTCOMES, of_turns, rule=rule, alpha=1.0)

    to_phi, to_theta = jax.grad(of_policy, argnums=(0, 1))(phi, theta)
    assert to_theta.any() and not to_phi.any()


# --- on a decoder ---------------------------------------------------------------------

quick_compiles = pytest.fixture(tiny_stage.quick_compiles)

NUM_TASKS, NUM_EPISODES = 2, 3
REWARD = functools.partial(rewards.sequence_reward, beta=BETA)


def pairs_of_outcomes(scores, success, where=None):
    return losses.outcome_pairs_loss(scores, success=success, where=where)


def loss_of_episodes(values, scores, batch):
    """All episodes of a task are the responses of one group; labels are outcomes."""
    del scores
    loss, metrics = pairs_of_outcomes(values, batch.labels > 0, batch.valid)
    weight = batch.valid.any(-1).astype(jnp.float32)
    return loss, {name: (value, weight) for name, value in metrics.items()}


def loss_of_turns(values, scores, batch):
    """Every turn is a group of its own, with its episode's coefficient."""
    del scores
    coefficients = batch.extras["coefficient"]
    loss, _ = losses.coefficient_loss(
        values, coefficients=coefficients, where=batch.valid
    )
    return loss[:, 0], {}


ONE_PASS = Method(
    name="process-reward",
    anchor=anchors.fixed(),
    reward=REWARD,
    loss=loss_of_episodes,
    weight=lambda batch: batch.valid.any(-1).astype(jnp.float32),
)
TWO_PASSES = Method(
    name="process-reward-of-turns",
    anchor=anchors.fixed(),
    reward=REWARD,
    loss=loss_of_turns,
    requires=frozenset({"coefficient"}),
    couples_responses=False,
)


@functools.cache
def episodes():
    """Groups of whole episodes, and the same episodes as groups of single turns.

    An episode: action, observation, action, ... Actions are ours, the rest is masked.
    """
    rng = np.random.default_rng(8)

    def ids(low, high):
        return rng.integers(0, fixtures.CONFIG.vocab_size, rng.integers(low, high))

    whole, turns = [], []
    for task in range(NUM_TASKS):
        prompt = ids(2, 6).astype(np.int32)
        responses, step_ids = [], []
        for n in range(NUM_EPISODES):
            tokens, steps = [], []
            for turn in range(rng.integers(1, 4)):
                if turn:
                    observation = ids(1, 4)
                    tokens.extend(observation)
                    steps.extend([0] * len(observation))
                action = ids(1, 4).astype(np.int32)
                turns.append(
                    TokenGroup(
                        np.concatenate([prompt, tokens]).astype(np.int32),
                        (action,),
                        (np.ones(len(action), bool),),
                        (1.0,),
                        record=len(turns),
                        step_ids=(np.full(len(action), 1, np.int32),),
                        extras={"episode": task * NUM_EPISODES + n},
                    )
                )
                tokens.extend(action)
                steps.extend([turn + 1] * len(action))
            responses.append(np.array(tokens, np.int32))
            step_ids.append(np.array(steps, np.int32))
        masks = tuple(steps > 0 for steps in step_ids)
        success = tuple(float(n % 2 == task) for n in range(NUM_EPISODES))
        group = TokenGroup(prompt, tuple(responses), masks, success, task)
        whole.append(dataclasses.replace(group, step_ids=tuple(step_ids)))
    return whole, turns


@functools.cache
def gradient_of(method):
    """(params, anchor params, batch) -> ((sum of losses, sum of weights), gradients)"""

    def total(params, anchor_params, batch):
        arguments = (method, fixtures.decoder(), params, anchor_params, batch)
        loss, weight, _ = objective(*arguments)
        return weighted_mean(loss, weight), weight.sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def params_of_both():
    """A process reward model and the policy that acted."""
    acting = fixtures.random_params(1)
    other = fixtures.random_params(2)
    return jax.tree.map(lambda x, y: x + 0.1 * y, acting, other), acting


@pytest.mark.slow  # on a decoder; arrays alone do the same in a moment
@pytest.mark.usefixtures("quick_compiles")
def test_the_gradient_in_two_passes_over_turns_is_that_of_whole_episodes():
    """First pass: scores without gradient. Second: turns, each with a coefficient."""
    (whole, turns), params = episodes(), params_of_both()
    (expected, _), (to_phi, to_theta) = gradient_of(ONE_PASS)(
        *params, fixtures.pack_all(whole, 64)
    )
    assert not any(x.any() for x in jax.tree.leaves(to_theta))  # test (9)
    score = jax.jit(functools.partial(response_scores, fixtures.decoder()))
    batch = fixtures.pack_all(turns, 64)
    of_turns = REWARD(*(score(p, batch) for p in params), batch)[:, 0]
    of_episodes = episode_sum(
        of_turns,
        episode_ids=batch.extras["episode"].astype(int),
        num_episodes=NUM_TASKS * NUM_EPISODES,
        where=batch.valid[:, 0],
    ).reshape(NUM_TASKS, NUM_EPISODES)
    success = np.array([group.labels for group in whole]) > 0
    coefficients, loss, _ = losses.score_coefficients(
        of_episodes,
        loss_fn=functools.partial(pairs_of_outcomes, success=success),
    )
    assert float(loss.mean()) == pytest.approx(float(expected), rel=1e-5)
    marked = [
        dataclasses.replace(
            turn,
            extras={
                "coefficient": [float(coefficients.ravel()[turn.extras["episode"]])]
            },
        )
        for turn in turns
    ]
    second = fixtures.pack_all(marked, 64)
    (_, weight), (found, _) = gradient_of(TWO_PASSES)(*params, second)
    # The step divides by its weights, the mean over tasks by their number.
    found = jax.tree.map(lambda x: x * weight / NUM_TASKS, found)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(to_phi))
    assert largest > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5 * largest),
        found,
        to_phi,
    )


def test_an_observation_is_read_and_never_trained():
    """Test (4): its own logp stands in no sum. What follows has read it."""
    whole, _ = episodes()
    batch = fixtures.pack_all(whole, 64)
    phi, acting = params_of_both()
    scores = fixtures.scorer()(phi, batch)
    anchor_scores = fixtures.scorer()(acting, batch)
    spoiled = jnp.where(batch.loss_mask, scores.logp, 1e6)
    other = dataclasses.replace(scores, logp=spoiled)
    for reward in (
        REWARD,
        functools.partial(rewards.token_reward, beta=BETA),
    ):
        found = reward(other, anchor_scores, batch)
        expected = reward(scores, anchor_scores, batch)
        np.testing.assert_array_equal(found, expected)
    of_tokens = rewards.token_reward(scores, anchor_scores, batch, beta=BETA)
    of_steps = rewards.step_rewards(
        of_tokens, step_ids=batch.step_ids, num_steps=3, where=batch.loss_mask
    )
    sums = REWARD(scores, anchor_scores, batch)
    np.testing.assert_allclose(of_steps.sum(-1), sums, rtol=1e-5, atol=1e-6)
    advantages = spread_steps(of_steps, step_ids=batch.step_ids, where=batch.loss_mask)
    assert not advantages[~batch.loss_mask].any()
    assert batch.length.sum() > batch.loss_mask.sum()
