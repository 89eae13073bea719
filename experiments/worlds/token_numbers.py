"""What a model says of every token of every response: logits, values, entropy."""

from __future__ import annotations

import functools

import jax
import numpy as np

from pref_jax.data import rows, sources
from pref_jax.logps import response_scores
from pref_jax.q_values import response_values
from pref_jax.train import sharding
from pref_jax.train.logging import Progress

Numbers = dict[str, np.ndarray]
"""By name of a quantity f64[n], one number a token; NaN where the mask is False."""


def _scored(model, params, batch, *, beta):
    values = response_values(model, params, batch, beta=beta)
    want = ("logp", "entropy", "log_sum_sq")
    scores = response_scores(model, params, batch, want=want)
    return {
        "q": values.q,
        "value": values.value,
        "logp": scores.logp,
        "entropy": scores.entropy,
        "log_sum_sq": scores.log_sum_sq,
    }


@functools.cache
def _compiled(model, beta):
    return jax.jit(functools.partial(_scored, model, beta=beta))


def read_model(
    name: str, model, params, groups, *, beta: float, groups_per_step: int, mesh
) -> list[list[Numbers]]:
    """What a model says of every token of every response.

    Args:
      name: for the progress line.
      model: a `pref_jax.types.Model`.
      params: its parameters.
      groups: of one number of responses.
      beta: reward per nat.
      groups_per_step: prompts at once.
      mesh: of `sharding.make_mesh`.

    Returns:
      For each group and response `Numbers` of `q`, `value`, `logp`, `entropy` and
      `log_sum_sq`, that of the next token's squared probabilities.
    """
    batches = sources.evaluation_batches(
        groups,
        groups_per_step=min(groups_per_step, len(groups)),
        row_length=max(128, sources.longest_group(groups)),
        rows_multiple=sharding.num_row_shards(mesh),
    )
    score = _compiled(model, beta)
    found: list[list[Numbers]] = []
    with jax.set_mesh(mesh), Progress(name, len(batches)) as progress:
        for number, batch in enumerate(batches):
            arrays = jax.device_get(score(params, sharding.place_batch(mesh, batch)))
            members = [groups[i] for i in batches.indices(number)]
            lengths = [group.num_tokens for group in members]
            for group, place in zip(
                members, rows.slots(lengths, batches.shape), strict=True
            ):
                found.append(
                    [
                        {
                            key: np.where(
                                mask, np.float64(array[place, k, : len(mask)]), np.nan
                            )
                            for key, array in arrays.items()
                        }
                        for k, mask in enumerate(group.loss_masks)
                    ]
                )
            progress.count(number + 1)
    return found
