"""Our DPO training step beside those of TRL and Tunix: one work, one machine, in turn.

    python scripts/benchmark_peers.py
    python scripts/benchmark_peers.py --pairs train.jsonl.gz --tokenizer DIR
    python scripts/benchmark_peers.py --rounds 10 --write docs/records

Each contestant trains with its own trainer in a process of its own, the peers in
environments that are made at the first call (`--environments`, 1 to 2 GB each). All
have the same Llama, initial weights, pairs, pairs of a step, AdamW without clipping,
float32 and processors; the losses of every step must agree, or no ratio is given. They
take turns by blocks of steps, so that a ratio is formed of moments when the machine
was the same.

Without `--pairs` the lengths are drawn (log-normal, means 56 + 98 / 95 tokens) and so
are the tokens. What a step is, is up to each trainer: all that happens between two
steps counts, a batch that is laid out and a metric that is read included. Tokenising,
stored reference log-probabilities and compilation are done before; they are part of
`start` and `warm up`.

TRL and Tunix are measured twice: with their defaults, and with the best settings that
their sources offer for this machine (`scripts/peers/`). The best rows are given the
pairs in an order that keeps texts of like length together; a block holds the same pairs
in either order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import tyro

from peers import blocks, environments, rounds
from pref_jax.data import readers, templates
from pref_jax.models import pretrained
from pref_jax.models.decoder import DecoderConfig, LayerKind, Rotary, make_decoder
from pref_jax.train.run import environment, write_json

SCRIPTS = pathlib.Path(__file__).resolve().parent

ROTARY_BASE = 1e6
"""Of all contestants: Tunix 0.1.7 turns by it, whatever its config says."""

STORED, LIVE = "pref_jax, stored anchor", "pref_jax, live anchor"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant before it starts.

    Attributes:
      program: its file in scripts/peers.
      order: "drawn" or "by length", of the pairs.
      options: of its program.
      peer: whose environment it needs; None: this one.
    """

    program: str
    order: str
    options: dict[str, Any]
    peer: str | None = None


