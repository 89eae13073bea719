"""Two tasks of classic control as pure functions: vmapped, scanned, compiled whole.

They are the tasks of Gymnasium, number by number: `CartPole-v1` and `Pendulum-v1`.

Source: Barto, Sutton and Anderson (1983) for the pole, in Gymnasium's Euler steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pref_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Environment:
    """A task as a record of pure functions of one state.

    Attributes:
      name: of the task.
      reset: key -> state f32[S].
      observe: state -> observation f32[O].
      step: (state, action) -> (state, reward f32[], over bool[]). An action is i32[] of
        `num_actions`, or f32[A] that is cut to its bounds.
      observation_size: O.
      num_actions: of a discrete task, else None.
      action_size: A of a continuous task, else None.
      horizon: steps after which an episode is cut.
    """

    name: str
    reset: Callable
    observe: Callable
    step: Callable
    observation_size: int
    num_actions: int | None
    action_size: int | None
    horizon: int


def cartpole() -> Environment:
    """A pole on a cart, pushed left (0) or right (1); 1 a step, until the pole falls.

    >>> task = cartpole()
    >>> state = task.reset(jax.random.key(0))
    >>> task.step(state, 1)[1:]
    (Array(1., dtype=float32), Array(False, dtype=bool))
    """
    gravity, force, half_length, seconds = 9.8, 10.0, 0.5, 0.02
    pole, total = 0.1, 1.1  # masses
    far, tilted = 2.4, 12 * math.pi / 180

    def reset(key):
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def step(state, action):
        place, speed, angle, turning = state
        push = jnp.where(action == 1, force, -force)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        swing = (push + pole * half_length * turning**2 * sin) / total
        angular = (gravity * sin - cos * swing) / (
            half_length * (4 / 3 - pole * cos**2 / total)
        )
        linear = swing - pole * half_length * angular * cos / total
        state = jnp.stack(
            [
                place + seconds * speed,
                speed + seconds * linear,
                angle + seconds * turning,
                turning + seconds * angular,
            ]
        )
        over = (jnp.abs(state[0]) > far) | (jnp.abs(state[2]) > tilted)
        return state, jnp.ones(()), over

    return Environment(
        name="CartPole-v1",
        reset=reset,
        observe=lambda state: state,
        step=step,
        observation_size=4,
        num_actions=2,
        action_size=None,
        horizon=500,
    )


def pendulum() -> Environment:
    """A pendulum to be swung up and held there by a torque in [-2, 2].

    The reward of a step is -(angle^2 + 0.1 speed^2 + 0.001 torque^2), 0 at the top.

    >>> task = pendulum()
    >>> state, reward, over = task.step(jnp.zeros(2), jnp.zeros(1))
    >>> float(reward), bool(over)
    (-0.0, False)
    """
    gravity, seconds, fastest, strongest = 10.0, 0.05, 8.0, 2.0

    def reset(key):
        high = jnp.array([math.pi, 1.0])
        return jax.random.uniform(key, (2,), minval=-high, maxval=high)

    def step(state, action):
        angle, speed = state
        torque = jnp.clip(action[0], -strongest, strongest)
        away = (angle + math.pi) % (2 * math.pi) - math.pi
        cost = away**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed += (1.5 * gravity * jnp.sin(angle) + 3 * torque) * seconds
        speed = jnp.clip(speed, -fastest, fastest)
        return jnp.stack([angle + speed * seconds, speed]), -cost, jnp.zeros((), bool)

    def observe(state):
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    return Environment(
        name="Pendulum-v1",
        reset=reset,
        observe=observe,
        step=step,
        observation_size=3,
        num_actions=None,
        action_size=1,
        horizon=200,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Episodes:
    """Episodes of one length; what comes after an end is marked.

    Attributes:
      observations: f32[N, T, O].
      actions: i32[N, T] or f32[N, T, A].
      rewards: f32[N, T]; 0 after the end.
      alive: bool[N, T]: the episode was not over before this step.
      over: bool[N, T]: it was over after this step, and not merely cut.
    """

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array
    alive: jax.Array
    over: jax.Array

    @property
    def returns(self):
        """Sum of the rewards of each episode: f32[N]."""
        return self.rewards.sum(axis=-1)


def rollout(
    environment: Environment, act: Callable, params: PyTree, key, num_episodes: int
) -> Episodes:
    """Whole episodes, side by side.

    Args:
      environment: the task.
      act: (params, observation f32[O], key) -> action.
      params: of the policy.
      key: of resets and actions.
      num_episodes: N.
    """

    def episode(key):
        first, rest = jax.random.split(key)

        def one(carry, key):
            state, alive = carry
            observation = environment.observe(state)
            action = act(params, observation, key)
            state, reward, over = environment.step(state, action)
            out = (
                observation,
                action,
                jnp.where(alive, reward, 0.0),
                alive,
                over & alive,
            )
            return (state, alive & ~over), out

        keys = jax.random.split(rest, environment.horizon)
        start = environment.reset(first), jnp.ones((), bool)
        return Episodes(*jax.lax.scan(one, start, keys)[1])

    return jax.vmap(episode)(jax.random.split(key, num_episodes))
