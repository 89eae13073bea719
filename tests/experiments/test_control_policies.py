"""Policies of control: their densities, their divergence, and a teacher that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.worlds import control as policies
from experiments.worlds.control import ActingPolicy, TeacherConfig, play, train_teacher
from pref_jax.envs import control, mujoco

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


def test_a_normaliser_is_as_if_observations_were_standardised_before():
    mean, deviation = jnp.array([1.0, -2.0, 0.5]), jnp.array([2.0, 0.5, 1.0])
    plain, seen = make(CONTINUOUS, 0), observations()
    params = plain | {"normaliser": {"mean": mean, "deviation": deviation}}
    before = (seen - mean[None]) / deviation[None]
    for function in (CONTINUOUS.outputs, CONTINUOUS.value):
        np.testing.assert_allclose(
            function(params, seen), function(plain, before), rtol=1e-5, atol=1e-6
        )
    far = CONTINUOUS.outputs(params, seen + 1e6)
    np.testing.assert_allclose(far, CONTINUOUS.outputs(plain, jnp.full((5, 3), 10.0)))
    slopes = jax.grad(lambda p: CONTINUOUS.value(p, seen).sum())(params)
    assert not any(x.any() for x in slopes["normaliser"].values())


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e3, 0.1, (n, 2)) * [1, 50] for n in (3, 1, 40)]
    seen = policies._Moments(2)
    np.testing.assert_array_equal(seen.normaliser()["deviation"], [1, 1])
    for part in parts:
        seen.add(part)
    whole, found = np.concatenate(parts), seen.normaliser()
    np.testing.assert_allclose(found["mean"], whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["deviation"], whole.std(0), rtol=1e-4)


def test_every_step_is_seen_once_an_epoch_and_ends_are_shared_out():
    alive = np.zeros(40, bool)
    alive[::3] = True  # 14 of them
    order = policies._minibatches(jax.random.key(0), jnp.array(alive), 3, 4)
    assert order.shape == (12, 10)
    for epoch in np.asarray(order).reshape(3, 40):
        assert sorted(epoch) == list(range(40))
    counts = alive[np.asarray(order)].sum(1)
    assert set(counts.tolist()) == {3, 4}
    assert (np.asarray(order)[:4] != np.asarray(order)[4:8]).any()
    # What fills no minibatch is what counts for nothing.
    kept = np.asarray(policies._minibatches(jax.random.key(0), jnp.array(alive), 1, 7))
    assert kept.shape == (7, 5) and alive[kept].sum() == 14


class Line:
    """A point on a line that starts far from 50, and pays for being far from it."""

    horizon, size = 10, 1

    def reset(self, seed):
        self.place = 40.0
        return np.array([self.place]), {}

    def step(self, action):
        self.place += float(action[0])
        return np.array([self.place]), -abs(self.place - 50) / 10, False, False, {}


@pytest.mark.slow
def test_a_teacher_of_a_simulated_task_learns_and_stops_in_time(monkeypatch):
    low, high = np.float32([-2.0]), np.float32([2.0])
    Line.action_space = type("Box", (), {"low": low, "high": high})
    environments = {}
    monkeypatch.setattr(
        mujoco,
        "_environment",
        lambda _, number: environments.setdefault(number, Line()),
    )
    task = mujoco.Simulator("Line", 1, 1, horizon=10)
    policy = ActingPolicy.of(task, 8)
    config = TeacherConfig(
        num_updates=100,
        num_episodes=8,
        num_minibatches=2,
        learning_rate=1e-2,
        discount=0.9,
        max_steps=30 * 80,
    )
    params, returns = train_teacher(task, policy, config, jax.random.key(0))
    assert len(returns) == 30 and len(environments) == 8
    assert float(returns[-5:].mean()) > float(returns[:3].mean()) + 2
    assert 40 < float(params["normaliser"]["mean"][0]) < 50
    played = play(task, policy, params, jax.random.key(1), 4, True)
    assert float(played.returns.mean()) > float(returns[:3].mean()) + 2


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
