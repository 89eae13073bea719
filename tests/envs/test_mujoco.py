"""Simulated tasks: episodes are Gymnasium's own, and a task that is none is refused."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.envs import mujoco


class Line:
    """A point on a line that pays for being far from 1; left of -2 it is over."""

    observation_space = types.SimpleNamespace(shape=(1,))
    action_space = types.SimpleNamespace(
        shape=(1,), low=np.float32([-0.5]), high=np.float32([0.5])
    )
    spec = types.SimpleNamespace(max_episode_steps=12)

    def reset(self, seed):
        self.place = np.random.default_rng(seed).uniform(-0.1, 0.1)
        self.steps = []
        return np.array([self.place]), {}

    def step(self, action):
        assert self.place >= -2, "stepped after the end"
        self.steps.append(float(action[0]))
        self.place += float(action[0])
        return np.array([self.place]), -abs(self.place - 1), self.place < -2, False, {}


@pytest.fixture
def lines(monkeypatch):
    """Environments of the task "Line" by their numbers."""
    made = {}
    monkeypatch.setattr(
        mujoco, "_environment", lambda name, number: made.setdefault(number, Line())
    )
    return made


def steady(params, observation, key):
    del observation, key
    return params


def test_actions_are_cut_before_they_are_simulated_and_kept_as_they_were(lines):
    task = mujoco.simulator("Line")
    assert (task.observation_size, task.action_size, task.horizon) == (1, 1, 12)
    episodes = mujoco.rollout(task, steady, jnp.array([3.0]), jax.random.key(0), 2)
    assert lines[0].steps == [0.5] * 12
    np.testing.assert_array_equal(episodes.actions, np.full((2, 12, 1), 3.0))
    places = lines[1].place - 0.5 * np.arange(12, 0, -1)
    np.testing.assert_allclose(episodes.observations[1, :, 0], places, rtol=1e-6)
    np.testing.assert_allclose(
        episodes.rewards[1], -np.abs(places + 0.5 - 1), rtol=1e-5
    )
    assert episodes.alive.all() and not episodes.over.any()


def test_nothing_counts_after_the_end_of_a_simulated_episode(lines):
    task = mujoco.simulator("Line")
    episodes = mujoco.rollout(task, steady, jnp.array([-0.5]), jax.random.key(0), 4)
    lengths = episodes.alive.sum(1)
    assert set(lengths.tolist()) <= {4, 5} and len(lines) == 4
    assert (episodes.over.sum(1) == 1).all()
    np.testing.assert_array_equal(episodes.over.argmax(1), lengths - 1)
    for length, rewards in zip(lengths, episodes.rewards, strict=True):
        assert (rewards[:length] < 0).all() and (rewards[length:] == 0).all()


def test_episodes_are_drawn_by_their_key(lines):
    task = mujoco.simulator("Line")

    def act(params, observation, key):
        return params * jax.random.normal(key, observation.shape)

    first, again, other = (
        mujoco.rollout(task, act, jnp.float32(0.1), jax.random.key(seed), 3).actions
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert len(np.unique(first)) == first.size  # of every step and episode its own


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"Walker2d-v5 needs .*pref_jax\[envs\]"):
        mujoco.simulator("Walker2d-v5")


def test_a_task_without_a_limit_of_steps_is_refused(lines, monkeypatch):
    monkeypatch.setattr(Line, "spec", types.SimpleNamespace(max_episode_steps=None))
    with pytest.raises(ValueError, match="Line needs .* limit of steps; got"):
        mujoco.simulator("Line")


# --- with MuJoCo ----------------------------------------------------------------------


@pytest.mark.slow
def test_warnings_go_to_the_log_once_and_to_no_file(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    mujoco._environment.cache_clear()
    mujoco._warn.cache_clear()
    for number in range(2):
        mujoco._environment("HalfCheetah-v5", number)
    assert not list(tmp_path.iterdir())
    lines = [r.message for r in caplog.records if r.message.startswith("MuJoCo: ")]
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_an_unknown_task_is_named():
    pytest.importorskip("mujoco")
    with pytest.raises(ValueError, match="cannot make the task 'HalfChetah-v5'"):
        mujoco.simulator("HalfChetah-v5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Hopper-v5"])
def test_a_simulated_episode_is_gymnasiums(name):
    pytest.importorskip("mujoco")
    import gymnasium

    task = mujoco.simulator(name)

    def act(params, observation, key):
        return params * jax.random.normal(key, (task.action_size,))

    key = jax.random.key(3)
    episodes = mujoco.rollout(task, act, jnp.float32(1.0), key, 2)
    seeds = jax.random.randint(jax.random.split(key)[0], (2,), 0, 2**31 - 1)
    environment = gymnasium.make(name)
    assert episodes.alive[1, 0] and episodes.alive.shape == (2, 1000)
    observation, _ = environment.reset(seed=int(seeds[1]))
    for number in range(1000):
        np.testing.assert_allclose(
            episodes.observations[1, number], observation, rtol=1e-6
        )
        low, high = environment.action_space.low, environment.action_space.high
        action = np.clip(episodes.actions[1, number], low, high)
        observation, reward, over, cut, _ = environment.step(action)
        assert episodes.rewards[1, number] == pytest.approx(reward, rel=1e-5)
        assert episodes.over[1, number] == over
        if over or cut:
            break
    assert episodes.alive[1].sum() == number + 1
    assert (number < 999) == (name == "Hopper-v5")  # which falls
