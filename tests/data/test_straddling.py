"""A prompt that ends in a blank: its last token reaches into the response.

On real pairs and the GPT-2 tokenizer, whose tokens begin with the space before a word.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.data import readers, sources, templates
from pref_jax.logps import response_scores
from pref_jax.models.decoder import DecoderConfig, make_decoder

NUM_PAIRS = 24
MODEL = make_decoder(
    DecoderConfig(
        vocab_size=50_257,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
    )
)


@pytest.fixture(scope="module")
def pairs(shared_data):
    return readers.read(shared_data("gsm8k_pref") / "smoke.jsonl.gz")


@pytest.fixture(scope="module")
def encode(shared_data, pairs):
    tokenizer = templates.load_tokenizer(shared_data("gpt2_tokenizer"))

    @functools.cache
    def encode(end):
        rows = [
            {"prompt": pair.prompt + end}
            | dict(zip(("chosen", "rejected"), pair.responses, strict=True))
            for pair in pairs
        ]
        encoder = templates.TextEncoder(tokenizer)
        return encoder, encoder.encode_all(readers.read(rows))

    return encode


def test_after_a_space_every_pair_straddles_and_is_counted_and_shown(encode, pairs):
    encoder, groups = encode(" ")
    assert len(groups) == len(pairs) == 100
    assert encoder.counts["records_with_straddling"] == 100
    assert encoder.counts["straddling_tokens"] == 200
    assert "straddling_tokens: 200" in encoder.summary()
    for group, pair in zip(groups, pairs, strict=True):
        assert encoder.decode(group.prompt) == pair.prompt.rstrip(" ")
        for response, text, mask in zip(
            group.responses, pair.responses, group.loss_masks, strict=True
        ):
            assert encoder.decode(response[:1]).startswith(" ")
            assert encoder.decode(response) == " " + text
            assert mask.all()


def test_after_a_line_feed_none_straddles(encode, pairs):
    encoder, groups = encode("\n")
    assert encoder.counts["straddling_tokens"] == 0
    for group, pair in zip(groups, pairs, strict=True):
        assert encoder.decode(group.prompt) == pair.prompt + "\n"


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(" ", id="space"),
        pytest.param("\n", id="line feed", marks=pytest.mark.slow),
    ],
)
def test_packed_logps_are_those_of_each_conversation_by_itself(encode, end):
    groups = encode(end)[1][:NUM_PAIRS]
    params = jax.jit(MODEL.init)(jax.random.key(0))
    batches = sources.evaluation_batches(
        groups, groups_per_step=8, row_length=sources.longest_group(groups)
    )
    score = jax.jit(lambda batch: response_scores(MODEL, params, batch).logp)
    packed = {}
    for batch in batches:
        logps = np.asarray(score(batch))
        for b in np.flatnonzero(batch.record >= 0):
            packed[int(batch.record[b])] = logps[b]
    alone = jax.jit(
        lambda ids, end: jax.nn.log_softmax(
            MODEL.hidden(params, ids, jnp.arange(ids.shape[1])[None], end)[0]
            @ MODEL.unembedding(params).T
        )
    )
    for group in groups:
        for k, response in enumerate(group.responses):
            ids = np.concatenate([group.prompt, response])
            # One width for all, so that it compiles once; padding is seen by nobody.
            padded = np.pad(ids, (0, 320 - len(ids)))[None]
            limits = np.where(np.arange(320) < len(ids), len(ids), np.arange(320) + 1)
            table = np.asarray(alone(padded, limits[None]))
            expected = table[np.arange(len(ids) - 1), ids[1:]][-len(response) :]
            found = packed[group.record][k, : len(response)]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
