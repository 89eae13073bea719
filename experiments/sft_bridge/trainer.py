"""SFT, DPO and both at once for the arms of a seed, and h'(v) on the way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sft_bridge.arms import (
    DECAY,
    JOINT,
    KL,
    PLAIN,
    RATE,
    Arm,
    Setting,
    StagesConfig,
)
from experiments.sft_bridge.prepared import Prepared
from experiments.worlds import methods
from experiments.worlds.pipeline import eval_step
from experiments.worlds.short_runs import ShortRuns, adamw, method_loss, towards
from pref_jax.axes import whole
from pref_jax.data import sources
from pref_jax.logps import token_kl
from pref_jax.method import objective
from pref_jax.train import sharding
from pref_jax.train.optimizer import OptimizerConfig, make_schedule
from pref_jax.train.step import evaluate
from pref_jax.types import PyTree


def _batches(prepared: Prepared, groups, num_steps: int, per_step: int):
    """Batches of a stage, in the order of the seed."""
    pipeline = prepared.pipeline
    groups, row_length = pipeline.fit(groups)
    return pipeline.own_rows(
        sources.training_batches(
            groups,
            groups_per_step=per_step,
            num_steps=num_steps,
            row_length=row_length,
            seed=pipeline.seed,
            rows_multiple=sharding.num_row_shards(pipeline.mesh),
        )
    )


@functools.cache  # over seeds: their models have one shape
def _runs(config: StagesConfig, model, mesh, kind: str) -> ShortRuns:
    """SFT of a kind, "dpo", or both at once."""

    def plain(params, anchor, batch, setting):
        del anchor, setting
        return method_loss(methods.make_sft(), model, params, (), batch)

    def with_kl(params, anchor, batch, setting):
        kl = token_kl(model, params, batch, anchor_params=anchor)
        where = batch.loss_mask
        mean = jnp.where(where, kl, 0.0).sum() / where.sum()
        return plain(params, (), batch, setting) + setting["knob"] * mean

    def by_divergence(params, anchor, batch, setting):
        del anchor
        method = methods.make_fsft(methods.DIVERGENCES[kind], setting["knob"])
        return method_loss(method, model, params, (), batch)

    def dpo(params, anchor, batch, setting):
        del anchor
        method = methods.make_dpo(setting["beta"])
        return method_loss(method, model, params, (), batch)

    def joint(params, anchor, batch, setting):
        shown, pairs = batch
        weight = setting["knob"] / setting["beta"]
        return plain(params, anchor, shown, setting) + weight * dpo(
            params, anchor, pairs, setting
        )

    losses = {PLAIN: plain, DECAY: plain, KL: with_kl, "dpo": dpo, JOINT: joint}
    lengths = {"dpo": config.dpo_steps, JOINT: config.joint_steps}
    num_steps = lengths.get(kind, config.sft_steps)
    shape = make_schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=int(config.warmup * num_steps)),
        num_steps,
    )

    def optimizer(setting, anchor):
        decay = [towards(anchor, setting["knob"])] if kind == DECAY else []
        return adamw(lambda number: setting["rate"] * shape(number), *decay)

    return ShortRuns(mesh, losses.get(kind, by_divergence), optimizer)


_LIKELIHOOD = methods.make_sft()


class Trainer:
    """All arms of a seed; each loss is compiled once.

    Args:
      config: sizes.
      prepared: what the arms share.
    """

    def __init__(self, config: StagesConfig, prepared: Prepared):
        self._config, self._prepared = config, prepared
        self._demonstrations = _batches(
            prepared,
            prepared.demonstrations,
            config.sft_steps,
            config.groups_per_step,
        )
        self._heldout = _placed(prepared, prepared.heldout_demonstrations, config)

    def _runs(self, kind: str) -> ShortRuns:
        pipeline = self._prepared.pipeline
        return _runs(self._config, pipeline.model, pipeline.mesh, kind)

    def validation_loss(self, params) -> float:
        """Mean of -log p over tokens of the held-out demonstrations, nats."""
        pipeline = self._prepared.pipeline
        step = eval_step(_LIKELIHOOD, pipeline.model, pipeline.mesh)
        with jax.set_mesh(pipeline.mesh):
            return evaluate(step, params, (), self._heldout)["loss"]

    def sft(
        self,
        arm: Arm,
        rate: float,
        knob: float | None,
        *,
        stop_at: float | None = None,
        watch: Callable | None = None,
    ) -> tuple[PyTree, int]:
        """Parameters after SFT, and the updates that it took.

        Args:
          arm: neither without SFT nor joint.
          rate: of Adam, at its highest.
          knob: the number of the arm, if it has one.
          stop_at: validation loss at which SFT ends.
          watch: (updates done, parameters), called as SFT goes.
        """
        updates = 0

        def look(number, params):
            nonlocal updates
            updates = number
            if watch is not None:
                watch(number, params)
            due = stop_at is not None and number % self._config.stop_every == 0
            return due and self.validation_loss(params) <= stop_at

        kind = PLAIN if arm.kind == RATE else arm.kind
        params = self._runs(kind).train(
            self._prepared.base,
            self._demonstrations,
            {"rate": rate, "knob": knob},
            anchor=self._prepared.base if arm.kind in (KL, DECAY) else (),
            watch=look,
        )
        return params, updates

    def dpo(self, params, groups, setting: Setting) -> PyTree:
        """Parameters after DPO against the logps that the pairs carry."""
        config = self._config
        batches = _batches(
            self._prepared, groups, config.dpo_steps, config.groups_per_step
        )
        numbers = {"rate": setting.dpo_rate, "beta": setting.dpo_beta}
        return self._runs("dpo").train(params, batches, numbers)

    def joint(self, groups, setting: Setting) -> PyTree:
        """Parameters after both losses at once, on at least the examples of both."""
        config = self._config
        num_steps = config.joint_steps
        sides = [
            _batches(
                self._prepared,
                part,
                num_steps,
                -(-config.groups_per_step * steps // num_steps),
            )
            for part, steps in (
                (self._prepared.demonstrations, config.sft_steps),
                (groups, config.dpo_steps),
            )
        ]
        numbers = {
            "rate": setting.dpo_rate,
            "beta": setting.dpo_beta,
            "knob": setting.knob,
        }
        return self._runs(JOINT).train(
            self._prepared.base, zip(*sides, strict=True), numbers
        )


def _placed(prepared: Prepared, groups, config: StagesConfig) -> list:
    pipeline = prepared.pipeline
    groups, row_length = pipeline.fit(groups)
    stage = dataclasses.replace(config.base, groups_per_step=len(groups))
    batches = pipeline.batches(groups, row_length, stage)
    return [sharding.place_batch(pipeline.mesh, batch) for batch in batches]


@functools.cache
def _slopes(model, name: str):
    """(params, batch, beta) -> h'(v) of every token, and which count."""

    def slopes(params, batch, beta):
        method = methods.make_fsft(methods.DIVERGENCES[name], beta)
        return whole(objective(method, model, params, (), batch)[2]["sft/weight"])

    return jax.jit(slopes)


class SlopeWatch:
    """Quantiles of h'(v) on held-out demonstrations, as SFT goes.

    Args:
      prepared: what the arms share.
      config: sizes.
      name: of `DIVERGENCES`.
      beta: reward per nat.
      num: looks, evenly spaced from the first update to the last.

    Attributes:
      steps: updates done at each look.
      quantiles: f[looks, 5], at 5, 25, 50, 75 and 95 %.
    """

    LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __init__(self, prepared, config, name: str, beta: float, num: int = 8):
        self.steps: list[int] = []
        self.quantiles: list[np.ndarray] = []
        self._model, self._name, self._beta = prepared.pipeline.model, name, beta
        self._due = set(np.linspace(0, config.sft_steps, num).astype(int).tolist())
        self._batches = _placed(prepared, prepared.heldout_demonstrations, config)

    def __call__(self, number: int, params) -> None:
        """Look, if a look is due after this number of updates."""
        if number not in self._due:
            return
        found = []
        for batch in self._batches:
            slope, counted = _slopes(self._model, self._name)(params, batch, self._beta)
            found.append(np.asarray(slope)[np.asarray(counted) > 0])
        self.steps.append(number)
        self.quantiles.append(np.quantile(np.concatenate(found), self.LEVELS))
