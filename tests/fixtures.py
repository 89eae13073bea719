"""A tiny decoder and ragged groups that several tests share, and the padded layout.

The padded layout is the plain one: a response a row, behind its own copy of the prompt.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.data import rows
from pref_jax.logps import response_scores
from pref_jax.models.decoder import DecoderConfig, LayerKind, Rotary, make_decoder
from pref_jax.types import ResponseBatch, TokenGroup

# Everything a family may have: grouped queries, a period of two with different windows
# and rope bases, a layer left over, and an odd vocabulary with a matrix of its own.
CONFIG = DecoderConfig(
    vocab_size=37,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    period=(LayerKind(window=5, rotary=Rotary(100.0)), LayerKind()),
    norm_eps=1e-3,
    tied=False,
    embedding_scale=1.7,
    attention="xla",
)

LAYERS = tuple(CONFIG.period[i % 2] for i in range(CONFIG.num_layers))

ORACLE = {
    "eps": CONFIG.norm_eps,
    "rope_bases": tuple(kind.rotary.theta for kind in LAYERS),
    "windows": tuple(kind.window for kind in LAYERS),
    "embedding_scale": CONFIG.embedding_scale,
}
"""`CONFIG` in the words of `oracles.decoder_hidden`."""

_ORACLE_NAMES = {
    "attention_norm/scale": "attention_norm",
    "attention/query": "q",
    "attention/key": "k",
    "attention/value": "v",
    "attention/out": "o",
    "mlp_norm/scale": "mlp_norm",
    "mlp/gate": "gate",
    "mlp/up": "up",
    "mlp/down": "down",
}


@functools.cache
def decoder():
    """The decoder of `CONFIG`; one object, so that what is compiled is shared."""
    return make_decoder(CONFIG)


@functools.cache
def random_params(seed: int, config: DecoderConfig = CONFIG):
    """Parameters that say something: norms off one, logits spread out."""
    params = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        is_scale = path[-1].key == "scale"
        values = 1.0 + 0.3 * values if is_scale else 0.35 * values
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


@functools.cache
def scorer(want: tuple[str, ...] = ("logp",)):
    """(params, batch) -> Scores, compiled."""
    return jax.jit(functools.partial(response_scores, decoder(), want=want))


@functools.cache
def logits_of_texts():
    """(params, tokens, position, end) -> f32[N, L, V], compiled."""

    def logits(params, tokens, position, end):
        hidden = decoder().hidden(params, tokens, position, end)
        return jnp.einsum("nld,vd->nlv", hidden, decoder().unembedding(params))

    return jax.jit(logits)


def oracle_weights(params) -> dict:
    """Parameters of `CONFIG`'s decoder as the oracle names them, in float64."""

    def layer(block, *index):
        weights = {}
        for path, name in _ORACLE_NAMES.items():
            room, leaf = path.split("/")
            weights[name] = np.asarray(block[room][leaf], np.float64)[index]
        return weights

    return {
        "embedding": np.asarray(params["embedding"], np.float64),
        "final_norm": np.asarray(params["final_norm"]["scale"], np.float64),
        "unembedding": np.asarray(params["unembedding"], np.float64).T,
        "layers": [
            layer(params["blocks"]["0"], 0),
            layer(params["blocks"]["1"], 0),
            layer(params["last_blocks"]["0"]),
        ],
    }


def random_groups(
    seed: int,
    num_groups: int,
    num_responses: int,
    *,
    prompt: tuple[int, int] = (1, 9),
    response: tuple[int, int] = (1, 9),
    vocab_size: int = CONFIG.vocab_size,
    all_trained: bool = False,
) -> list[TokenGroup]:
    """Groups of ragged lengths (bounds included), some targets not ours.

    The first group has the shortest prompt.
    """
    rng = np.random.default_rng(seed)

    def ids(bounds):
        length = rng.integers(*bounds, endpoint=True)
        return rng.integers(0, vocab_size, length).astype(np.int32)

    groups = []
    for record in range(num_groups):
        responses = tuple(ids(response) for _ in range(num_responses))
        masks = tuple(rng.random(len(r)) < 0.8 for r in responses)
        for mask in masks:
            mask[:] |= all_trained
            mask[-1] = True  # the end token
        labels = tuple(1.0 if k == 0 else 0.0 for k in range(num_responses))
        prompt_ids = ids(prompt)[: None if record else prompt[0]]
        groups.append(TokenGroup(prompt_ids, responses, masks, labels, record))
    return groups


def pack_all(
    groups, row_length: int, *, rows_multiple: int = 1, spare_groups: int = 0
) -> ResponseBatch:
    """All groups in one batch, with `spare_groups` empty slots more a row."""
    shape = rows.plan_shape(
        [range(len(groups))],
        num_tokens=[group.num_tokens for group in groups],
        num_predict=[sum(int(m.sum()) for m in g.loss_masks) for g in groups],
        num_targets=max(len(r) for group in groups for r in group.responses),
        num_responses=len(groups[0].responses),
        row_length=row_length,
        rows_multiple=rows_multiple,
    )
    slots = shape.groups_per_row + spare_groups
    return rows.pack(groups, dataclasses.replace(shape, groups_per_row=slots))


def padded_layout(texts, length: int):
    """(tokens, position, end) of texts, one a row and padded on the right."""
    index = np.broadcast_to(np.arange(length), (len(texts), length))
    sizes = np.array([len(text) for text in texts])[:, None]
    tokens = np.zeros_like(index)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, index, np.where(index < sizes, sizes, index + 1)


def padded_logps(params, groups, *, length: int = 20) -> list[np.ndarray]:
    """Token logps of every response by our decoder in the padded layout."""
    pairs = [(group.prompt, r) for group in groups for r in group.responses]
    out = []
    for first in range(0, len(pairs), 7):  # one program for any number of responses
        part = pairs[first : first + 7]
        texts = [np.concatenate(pair) for pair in part]
        texts += [[]] * (7 - len(texts))
        logits = logits_of_texts()(params, *padded_layout(texts, length))
        logps = np.asarray(jax.nn.log_softmax(logits))
        for row, (prompt, response) in zip(logps, part, strict=False):
            out.append(row[len(prompt) - 1 + np.arange(len(response)), response])
    return out


def by_response(values, batch: ResponseBatch, groups) -> list[np.ndarray]:
    """[B, K, T] of a packed batch as an array a response, in order of groups and K."""
    values, record = np.asarray(values), np.asarray(batch.record)
    slots = {int(r): b for b, r in enumerate(record) if r >= 0}
    return [
        values[slots[group.record], k, : len(response)]
        for group in groups
        for k, response in enumerate(group.responses)
    ]


def loss_masks(groups) -> list[np.ndarray]:
    """The mask of every response, in order of groups and K."""
    return [mask for group in groups for mask in group.loss_masks]
