"""Losses of a pair of responses: chosen in slot 0, rejected in slot 1.

Most see rewards that are already scaled by beta (`pref_jax.rewards`). IPO and SPPO are
no function of beta times the log-ratio: they take unscaled `log_ratios` and beta. Those
named after a paper take log-probabilities and are compositions of the others.

    h      the margin rewards[..., 0] - rewards[..., 1]
    s(x)   sigmoid(x)
    [w]    of the chosen response, slot 0
    [l]    of the rejected response, slot 1
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import (
    LISTWISE,
    pair_metrics,
    read_constant,
    read_lengths,
    read_pair,
    results,
)
from pref_jax.rewards import implicit_reward
from pref_jax.types import CHOSEN, REJECTED


def _margin(rewards):
    return rewards[..., CHOSEN] - rewards[..., REJECTED]


def _check_flips(name: str, value: float) -> None:
    why = "the share of flipped labels; above one half the labels are inverted"
    checks.check_range(name, value, low=0.0, high=0.5, why=why)


def logistic_loss(
    rewards,
    *,
    label_smoothing: float = 0.0,
    margin=None,
    where=None,
):
    """Maximum likelihood of a preference under the Bradley-Terry model.

        loss = -(1 - e) log s(h - m) - e log s(-(h - m))

    with e = `label_smoothing`, the probability that a label is flipped (cDPO), and m =
    `margin`, by how much the chosen response should win.

    Source: DPO, arXiv:2305.18290v3, equation 7; smoothing: E. Mitchell, "A note on DPO
    with noisy preferences and relationship to IPO" (2023), equation 3; margin: Llama 2,
    arXiv:2307.09288, section 3.2.2, and DPO with an offset, arXiv:2402.10571 (the
    numbers of the last three are not verified).
    Convention: smoothing is cDPO's, as in Tunix, EasyDeL and OpenRLHF; the unbiased
    form is `robust_loss`. TRL's `sigmoid` takes a label_smoothing and ignores it.
    Reduces to: DPO on implicit rewards, a reward model's loss on explicit ones.
    Checked: against TRL 1.16.0 (`sigmoid`; its reward trainer for `margin`) in
    value and gradient; values of Tunix for smoothing.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta. Chosen in slot 0.
      label_smoothing: in [0, 0.5].
      margin: f32, broadcastable to [...], nats. None: 0.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      loss, f32[...], not reduced; metrics `rewards/chosen`, `rewards/rejected`,
      `rewards/margin`, `rewards/accuracy` (a tie counts one half), each f32[...] and
      without `margin`.

    Raises:
      ValueError: the last axis is not 2, `label_smoothing` is out of range, or `margin`
        or `where` does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> loss, metrics = logistic_loss(jnp.array([1.0, 0.0]))
    >>> round(float(loss), 4), float(metrics["rewards/accuracy"])
    (0.3133, 1.0)
    """
    _check_flips("label_smoothing", label_smoothing)
    rewards, where = read_pair("rewards", rewards, where)
    h = _margin(rewards)
    if margin is not None:
        h -= read_constant("margin", margin, like=h, of="rewards[..., 0]")
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(h)
    loss -= label_smoothing * jax.nn.log_sigmoid(-h)
    return results(loss, pair_metrics(rewards), where)


def robust_loss(rewards, *, flip_rate: float, where=None):
    """The logistic loss, unbiased although a known share of the labels is flipped.

        loss = (-(1 - e) log s(h) + e log s(-h)) / (1 - 2 e),  e = `flip_rate`

    Its mean over flipped and unflipped labels is the logistic loss of the true ones. It
    is not bounded below.

    Source: Provably Robust DPO, arXiv:2403.00409, section 3.1, equation 12 (the number
    is not verified).
    Reduces to: `logistic_loss` at a rate of 0.
    Checked: against TRL 1.16.0 (`robust`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      flip_rate: in [0, 0.5), the share of flipped labels.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `flip_rate` is out of range.

    >>> loss, _ = robust_loss(jnp.array([1.0, 0.0]), flip_rate=0.1)
    >>> round(float(loss), 4)
    0.1883
    """
    if checks.is_known(flip_rate) and not 0 <= flip_rate < 0.5:
        raise ValueError(
            f"`flip_rate` must lie in [0, 0.5): at one half labels say nothing; got "
            f"{flip_rate}."
        )
    rewards, where = read_pair("rewards", rewards, where)
    h = _margin(rewards)
    kept, flipped = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    loss = (flip_rate * flipped - (1 - flip_rate) * kept) / (1 - 2 * flip_rate)
    return results(loss, pair_metrics(rewards), where)


def ipo_loss(log_ratios, *, beta: float, where=None):
    """Regression of the log-ratio margin on a constant: labels may be deterministic.

        loss = (log_ratios[w] - log_ratios[l] - 1 / (2 beta))^2

    Source: IPO, arXiv:2310.12036v2, equation 17, whose tau is `beta`.
    Convention: the caller chooses. Mean log-ratios of a token are what the authors used
    and what TRL does; sums are what the equation says and torchtune did.
    Checked: against TRL 1.16.0 (`ipo`, on means) in value and gradient.

    Args:
      log_ratios: f32[..., 2], nats, NOT scaled by beta: policy minus anchor.
      beta: positive.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`; the rewards of the metrics are beta * log_ratios.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `beta` is not positive.

    >>> loss, _ = ipo_loss(jnp.array([3.0, 0.0]), beta=0.1)
    >>> float(loss)
    4.0
    """
    checks.check_positive("beta", beta)
    log_ratios, where = read_pair("log_ratios", log_ratios, where)
    loss = jnp.square(_margin(log_ratios) - 1 / (2 * beta))
    return results(loss, pair_metrics(beta * log_ratios), where)


def hinge_loss(rewards, *, margin: float, where=None):
    """Zero once chosen beats rejected by `margin`, linear before.

        loss = max(0, margin - h)

    A tie of the two has gradient 0.

    Source: SLiC-HF, arXiv:2305.10425v1, equation 1, on implicit rewards: RSO,
    arXiv:2309.06657v2, section 3.2 (the numbers are not verified).
    Checked: against TRL 1.16.0 (`hinge`) in value and gradient; values of
    torchtune's RSO.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta. Same unit as `margin`.
      margin: non-negative. TRL and the RSO paper take 1.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `margin` is negative.

    >>> loss, _ = hinge_loss(jnp.array([1.0, 0.5]), margin=1.0)
    >>> float(loss)
    0.5
    """
    checks.check_not_negative("margin", margin)
    rewards, where = read_pair("rewards", rewards, where)
    loss = jax.nn.relu(margin - _margin(rewards))
    return results(loss, pair_metrics(rewards), where)


def thresholded_loss(rewards, *, threshold: float, where=None):
    """The negated margin, not followed below a threshold.

        loss = max(threshold, -h)

    A tie of the two has gradient 0.

    Source: Diffusion-DRO, arXiv:2510.18353, equation 15, rewards being minus mean
    squared denoising errors relative to the reference, and the threshold -0.001.
    Convention: the authors' code logs this loss plus 0.001.
    Reduces to: `hinge_loss` less its margin, at a threshold of minus that margin: the
    same gradient.
    Checked: two sources, the paper and the authors' code as read; no outside value.

    Args:
      rewards: f32[..., 2]. Expert in slot 0. Same unit as `threshold`.
      threshold: a number; -inf never holds the gradient back.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `threshold` is NaN or inf.

    >>> rewards = jnp.array([[0.5, 0.0], [0.0, 0.5]])
    >>> thresholded_loss(rewards, threshold=-0.25)[0].tolist()
    [-0.25, 0.5]
    """
    if checks.is_known(threshold) and not threshold < math.inf:
        raise ValueError(f"`threshold` must be a number or -inf; got {threshold}.")
    rewards, where = read_pair("rewards", rewards, where)
    gap = -_margin(rewards)
    # Not jnp.maximum: it splits the gradient of a tie in halves. A NaN stays.
    loss = jnp.where(gap <= threshold, threshold, gap)
    return results(loss, pair_metrics(rewards), where)


def length_regularized_loss(rewards, *, lengths, alpha: float, where=None):
    """R-DPO: the logistic loss, with what length alone explains taken out.

        loss = -log s(h + alpha (lengths[w] - lengths[l]))

    The policy that minimises it is optimal for the reward less alpha per token.

    Source: R-DPO, arXiv:2403.19159, section 3 (the equation's number is not verified).
    Reduces to: `logistic_loss` at alpha = 0, and at equal lengths.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      lengths: [..., 2], tokens of each response; no gradient.
      alpha: nats per token, non-negative.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `lengths` does not fit, or `alpha`
        is negative.

    >>> loss, _ = length_regularized_loss(
    ...     jnp.array([1.0, 0.0]), lengths=jnp.array([10, 30]), alpha=0.05
    ... )
    >>> round(float(loss), 4)
    0.6931
    """
    checks.check_not_negative("alpha", alpha)
    rewards, where = read_pair("rewards", rewards, where)
    lengths = read_constant("lengths", lengths, like=rewards, of="rewards")
    loss = -jax.nn.log_sigmoid(_margin(rewards) + alpha * _margin(lengths))
    return results(loss, pair_metrics(rewards), where)


def reward_aware_loss(rewards, *, grades, eta: float, where=None):
    """Fits the margin to that of grades, instead of pushing it up without end.

        loss = KL( s(eta (grades[w] - grades[l])) || s(h) )

    the divergence between two distributions over which response is better.

    Source: Reward-aware preference optimisation, Nemotron-4 340B, arXiv:2406.11704,
    section 3.3.2, with the distance of its equation 1 (the numbers are not verified).
    Reduces to: `logistic_loss` as eta grows, if the chosen response has the better
    grade.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      grades: [..., 2], of a reward model or judge; no gradient.
      eta: nats per unit of the grades, positive.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`; the loss is 0 where the two margins agree.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `grades` does not fit, or `eta` is
        not positive.

    >>> rewards = jnp.array([2.0, 0.5])
    >>> loss, _ = reward_aware_loss(rewards, grades=jnp.array([4.0, 1.0]), eta=0.5)
    >>> abs(round(float(loss), 6))
    0.0
    """
    checks.check_positive("eta", eta)
    rewards, where = read_pair("rewards", rewards, where)
    grades = read_constant("grades", grades, like=rewards, of="rewards")
    h, target = _margin(rewards), eta * _margin(grades)
    p, q = jax.nn.sigmoid(target), jax.nn.sigmoid(-target)
    loss = p * (jax.nn.log_sigmoid(target) - jax.nn.log_sigmoid(h))
    loss += q * (jax.nn.log_sigmoid(-target) - jax.nn.log_sigmoid(-h))
    return results(loss, pair_metrics(rewards), where)


def nca_loss(rewards, *, where=None):
    """Noise-contrastive alignment: raises the chosen reward itself, not the margin.

        loss = -log s(rewards[w]) - 1/2 log s(-rewards[w]) - 1/2 log s(-rewards[l])

    Source: NCA, arXiv:2402.05369, table 2, for two responses (number not verified).
    Checked: against TRL 1.16.0 (`nca_pair`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`.

    >>> loss, _ = nca_loss(jnp.zeros(2))
    >>> round(float(loss), 4)
    1.3863
    """
    rewards, where = read_pair("rewards", rewards, where)
    loss = -jax.nn.log_sigmoid(rewards[..., CHOSEN])
    loss -= 0.5 * jax.nn.log_sigmoid(-rewards).sum(-1)
    return results(loss, pair_metrics(rewards), where)


def apo_zero_loss(rewards, *, where=None):
    """Raises the chosen and lowers the rejected: for chosen better than the policy's.

        loss = 1 - s(rewards[w]) + s(rewards[l])

    Source: APO, arXiv:2408.06266, equation 7.
    Checked: against TRL 1.16.0 (`apo_zero`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`.

    >>> loss, _ = apo_zero_loss(jnp.zeros(2))
    >>> float(loss)
    1.0
    """
    rewards, where = read_pair("rewards", rewards, where)
    loss = jax.nn.sigmoid(-rewards[..., CHOSEN]) + jax.nn.sigmoid(
        rewards[..., REJECTED]
    )
    return results(loss, pair_metrics(rewards), where)


def apo_down_loss(rewards, *, where=None):
    """Lowers both, the rejected more: for chosen that is worse than the policy's.

        loss = s(rewards[w]) + 1 - s(h)

    Source: APO, arXiv:2408.06266, equation 8.
    Checked: against TRL 1.16.0 (`apo_down`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`.

    >>> loss, _ = apo_down_loss(jnp.zeros(2))
    >>> float(loss)
    1.0
    """
    rewards, where = read_pair("rewards", rewards, where)
    loss = jax.nn.sigmoid(rewards[..., CHOSEN]) + jax.nn.sigmoid(-_margin(rewards))
    return results(loss, pair_metrics(rewards), where)


def exo_loss(rewards, *, label_smoothing: float, where=None):
    """Reverse KL from the policy's preference to the smoothed label.

        loss = s(h) (log s(h) - log(1 - e)) + s(-h) (log s(-h) - log e)

    with e = `label_smoothing`. It is 0 at h = log((1 - e) / e), not at infinity.

    Source: EXO, arXiv:2402.00856, equation 16.
    Checked: against TRL 1.16.0 (`exo_pair`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      label_smoothing: in (0, 0.5]. At 0 the divergence is infinite; TRL
        recommends 0.001 there.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`.

    >>> loss, _ = exo_loss(jnp.array([math.log(9), 0.0]), label_smoothing=0.1)
    >>> abs(round(float(loss), 6))
    0.0
    """
    _check_flips("label_smoothing", label_smoothing)
    if checks.is_known(label_smoothing) and label_smoothing == 0:
        raise ValueError(
            "`label_smoothing` must be positive: the divergence from a hard label is "
            "infinite; got 0. The paper's experiments take 0.001."
        )
    rewards, where = read_pair("rewards", rewards, where)
    h = _margin(rewards)
    log_p, log_q = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    loss = jnp.exp(log_p) * (log_p - jnp.log1p(-label_smoothing))
    loss += jnp.exp(log_q) * (log_q - jnp.log(label_smoothing))
    return results(loss, pair_metrics(rewards), where)


def sppo_loss(log_ratios, *, beta: float, win_rates=(1.0, 0.0), where=None):
    """Self-play: regression of each log-ratio on its response's rate of winning.

        loss = sum over w, l of (log_ratios - (win_rates - 1/2) / beta)^2

    Source: SPPO, arXiv:2405.00675, equation 4.7, with eta = 1 / beta.
    Convention: the default takes the label as the win rate, TRL's `sppo_hard`.
    Checked: against TRL 1.16.0 (`sppo_hard`) in value and gradient, for the
    default.

    Args:
      log_ratios: f32[..., 2], nats, NOT scaled by beta: policy minus anchor.
      beta: positive.
      win_rates: [..., 2], the probability that each response beats one of the policy;
        no gradient.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`; the rewards of the metrics are beta * log_ratios.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `win_rates` does not fit, or `beta`
        is not positive.

    >>> loss, _ = sppo_loss(jnp.array([4.0, -5.0]), beta=0.1)
    >>> float(loss)
    1.0
    """
    checks.check_positive("beta", beta)
    log_ratios, where = read_pair("log_ratios", log_ratios, where)
    win_rates = read_constant("win_rates", win_rates, like=log_ratios, of="log_ratios")
    loss = jnp.square(log_ratios - (win_rates - 0.5) / beta).sum(-1)
    return results(loss, pair_metrics(beta * log_ratios), where)


def discopop_loss(rewards, *, tau: float, where=None):
    """A loss that a language model discovered: logistic where lost, exponential else.

        g = s(h / tau);   loss = (1 - g) (-log s(h)) + g exp(-h)

    Source: DiscoPOP, arXiv:2406.08414, equation 5.
    Convention: tau is 0.05 in the paper and TRL, 1.0 in some libraries.
    Checked: against TRL 1.16.0 (`discopop`) in value and gradient.

    Args:
      rewards: f32[..., 2], nats; already scaled by beta.
      tau: in (0, 1]. Above 1 the loss is exponential in -h.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `tau` is out of range.

    >>> loss, _ = discopop_loss(jnp.zeros(2), tau=0.05)
    >>> round(float(loss), 4)
    0.8466
    """
    checks.check_positive("tau", tau)
    checks.check_range("tau", tau, low=0.0, high=1.0, why="above 1 it overflows")
    rewards, where = read_pair("rewards", rewards, where)
    h = _margin(rewards)
    loss = -jax.nn.sigmoid(-h / tau) * jax.nn.log_sigmoid(h)
    # One exponent: s(h / tau) is 0 where exp(-h) is infinite.
    loss += jnp.exp(jax.nn.log_sigmoid(h / tau) - h)
    return results(loss, pair_metrics(rewards), where)


def dpo_loss(
    logps,
    *,
    anchor_logps,
    beta: float,
    label_smoothing: float = 0.0,
    where=None,
):
    """Direct preference optimisation: `implicit_reward`, then `logistic_loss`.

        loss = -log s(beta (logps[w] - anchor_logps[w])
                      - beta (logps[l] - anchor_logps[l]))

    Source: DPO, arXiv:2305.18290v3, equation 7.
    Convention: log-probabilities are summed over the response, as in all libraries but
    open-instruct, whose default is `length_normalized_dpo_loss`.
    Checked: against TRL 1.16.0 (`sigmoid`) in value and gradient; values of Tunix
    and torchtune.

    Args:
      logps: f32[..., 2], nats: the policy's log-probability of each response, summed
        over its tokens. Chosen in slot 0.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      beta: reward per nat, positive.
      label_smoothing: as in `logistic_loss`.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `implicit_reward` and `logistic_loss`.

    >>> same = jnp.array([[-4.0, -6.0]])
    >>> loss, _ = dpo_loss(same, anchor_logps=same, beta=0.1)
    >>> round(float(loss[0]), 6)
    0.693147
    """
    checks.check_pair("logps", logps, use_instead=LISTWISE)
    rewards = implicit_reward(
        logps, anchor_logps=jax.lax.stop_gradient(anchor_logps), beta=beta
    )
    return logistic_loss(rewards, label_smoothing=label_smoothing, where=where)


def length_normalized_dpo_loss(
    logps,
    *,
    anchor_logps,
    lengths,
    beta: float,
    label_smoothing: float = 0.0,
    where=None,
):
    """DPO on log-ratios of a token: long and short responses weigh alike.

        loss = -log s(beta ((logps[w] - anchor_logps[w]) / lengths[w]
                            - (logps[l] - anchor_logps[l]) / lengths[l]))

    Source: Tulu 3, arXiv:2411.15124, section 5.1.1, the equation of its
    length-normalised DPO (the section's number is not verified).
    Convention: TRL's `sigmoid_norm`, the default of open-instruct. Its beta is larger
    than DPO's by about a response's length.
    Reduces to: `dpo_loss` of beta / n where all lengths are n.
    Checked: against TRL 1.16.0 (`sigmoid_norm`) in value and gradient.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      lengths: [..., 2], tokens of each response, at least 1.
      beta: reward per nat of a token, positive.
      label_smoothing: as in `logistic_loss`.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `dpo_loss`; or `lengths` does not fit.

    >>> loss, _ = length_normalized_dpo_loss(
    ...     jnp.array([-4.0, -9.0]), anchor_logps=jnp.array([-6.0, -6.0]),
    ...     lengths=jnp.array([2, 3]), beta=0.5,
    ... )
    >>> round(float(loss), 4)
    0.3133
    """
    rewards = implicit_reward(
        logps, anchor_logps=jax.lax.stop_gradient(anchor_logps), beta=beta
    )
    rewards, where = read_pair("logps", rewards, where)
    rewards /= read_lengths(lengths, like=rewards, of="logps")
    return logistic_loss(rewards, label_smoothing=label_smoothing, where=where)


def rpo_loss(
    logps,
    *,
    anchor_logps,
    lengths,
    beta: float,
    alpha: float,
    where=None,
):
    """DPO and the likelihood of the chosen response, which DPO alone may lower.

        loss = dpo_loss + alpha (-logps[w] / lengths[w])

    Source: Iterative reasoning preference optimisation, arXiv:2404.19733, equation 1.
    Convention: one of three methods called RPO; this is the `rpo_alpha` of earlier TRL.
    The likelihood is a mean over the tokens of each response; TRL's `sigmoid` with
    `sft` takes the mean over the tokens of a batch.
    Reduces to: `dpo_loss` at alpha = 0.
    Checked: against TRL 1.16.0 (`sigmoid` and `sft`) in value and gradient, at equal
    lengths.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      lengths: [..., 2], tokens of each response, at least 1.
      beta: reward per nat, positive.
      alpha: weight of the likelihood, non-negative.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`, and the metrics `loss/preference` and `loss/nll`, the two
      terms before alpha.

    Raises:
      ValueError, TypeError: as `dpo_loss`; or `lengths` does not fit, or `alpha` is
        negative.

    >>> same = jnp.array([-4.0, -6.0])
    >>> loss, metrics = rpo_loss(
    ...     same, anchor_logps=same, lengths=jnp.array([8, 8]), beta=0.1, alpha=1.0
    ... )
    >>> round(float(loss), 4), float(metrics["loss/nll"])
    (1.1931, 0.5)
    """
    checks.check_not_negative("alpha", alpha)
    preference, metrics = dpo_loss(
        logps, anchor_logps=anchor_logps, beta=beta, where=where
    )
    logps, where = read_pair("logps", logps, where)
    lengths = read_lengths(lengths, like=logps, of="logps")
    nll = -logps[..., CHOSEN] / lengths[..., CHOSEN]
    metrics |= {"loss/preference": preference, "loss/nll": nll}
    return results(preference + alpha * nll, metrics, where)


def xpo_loss(
    logps,
    *,
    anchor_logps,
    explore,
    beta: float,
    alpha: float,
    where=None,
):
    """Online DPO that is optimistic: it lowers what the exploration sampler produced.

        loss = dpo_loss + alpha sum over slots k with explore[k] of logps[k]

    The sign is plus whether that response won or lost. Without a bound on the log-ratio
    the loss has no minimum: alpha is small, and steps are few.

    Source: XPO, arXiv:2405.21046, algorithm 1 (its objective for one round).
    Convention: as earlier TRL and oat, the bonus is on the sampled response alone,
    summed over its tokens. oat drops pairs of equal responses (`where`), TRL kept their
    bonus.
    Reduces to: `dpo_loss` at alpha = 0.
    Checked: one source, the paper's objective; TRL and oat agree in form, as read.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response.
      anchor_logps: as `logps`, of the reference. No gradient reaches it.
      explore: bool[..., 2]. True: this response was drawn by the exploration sampler,
        as a rule the reference.
      beta: reward per nat, positive.
      alpha: weight of the bonus per nat, non-negative.
      where: as in `logistic_loss`.

    Returns:
      As `logistic_loss`, and the metrics `loss/preference` and `loss/bonus`, the two
      terms before alpha.

    Raises:
      ValueError, TypeError: as `dpo_loss`; or `explore` is not boolean or does not fit,
        or `alpha` is negative.

    >>> same = jnp.array([-4.0, -6.0])
    >>> loss, metrics = xpo_loss(
    ...     same, anchor_logps=same, explore=jnp.array([False, True]), beta=0.1,
    ...     alpha=0.01,
    ... )
    >>> round(float(loss), 4), float(metrics["loss/bonus"])
    (0.6331, -6.0)
    """
    checks.check_not_negative("alpha", alpha)
    preference, metrics = dpo_loss(
        logps, anchor_logps=anchor_logps, beta=beta, where=where
    )
    logps, where = read_pair("logps", logps, where)
    checks.check_bool("explore", explore)
    checks.check_broadcast("explore", explore, to=logps.shape, of="logps")
    bonus = jnp.where(jnp.broadcast_to(explore, logps.shape), logps, 0.0).sum(-1)
    metrics |= {"loss/preference": preference, "loss/bonus": bonus}
    return results(preference + alpha * bonus, metrics, where)
