"""Advantages of sampled responses, and the surrogate that trains a policy on them.

Three levels, one function: `clipped_surrogate_loss` takes log-ratios of tokens, of
steps or of whole responses. How entries are averaged is `Method.weight`.

    method       log-ratios               advantages                         weight
    GRPO         of tokens                `group_advantages`                 1 / length
    DAPO         of tokens                `group_advantages`                 1
    Dr. GRPO     of tokens, losses summed `centered_advantages`              1
                 over a constant length
    RLOO         of responses, summed     `leave_one_out_advantages`         1
    REINFORCE++  of tokens                `whitened_advantages` of           1
                                          `discounted_returns`
      baseline   of tokens                the same of `centered_advantages`  1
    GSPO         `sequence_log_ratios`    `group_advantages`                 1
    GiGPO        of tokens                `combined_advantages` of           1
                                          `centered_` and `cluster_`
    OPRL         of tokens or steps       `combined_advantages` of           1
                                          `group_` and `step_`
    PRIME        of tokens                `leave_one_out_advantages` of      1
                                          outcome + process rewards
    PPO          of tokens                `whitened_advantages` of `gae`     1

A step is a turn of an agent. OPRL takes its advantages by any rule, once of outcomes
and once of step rewards; the steps are then one group, [..., N, S] as [..., N * S].

Advantages never carry a gradient. `logps.spread_steps` gives the advantage of a step to
its tokens.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.logps import response_mean
from pref_jax.losses.entries import (
    all_equal,
    fill,
    inclusion,
    read_constant,
    results,
)
from pref_jax.numerics import at_least_float32, exp_or_tangent

# Of (exp(-x) - 1 + x) / x^2, highest power first: exact in float64 up to |x| = 1.
_SERIES = [(-1) ** k / math.factorial(k) for k in range(18, 1, -1)]


def _read(name, array, where):
    """f32[...] with 0 in what is dropped, and bool of what is there."""
    checks.check_floating(name, array)
    array = at_least_float32(array)
    where = inclusion(where, shape=array.shape, of=name)
    there = jnp.ones(array.shape, bool) if where is None else where
    return fill(array, there), there


def _read_group(name, array, where, axes: int = 1):
    """As `_read`, without gradient and with the last `axes` axes as the group."""
    array, there = _read(name, array, where)
    if array.ndim < axes:
        raise ValueError(
            f"`{name}` needs at least {axes} axes; got {checks.describe(array)}."
        )
    return jax.lax.stop_gradient(array), there


def _read_beside(name, array, *, like, of):
    """`read_constant` of one number, or of an array with as many axes as `like`.

    With fewer, advantages [B, K] beside log-ratios [B, K, T] would meet the wrong axes
    wherever sizes are equal.
    """
    if jnp.ndim(array) not in (0, like.ndim):
        raise ValueError(
            f"`{name}` needs one number, or as many axes as `{of}`, "
            f"{checks.describe(like)}; got {checks.describe(array)}. Give it axes of "
            f"size 1, as `{name}[..., None]`."
        )
    return read_constant(name, array, like=like, of=of)


def _centre(values, there, axis):
    """Values less their mean over what is there, and how many there are."""
    number = there.sum(axis, keepdims=True, dtype=values.dtype)
    mean = values.sum(axis, keepdims=True) / jnp.maximum(number, 1)
    # The mean of equal numbers is rounded, and division would make noise of the rest.
    nothing = ~there | all_equal(values, there, axis)
    return jnp.where(nothing, 0.0, values - mean), number


def _standardise(values, there, axis, epsilon):
    centred, number = _centre(values, there, axis)
    variance = jnp.square(centred).sum(axis, keepdims=True) / jnp.maximum(number - 1, 1)
    return centred / (jnp.sqrt(variance) + epsilon)


def centered_advantages(rewards, *, where=None):
    """A response's reward less the mean of its group.

        A[i] = r[i] - mean of r

    Source: Dr. GRPO, arXiv:2503.20783, which drops the deviation of `group_advantages`.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., N], of N responses to one prompt.
      where: bool, broadcastable to `rewards`. False: not in the group.

    Returns:
      f32[..., N], without gradient; 0 for equal rewards and for a response alone.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> centered_advantages(jnp.array([1.0, 0.0, 0.0, 1.0])).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    rewards, there = _read_group("rewards", rewards, where)
    return _centre(rewards, there, -1)[0]


