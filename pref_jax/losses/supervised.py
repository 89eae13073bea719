"""Losses of demonstrations: one entry per response token."""

from __future__ import annotations

import jax.numpy as jnp

from pref_jax import checks


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
    checks.check_floating("token_logps", token_logps)
    loss = -checks.at_least_float32(token_logps)
    if where is not None:
        checks.check_bool("where", where)
        checks.check_broadcast("where", where, to=loss.shape, of="token_logps")
        loss = jnp.where(where, loss, 0.0)
    return loss, {}
