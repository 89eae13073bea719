"""Anchor logps, computed once and stored beside the tokens.

With them a fixed anchor's parameters need not be in memory while the policy trains.
They are stored per token: subtracting per token and then summing loses nothing that two
long sums would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pref_jax.types import ResponseBatch, TokenGroup


def with_anchor_logps(
    groups: Sequence[TokenGroup],
    batches: Iterable[ResponseBatch],
    score: Callable[[ResponseBatch], np.ndarray],
) -> list[TokenGroup]:
    """Store the anchor's token logps with each group.

    Args:
      groups: the ids; their `record` numbers are all different.
      batches: the same groups in rows, each at least once.
      score: batch -> f32[B, K, T], the anchor's logps, 0 outside the mask.

    Returns:
      The groups in their order, with `extras["anchor_logps"]`.

    Raises:
      ValueError: record numbers repeat, or a group is in no batch.
    """
    if len({group.record for group in groups}) != len(groups):
        raise ValueError("groups need record numbers of their own; some repeat.")
    found = {}
    for batch in batches:
        logps = np.asarray(score(batch))
        for b, record in enumerate(np.asarray(batch.record)):
            if record >= 0:
                found[int(record)] = logps[b]
    missing = [group.record for group in groups if group.record not in found]
    if missing:
        raise ValueError(f"{len(missing)} groups are in no batch, first {missing[0]}.")
    return [
        dataclasses.replace(
            group,
            extras={
                **group.extras,
                "anchor_logps": tuple(
                    found[group.record][k, : len(response)].astype(np.float32)
                    for k, response in enumerate(group.responses)
                ),
            },
        )
        for group in groups
    ]