def group_advantages(rewards, *, where=None, epsilon: float = 1e-6):
    """A response's reward, standardised in its group.

        A[i] = (r[i] - mean of r) / (deviation of r + epsilon)

    Source: GRPO, arXiv:2402.03300, section 4.1.2; OPRL, arXiv:2509.19199v1, equation 3.
    Convention: the deviation has n - 1 in it, as in TRL and verl, whose epsilons are
    1e-4 and 1e-6.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., N], of N responses to one prompt.
      where: bool, broadcastable to `rewards`. False: not in the group.
      epsilon: unit of the rewards, positive.

    Returns:
      f32[..., N], without gradient; 0 for equal rewards and for a response alone.

    Raises:
      ValueError: `where` does not fit, or `epsilon` is not positive.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> advantages = group_advantages(jnp.array([1.0, 0.0, 0.0, 1.0]))
    >>> [round(float(a), 4) for a in advantages]
    [0.866, -0.866, -0.866, 0.866]
    """
    checks.check_positive("epsilon", epsilon)
    rewards, there = _read_group("rewards", rewards, where)
    return _standardise(rewards, there, -1, epsilon)


def leave_one_out_advantages(rewards, *, where=None):
    """A response's reward less the mean of the others.

        A[i] = r[i] - mean of r[j] over j != i

    Source: RLOO, arXiv:2402.14740 (the equation's number is not verified).
    Reduces to: n / (n - 1) times `centered_advantages`.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., N], of N responses to one prompt.
      where: bool, broadcastable to `rewards`. False: not in the group.

    Returns:
      f32[..., N], without gradient; 0 for equal rewards and for a response alone.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> leave_one_out_advantages(jnp.array([3.0, 0.0, 0.0])).tolist()
    [3.0, -1.5, -1.5]
    """
    rewards, there = _read_group("rewards", rewards, where)
    centred, number = _centre(rewards, there, -1)
    return centred * number / jnp.maximum(number - 1, 1)


def step_advantages(
    step_rewards, *, where=None, epsilon: float = 1e-6, floor: float = 0.0
):
    """The reward of a step, standardised over all steps of all episodes of a group.

        A[i, t] = (r[i, t] - mean of r) / (deviation of r + epsilon)
        0 in a group with all |r| < floor

    Source: OPRL, arXiv:2509.19199v1, equation 4.
    Convention: the released code takes one step of each episode into the mean and
    divides by the largest reward beforehand; the paper does neither.
    Checked: one source, the paper's equation.

    Args:
      step_rewards: f32[..., N, S], of up to S steps of N episodes of one task.
      where: bool, broadcastable to `step_rewards`. False: there is no such step.
      epsilon: unit of the rewards, positive.
      floor: unit of the rewards, 0 or more. A reward model that is still the policy has
        rewards near rounding, and standardised noise is as large as anything.

    Returns:
      f32[..., N, S], without gradient; 0 for equal rewards and where no step is.

    Raises:
      ValueError: `where` does not fit, there is one axis only, `epsilon` is not
        positive or `floor` is negative.
      TypeError: `step_rewards` is not floating-point or `where` is not boolean.

    >>> rewards = jnp.array([[1.0, 0.0], [-1.0, 7.0]])
    >>> where = jnp.array([[True, True], [True, False]])
    >>> step_advantages(rewards, where=where).round(3).tolist()
    [[1.0, 0.0], [-1.0, 0.0]]
    """
    checks.check_positive("epsilon", epsilon)
    checks.check_not_negative("floor", floor)
    rewards, there = _read_group("step_rewards", step_rewards, where, axes=2)
    largest = jnp.abs(rewards).max((-2, -1), keepdims=True, initial=0.0)
    advantages = _standardise(rewards, there, (-2, -1), epsilon)
    return jnp.where(largest < floor, 0.0, advantages)


