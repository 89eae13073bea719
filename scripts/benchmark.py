"""Speed and memory, two ways of doing one thing side by side: one JSON line a case.

    python scripts/benchmark.py
    python scripts/benchmark.py --cases scoring sampler --calls 20
    python scripts/benchmark.py --pairs train.jsonl.gz --tokenizer DIR --write records

Machines are noisy, so a case runs its variants in turn (A B A B ...) and gives the
ratio of medians; seconds of one run are not to be compared with seconds of another.

    scoring       token logps with gradient: chunked against dense logits
    dpo_pairs     a DPO step on rows against the padded [2B, T] layout, with the lengths
                  of `--pairs`, else drawn (log-normal, means 56 + 98 / 95 tokens), of a
                  model whose vocabulary is most of the work
    dpo_long      the same with 768-token prompts and two 128-token responses
    dpo_deep      as `dpo_pairs`, of a model whose layers are most of the work
    dpo_lists     that model on lists of 8 responses of 100 tokens to prompts of 400
    growth        the step on full rows while one size grows: rows, groups, layers ...
    peak          useful flops of the step over those of the best matrix product
    loop          a step within `fit`, which makes batches and logs, against compiled
                  steps alone, of a model of 100 million parameters
    attention     attention of one layer with gradient: in blocks against dense, on rows
                  of several groups
    tokenise      text of pairs to ids: many records at once against one by one
    input         a batch out of the token cache, on one thread, against the DPO step
                  that takes it, of a model of 19 million parameters
    sampler       tokens per second of the sampler, K samples of a prompt kept once,
                  against the prompt repeated K times
    generate      tokens per second of the sampler, K samples of ragged prompts, against
                  `generate` of transformers with the same weights where torch is
                  installed
    losses        every loss with its metrics and gradient, on [4096, 2] or [512, 32],
                  against TRL's same loss where it has one and torch is installed
    load          a checkpoint of 1.2 10^9 parameters in fresh processes, against the
                  loader of transformers where torch is installed
    import        a fresh Python that imports `pref_jax.losses`, against one that
                  imports jax alone
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import load_variants
import loop_variants
import loss_variants
import step_variants
import torch_generate
from pref_jax.data import readers, sources, templates, token_cache
from pref_jax.data.records import Records, from_objects
from pref_jax.logps import token_stats
from pref_jax.models.attention import IMPLEMENTATIONS
from pref_jax.models.decoder import DecoderConfig, make_decoder
from pref_jax.sampling import SamplingConfig, make_sampler
from pref_jax.train.run import environment, write_json
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from step_variants import Work, random_group
from variants import Variant, measure

ROOT = pathlib.Path(__file__).resolve().parents[1]

_logger = logging.getLogger("pref_jax.benchmark")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and on which shapes."""

    cases: tuple[str, ...] = ()  # names as above; none: all
    calls: int = 20  # timed calls of each variant, in turn
    vocab_size: int | None = None  # V; None: that of the case, as the next two
    width: int | None = None  # D
    num_layers: int | None = None
    groups_per_step: int = 8  # pairs of a DPO step
    num_batches: int = 8  # different batches of a DPO case
    dtype: str = "float32"  # of matrix products
    pairs: str | None = None  # .jsonl of pairs, whose lengths are used
    tokenizer: str | None = None  # folder, for `pairs`
    write: str | None = None  # folder for NAME.json of each case
    seed: int = 0

    def __post_init__(self):
        unknown = sorted(set(self.cases) - set(CASES))
        if unknown:
            raise ValueError(
                f"`cases` may name {', '.join(CASES)}; got {', '.join(unknown)}."
            )
        if self.calls < 20:
            raise ValueError(f"`calls` must be at least 20; got {self.calls}.")
        if (self.pairs is None) != (self.tokenizer is None):
            raise ValueError("`pairs` and `tokenizer` belong together; give both.")


