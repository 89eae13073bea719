"""fit: source -> step -> log -> validation -> checkpoint, until the last step.

The loop never waits for the device: while a step runs, the host makes the next batch
and reads the metrics of the step before. A stage of a run has a folder of its own, with
`metrics.jsonl`, TensorBoard events and `checkpoints/`; called again on that folder,
`fit` goes on from the latest checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from pref_jax import processes
from pref_jax.train.checkpoint import Checkpoints, PreemptionGuard
from pref_jax.train.logging import MetricsLog, Progress, Throughput
from pref_jax.train.profiling import ProfileConfig, StartClock, StepProfiler
from pref_jax.train.run import read_json, write_json
from pref_jax.train.state import TrainState
from pref_jax.train.tracking import WandbConfig
from pref_jax.types import PyTree

DONE_FILE = "done.json"

_COUNTS = ("tokens", "examples")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a stage trains, and when it looks up."""

    num_steps: int  # updates
    validate_every: int  # steps; the last step is always validated
    checkpoint_every: int  # steps; every validation saves as well
    keep_last: int = 1  # newest checkpoints
    best: str | None = None  # metric of the validation; its best checkpoint is kept
    higher_is_better: bool = False  # direction of `best`
    patience: int | None = None  # validations without a better `best` before stopping

    def __post_init__(self):
        for name in ("num_steps", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {self}.")
        if self.patience is not None and (self.best is None or self.patience < 1):
            raise ValueError(
                f"`patience` counts validations without a better `best`: it needs that "
                f"metric's name and must be at least 1; got {self}."
            )


class Preempted(Exception):
    """The process was asked to stop; the state is saved and the run can go on."""


class NonFiniteError(FloatingPointError):
    """A metric of a step is not a finite number."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a finished stage leaves.

    Attributes:
      steps: updates that were done; fewer than asked for if patience ran out.
      best_step: the step of the best validation, or None.
      seconds: spent in steps, all restarts added up.
    """

    steps: int
    best_step: int | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is looked at beside the metrics while stages train.

    Attributes:
      profile: steps of each stage that are traced; None: none.
      wandb: where the metrics are shown as well; None: nowhere.
      clock: says when the first step of this process is done, or None.
    """

    profile: ProfileConfig | None = None
    wandb: WandbConfig | None = None
    clock: StartClock | None = None


def fit(
    state: TrainState,
    *,
    name: str,
    folder: epath.Path,
    config: LoopConfig,
    step: Callable,
    source,
    place: Callable,
    validate: Callable[[TrainState], dict[str, float]],
    guard: PreemptionGuard,
    unit: str = "pairs",
    flops_per_token: float | None = None,
    base: dict[str, str] | None = None,
    watch: Watch = Watch(),
) -> Fitted:
    """Train a stage to its end, from wherever its folder says it is.

    Args:
      state: the state before the first step, on its devices; donated.
      name: of the stage, for the progress line.
      folder: of the stage.
      config: when to stop, validate and save.
      step: compiled (state, batch) -> (state, outputs), as `CompiledStep` makes.
        It observes what `observing` says.
      source: a `Source` of host batches.
      place: host batch -> placed batch.
      validate: state -> metrics, `best` among them; called at validations.
      guard: says when to stop.
      unit: what the progress line calls an example.
      flops_per_token: of a step, forward and backward; None: no MFU estimate.
      base: what is frozen in the state, by path and hash, which checkpoints hold in
        its place.
      watch: what is looked at beside the metrics.

    Returns:
      `Fitted`; the states are in `folder/checkpoints`, see `restore_params`.

    Raises:
      Preempted: after saving, when the guard was asked to stop.
      NonFiniteError: with step, metric and record numbers. The last good checkpoint
        stays the latest.
    """
    done = folder / DONE_FILE
    if processes.agree(done.is_file()):
        return Fitted(**read_json(done))
    folder.mkdir(parents=True, exist_ok=True)
    with _open_checkpoints(folder, config) as checkpoints:
        throughput = Throughput(model_flops_per_token=flops_per_token)
        run = _Loop(checkpoints, config, guard, validate, throughput, base)
        latest = checkpoints.latest_step()
        if latest is not None:
            run.restore(checkpoints.restore_meta())
            frozen, moving = state.frozen, dataclasses.replace(state, frozen=())
            moving = checkpoints.restore(_release(moving))
            state = dataclasses.replace(moving, frozen=frozen)
            source.set_state(int(state.data))
            _logger.info("%s goes on from step %d", name, latest)
        with (
            MetricsLog(folder, resume_step=latest or 0, wandb=watch.wandb) as log,
            Progress(name, config.num_steps, unit=unit) as progress,
            StepProfiler(folder, watch.profile) as profiler,
        ):
            run.start(log, progress, watch.clock)
            while run.step < config.num_steps and not run.finished:
                batch = place(source(state))
                profiler.before_step(run.step + 1)
                with jax.transfer_guard("disallow"):
                    state, outputs = step(state, batch)
                profiler.after_step(run.step + 1, outputs)
                run.advance(state, outputs)
        result = Fitted(
            steps=run.step,
            best_step=checkpoints.best_step() if config.best else None,
            seconds=run.seconds,
        )
    processes.on_first(lambda: write_json(done, dataclasses.asdict(result)))
    return result


def observing(count: Callable[[PyTree], dict]) -> Callable[[PyTree], dict]:
    """What `fit` needs to know of each batch: the `observe` of a train step.

    Args:
      count: batch -> {"tokens": real tokens, "examples": prompts}, to be compiled.
    """
    return lambda batch: {**count(batch), "record": batch.record}


def _release(state: TrainState) -> TrainState:
    """The shapes and shardings of a state whose arrays are freed: never two at once."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.tree.map(lambda x: x.delete(), state)
    return abstract


def _open_checkpoints(folder, config: LoopConfig, **options) -> Checkpoints:
    return Checkpoints(
        folder / "checkpoints",
        keep_last=config.keep_last,
        keep_best=1 if config.best else 0,
        metric=config.best,
        higher_is_better=config.higher_is_better,
        **options,
    )


def restore_params(
    folder: epath.Path, config: LoopConfig, params: PyTree, step: int | None = None
) -> PyTree:
    """Parameters of a checkpoint of a stage: of `step`, or the latest.

    Args:
      folder: of the stage.
      config: as given to `fit`.
      params: arrays of the same shapes and shardings.
      step: number of the checkpoint.
    """
    with _open_checkpoints(folder, config, read_only=True) as checkpoints:
        return checkpoints.restore(params, step, field="params")


class _Loop:
    """The host side of `fit`: reads metrics one step late and acts on them."""

    def __init__(self, checkpoints, config, guard, validate, throughput, base):
        self.base = base
        self.checkpoints, self.config, self.guard = checkpoints, config, guard
        self.validate, self.throughput = validate, throughput
        self.step = 0
        self.best, self.stale = None, 0  # best validation, validations since then
        self.seconds = 0.0
        self._pending = None  # outputs of a step that are not read yet

    def restore(self, meta: dict) -> None:
        self.step, self.seconds = meta["step"], meta["seconds"]
        self.best, self.stale = meta["best"], meta["stale"]

    def start(self, log, progress, clock) -> None:
        self.log, self.progress, self.clock = log, progress, clock
        self._clock = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether patience has run out."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def advance(self, state, outputs) -> None:
        """Take one step's outputs; read the step before; validate and save if due."""
        self._read_pending()
        self.step += 1
        self._pending = outputs
        last = self.step == self.config.num_steps
        stop = self.guard.agreed()
        validate = last or self.step % self.config.validate_every == 0
        save = stop or validate or self.step % self.config.checkpoint_every == 0
        if not save:
            return
        self._read_pending()  # nothing is saved before its metrics are known good
        metrics = self._validate(state) if validate else None
        self.log.flush()
        self.checkpoints.save(
            self.step,
            dataclasses.replace(state, frozen=()),
            metrics=metrics,
            meta={
                "base": self.base,
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "stale": self.stale,
            },
        )
        self._clock = time.perf_counter()
        if stop and not last:
            self.checkpoints.wait()
            raise Preempted(f"stopped after step {self.step}, which is saved")

    def _validate(self, state) -> dict[str, float]:
        began = time.perf_counter()
        metrics = self.validate(state)
        self._check_finite(metrics, records=None)
        self.log.write(self.step, metrics, {"validation": time.perf_counter() - began})
        name = self.config.best
        if name is not None:
            if name not in metrics:
                raise ValueError(
                    f"`best` is {name!r}, which the validation does not measure; it "
                    f"has {', '.join(sorted(metrics))}."
                )
            value = metrics[name] if self.config.higher_is_better else -metrics[name]
            better = self.best is None or value > self.best
            self.best = value if better else self.best
            self.stale = 0 if better else self.stale + 1
        return metrics

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        outputs, self._pending = self._pending, None
        outputs = jax.device_get(outputs)  # waits for the step
        if self.clock is not None:
            self.clock.first_step()
        records = outputs["observed"]["record"]
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.seconds += seconds
        metrics = {name: float(x) for name, x in sorted(outputs["metrics"].items())}
        self.log.write(self.step, metrics, {"step": seconds})
        bad = records[~outputs["finite"]]
        self._check_finite(metrics, bad if bad.size else records)
        counts = {name: int(outputs["observed"][name]) for name in _COUNTS}
        rates = self.throughput.add(seconds=seconds, **counts)
        self.progress.update(self.step, metrics, rates)

    def _check_finite(self, metrics: dict[str, float], records) -> None:
        names = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not names:
            return
        first = "loss" if "loss" in names else names[0]
        where = ""
        if records is not None:
            numbers = sorted({int(r) for r in np.asarray(records).ravel() if r >= 0})
            where = f" on records {', '.join(map(str, numbers))}"
        latest = self.checkpoints.latest_step()
        kept = "none was saved yet" if latest is None else f"step {latest} is kept"
        raise NonFiniteError(
            f"step {self.step}: {first} is {metrics[first]}{where} (not finite: "
            f"{', '.join(names)}). Last good checkpoint: {kept}. Look at these "
            f"records, or lower the learning rate or the gradient clip."
        )
