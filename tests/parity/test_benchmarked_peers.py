"""Our contestant and TRL's do the same work: the same losses, step by step."""

import math
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from peers import environments  # noqa: E402
from scripts import benchmark_peers  # noqa: E402


@pytest.mark.slow  # four processes that import jax or torch
def test_our_losses_are_those_of_trl_with_its_defaults_and_at_its_best(monkeypatch):
    monkeypatch.setattr(environments, "python_of", lambda folder, peer: sys.executable)
    names = (
        benchmark_peers.STORED,
        "pref_jax, stored anchor, by length",
        "TRL, defaults",
        "TRL, best",
    )
    config = benchmark_peers.Config(
        contestants=names,
        rounds=1,
        steps=3,
        pairs_per_step=2,
        vocab_size=50,
        width=32,
        num_layers=1,
        num_heads=4,
        mlp_width=64,
        learning_rate=3e-3,
        tolerance=1e-4,
    )
    record = benchmark_peers.measure(config)
    found = {name: of["losses"] for name, of in record["contestants"].items()}
    for ours, theirs in zip(names[:2], names[2:], strict=True):
        np.testing.assert_allclose(found[ours], found[theirs], rtol=0, atol=1e-4)
        assert found[ours][0] == pytest.approx(math.log(2), abs=1e-5)
        # Six steps on three batches: they agree on something that moves.
        assert found[ours][-1] < math.log(2) - 1e-2
    assert record["contestants"]["TRL, best"]["versions"]["trl"]
    ratios = record["contestants"]["TRL, best"]["ratios"][benchmark_peers.STORED]
    assert all(low <= median <= high for median, low, high in ratios.values())
