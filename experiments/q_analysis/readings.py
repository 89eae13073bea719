"""Responses, corrupted copies of them, and what follows of every token's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.worlds.token_numbers import Numbers
from pref_jax.q_values import soft_bellman_residual, token_rewards
from pref_jax.types import TokenGroup

GIVEN, SAMPLED, CORRUPTED = "given", "sampled", "corrupted"

OWN = {
    "advantage": "Q - V = beta log pi, of the token as it came",
    "q": "beta times the token's logit",
    "value": "V before the token: beta times the log-sum-exp of the logits",
    "entropy": "of the next token, nats",
}
"""What one model says of a token, and what it is."""

WITH_REFERENCE = {
    "log_ratio": "beta log(pi / pi_ref)",
    "token_reward": "beta log(pi / pi_ref) + V(s) - V(s'), V = 0 after the last token",
    "residual": "Q - (r + beta log pi_ref + V(s')), where r is the label of the whole "
    "response, paid at its last token",
}
"""What a model says of a token beside its reference."""


@dataclasses.dataclass(frozen=True)
class Response:
    """One response that is looked at.

    Attributes:
      record: row of the data.
      slot: place among the row's responses.
      kind: `GIVEN`, `SAMPLED` or `CORRUPTED`.
      prompt: as one string.
      ids: i[n].
      where: bool[n], tokens that count: the response's own.
      label: what the data or the grade says; NaN: not known. A corrupted copy has none.
      changed: the token that was replaced, or None.
    """

    record: int
    slot: int
    kind: str
    prompt: str
    ids: np.ndarray
    where: np.ndarray
    label: float
    changed: int | None = None


def corrupted(
    group: TokenGroup, pool: np.ndarray, seed: int
) -> tuple[TokenGroup, list[int | None]]:
    """The group with, after its K responses, K copies in which one token is another.

    The token is any of the response's own but the last, which ends it; the one in its
    place is drawn from `pool` and differs from it; what follows stays as it is.

    Args:
      group: K responses.
      pool: ids to draw from, as often as they are to come.
      seed: of the draws, with the record's number.

    Returns:
      The group of 2 K, and of each copy the place that was changed; None: the response
      has no token before its last, or the pool no other, and the copy is no other.
    """
    rng = np.random.default_rng([seed, group.record])
    copies, places = [], []
    for ids, mask in zip(group.responses, group.loss_masks, strict=True):
        own = np.flatnonzero(mask)[:-1]
        place = int(rng.choice(own)) if own.size else None
        others = pool if place is None else pool[pool != ids[place]]
        if place is None or not others.size:
            place = None
        copy = np.array(ids)
        if place is not None:
            copy[place] = rng.choice(others)
        copies.append(copy)
        places.append(place)
    twice = dataclasses.replace(
        group,
        responses=(*group.responses, *copies),
        loss_masks=group.loss_masks * 2,
        labels=group.labels * 2,
        step_ids=None,
        extras={},
    )
    return twice, places


def with_copies(
    groups: Sequence[TokenGroup],
    prompts: Sequence[str],
    *,
    kind: str,
    labelled: bool,
    seed: int,
) -> tuple[list[TokenGroup], list[list[Response]]]:
    """Groups with a corrupted copy of each response, and what each response is.

    Args:
      groups: of one size K.
      prompts: text of each.
      kind: `GIVEN` or `SAMPLED`.
      labelled: whether labels say how good a response is.
      seed: of what is replaced by what.
    """
    # All tokens but the last of each response, as often as they come.
    own = [
        ids[mask][:-1]
        for group in groups
        for ids, mask in zip(group.responses, group.loss_masks, strict=True)
    ]
    pool = np.concatenate(own)
    doubled, described = [], []
    for group, prompt in zip(groups, prompts, strict=True):
        twice, places = corrupted(group, pool, seed)
        size = len(group.responses)
        doubled.append(twice)
        described.append(
            [
                Response(
                    record=group.record,
                    slot=i % size,
                    kind=kind if i < size else CORRUPTED,
                    prompt=prompt,
                    ids=twice.responses[i],
                    where=twice.loss_masks[i],
                    label=group.labels[i] if labelled and i < size else np.nan,
                    changed=None if i < size else places[i - size],
                )
                for i in range(2 * size)
            ]
        )
    return doubled, described


def derived(
    response: Response, own: Numbers, reference: Numbers | None, *, beta: float
) -> Numbers:
    """The quantities of `OWN`, and with a reference those of `WITH_REFERENCE`.

    Args:
      response: whose tokens they are.
      own: of `token_numbers.read_model`.
      reference: the same of the reference, or None.
      beta: reward per nat.
    """
    found = {name: own[name] for name in ("q", "value", "entropy")}
    found["advantage"] = beta * own["logp"]
    if reference is not None:
        where = response.where

        def clean(x):
            return np.float32(np.where(where, x, 0.0))

        arrays = {
            "anchor_logps": clean(reference["logp"]),
            "values": clean(own["value"]),
            "beta": beta,
            "where": where,
        }
        outcome = np.zeros(len(where), np.float32)
        if where.any():
            outcome[np.flatnonzero(where)[-1]] = response.label
        found["log_ratio"] = beta * (own["logp"] - reference["logp"])
        of_state = {
            "token_reward": token_rewards(clean(own["logp"]), **arrays),
            "residual": soft_bellman_residual(
                clean(own["q"]), rewards=outcome, **arrays
            ),
        }
        for name, values in of_state.items():
            found[name] = np.where(where, np.float64(values), np.nan)
    return found
