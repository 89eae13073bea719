"""Gymnasium's MuJoCo tasks: simulated beside JAX, and not in it.

They need the extra `envs`: pip install 'pref_jax[envs]'.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import numpy as np

from pref_jax.envs.control import Episodes
from pref_jax.types import PyTree

_logger = logging.getLogger("pref_jax.envs")


@dataclasses.dataclass(frozen=True)
class Simulator:
    """A continuous task that a program of its own simulates.

    Attributes:
      name: of Gymnasium, such as "HalfCheetah-v5".
      observation_size: O.
      action_size: A.
      horizon: steps after which an episode is cut.
      num_actions: None, as the actions are numbers.
    """

    name: str
    observation_size: int
    action_size: int
    horizon: int
    num_actions: None = None


def simulator(name: str) -> Simulator:
    """A task by its name.

    Raises:
      ImportError: Gymnasium or MuJoCo is not installed.
      ValueError: there is no such task, or it is none of continuous actions that is cut
        after so many steps.
    """
    environment = _environment(name, 0)
    spaces = environment.observation_space.shape, environment.action_space.shape
    horizon = environment.spec.max_episode_steps
    if any(len(shape) != 1 for shape in spaces) or horizon is None:
        raise ValueError(
            f"{name} needs observations and actions of one axis and a limit of steps; "
            f"got {environment.observation_space}, {environment.action_space} and "
            f"{horizon}."
        )
    (observation_size,), (action_size,) = spaces
    return Simulator(name, observation_size, action_size, horizon)


# Kept, as making one compiles its model; `reset` makes it new.
@functools.cache
def _environment(name: str, number: int):
    del number
    try:
        import gymnasium
        import mujoco
    except ImportError as error:
        raise ImportError(
            f"{name} needs Gymnasium and MuJoCo; run: pip install 'pref_jax[envs]'."
        ) from error
    if mujoco.get_mju_user_warning() is None:  # which would write a file right here
        mujoco.set_mju_user_warning(_warn)
    try:
        # The checker looks at every step again, which takes longer than the step.
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium cannot make the task {name!r}: {error}") from error


@functools.cache
def _warn(message: str) -> None:
    """What MuJoCo has to say, once."""
    _logger.warning("MuJoCo: %s", message)


@functools.partial(jax.jit, static_argnums=0)
def _act(act, params, observations, key, number):
    keys = jax.random.split(jax.random.fold_in(key, number), len(observations))
    return jax.vmap(act, in_axes=(None, 0, 0))(params, observations, keys)


def rollout(
    task: Simulator, act: Callable, params: PyTree, key, num_episodes: int
) -> Episodes:
    """Whole episodes, side by side, as `pref_jax.envs.control.rollout` plays them.

    Actions are cut to the task's bounds before they are simulated and paid for.

    Args:
      task: the simulated task.
      act: (params, observation f32[O], key) -> action f32[A].
      params: of the policy.
      key: of resets and actions.
      num_episodes: N.

    Returns:
      Episodes of NumPy arrays [N, horizon, ...]; actions are those of the policy,
      before the cut; what comes after an end is 0.
    """
    environments = [_environment(task.name, i) for i in range(num_episodes)]
    space = environments[0].action_space
    first, rest = jax.random.split(key)
    seeds = np.asarray(jax.random.randint(first, (num_episodes,), 0, 2**31 - 1))
    seen = np.stack(
        [
            environment.reset(seed=int(seed))[0]
            for environment, seed in zip(environments, seeds, strict=True)
        ]
    ).astype(np.float32)
    shape = num_episodes, task.horizon
    observations = np.zeros((*shape, task.observation_size), np.float32)
    actions = np.zeros((*shape, task.action_size), np.float32)
    rewards = np.zeros(shape, np.float32)
    alive, over = np.zeros(shape, bool), np.zeros(shape, bool)
    playing = np.ones(num_episodes, bool)
    for number in range(task.horizon):
        chosen = np.asarray(_act(act, params, seen, rest, np.int32(number)))
        cut = np.clip(chosen, space.low, space.high)
        for i in np.flatnonzero(playing):
            observations[i, number], actions[i, number] = seen[i], chosen[i]
            alive[i, number] = True
            observation, reward, ended, _, _ = environments[i].step(cut[i])
            seen[i], rewards[i, number], over[i, number] = observation, reward, ended
        playing &= ~over[:, number]
        if not playing.any():
            break
    return Episodes(observations, actions, rewards, alive, over)
