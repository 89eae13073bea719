"""Anchors: the frozen side that responses are compared with.

An anchor is a record of two functions. `scores` says what the frozen side thinks of the
responses; its result never carries a gradient. `refresh` says what the frozen side is
after an update; it is pure and runs inside the train step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pref_jax.logps import response_scores
from pref_jax.types import PyTree, ResponseBatch, Scores


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What responses are compared with.

    Attributes:
      scores: (model, anchor_params, batch, policy_scores) -> Scores, without gradient.
      refresh: (params, step, anchor_params) -> anchor_params.
    """

    scores: Callable[..., Scores]
    refresh: Callable[[PyTree, jax.Array, PyTree], PyTree]


def _never(params, step, anchor_params):
    """A refresh rule that keeps the anchor."""
    del params, step
    return anchor_params


def none() -> Anchor:
    """No anchor: every log-probability is 0.

    >>> anchor = none()
    >>> scores = Scores(logp=jnp.array([[[-1.0, -2.0]]]))
    >>> anchor.scores(None, (), None, scores).logp.tolist()
    [[[0.0, 0.0]]]
    """

    def scores(model, anchor_params, batch, policy_scores):
        del model, anchor_params, batch
        return jax.tree.map(jnp.zeros_like, jax.lax.stop_gradient(policy_scores))

    return Anchor(scores, _never)


def fixed(score: Callable[..., Scores] = response_scores) -> Anchor:
    """A model that never changes, live or as logps stored in the batch.

    When the batch carries `extras["anchor_logps"]` those are used and the frozen model
    need not be in memory: give `()` as anchor parameters. Otherwise the frozen
    parameters score the batch.

    Args:
      score: (model, params, batch) -> Scores, as the method's own `score`.

    Raises:
      ValueError: the batch has no stored logps and there are no anchor parameters.
    """

    def scores(model, anchor_params, batch: ResponseBatch, policy_scores):
        del policy_scores
        if "anchor_logps" in batch.extras:
            logp = jnp.where(batch.loss_mask, batch.extras["anchor_logps"], 0.0)
            return jax.lax.stop_gradient(Scores(logp=logp))
        if not jax.tree.leaves(anchor_params):
            raise ValueError(
                "`anchors.fixed` needs either anchor parameters or stored logps in "
                "`batch.extras['anchor_logps']`; got neither. Pass the initial "
                "parameters as the state's anchor, or store the logps first."
            )
        anchor_params = jax.lax.stop_gradient(anchor_params)
        return jax.lax.stop_gradient(score(model, anchor_params, batch))

    return Anchor(scores, _never)
