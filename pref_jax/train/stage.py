"""One stage of a run: a method, its data and a config -> trained parameters.

This is where the pieces of `train` meet: mesh and shardings, optimiser, compiled steps,
validation, and the loop. Experiments chain stages.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pref_jax import processes
from pref_jax.method import Method
from pref_jax.train import loop, sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from pref_jax.train.run import as_read_back, differences, read_json, write_json
from pref_jax.train.state import TrainState, init_state
from pref_jax.train.step import (
    anchor_params,
    evaluate,
    make_eval_step,
    make_train_step,
    policy_params,
)
from pref_jax.types import Model, PyTree

CONFIG_FILE = "stage.json"
MODEL_FILE = "model.json"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How one stage trains."""

    groups_per_step: int  # global batch size, prompts
    optimizer: OptimizerConfig
    loop: loop.LoopConfig
    num_microbatches: int = 1  # parts of a step, one after the other, to save memory

    def __post_init__(self):
        if self.groups_per_step < 1 or self.num_microbatches < 1:
            raise ValueError(
                f"`groups_per_step` and `num_microbatches` must be at least 1; got "
                f"{self.groups_per_step} and {self.num_microbatches}."
            )


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage compiles, known from shapes alone.

    Attributes:
      state: shapes and shardings of the state.
      shardings: of every array of the state.
      start: parameters, anchor and key -> the first state, without what is frozen.
      step: compiled (state, batch) -> (state, outputs), as `loop.fit` takes it.
    """

    state: TrainState
    shardings: TrainState
    start: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict]]


def plan_stage(
    config: StageConfig,
    *,
    method: Method,
    model: Model,
    params: PyTree,
    anchor: PyTree,
    count: Callable[[PyTree], dict],
    mesh: Mesh,
    frozen: PyTree = (),
) -> StagePlan:
    """Optimiser, train step and shardings of a stage.

    Args:
      config: plain values.
      method: the five functions.
      model: a `pref_jax.types.Model`.
      params: what is trained, as arrays or shapes.
      anchor: of the anchor, or `()`, likewise.
      count: as in `train_stage`.
      mesh: of `sharding.make_mesh`.
      frozen: what is not trained, or `()`, likewise.
    """
    axes = model.param_axes(params)
    num_steps = config.loop.num_steps
    optimizer = make_optimizer(config.optimizer, num_steps, param_axes=axes)
    step = make_train_step(
        method,
        model,
        optimizer,
        schedule=make_schedule(config.optimizer, num_steps),
        num_microbatches=config.num_microbatches,
        observe=loop.observing(count),
    )
    frozen_axes = model.param_axes(frozen) if jax.tree.leaves(frozen) else ()
    start = functools.partial(init_state, optimizer=optimizer)
    key = jax.random.key(0)
    shapes = jax.eval_shape(start, params, rng=key, anchor=anchor, frozen=frozen)
    shardings = sharding.state_shardings(
        mesh, axes, shapes, optimizer, frozen_axes=frozen_axes
    )
    moving = dataclasses.replace(shardings, frozen=())
    return StagePlan(
        state=sharding.with_shardings(shapes, shardings),
        shardings=shardings,
        start=jax.jit(start, out_shardings=moving),
        step=sharding.CompiledStep(step, mesh, shardings),
    )


def train_stage(
    name: str,
    *,
    folder: epath.Path,
    config: StageConfig,
    method: Method,
    model: Model,
    params: PyTree,
    anchor: PyTree,
    source,
    validation: Sequence,
    count: Callable[[PyTree], dict],
    mesh: Mesh,
    seed: int,
    guard: PreemptionGuard,
    unit: str = "pairs",
    frozen: PyTree = (),
    base: dict[str, str] | None = None,
    watch: loop.Watch | None = None,
    consume: bool = False,
    data: str | None = None,
) -> tuple[PyTree, loop.Fitted]:
    """Train, or read what an earlier call on the same folder has trained.

    Args:
      name: of the stage.
      folder: of the stage; made if it does not exist.
      config: plain values.
      method: the five functions.
      model: a `pref_jax.types.Model`.
      params: initial parameters; what is trained of them.
      anchor: parameters of the anchor or `()`; with `frozen`, `()` is the base itself.
      source: of host batches, as many as the stage has steps.
      validation: host batches.
      count: batch -> {"tokens": real tokens, "examples": prompts}, compiled with the
        step.
      mesh: of `sharding.make_mesh`.
      seed: of the state's key.
      guard: says when to stop.
      unit: what the progress line calls an example.
      frozen: what is not trained, such as the base under adapters, or `()`.
      base: path and hash of `frozen`, which the checkpoints name in its place.
      watch: what is looked at beside the metrics; None: nothing.
      consume: free `params` once the state has a copy of them.
      data: what tells the data of `source` from others, such as `rows.Lengths.digest`;
        a stage that was begun on other data is refused.

    Returns:
      The trained parameters, placed on the mesh, of the best validation if
      `config.loop.best` names a metric and of the last step otherwise; and how the
      stage went.

    Raises:
      Preempted, NonFiniteError: as `loop.fit`.
      ValueError: the folder holds a stage of another config, base or data, or `frozen`
        comes without `base`.
    """
    if (base is None) != (not jax.tree.leaves(frozen)):
        raise ValueError(
            "`frozen` and `base` (its path and hash) belong together; give both."
        )
    about = {"method": method.name, "paper": method.paper, "seed": seed, "base": base}
    if data is not None:
        about["data"] = data
    _claim_folder(name, folder, config, json.loads(model.description) | about)
    with jax.set_mesh(mesh):
        plan = plan_stage(
            config,
            method=method,
            model=model,
            params=params,
            anchor=anchor,
            count=count,
            mesh=mesh,
            frozen=frozen,
        )
        shardings = plan.shardings
        # On the mesh first: no device ever holds more than its part.
        state = plan.start(
            jax.device_put(params, shardings.params),
            rng=jax.random.key(seed),
            anchor=jax.device_put(anchor, shardings.anchor),
        )
        if consume:
            jax.tree.map(lambda x: x.delete(), params)
        frozen = jax.device_put(frozen, shardings.frozen)
        state = dataclasses.replace(state, frozen=frozen)
        everywhere = NamedSharding(mesh, PartitionSpec())
        eval_step = jax.jit(make_eval_step(method, model), out_shardings=everywhere)

        def place(batch):
            return sharding.place_batch(mesh, batch)

        def validate(state):
            sides = policy_params(model, state), anchor_params(model, state)
            means = evaluate(eval_step, *sides, map(place, validation))
            return {f"validation/{key}": value for key, value in means.items()}

        fitted = loop.fit(
            state,
            name=name,
            folder=folder,
            config=config.loop,
            step=plan.step,
            source=source,
            place=place,
            validate=validate,
            guard=guard,
            unit=unit,
            flops_per_token=_step_flops_per_token(model, anchor, frozen),
            base=base,
            watch=watch or loop.Watch(),
        )
    best = fitted.best_step
    trained = loop.restore_params(folder, config.loop, plan.state.params, best)
    _logger.info("%s: %d steps in %.0f s", name, fitted.steps, fitted.seconds)
    return trained, fitted


def _claim_folder(
    name: str, folder: epath.Path, config: StageConfig, description: dict
) -> None:
    """Describe a new stage; an old one must have been started with the same."""
    values = as_read_back(dataclasses.asdict(config))
    files = {CONFIG_FILE: values, MODEL_FILE: description}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file, new in files.items():
            if not (folder / file).exists():
                write_json(folder / file, new)

    processes.on_first(write)
    for file, new in files.items():
        old = read_json(folder / file)
        changed = differences(_what_counts(old), _what_counts(new))
        if changed:
            raise ValueError(
                f"stage {name} in {folder} was started with another config, or on "
                f"other data: {changed}. "
                f"Continue it with its own, or train in a new folder."
            )


def _what_counts(values: dict) -> dict:
    """A base may have moved, as long as it is the same; a paper's name may change."""
    base = values.get("base") or {}
    kept = {key: value for key, value in values.items() if key != "paper"}
    if "base" in values:
        kept["base"] = base.get("hash", "none")
    return kept


def _step_flops_per_token(model: Model, anchor: PyTree, frozen: PyTree) -> float:
    """Forward and backward of the policy, forward of an anchor of its own.

    What is frozen has no gradient, which saves a third. Whether its base alone is
    scored as well depends on the method and is not counted.
    """
    passes = 2.0 if jax.tree.leaves(frozen) else 3.0
    return model.flops_per_token * (passes + bool(jax.tree.leaves(anchor)))
