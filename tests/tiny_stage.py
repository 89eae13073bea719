"""A stage that trains in a moment, for the tests of `pref_jax.train`.

As a command it trains DPO on all devices of all processes, to be killed and started
again:

    PYTHONPATH=. python tests/tiny_stage.py FOLDER

It leaves FOLDER/params.npz, or exits with `PREEMPTED_EXIT_CODE` after SIGTERM.
"""

import dataclasses
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pref_jax import anchors, processes, rewards
from pref_jax.data import rows, sources
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import nll_loss
from pref_jax.method import Method, on_rewards, on_token_logps, token_weight
from pref_jax.models import decoder
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE, PreemptionGuard
from pref_jax.train.loop import LoopConfig, Preempted
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig, train_stage
from pref_jax.types import TokenGroup

VOCAB_SIZE = 24
ROW_LENGTH = 40  # one or two groups

MODEL = decoder.make_decoder(
    decoder.DecoderConfig(
        vocab_size=VOCAB_SIZE,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_width=32,
    )
)


def _shallow_hidden(params, tokens, position, end):
    del position, end
    scaled = jnp.einsum("gld,d->gld", params["embedding"][tokens], params["scale"])
    return jnp.tanh(scaled @ params["mix"])


_SHALLOW_SHAPES = {
    "embedding": (VOCAB_SIZE, 16),
    "mix": (16, 16),
    "scale": (16,),
}
_SHALLOW_AXES = {
    "embedding": ("vocab", "embed"),
    "mix": ("embed", "mlp"),
    "scale": ("norm",),
}
SHALLOW = dataclasses.replace(
    MODEL,
    init=lambda key: {k: jnp.zeros(shape) for k, shape in _SHALLOW_SHAPES.items()},
    hidden=_shallow_hidden,
    unembedding=lambda params: params["embedding"],
    param_axes=lambda params: _SHALLOW_AXES,
)
"""A model that compiles quickly: for what does not depend on the model."""

DPO = Method(
    name="dpo",
    anchor=anchors.fixed(),
    reward=functools.partial(rewards.sequence_reward, beta=0.5),
    loss=on_rewards(logistic_loss),
)
SFT = Method(
    name="sft",
    anchor=anchors.none(),
    reward=rewards.log_likelihood,
    loss=on_token_logps(nll_loss),
    weight=token_weight,
)
CONFIG = StageConfig(
    groups_per_step=4,
    num_microbatches=2,
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    loop=LoopConfig(
        num_steps=40, validate_every=12, checkpoint_every=3, best="validation/loss"
    ),
)


def quick_compiles():
    """Body of a fixture: these programs take longer to optimise than to run."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def make_params(seed=0, model=MODEL):
    """Random parameters; drawn by NumPy, since `init` takes long to compile."""
    rng = np.random.default_rng(seed)

    def draw(leaf, axes):
        std = leaf.shape[-1] ** -0.5
        noise = rng.normal(size=leaf.shape, scale=std).astype(np.float32)
        return jnp.asarray(1 + noise if "norm" in axes else noise)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(draw, shapes, model.param_axes(shapes))


def make_groups(num_groups, *, seed, num_responses=2) -> list[TokenGroup]:
    """Random ids: ragged prompts and responses, some tokens of them not trained."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(1, VOCAB_SIZE, rng.integers(low, high)).astype(np.int32)

    groups = []
    for record in range(num_groups):
        responses = tuple(ids(1, 8) for _ in range(num_responses))
        masks = tuple(rng.random(len(response)) < 0.7 for response in responses)
        for mask in masks:
            mask[-1] = True
        labels = (1.0,) + (0.0,) * (num_responses - 1)
        groups.append(TokenGroup(ids(1, 9), responses, masks, labels, record))
    return groups


def make_batches(mesh, config=CONFIG) -> sources.Batches:
    """Random pairs for every step of a stage."""
    return sources.training_batches(
        make_groups(14, seed=0),
        num_steps=config.loop.num_steps,
        seed=0,
        **_shape(mesh, config),
    )


def own_rows(mesh, batches: sources.Batches) -> sources.Batches:
    """The batches, of which this process builds its rows."""
    return batches.of_rows(sharding.own_rows(mesh, batches.shape.num_rows))


def _shape(mesh, config):
    return {
        "groups_per_step": config.groups_per_step,
        "row_length": ROW_LENGTH,
        "rows_multiple": sharding.num_row_shards(mesh) * config.num_microbatches,
    }


def train(folder: pathlib.Path, *, mesh, guard, model=MODEL, config=CONFIG, **options):
    """`train_stage` of `DPO` on random pairs; `options` replace its arguments."""
    params = make_params(0, model)
    heldout = make_groups(6, seed=1)
    validation = sources.evaluation_batches(heldout, **_shape(mesh, config))
    arguments = {
        "method": DPO,
        "params": params,
        "anchor": params,
        "source": sources.OfflineSource(own_rows(mesh, make_batches(mesh, config))),
        "validation": own_rows(mesh, validation),
        "seed": 0,
    } | options
    return train_stage(
        "tiny",
        folder=folder,
        config=config,
        model=model,
        count=rows.count_batch,
        mesh=mesh,
        guard=guard,
        **arguments,
    )


class SlowSource(sources.OfflineSource):
    """Takes its time, so that a test can follow the steps and end one of them."""

    def __call__(self, state):
        """The next batch, a little later."""
        time.sleep(0.01)
        return super().__call__(state)


def main() -> None:
    """The command line."""
    processes.initialize()
    folder, mesh = pathlib.Path(sys.argv[1]), sharding.make_mesh()
    source = SlowSource(own_rows(mesh, make_batches(mesh)))
    try:
        with PreemptionGuard() as guard:
            params, _ = train(folder, mesh=mesh, guard=guard, source=source)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE) from None
    params = multihost_utils.process_allgather(params, tiled=True)
    if processes.is_first():
        np.savez(folder / "params.npz", *jax.tree.leaves(params))


if __name__ == "__main__":
    main()
