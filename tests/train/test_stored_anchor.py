"""Training on stored logps is training against the live anchor, without the anchor."""

import dataclasses
import gc
import json

import jax
import numpy as np
import pytest

import tiny_stage
from pref_jax.data import anchor_cache, sources
from pref_jax.logps import response_scores
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.loop import LoopConfig
from tiny_stage import CONFIG, MODEL, make_groups, make_params

NUM_STEPS = 50

quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


class CountingSource(sources.OfflineSource):
    """Counts the buffers that look like a matrix of the model, at two batches."""

    like = make_params()["blocks"]["0"]["mlp"]["gate"].shape

    def __init__(self, batches):
        super().__init__(batches)
        self.counts, self.before = [], self.count()

    def count(self):
        gc.collect()
        return sum(x.shape == self.like for x in jax.live_arrays())

    def __call__(self, state):
        if len(self.counts) < 2:  # each one looks at every object of the process
            self.counts.append(self.count() - self.before)
        return super().__call__(state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics, last parameters and buffers: against the live anchor, and stored."""
    root = tmp_path_factory.mktemp("runs")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    anchor, groups = make_params(0), make_groups(14, seed=0)
    # The policy starts elsewhere, so that the anchor's logps are not its own.
    params = make_params(1)
    score = jax.jit(lambda batch: response_scores(MODEL, anchor, batch).logp)

    def stored(groups, name):
        batches = sources.evaluation_batches(groups, groups_per_step=4, row_length=48)
        return anchor_cache.with_anchor_logps(
            groups,
            folder=root / name,
            batches=batches,
            score=lambda number, batch: np.asarray(score(batch)),
            key={"model": anchor_cache.params_identity(anchor)},
        )

    shape = {
        "groups_per_step": CONFIG.groups_per_step,
        "row_length": tiny_stage.ROW_LENGTH,
        "rows_multiple": CONFIG.num_microbatches,
    }
    config = dataclasses.replace(
        CONFIG,
        # Adam divides rounding by rounding where a gradient is tiny; not with this eps.
        optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.02, eps=0.1),
        loop=LoopConfig(
            num_steps=NUM_STEPS, validate_every=NUM_STEPS, checkpoint_every=NUM_STEPS
        ),
    )
    found = {}
    for name, part, heldout, live in (
        ("live", groups, make_groups(6, seed=1), anchor),
        ("stored", stored(groups, "a"), stored(make_groups(6, seed=1), "b"), ()),
    ):
        batches = sources.training_batches(part, num_steps=NUM_STEPS, seed=0, **shape)
        source = CountingSource(batches)
        trained, _ = tiny_stage.train(
            root / name,
            mesh=mesh,
            guard=PreemptionGuard(),
            config=config,
            params=params,
            anchor=live,
            source=source,
            validation=sources.evaluation_batches(heldout, **shape),
        )
        text = (root / name / "metrics.jsonl").read_text()
        found[name] = (
            [json.loads(line) for line in text.splitlines()],
            jax.device_get(trained),
            source.counts,
        )
    return found


@pytest.mark.slow
def test_fifty_steps_are_those_of_a_live_anchor(runs):
    (live, live_params, _), (stored, stored_params, _) = runs["live"], runs["stored"]
    assert len(live) == len(stored) == NUM_STEPS + 1
    for line, other in zip(live, stored, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            # A norm of differences of nearly equal numbers keeps fewer digits.
            bound = 1e-3 if name.endswith("_norm") else 1e-5
            if not name.startswith("time/"):
                assert other[name] == pytest.approx(value, rel=bound, abs=bound), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        live_params,
        stored_params,
    )
    assert live[0]["loss"] != pytest.approx(live[NUM_STEPS - 1]["loss"], abs=0.1)


@pytest.mark.slow
def test_training_on_stored_logps_holds_no_anchor(runs):
    # Two matrices of that shape in the policy, in both moments of the optimiser and in
    # what `tiny_stage.train` holds itself; the live run has the anchor as well.
    assert runs["stored"][2] == [2 * (3 + 1)] * 2
    assert runs["live"][2] == [2 * (4 + 1)] * 2
