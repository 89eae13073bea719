"""Policies for tasks of control, and a teacher for each: trained here, by a command.

A policy is two networks of an observation: what to do, and what to expect. Of discrete
tasks it gives the logits of all actions, of continuous ones the mean of a normal
distribution whose deviations are parameters. The teacher is trained by PPO on whole
episodes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from pref_jax.envs.control import Environment, Episodes, rollout
from pref_jax.losses.policy_gradient import clipped_surrogate_loss, gae, value_loss
from pref_jax.train.step import weighted_mean
from pref_jax.types import PyTree


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
    def of(cls, task: Environment, hidden: int) -> ActingPolicy:
        """For the observations and actions of a task."""
        return cls(task.observation_size, task.num_actions, task.action_size, hidden)

    def init(self, key) -> PyTree:
        """Parameters: orthogonal matrices, small last layers."""
        acting, judging = jax.random.split(key)
        outputs = self.num_actions or self.action_size
        params = {
            "act": self._network(acting, outputs, 0.01),
            "value": self._network(judging, 1, 1.0),
        }
        if self.num_actions is None:
            params["log_deviation"] = jnp.full(self.action_size, -0.5)
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

    def outputs(self, params, observations):
        """Logits f32[..., actions], or means f32[..., A]."""
        return self._apply(params["act"], observations)

    def value(self, params, observations):
        """What is expected from here on: f32[...]."""
        return self._apply(params["value"], observations)[..., 0]

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
    num_epochs: int = 8  # updates on the episodes of a round
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.0
    reward_scale: float = 1.0  # of the rewards that the critic sees


def train_teacher(
    task: Environment, policy: ActingPolicy, config: TeacherConfig, key
) -> tuple[PyTree, jax.Array]:
    """PPO on whole episodes.

    Returns:
      The parameters, and the mean return of every round.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(config.learning_rate)
    )
    first, rest = jax.random.split(key)
    params = policy.init(first)

    def log_prob(params, episodes: Episodes):
        flat = episodes.observations.reshape(-1, episodes.observations.shape[-1])
        actions = episodes.actions
        if policy.num_actions is not None:
            actions = jax.nn.one_hot(actions, policy.num_actions)
        items = actions.reshape(len(flat), 1, -1)
        return policy.logps(params, flat, items).reshape(episodes.alive.shape)

    def loss(params, episodes, advantages, returns, old_logps):
        logps = log_prob(params, episodes)
        surrogate, _ = clipped_surrogate_loss(
            logps - old_logps,
            advantages=advantages,
            clip_low=config.clip,
            clip_high=config.clip,
            where=episodes.alive,
        )
        values = policy.value(params, episodes.observations)
        errors, _ = value_loss(values, returns=returns, where=episodes.alive)
        # The mean log-probability of what was drawn estimates minus the entropy.
        terms = surrogate + 0.5 * errors + config.entropy_weight * logps
        return weighted_mean(terms, episodes.alive.astype(jnp.float32))

    def one_round(carry, key):
        params, opt_state = carry
        episodes = rollout(task, policy.act, params, key, config.num_episodes)
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
        advantages = (advantages - mean) / (spread + 1e-6)
        old_logps = log_prob(params, episodes)

        def update(carry, _):
            params, opt_state = carry
            gradient = jax.grad(loss)(params, episodes, advantages, returns, old_logps)
            changes, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, changes), opt_state), None

        carry, _ = jax.lax.scan(
            update, (params, opt_state), None, length=config.num_epochs
        )
        return carry, episodes.returns.mean()

    @jax.jit
    def train(params, keys):
        carry = params, optimizer.init(params)
        (params, _), returns = jax.lax.scan(one_round, carry, keys)
        return params, returns

    return train(params, jax.random.split(rest, config.num_updates))


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def play(task, policy, params, key, num_episodes: int, best: bool) -> Episodes:
    """Episodes of a policy, drawn or at its likeliest."""
    act = policy.act_best if best else policy.act
    return rollout(task, act, params, key, num_episodes)
