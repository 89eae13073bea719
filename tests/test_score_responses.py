"""Numbers of whole responses, by models with tokenizers of their own."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pref_jax.data import readers, templates
from pref_jax.models import pretrained
from pref_jax.models.decoder import make_decoder
from scripts import score_responses
from scripts.score_responses import Config

GOLDEN = Path(__file__).parent / "golden"
ROWS = [
    {"prompt": "abc", "chosen": "ab", "rejected": "c"},
    {"prompt": "b", "chosen": "caba", "rejected": "ab"},
    {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
]


def write_tokenizer(folder, *, merges):
    """One token a character, or pairs of a and b as one."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")] * merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture
def config(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, merges in (("llama_tied", False), ("llama_untied", True)):
        shutil.copytree(GOLDEN / name / "weights", tmp_path / name)
        write_tokenizer(tmp_path / name, merges=merges)
    path = tmp_path / "llama_untied" / "config.json"
    settings = json.loads(path.read_text()) | {"max_position_embeddings": 24}
    path.write_text(json.dumps(settings))
    return Config(
        data=str(data),
        models=(str(tmp_path / "llama_tied"), str(tmp_path / "llama_untied")),
        out=str(tmp_path / "out"),
        groups_per_step=2,
    )


def alone(model_path, prompt, response):
    """Log-probability and length of a response, its whole text alone in a row."""
    model_config, params = pretrained.load(model_path)
    model = make_decoder(model_config)
    encoder = templates.TextEncoder(templates.load_tokenizer(model_path))
    (record,) = readers.read([{"prompt": prompt, "response": response}])
    group = encoder.encode(record)
    ids = np.concatenate([group.prompt, group.responses[0]])[None]
    position = jnp.arange(ids.shape[1])[None]
    hidden = model.hidden(params, ids, position, jnp.full(ids.shape, ids.shape[1]))
    logits = hidden[0] @ np.asarray(model.unembedding(params)).T
    logps = jax.nn.log_softmax(logits)[np.arange(ids.shape[1] - 1), ids[0, 1:]]
    n = len(group.responses[0])
    return float(logps[-n:].sum()), n


@pytest.mark.slow
def test_each_model_scores_the_responses_in_its_own_tokens(config):
    path = score_responses.run(config)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    for row, line in zip(ROWS, lines, strict=True):
        for model_path in config.models:
            name = Path(model_path).name
            if name == "llama_untied" and len(row["prompt"]) > 20:
                # 31 tokens with the BOS, and a model of 24 positions.
                assert line["logps"][name] is line["lengths"][name] is None
                continue
            expected = [
                alone(model_path, row["prompt"], row[k]) for k in ("chosen", "rejected")
            ]
            np.testing.assert_allclose(
                line["logps"][name], [logp for logp, _ in expected], rtol=1e-5
            )
            assert line["lengths"][name] == [n for _, n in expected]
    # "ab" and its end: three tokens of one tokenizer, two of the other.
    assert lines[0]["lengths"] == {"llama_tied": [3, 2], "llama_untied": [2, 2]}


def test_a_run_that_is_repeated_scores_nothing_again(config, monkeypatch):
    first = score_responses.run(config).read_bytes()

    def never(*args, **options):
        raise AssertionError("scored again")

    monkeypatch.setattr(score_responses, "response_scores", never)
    assert score_responses.run(config).read_bytes() == first


def test_another_model_of_that_name_is_refused(config):
    score_responses.run(config)
    other = GOLDEN / "llama_tied" / "after_sgd" / "model.safetensors"
    shutil.copy(other, Path(config.models[0]) / "model.safetensors")
    with pytest.raises(ValueError, match="made from something else: model was"):
        score_responses.run(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("x/llama", "y/llama")}, "got llama twice"),
        ({"models": ()}, "got none"),
        ({"tokenizers": ("t",)}, "a folder for each of 2 models; got 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    needed = {"data": "d", "models": ("a", "b"), "out": "o"}
    with pytest.raises(ValueError, match=message):
        Config(**needed | fields)
