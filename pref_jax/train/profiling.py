"""Where the time of a run goes: traces of chosen steps, compiling, and the start."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from typing import Self

import jax

from pref_jax import processes
from pref_jax.train import storage

_logger = logging.getLogger(__name__)

_IMPORTED = time.monotonic()


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced."""

    first: int  # step, counted as in metrics.jsonl: from 1, over all restarts
    num: int = 3  # steps; a trace of many is too large to look at

    def __post_init__(self):
        if self.first < 1 or self.num < 1:
            raise ValueError(
                f"`first` and `num` must be at least 1; got {self.first}, {self.num}."
            )


class StepProfiler:
    """Traces some steps of a run into `<folder>/profile`, for TensorBoard's profiler.

    Only the first process traces, so on several hosts it is its devices that are seen.
    The first step of a start compiles; take a later one.

    Args:
      folder: of the run, on a disk or `gs://`.
      config: which steps; None: none, and the calls cost nothing.

    >>> import tempfile, jax.numpy as jnp
    >>> folder = tempfile.mkdtemp()
    >>> with StepProfiler(folder, ProfileConfig(first=2, num=1)) as profiler:
    ...     for step in (1, 2, 3):
    ...         profiler.before_step(step)
    ...         outputs = jnp.ones(3) * step
    ...         profiler.after_step(step, outputs)
    >>> len(list((storage.as_folder(folder) / "profile/plugins/profile").iterdir()))
    1
    """

    def __init__(self, folder: str | os.PathLike, config: ProfileConfig | None):
        self._config = config if processes.is_first() else None
        self._folder = storage.as_folder(folder) / "profile"
        self._mirror = self._step = None
        self._tracing = False

    def before_step(self, step: int) -> None:
        """Start the trace if it is due.

        Args:
          step: the number that the metrics of this step will have.
        """
        if self._config is None:
            return
        if not self._tracing:
            due = range(self._config.first, self._config.first + self._config.num)
            if step not in due:
                return
            self._start()
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def after_step(self, step: int, outputs) -> None:
        """Stop the trace after its last step.

        Args:
          step: as given to `before_step`.
          outputs: what the step returned, or some of it; waited for at the end of the
            trace, which would miss what the devices still do. Not donated yet.
        """
        if not self._tracing:
            return
        self._leave_step()
        if step >= self._config.first + self._config.num - 1:
            jax.block_until_ready(outputs)
            self.close()

    def _start(self) -> None:
        folder = self._folder
        if storage.is_object_store(folder):
            self._mirror = storage.Mirror(folder, seconds=None)
            folder = self._mirror.folder
        jax.profiler.start_trace(os.fspath(folder))
        self._tracing = True

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def close(self) -> None:
        """Write the trace, if one has begun and not ended."""
        self._leave_step()
        if not self._tracing:
            return
        self._tracing, self._config = False, None
        jax.profiler.stop_trace()
        if self._mirror is not None:
            self._mirror.close()
        _logger.info("a trace of the steps lies in %s", self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class CompileCache:
    """What the persistent compile cache did for this process.

    Made by `enable_compile_cache`.

    Attributes:
      requests: programs that were looked up.
      hits: programs that were found and not compiled again.
    """

    _LOOKED_UP = "/jax/compilation_cache/compile_requests_use_cache"
    _FOUND = "/jax/compilation_cache/cache_hits"

    def __init__(self):
        self.requests = self.hits = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_) -> None:
        self.requests += event == self._LOOKED_UP
        self.hits += event == self._FOUND

    @property
    def misses(self) -> int:
        """Programs that were compiled; those that took long enough are kept."""
        return self.requests - self.hits

    def log(self) -> None:
        """Say how many programs were found."""
        _logger.info("compile cache: %d of %d programs found", self.hits, self.requests)

    def close(self) -> None:
        """Count no more; the cache itself stays on."""
        jax.monitoring.unregister_event_listener(self._count)


def enable_compile_cache(
    folder: str | os.PathLike, *, min_seconds: float = 1.0
) -> CompileCache:
    """Keep compiled programs in a folder, for the next start of the same program.

    Call it before the first computation. Every process calls it; jax lets the first
    one write and all read, so the folder is one that they share. Runs may share it too:
    an entry is found by program, versions, devices and flags.

    Args:
      folder: on a disk or `gs://`; made if it is missing.
      min_seconds: programs that compile faster are not kept.

    Returns:
      Counts of what was found; of this process.

    >>> import tempfile
    >>> cache = enable_compile_cache(tempfile.mkdtemp())
    >>> cache.hits, cache.misses
    (0, 0)
    >>> cache.close()
    >>> disable_compile_cache()
    """
    folder = storage.as_folder(folder)
    if storage.is_object_store(folder):
        # XLA's own caches are files that it opens itself, on a disk.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    else:
        folder = folder.absolute()
    _use_compile_cache(os.fspath(folder), min_seconds)
    return CompileCache()


def disable_compile_cache() -> None:
    """Compile everything from here on; what is in the folder stays."""
    _use_compile_cache(None, 1.0)


def _use_compile_cache(folder: str | None, min_seconds: float) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    compilation_cache.reset_cache()  # it decides once, at the first computation


def process_age() -> float:
    """Seconds since this process was started, interpreter and imports included.

    On Linux from `/proc/self/stat`: its start in clock ticks after the boot, which
    `CLOCK_BOOTTIME` counts from as well. Elsewhere since this module was imported.

    >>> process_age() > 0
    True
    """
    since_import = time.monotonic() - _IMPORTED
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat") as file:
            # After the name, which may hold spaces and brackets; field 22 of all.
            fields = file.read().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        if age >= since_import:
            return age
    return since_import


class StartClock:
    """Says once how long it took from the start of the process to the first step.

    Make it early: only what compiles afterwards is counted as compiling.

    Args:
      cache: of compiled programs; says at the first step what was found in it, and
        counts no more. None: there is none.

    >>> clock = StartClock()
    >>> clock.first_step() > 0, clock.first_step()
    (True, None)
    """

    _COMPILED = "/jax/core/compile/backend_compile_duration"

    def __init__(self, cache: CompileCache | None = None):
        self._compiling = 0.0
        self._done = False
        self._cache = cache
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_) -> None:
        if event == self._COMPILED:
            self._compiling += seconds

    def first_step(self) -> float | None:
        """Log the time, the first time this is called; call it when a step is done.

        Compiling includes reading the compile cache.

        Returns:
          Seconds since the process was started; None on later calls.
        """
        if self._done:
            return None
        self._done = True
        jax.monitoring.unregister_event_duration_listener(self._count)
        seconds = process_age()
        _logger.info(
            "first step after %.1f s (%.1f s of it compiling)",
            *(seconds, self._compiling),
        )
        if self._cache is not None:
            self._cache.log()
            self._cache.close()
        return seconds
