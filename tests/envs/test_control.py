"""Tasks of control: their equations, their ends, and episodes side by side."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.envs import control

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "control.json").read_text()
)
TASKS = {"CartPole-v1": control.cartpole, "Pendulum-v1": control.pendulum}


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_gymnasiums(name):
    task = TASKS[name]()
    step = jax.jit(task.step)
    for expected in GOLDEN[name]:
        state, reward, over = step(
            jnp.array(expected["state"], jnp.float32), jnp.asarray(expected["action"])
        )
        np.testing.assert_allclose(
            task.observe(state), expected["next_observation"], rtol=1e-5, atol=1e-5
        )
        assert float(reward) == pytest.approx(expected["reward"], rel=1e-5, abs=1e-5)
        assert bool(over) == expected["over"]
    overs = [step["over"] for step in GOLDEN[name]]
    assert overs.index(True) == len(overs) - 1 if any(overs) else len(overs) == 60


@pytest.mark.parametrize("name", TASKS)
def test_a_start_is_drawn_by_its_key_and_within_bounds(name):
    task = TASKS[name]()
    keys = jax.random.split(jax.random.key(0), 200)
    starts = np.asarray(jax.vmap(task.reset)(keys))
    bound = {"CartPole-v1": [0.05] * 4, "Pendulum-v1": [np.pi, 1.0]}[name]
    assert (np.abs(starts) <= bound).all()
    assert (np.abs(starts).max(0) > 0.8 * np.array(bound)).all()
    assert len(np.unique(starts, axis=0)) == 200
    observation = task.observe(task.reset(keys[0]))
    assert observation.shape == (task.observation_size,)


def push_left(params, observation, key):
    del params, observation, key
    return jnp.zeros((), jnp.int32)


def test_nothing_counts_after_the_end_of_an_episode():
    task = control.cartpole()
    episodes = control.rollout(task, push_left, (), jax.random.key(0), 5)
    alive, over = np.asarray(episodes.alive), np.asarray(episodes.over)
    lengths = alive.sum(1)
    assert ((lengths >= 8) & (lengths <= 11)).all()  # pushed to one side it falls
    assert (over.sum(1) == 1).all() and (over.argmax(1) == lengths - 1).all()
    assert (np.diff(alive.astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(episodes.returns, lengths)
    assert episodes.observations.shape == (5, task.horizon, 4)


def test_what_is_cut_by_the_clock_is_not_over():
    short = dataclasses.replace(control.cartpole(), horizon=4)
    episodes = control.rollout(short, push_left, (), jax.random.key(0), 3)
    assert episodes.alive.all() and not episodes.over.any()
    np.testing.assert_array_equal(episodes.returns, 4)


def test_torque_beyond_its_bounds_is_cut():
    task = control.pendulum()
    state = jnp.array([0.4, -0.2])
    most, more = (task.step(state, jnp.array([torque])) for torque in (2.0, 9.0))
    for a, b in zip(most, more, strict=True):
        np.testing.assert_array_equal(a, b)
    fast, _, _ = task.step(jnp.array([np.pi / 2, 7.9]), jnp.array([2.0]))
    assert float(fast[1]) == 8.0
