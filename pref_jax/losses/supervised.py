"""Losses of demonstrations: plain likelihood, and the f-divergence family.

An entry is a token, [..., T], or a whole response, [...]: the level of a loss is that
of the log-probabilities it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import fill, inclusion, read_constant, results
from pref_jax.numerics import at_least_float32


def _read_logps(name, logps, where):
    """f32[...] without what `where` drops, and `where`."""
    checks.check_floating(name, logps)
    logps = at_least_float32(logps)
    where = inclusion(where, shape=logps.shape, of=name)
    return fill(logps, where), where


def nll_loss(token_logps, *, where=None):
    """Negative log-likelihood of each token of a demonstration.

        loss[..., t] = -token_logps[..., t]

    Weighting entries by the token mask gives the token mean; other weights are a choice
    of `Method.weight`.

    Source: maximum likelihood.
    Checked: against TRL 1.16.0 (`sft`, the mean over tokens) in value and gradient.

    Args:
      token_logps: f32[..., T], nats, at most 0.
      where: bool, broadcastable to `token_logps`. False: loss 0, gradient 0.

    Returns:
      loss, f32[..., T], not reduced; metrics: none.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `token_logps` is not floating-point or `where` is not boolean.

    >>> loss, _ = nll_loss(jnp.array([-0.5, -2.0]), where=jnp.array([True, False]))
    >>> loss.tolist()
    [0.5, 0.0]
    """
    logps, where = _read_logps("token_logps", token_logps, where)
    return results(-logps, {}, where)


def dft_loss(token_logps, *, where=None):
    """Likelihood of each token, weighted by its own probability.

        loss[..., t] = -sg(exp(token_logps[..., t])) token_logps[..., t]

    The weight sg(.) carries no gradient. It cancels the 1 / p that the likelihood gives
    to unlikely tokens.

    Source: Dynamic fine-tuning (DFT), arXiv:2508.05629, its token-level loss.
    Reduces to: `nll_loss` where the policy is sure.
    Checked: against TRL 1.16.0 (`dft`, the mean over tokens) in value and gradient.

    Args:
      token_logps: f32[..., T], nats, at most 0.
      where: bool, broadcastable to `token_logps`. False: loss 0, gradient 0.

    Returns:
      loss, f32[..., T], not reduced; metric `sft/weight`, the probability.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `token_logps` is not floating-point or `where` is not boolean.

    >>> loss, _ = dft_loss(jnp.array([0.0, -1.0]))
    >>> [round(float(x), 4) for x in loss]
    [-0.0, 0.3679]
    """
    logps, where = _read_logps("token_logps", token_logps, where)
    weight = jax.lax.stop_gradient(jnp.exp(logps))
    return results(-weight * logps, {"sft/weight": weight}, where)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far demonstrations and policy may be apart, as SFT sees it.

    SFT with this divergence, and a KL divergence to the model before it, maximises the
    mean of h(v) over demonstrations, v being the implicit reward. All have h(0) = 0 and
    slope 1 there: the first gradient is that of plain SFT. All are concave: what has
    become likelier than before counts less, what has become less likely counts more.

    Attributes:
      name: for messages and records.
      h: v -> what a reward of v is worth.
      slope: v -> h'(v), the weight that a demonstration has.
      lowest: where h is continued by its tangent, so that value and weight stay finite
        below; -inf: nowhere.
    """

    name: str
    h: Callable
    slope: Callable
    lowest: float

    def __call__(self, v):
        """(h(v), h'(v)), with the tangent below the lowest v: finite everywhere.

        >>> h, slope = SQUARED_HELLINGER(jnp.array([0.0, -1e4]))
        >>> [round(float(x)) for x in slope]
        [1, 100]
        """
        v = at_least_float32(v)
        if self.lowest == -math.inf:
            return self.h(v), self.slope(v)
        low = jnp.asarray(self.lowest, v.dtype)
        # A NaN stays. Below, `inside` is a constant: the second term has the gradient.
        inside = jnp.where(v < low, low, v)
        below = jnp.where(v < low, v - low, 0.0)
        return self.h(inside) + self.slope(low) * below, self.slope(inside)


TOTAL_VARIATION = Divergence("total variation", lambda v: v, jnp.ones_like, -math.inf)
"""Plain SFT: h(v) = v, whatever beta is."""

CHI_SQUARED = Divergence(
    "Pearson chi-squared",
    lambda v: 2 * v / (jnp.sqrt(1 + v) + 1),
    lambda v: 1 / jnp.sqrt(1 + v),
    -0.9,
)
"""h(v) = 2 (sqrt(1 + v) - 1)."""

SQUARED_HELLINGER = Divergence(
    "squared Hellinger",
    lambda v: v / (1 + v),
    lambda v: 1 / jnp.square(1 + v),
    -0.9,
)
"""h(v) = v / (1 + v)."""

JENSEN_SHANNON = Divergence(
    "Jensen-Shannon",
    lambda v: jnp.log1p(-jnp.expm1(-v)),  # log(2 - exp(-v)) without cancelling
    lambda v: 1 / (2 * jnp.exp(v) - 1),
    -math.log(2) + 0.1,
)
"""h(v) = log(2 - exp(-v))."""

