"""The loop of a run beside its compiled steps alone: for the case `loop`.

`fit` makes and places each batch, logs the metrics of each step and asks whether to
stop; the steps alone are given placed batches, one after the other, and nothing is read
before the last. Both take the same steps by the same program, in turn. Validation and
saving are of neither.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
import time

import jax
import numpy as np

from pref_jax.data import rows, sources
from pref_jax.models.decoder import DecoderConfig
from pref_jax.train import loop, sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig, plan_stage
from step_variants import METHOD, Work
from variants import quartiles

SIZES = DecoderConfig(
    vocab_size=32_000,
    width=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_width=2048,
)
"""About 100 million parameters."""

_LENGTHS = [(128, (64, 64))] * 4  # a row of about 1,000 positions
_ROUND = 6  # steps of one way before the other has its turn
_STAGE = StageConfig(
    groups_per_step=len(_LENGTHS),
    optimizer=OptimizerConfig(learning_rate=1e-5),
    loop=loop.LoopConfig(
        num_steps=_ROUND, validate_every=_ROUND, checkpoint_every=_ROUND
    ),
)


def measure(*, calls: int, dtype: str, sizes: DecoderConfig = SIZES) -> dict:
    """Seconds of a step in `fit` and alone.

    Args:
      calls: steps of each, at least.
      dtype: of matrix products.
      sizes: of the decoder.
    """
    num_rounds = max(5, -(-calls // _ROUND))
    work = Work(dataclasses.replace(sizes, dtype=dtype), _LENGTHS, len(_LENGTHS))
    work = dataclasses.replace(work, row_length=work.one_row())
    model, params = work.model_and_params()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    batches = dataclasses.replace(
        work.batches, indices=lambda _: range(len(_LENGTHS)), num_batches=_ROUND
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    plan = plan_stage(
        _STAGE,
        method=METHOD,
        model=model,
        params=params,
        anchor=(),
        count=rows.count_batch,
        mesh=mesh,
    )
    place = functools.partial(sharding.place_batch, mesh)
    placed = place(batches[0])

    def fresh():
        state = plan.start(params, rng=jax.random.key(0), anchor=())
        return jax.block_until_ready(state)

    def alone(state):
        began = time.perf_counter()
        for _ in range(_ROUND):
            state, outputs = plan.step(state, placed)
        jax.block_until_ready((state, outputs))
        return (time.perf_counter() - began) / _ROUND

    def in_fit(state, guard):
        with tempfile.TemporaryDirectory() as folder:
            fitted = loop.fit(
                state,
                name="loop",
                folder=pathlib.Path(folder) / "stage",
                config=_STAGE.loop,
                step=plan.step,
                source=sources.OfflineSource(batches),
                place=place,
                validate=lambda state: {},
                guard=guard,
            )
        return fitted.seconds / fitted.steps

    ways = {"steps alone": [], "fit": []}
    with jax.set_mesh(mesh), PreemptionGuard() as guard:
        alone(fresh())  # compiles
        for _ in range(num_rounds):
            ways["steps alone"].append(alone(fresh()))
            ways["fit"].append(in_fit(fresh(), guard))
    shape = f"{list(placed.tokens.shape)}, {num_params / 1e6:.0f} million parameters"
    ratios = np.divide(ways["fit"], ways["steps alone"])
    return {
        "dtype": dtype,
        "calls": num_rounds * _ROUND,
        "variants": {
            name: {
                "shape": shape,
                **quartiles(seconds),
                "steps_rate": round(len(seconds) / sum(seconds), 3),
            }
            for name, seconds in ways.items()
        },
        "time_ratio": round(float(np.median(ratios)), 3),
        "time_ratios": [round(float(ratio), 3) for ratio in ratios],
        "ratio_is": "fit / steps alone, median over rounds",
    }
