"""What a run says while it trains: metrics.jsonl, TensorBoard, a progress line.

Only process 0 writes and shows anything; the others make the same calls. Call nothing
here before `jax.distributed.initialize`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Self

import jax
from etils import epath

from pref_jax import processes
from pref_jax.train import storage, tracking

_logger = logging.getLogger(__name__)

# Dense bfloat16 multiply-adds, 2 flops each, per second of one device of `jax.devices`.
# TPUs: "peak compute per chip (bf16)", cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; one
# chip is one device there. GPUs: "BFLOAT16 Tensor Core" of NVIDIA's data sheets, halved
# where they give it with 2:4 sparsity (H100, H200, L4).
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 flops per second of a device; None when unknown.

    >>> peak_flops("NVIDIA A100-SXM4-80GB") / 1e12, peak_flops("cpu")
    (312.0, None)
    """
    if " MIG " in device_kind:  # a slice of a GPU
        return None
    names = [
        name
        for name in _PEAK_FLOPS
        if device_kind == name or device_kind.startswith((name + " ", name + "-"))
    ]
    return _PEAK_FLOPS[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a run goes, over the window of `Throughput`.

    Attributes:
      step_seconds: mean wall time of a train step.
      tokens_rate: real tokens (no padding) per second, all devices together.
      examples_rate: prompts with their responses per second, all devices together.
      mfu: model flops utilisation, in [0, 1]; None when flops or peak are unknown.
    """

    step_seconds: float
    tokens_rate: float
    examples_rate: float
    mfu: float | None


class Throughput:
    """Turns counts and wall times of train steps into rates over a moving window.

    The first step is left out: it compiles.

    Args:
      window: number of steps that a rate is taken over.
      model_flops_per_token: flops that the model needs for a real token, forward and
        backward, recomputation not counted; None leaves the utilisation unknown.
      devices: what the run trains on; all devices by default.

    >>> throughput = Throughput()
    >>> throughput.add(seconds=30.0, tokens=1000, examples=8)  # compiles: no rate
    >>> throughput.add(seconds=0.5, tokens=1000, examples=8).tokens_rate
    2000.0
    """

    def __init__(
        self,
        *,
        window: int = 50,
        model_flops_per_token: float | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.devices() if devices is None else devices
        peaks = [peak_flops(device.device_kind) for device in devices]
        self._peak = None if None in peaks else sum(peaks)
        self._flops_per_token = model_flops_per_token
        self._steps = collections.deque(maxlen=window)
        self._compiled = False

    def add(self, *, seconds: float, tokens: int, examples: int) -> Rates | None:
        """Count one step and return the rates so far; None after the first step.

        Args:
          seconds: wall time of the step.
          tokens: real tokens in the global batch, padding not counted.
          examples: prompts in the global batch.
        """
        if not self._compiled:
            self._compiled = True
            return None
        self._steps.append((seconds, tokens, examples))
        seconds, tokens, examples = (sum(x) for x in zip(*self._steps, strict=True))
        mfu = None
        if self._peak is not None and self._flops_per_token is not None:
            mfu = tokens * self._flops_per_token / (seconds * self._peak)
        return Rates(
            step_seconds=seconds / len(self._steps),
            tokens_rate=tokens / seconds,
            examples_rate=examples / seconds,
            mfu=mfu,
        )


class MetricsLog:
    r"""Writes the numbers of a run: `metrics.jsonl`, and TensorBoard in `tensorboard/`.

    A line is one strict JSON object with "step" first. Numbers are written so that they
    read back exactly; "NaN", "Infinity" and "-Infinity" are strings. On a disk a line
    is handed to the system when `write` returns, so a crash of the process loses none.
    An object of a store cannot grow: there the files are local, and copied up in the
    background every `copy_seconds`, at `flush` and at `close`; a crash loses what came
    after the last copy. Who flushes before each checkpoint loses only steps that a
    resumed run does again.

    Args:
      folder: of the run, on a disk or `gs://`; made if it is missing.
      resume_step: the step that the run goes on from, None for a new run. Lines of
        later steps and a half-written last line are removed, all others kept byte for
        byte; TensorBoard hides its events of later steps.
      wandb: sends the numbers to Weights & Biases too.
      about: plain values that Weights & Biases shows as the config.
      copy_seconds: how often a store gets what was written; no matter on a disk.

    Raises:
      FileExistsError: a new run, and the folder holds metrics.
      ValueError: a line of `metrics.jsonl` is not one of ours.
      ImportError: `wandb` is asked for and not installed, or `gs://` without its
        package.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with MetricsLog(folder) as log:
    ...     log.write(1, {"loss": 0.5}, {"step": 0.25})
    >>> (folder / "metrics.jsonl").read_text()
    '{"step": 1, "loss": 0.5, "time/step": 0.25}\n'
    """

    def __init__(
        self,
        folder,
        *,
        resume_step: int | None = None,
        wandb: tracking.WandbConfig | None = None,
        about: Mapping | None = None,
        copy_seconds: float = storage.MIRROR_SECONDS,
    ):
        self._file = self._events = self._mirror = self._wandb = None
        self._undisturbed = contextlib.nullcontext()
        folder = storage.as_folder(folder)
        if wandb is not None:
            tracking.load_wandb()  # before anything is made

        def start() -> None:
            if not processes.is_first():
                return
            self._open(folder, resume_step, copy_seconds)
            if wandb is not None:
                files = self._local_folder
                try:
                    self._wandb = tracking.WandbRun(wandb, folder, files, about)
                except Exception:
                    self.close()
                    raise

        processes.on_first(start, errors=(FileExistsError, ValueError))

    def _open(self, folder: epath.Path, resume_step, copy_seconds) -> None:
        path = folder / "metrics.jsonl"
        kept, changed = b"", False
        if resume_step is not None:
            kept, changed = _lines_up_to(path, resume_step)
        elif path.exists() and path.stat().length:
            raise FileExistsError(
                f"{path} already holds metrics. Give `resume_step` to go on with that "
                f"run, or start the new one in another folder."
            )
        if storage.is_object_store(folder):
            self._mirror = storage.Mirror(folder, seconds=copy_seconds)
            self._undisturbed = self._mirror.lock
            self._local_folder = self._mirror.folder
            with self._undisturbed:
                (self._local_folder / path.name).write_bytes(kept)
        else:
            self._local_folder = pathlib.Path(folder)
            self._local_folder.mkdir(parents=True, exist_ok=True)
            if changed:
                whole = self._local_folder / (path.name + ".new")
                whole.write_bytes(kept)
                os.replace(whole, path)
        # TensorBoard's library is loaded only by runs.
        from tensorboardX import SummaryWriter

        # Unbuffered: a line is one system call, and out of this process at once.
        self._file = (self._local_folder / path.name).open("ab", buffering=0)
        self._events = SummaryWriter(
            str(self._local_folder / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=10,
        )
        if changed:
            self._flush()

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float] | None = None,
    ) -> None:
        """Write one line for `step`.

        Args:
          step: train steps done.
          metrics: name -> number; anything that `float` takes.
          timings: name -> seconds; written as "time/<name>".

        Raises:
          ValueError: two numbers of one name.
        """
        if self._file is None:
            return
        numbers = [(name, float(value)) for name, value in metrics.items()]
        numbers += [(f"time/{k}", float(v)) for k, v in (timings or {}).items()]
        line = {"step": int(step)}
        for name, value in numbers:
            if name in line:
                raise ValueError(
                    f"Step {step} has two numbers named {name!r}; rename the metric."
                )
            line[name] = value if math.isfinite(value) else _NON_FINITE[str(value)]
        with self._undisturbed:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        for name, value in numbers:
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(int(step), dict(numbers))

    def flush(self) -> None:
        """Return once all lines written so far would outlive this process.

        On several processes all of them call this, and wait for the first.

        Raises:
          OSError: the store refused.
        """
        processes.on_first(self._flush, errors=(OSError,))

    def _flush(self) -> None:
        if self._file is not None:
            self._events.flush()
            if self._mirror is not None:
                self._mirror.flush()

    def close(self, *, failed: bool = False) -> None:
        """Close all files, and copy them for the last time.

        Args:
          failed: what Weights & Biases shows of the run.

        Raises:
          OSError: a store refused; the message says where the files are.
        """
        if self._file is None:
            return
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.close(failed=failed)
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _lines_up_to(path: epath.Path, step: int) -> tuple[bytes, bool]:
    """The complete lines of steps up to `step`, byte for byte; are there others?"""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):  # half-written when the process was killed
            continue
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: needs a JSON object with a number `step`; got "
                f"{line[:80]!r}. Repair or remove the line, then resume again."
            ) from error
    if len(kept) < len(lines):
        _logger.info(
            "Resuming at step %d: removed %d of %d lines of %s.",
            *(step, len(lines) - len(kept), len(lines), path),
        )
    return b"".join(kept), len(kept) < len(lines)


class Progress:
    """Shows how far a stage is: a live line in a terminal, otherwise log lines.

    Args:
      stage: what is running, such as "DPO".
      total: number of steps of the stage.
      unit: what an example is called in the rates: "pairs", "demonstrations", "lists".
      log_seconds: without a terminal, at most one line in this many seconds.

    >>> with Progress("DPO", total=100) as progress:
    ...     progress.update(1, {"loss": 0.69, "rewards/accuracy": 0.5})
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        unit: str = "pairs",
        log_seconds: float = 30.0,
    ):
        self._stage, self._total, self._unit = stage, total, unit
        self._log_seconds = log_seconds
        self._logged = -math.inf
        self._first = None  # step and time of the first count
        self._live = None
        if jax.process_index() == 0 and _console().is_terminal:
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                expand=True,
            )
            self._task = self._bar.add_task(stage, total=total)
            self._live = Live(self._bar, console=_console(), refresh_per_second=4)
            self._live.start()

    def update(
        self, step: int, metrics: Mapping[str, float], rates: Rates | None = None
    ) -> None:
        """Show `step`, and of `metrics` the loss, reward accuracy and reward margin.

        Args:
          step: steps of the stage done.
          metrics: name -> number; "-" stands for those that the method lacks.
          rates: from `Throughput`; None while unknown.
        """
        if jax.process_index() == 0:
            self._show(step, time.monotonic(), self._status(step, metrics, rates))

    def count(self, step: int) -> None:
        """Show `step` of work that has no metrics, such as sampling.

        Without a terminal, work that is done within `log_seconds` logs nothing.

        Args:
          step: steps of the work done.
        """
        if jax.process_index() != 0:
            return
        now = time.monotonic()
        if self._first is None:  # the first step compiles
            self._first, self._logged = (step, now), now
        first, began = self._first
        left = "-"
        if step > first:
            left = _clock((self._total - step) * (now - began) / (step - first))
        if self._live is not None or now - self._logged >= self._log_seconds:
            self._show(step, now, f"ETA {left}")

    def _show(self, step: int, now: float, status: str) -> None:
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            self._bar.update(self._task, completed=step)
            self._live.update(Group(self._bar, Text(status)))
        elif now - self._logged >= self._log_seconds or step == self._total:
            self._logged = now
            _logger.info("%s %d/%d  %s", self._stage, step, self._total, status)

    def _status(self, step, metrics, rates: Rates | None) -> str:
        names = ("loss", "rewards/accuracy", "rewards/margin")
        parts = [
            f"{name.split('/')[-1]} "
            + (f"{float(metrics[name]):.4g}" if name in metrics else "-")
            for name in names
        ]
        tokens = examples = mfu = left = "-"
        if rates is not None:
            tokens, examples = _short(rates.tokens_rate), _short(rates.examples_rate)
            mfu = "-" if rates.mfu is None else f"{rates.mfu:.1%}"
            left = _clock((self._total - step) * rates.step_seconds)
        parts += [f"{tokens} tokens/s", f"{examples} {self._unit}/s", f"MFU {mfu}"]
        return "  ".join([*parts, f"ETA {left}"])

    def close(self) -> None:
        """Leave the last state of the line standing."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.1f}"


@functools.cache
def _console():
    """One console for log lines and the live line, so that they do not tear."""
    from rich.console import Console

    return Console(stderr=True)


def configure_logging(level: int | str = "INFO") -> None:
    """Show what the library logs, on process 0: in colour in a terminal, else plain.

    Calling it again replaces the handler. Handlers that the caller added stay.

    Args:
      level: of the logger `pref_jax`, as `logging` takes it.
    """
    logger = logging.getLogger("pref_jax")
    for handler in [h for h in logger.handlers if h.name == "pref_jax"]:
        logger.removeHandler(handler)
    if jax.process_index() != 0:
        handler = logging.NullHandler()
    elif _console().is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=_console(), show_path=False)
    else:
        # rich breaks lines at the width of the terminal that is not there.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.name = "pref_jax"
    logger.addHandler(handler)
    logger.setLevel(level)
    # Importing Orbax gives the root logger a handler, which would repeat every line.
    logger.propagate = False