def measure_case(name: str, config: Config) -> dict:
    """The line of a case, or of a case of many parts."""
    found = CASES[name](config)
    options = {"calls": config.calls, "dtype": config.dtype}
    if "variants" in found:  # measured in processes of its own
        line = {"name": name} | found
    elif isinstance(found, dict):
        parts = [measure(part, variants, **options) for part, variants in found.items()]
        line = {"name": name, "dtype": config.dtype, "parts": parts}
    else:
        line = measure(name, found, **options)
    line["environment"] = environment()
    line["environment"]["versions"] |= {
        package: importlib.metadata.version(package)
        for package in ("torch", "trl")
        if package in sys.modules
    }
    return line


_NARROW = DecoderConfig(
    vocab_size=8192,
    width=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_width=384,
)


def _sizes(config: Config, of_case: DecoderConfig = _NARROW) -> DecoderConfig:
    """The sizes of a case, or those that were asked for."""
    changes = {"dtype": config.dtype}
    for name in ("vocab_size", "num_layers"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    if config.width is not None:
        heads = config.width // 32
        changes |= {"width": config.width, "num_heads": heads, "num_kv_heads": heads}
        changes |= {"head_dim": 32, "mlp_width": 3 * config.width}
    return dataclasses.replace(of_case, **changes)


def _model(sizes: DecoderConfig, seed: int):
    model = make_decoder(sizes)
    return model, jax.jit(model.init)(jax.random.key(seed))


def scoring(config: Config) -> list[Variant]:
    """Value and gradient of the mean logp of every position."""
    sizes = _sizes(config, step_variants.SMALL)
    num_rows, row_length, width = 4, 512, sizes.width
    rng = np.random.default_rng(config.seed)
    hidden = jnp.asarray(rng.normal(size=(num_rows, row_length, width)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(sizes.vocab_size, width)), jnp.float32)
    shape = (num_rows, row_length)
    targets = jnp.asarray(rng.integers(0, sizes.vocab_size, shape), jnp.int32)
    predict = jnp.broadcast_to(jnp.arange(row_length), shape)
    dtype = config.dtype

    def chunked(hidden, matrix):
        stats = token_stats(hidden.astype(dtype), matrix, targets, predict)
        return stats["logp"].mean()

    def dense(hidden, matrix):
        logits = jnp.einsum(
            "gld,vd->glv",
            hidden.astype(dtype),
            matrix.astype(dtype),
            preferred_element_type=jnp.float32,
        )
        logps = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logps, targets[..., None], axis=-1).mean()

    count = [{"tokens": num_rows * row_length}]
    text = f"[{num_rows}, {row_length}, {width}] x [{sizes.vocab_size}, {width}]"
    return [
        Variant(
            function.__name__,
            jax.value_and_grad(function, argnums=(0, 1)),
            [(hidden, matrix)],
            count,
            text,
        )
        for function in (chunked, dense)
    ]


def attention(config: Config) -> list[Variant]:
    """Value and gradient of attention over rows of pairs."""
    sizes = _sizes(config)
    num_rows, row_length = 4, 1024
    rng = np.random.default_rng(config.seed)
    lengths = [(96, (96, 64))] * (3 * num_rows)
    batches = sources.evaluation_batches(
        [random_group(rng, sizes.vocab_size, i, *p) for i, p in enumerate(lengths)],
        groups_per_step=len(lengths),
        row_length=row_length,
    )
    position, end = (jnp.asarray(getattr(batches[0], n)) for n in ("position", "end"))
    shape = (end.shape[0], row_length, sizes.num_heads, sizes.head_dim)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), config.dtype) for _ in range(3)
    )

    def of(attend):
        def total(query, key, value):
            out = attend(query, key, value, position, end)
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))

    count = [{"tokens": int(end.size)}]
    return [
        Variant(name, of(IMPLEMENTATIONS[name]), [(query, key, value)], count, text)
        for name, text in (("blockwise", str(list(shape))), ("xla", str(list(shape))))
    ]


