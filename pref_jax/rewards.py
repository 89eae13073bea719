"""How the policy and the anchor become one number per response or token.

`beta` scales here and nowhere else: losses see rewards that are already scaled.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.logps import (
    length_desensitized_weights,
    response_mean,
    response_sum,
    step_sum,
)
from pref_jax.numerics import at_least_float32, exp_or_tangent
from pref_jax.types import ResponseBatch, Scores


def implicit_reward(logps, *, anchor_logps, beta: float):
    """The reward for which the policy is the KL-regularised optimum.

        reward = beta * (logps - anchor_logps)

    Source: DPO, arXiv:2305.18290v3, section 4, equation 5, without the term that is
    the same for all responses of a prompt.
    Checked: against TRL 1.16.0 through `dpo_loss`.

    Args:
      logps: f32[...], nats, of responses or of tokens.
      anchor_logps: as `logps`. The caller stops its gradient.
      beta: reward per nat, positive.

    Returns:
      f32[...].

    Raises:
      ValueError: the shapes differ, or `beta` is not positive.
      TypeError: an argument is not floating-point.

    >>> import jax.numpy as jnp
    >>> logps, anchor_logps = jnp.array(-1.0), jnp.array(-3.0)
    >>> reward = implicit_reward(logps, anchor_logps=anchor_logps, beta=0.1)
    >>> round(float(reward), 4)
    0.2
    """
    checks.check_positive("beta", beta)
    return beta * _log_ratio(logps, anchor_logps)


def _log_ratio(logps, anchor_logps):
    for name, array in (("logps", logps), ("anchor_logps", anchor_logps)):
        checks.check_floating(name, array)
    checks.check_same_shape("anchor_logps", anchor_logps, like=logps, of="logps")
    # Widened first: two bfloat16 numbers that nearly cancel would leave nothing.
    return at_least_float32(logps) - anchor_logps


def _safe_log_ratio(logps, anchor_logps, where):
    """The log-ratio, 0 where dropped: for curved rewards."""
    ratio = _log_ratio(logps, anchor_logps)
    if where is None:
        return ratio
    checks.check_bool("where", where)
    checks.check_broadcast("where", where, to=ratio.shape, of="logps")
    return jnp.where(where, ratio, 0.0)


def forward_kl_reward(logps, *, anchor_logps, beta: float, where=None):
    """The implicit reward under KL(anchor || policy): it punishes what is forgotten.

        reward = beta (1 - exp(-(logps - anchor_logps)))

    With `logistic_loss` on it: f-DPO. The exponential is continued by its tangent
    above an exponent of 30.

    Source: f-DPO, arXiv:2309.16240, f'(u) = -1 / u, plus a constant that a
    pair cancels.
    Convention: TRL's `forward_kl`, whose constant is 1.
    Checked: with `logistic_loss` against TRL 1.16.0 (`forward_kl`) in value and
    gradient, below the tangent.

    Args:
      logps: f32[...], nats, of whole responses.
      anchor_logps: as `logps`. The caller stops its gradient.
      beta: positive.
      where: bool, broadcastable to `logps`. False: reward 0, gradient 0, whatever the
        entry holds (a NaN that only the loss drops would reach the gradient).

    Returns:
      f32[...], 0 where policy and anchor agree.

    Raises:
      ValueError: the shapes differ, `where` does not fit, or `beta` is not positive.
      TypeError: an argument is not floating-point, or `where` is not boolean.

    >>> logps, anchor_logps = jnp.array([0.0, -3.0]), jnp.array([0.0, -1.0])
    >>> rewards = forward_kl_reward(logps, anchor_logps=anchor_logps, beta=0.5)
    >>> [round(float(r), 4) for r in rewards]
    [0.0, -3.1945]
    """
    checks.check_positive("beta", beta)
    return beta * (1 - exp_or_tangent(-_safe_log_ratio(logps, anchor_logps, where)))


def jensen_shannon_reward(logps, *, anchor_logps, beta: float, where=None):
    """The implicit reward under the Jensen-Shannon divergence: at most beta log 2.

        reward = beta (log 2 + log sigmoid(logps - anchor_logps))

    With `logistic_loss` on it: f-DPO.

    Source: f-DPO, arXiv:2309.16240, f'(u) = log(2 u / (1 + u)).
    Convention: TRL's `js_divergence`.
    Checked: with `logistic_loss` against TRL 1.16.0 (`js_divergence`) in value and
    gradient.

    Args:
      logps: f32[...], nats, of whole responses.
      anchor_logps: as `logps`. The caller stops its gradient.
      beta: positive.
      where: as in `forward_kl_reward`.

    Returns:
      f32[...], 0 where policy and anchor agree.

    Raises:
      ValueError, TypeError: as `forward_kl_reward`.

    >>> rewards = jensen_shannon_reward(
    ...     jnp.array([0.0, 50.0]), anchor_logps=jnp.zeros(2), beta=1.0
    ... )
    >>> [round(float(r), 4) for r in rewards]
    [0.0, 0.6931]
    """
    checks.check_positive("beta", beta)
    ratio = _safe_log_ratio(logps, anchor_logps, where)
    return beta * (math.log(2) + jax.nn.log_sigmoid(ratio))


def alpha_divergence_reward(
    logps, *, anchor_logps, beta: float, alpha: float, where=None
):
    """The implicit reward under an alpha-divergence, between the two directions of KL.

        reward = beta (exp((alpha - 1) (logps - anchor_logps)) - 1) / (alpha - 1)

    alpha towards 1 is `implicit_reward` (reverse KL), alpha = 0 `forward_kl_reward`.
    With `logistic_loss` on it: f-DPO. The exponential is continued by its tangent
    above an exponent of 30.

    Source: f-DPO, arXiv:2309.16240, whose alpha is 1 minus this one and whose
    f' differs by a constant that a pair cancels.
    Convention: TRL's `alpha_divergence` with its `f_alpha_divergence_coef`, in (0, 1).
    Checked: with `logistic_loss` against TRL 1.16.0 (`alpha_divergence`) in value
    and gradient, below the tangent.

    Args:
      logps: f32[...], nats, of whole responses.
      anchor_logps: as `logps`. The caller stops its gradient.
      beta: positive.
      alpha: in [0, 1).
      where: as in `forward_kl_reward`.

    Returns:
      f32[...], 0 where policy and anchor agree.

    Raises:
      ValueError, TypeError: as `forward_kl_reward`; or `alpha` is out of range.

    >>> reward = alpha_divergence_reward(
    ...     jnp.array(-1.0), anchor_logps=jnp.array(-3.0), beta=0.1, alpha=0.5
    ... )
    >>> round(float(reward), 4)
    0.1264
    """
    checks.check_positive("beta", beta)
    if checks.is_known(alpha) and not 0 <= alpha < 1:
        raise ValueError(
            f"`alpha` must lie in [0, 1): at 1 the divergence is the reverse KL, "
            f"`implicit_reward`; got {alpha}."
        )
    ratio = _safe_log_ratio(logps, anchor_logps, where)
    return beta * (exp_or_tangent((alpha - 1) * ratio) - 1) / (alpha - 1)


def adaptive_beta(
    entropy_share,
    quality,
    *,
    beta: float,
    entropy_weight: float,
    quality_weight: float,
    low: float = 0.1,
    high: float = 5.0,
):
    """beta of each prompt: less where the policy is unsure, or its responses are poor.

        tau = (1 + a H + b (1 - H) (1 - R)) / beta,  cut to [low, high]
        a = `entropy_weight`, b = `quality_weight`; returns 1 / tau

    A larger tau makes the gradient smaller, and moves the optimum away from the anchor.

    Source: a text of ADPO's author later than arXiv:2510.18913v6, and his TRL trainer,
    whose cut this is (the equation's number is not verified).
    Convention: R is the caller's. The trainer scales the mean reward of a group by the
    least and the most of the batch, which makes a prompt's loss depend on the others.
    Checked: one source, the equation as quoted.

    Args:
      entropy_share: f32[...], H: mean entropy of a token over log V, in [0, 1].
      quality: as `entropy_share`: R, in [0, 1].
      beta: reward per nat where both terms are 0, positive.
      entropy_weight: 0 or more.
      quality_weight: 0 or more.
      low: least tau, positive.
      high: largest tau, at least `low`.

    Returns:
      f32[...], without gradient.

    Raises:
      ValueError: the shapes differ, or a number is out of range.
      TypeError: an argument is not floating-point.

    >>> import jax.numpy as jnp
    >>> entropy_share, quality = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
    >>> adaptive_beta(entropy_share, quality, beta=1.0, entropy_weight=1.0,
    ...               quality_weight=0.5).tolist()
    [1.0, 0.5]
    """
    checks.check_positive("beta", beta)
    checks.check_positive("low", low)
    checks.check_not_negative("entropy_weight", entropy_weight)
    checks.check_not_negative("quality_weight", quality_weight)
    checks.check_range("high", high, low=low, high=math.inf, why="not below `low`")
    for name, array in (("entropy_share", entropy_share), ("quality", quality)):
        checks.check_floating(name, array)
    checks.check_same_shape("quality", quality, like=entropy_share, of="entropy_share")
    unsure = at_least_float32(jax.lax.stop_gradient(entropy_share))
    poor = 1 - at_least_float32(jax.lax.stop_gradient(quality))
    tau = (1 + entropy_weight * unsure + quality_weight * (1 - unsure) * poor) / beta
    return 1 / jnp.clip(tau, low, high)


def step_rewards(token_rewards, *, step_ids, num_steps: int, where=None):
    """The reward of each step of a response: the sum over its tokens.

        reward[s] = sum of token_rewards[t] over t with step_ids[t] == s

    Source: OPRL, arXiv:2509.19199v1, equation 1, on token rewards
    beta (log pi_phi - log pi_old).
    Checked: one source, the paper's equation.

    Args:
      token_rewards: f32[..., T], as `implicit_reward` of token logps.
      step_ids: i32, broadcastable to `token_rewards`: 1..S, or 0 for a token of no
        step.
      num_steps: S.
      where: bool, broadcastable to `token_rewards`. False: the token does not count.

    Returns:
      f32[..., S]. If every token that counts has a step, they add up to the reward of
      the response.

    Raises:
      ValueError, TypeError: as `logps.step_sum`.

    >>> step_rewards(jnp.array([1.0, 2.0, 4.0]), step_ids=jnp.array([1, 1, 2]),
    ...              num_steps=2).tolist()
    [3.0, 4.0]
    """
    return step_sum(token_rewards, step_ids=step_ids, num_steps=num_steps, where=where)


def denoising_error(prediction, *, target):
    """How far a prediction of the noise is off: the mean square over an image.

        error = mean over height, width and channels of (prediction - target)^2

    Source: DDPM, arXiv:2006.11239, equation 14, as a mean.
    Convention: the mean, as in the code of Diffusion-DPO and Diffusion-DRO, whose
    papers print sums: beta and thresholds belong to it.
    Checked: one source, the paper's equation.

    Args:
      prediction: [..., H, W, C], of the noise, in any floating-point type.
      target: as `prediction`: the noise that was added, or that a policy predicted; no
        gradient.

    Returns:
      f32[...], computed in float32.

    Raises:
      ValueError: the shapes differ, or there are fewer than three axes.
      TypeError: an array is not floating-point.

    >>> error = denoising_error(jnp.ones((2, 8, 8, 1)), target=jnp.zeros((2, 8, 8, 1)))
    >>> error.tolist()
    [1.0, 1.0]
    """
    for name, array in (("prediction", prediction), ("target", target)):
        checks.check_floating(name, array)
    checks.check_same_shape("target", target, like=prediction, of="prediction")
    if jnp.ndim(prediction) < 3:
        raise ValueError(
            f"`prediction` needs the shape [..., H, W, C]; got "
            f"{checks.describe(prediction)}."
        )
    target = at_least_float32(jax.lax.stop_gradient(target))
    return jnp.square(at_least_float32(prediction) - target).mean((-3, -2, -1))


def denoising_reward(error, *, anchor_error, beta: float):
    """The implicit reward of a denoiser: how much less it errs than the anchor.

        reward = beta (anchor_error - error)

    in place of beta times a log-ratio, which a diffusion model only bounds.

    Source: Diffusion-DPO, arXiv:2311.12908, equation 14 (the number is not verified);
    Diffusion-DRO, arXiv:2510.18353, equation 12, with beta 1.
    Convention: the weight of the time step, the number of steps and the dimension are
    left in beta, as in the released codes.
    Checked: two sources, the papers and the authors' code as read; no outside value.

    Args:
      error: f32[...], of `denoising_error`.
      anchor_error: as `error`, of the anchor on the same noised images. The caller
        stops its gradient.
      beta: reward per unit of the error, positive.

    Returns:
      f32[...].

    Raises:
      ValueError: the shapes differ, or `beta` is not positive.
      TypeError: an argument is not floating-point.

    >>> error, anchor_error = jnp.array(0.25), jnp.array(1.0)
    >>> float(denoising_reward(error, anchor_error=anchor_error, beta=2.0))
    1.5
    """
    checks.check_positive("beta", beta)
    for name, array in (("error", error), ("anchor_error", anchor_error)):
        checks.check_floating(name, array)
    checks.check_same_shape("anchor_error", anchor_error, like=error, of="error")
    return beta * (at_least_float32(anchor_error) - at_least_float32(error))


def token_reward(
    scores: Scores, anchor_scores: Scores, batch: ResponseBatch, *, beta: float
):
    """Implicit reward of each token, 0 where the mask has none: f32[B, K, T]."""
    rewards = implicit_reward(scores.logp, anchor_logps=anchor_scores.logp, beta=beta)
    return jnp.where(batch.loss_mask, rewards, 0.0)


def sequence_reward(
    scores: Scores, anchor_scores: Scores, batch: ResponseBatch, *, beta: float
):
    """Implicit reward of each response: the `reward` of DPO and its family.

    The difference is taken token by token and then summed: two long sums that nearly
    cancel would lose what a stored anchor's rounding leaves.

    Returns:
      f32[B, K].
    """
    return token_reward(scores, anchor_scores, batch, beta=beta).sum(-1)


def step_reward(
    scores: Scores,
    anchor_scores: Scores,
    batch: ResponseBatch,
    *,
    beta: float,
    num_steps: int,
):
    """Implicit reward of each step, by `batch.step_ids`: f32[B, K, S].

    Raises:
      ValueError: the batch has no step ids.
    """
    if batch.step_ids is None:
        raise ValueError(
            "`step_reward` needs `batch.step_ids`; the batch has none. Build the "
            "groups with `step_ids`."
        )
    rewards = token_reward(scores, anchor_scores, batch, beta=beta)
    return step_rewards(rewards, step_ids=batch.step_ids, num_steps=num_steps)


def length_normalized_reward(
    scores: Scores, anchor_scores: Scores, batch: ResponseBatch, *, beta: float
):
    """beta times the mean log-ratio of a token: f32[B, K].

    The anchor may give token logps or, as `anchors.fused` does, one mean logp a
    response.
    """
    mean = response_mean(scores.logp, where=batch.loss_mask)
    anchor = anchor_scores.mean_logp
    if anchor is None:
        anchor = response_mean(anchor_scores.logp, where=batch.loss_mask)
    return implicit_reward(mean, anchor_logps=anchor, beta=beta)


def length_desensitized_reward(
    scores: Scores,
    anchor_scores: Scores,
    batch: ResponseBatch,
    *,
    beta: float,
    alpha: float,
):
    """LD-DPO: tokens beyond the shorter response count alpha, on both sides: f32[B, 2].

    Source: LD-DPO, arXiv:2409.06411, equations 8 to 11. Whether the paper weights the
    anchor too is not verified; TRL 1.16 does.
    Reduces to: `sequence_reward` at alpha = 1.
    """
    weights = length_desensitized_weights(batch.loss_mask, alpha=alpha)
    rewards = token_reward(scores, anchor_scores, batch, beta=beta)
    return response_sum(rewards, where=batch.loss_mask, weights=weights)


def length_desensitized_policy_reward(
    scores: Scores,
    anchor_scores: Scores,
    batch: ResponseBatch,
    *,
    beta: float,
    alpha: float,
):
    """LD-DPO with the policy alone weighted: another, stronger penalty: f32[B, 2].

    At the start the reward of the longer response is not 0 but
    beta (1 - alpha) |log pi_ref(its tail)|.

    Source: the form of TRL 0.19 to 0.25 and LLaMA-Factory, without their error in where
    tokens are counted from.
    Reduces to: `sequence_reward` at alpha = 1.
    """
    where = batch.loss_mask
    weights = length_desensitized_weights(where, alpha=alpha)
    policy = response_sum(scores.logp, where=where, weights=weights)
    anchor = response_sum(anchor_scores.logp, where=where)
    return implicit_reward(policy, anchor_logps=anchor, beta=beta)


def explicit_reward(scores: Scores, anchor_scores: Scores, batch: ResponseBatch):
    """A reward head's number for each response, without anchor or beta: f32[B, K].

    Source: DPORM against EXRM, arXiv:2409.03650, its explicit reward model.

    Raises:
      ValueError: the method's `score` filled no `value`.
    """
    del anchor_scores, batch
    if scores.value is None:
        raise ValueError(
            "`explicit_reward` needs `scores.value`; got None. Give the method a "
            "`score` that runs a reward head."
        )
    return scores.value


def log_likelihood(scores: Scores, anchor_scores: Scores, batch: ResponseBatch):
    """The policy's token logps, without an anchor: the `reward` of plain SFT.

    Returns:
      f32[B, K, T].
    """
    del anchor_scores, batch
    return scores.logp