def combined_advantages(
    episode_advantages, *, step_advantages, alpha: float, where=None
):
    """The advantage of an episode, and of what each of its steps did for it.

        A[i, t] = A_episode[i] + alpha A_step[i, t]

    Source: OPRL, arXiv:2509.19199v1, equation 5, where alpha is 1.
    Reduces to: the advantages of episodes alone at an alpha of 0, bit for bit.
    Checked: one source, the paper's equation.

    Args:
      episode_advantages: f32[..., N].
      step_advantages: f32[..., N, S].
      alpha: 0 or more.
      where: bool, broadcastable to `step_advantages`. False: there is no such step.

    Returns:
      f32[..., N, S], without gradient; 0 where no step is.

    Raises:
      ValueError: a shape does not fit, or `alpha` is negative.
      TypeError: an array is not floating-point or `where` is not boolean.

    >>> of_steps = jnp.array([[1.0, -1.0]])
    >>> combined_advantages(
    ...     jnp.array([0.5]), step_advantages=of_steps, alpha=1.0
    ... ).tolist()
    [[1.5, -0.5]]
    """
    checks.check_not_negative("alpha", alpha)
    steps, there = _read_group("step_advantages", step_advantages, where, axes=2)
    checks.check_floating("episode_advantages", episode_advantages)
    if jnp.shape(episode_advantages) != steps.shape[:-1]:
        raise ValueError(
            f"`episode_advantages` needs the axes of `step_advantages` but the last, "
            f"{steps.shape[:-1]}; got {checks.describe(episode_advantages)}."
        )
    episodes = jax.lax.stop_gradient(at_least_float32(episode_advantages))[..., None]
    both = jnp.where(alpha == 0, episodes, episodes + alpha * steps)
    return jnp.where(there, both, 0.0)


def cluster_advantages(returns, *, cluster_ids, where=None):
    """The return of a step less the mean return of steps in the same state.

        A[m] = R[m] - mean of R[j] over j with cluster_ids[j] == cluster_ids[m]

    Source: GiGPO, arXiv:2505.10978, its step-level advantage without the deviation (the
    equation's number is not verified).
    Checked: one source, the paper's equation.

    Args:
      returns: f32[..., M], discounted returns of the M steps of a group
        (`discounted_returns`).
      cluster_ids: i32, broadcastable to `returns`: equal for equal observations.
      where: bool, broadcastable to `returns`. False: there is no such step.

    Returns:
      f32[..., M], without gradient; 0 for a step whose state came once.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `returns` is not floating-point, `cluster_ids` are not integers or
        `where` is not boolean.

    >>> ids = jnp.array([5, 5, 2])
    >>> cluster_advantages(jnp.array([3.0, 1.0, 9.0]), cluster_ids=ids).tolist()
    [1.0, -1.0, 0.0]
    """
    returns, there = _read_group("returns", returns, where)
    checks.check_integers("cluster_ids", cluster_ids)
    checks.check_broadcast("cluster_ids", cluster_ids, to=returns.shape, of="returns")
    ids = jnp.broadcast_to(cluster_ids, returns.shape)
    same = (ids[..., :, None] == ids[..., None, :]) & there[..., None, :]
    others = jnp.where(same, returns[..., None, :], 0.0)
    mean = others.sum(-1) / jnp.maximum(same.sum(-1, dtype=returns.dtype), 1)
    nothing = ~there | all_equal(others, same, -1).squeeze(-1)
    return jnp.where(nothing, 0.0, returns - mean)


def _backwards(step, first, *arrays):
    """Scan over the last axis from its end; arrays are [..., T]."""
    moved = tuple(jnp.moveaxis(x, -1, 0) for x in arrays)
    _, out = jax.lax.scan(step, first, moved, reverse=True)
    return jnp.moveaxis(out, 0, -1)


def discounted_returns(rewards, *, discount: float, where=None):
    """What follows from each step on, discounted.

        R[t] = r[t] + discount R[t + 1]

    Source: the return of reinforcement learning; per step: GiGPO, arXiv:2505.10978.
    Checked: against rlax 0.1.9.

    Args:
      rewards: f32[..., T].
      discount: in [0, 1].
      where: bool, broadcastable to `rewards`. False: the step is passed over, and 0.

    Returns:
      f32[..., T], without gradient.

    Raises:
      ValueError: `discount` is out of range or `where` does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> discounted_returns(jnp.array([0.0, 0.0, 8.0]), discount=0.5).tolist()
    [2.0, 4.0, 8.0]
    """
    checks.check_range("discount", discount, low=0.0, high=1.0, why="a share")
    rewards, there = _read_group("rewards", rewards, where)
    discount = jnp.asarray(discount, rewards.dtype)

    def step(following, inputs):
        reward, is_there = inputs
        total = jnp.where(is_there, reward + discount * following, following)
        return total, jnp.where(is_there, total, 0.0)

    return _backwards(step, jnp.zeros_like(rewards.sum(-1)), rewards, there)