ENTRIES = {
    STORED: Entry("pref_jax_dpo.py", "drawn", {"anchor": "stored"}),
    LIVE: Entry("pref_jax_dpo.py", "drawn", {"anchor": "live"}),
    # Steps of unlike size: shorter rows leave less of them empty.
    "pref_jax, stored anchor, by length": Entry(
        "pref_jax_dpo.py", "by length", {"anchor": "stored", "row_length": 1024}
    ),
    "TRL, defaults": Entry("trl_dpo.py", "drawn", {"settings": "defaults"}, "trl"),
    "TRL, best": Entry("trl_dpo.py", "by length", {"settings": "best"}, "trl"),
    "Tunix, defaults": Entry(
        "tunix_dpo.py", "drawn", {"settings": "defaults"}, "tunix"
    ),
    "Tunix, best": Entry("tunix_dpo.py", "by length", {"settings": "best"}, "tunix"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and on which shapes."""

    contestants: tuple[str, ...] = tuple(
        ENTRIES
    )  # ours with a stored anchor among them
    rounds: int = 5  # timed blocks of each
    steps: int = 8  # of a block
    pairs_per_step: int = 8
    threads: int = 2  # processors of each process
    row_length: int = 2688  # of ours in drawn order: all pairs of a step in one row
    vocab_size: int = 50257  # V, that of `tokenizer` where one is given
    width: int = 256  # D
    num_layers: int = 4
    num_heads: int = 8  # of 32 where the width is 256
    mlp_width: int = 704
    tied: bool = True  # unembedding = embedding
    beta: float = 0.1  # reward per nat
    learning_rate: float = 1e-5  # constant; at 1e-4 a block is known by heart at once
    tolerance: float = 1e-3  # of every loss, nats
    environments: str = ".peers"  # folder of the peers' environments
    pairs: str | None = None  # .jsonl or .jsonl.gz of pairs
    tokenizer: str | None = None  # folder, for `pairs`
    write: str | None = None  # folder for peers.json
    seed: int = 0

    def __post_init__(self):
        unknown = sorted(set(self.contestants) - set(ENTRIES))
        if unknown or STORED not in self.contestants:
            raise ValueError(
                f"`contestants` may name {'; '.join(ENTRIES)}, the first among them; "
                f"got {'; '.join(self.contestants)}."
            )
        for name in ("rounds", "steps", "pairs_per_step", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {self}.")
        if self.width % self.num_heads:
            raise ValueError(
                f"`width` must be a multiple of `num_heads`; got {self.width} and "
                f"{self.num_heads}."
            )
        if (self.pairs is None) != (self.tokenizer is None):
            raise ValueError("`pairs` and `tokenizer` belong together; give both.")


def decoder_config(config: Config) -> DecoderConfig:
    """The model of all contestants."""
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.width // config.num_heads,
        mlp_width=config.mlp_width,
        period=(LayerKind(rotary=Rotary(ROTARY_BASE)),),
        tied=config.tied,
        max_positions=4096,
    )


def take_pairs(config: Config) -> tuple[list[tuple[np.ndarray, ...]], Config]:
    """(prompt, chosen, rejected) of a block's pairs, and the config with their V."""
    num = config.steps * config.pairs_per_step
    rng = np.random.default_rng(config.seed)
    if config.pairs is None:
        means = np.log(np.array([56, 98, 95])) - 0.5 * 0.45**2
        lengths = np.exp(rng.normal(means, 0.45, (num, 3))).round().astype(int)
        pairs = [
            tuple(rng.integers(1, config.vocab_size, n, np.int32) for n in pair)
            for pair in lengths.clip(2, 400)
        ]
        return pairs, config
    tokenizer = templates.load_tokenizer(config.tokenizer)
    encoder = templates.TextEncoder(tokenizer)
    found = readers.read(config.pairs)
    if len(found) < num:
        raise ValueError(
            f"a block takes {num} pairs and {config.pairs} has {len(found)}; use fewer "
            f"`steps` or `pairs_per_step`."
        )
    groups = [encoder.encode(found[int(i)]) for i in rng.permutation(len(found))[:num]]
    pairs = [(group.prompt, *group.responses) for group in groups]
    return pairs, dataclasses.replace(config, vocab_size=len(tokenizer))


def batches_in_order(pairs, order: str, config: Config) -> list[list[int]]:
    """Indices of the pairs of each step of a block."""
    indices = np.arange(len(pairs))
    if order == "by length":
        longest = [len(p) + max(len(c), len(r)) for p, c, r in pairs]
        indices = np.argsort(longest, kind="stable")
    steps = indices.reshape(config.steps, config.pairs_per_step)
    if order == "by length":  # and no course from easy to hard
        steps = np.random.default_rng(config.seed).permutation(steps)
    return steps.tolist()


def start(config: Config, folder: pathlib.Path, pairs) -> list[rounds.Contestant]:
    """The contestants, each waiting before its first step; one after the other."""
    sizes = decoder_config(config)
    params = jax.jit(make_decoder(sizes).init)(jax.random.key(config.seed))
    pretrained.save(folder / "model", sizes, params, family="llama")
    blocks.write_pairs(folder / "pairs.npz", pairs)
    contestants = []
    for number, name in enumerate(config.contestants):
        entry = ENTRIES[name]
        scratch = folder / str(number)
        scratch.mkdir()
        options = dict(entry.options)
        if entry.peer is None:
            options.setdefault("row_length", config.row_length)
        job = blocks.Job(
            model=str(folder / "model"),
            data=str(folder / "pairs.npz"),
            scratch=str(scratch),
            batches=batches_in_order(pairs, entry.order, config),
            num_blocks=config.rounds + 1,
            beta=config.beta,
            optimizer={
                "learning_rate": config.learning_rate,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
            },
            sizes=dataclasses.asdict(sizes) | {"rotary_base": ROTARY_BASE},
            seed=config.seed,
            options=options,
        )
        (scratch / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
        python = sys.executable
        if entry.peer is not None:
            python = environments.python_of(
                pathlib.Path(config.environments), entry.peer
            )
        began = time.perf_counter()
        with rounds.processors(config.threads):
            contestant = rounds.Contestant(
                name,
                [python, str(SCRIPTS / "peers" / entry.program), scratch / "job.json"],
                log=folder / f"{number}.log",
                environment={
                    "PYTHONPATH": str(SCRIPTS.parent) if entry.peer is None else "",
                    "OMP_NUM_THREADS": str(config.threads),
                    "CUDA_VISIBLE_DEVICES": "",
                    "JAX_PLATFORMS": "cpu",
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "TRL_EXPERIMENTAL_SILENCE": "1",
                    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
                },
            )
        contestants.append(contestant)
        contestant.wait_ready()
        contestant.about["start_seconds"] = time.perf_counter() - began
        print(f"{name} is ready", flush=True)
    return contestants


def check_agreement(
    losses: dict[str, list[float]], orders: dict[str, str], tolerance: float
) -> dict[str, float]:
    """How far the losses of contestants with one order lie apart.

    Args:
      losses: of every step, by contestant.
      orders: of the pairs, by contestant.
      tolerance: nats.

    Returns:
      The largest distance of a first loss from log 2, and of two losses of a step.

    Raises:
      ValueError: a distance is above `tolerance`: they do not do the same work.
    """
    first = float(np.max([abs(found[0] - math.log(2)) for found in losses.values()]))
    apart = {}
    for order in sorted(set(orders.values())):
        curves = np.array([losses[name] for name in losses if orders[name] == order])
        apart[order] = float(np.ptp(curves, axis=0).max())
    largest = float(np.max(list(apart.values())))
    if not (first <= tolerance and largest <= tolerance):  # nor where one is NaN
        raise ValueError(
            f"the contestants do not do the same work: a first loss lies {first:.2e} "
            f"from log 2 and two losses of a step {largest:.2e} apart ({apart}); "
            f"{tolerance} is allowed."
        )
    return {"first_loss_from_log_2": first, "losses_apart": largest}


def summarise(
    config: Config,
    names: list[str],
    found: list[rounds.Blocks],
    about: list[dict[str, Any]],
) -> dict[str, Any]:
    """Rates, memory, ratios and agreement of all contestants.

    Raises:
      ValueError: as `check_agreement`.
    """
    taken = dict(zip(names, found, strict=True))
    pairs = config.steps * config.pairs_per_step
    summary = {}
    for name, of in zip(names, about, strict=True):
        block = taken[name]
        summary[name] = {
            "order": ENTRIES[name].order,
            **of["about"],
            "versions": of["versions"],
            "start_seconds": of["start_seconds"],
            **dataclasses.asdict(block),
            "pairs_per_second": pairs / float(np.median(block.seconds)),
            "cpu_seconds_per_pair": float(np.median(block.cpu_seconds)) / pairs,
            "ratios": {
                ours: {
                    "time": rounds.ratio(block.seconds, taken[ours].seconds),
                    "cpu": rounds.ratio(block.cpu_seconds, taken[ours].cpu_seconds),
                }
                for ours in (STORED, LIVE)
                if ours in taken and ours != name
            },
        }
    agreement = check_agreement(
        {name: block.losses for name, block in taken.items()},
        {name: ENTRIES[name].order for name in names},
        config.tolerance,
    )
    return {"contestants": summary, "agreement": agreement}


def rounded(value, digits: int = 4):
    """A record's numbers with as many digits as they deserve; losses keep seven."""
    if isinstance(value, dict):
        return {k: rounded(v, 7 if k == "losses" else digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def measure(config: Config) -> dict[str, Any]:
    """The record of a comparison."""
    pairs, config = take_pairs(config)
    with tempfile.TemporaryDirectory() as folder:
        contestants = start(config, pathlib.Path(folder), pairs)
        try:
            found = rounds.alternate(contestants, config.rounds)
        finally:
            for contestant in contestants:
                contestant.stop()
    names = [contestant.name for contestant in contestants]
    about = [contestant.about for contestant in contestants]
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    kept = dataclasses.asdict(config)
    for name in ("environments", "pairs", "tokenizer", "write"):
        del kept[name]
    record = {
        "name": "peers",
        "config": kept,
        "parameters": sum(
            math.prod(leaf.shape)
            for leaf in jax.tree.leaves(pretrained.param_shapes(decoder_config(config)))
        ),
        "data": {
            "lengths": "drawn" if config.pairs is None else "of a file",
            "pairs": len(pairs),
            "mean_tokens": lengths.mean(0).tolist(),
            "longest_tokens": lengths.max(0).tolist(),
        },
        **summarise(config, names, found, about),
        "environment": environment(),
    }
    return rounded(record)


def describe(record: dict[str, Any]) -> str:
    """The record in lines for a terminal."""
    lines = []
    for name, of in record["contestants"].items():
        ratios = [
            f"{what} {median:.2f} [{low:.2f}, {high:.2f}]"
            for what, (median, low, high) in of["ratios"].get(STORED, {}).items()
        ]
        lines.append(
            f"{name}: {of['shape']} filled {100 * of['fill']:.0f} %, "
            f"{of['pairs_per_second']:.2f} pairs/s, {of['cpu_seconds_per_pair']:.3f} "
            f"processor seconds a pair, peak {of['peak_bytes'] / 1e9:.2f} GB, start "
            f"{of['start_seconds']:.0f} s, warm up {of['warm_up_seconds']:.0f} s"
            + (f"; over ours: {', '.join(ratios)}" if ratios else "")
        )
    return "\n".join([*lines, f"losses: {record['agreement']}"])


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__)
    record = measure(config)
    print(describe(record))
    if config.write is not None:
        folder = pathlib.Path(config.write)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "peers.json", record)


if __name__ == "__main__":
    main()
