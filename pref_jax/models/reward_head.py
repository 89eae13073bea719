"""A reward model: a decoder with a scalar head on the state at the last response token.

    value[b, k] = hidden[last token of response k to prompt b] @ head

The head is one more parameter, `reward_head` [D], beside the decoder's own. A reward
model has no unembedding, so its config counts as tied. Folders of
`AutoModelForSequenceClassification` with one label are read and written by
`models/pretrained.py` like any other.

    config, params = reward_head.add(config, params, key)
    method = Method("reward model", anchors.none(), reward=rewards.explicit_reward,
                    loss=on_rewards(logistic_loss), score=reward_head.reward_score)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pref_jax.models.decoder import DecoderConfig
from pref_jax.types import Model, PyTree, ResponseBatch, Scores


def add(
    config: DecoderConfig, params: PyTree, key: jax.Array
) -> tuple[DecoderConfig, dict]:
    """A reward model that starts from a language model.

    Args:
      config: of the language model.
      params: its parameters. Not copied; an unembedding of its own is left out.
      key: of the head, which is drawn with variance 1 / (D + 1).

    Returns:
      Config and parameters of the reward model.

    Raises:
      ValueError: there is a head already.

    Source: the start of the head, Ziegler et al., arXiv:1909.08593 (not verified).
    """
    if "reward_head" in params:
        raise ValueError("these parameters have a `reward_head` already; train that.")
    head = jax.random.normal(key, (config.width,), jnp.float32)
    head *= (config.width + 1) ** -0.5
    kept = {name: leaf for name, leaf in params.items() if name != "unembedding"}
    return dataclasses.replace(config, tied=True), {**kept, "reward_head": head}


def reward_score(model: Model, params: PyTree, batch: ResponseBatch) -> Scores:
    """The head's number for each response: the `score` of a `Method`.

    The state is read where the last token of the response is fed, so padding on either
    side never matters, and neither does what the prompt or other responses are.

    Args:
      model: of `make_decoder`.
      params: with a `reward_head`.
      batch: the rows.

    Returns:
      `Scores` with `value` f32[B, K]; 0 in empty slots.

    Raises:
      ValueError: there is no `reward_head`.
    """
    if "reward_head" not in params:
        raise ValueError(
            "`reward_score` needs a `reward_head` among the parameters; make one with "
            "`reward_head.add`, or load a reward model."
        )
    hidden = model.hidden(params, batch.tokens, batch.position, batch.end)
    num_rows, row_length, _ = hidden.shape
    # A branch feeds the prompt's last token and then the response: one more input.
    last = jnp.minimum(batch.start + batch.length, row_length - 1)
    last = last.reshape(num_rows, -1, 1)
    states = jnp.take_along_axis(hidden, last, axis=1).astype(jnp.float32)
    head = params["reward_head"].astype(jnp.float32)
    values = jnp.einsum("grd,d->gr", states, head, precision="highest")
    return Scores(value=jnp.where(batch.valid, values.reshape(batch.valid.shape), 0.0))