def gae(
    rewards,
    *,
    values,
    discount: float,
    gae_lambda: float,
    where=None,
    last_value=0.0,
):
    """Generalised advantage estimation, and the returns that a critic fits.

        delta[t] = r[t] + discount V[t + 1] - V[t]
        A[t]     = delta[t] + discount gae_lambda A[t + 1]
        returns  = A + V

    Source: GAE, arXiv:1506.02438, equation 16.
    Reduces to: `discounted_returns` less the values at a gae_lambda of 1 and a
    last_value of 0.
    Checked: against rlax 0.1.9.

    Args:
      rewards: f32[..., T].
      values: f32[..., T], V before each step.
      discount: in [0, 1].
      gae_lambda: in [0, 1].
      where: bool, broadcastable to `rewards`. False: the step is passed over, and 0.
      last_value: f32, broadcastable to [...]: V after the last step; 0 where an episode
        ended.

    Returns:
      (advantages, returns), each f32[..., T], without gradient.

    Raises:
      ValueError: a shape does not fit or a number is out of range.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> advantages, returns = gae(
    ...     jnp.array([0.0, 1.0]), values=jnp.array([0.5, 0.5]), discount=1.0,
    ...     gae_lambda=0.5,
    ... )
    >>> advantages.tolist(), returns.tolist()
    ([0.25, 0.5], [0.75, 1.0])
    """
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        checks.check_range(name, value, low=0.0, high=1.0, why="a share")
    rewards, there = _read_group("rewards", rewards, where)
    checks.check_same_shape("values", values, like=rewards, of="rewards")
    values = _read_beside("values", values, like=rewards, of="rewards")
    first = _read_beside("last_value", last_value, like=rewards.sum(-1), of="episodes")
    discount, gae_lambda = (
        jnp.asarray(x, rewards.dtype) for x in (discount, gae_lambda)
    )

    def step(carry, inputs):
        advantage, following = carry
        reward, value, is_there = inputs
        delta = reward + discount * following - value
        total = delta + discount * gae_lambda * advantage
        advantage = jnp.where(is_there, total, advantage)
        following = jnp.where(is_there, value, following)
        return (advantage, following), jnp.where(is_there, total, 0.0)

    start = (jnp.zeros_like(first), first)
    advantages = _backwards(step, start, rewards, values, there)
    return advantages, jnp.where(there, advantages + values, 0.0)


def sequence_log_ratios(token_log_ratios, *, where):
    """GSPO's ratio of a response: the geometric mean over its tokens.

        mean over tokens of token_log_ratios

    Source: GSPO, arXiv:2507.18071, equation 7 (the number is not verified).
    Checked: against TRL 1.16.0 (GRPO by sequence) in value and gradient.

    Args:
      token_log_ratios: f32[..., T], nats: policy minus behaviour policy.
      where: bool, broadcastable to it. True: a token of the response.

    Returns:
      f32[...], for `clipped_surrogate_loss`; 0, a ratio of 1, for a response without
      tokens: leave it out there.

    Raises:
      ValueError, TypeError: as `logps.response_mean`.

    >>> where = jnp.array([True, True, False])
    >>> float(sequence_log_ratios(jnp.array([0.5, 0.25, 9.0]), where=where))
    0.375
    """
    return response_mean(token_log_ratios, where=where)


