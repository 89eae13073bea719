"""A method: one function for each step from a batch to a loss.

    batch -> score -> anchor -> reward -> loss        (-> analyses, never trained on)

A paper is a `Method`, a data source and a config. `objective` is the only place where
the five functions are called in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pref_jax.anchors import Anchor
from pref_jax.logps import response_scores, response_sum
from pref_jax.types import CHOSEN, REJECTED, Metrics, ResponseBatch


def example_weight(batch: ResponseBatch):
    """Every prompt counts alike if all its responses are there: f32[B]."""
    return batch.valid.all(axis=-1).astype(jnp.float32)


def token_weight(batch: ResponseBatch):
    """Every trained token counts alike: f32[B, K, T]."""
    return (batch.loss_mask & batch.valid[..., None]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Method:
    """One function for each step. Built once per run: the train step closes over it.

    Attributes:
      name: for logs and records.
      anchor: what responses are compared with.
      reward: (scores, anchor_scores, batch) -> f32[B, K] or f32[B, K, T].
      loss: (rewards, scores, batch) -> (f32[B] or f32[B, K, T], Metrics).
      weight: batch -> shape of the loss: how much each entry counts in the average.
      score: (model, params, batch) -> Scores.
      analyses: functions (model, params, anchor_params, batch) -> Metrics, run by the
        eval step only.
      requires: names of `extras` that the method reads.
      couples_responses: whether the loss compares the responses of a prompt, so that
        they must stand in one batch.
      paper: where it comes from, with the version, for records and model cards.
    """

    name: str
    anchor: Anchor
    reward: Callable
    loss: Callable
    weight: Callable = example_weight
    score: Callable = response_scores
    analyses: tuple[Callable, ...] = ()
    requires: frozenset[str] = frozenset()
    couples_responses: bool = True
    paper: str = ""


def objective(method: Method, model, params, anchor_params, batch: ResponseBatch):
    """Walk a batch through the five steps.

    Args:
      method: the functions.
      model: a `pref_jax.types.Model`.
      params: of the policy; the only argument to differentiate.
      anchor_params: of the anchor, or `()`.
      batch: the rows.

    Returns:
      loss entries (f32[B] or f32[B, K, T]), their weights (same shape), and Metrics.
      Nothing is reduced: `train.step.weighted_mean` does that, over the whole batch.

    Raises:
      ValueError: the batch lacks an extra that the method requires.
    """
    missing = sorted(method.requires - set(batch.extras))
    if missing:
        raise ValueError(
            f"method {method.name} requires the extras {', '.join(missing)}; the batch "
            f"has {', '.join(sorted(batch.extras)) or 'none'}. Build the source with "
            f"them."
        )
    # Traces and compiled programs tell the steps apart by these names.
    with jax.named_scope("score"):
        scores = method.score(model, params, batch)
    with jax.named_scope("anchor"):
        anchor_scores = method.anchor.scores(model, anchor_params, batch, scores)
    with jax.named_scope("reward"):
        rewards = method.reward(scores, anchor_scores, batch)
    with jax.named_scope("loss"):
        loss, metrics = method.loss(rewards, scores, batch)
    return loss, method.weight(batch), metrics


def on_rewards(loss_fn: Callable) -> Callable:
    """Lift a plain array loss on rewards f32[B, K] into the `loss` slot of a method.

    Prompts with an empty slot are left out. Adds the metrics that any loss on whole
    responses has: logps and lengths by slot of the pair.

    Args:
      loss_fn: (rewards, *, where) -> (loss f32[B], {name: f32[B]}).

    Returns:
      (rewards, scores, batch) -> (loss f32[B], Metrics).
    """

    def loss(rewards, scores, batch: ResponseBatch):
        complete = batch.valid.all(axis=-1)
        values, metrics = loss_fn(rewards, where=complete)
        if rewards.shape[-1] == 2:
            by_slot = {"lengths": batch.loss_mask.sum(-1).astype(jnp.float32)}
            if scores.logp is not None:  # a reward head has none
                by_slot["logps"] = response_sum(scores.logp, where=batch.loss_mask)
            for slot, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
                for group, values_of_slots in by_slot.items():
                    metrics[f"{group}/{name}"] = values_of_slots[:, slot]
        weight = complete.astype(jnp.float32)
        return values, {name: (value, weight) for name, value in metrics.items()}

    return loss


def on_token_logps(loss_fn: Callable) -> Callable:
    """Lift a plain array loss on token logps f32[B, K, T] into the `loss` slot.

    Args:
      loss_fn: (token_logps, *, where) -> (loss f32[B, K, T], {name: f32[B, K, T]}).

    Returns:
      (token_logps, scores, batch) -> (loss f32[B, K, T], Metrics).
    """

    def loss(token_logps, scores, batch: ResponseBatch):
        del scores
        where = batch.loss_mask & batch.valid[..., None]
        values, plain = loss_fn(token_logps, where=where)
        weight = token_weight(batch)
        metrics: Metrics = {name: (value, weight) for name, value in plain.items()}
        return values, metrics

    return loss
