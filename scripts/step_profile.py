"""Where the time of a step goes: the kernels of a trace by the part they belong to.

For the case `peak`. The kernels of a CPU run beside one another, so that their times
add up to more than the step: read the shares.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax

from pref_jax.train import hlo
from variants import Variant

_PARTS = (
    ("token_stats", "unembedding"),
    ("attend", "attention over keys"),
    ("attention", "attention's projections and norm"),
    ("mlp", "MLP and norm"),
    ("update", "optimiser"),
    ("layers", "what layers keep"),
)
"""Scope -> part, the innermost first."""

_PRODUCT = re.compile(r"dot\b|ynn_fusion")
"""Names of kernels of products; XLA's CPU kernels of that name make sums as well."""


def kernel_parts(hlo_text: str) -> dict[str, tuple[str, str]]:
    """Kernel -> (part of the step, "products" or "the rest").

    Args:
      hlo_text: `compiled.as_text()` of a step.
    """
    found = {}
    for name, scope in hlo.kernel_scopes(hlo_text).items():
        names = re.split(r"[/()]", scope)
        part = next((part for key, part in _PARTS if key in names), "all else")
        is_product = _PRODUCT.match(name) is not None
        found[name] = part, "products" if is_product else "the rest"
    return found


def busy_seconds(folder: str) -> dict[str, float]:
    """Kernel -> seconds of all its calls, of a trace that jax's profiler wrote."""
    (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    total = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            total[event["name"]] += event["dur"] / 1e6
    return total


def profile(variant: Variant, *, calls: int) -> list[dict]:
    """Shares of the parts of a step in the time that kernels are busy, largest first.

    Args:
      variant: the step.
      calls: steps that are traced.
    """
    step = jax.jit(variant.function).lower(*variant.arguments[0]).compile()
    jax.block_until_ready(step(*variant.arguments[0]))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(step(*variant.arguments[0]))
        busy = busy_seconds(folder)
    parts = kernel_parts(step.as_text())
    total = collections.Counter()
    for name, seconds in busy.items():
        if name in parts:
            total[parts[name]] += seconds
    everything = sum(total.values())
    return [
        {
            "part": part,
            "kind": kind,
            "busy_seconds": round(seconds / calls, 6),
            "share": round(seconds / everything, 4),
        }
        for (part, kind), seconds in total.most_common()
    ]