def clipped_surrogate_loss(
    log_ratios,
    *,
    advantages,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    where=None,
):
    """PPO's surrogate: no gain from moving the ratio further than the clip.

        rho  = exp(log_ratios)
        loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        where A < 0 and `dual_clip` is given: min(that, -A dual_clip)

    The exponential is continued by its tangent above an exponent of 30.

    Source: PPO, arXiv:1707.06347, equation 7; two clips: DAPO, arXiv:2503.14476; dual
    clip: arXiv:1912.09729, equation 5 (the number is not verified).
    Checked: against TRL 1.16.0 (GRPO, DAPO, Dr. GRPO, GSPO, RLOO, its `delta`) and rlax
    0.1.9 in value and gradient.

    Args:
      log_ratios: f32[...], nats: policy minus behaviour policy, of tokens, steps
        (`logps.step_sum`) or responses (`sequence_log_ratios`).
      advantages: f32, broadcastable to `log_ratios`, with all its axes; no gradient.
      clip_low: in [0, 1]; 1: none.
      clip_high: 0 or more; inf: none.
      dual_clip: above 1 + clip_high, bounds the loss of bad responses that have become
        likely.
      where: bool, broadcastable to `log_ratios`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metrics `ratio/value`, and 1 where a clip holds the
      gradient back: `ratio/clipped_low`, `ratio/clipped_high` and, with a dual clip,
      `ratio/clipped_dual`.

    Raises:
      ValueError: a shape does not fit or a number is out of range.
      TypeError: `log_ratios` is not floating-point or `where` is not boolean.

    >>> loss, metrics = clipped_surrogate_loss(
    ...     jnp.array([0.0, 1.0]), advantages=jnp.array([2.0, 2.0]), clip_low=0.2,
    ...     clip_high=0.2,
    ... )
    >>> [round(float(x), 4) for x in loss], metrics["ratio/clipped_high"].tolist()
    ([-2.0, -2.4], [0.0, 1.0])
    """
    checks.check_range("clip_low", clip_low, low=0.0, high=1.0, why="of a ratio")
    checks.check_range("clip_high", clip_high, low=0.0, high=math.inf, why="of a ratio")
    known = checks.is_known(dual_clip) and checks.is_known(clip_high)
    if dual_clip is not None and known and not dual_clip > 1 + clip_high:
        raise ValueError(
            f"`dual_clip` must be above 1 + `clip_high`, {1 + clip_high}; got "
            f"{dual_clip}."
        )
    log_ratios, there = _read("log_ratios", log_ratios, where)
    advantages = _read_beside(
        "advantages", advantages, like=log_ratios, of="log_ratios"
    )
    ratio = exp_or_tangent(log_ratios)
    low, high = 1 - clip_low, 1 + clip_high
    clipped = {
        "low": (advantages < 0) & (ratio < low),
        "high": (advantages > 0) & (ratio > high),
    }
    loss = -advantages * jnp.where(clipped["low"], low, ratio)
    loss = jnp.where(clipped["high"], -advantages * high, loss)
    if dual_clip is not None:
        clipped["dual"] = (advantages < 0) & (ratio > dual_clip)
        loss = jnp.where(clipped["dual"], -advantages * dual_clip, loss)
    metrics = {"ratio/value": ratio} | {
        f"ratio/clipped_{name}": held.astype(loss.dtype)
        for name, held in clipped.items()
    }
    return results(loss, metrics, there)


def value_loss(
    values, *, returns, old_values=None, clip: float | None = None, where=None
):
    """A critic's squared error, with the step from its old values clipped if asked.

        loss = 1/2 (V - R)^2
        with a clip: 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    Source: the reference implementation of PPO, arXiv:1707.06347; not in the paper.
    Checked: one source, common implementations as read.

    Args:
      values: f32[...].
      returns: f32, broadcastable to `values`, with all its axes; no gradient.
      old_values: as `returns`: of the critic that made the returns.
      clip: unit of the values, positive. Needs `old_values`, and they need it.
      where: bool, broadcastable to `values`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; with a clip the metric `values/clipped`, 1 where it
      decides.

    Raises:
      ValueError: a shape does not fit, `clip` is not positive, or `old_values` and
        `clip` do not come together.
      TypeError: `values` is not floating-point or `where` is not boolean.

    >>> value_loss(jnp.array([2.0]), returns=1.0)[0].tolist()
    [0.5]
    """
    values, there = _read("values", values, where)
    returns = _read_beside("returns", returns, like=values, of="values")
    free = jnp.square(values - returns)
    if clip is None and old_values is None:
        return results(0.5 * free, {}, there)
    if clip is None or old_values is None:
        raise ValueError("`old_values` and `clip` belong together; got one of them.")
    checks.check_positive("clip", clip)
    old = _read_beside("old_values", old_values, like=values, of="values")
    bound = jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    clipped = bound > free
    loss = 0.5 * jnp.where(clipped, bound, free)
    return results(loss, {"values/clipped": clipped.astype(loss.dtype)}, there)


def kl_k1(log_ratios, *, where=None):
    """KL(policy || anchor) from a sample of the policy: unbiased, of either sign.

        k1 = log_ratios

    Its own gradient is the score function and has mean zero: a metric, or a term of the
    reward, not of a loss.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    Checked: against rlax 0.1.9, by summation over a distribution.

    Args:
      log_ratios: f32[...], nats: policy minus anchor, of what the policy sampled.
      where: bool, broadcastable to `log_ratios`. False: 0, gradient 0.

    Returns:
      f32[...], nats.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `log_ratios` is not floating-point or `where` is not boolean.

    >>> kl_k1(jnp.array([0.5, -0.25])).tolist()
    [0.5, -0.25]
    """
    return _read("log_ratios", log_ratios, where)[0]


