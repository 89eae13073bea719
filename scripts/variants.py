"""Variants of one piece of work, measured in turn in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of doing the work of a case.

    Attributes:
      name: of the way.
      function: to be compiled, unless it runs on the host.
      arguments: one tuple a call, used in turn.
      count: what one call of each argument tuple achieves, such as its tokens.
      shape: what to print of its arrays.
      host: it makes no device arrays and is called as it is.
    """

    name: str
    function: Callable
    arguments: list[tuple]
    count: list[dict[str, int]]
    shape: str
    host: bool = False


def quartiles(seconds) -> dict:
    """Median and quartiles of some times, as a record holds them."""
    low, median, high = (
        round(float(q), 6) for q in np.quantile(seconds, [0.25, 0.5, 0.75])
    )
    return {"median_seconds": median, "iqr_seconds": [low, high]}


def measure(name: str, variants: list[Variant], *, calls: int, dtype: str) -> dict:
    """Compile, warm up, run the variants in turn; times, rates, bytes and ratios."""
    results, compiled = {}, {}
    for variant in variants:
        began = time.perf_counter()
        compiled[variant.name], memory = variant.function, None
        if not variant.host:
            program = jax.jit(variant.function).lower(*variant.arguments[0]).compile()
            compiled[variant.name], memory = program, program.memory_analysis()
        results[variant.name] = {
            "shape": variant.shape,
            "compile_seconds": round(time.perf_counter() - began, 3),
            "temp_bytes": memory.temp_size_in_bytes if memory else None,
        }
        jax.block_until_ready(compiled[variant.name](*variant.arguments[0]))
    seconds = {variant.name: [] for variant in variants}
    for call in range(calls):
        for variant in variants:
            arguments = variant.arguments[call % len(variant.arguments)]
            began = time.perf_counter()
            jax.block_until_ready(compiled[variant.name](*arguments))
            seconds[variant.name].append(time.perf_counter() - began)
    for variant in variants:
        times = seconds[variant.name]
        result = results[variant.name]
        result |= quartiles(times)
        for key in variant.count[0]:
            done = sum(
                variant.count[call % len(variant.count)][key] for call in range(calls)
            )
            result[f"{key}_rate"] = round(done / sum(times), 3)
    line = {
        "name": name,
        "dtype": dtype,
        "calls": calls,
        "variants": results,
    }
    if len(variants) > 1:
        first, second = (results[variant.name] for variant in variants[:2])
        line |= {
            "time_ratio": round(second["median_seconds"] / first["median_seconds"], 3),
            "temp_bytes_ratio": _ratio(second["temp_bytes"], first["temp_bytes"]),
            "ratio_is": f"{variants[1].name} / {variants[0].name}",
        }
    return line


def _ratio(a, b):
    return round(a / b, 3) if a and b else None
