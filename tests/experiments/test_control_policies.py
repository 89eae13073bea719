"""Policies of control: their densities, their divergence, and a teacher that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.worlds.control import ActingPolicy, TeacherConfig, play, train_teacher
from pref_jax.envs import control

DISCRETE = ActingPolicy(observation_size=3, num_actions=4, action_size=None, hidden=8)
CONTINUOUS = ActingPolicy(observation_size=3, num_actions=None, action_size=2, hidden=8)


def make(policy, seed):
    params = policy.init(jax.random.key(seed))
    last = params["act"][-1]
    last["matrix"] = 300 * last["matrix"]  # larger than a start, so that it differs
    if "log_deviation" in params:
        params["log_deviation"] = jnp.array([-0.3, 0.2]) * (seed + 1)
    return params


def observations(num=5):
    return jax.random.normal(jax.random.key(9), (num, 3))


def test_logps_of_all_actions_are_a_distribution():
    params, seen = make(DISCRETE, 0), observations()
    items = jnp.broadcast_to(jnp.eye(4)[None], (5, 4, 4))
    logps = DISCRETE.logps(params, seen, items)
    np.testing.assert_allclose(jnp.exp(logps).sum(-1), 1.0, rtol=1e-6)
    expected = jax.nn.log_softmax(DISCRETE.outputs(params, seen))
    np.testing.assert_allclose(logps, expected, rtol=1e-6)


def test_log_densities_are_those_of_the_normal_distribution():
    params, seen = make(CONTINUOUS, 0), observations()
    items = jax.random.normal(jax.random.key(1), (5, 6, 2))
    found = CONTINUOUS.logps(params, seen, items)
    means = np.float64(CONTINUOUS.outputs(params, seen))
    deviations = np.exp(np.float64(params["log_deviation"]))
    for b in range(5):
        for k in range(6):
            z = (np.float64(items[b, k]) - means[b]) / deviations
            expected = (-0.5 * z**2 - np.log(deviations * np.sqrt(2 * np.pi))).sum()
            assert float(found[b, k]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("policy", [DISCRETE, CONTINUOUS], ids=["discrete", "normal"])
def test_a_divergence_is_the_mean_log_ratio_of_what_is_drawn(policy):
    params, other, seen = make(policy, 0), make(policy, 1), observations(3)
    keys = jax.random.split(jax.random.key(2), 40_000)
    draw = jax.vmap(policy.act, in_axes=(None, None, 0))
    for b in range(3):
        drawn = draw(params, seen[b], keys)
        items = drawn if policy is CONTINUOUS else jax.nn.one_hot(drawn, 4)
        ours, theirs = (
            policy.logps(p, seen[b : b + 1], items[None])[0] for p in (params, other)
        )
        found = policy.divergence(params, other, seen[b : b + 1])[0]
        assert float(found) == pytest.approx(float((ours - theirs).mean()), rel=0.04)
    np.testing.assert_allclose(policy.divergence(params, params, seen), 0, atol=1e-6)


def test_the_likeliest_action_is_the_mode():
    params, seen = make(DISCRETE, 0), observations()
    for row in seen:
        best = int(DISCRETE.act_best(params, row, None))
        assert best == int(DISCRETE.outputs(params, row).argmax())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_task", "config", "least"),
    [
        (control.cartpole, TeacherConfig(num_updates=30), 150.0),
        (
            control.pendulum,
            TeacherConfig(
                num_updates=100, num_episodes=64, discount=0.95, reward_scale=0.1
            ),
            -900.0,
        ),
    ],
    ids=["CartPole", "Pendulum"],
)
def test_a_teacher_learns_its_task(make_task, config, least):
    task = make_task()
    policy = ActingPolicy.of(task, 64)
    params, returns = train_teacher(task, policy, config, jax.random.key(0))
    first, last = float(returns[0]), float(returns[-5:].mean())
    assert last > least > first
    best = play(task, policy, params, jax.random.key(1), 32, True).returns.mean()
    assert float(best) > least
