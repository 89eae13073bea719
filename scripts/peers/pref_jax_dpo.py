"""The contestant of this repository: `pref_jax.train.loop.fit`, as experiments run it.

Options: `anchor`, "stored" (its logps lie beside the tokens, computed before the first
step) or "live" (the frozen parameters score every batch), and `row_length`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import blocks
import jax
import numpy as np
import optax

from pref_jax import anchors, rewards
from pref_jax.data import anchor_cache, rows, sources
from pref_jax.logps import response_scores
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.method import Method, on_rewards
from pref_jax.models import pretrained
from pref_jax.models.decoder import make_decoder
from pref_jax.train import loop, sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import TokenGroup


def groups_in_order(job: blocks.Job) -> list[TokenGroup]:
    """The pairs of a block, in the order of its steps."""
    pairs = blocks.read_pairs(job.data)
    found = []
    for index in (i for batch in job.batches for i in batch):
        prompt, *responses = pairs[index]
        masks = tuple(np.ones(len(response), bool) for response in responses)
        found.append(TokenGroup(prompt, tuple(responses), masks, (1.0, 0.0), index))
    return found


def fixed_batches(job: blocks.Job, groups) -> sources.Batches:
    """The batches of a block; all have one shape."""
    return sources.evaluation_batches(
        groups,
        groups_per_step=len(job.batches[0]),
        row_length=max(job.options["row_length"], sources.longest_group(groups)),
    )


def store_anchor(job: blocks.Job, groups, model, params, mesh):
    """The groups with the initial model's logps."""
    score = jax.jit(lambda params, batch: response_scores(model, params, batch).logp)
    return anchor_cache.with_anchor_logps(
        groups,
        folder=pathlib.Path(job.scratch) / "anchor_logps",
        batches=fixed_batches(job, groups),
        score=lambda _, batch: score(params, sharding.place_batch(mesh, batch)),
        key={"model": anchor_cache.params_identity(params)},
    )


class GatedSource:
    """An `OfflineSource` behind the gate: steps begin when their block is asked for."""

    prefetchable = True

    def __init__(self, source: sources.OfflineSource):
        self._source, self.state, self.gate = source, None, None

    def __call__(self, state):
        """Return the next batch once its step may begin."""
        self.state = state
        self.gate()
        return self._source(state)


def train(job: blocks.Job) -> None:
    """Train block by block, until no more is asked for."""
    config, params = pretrained.load(job.model)
    model, mesh = make_decoder(config), sharding.make_mesh()
    optimizer = optax.adamw(**job.optimizer, weight_decay=0.0)
    groups = groups_in_order(job)
    with jax.set_mesh(mesh):
        if job.options["anchor"] == "stored":
            groups = store_anchor(job, groups, model, params, mesh)
        block = fixed_batches(job, groups)
        num_steps = len(block) * (job.num_blocks + 1)
        batches = dataclasses.replace(
            block,
            indices=lambda number: block.indices(number % len(block)),
            num_batches=num_steps,
        )
        method = Method(
            name="DPO",
            anchor=anchors.fixed(),
            reward=functools.partial(rewards.sequence_reward, beta=job.beta),
            loss=on_rewards(logistic_loss),
        )
        state = init_state(
            params,
            optimizer,
            rng=jax.random.key(job.seed),
            anchor=params if job.options["anchor"] == "live" else (),
        )
        shardings = sharding.state_shardings(
            mesh, model.param_axes(params), state, optimizer
        )
        observe = loop.observing(rows.count_batch)
        step = make_train_step(method, model, optimizer, observe=observe)
        compiled = sharding.CompiledStep(step, mesh, shardings)
        losses = []

        def recorded(state, batch):
            state, outputs = compiled(state, batch)
            losses.append(outputs["metrics"]["loss"])
            return state, outputs

        source = GatedSource(sources.OfflineSource(batches))
        real = sum(group.num_tokens for group in groups)
        shape = block.shape
        source.gate = blocks.Gate(
            job,
            settle=lambda: jax.block_until_ready(source.state),
            losses=losses,
            about={
                "shape": f"[{shape.num_rows}, {shape.row_length}]",
                "fill": real / (shape.num_rows * shape.row_length * len(block)),
            },
            packages=("jax", "jaxlib", "flax", "optax"),
        )
        with PreemptionGuard() as guard:
            loop.fit(
                jax.device_put(state, shardings),
                name="DPO",
                folder=pathlib.Path(job.scratch) / "stage",
                config=loop.LoopConfig(
                    num_steps=num_steps,
                    validate_every=num_steps,
                    checkpoint_every=num_steps,
                ),
                step=recorded,
                source=source,
                place=functools.partial(sharding.place_batch, mesh),
                validate=lambda state: {},
                guard=guard,
            )


if __name__ == "__main__":
    train(blocks.read_job())