def _pair_lengths(config: Config) -> list[tuple[int, tuple[int, int]]]:
    num = config.groups_per_step * config.num_batches
    if config.pairs is not None:
        encoder = templates.TextEncoder(templates.load_tokenizer(config.tokenizer))
        found = readers.read(config.pairs)
        picked = np.random.default_rng(config.seed).permutation(len(found))[:num]
        groups = [encoder.encode(found[int(i)]) for i in picked]
        return [(len(g.prompt), tuple(map(len, g.responses))) for g in groups]
    rng = np.random.default_rng(config.seed)
    means = np.log(np.array([56, 98, 95])) - 0.5 * 0.45**2
    drawn = np.exp(rng.normal(means, 0.45, (num, 3))).round().astype(int).clip(2, 400)
    return [(int(p), (int(a), int(b))) for p, a, b in drawn]


def _layouts(config: Config, sizes: DecoderConfig, lengths) -> list[Variant]:
    num_groups = min(config.groups_per_step, len(lengths))
    work = Work(_sizes(config, sizes), lengths, num_groups, seed=config.seed)
    work = dataclasses.replace(work, row_length=work.one_row())
    return [step_variants.step_on_rows(work), step_variants.step_on_padded(work)]


def dpo_pairs(config: Config) -> list[Variant]:
    """A DPO step on pairs of real or drawn lengths."""
    return _layouts(config, step_variants.SMALL, _pair_lengths(config))


def dpo_long(config: Config) -> list[Variant]:
    """A DPO step on long prompts with short responses."""
    num = config.groups_per_step * config.num_batches
    return _layouts(config, step_variants.SMALL, [(768, (128, 128))] * num)


def dpo_deep(config: Config) -> list[Variant]:
    """A DPO step on pairs, of a model that is mostly layers."""
    return _layouts(config, step_variants.DEEP, _pair_lengths(config))


def dpo_lists(config: Config) -> list[Variant]:
    """A step on lists of eight responses, of a model that is mostly layers."""
    return _layouts(config, step_variants.DEEP, [(400, (100,) * 8)] * 2)


def _refuse_sizes(config: Config, case: str) -> None:
    for name in ("vocab_size", "width", "num_layers"):
        if getattr(config, name) is not None:
            raise ValueError(f"case {case} has sizes of its own; leave out `{name}`.")


def growth(config: Config) -> dict[str, list[Variant]]:
    """Steps on full rows, one size of which grows."""
    _refuse_sizes(config, "growth")
    return step_variants.growth(config.dtype)


def peak(config: Config) -> dict:
    """Steps beside the best matrix product."""
    _refuse_sizes(config, "peak")
    return step_variants.share_of_peak(
        calls=config.calls,
        dtype=config.dtype,
        groups_per_step=config.groups_per_step,
    )


def loop(config: Config) -> dict:
    """Steps within a run beside the compiled steps alone."""
    _refuse_sizes(config, "loop")
    return loop_variants.measure(calls=config.calls, dtype=config.dtype)


def _text_pairs(config: Config) -> tuple[Records, templates.TextEncoder]:
    """Pairs and the encoder of their tokenizer: of `--pairs`, or of a small world."""
    if config.pairs is not None:
        tokenizer = templates.load_tokenizer(config.tokenizer)
        return readers.read(config.pairs), templates.TextEncoder(tokenizer)
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
    from experiments.worlds import instructions

    world = instructions.World()
    drawn = instructions.demonstrations(world, 1000, config.seed)
    found = [
        {
            "prompt": row["prompt"],
            "chosen": row["response"] * 8,
            "rejected": other["response"] * 8,
        }
        for row, other in zip(drawn[::2], drawn[1::2], strict=True)
    ]
    encoder = templates.TextEncoder(instructions.train_tokenizer(world))
    return from_objects(found), encoder


