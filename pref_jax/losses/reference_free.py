"""Losses of a pair that need no anchor: the policy's own log-probabilities are enough.

s(x)   sigmoid(x)
[w]    of the chosen response, slot 0
[l]    of the rejected response, slot 1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import pair_metrics, read_lengths, read_pair, results
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.types import CHOSEN, REJECTED

_LOG_ODDS_CAP = -1e-7  # nats; the odds of a certain response are infinite


def simpo_loss(
    logps,
    *,
    lengths,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    where=None,
):
    """The mean log-probability of a token is the reward, and must win by a margin.

        loss = -log s(beta logps[w] / lengths[w] - beta logps[l] / lengths[l] - gamma)

    Source: SimPO, arXiv:2405.14734, equation 6 (the number is not verified).
    Convention: gamma stands outside beta, as in the paper. Where a library takes the
    ratio gamma / beta, multiply it by beta.
    Reduces to: `logistic_loss` with `margin` = gamma on beta times the mean logps.
    Checked: against TRL 1.16.0 (its CPO trainer, `simpo`) in value and gradient.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response. Chosen in
        slot 0.
      lengths: [..., 2], tokens of each response, at least 1; no gradient.
      beta: reward per nat of a token, positive.
      gamma: nats, 0 or more.
      label_smoothing: as in `logistic_loss`.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      As `logistic_loss`; the rewards of the metrics are beta * logps / lengths.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `lengths` does not fit, `beta` is
        not positive or `gamma` is negative.

    >>> loss, _ = simpo_loss(
    ...     jnp.array([-2.0, -8.0]), lengths=jnp.array([2, 4]), beta=2.0, gamma=1.0
    ... )
    >>> round(float(loss), 4)
    0.3133
    """
    checks.check_positive("beta", beta)
    checks.check_not_negative("gamma", gamma)
    logps, where = read_pair("logps", logps, where)
    lengths = read_lengths(lengths, like=logps, of="logps")
    return logistic_loss(
        beta * logps / lengths,
        margin=gamma,
        label_smoothing=label_smoothing,
        where=where,
    )


def orpo_loss(logps, *, lengths, lambda_: float, where=None):
    """Likelihood of the chosen response, and the odds ratio of the two.

        p    = exp(logps / lengths),  odds = p / (1 - p)
        loss = -log p[w] + lambda_ (-log s(log odds[w] - log odds[l]))

    A mean log-probability above -1e-7 counts as -1e-7 in the odds, which are infinite
    at 0.

    Source: ORPO, arXiv:2403.07691, equations 6 and 7 (the first is not verified).
    Convention: the likelihood is a mean over the tokens of the response. TRL's is one
    over those of the batch, the prompt's included; earlier Tunix took sums.
    Reduces to: the mean likelihood of the chosen response at lambda_ = 0.
    Checked: the odds ratio against TRL 1.16.0 in value and gradient; values of
    Tunix for both terms.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response. Chosen in
        slot 0.
      lengths: [..., 2], tokens of each response, at least 1; no gradient.
      lambda_: weight of the odds ratio, 0 or more.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      loss, f32[...], not reduced; the metrics of a pair, whose rewards are the log
      odds, and `loss/nll` and `loss/odds_ratio`, the two terms before lambda_.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `lengths` does not fit, or `lambda_`
        is negative.

    >>> loss, metrics = orpo_loss(
    ...     jnp.array([-1.0, -1.0]), lengths=jnp.array([2, 2]), lambda_=0.1
    ... )
    >>> round(float(loss), 4), round(float(metrics["loss/odds_ratio"]), 4)
    (0.5693, 0.6931)
    """
    checks.check_not_negative("lambda_", lambda_)
    logps, where = read_pair("logps", logps, where)
    mean = logps / read_lengths(lengths, like=logps, of="logps")
    capped = jnp.minimum(mean, _LOG_ODDS_CAP)
    log_odds = capped - jnp.log(-jnp.expm1(capped))
    nll = -mean[..., CHOSEN]
    odds_ratio = -jax.nn.log_sigmoid(log_odds[..., CHOSEN] - log_odds[..., REJECTED])
    metrics = pair_metrics(log_odds)
    metrics |= {"loss/nll": nll, "loss/odds_ratio": odds_ratio}
    return results(nll + lambda_ * odds_ratio, metrics, where)


def cpo_loss(
    logps, *, beta: float, alpha: float, label_smoothing: float = 0.0, where=None
):
    """DPO against a uniform reference, and the likelihood of the chosen response.

        loss = -log s(beta logps[w] - beta logps[l]) + alpha (-logps[w])

    Source: CPO, arXiv:2401.08417, equations 3 to 5, where alpha is 1 (only the first
    number is verified).
    Convention: the likelihood is of the whole response, as in the paper. TRL takes the
    mean over the tokens of a batch, the prompt's included.
    Reduces to: `dpo_loss` with an anchor of all zeros at alpha = 0.
    Checked: the preference term against TRL 1.16.0 in value and gradient.

    Args:
      logps: f32[..., 2], nats, summed over the tokens of each response. Chosen in
        slot 0.
      beta: reward per nat, positive.
      alpha: weight of the likelihood, 0 or more.
      label_smoothing: as in `logistic_loss`.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      As `logistic_loss`, and the metrics `loss/preference` and `loss/nll`, the two
      terms before alpha; the rewards of the metrics are beta * logps.

    Raises:
      ValueError, TypeError: as `logistic_loss`; or `beta` is not positive or `alpha` is
        negative.

    >>> loss, metrics = cpo_loss(jnp.array([-4.0, -14.0]), beta=0.1, alpha=0.5)
    >>> round(float(loss), 4), float(metrics["loss/nll"])
    (2.3133, 4.0)
    """
    checks.check_positive("beta", beta)
    checks.check_not_negative("alpha", alpha)
    logps, where = read_pair("logps", logps, where)
    preference, metrics = logistic_loss(beta * logps, label_smoothing=label_smoothing)
    nll = -logps[..., CHOSEN]
    metrics |= {"loss/preference": preference, "loss/nll": nll}
    return results(preference + alpha * nll, metrics, where)
