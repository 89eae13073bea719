"""What the logits of a trained policy say of values: Q, V, advantages, token rewards.

In the token MDP a state is the prompt and the response so far, an action is the next
token, and a policy that is optimal for a reward with a KL penalty of weight beta has

    Q(s, a) = r(s, a) + beta log pi_0(a|s) + V(s'),  V = 0 after the last token
    V(s)    = beta logsumexp(Q(s, .) / beta)
    pi(a|s) = exp((Q(s, a) - V(s)) / beta)

so its logits can be read as Q / beta and their log-sum-exp as V / beta.

Softmax does not see a number added to all logits of a state: a loss on probabilities
leaves it free. Only the advantage Q - V is identified. Q and V are what the network's
parametrisation makes of them, and a claim about them needs controls (entropy, length,
an untrained network). Logits are raw: before temperature, capping or a bias.

Source: "From r to Q*", arXiv:2404.12358, and for SFT "Implicit reward as the bridge",
arXiv:2507.00018 (the numbers of their equations are not verified).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.logps import gather_responses, token_stats
from pref_jax.numerics import at_least_float32
from pref_jax.types import Array, ResponseBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitValues:
    """The values of one state, for every action.

    Attributes:
      q: f32[..., V], beta times the logits.
      value: f32[...], beta times their log-sum-exp.
      advantage: f32[..., V], q - value: beta times the log-probabilities.
    """

    q: Array
    value: Array
    advantage: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseValues:
    """The values along each response of a batch.

    Attributes:
      q: f32[B, K, T], of the tokens as they came; 0 outside the mask.
      value: f32[B, K, T], of the state before each token; 0 outside the mask.
      terminal_value: f32[B, K], of the state after the last token.
      advantage: f32[B, K, T], q - value.
    """

    q: Array
    value: Array
    terminal_value: Array
    advantage: Array


def logit_values(logits, *, beta: float) -> LogitValues:
    """Q, V and advantage from raw logits, for logits that are in memory.

        q = beta logits,  value = beta logsumexp(logits),  advantage = q - value

    Source: as the module.
    Checked: on a token MDP solved exactly.

    Args:
      logits: [..., V].
      beta: reward per nat, positive.

    Returns:
      `LogitValues`, float32 or wider.

    Raises:
      ValueError: `beta` is not positive.
      TypeError: `logits` is not floating-point.

    >>> values = logit_values(jnp.array([0.0, 0.0]), beta=2.0)
    >>> round(float(values.value), 4), values.q.tolist()
    (1.3863, [0.0, 0.0])
    """
    checks.check_positive("beta", beta)
    checks.check_floating("logits", logits)
    logits = at_least_float32(logits)
    return LogitValues(
        q=beta * logits,
        value=beta * jax.nn.logsumexp(logits, axis=-1),
        advantage=beta * jax.nn.log_softmax(logits),
    )


def _next_values(values, where, terminal_value):
    """For each token that counts: the value before the next one that does."""
    num_tokens = values.shape[-1]
    index = jnp.where(where, jnp.arange(num_tokens), num_tokens)
    later = jnp.concatenate(
        [index[..., 1:], jnp.full((*index.shape[:-1], 1), num_tokens)], axis=-1
    )
    following = jax.lax.cummin(later, axis=later.ndim - 1, reverse=True)
    terminal = jnp.broadcast_to(terminal_value, values.shape[:-1]).astype(values.dtype)
    padded = jnp.concatenate([values, terminal[..., None]], axis=-1)
    return jnp.take_along_axis(padded, following, axis=-1)


def _read_tokens(first, where, **others):
    """The arrays in float32 or wider, all of one shape, 0 where no token counts."""
    name, array = first
    checks.check_floating(name, array)
    array = at_least_float32(array)
    checks.check_bool("where", where)
    checks.check_broadcast("where", where, to=array.shape, of=name)
    where = jnp.broadcast_to(where, array.shape)
    arrays = [array]
    for other, values in others.items():
        checks.check_floating(other, values)
        checks.check_same_shape(other, values, like=array, of=name)
        arrays.append(jnp.asarray(values, array.dtype))
    return where, *(jnp.where(where, x, 0.0) for x in arrays)


def token_rewards(
    logps, *, anchor_logps, values, beta: float, where, terminal_value=0.0
):
    """The reward of each token for which the policy would be optimal.

        r[t] = beta (logps[t] - anchor_logps[t]) + values[t] - values[t + 1]

    Over a response the values cancel but for the first and the last: the rewards add up
    to beta times the log-ratio of the response plus the value of the prompt.

    Source: as the module; potential shaping of the log-ratio.
    Checked: on a token MDP solved exactly.

    Args:
      logps: f32[..., T], nats.
      anchor_logps: as `logps`.
      values: f32[..., T], V of the state before each token.
      beta: reward per nat, positive.
      where: bool, broadcastable to `logps`. True: a token of the response. A token
        hands over to the next one that counts.
      terminal_value: f32, broadcastable to [...]: V after the last token. 0 after an
        end token.

    Returns:
      f32[..., T]; 0 where `where` is False.

    Raises:
      ValueError: a shape does not fit, or `beta` is not positive.
      TypeError: an array is not floating-point or `where` is not boolean.

    >>> rewards = token_rewards(
    ...     jnp.array([-1.0, -1.0]), anchor_logps=jnp.array([-2.0, -2.0]),
    ...     values=jnp.array([3.0, 5.0]), beta=1.0, where=jnp.array([True, True]),
    ... )
    >>> rewards.tolist()
    [-1.0, 6.0]
    """
    checks.check_positive("beta", beta)
    where, logps, anchor_logps, values = _read_tokens(
        ("logps", logps), where, anchor_logps=anchor_logps, values=values
    )
    following = _next_values(values, where, terminal_value)
    rewards = beta * (logps - anchor_logps) + values - following
    return jnp.where(where, rewards, 0.0)


def soft_bellman_residual(
    q, *, rewards, anchor_logps, values, beta: float, where, terminal_value=0.0
):
    """How far the Q of the logits is from what the reward and the next state say.

        residual[t] = q[t] - (rewards[t] + beta anchor_logps[t] + values[t + 1])

    0 everywhere for the optimal policy of that reward, if its logits are Q / beta. With
    `token_rewards` of the same values it is 0 by construction.

    Source: as the module.
    Checked: on a token MDP solved exactly.

    Args:
      q: f32[..., T], of the tokens as they came.
      rewards: f32[..., T], of the environment.
      anchor_logps: f32[..., T], nats, of the tokens under the anchor.
      values: f32[..., T], V of the state before each token.
      beta: reward per nat, positive.
      where: as in `token_rewards`.
      terminal_value: as in `token_rewards`.

    Returns:
      f32[..., T], in the unit of the reward; 0 where `where` is False.

    Raises:
      ValueError, TypeError: as `token_rewards`.

    >>> residual = soft_bellman_residual(
    ...     jnp.array([2.0]), rewards=jnp.array([1.0]), anchor_logps=jnp.array([-0.5]),
    ...     values=jnp.array([3.0]), beta=2.0, where=jnp.array([True]),
    ... )
    >>> residual.tolist()
    [2.0]
    """
    checks.check_positive("beta", beta)
    where, q, rewards, anchor_logps, values = _read_tokens(
        ("q", q), where, rewards=rewards, anchor_logps=anchor_logps, values=values
    )
    following = _next_values(values, where, terminal_value)
    expected = rewards + beta * anchor_logps + following
    return jnp.where(where, q - expected, 0.0)


def response_values(
    model, params, batch: ResponseBatch, *, beta: float, chunk: int | None = None
) -> ResponseValues:
    """Q and V along the responses of a batch, by a model.

    The vocabulary is never laid out for a whole batch: `logps.token_stats` unembeds in
    chunks. The state after the last token is read where a response ends in its row.

    Args:
      model: a `pref_jax.types.Model`.
      params: its parameters.
      batch: the rows.
      beta: reward per nat, positive.
      chunk: entries of the vocabulary at once, as in `token_stats`.

    Returns:
      `ResponseValues`.

    Raises:
      ValueError: `beta` is not positive.
    """
    checks.check_positive("beta", beta)
    num_rows = batch.tokens.shape[0]
    hidden = model.hidden(params, batch.tokens, batch.position, batch.end)
    last = jnp.where(batch.valid, batch.start + batch.length, -1)
    last = last.reshape(num_rows, -1)
    stats = token_stats(
        hidden,
        model.unembedding(params),
        batch.targets,
        jnp.concatenate([batch.predict, last], axis=1),
        want=("chosen_logit", "logsumexp"),
        chunk=chunk,
        softcap=model.logit_softcap,
    )
    scored = batch.predict.shape[1]
    q, value = (
        beta * gather_responses(stats[name][:, :scored], batch)
        for name in ("chosen_logit", "logsumexp")
    )
    terminal = stats["logsumexp"][:, scored:].reshape(batch.valid.shape)
    return ResponseValues(
        q=q, value=value, terminal_value=beta * terminal, advantage=q - value
    )