def kl_k2(log_ratios, *, where=None):
    """KL(policy || anchor) from a sample: biased, with the right gradient.

        k2 = log_ratios^2 / 2

    Source: J. Schulman, "Approximating KL divergence" (2020).
    Checked: against rlax 0.1.9, by summation over a distribution.

    Args, returns and errors as `kl_k1`.

    >>> kl_k2(jnp.array([2.0])).tolist()
    [2.0]
    """
    return jnp.square(_read("log_ratios", log_ratios, where)[0]) / 2


def kl_k3(log_ratios, *, where=None):
    """KL(policy || anchor) from a sample: unbiased and never negative.

        k3 = exp(-log_ratios) - 1 + log_ratios

    Source: J. Schulman, "Approximating KL divergence" (2020); GRPO, arXiv:2402.03300,
    equation 4, adds it to the loss.
    Checked: against TRL 1.16.0 (GRPO) in value and gradient; against rlax 0.1.9, by
    summation over a distribution.

    Args, returns and errors as `kl_k1`.

    >>> round(float(kl_k3(jnp.array(1.0))), 4)
    0.3679
    """
    x, _ = _read("log_ratios", log_ratios, where)
    # Near 0 the terms cancel, in value and in slope. Not jnp.clip: it halves slopes.
    near = jnp.abs(x) < 1
    small = jnp.where(near, x, 0.0)
    series = jnp.square(small) * jnp.polyval(jnp.asarray(_SERIES, x.dtype), small)
    return jnp.where(near, series, exp_or_tangent(-x) - 1 + x)


def score_coefficients(scores, *, loss_fn):
    """First of two passes: how the loss of whole episodes moves with each score.

        coefficients = d sum(loss_fn(scores)) / d scores

    An episode whose steps are separate groups does not fit one batch. Score all steps
    without gradient, add them up to episode scores (`logps.episode_sum`), and take this
    derivative; then train each step on `coefficient_loss` with its episode's
    coefficient: by the chain the gradient is that of the loss itself, exactly.

    Source: the chain rule.
    Checked: against the gradient of `outcome_pairs_loss` in one pass.

    Args:
      scores: f32[..., N], of whole episodes, from parameters as they are.
      loss_fn: scores -> (loss, metrics), such as `outcome_pairs_loss` with its options.

    Returns:
      (coefficients, loss, metrics): f32[..., N] and what `loss_fn` returned, all
      without gradient.

    >>> def loss_fn(scores):
    ...     return -jax.nn.log_sigmoid(scores[0] - scores[1]), {}
    >>> coefficients, loss, _ = score_coefficients(jnp.zeros(2), loss_fn=loss_fn)
    >>> coefficients.tolist()
    [-0.5, 0.5]
    """

    def total(scores):
        loss, metrics = loss_fn(scores)
        return loss.sum(), (loss, metrics)

    scores = at_least_float32(scores)
    coefficients, (loss, metrics) = jax.grad(total, has_aux=True)(scores)
    return jax.lax.stop_gradient((coefficients, loss, metrics))


def coefficient_loss(logps, *, coefficients, where=None):
    """Second of two passes: a loss whose gradient is the coefficient times the logp's.

        loss = coefficients logps

    Its value means nothing. A train step divides by its weights: multiply the
    coefficients by their sum. Also the plain policy gradient, with minus the advantage
    as coefficient.

    Source: the chain rule; as a policy gradient: REINFORCE, Williams, 1992.
    Checked: with `score_coefficients`, against the gradient in one pass; as a policy
    gradient against rlax 0.1.9 in value and gradient.

    Args:
      logps: f32[...], of steps: whatever the episode scores are sums of.
      coefficients: f32, broadcastable to `logps`, of `score_coefficients`, times beta
        if scores are beta times log-ratios; no gradient.
      where: bool, broadcastable to `logps`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced: to be added up, not averaged; metrics: none.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `logps` is not floating-point or `where` is not boolean.

    >>> loss, _ = coefficient_loss(jnp.array([-2.0]), coefficients=jnp.array([0.5]))
    >>> loss.tolist()
    [-1.0]
    """
    logps, there = _read("logps", logps, where)
    coefficients = _read_beside("coefficients", coefficients, like=logps, of="logps")
    return results(coefficients * logps, {}, there)
