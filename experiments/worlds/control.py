"""Policies for tasks of control, and a teacher for each: trained here, by a command.

A policy is two networks of an observation: what to do, and what to expect. Of discrete
tasks it gives the logits of all actions, of continuous ones the mean of a normal
distribution whose deviations are parameters. The teacher is trained by PPO on whole
episodes, compiled whole where the task is a pure function.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pref_jax.envs import mujoco
from pref_jax.envs.control import Environment, Episodes, rollout
from pref_jax.envs.mujoco import Simulator
from pref_jax.losses.policy_gradient import clipped_surrogate_loss, gae, value_loss
from pref_jax.train.logging import Progress
from pref_jax.train.step import weighted_mean
from pref_jax.types import PyTree

_FURTHEST = 10.0  # deviations; what lies beyond is cut


@dataclasses.dataclass(frozen=True)
class ActingPolicy:
    """Networks of two hidden layers for a task of control.

    Attributes:
      observation_size: of the task.
      num_actions: of a discrete task, else None.
      action_size: of a continuous task, else None.
      hidden: of both hidden layers.
    """

    observation_size: int
    num_actions: int | None
    action_size: int | None
    hidden: int

    @classmethod
    def of(cls, task: Environment | Simulator, hidden: int) -> ActingPolicy:
        """For the observations and actions of a task."""
        return cls(task.observation_size, task.num_actions, task.action_size, hidden)

    def init(self, key, normaliser: PyTree | None = None) -> PyTree:
        """Parameters: orthogonal matrices, small last layers.

        Args:
          key: of the matrices.
          normaliser: `mean` and `deviation` f32[O] of observations, which are
            standardised before both networks and not trained; None: observations are
            taken as they are.
        """
        acting, judging = jax.random.split(key)
        outputs = self.num_actions or self.action_size
        params = {
            "act": self._network(acting, outputs, 0.01),
            "value": self._network(judging, 1, 1.0),
        }
        if self.num_actions is None:
            params["log_deviation"] = jnp.full(self.action_size, -0.5)
        if normaliser is not None:
            params["normaliser"] = normaliser
        return params

    def _network(self, key, outputs: int, last: float) -> PyTree:
        sizes = (self.observation_size, self.hidden, self.hidden, outputs)
        scales = (2**0.5, 2**0.5, last)
        return [
            {
                "matrix": jax.nn.initializers.orthogonal(scale)(key, (rows, columns)),
                "bias": jnp.zeros(columns),
            }
            for key, scale, rows, columns in zip(
                jax.random.split(key, 3), scales, sizes, sizes[1:], strict=False
            )
        ]

    @staticmethod
    def _apply(layers, x):
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["matrix"] + _row(layer["bias"], x))
        return x @ layers[-1]["matrix"] + _row(layers[-1]["bias"], x)

    @staticmethod
    def _standardised(params, observations):
        if "normaliser" not in params:
            return observations
        known = jax.lax.stop_gradient(params["normaliser"])
        mean, deviation = (
            _row(known[name], observations) for name in ("mean", "deviation")
        )
        return jnp.clip((observations - mean) / deviation, -_FURTHEST, _FURTHEST)

    def outputs(self, params, observations):
        """Logits f32[..., actions], or means f32[..., A]."""
        return self._apply(params["act"], self._standardised(params, observations))

    def value(self, params, observations):
        """What is expected from here on: f32[...]."""
        seen = self._standardised(params, observations)
        return self._apply(params["value"], seen)[..., 0]

    def logps(self, params, context, items):
        """Log-probability or log-density of candidate actions: f32[B, K], nats.

        Args:
          params: of the policy.
          context: observations, f32[B, O].
          items: actions, f32[B, K, A]; of a discrete task one-hot rows.
        """
        outputs = self.outputs(params, context)[:, None]
        if self.num_actions is not None:
            return (items * jax.nn.log_softmax(outputs)).sum(-1)
        deviation = _row(params["log_deviation"], items)
        standardised = (items - outputs) * jnp.exp(-deviation)
        terms = -0.5 * standardised**2 - deviation - 0.5 * jnp.log(2 * jnp.pi)
        return terms.sum(-1)

    def act(self, params, observation, key):
        """A drawn action for one observation f32[O]: i32[] or f32[A]."""
        outputs = self.outputs(params, observation)
        if self.num_actions is not None:
            return jax.random.categorical(key, outputs)
        noise = jax.random.normal(key, outputs.shape)
        return outputs + jnp.exp(params["log_deviation"]) * noise

    def act_best(self, params, observation, key):
        """The likeliest action for one observation."""
        del key
        outputs = self.outputs(params, observation)
        return outputs.argmax() if self.num_actions is not None else outputs

    def divergence(self, params, other, observations):
        """KL(params || other) of the actions at each observation: f32[B], nats."""
        ours, theirs = (self.outputs(p, observations) for p in (params, other))
        if self.num_actions is not None:
            logps, other_logps = (jax.nn.log_softmax(x) for x in (ours, theirs))
            return (jnp.exp(logps) * (logps - other_logps)).sum(-1)
        narrow, wide = (_row(p["log_deviation"], ours) for p in (params, other))
        spread = jnp.exp(2 * (narrow - wide))
        shift = ((ours - theirs) * jnp.exp(-wide)) ** 2
        return (wide - narrow + 0.5 * (spread + shift - 1)).sum(-1)


def _row(vector, like):
    """A vector with the leading axes of an array, as rank promotion is an error."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """How a teacher is trained; all numbers are ours."""

    num_updates: int = 120  # rounds of episodes
    num_episodes: int = 32  # of a round, side by side
    num_epochs: int = 8  # passes over the episodes of a round
    num_minibatches: int = 1  # updates of a pass
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.0
    reward_scale: float = 1.0  # of the rewards that the critic sees
    max_steps: int | None = None  # of a simulated task: no new round after so many


def train_teacher(
    task: Environment | Simulator, policy: ActingPolicy, config: TeacherConfig, key
) -> tuple[PyTree, jax.Array]:
    """PPO on whole episodes; for a simulated task observations are standardised.

    Returns:
      The parameters, and the mean return of every round.
    """
    first, rest = jax.random.split(key)
    keys = jax.random.split(rest, config.num_updates)
    if isinstance(task, Simulator):
        return _train_beside(task, policy, config, first, keys)
    learn = _learner(policy, config)

    def one_round(carry, key):
        params, opt_state = carry
        episodes = rollout(task, policy.act, params, key, config.num_episodes)
        return learn(params, opt_state, episodes, key), episodes.returns.mean()

    @jax.jit
    def train(params, keys):
        carry = params, _optimizer(config).init(params)
        (params, _), returns = jax.lax.scan(one_round, carry, keys)
        return params, returns

    return train(policy.init(first), keys)


def _train_beside(task: Simulator, policy, config: TeacherConfig, first, keys):
    """Rounds of a simulated task, one after the other."""
    seen = _Moments(task.observation_size)
    params = policy.init(first, normaliser=seen.normaliser())
    opt_state = _optimizer(config).init(params)
    learn, returns, num_steps = jax.jit(_learner(policy, config)), [], 0
    with Progress(f"teacher of {task.name}", config.num_updates) as progress:
        for number, key in enumerate(keys, start=1):
            episodes = play(task, policy, params, key, config.num_episodes, False)
            params, opt_state = learn(params, opt_state, episodes, key)
            # Only now: the policy that played is the one that is improved.
            seen.add(episodes.observations[episodes.alive])
            params = params | {"normaliser": seen.normaliser()}
            returns.append(episodes.returns.mean())
            num_steps += int(episodes.alive.sum())
            progress.count(number)
            if config.max_steps is not None and num_steps >= config.max_steps:
                break
    return params, jnp.array(returns)


class _Moments:
    """Mean and variance of all observations so far, in float64.

    Args:
      size: of an observation.
    """

    def __init__(self, size: int):
        self._number, self._mean, self._squares = 0, np.zeros(size), np.zeros(size)

    def add(self, observations) -> None:
        """More of them, [N, O]."""
        observations = np.asarray(observations, np.float64)
        number = self._number + len(observations)
        away = observations.mean(0) - self._mean
        self._squares += ((observations - observations.mean(0)) ** 2).sum(0)
        self._squares += away**2 * self._number * len(observations) / number
        self._mean = self._mean + away * len(observations) / number
        self._number = number

    def normaliser(self) -> PyTree:
        """`mean` and `deviation`, f32[O]; 0 and 1 as long as nothing was seen."""
        variance = self._squares / self._number if self._number else 1.0
        deviation = np.sqrt(variance + 1e-8) * np.ones_like(self._mean)
        return {"mean": jnp.float32(self._mean), "deviation": jnp.float32(deviation)}


def _optimizer(config: TeacherConfig) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(config.learning_rate))


def _learner(policy: ActingPolicy, config: TeacherConfig):
    """(params, opt_state, episodes, key) -> (params, opt_state): PPO of a round."""
    optimizer = _optimizer(config)

    def log_prob(params, observations, actions):
        flat = observations.reshape(-1, observations.shape[-1])
        if policy.num_actions is not None:
            actions = jax.nn.one_hot(actions, policy.num_actions)
        items = actions.reshape(len(flat), 1, -1)
        return policy.logps(params, flat, items).reshape(observations.shape[:-1])

    def loss(params, steps):
        logps = log_prob(params, steps["observations"], steps["actions"])
        surrogate, _ = clipped_surrogate_loss(
            logps - steps["old_logps"],
            advantages=steps["advantages"],
            clip_low=config.clip,
            clip_high=config.clip,
            where=steps["alive"],
        )
        values = policy.value(params, steps["observations"])
        errors, _ = value_loss(values, returns=steps["returns"], where=steps["alive"])
        # The mean log-probability of what was drawn estimates minus the entropy.
        terms = surrogate + 0.5 * errors + config.entropy_weight * logps
        return weighted_mean(terms, steps["alive"].astype(jnp.float32))

    def update(carry, steps):
        params, opt_state = carry
        gradient = jax.grad(loss)(params, steps)
        changes, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    def learn(params, opt_state, episodes: Episodes, key):
        values = policy.value(params, episodes.observations)
        advantages, returns = gae(
            config.reward_scale * episodes.rewards,
            values=values,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
            where=episodes.alive,
            # What was cut by the clock, and did not end, would have gone on.
            last_value=jnp.where(episodes.over.any(-1), 0.0, values[:, -1]),
        )
        weights = episodes.alive.astype(jnp.float32)
        mean = weighted_mean(advantages, weights)
        spread = jnp.sqrt(weighted_mean((advantages - mean) ** 2, weights))
        steps = {
            "observations": episodes.observations,
            "actions": episodes.actions,
            "alive": episodes.alive,
            "advantages": (advantages - mean) / (spread + 1e-6),
            "returns": returns,
            "old_logps": log_prob(params, episodes.observations, episodes.actions),
        }
        carry = params, opt_state
        if config.num_minibatches == 1:
            return jax.lax.scan(
                lambda carry, _: (update(carry, steps), None),
                carry,
                length=config.num_epochs,
            )[0]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        order = _minibatches(
            jax.random.fold_in(key, 1),
            flat["alive"],
            config.num_epochs,
            config.num_minibatches,
        )
        return jax.lax.scan(
            lambda carry, numbers: (
                update(carry, jax.tree.map(lambda x: x[numbers], flat)),
                None,
            ),
            carry,
            order,
        )[0]

    return learn


def _minibatches(key, alive, num_epochs: int, num_minibatches: int):
    """Which steps each update sees: i32[epochs * minibatches, size].

    Steps are shuffled, those after an end apart from the others, so that all
    minibatches have the same share of what counts.

    Args:
      key: of the order.
      alive: bool[steps].
      num_epochs: passes.
      num_minibatches: of a pass; a last part that fills none is left out.
    """

    def epoch(key):
        rank = jax.random.uniform(key, alive.shape) + jnp.where(alive, 0.0, 1.0)
        order = jnp.argsort(rank)
        size = len(order) // num_minibatches
        return order[: size * num_minibatches].reshape(size, num_minibatches).T

    orders = jax.vmap(epoch)(jax.random.split(key, num_epochs))
    return orders.reshape(num_epochs * num_minibatches, -1)


def play(
    task: Environment | Simulator,
    policy: ActingPolicy,
    params,
    key,
    num_episodes: int,
    best: bool,
) -> Episodes:
    """Episodes of a policy, drawn or at its likeliest."""
    act = _acting(policy, best)
    player = mujoco.rollout if isinstance(task, Simulator) else _rollout
    return player(task, act, params, key, num_episodes)


_rollout = jax.jit(rollout, static_argnums=(0, 1, 4))


@functools.cache
def _acting(policy: ActingPolicy, best: bool):
    """One method for equal policies, so that what it is compiled in is kept."""
    return policy.act_best if best else policy.act