def tokenise(config: Config) -> list[Variant]:
    """Records to groups of ids, on one core."""
    # The rate is one of a core: by itself the tokenizer takes a thread a core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found, encoder = _text_pairs(config)
    part = found[:500]
    characters = sum(len(r.prompt) + sum(map(len, r.responses)) for r in part)
    shape = f"{len(part)} pairs of {characters / len(part):.0f} characters"
    count = [{"pairs": len(part)}]

    def many():
        return len(encoder.encode_all(part))

    def one_by_one():
        return len([encoder.encode(record) for record in part])

    return [
        Variant("many at once", many, [()], count, shape, host=True),
        Variant("one by one", one_by_one, [()], count, shape, host=True),
    ]


def input_pipeline(config: Config) -> list[Variant]:
    """The next batch of a run, and the train step that takes it."""
    found, encoder = _text_pairs(config)
    folder = tempfile.TemporaryDirectory()  # as long as `make_batch` lives
    cached = token_cache.tokenised(found, encoder, folder.name, policy="drop")
    small = dataclasses.replace(step_variants.SMALL, vocab_size=32_000, tied=False)
    sizes = _sizes(config, small)
    size = sizes.vocab_size

    def with_logps(group):
        """Stored logps as of a uniform anchor, and ids that the model has."""
        logps = tuple(np.full(len(r), -np.log(size), "f4") for r in group.responses)
        return dataclasses.replace(
            group,
            prompt=group.prompt % size,
            responses=tuple(response % size for response in group.responses),
            extras={"anchor_logps": logps},
        )

    batches = sources.training_batches(
        sources.mapped(with_logps, cached),
        groups_per_step=config.groups_per_step,
        num_steps=config.num_batches,
        row_length=max(128, sources.longest_group(cached)),
        seed=config.seed,
    )

    def make_batch(number, folder=folder):
        del folder
        return batches[number]

    model = make_decoder(sizes)
    optimizer = optax.sgd(1e-4)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    step = make_train_step(step_variants.METHOD, model, optimizer)
    state = init_state(params, optimizer, rng=jax.random.key(0))
    numbers = range(len(batches))
    shape = f"[{batches.shape.num_rows}, {batches.shape.row_length}]"
    count = [{"pairs": config.groups_per_step}] * len(batches)
    on_device = [(state, jax.tree.map(jnp.asarray, batches[n])) for n in numbers]
    numbered = [(n,) for n in numbers]
    return [
        Variant("batch", make_batch, numbered, count, shape, host=True),
        Variant("step", step, on_device, count, shape),
    ]


def sampler(config: Config) -> list[Variant]:
    """K samples of each prompt: the prompt kept once, or repeated."""
    sizes = _sizes(config)
    model, params = _model(sizes, config.seed)
    num_prompts, prompt_length, num_samples, num_steps = 4, 256, 8, 64
    rng = np.random.default_rng(config.seed)
    prompts = rng.integers(1, sizes.vocab_size, (num_prompts, prompt_length))
    prompts = jnp.asarray(prompts, jnp.int32)
    count = [{"tokens": num_prompts * num_samples * num_steps}]

    def arguments(prompts):
        length = jnp.full(len(prompts), prompt_length, jnp.int32)
        keys = jax.random.split(jax.random.key(config.seed), len(prompts))
        return [(params, prompts, length, keys)]

    def sampler_of(num_samples):
        settings = SamplingConfig(num_samples=num_samples, max_new_tokens=num_steps)
        return make_sampler(model, settings, end_ids=())

    return [
        Variant(
            "prompt once",
            sampler_of(num_samples),
            arguments(prompts),
            count,
            f"{num_prompts} prompts of {prompt_length}, {num_samples} x {num_steps}",
        ),
        Variant(
            "prompt repeated",
            sampler_of(1),
            arguments(jnp.repeat(prompts, num_samples, axis=0)),
            count,
            f"{num_prompts * num_samples} prompts of {prompt_length}, 1 x {num_steps}",
        ),
    ]


