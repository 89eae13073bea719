"""SFT, then DPO, end to end: from nothing to an aligned model and its report.

On the embedded world (`experiments/worlds/instructions.py`), where the true reward of
every response is known:

    base      language modelling on the world's text
    SFT       on demonstrations of mixed quality, stopped at the best validation loss
    pairs     the SFT model answers training prompts several times; of each prompt the
              best and the worst answer by true reward
    DPO       on these pairs, anchored to the SFT model (its logps stored beforehand)
    control   SFT continued on the chosen responses, with DPO's number of updates
    report    true reward and its parts, win rate, KL to the SFT model, accuracy, length

on prompts that no stage has seen. On your own data (`--data`) base is the model that
you give, or fresh parameters; pairs are the file's; true reward and win rate need
`--grade`.

    python -m experiments.quickstart
    python -m experiments.quickstart --preset smoke
    python -m experiments.quickstart --data pairs.jsonl --tokenizer DIR --model DIR

Source: DPO, arXiv:2305.18290v3. Reproduces no table of it: the world is ours.
Hardware: two CPU cores; minutes. Expected: docs/quickstart.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.worlds import instructions
from pref_jax import anchors, report, rewards
from pref_jax.data import anchor_cache, records, rows, sources, templates
from pref_jax.evals.preference import bootstrap_interval, wins
from pref_jax.logps import response_scores, token_kl
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import nll_loss
from pref_jax.method import (
    Method,
    objective,
    on_rewards,
    on_token_logps,
    token_weight,
)
from pref_jax.models import decoder, pretrained
from pref_jax.sampling import Samples, SamplingConfig, make_sampler, sample_responses
from pref_jax.train import run as run_lib
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE, PreemptionGuard
from pref_jax.train.logging import configure_logging
from pref_jax.train.loop import LoopConfig, Preempted
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig, train_stage
from pref_jax.types import CHOSEN, Model, TokenGroup

_logger = logging.getLogger("pref_jax.quickstart")


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """The fresh decoder; with `--model` only how it computes."""

    width: int = 128  # ours
    num_layers: int = 6  # ours: about 1.3 M parameters in all
    num_heads: int = 4  # ours
    num_kv_heads: int = 4  # ours
    mlp_width: int = 384  # ours
    dtype: str = "float32"  # of matrix products: float32 or bfloat16
    attention: str = "xla"  # xla or blockwise (long rows)
    remat: str = "none"  # none, dots or full


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the run depends on."""

    base: StageConfig  # language modelling on the world's text; not with `data`
    sft: StageConfig  # SFT on demonstrations, or on the chosen responses of `data`
    dpo: StageConfig  # DPO; its number of steps is the control's too
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/quickstart"  # folder of the runs
    seed: int = 0  # of parameters, data and sampling
    data: str | None = None  # your own .jsonl or .jsonl.gz: pairs or demonstrations
    heldout: str | None = None  # evaluation file; None: a tenth of `data`, by prompt
    tokenizer: str | None = None  # folder of its tokenizer; None: that of `model`
    model: str | None = None  # folder of a Llama checkpoint; None: a fresh decoder
    grade: str | None = None  # module:function of (prompt, response) -> true reward
    on_error: str = "raise"  # bad rows of `data`: raise or skip
    row_length: int | None = None  # L, positions; None: the longest group, at least 128
    long_groups: str = "drop"  # longer than a row: drop, keep_start or keep_end
    world: instructions.World = instructions.World()
    decoder: DecoderSizes = DecoderSizes()
    num_documents: int = 30_000  # to pre-train on; ours
    num_demonstrations: int = 6_000  # ours
    num_pair_prompts: int = 1_200  # prompts that pairs are sampled for; ours
    pair_samples: int = 8  # responses sampled for each of them; ours
    beta: float = 0.1  # reward per nat; DPO, section 6
    num_eval_prompts: int = 400  # held out; ours
    eval_samples: int = 4  # responses to each, at temperature 1; ours
    max_new_tokens: int = 32  # of a sampled response; ours

    def __post_init__(self):
        if self.data is None:
            for name in ("heldout", "tokenizer", "model", "grade"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` belongs to `data`; give --data too.")
        elif self.tokenizer is None and self.model is None:
            raise ValueError("`data` needs a tokenizer; give --tokenizer or --model.")
        if self.pair_samples < 2:
            raise ValueError(
                f"`pair_samples` must be 2 or more; got {self.pair_samples}."
            )
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")


def _stage(num_steps, groups, rate, *, every, best=None, patience=None, warmup=20):
    return StageConfig(
        groups_per_step=groups,
        optimizer=OptimizerConfig(
            learning_rate=rate,
            warmup_steps=min(warmup, num_steps // 4),
            weight_decay=0.01,
        ),
        loop=LoopConfig(
            num_steps=num_steps,
            validate_every=every,
            checkpoint_every=every,
            best=best,
            patience=patience,
        ),
    )


SMALL = Config(
    base=_stage(1500, 64, 3e-3, every=250, warmup=50),
    sft=_stage(500, 64, 1e-3, every=50, best="validation/loss", patience=3),
    dpo=_stage(150, 32, 2e-4, every=50),
)
SMOKE = dataclasses.replace(
    SMALL,
    decoder=DecoderSizes(
        width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=64
    ),
    num_documents=600,
    num_demonstrations=300,
    num_pair_prompts=40,
    num_eval_prompts=24,
    base=_stage(20, 16, 3e-3, every=10),
    sft=_stage(20, 16, 1e-3, every=10, best="validation/loss", patience=3),
    dpo=_stage(8, 8, 2e-4, every=4),
)
PRESETS = {"small": SMALL, "smoke": SMOKE}


def make_sft_method() -> Method:
    """Supervised fine-tuning: the mean negative log-likelihood of trained tokens."""
    return Method(
        name="SFT",
        anchor=anchors.none(),
        reward=rewards.log_likelihood,
        loss=on_token_logps(nll_loss),
        weight=token_weight,
        couples_responses=False,
    )


def make_method(config: Config) -> Method:
    """DPO against the logps of the SFT model, which the batch carries."""
    return Method(
        name="DPO",
        anchor=anchors.fixed(),
        reward=functools.partial(rewards.sequence_reward, beta=config.beta),
        loss=on_rewards(logistic_loss),
        requires=frozenset({"anchor_logps"}),
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt and measured: the world's, or your own.

    Attributes:
      encoder: text <-> ids.
      vocab_size: of a fresh decoder, so that every id has an embedding.
      documents: training and held-out text to pre-train on; None: nothing is.
      demonstrations: training and held-out groups, K = 1.
      pairs: training and held-out groups, K = 2; None: sampled for `pair_prompts`.
      pair_prompts: training and held-out prompts.
      eval_prompts: prompts of the final evaluation.
      grade: (prompt, response) -> parts of the true reward, "reward" first; or None.
      notes: what was read, left out and counted, for the report.
    """

    encoder: templates.TextEncoder
    vocab_size: int
    documents: tuple[list[TokenGroup], list[TokenGroup]] | None
    demonstrations: tuple[list[TokenGroup], list[TokenGroup]]
    pairs: tuple[list[TokenGroup], list[TokenGroup]] | None
    pair_prompts: tuple[list, list]
    eval_prompts: list
    grade: Callable[[object, str], dict[str, float]] | None
    notes: tuple[str, ...]


def make_world_task(config: Config) -> Task:
    """The embedded world: text, demonstrations, prompts and the true grade."""
    world, seed = config.world, config.seed
    tokenizer = instructions.train_tokenizer(world)
    encoder = templates.TextEncoder(tokenizer)

    def encode(rows):
        return [encoder.encode(record) for record in records.from_objects(rows)]

    text = instructions.documents(world, config.num_documents, seed)
    documents = encode({"prompt": "", "response": line} for line in text)
    demonstrations = encode(
        instructions.demonstrations(world, config.num_demonstrations, seed)
    )

    def prompts(split, num):
        return instructions.prompts(world, split, num, seed)

    def grade(prompt, response):
        parts = instructions.grade(prompt, response, world=world)
        return {name: getattr(parts, name) for name in _WORLD_PARTS}

    return Task(
        encoder=encoder,
        vocab_size=len(tokenizer),
        documents=_cut(documents),
        demonstrations=_cut(demonstrations),
        pairs=None,
        pair_prompts=(
            prompts("train", config.num_pair_prompts),
            prompts("validation", max(16, config.num_pair_prompts // 5)),
        ),
        eval_prompts=prompts("test", config.num_eval_prompts),
        grade=grade,
        notes=(
            "The embedded instruction language; training, validation and test "
            "prompts share no instruction.",
        ),
    )


_WORLD_PARTS = ("reward", "right", "format", "length")


def _cut(groups, rate=0.05):
    """The last share of already shuffled groups is held out."""
    num_heldout = max(1, int(len(groups) * rate))
    return groups[:-num_heldout], groups[-num_heldout:]


def make_own_task(config: Config) -> Task:
    """Your own file, tokenizer and grade in the place of the world's."""
    tokenizer = templates.load_tokenizer(config.tokenizer or config.model)
    if config.model is not None:
        vocab_size = pretrained.load_config(config.model).vocab_size
        templates.check_vocabulary(tokenizer, vocab_size)
    encoder = templates.TextEncoder(tokenizer)
    read = functools.partial(records.read_jsonl, on_error=config.on_error)
    found = read(config.data)
    if config.heldout is not None:
        train, heldout = list(found), list(read(config.heldout))
    else:
        train = [r for r in found if not _is_heldout(r.prompt)]
        heldout = [r for r in found if _is_heldout(r.prompt)]
    if found.num_responses > 2 or not train or not heldout:
        raise ValueError(
            f"{config.data} has {found.num_responses} responses a row, {len(train)} "
            f"training and {len(heldout)} held-out rows. This experiment takes pairs or "
            f"demonstrations, and some of both splits; give --heldout FILE if a tenth "
            f"of the prompts is too few."
        )
    if found.num_responses == 1 and config.grade is None:
        raise ValueError(
            f"{config.data} holds demonstrations, so pairs have to be sampled and "
            f"graded: give --grade module:function, or a file of pairs."
        )
    row_groups = [[encoder.encode(r) for r in part] for part in (train, heldout)]
    is_pairs = found.num_responses == 2
    prompts = [list({r.prompt: None for r in part}) for part in (train, heldout)]
    return Task(
        encoder=encoder,
        vocab_size=len(tokenizer),
        documents=None,
        demonstrations=tuple([_only(CHOSEN, g) for g in part] for part in row_groups),
        pairs=tuple(row_groups) if is_pairs else None,
        pair_prompts=tuple(prompts),
        eval_prompts=prompts[1][: config.num_eval_prompts],
        grade=None if config.grade is None else _load_grade(config.grade),
        notes=(found.summary(), encoder.summary()),
    )


def _is_heldout(prompt, rate=0.1) -> bool:
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


def _only(slot: int, group: TokenGroup) -> TokenGroup:
    return dataclasses.replace(
        group,
        responses=(group.responses[slot],),
        loss_masks=(group.loss_masks[slot],),
        labels=(1.0,),
        extras={},
    )


def _load_grade(name: str):
    """The user's function; a plain number becomes {"reward": number}."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        grade = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--grade {name} must name module:function of (prompt, response) -> number, "
            f"importable from here: {error}"
        ) from error
    return lambda prompt, response: {"reward": float(grade(prompt, response))}


def make_source(groups, config: Config, stage: StageConfig, row_length: int, mesh):
    """Batches of a stage: exactly `groups_per_step` groups, shuffled by the seed."""
    return sources.OfflineSource(
        sources.training_batches(
            groups,
            groups_per_step=stage.groups_per_step,
            num_steps=stage.loop.num_steps,
            row_length=row_length,
            seed=config.seed,
            rows_multiple=sharding.num_row_shards(mesh) * stage.num_microbatches,
        )
    )


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage of a run needs."""

    config: Config
    folder: pathlib.Path
    guard: PreemptionGuard
    task: Task
    model: Model
    mesh: jax.sharding.Mesh

    def fit(self, groups: Sequence[TokenGroup]) -> tuple[list[TokenGroup], int]:
        """The groups that fit a row, and its length; what does not is logged."""
        config = self.config
        length = config.row_length or max(128, sources.longest_group(groups))
        fitted, counts = sources.fit_groups(groups, length, policy=config.long_groups)
        if counts["dropped"] or counts["cut"]:
            _logger.warning("rows of %d: %s", length, counts)
        return fitted, length

    def batches(self, groups, row_length, stage: StageConfig):
        """Every group once, for validation."""
        return sources.evaluation_batches(
            groups,
            groups_per_step=stage.groups_per_step,
            row_length=row_length,
            rows_multiple=sharding.num_row_shards(self.mesh),
        )

    def train(self, name, method, params, groups, heldout, stage: StageConfig, unit):
        """One stage on groups, with validation on held-out ones."""
        groups, row_length = self.fit(groups)
        heldout, heldout_length = self.fit(heldout)
        return train_stage(
            name,
            folder=self.folder / name,
            config=stage,
            method=method,
            model=self.model,
            params=params,
            anchor=(),
            source=make_source(groups, self.config, stage, row_length, self.mesh),
            validation=self.batches(heldout, heldout_length, stage),
            count=rows.count_batch,
            mesh=self.mesh,
            seed=self.config.seed,
            guard=self.guard,
            unit=unit,
        )

    def sample(self, params, prompts, num_samples: int, *, use: int) -> Samples:
        """Responses to each prompt at temperature 1; `use` names the draw."""
        settings = SamplingConfig(
            num_samples=num_samples, max_new_tokens=self.config.max_new_tokens
        )
        encoder = self.task.encoder
        return sample_responses(
            make_sampler(self.model, settings, end_ids=encoder.end_ids),
            params,
            [encoder.encode_prompt(prompt) for prompt in prompts],
            key=jax.random.fold_in(jax.random.key(self.config.seed), use),
            batch_size=min(64, len(prompts)),
            on_batch=self.check_guard,
        )

    def check_guard(self, num_done: int) -> None:
        """Stop between batches when asked to."""
        if self.guard.requested:
            raise Preempted(f"stopped after {num_done} prompts, which are not kept")


_PAIR_USE, _HELDOUT_USE, _EVAL_USE = 1, 2, 3  # draws that must differ


def make_model(config: Config, task: Task):
    """The model and its initial parameters: yours, or fresh."""
    sizes = config.decoder
    compute = {name: getattr(sizes, name) for name in ("dtype", "attention", "remat")}
    if config.model is not None:
        found, params = pretrained.load(config.model, **compute)
        return decoder.make_decoder(found), params
    fresh = decoder.DecoderConfig(
        vocab_size=task.vocab_size,
        head_dim=sizes.width // sizes.num_heads,
        **dataclasses.asdict(sizes),
    )
    model = decoder.make_decoder(fresh)
    return model, jax.jit(model.init)(jax.random.key(config.seed))


def make_pairs(context: Context, params, prompts, *, use: int, path: pathlib.Path):
    """Sample, grade, and pair the best with the worst of each prompt.

    Writes the pairs to `path` as text and ids; reads them back if they are there.
    """
    if not path.exists():
        config, encoder = context.config, context.task.encoder
        samples = context.sample(params, prompts, config.pair_samples, use=use)
        lines = []
        for i, prompt in enumerate(prompts):
            ids = [
                samples.tokens[i, k, : samples.length[i, k]].tolist()
                for k in np.flatnonzero(samples.ended[i])
            ]
            texts = [encoder.decode(response) for response in ids]
            grades = [context.task.grade(prompt, text)["reward"] for text in texts]
            if not grades or max(grades) == min(grades):
                continue  # nothing to prefer
            best, worst = int(np.argmax(grades)), int(np.argmin(grades))
            lines.append(
                {
                    "prompt": _text(prompt),
                    "chosen": texts[best],
                    "rejected": texts[worst],
                    "rewards": [grades[best], grades[worst]],
                    "ids": [
                        encoder.encode_prompt(prompt).tolist(),
                        ids[best],
                        ids[worst],
                    ],
                }
            )
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(path)
        _logger.info("%s: %d pairs of %d prompts", path.name, len(lines), len(prompts))
    groups = []
    for number, line in enumerate(path.read_text().splitlines()):
        prompt, *pair = (np.asarray(ids, np.int32) for ids in json.loads(line)["ids"])
        masks = tuple(np.ones(len(ids), bool) for ids in pair)
        groups.append(TokenGroup(prompt, tuple(pair), masks, (1.0, 0.0), number))
    return groups


def _text(prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def store_anchor(context: Context, params, groups, stage: StageConfig):
    """Write the SFT model's token logps into the groups; it may then leave memory."""
    groups, row_length = context.fit(
        [dataclasses.replace(group, record=i) for i, group in enumerate(groups)]
    )
    with jax.set_mesh(context.mesh):
        score = jax.jit(functools.partial(response_scores, context.model))
        return anchor_cache.with_anchor_logps(
            groups,
            context.batches(groups, row_length, stage),
            lambda batch: score(params, sharding.place_batch(context.mesh, batch)).logp,
        )


def run(context: Context, params) -> report.Report:
    """All stages, the evaluation and the report."""
    config, task, sft_method = context.config, context.task, make_sft_method()
    began = time.perf_counter()
    models, stages = {}, {}
    if task.documents is not None:
        params, stages["base"] = context.train(
            "base", sft_method, params, *task.documents, config.base, "documents"
        )
    models["base"] = params
    models["SFT"], stages["SFT"] = context.train(
        "SFT", sft_method, params, *task.demonstrations, config.sft, "demonstrations"
    )
    pairs = task.pairs or tuple(
        make_pairs(context, models["SFT"], prompts, use=use, path=context.folder / name)
        for prompts, use, name in (
            (task.pair_prompts[0], _PAIR_USE, "pairs.jsonl"),
            (task.pair_prompts[1], _HELDOUT_USE, "heldout_pairs.jsonl"),
        )
    )
    pairs = tuple(store_anchor(context, models["SFT"], p, config.dpo) for p in pairs)
    models["DPO"], stages["DPO"] = context.train(
        "DPO", make_method(config), models["SFT"], *pairs, config.dpo, "pairs"
    )
    chosen = tuple([_only(CHOSEN, group) for group in part] for part in pairs)
    control_stage = dataclasses.replace(config.dpo, optimizer=config.sft.optimizer)
    models["control"], stages["control"] = context.train(
        "control", sft_method, models["SFT"], *chosen, control_stage, "demonstrations"
    )
    _logger.info("evaluation on %d held-out prompts", len(task.eval_prompts))
    measured = {
        name: measure(context, params, models["SFT"]) for name, params in models.items()
    }
    accuracy = {
        name: preference(context, models[name], pairs[1]) for name in ("DPO", "control")
    }
    seconds = time.perf_counter() - began
    return make_report(context, stages, measured, accuracy, pairs, seconds)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model on the evaluation prompts; N prompts, S responses each.

    Attributes:
      texts: N lists of S responses.
      parts: name -> f[N, S], parts of the true reward; empty without a grade.
      length: i[N, S], tokens, the end token included.
      ended: bool[N, S].
      kl: f[N], mean over tokens of the exact KL to the SFT model, nats.
    """

    texts: list[list[str]]
    parts: dict[str, np.ndarray]
    length: np.ndarray
    ended: np.ndarray
    kl: np.ndarray


def measure(context: Context, params, reference) -> Measured:
    """Sample, grade, and compare with the reference token by token."""
    config, task = context.config, context.task
    samples = context.sample(
        params, task.eval_prompts, config.eval_samples, use=_EVAL_USE
    )
    ids = [
        [row[k, :n] for k, n in enumerate(lengths)]
        for row, lengths in zip(samples.tokens, samples.length, strict=True)
    ]
    texts = [[task.encoder.decode(response) for response in row] for row in ids]
    parts = {}
    if task.grade is not None:
        grades = [
            [task.grade(prompt, text) for text in row]
            for prompt, row in zip(task.eval_prompts, texts, strict=True)
        ]
        parts = {
            name: np.array([[grade[name] for grade in row] for row in grades])
            for name in grades[0][0]
        }
    groups = [
        TokenGroup(
            prompt=task.encoder.encode_prompt(prompt),
            responses=tuple(row),
            loss_masks=tuple(np.ones(len(response), bool) for response in row),
            labels=(0.0,) * len(row),
            record=i,
        )
        for i, (prompt, row) in enumerate(zip(task.eval_prompts, ids, strict=True))
    ]
    batches = context.batches(groups, sources.longest_group(groups), config.dpo)
    with jax.set_mesh(context.mesh):
        exact_kl = jax.jit(functools.partial(token_kl, context.model))
        kl = np.zeros(len(groups))
        for batch in batches:
            placed = sharding.place_batch(context.mesh, batch)
            tokens = np.asarray(exact_kl(params, placed, anchor_params=reference))
            for b in np.flatnonzero(batch.record >= 0):
                kl[batch.record[b]] = tokens[b].sum() / batch.loss_mask[b].sum()
    return Measured(texts, parts, samples.length, samples.ended, kl)


def preference(context: Context, params, groups) -> dict[str, np.ndarray]:
    """Implicit rewards on held-out pairs: accuracy and margin of each pair."""
    groups, row_length = context.fit(groups)
    method, found = make_method(context.config), {"accuracy": [], "margin": []}
    with jax.set_mesh(context.mesh):

        @jax.jit
        def pair_metrics(params, batch):
            return objective(method, context.model, params, (), batch)[2]

        for batch in context.batches(groups, row_length, context.config.dpo):
            placed = sharding.place_batch(context.mesh, batch)
            metrics = pair_metrics(params, placed)
            real = batch.record >= 0
            for name, values in found.items():
                values.extend(np.asarray(metrics[f"rewards/{name}"][0])[real])
    return {name: np.array(values) for name, values in found.items()}


def _estimate(values) -> report.Estimate:
    return report.Estimate(*bootstrap_interval(values))


def make_report(context, stages, measured, accuracy, pairs, seconds) -> report.Report:
    """Headline, tables, curves and samples of a finished run."""
    config, task = context.config, context.task
    names = list(measured)
    per_prompt = {
        name: {part: values.mean(axis=1) for part, values in m.parts.items()}
        for name, m in measured.items()
    }
    sections = [_stage_table(stages)]
    cards = []
    if task.grade is not None:
        sections.insert(0, _reward_table(per_prompt, names))
        sections.insert(1, _difference_table(per_prompt))
        gain = per_prompt["DPO"]["reward"] - per_prompt["SFT"]["reward"]
        won = wins(per_prompt["DPO"]["reward"], per_prompt["SFT"]["reward"])
        cards += [
            report.Card("DPO's gain in true reward over SFT", _estimate(gain)),
            report.Card("DPO's win rate over SFT", _estimate(won), percent=True),
        ]
    cards += [
        report.Card(
            "DPO's accuracy on held-out pairs",
            _estimate(accuracy["DPO"]["accuracy"]),
            f"{len(accuracy['DPO']['accuracy'])} pairs",
            percent=True,
        ),
        report.Card(
            "DPO's KL to SFT", _estimate(measured["DPO"].kl), "exact", 3, "nats / token"
        ),
    ]
    sections += [
        _behaviour_table(measured, accuracy),
        _curves(context.folder, list(stages)),
        _samples(task, measured),
        report.Text("Data", (*task.notes, *_pair_notes(pairs))),
        report.Config("Config", dataclasses.asdict(config)),
    ]
    grade_note = (
        ""
        if task.grade is not None
        else " True reward and win rate were not measured: they need "
        "--grade module:function."
    )
    return report.Report(
        title="SFT, then DPO",
        subtitle="the embedded world" if config.data is None else "your data",
        summary=(
            f"{len(task.eval_prompts)} held-out prompts, {config.eval_samples} responses "
            f"each at temperature 1; intervals are 95 % bootstrap intervals over "
            f"prompts. The control is SFT continued on the chosen responses with DPO's "
            f"number of updates." + grade_note
        ),
        cards=tuple(cards),
        sections=tuple(sections),
        meta={**run_lib.environment(), "duration": seconds},
    )


def _reward_table(per_prompt, names) -> report.Table:
    parts = list(per_prompt["SFT"])
    table = []
    for name in names:
        won = wins(per_prompt[name]["reward"], per_prompt["SFT"]["reward"])
        cells = [_estimate(per_prompt[name][part]) for part in parts]
        table.append((name, *cells, None if name == "SFT" else _estimate(won)))
    return report.Table(
        "True reward",
        columns=(
            report.Column("model"),
            *(report.Column(part, digits=3) for part in parts),
            report.Column("win rate over SFT", digits=1, percent=True),
        ),
        rows=tuple(table),
        note="Means over prompts, with 95 % intervals. A tie is half a win.",
    )


def _difference_table(per_prompt) -> report.Table:
    parts = list(per_prompt["SFT"])
    return report.Table(
        "Paired differences in true reward",
        columns=(
            report.Column("comparison"),
            *(report.Column(part, digits=3) for part in parts),
        ),
        rows=tuple(
            (
                f"DPO - {other}",
                *(
                    _estimate(per_prompt["DPO"][part] - per_prompt[other][part])
                    for part in parts
                ),
            )
            for other in ("SFT", "control", "base")
        ),
        note="Paired over prompts. An interval without zero is a difference.",
    )


def _behaviour_table(measured, accuracy) -> report.Table:
    table = []
    for name, m in measured.items():
        pairs = accuracy.get(name)
        table.append(
            (
                name,
                _estimate(m.length.mean(axis=1)),
                float(m.ended.mean()),
                _estimate(m.kl),
                None if pairs is None else _estimate(pairs["accuracy"]),
                None if pairs is None else _estimate(pairs["margin"]),
            )
        )
    return report.Table(
        "Behaviour",
        columns=(
            report.Column("model"),
            report.Column("length", digits=1, unit="tokens"),
            report.Column("ended", digits=1, percent=True),
            report.Column("KL to SFT", digits=4, unit="nats / token"),
            report.Column("preference accuracy", digits=1, percent=True),
            report.Column("reward margin", digits=3, unit="nats"),
        ),
        rows=tuple(table),
        note="KL is exact, over the whole vocabulary, on the model's own responses. "
        "Accuracy and margin are of the implicit reward on held-out pairs.",
    )


def _stage_table(stages) -> report.Table:
    return report.Table(
        "Stages",
        columns=(
            report.Column("stage"),
            report.Column("updates"),
            report.Column("best validation at"),
            report.Column("time", digits=0, unit="s"),
        ),
        rows=tuple(
            (name, fitted.steps, fitted.best_step, float(fitted.seconds))
            for name, fitted in stages.items()
        ),
        note="Time in updates alone: no compilation of samplers, no evaluation.",
    )


def _curves(folder: pathlib.Path, stages) -> report.Curves:
    panels = []
    for stage in stages:
        metrics = report.read_metrics(folder / stage / "metrics.jsonl")
        for name, label in (
            ("loss", "loss, nats"),
            ("rewards/accuracy", "reward accuracy"),
            ("rewards/margin", "reward margin, nats"),
        ):
            series = tuple(
                report.Series(shown, *(tuple(x.tolist()) for x in metrics[key]))
                for key, shown in (
                    (name, "training"),
                    (f"validation/{name}", "held out"),
                )
                if key in metrics
            )
            if series:
                title = f"{stage}: {name.split('/')[-1]}"
                panels.append(report.Panel(title, "update", label, series))
    return report.Curves("Training", tuple(panels))


def _samples(task: Task, measured, num_shown: int = 8) -> report.Samples:
    def response(name, i):
        m = measured[name]
        verdict, right = "", None
        if m.parts:
            scores = {part: values[i, 0] for part, values in m.parts.items()}
            verdict = ", ".join(f"{part} {value:.2f}" for part, value in scores.items())
            right = bool(scores["right"]) if "right" in scores else None
        return report.Response(m.texts[i][0], verdict, right)

    return report.Samples(
        "Responses side by side",
        columns=tuple(measured),
        rows=tuple(
            report.Sample(_text(prompt), tuple(response(name, i) for name in measured))
            for i, prompt in enumerate(task.eval_prompts[:num_shown])
        ),
        note="The first response of each model to the first held-out prompts.",
    )


def _pair_notes(pairs) -> list[str]:
    lengths = np.array([[len(r) for r in g.responses] for g in pairs[0]])
    longer = (lengths[:, 0] > lengths[:, 1]).mean()
    chosen, rejected = lengths.mean(axis=0)
    return [
        f"{len(pairs[0])} training and {len(pairs[1])} held-out pairs. Chosen responses "
        f"have {chosen:.1f} tokens, rejected {rejected:.1f}; chosen is longer in "
        f"{longer:.0%} of the training pairs."
    ]


def run_config(config: Config) -> pathlib.Path:
    """Run, or continue, the run of a config; returns its report's path."""
    values = dataclasses.asdict(config)
    with (
        run_lib.open_run(config.root, config=values, name=config.name) as folder,
        PreemptionGuard() as guard,
    ):
        _logger.info("run folder: %s", folder)
        task = make_world_task(config) if config.data is None else make_own_task(config)
        for note in task.notes:
            _logger.info("%s", note)
        model, params = make_model(config, task)
        context = Context(config, folder, guard, task, model, sharding.make_mesh())
        finished = run(context, params)
        page = folder / "report.html"
        report.write_report(finished, page)
        run_lib.write_json(
            folder / run_lib.RECORD_FILE,
            {"experiment": "quickstart", "report": report.to_json(finished)},
        )
        return page


def main() -> None:
    """The command line."""
    configure_logging()
    config = run_lib.parse_config(PRESETS, default="small", description=__doc__)
    try:
        page = run_config(config)
    except Preempted as stop:
        print(f"{stop}; the same command continues.", file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE) from None
    print(f"report: {page}\n        {page.resolve().as_uri()}")


if __name__ == "__main__":
    main()
