"""Traces hold the steps asked for; the cache and the clock say what happened."""

import logging
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from etils import epath

import object_store
from pref_jax.train import profiling
from pref_jax.train.profiling import (
    ProfileConfig,
    StartClock,
    StepProfiler,
    disable_compile_cache,
    enable_compile_cache,
    process_age,
)


def traces(folder):
    """Bytes of each trace in a run's folder."""
    profile = epath.Path(folder) / "profile" / "plugins" / "profile"
    if not profile.exists():
        return []
    return [
        file.read_bytes()
        for started in profile.iterdir()
        for file in started.iterdir()
        if file.name.endswith(".xplane.pb")
    ]


def run_steps(profiler, steps):
    step_function = jax.jit(lambda x: x + 1)
    x = jnp.zeros(3)
    for step in steps:
        profiler.before_step(step)
        with jax.profiler.TraceAnnotation(f"mark-{step}-"):
            x = step_function(x)
        profiler.after_step(step, x)


def marks(trace):
    return [step for step in range(1, 10) if f"mark-{step}-".encode() in trace]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 7), [3, 4]),
        (range(4, 7), [4]),  # a restart in the middle
        (range(1, 4), [3]),  # an end in the middle
    ],
)
def test_a_trace_holds_the_steps_asked_for(tmp_path, steps, expected):
    with StepProfiler(tmp_path, ProfileConfig(first=3, num=2)) as profiler:
        run_steps(profiler, steps)
    (trace,) = traces(tmp_path)
    assert marks(trace) == expected


def test_a_trace_of_a_failing_run_is_written_and_the_next_can_start(tmp_path):
    for name in ("a", "b"):
        profiler = StepProfiler(tmp_path / name, ProfileConfig(first=1))
        with pytest.raises(KeyError), profiler:
            profiler.before_step(1)
            raise KeyError
        assert len(traces(tmp_path / name)) == 1


@pytest.mark.parametrize("config", [None, ProfileConfig(first=9)])
def test_without_a_step_to_trace_nothing_is_written(tmp_path, config):
    with StepProfiler(tmp_path, config) as profiler:
        run_steps(profiler, range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_other_processes_do_not_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with StepProfiler(tmp_path, ProfileConfig(first=1)) as profiler:
        run_steps(profiler, range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_reaches_a_bucket(monkeypatch):
    object_store.install(monkeypatch)
    with StepProfiler("gs://bucket/run", ProfileConfig(first=1, num=1)) as profiler:
        run_steps(profiler, range(1, 3))
        assert [marks(trace) for trace in traces("gs://bucket/run")] == [[1]]


def test_steps_are_counted_from_one():
    for wrong in ({"first": 0}, {"first": 1, "num": 0}):
        with pytest.raises(ValueError, match="must be at least 1; got"):
            ProfileConfig(**wrong)


@pytest.fixture
def no_cache_afterwards():
    names = ("jax_persistent_cache_enable_xla_caches",)
    before = {name: getattr(jax.config, name) for name in names}
    yield
    disable_compile_cache()
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("store", ["disk", "bucket"])
def test_the_second_start_finds_what_the_first_compiled(
    tmp_path, monkeypatch, store, caplog, no_cache_afterwards
):
    folder = str(tmp_path)
    if store == "bucket":
        bucket = object_store.install(monkeypatch)
        folder = "gs://bucket/cache"
    x = jnp.ones(7)  # computed before, without a cache
    counts = []
    for _ in range(2):
        cache = enable_compile_cache(folder, min_seconds=0.0)
        jax.jit(lambda x: jnp.sin(x) * 3.25)(x)  # a new function: jax forgets the old
        counts.append((cache.hits, cache.misses))
        with caplog.at_level(logging.INFO, "pref_jax"):
            StartClock(cache).first_step()
    assert counts == [(0, 1), (1, 0)]
    told = [text for text in caplog.messages if text.startswith("compile cache")]
    assert told == [f"compile cache: {n} of 1 programs found" for n in (0, 1)]
    if store == "bucket":
        assert any(name.startswith("/bucket/cache/jit_") for name in bucket.puts)


def test_a_fast_program_is_not_kept(tmp_path, no_cache_afterwards):
    cache = enable_compile_cache(tmp_path, min_seconds=1000.0)
    jax.jit(lambda x: jnp.cos(x) * 3.5)(jnp.ones(7))
    cache.close()
    assert cache.misses > 0 and not list(tmp_path.glob("jit_*"))


def test_the_age_of_a_process_counts_from_its_start():
    program = (
        "import time\n"
        "time.sleep(0.5)\n"
        "from pref_jax.train.profiling import process_age\n"
        "print(process_age())\n"
    )
    began = time.monotonic()
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    taken = time.monotonic() - began
    assert 0.5 <= float(output) <= taken + 0.02


def test_without_proc_the_age_counts_from_the_import(monkeypatch):
    monkeypatch.delattr(profiling.time, "CLOCK_BOOTTIME")
    monkeypatch.setattr(profiling, "_IMPORTED", time.monotonic() - 5)
    assert 5 <= process_age() < 6


def test_the_first_step_is_timed_once_with_what_compiled(monkeypatch, caplog):
    monkeypatch.setattr(profiling, "process_age", lambda: 12.34)
    clock = StartClock()
    for event, seconds in (
        ("/jax/core/compile/backend_compile_duration", 1.5),
        ("/jax/core/compile/backend_compile_duration", 2.0),
        ("/jax/core/compile/jaxpr_trace_duration", 50.0),
    ):
        jax.monitoring.record_event_duration_secs(event, seconds)
    with caplog.at_level(logging.INFO, "pref_jax"):
        assert (clock.first_step(), clock.first_step()) == (12.34, None)
    assert caplog.messages == ["first step after 12.3 s (3.5 s of it compiling)"]


def test_compiling_is_seen_by_the_clock():
    clock = StartClock()
    jax.jit(lambda x: jnp.tan(x) * 7.75)(jnp.ones(5))
    assert clock._compiling > 0
    clock.first_step()
