"""What the benchmark times beside the sampler generates from the same model."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch_generate  # noqa: E402
from scripts import benchmark  # noqa: E402

SMALL = benchmark.Config(vocab_size=50, width=32, num_layers=2)


def test_both_ways_write_the_same_greedy_ids_and_as_many_tokens():
    ours, theirs = benchmark.generate(SMALL)
    ids = theirs.function(*theirs.arguments[0])
    assert ids.shape == (32, 4, 64) and ids.size == ours.count[0]["tokens"]
    assert theirs.count == ours.count
    assert len(np.unique(ids, axis=1)) == 32 and ids.max() < 50


def test_another_model_is_an_error(monkeypatch):
    make = torch_generate.make_generate

    def of_other_params(sizes, params, prompts, *, seed):
        other = params | {"unembedding": params["unembedding"][::-1]}
        return make(sizes, other, prompts, seed=seed)

    monkeypatch.setattr(torch_generate, "make_generate", of_other_params)
    with pytest.raises(ValueError, match="of 32 greedy responses are equal"):
        benchmark.generate(SMALL)


def test_torch_draws_from_the_whole_distribution():
    """8,192 first tokens of one prompt: as many of each as its softmax says."""
    sizes = dataclasses.replace(benchmark._sizes(SMALL), tied=False)
    model = benchmark.make_decoder(sizes)
    params = jax.jit(model.init)(jax.random.key(0))
    prompt = np.arange(1, 6, dtype=np.int32)
    generate = torch_generate.make_generate(sizes, params, [prompt], seed=0)
    counts = np.bincount(generate(8192, 1).flatten(), minlength=50)
    index = np.arange(5)[None]
    hidden = model.hidden(params, prompt[None], index, np.full((1, 5), 5))[0, -1]
    expected = 8192 * np.asarray(jax.nn.softmax(model.unembedding(params) @ hidden))
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 49 + 4 * (2 * 49) ** 0.5
