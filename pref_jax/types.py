"""The types that rooms hand to each other: token groups, batches, metrics.

Axes, always in this order: B prompt groups, K responses, T response tokens, S steps,
M source models; G rows of L tokens, of which P are scored. B = G * E in row-major
order, where E is the largest number of groups in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CHOSEN = 0
"""Slot of a pair that holds the preferred response."""

REJECTED = 1
"""Slot of a pair that holds the other response."""

Array = jax.Array | np.ndarray
PyTree = Any

Metrics = dict[str, tuple[Array, Array]]
"""Inside a `Method`: name -> (value, weight), both of one leading shape."""

EXTRAS = {
    "advantage": "BKT",
    "anchor_logps": "BKT",
    "coefficient": "BK",
    "episode": "B",
    "explore": "BK",
    "margin": "B",
    "source_lengths": "BKM",
    "source_logps": "BKM",
}
"""Optional fields of a batch: name -> its axes. Built and checked from the axes.

`advantage`: of every token of a sampled response. `anchor_logps`: token logps of a
fixed anchor, or of the policy that sampled, nats. `coefficient`: the slope of a loss of
whole episodes by a turn's score. `episode`: the one that a turn belongs to. `explore`:
1 for a response of the exploration sampler, else 0. `margin`: by how much the chosen
response is better, in the unit of the data. `source_logps`, `source_lengths`: what M
source models say of each response, nats summed over the tokens of their own tokenizers,
and the number of these tokens; a length of 0 marks a source that did not score the
response.
"""


@dataclasses.dataclass(frozen=True)
class TokenGroup:
    """One prompt and its K responses as token ids, on the host.

    Attributes:
      prompt: i32[P]. Holds the one BOS where the tokenizer has one; never empty.
      responses: K of i32[n_k]. Each ends with its one end token.
      loss_masks: K of bool[n_k]. True: this target is ours and trained.
      labels: K numbers, what the data says of each response. For a pair 1.0 (chosen)
        and 0.0 (rejected); for a demonstration 1.0.
      record: row number in the source, for replay and messages.
      step_ids: K of i32[n_k]. 0 = not an action, 1..S = the turn of the token.
      extras: arrays for the names of `EXTRAS`, without their B axis: a list of K
        arrays of n_k where the axes say T, otherwise one array.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    loss_masks: tuple[np.ndarray, ...]
    labels: tuple[float, ...]
    record: int
    step_ids: tuple[np.ndarray, ...] | None = None
    extras: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Positions that the group takes in a row (layout: `pref_jax.data.rows`)."""
        return len(self.prompt) - 1 + sum(len(r) + 1 for r in self.responses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseBatch:
    """K responses to each of B prompts, packed into G rows of L tokens.

    A prompt stands in its row once; its responses are branches after it. Token i sees
    token j when `j <= i < end[j]`. The layout is described in `pref_jax.data.rows`.

    Attributes:
      tokens: i32[G, L].
      position: i32[G, L]. Distance from the start of the group along the branch;
        rotary embedding and sliding windows speak of it, never of the index.
      end: i32[G, L]. First index that does not see this token as a key.
      targets: i32[G, L]. The token that a position predicts; 0 where it predicts none.
      predict: i32[G, P]. Positions to unembed, ascending, padded with -1.
      start: i32[B, K]. First predicting position of the branch in its row.
      length: i32[B, K]. Number of targets of the branch.
      loss_mask: bool[B, K, T]. True: target t of the response is ours and scored.
      step_ids: i32[B, K, T] or None. 0 = not an action, 1..S = turn of the token.
      valid: bool[B, K]. False: an empty slot.
      labels: f32[B, K]. What the data says; its meaning is stated by the source.
      record: i32[B]. Row number in the source; -1 in empty slots.
      extras: arrays declared in `EXTRAS`.
    """

    tokens: Array
    position: Array
    end: Array
    targets: Array
    predict: Array
    start: Array
    length: Array
    loss_mask: Array
    step_ids: Array | None
    valid: Array
    labels: Array
    record: Array
    extras: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of each response: the fields that were asked for, or None.

    Attributes:
      logp: f32[B, K, T]. Natural-log probability of each target; 0 outside the mask.
      logsumexp: f32[B, K, T]. Log of the partition over the vocabulary.
      chosen_logit: f32[B, K, T]. The logit of the target.
      entropy: f32[B, K, T]. Entropy of the next-token distribution, nats.
      log_sum_sq: f32[B, K, T]. Log of the sum of squared probabilities.
      value: f32[B, K]. A reward head's number.
      mean_logp: f32[B, K]. A log-probability of a token, averaged over each response:
        all that an anchor fused from other models can give.
    """

    logp: Array | None = None
    logsumexp: Array | None = None
    chosen_logit: Array | None = None
    entropy: Array | None = None
    log_sum_sq: Array | None = None
    value: Array | None = None
    mean_logp: Array | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as a record of pure functions of a plain nested dict.

    Attributes:
      init: key -> params, float32.
      hidden: (params, tokens i32[G, L], position i32[G, L], end i32[G, L]) ->
        [G, L, D], after the last norm.
      unembedding: params -> [V, D].
      init_cache: (num_prompts B, prompt_length P, num_samples K, num_steps S) -> cache
        of zeros: the prompt once, and K branches of S tokens.
      prefill: (params, tokens i32[B, P], length i32[B], cache) -> cache. The first
        `length` tokens of each prompt are kept.
      decode: (params, tokens i32[B, K], length i32[B], step i32[], cache) ->
        (hidden [B, K, D], cache). The tokens stand at position `length + step`.
      param_axes: params -> the same tree with a tuple of logical axis names a leaf.
      vocab_size: V.
      max_positions: longest text that the parameters are made for, in tokens; None: no
        limit is known.
      flops_per_token: forward flops of one token of a row, attention left out; three
        times as much with the backward pass.
      logit_softcap: bound of the logits, softcap * tanh(logits / softcap), or None.
      combine: (frozen, params) -> the parameters that all functions take, where only a
        part of them is trained; `frozen` is `()` where all are.
      description: JSON of what builds the model again; stands beside its checkpoints.
    """

    init: Callable[[Array], PyTree]
    hidden: Callable[..., Array]
    unembedding: Callable[[PyTree], Array]
    init_cache: Callable[[int, int, int, int], PyTree]
    prefill: Callable[..., PyTree]
    decode: Callable[..., tuple[Array, PyTree]]
    param_axes: Callable[[PyTree], PyTree]
    vocab_size: int
    max_positions: int | None
    flops_per_token: float
    logit_softcap: float | None = None
    combine: Callable[[PyTree, PyTree], PyTree] = lambda frozen, params: params
    description: str = "{}"