FORWARD_KL = Divergence(
    "forward KL", lambda v: jnp.log1p(v), lambda v: 1 / (1 + v), -0.9
)
"""KL(demonstrations || policy): h(v) = log(1 + v), the partition counted from 1."""

REVERSE_KL = Divergence(
    "reverse KL",
    lambda v: -jnp.expm1(-v),
    lambda v: jnp.exp(-v),
    -math.log(100),
)
"""KL(policy || demonstrations): h(v) = 1 - exp(-v), the partition counted from -1."""


def _implicit_reward(logps, anchor_logps, beta, where):
    checks.check_positive("beta", beta)
    checks.check_floating("anchor_logps", anchor_logps)
    checks.check_same_shape("anchor_logps", anchor_logps, like=logps, of="logps")
    logps, where = _read_logps("logps", logps, where)
    anchor_logps = read_constant("anchor_logps", anchor_logps, like=logps, of="logps")
    return beta * (logps - anchor_logps), where


def fsft_loss(logps, *, anchor_logps, beta: float, divergence: Divergence, where=None):
    """SFT that keeps near the model before it: the partition term left out.

        v = beta (logps - anchor_logps);   loss = -h(v) / beta

        total variation     h = v
        Pearson chi-squared h = 2 (sqrt(1 + v) - 1)
        squared Hellinger   h = v / (1 + v)
        Jensen-Shannon      h = log(2 - exp(-v))
        forward KL          h = log(1 + v)
        reverse KL          h = 1 - exp(-v)

    Towards where h ends, it goes on as its tangent (`Divergence.lowest`). The gradient
    is that of plain SFT times h'(v). Divided by beta, so that it begins with plain
    SFT's scale.

    Source: derived for the SFT objective of "Implicit reward as the bridge",
    arXiv:2507.00018, from the variational form of an f-divergence; which divergences
    and which level the paper prints is not verified.
    Convention: without the partition term, an approximation of `fsft_solved_loss`.
    Reduces to: `nll_loss` plus `anchor_logps` for `TOTAL_VARIATION`, and as beta goes
    to 0.
    Checked: one source, and the dual of a bandit solved exactly.

    Args:
      logps: f32[...], nats, of tokens or of whole responses.
      anchor_logps: as `logps`, of the model before SFT. No gradient reaches it.
      beta: reward per nat, positive; larger holds the policy nearer.
      divergence: `TOTAL_VARIATION`, `CHI_SQUARED`, `SQUARED_HELLINGER`,
        `JENSEN_SHANNON`, `FORWARD_KL`, `REVERSE_KL` or one's own.
      where: bool, broadcastable to `logps`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metric `sft/weight`, h'(v).

    Raises:
      ValueError: a shape does not fit, or `beta` is not positive.
      TypeError: an array is not floating-point or `where` is not boolean.

    >>> logps, anchor_logps = jnp.array([-1.0]), jnp.array([-4.0])
    >>> loss, metrics = fsft_loss(
    ...     logps, anchor_logps=anchor_logps, beta=1.0, divergence=CHI_SQUARED
    ... )
    >>> loss.tolist(), metrics["sft/weight"].tolist()
    ([-2.0], [0.5])
    """
    v, where = _implicit_reward(logps, anchor_logps, beta, where)
    h, slope = divergence(v)
    return results(-h / beta, {"sft/weight": slope}, where)


def fsft_solved_loss(
    logps, *, anchor_logps, beta: float, divergence: Divergence, partition, where=None
):
    """`fsft_loss` with its partition term, the exact objective.

        v = beta (logps - anchor_logps) + c;   loss = -(h(v) - c) / beta

    with c = `partition`. The best c gives the weights h'(v) a mean of 1. Where c and
    the policy are both the best, minus beta times the mean loss is the least value that
    divergence + beta KL(policy || anchor) can have; elsewhere it is below that value,
    and no estimate of what the policy has.

    Source: as `fsft_loss`.
    Looks across the batch: through `partition`, as a rule `solve_partition`. It carries
    no gradient.
    Reduces to: `fsft_loss` at a partition of 0.
    Checked: one source, and the dual of a bandit solved exactly.

    Args:
      logps: as in `fsft_loss`.
      anchor_logps: as in `fsft_loss`.
      beta: as in `fsft_loss`.
      divergence: as in `fsft_loss`.
      partition: f32, broadcastable to `logps`: one number a batch or a prompt.
      where: as in `fsft_loss`.

    Returns:
      As `fsft_loss`.

    Raises:
      ValueError, TypeError: as `fsft_loss`; or `partition` does not fit.

    >>> loss, _ = fsft_solved_loss(
    ...     jnp.array([-4.0]), anchor_logps=jnp.array([-4.0]), beta=1.0,
    ...     divergence=CHI_SQUARED, partition=3.0,
    ... )
    >>> loss.tolist()
    [1.0]
    """
    v, where = _implicit_reward(logps, anchor_logps, beta, where)
    c = read_constant("partition", partition, like=v, of="logps")
    h, slope = divergence(v + c)
    return results(-(h - c) / beta, {"sft/weight": slope}, where)
