"""DPO of a model of the shape of Llama 3.2 1B on one NVIDIA GPU: a JSON line.

    bash scripts/benchmark_gpu.sh                       with environments of its own
    bash scripts/benchmark_gpu.sh --write docs/records  keeps the line
    python scripts/benchmark_gpu.py --smoke             a tiny shape, on any machine

Random weights, bfloat16 products, float32 parameters and AdamW; the anchor's logps are
stored. Beside it TRL's `DPOTrainer` in a Python of its own: the same shape, pairs of
the same lengths, float32 parameters under bfloat16 autocast, attention of torch (sdpa),
checkpointed layers, precomputed reference. Both run in processes of their own, one
after the other, so that each has the GPU alone.

Of both, the utilisation (MFU) counts the flops that the pairs need, not those that were
spent: each prompt once, the unembedding of scored positions alone, no padding, nothing
computed twice; a pass back costs two forward.

    flops = 3 * (2 * N * tokens + 2 * V * D * scored + 4 * layers * H * head_dim * seen)
    MFU = flops / (seconds * peak flops per second)

N parameters of the layers and norms; V, D, H, head_dim of the model; `tokens` of
prompts and responses; `scored` those of responses; `seen` (query, key) pairs of
attention.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pref_jax import anchors, rewards
from pref_jax.data import rows, sources
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.method import Method, on_rewards
from pref_jax.models import published
from pref_jax.models.decoder import DecoderConfig, make_decoder
from pref_jax.models.flops import FORMULA, forward_flops
from pref_jax.train.logging import peak_flops
from pref_jax.train.optimizer import OptimizerConfig, make_optimizer
from pref_jax.train.run import environment, write_json
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import TokenGroup

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAME = "gpu_dpo"
WARMUP_CALLS = 2  # the first compiles, or fills torch's caches
LIMIT_SECONDS = 240  # of one way, so that all stays under ten minutes

Lengths = list[tuple[int, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    smoke: bool = False  # a tiny shape, also without a GPU: that all of it works
    calls: int = 10  # timed optimiser steps
    groups_per_step: int = 48  # pairs of an optimiser step
    row_length: int = 4096  # tokens of a row
    rows_per_microbatch: int = 2  # of ours
    pairs_per_microbatch: int = 2  # of TRL
    remat: str = "full"  # a name of decoder.REMAT_POLICIES
    attention: str = "auto"  # a name of attention.IMPLEMENTATIONS
    torch_python: str | None = None  # a Python that has torch and TRL
    torch_missing: str = "no Python with torch was given"  # why there is none
    write: str | None = None  # folder for benchmark_gpu.json
    way: str = "both"  # both, or pref_jax alone, in this process
    seed: int = 0

    def __post_init__(self):
        if self.way not in ("both", "pref_jax"):
            raise ValueError(f"`way` must be both or pref_jax; got {self.way!r}.")
        if self.calls < 1:
            raise ValueError(f"`calls` must be at least 1; got {self.calls}.")


TINY = DecoderConfig(
    vocab_size=256,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
)
SMOKE = {"calls": 2, "groups_per_step": 4, "row_length": 128}


def sizes_of(config: Config) -> DecoderConfig:
    """The model."""
    sizes = TINY if config.smoke else published.LLAMA_3_2_1B
    return dataclasses.replace(
        sizes, dtype="bfloat16", remat=config.remat, attention=config.attention
    )


def draw_lengths(config: Config) -> Lengths:
    """Of every pair of all steps: tokens of the prompt and of the two responses."""
    mean, longest = (16, 40) if config.smoke else (384, 1300)
    rng = np.random.default_rng(config.seed)
    shape = ((WARMUP_CALLS + config.calls) * config.groups_per_step, 3)
    drawn = np.exp(rng.normal(np.log(mean) - 0.125, 0.5, shape)).round().astype(int)
    return [(int(p), (int(a), int(b))) for p, a, b in drawn.clip(2, longest)]


def useful_flops(sizes: DecoderConfig, lengths: Lengths) -> float:
    """What forward and backward of these pairs need."""
    return 3 * forward_flops(sizes, lengths)


def summarise(
    sizes: DecoderConfig, lengths: Lengths, seconds: list[float], device_kind: str
) -> dict:
    """Rates of timed steps.

    Args:
      sizes: of the model.
      lengths: of the pairs of these steps, all together.
      seconds: of each step.
      device_kind: as jax and nvidia-smi name the GPU.
    """
    total, peak = sum(seconds), peak_flops(device_kind)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    tokens = sum(prompt + sum(responses) for prompt, responses in lengths)
    flops = useful_flops(sizes, lengths)
    return {
        "median_seconds": round(float(median), 4),
        "iqr_seconds": [round(float(low), 4), round(float(high), 4)],
        "pairs_rate": round(len(lengths) / total, 3),
        "real_tokens_rate": round(tokens / total, 1),
        "useful_teraflops_rate": round(flops / total / 1e12, 6),
        "mfu": None if peak is None else round(flops / total / peak, 4),
    }


def _groups(sizes: DecoderConfig, lengths: Lengths, seed: int) -> list[TokenGroup]:
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(1, sizes.vocab_size, n, dtype=np.int32)

    return [
        TokenGroup(
            prompt=draw(prompt),
            responses=tuple(draw(n) for n in responses),
            loss_masks=tuple(np.ones(n, bool) for n in responses),
            labels=(1.0, 0.0),
            record=i,
            extras={
                "anchor_logps": tuple(
                    np.full(n, -np.log(sizes.vocab_size), np.float32) for n in responses
                )
            },
        )
        for i, (prompt, responses) in enumerate(lengths)
    ]


def run_ours(config: Config) -> dict:
    """The steps of this library, in this process."""
    sizes, lengths = sizes_of(config), draw_lengths(config)
    batches = sources.evaluation_batches(
        _groups(sizes, lengths, config.seed),
        groups_per_step=config.groups_per_step,
        row_length=config.row_length,
        rows_multiple=config.rows_per_microbatch,
    )
    num_rows = batches.shape.num_rows
    num_microbatches = num_rows // config.rows_per_microbatch
    model = make_decoder(sizes)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-6),
        num_steps=len(batches),
        param_axes=model.param_axes(params),
    )
    state = init_state(params, optimizer, rng=jax.random.key(0))
    del params
    method = Method(
        name="DPO",
        anchor=anchors.fixed(),
        reward=lambda *args, **options: rewards.sequence_reward(
            *args, **options, beta=0.1
        ),
        loss=on_rewards(logistic_loss),
    )
    step = make_train_step(method, model, optimizer, num_microbatches=num_microbatches)
    step = jax.jit(step, donate_argnums=0)
    seconds, done = [], []
    for number in range(len(batches)):
        batch = jax.tree.map(jnp.asarray, batches[number])
        jax.block_until_ready(batch)
        began = time.perf_counter()
        state, outputs = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - began)
        done += [lengths[i] for i in batches.indices(number)]
        if not np.isfinite(float(outputs["metrics"]["loss"])):
            raise ValueError(f"step {number} has the loss {outputs['metrics']['loss']}")
    device = jax.devices()[0]
    first = WARMUP_CALLS * config.groups_per_step
    used = rows.count_batch(batches[0])["tokens"] / (num_rows * config.row_length)
    return {
        "shape": f"{num_microbatches} x [{config.rows_per_microbatch}, "
        f"{config.row_length}], {used:.0%} filled, remat {config.remat}",
        "first_step_seconds": round(seconds[0], 2),
        **summarise(sizes, done[first:], seconds[WARMUP_CALLS:], device.device_kind),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "device_kind": device.device_kind,
        "environment": environment(),
    }


def has_gpu() -> bool:
    """Whether jax would run on an NVIDIA GPU. Takes hold of it, if so."""
    return jax.default_backend() == "gpu"


def _child(command: list[str], text: str | None = None) -> tuple[dict | None, str]:
    """The last line of a process as JSON, or None and why there is none."""
    try:
        process = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error).replace(str(ROOT) + "/", "")
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        last = (process.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return None, f"exit code {process.returncode}: {last}"
    return json.loads(process.stdout.splitlines()[-1]), ""


def run_trl(config: Config) -> dict:
    """The steps of TRL, in a process of the other Python."""
    if config.torch_python is None:
        return {"status": "not run", "reason": config.torch_missing}
    sizes, lengths = sizes_of(config), draw_lengths(config)
    task = {
        "sizes": dataclasses.asdict(dataclasses.replace(sizes, period=())),
        "lengths": lengths,
        "pairs_per_step": config.groups_per_step,
        "pairs_per_microbatch": config.pairs_per_microbatch,
        "steps": WARMUP_CALLS + config.calls,
        "seed": config.seed,
    }
    command = [config.torch_python, str(ROOT / "tests/parity/trl_dpo_steps.py")]
    found, why = _child(command, json.dumps(task))
    if found is None:
        return {"status": "not run", "reason": why}
    if not (found["cuda"] or config.smoke):
        return {"status": "not run", "reason": "torch sees no GPU"}
    first = WARMUP_CALLS * config.groups_per_step
    timed = found["seconds"][WARMUP_CALLS:]
    return {
        "shape": f"micro-batches of {config.pairs_per_microbatch} pairs, padded; sdpa, "
        f"checkpointed",
        "first_step_seconds": round(found["seconds"][0], 2),
        **summarise(sizes, lengths[first:], timed, found["device_kind"]),
        "peak_bytes": found["peak_bytes"],
        "device_kind": found["device_kind"],
        "versions": found["versions"],
    }


def run_both(config: Config) -> dict:
    """Ours and TRL's, one after the other; the line."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), *sys.argv[1:]]
    ours, why = _child([*command, "--way", "pref_jax"])
    if ours is None:
        ours = {"status": "not run", "reason": why}
    if ours.get("status") == "not run":
        return {"name": NAME, "status": "not run", "reason": ours["reason"]}
    line = {
        "name": NAME,
        "status": "smoke" if config.smoke else "ran",
        "calls": config.calls,
        "dtype": "bfloat16",
        "pairs_per_step": config.groups_per_step,
        "formula": f"{FORMULA} / (seconds * peak), 3 passes",
        "peak_flops": peak_flops(ours["device_kind"]),
        "environment": ours.pop("environment"),
        "variants": {"pref_jax": ours, "TRL": run_trl(config)},
    }
    trl = line["variants"]["TRL"]
    if trl.get("status") != "not run":
        ratio = ours["pairs_rate"] / trl["pairs_rate"]
        line |= {"time_ratio": round(ratio, 3), "ratio_is": "TRL / pref_jax"}
    return line


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__)
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    if config.way == "both":
        line = run_both(config)
    elif has_gpu() or config.smoke:
        line = run_ours(config)
    else:
        reason = f"jax sees no NVIDIA GPU; it has {jax.devices()[0].device_kind}"
        line = {"name": NAME, "status": "not run", "reason": reason}
    print(json.dumps(line), flush=True)
    if config.write is not None and line.get("status") in ("ran", "smoke"):
        folder = pathlib.Path(config.write)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "benchmark_gpu.json", line)


if __name__ == "__main__":
    main()
