"""Loading a checkpoint, by us and by `transformers`: for the case `load`.

A folder of random shards of the shape of a model is written once; every round loads it
in a fresh process of each kind, from files that the system has in memory. A process
says how long it took until the loader returned and until every page of the parameters
had been touched (torch may leave them in the files until then), how many bytes it
keeps, and by how much its memory grew at most, mapped files included.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import ml_dtypes
import numpy as np

from pref_jax.models import pretrained, published
from pref_jax.models.decoder import DecoderConfig
from variants import quartiles

ROOT = pathlib.Path(__file__).resolve().parents[1]

_COMMON = """
import json, sys, time
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith(field))
def report(load, leaves, touch):
    before, began = memory("VmRSS"), time.perf_counter()
    held = load()
    returned = time.perf_counter() - began
    for leaf in leaves(held):
        touch(leaf)
    print(json.dumps({
        "seconds": returned,
        "seconds_touched": time.perf_counter() - began,
        "kept_bytes": sum(leaf.nbytes for leaf in leaves(held)),
        "peak_bytes": memory("VmHWM") - before,
        "largest_device_bytes": device_bytes(leaves(held)),
    }))
def device_bytes(leaves):
    return None
"""
_OURS = """
import jax, transformers
from transformers import AutoConfig
from pref_jax.models import pretrained
report(
    lambda: pretrained.load(sys.argv[1], param_dtype="bfloat16")[1],
    jax.tree.leaves,
    lambda leaf: leaf.ravel().view("uint16")[::2048].max(),
)
"""
_TORCH = """
import torch
from transformers import AutoModelForCausalLM
report(
    lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16),
    lambda model: list(model.parameters()),
    lambda leaf: leaf.detach().flatten().view(torch.int16)[::2048].max(),
)
"""
_ON_DEVICES = """
import collections, jax, transformers
from transformers import AutoConfig
from pref_jax import model_folders
from pref_jax.train import sharding
jax.config.update("jax_num_cpu_devices", 8)
mesh = sharding.make_mesh(data=1, fsdp=8)
def device_bytes(leaves):
    held = collections.Counter()
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())
report(
    lambda: model_folders.load(sys.argv[1], mesh=mesh, param_dtype="bfloat16")[1],
    jax.tree.leaves,
    lambda leaf: leaf.block_until_ready(),
)
"""
PROGRAMS = {
    "pref_jax": _COMMON + _OURS,
    "transformers": _COMMON + _TORCH,
    "pref_jax, 8 devices": _COMMON + _ON_DEVICES,
}


def write_random(folder: str, config: DecoderConfig, *, seed: int) -> None:
    """Shards of bfloat16 of any finite bits, a gigabyte each."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        bits = rng.integers(0, 2**15, leaf.size, np.uint16) & 0x3FFF
        return bits.view(ml_dtypes.bfloat16).reshape(leaf.shape)

    params = jax.tree.map(draw, pretrained.param_shapes(config))
    pretrained.save(folder, config, params, max_shard_bytes=10**9)


def run(program: str, folder: str) -> dict:
    """What a fresh process says of loading the folder."""
    for file in pathlib.Path(folder).glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    process = subprocess.run(
        [sys.executable, "-c", program, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def measure(
    config: DecoderConfig = published.LLAMA_3_2_1B, *, rounds: int = 5, seed: int
) -> dict:
    """The variants of the case `load`, and their ratios."""
    programs = dict(PROGRAMS)
    if importlib.util.find_spec("torch") is None:
        del programs["transformers"]
    found = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as root:
        folder = str(pathlib.Path(root) / "model")
        write_random(folder, config, seed=seed)
        for _ in range(rounds):
            for name, program in programs.items():
                found[name].append(run(program, folder))
    variants = {name: _summary(results) for name, results in found.items()}
    line = {"calls": rounds, "dtype": "bfloat16", "variants": variants}
    if len(variants) > 1:
        seconds = [way["median_seconds"] for way in variants.values()]
        line["time_ratio"] = round(seconds[1] / seconds[0], 3)
        line["ratio_is"] = " / ".join(list(variants)[1::-1])
    return line


def _summary(results: list[dict]) -> dict:
    def times(key):
        return quartiles([result[key] for result in results])

    touched = times("seconds_touched")
    kept, peak = (
        max(result[key] for result in results) for key in ("kept_bytes", "peak_bytes")
    )
    on_device = results[0]["largest_device_bytes"]
    return {
        "shape": f"{kept / 2e9:.2f} 10^9 parameters",
        **touched,
        "median_seconds_returned": times("seconds")["median_seconds"],
        "kept_bytes": kept,
        "peak_bytes": peak,
        "peak_over_kept": round(peak / kept, 3),
        "device_over_kept": on_device and round(on_device / kept, 3),
        "megabytes_rate": round(kept / 1e6 / touched["median_seconds"], 3),
    }