def generate(config: Config) -> list[Variant]:
    """K samples of each of many prompts: our sampler, and transformers on torch."""
    wide = dataclasses.replace(step_variants.SMALL, vocab_size=8192)
    # Tied and untrained, a model would repeat the prompt's last token.
    sizes = dataclasses.replace(_sizes(config, wide), tied=False)
    model, params = _model(sizes, config.seed)
    num_prompts, shortest, longest, num_samples, num_steps = 32, 64, 128, 4, 64
    rng = np.random.default_rng(config.seed)
    length = rng.integers(shortest, longest + 1, num_prompts).astype(np.int32)
    drawn = rng.integers(1, sizes.vocab_size, (num_prompts, longest), np.int32)
    prompts = [ids[:n] for ids, n in zip(drawn, length, strict=True)]
    keys = jax.random.split(jax.random.key(config.seed), num_prompts)
    arguments = (params, jnp.asarray(drawn), jnp.asarray(length), keys)
    count = [{"tokens": num_prompts * num_samples * num_steps}]
    million = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    shape = (
        f"{num_prompts} prompts of {shortest} to {longest}, {num_samples} x "
        f"{num_steps}, {million:.1f} million parameters"
    )

    def sampler_of(num_samples, temperature):
        settings = SamplingConfig(
            num_samples=num_samples, max_new_tokens=num_steps, temperature=temperature
        )
        return make_sampler(model, settings, end_ids=())

    ours = Variant("pref_jax", sampler_of(num_samples, 1.0), [arguments], count, shape)
    torch_ids = torch_generate.make_generate(sizes, params, prompts, seed=config.seed)
    if torch_ids is None:
        return [ours]
    greedy = sampler_of(1, 0.0)(*arguments).tokens
    same = (np.asarray(greedy) == torch_ids(1, num_steps, greedy=True)).all((1, 2))
    if same.mean() < 0.9:  # a near tie may part two texts, and not many
        raise ValueError(f"{same.sum()} of {num_prompts} greedy responses are equal.")
    return [
        ours,
        Variant(
            "transformers",
            torch_ids,
            [(num_samples, num_steps)],
            count,
            f"torch, {same.sum()} of {num_prompts} greedy responses are ours",
            host=True,
        ),
    ]


def losses(config: Config) -> dict[str, list[Variant]]:
    """Each loss with its metrics and gradient, and TRL's where there is one."""
    trl = loss_variants.trl_losses()
    parts = {}
    for name, case in loss_variants.cases(config.seed).items():
        ours = loss_variants.value_and_gradient(case)
        shape = f"[{', '.join(map(str, case.array.shape))}]"
        count = [{"entries": len(case.array)}]
        parts[name] = [Variant("pref_jax", ours, [(case.array,)], count, shape)]
        if trl is not None and case.trl is not None:
            theirs = loss_variants.trl_value_and_gradient(case, trl)
            arguments = [(np.asarray(case.array),)]
            parts[name].append(
                Variant("TRL", theirs, arguments, count, shape, host=True)
            )
    return parts


def import_time(config: Config) -> list[Variant]:
    """A fresh process each."""
    del config

    def start(program):
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

    return [
        Variant(name, start, [(program,)], [{"starts": 1}], program, host=True)
        for name, program in (
            ("losses", "import pref_jax.losses"),
            ("jax alone", "import jax.numpy"),
        )
    ]


def load(config: Config) -> dict:
    """Fresh processes that load one folder."""
    return load_variants.measure(seed=config.seed)


CASES = {
    "scoring": scoring,
    "attention": attention,
    "dpo_pairs": dpo_pairs,
    "dpo_long": dpo_long,
    "dpo_deep": dpo_deep,
    "dpo_lists": dpo_lists,
    "growth": growth,
    "peak": peak,
    "loop": loop,
    "tokenise": tokenise,
    "input": input_pipeline,
    "sampler": sampler,
    "generate": generate,
    "losses": losses,
    "load": load,
    "import": import_time,
}


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    config = tyro.cli(Config, description=__doc__)
    for name in config.cases or CASES:
        line = measure_case(name, config)
        print(json.dumps(line), flush=True)
        if config.write is not None:
            folder = pathlib.Path(config.write)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"benchmark_{name}.json", line)


if __name__ == "__main__":
    main()
