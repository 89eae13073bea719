"""SFT, then DPO, end to end: from nothing to an aligned model and its report.

On the embedded world (`experiments/worlds/instructions.py`), where the true reward of
every response is known:

    base      language modelling on the world's text
    SFT       on demonstrations of mixed quality, stopped at the best validation loss
    pairs     the SFT model answers training prompts several times; the answers are
              compared two by two, the higher true reward is chosen
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
import logging
import pathlib
import time

import numpy as np

from experiments.worlds import instructions, methods, sections, tasks
from experiments.worlds.command import run_command, where_is
from experiments.worlds.models import DecoderSizes, make_model
from experiments.worlds.pipeline import (
    Pipeline,
    make_watch,
    measure_preferences,
    measure_responses,
    only_responses,
    store_anchor,
)
from experiments.worlds.sampled import sample_pairs
from experiments.worlds.single import keep_record, open_pipeline
from pref_jax import report
from pref_jax.data.records import parse_rename
from pref_jax.evals.preference import bootstrap_interval, wins
from pref_jax.method import Method
from pref_jax.models.lora import LoraConfig
from pref_jax.train import run as run_lib
from pref_jax.train import sharding
from pref_jax.train.loop import LoopConfig
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig
from pref_jax.types import CHOSEN, REJECTED

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the run depends on."""

    base: StageConfig  # language modelling on the world's text; not with `data`
    sft: StageConfig  # SFT on demonstrations, or on the chosen responses of `data`
    dpo: StageConfig  # DPO; steps and batch size are the control's too
    control_optimizer: OptimizerConfig  # of the control, tuned as DPO's was
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/quickstart"  # folder of the runs
    seed: int = 0  # of parameters, data and sampling
    data: tuple[str, ...] = ()  # your own pairs or demonstrations: files, folders, ...
    weights: tuple[float, ...] = ()  # share of each of `data`; none: by its size
    rename: tuple[str, ...] = ()  # fields of `data`, such as correct=labels
    split: str | None = None  # of `data`, if it is a tfds data set
    heldout: str | None = None  # to evaluate on; None: a tenth of `data`, by prompt
    tokenizer: str | None = None  # folder of its tokenizer; None: that of `model`
    model: str | None = None  # folder: Hugging Face, adapter, or a stage of a run
    adapters: bool = False  # train low-rank adapters on `model` instead of all of it
    lora: LoraConfig = LoraConfig()  # the adapters
    max_positions: int | None = None  # longest text of `model`; None: as it says
    grade: str | None = None  # module:function of (prompt, response) -> true reward
    on_error: str = "raise"  # bad rows of `data`: raise or skip
    row_length: int | None = None  # L, positions; None: the longest group, at least 128
    long_groups: str = "drop"  # longer than a row: drop, keep_start or keep_end
    cache: str = "runs/token_cache"  # folder of what was tokenised of `data`
    world: instructions.World = instructions.World()
    decoder: DecoderSizes = DecoderSizes()
    num_documents: int = 36_000  # to pre-train on; ours
    num_demonstrations: int = 20_000  # ours
    num_pair_prompts: int = 2_000  # prompts that pairs are sampled for; ours
    pair_samples: int = 4  # responses to each of them, compared two by two; ours
    beta: float = 0.3  # reward per nat; ours
    num_eval_prompts: int = 600  # held out; ours
    eval_samples: int = 4  # responses to each, at temperature 1; ours
    max_new_tokens: int = 32  # of a sampled response; ours
    profile: int | None = None  # step of each stage that a trace begins with
    profile_steps: int = 3  # that are traced
    wandb: str | None = None  # project on Weights & Biases; None: not sent
    compile_cache: str | None = None  # folder of compiled programs, for the next start

    def __post_init__(self):
        if not self.data:
            for field in dataclasses.fields(self):
                given = getattr(self, field.name) != field.default
                if field.name in _OF_DATA and given:
                    raise ValueError(
                        f"`{field.name}` belongs to `data`; give --data too."
                    )
        elif self.tokenizer is None and self.model is None:
            raise ValueError("`data` needs a tokenizer; give --tokenizer or --model.")
        if self.model is None and (self.adapters or self.max_positions is not None):
            raise ValueError(
                "`adapters` and `max_positions` belong to `model`; give --model too."
            )
        if self.lora != LoraConfig() and not self.adapters:
            raise ValueError("`lora` belongs to `adapters`; give --adapters too.")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"`weights` needs a number for each of {len(self.data)} sources of "
                f"`data`; got {self.weights}."
            )
        if self.pair_samples < 2 or self.pair_samples % 2:
            raise ValueError(
                f"`pair_samples` must be even, 2 or more; got {self.pair_samples}."
            )
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")


_OF_DATA = ("weights", "rename", "split", "heldout", "tokenizer", "model", "grade")
_OF_DATA += ("on_error", "cache")


def _optimizer(rate: float, *, warmup_steps: int = 20) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=rate, warmup_steps=warmup_steps, weight_decay=0.05
    )


SMALL = Config(
    base=StageConfig(
        groups_per_step=32,
        optimizer=_optimizer(2e-3, warmup_steps=50),
        loop=LoopConfig(num_steps=1000, validate_every=250, checkpoint_every=250),
    ),
    sft=StageConfig(
        groups_per_step=48,
        optimizer=_optimizer(1e-3),
        loop=LoopConfig(
            num_steps=500,
            validate_every=50,
            checkpoint_every=50,
            best="validation/loss",
            patience=3,
        ),
    ),
    # DPO and control had four settings each, compared on validation prompts.
    dpo=StageConfig(
        groups_per_step=32,
        optimizer=_optimizer(1e-4),
        loop=LoopConfig(num_steps=150, validate_every=50, checkpoint_every=50),
    ),
    control_optimizer=_optimizer(3e-4),
)


def _shorten(stage: StageConfig, num_steps: int, groups: int) -> StageConfig:
    return dataclasses.replace(
        stage,
        groups_per_step=groups,
        optimizer=dataclasses.replace(stage.optimizer, warmup_steps=2),
        loop=dataclasses.replace(
            stage.loop, num_steps=num_steps, validate_every=num_steps // 2
        ),
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
    base=_shorten(SMALL.base, 20, 16),
    sft=_shorten(SMALL.sft, 20, 16),
    dpo=_shorten(SMALL.dpo, 8, 8),
    control_optimizer=dataclasses.replace(SMALL.control_optimizer, warmup_steps=2),
)
PRESETS = {"small": SMALL, "smoke": SMOKE}


def make_method(config: Config) -> Method:
    """DPO against the logps of the SFT model, which the batch carries."""
    return methods.make_dpo(config.beta)


def make_task(config: Config) -> tasks.Task:
    """The embedded world, or the user's own data."""
    if not config.data:
        return tasks.world_task(
            config.world,
            seed=config.seed,
            num_documents=config.num_documents,
            num_demonstrations=config.num_demonstrations,
            num_pair_prompts=config.num_pair_prompts,
            num_eval_prompts=config.num_eval_prompts,
        )
    return tasks.own_task(
        config.data,
        weights=config.weights,
        rename=parse_rename(config.rename),
        split=config.split,
        heldout=config.heldout,
        tokenizer=config.tokenizer,
        model=config.model,
        max_positions=config.max_positions,
        grade=config.grade,
        on_error=config.on_error,
        num_eval_prompts=config.num_eval_prompts,
        row_length=config.row_length,
        long_groups=config.long_groups,
        cache=config.cache,
    )


_PAIR_USE, _HELDOUT_USE, _EVAL_USE = 1, 2, 3  # draws that must differ


def run(config: Config, pipeline: Pipeline, task: tasks.Task, params) -> dict:
    """All stages and the evaluation; continues what the folder already holds.

    Returns:
      The stages, the measured models, their preferences, the pairs and the prompts of
      the evaluation, by name.
    """
    sft_method, dpo_method = methods.make_sft(), make_method(config)
    models, stages = {}, {}

    folders = {"base": config.model}  # that the models can be read from again

    def train(name, method, start, groups, stage, unit):
        models[name], stages[name] = pipeline.train(
            name,
            method,
            models[start],
            *groups,
            stage,
            unit=unit,
            start=folders[start],
        )
        folders[name] = str(pipeline.folder / name)

    eval_prompts = pipeline.fit_prompts(task.eval_prompts)
    models["base"] = params
    if task.documents is not None:
        train("base", sft_method, "base", task.documents, config.base, "documents")
    train(
        *("SFT", sft_method, "base"),
        *(task.demonstrations, config.sft, "demonstrations"),
    )
    reference = models["SFT"]
    pairs = task.pairs or tuple(
        sample_pairs(
            pipeline,
            reference,
            pipeline.fit_prompts(prompts),
            task.grade,
            num_samples=config.pair_samples,
            use=use,
            path=pipeline.folder / name,
        )
        for prompts, use, name in (
            (task.pair_prompts[0], _PAIR_USE, "pairs.jsonl"),
            (task.pair_prompts[1], _HELDOUT_USE, "heldout_pairs.jsonl"),
        )
    )
    pairs = tuple(
        store_anchor(pipeline, name, reference, part, config.dpo)
        for name, part in zip(("train", "heldout"), pairs, strict=True)
    )
    train("DPO", dpo_method, "SFT", pairs, config.dpo, "pairs")
    chosen = tuple(only_responses(CHOSEN, part) for part in pairs)
    control = dataclasses.replace(config.dpo, optimizer=config.control_optimizer)
    train("control", sft_method, "SFT", chosen, control, "demonstrations")

    _logger.info("evaluation on %d held-out prompts", len(eval_prompts))
    measured = {
        name: measure_responses(
            pipeline,
            params,
            eval_prompts,
            task.grade,
            reference=reference,
            num_samples=config.eval_samples,
            use=_EVAL_USE,
            stage=config.dpo,
        )
        for name, params in models.items()
    }
    preferences = measure_preferences(
        pipeline,
        dpo_method,
        {name: models[name] for name in ("DPO", "control")},
        pairs[1],
        config.dpo,
    )
    return {
        "stages": stages,
        "measured": measured,
        "preferences": preferences,
        "pairs": pairs,
        "eval_prompts": eval_prompts,
    }


def summarise(*, stages, measured, preferences, pairs, eval_prompts) -> dict:
    """The numbers of a run for its record: each a mean and its 95 % interval."""
    models = {}
    for name, m in measured.items():
        models[name] = {
            part: bootstrap_interval(m.per_prompt(part)) for part in m.parts
        }
        models[name]["length_tokens"] = bootstrap_interval(m.length.mean(axis=1))
        models[name]["kl"] = bootstrap_interval(m.kl)
    dpo = measured["DPO"]
    return {
        "models": models,
        "differences": {
            other: {
                part: bootstrap_interval(
                    dpo.per_prompt(part) - measured[other].per_prompt(part)
                )
                for part in dpo.parts
            }
            for other in ("SFT", "control")
        },
        "preferences": {
            name: {key: bootstrap_interval(values) for key, values in found.items()}
            for name, found in preferences.items()
        },
        "pairs": [len(part) for part in pairs],
        "eval_prompts": len(eval_prompts),
        "steps": {name: fitted.steps for name, fitted in stages.items()},
    }


def make_report(
    config: Config,
    task: tasks.Task,
    pipeline: Pipeline,
    *,
    stages,
    measured,
    preferences,
    pairs,
    eval_prompts,
    seconds: float,
) -> report.Report:
    """Headline, tables, curves and samples of a finished run."""
    estimate = sections.estimate
    cards, tables = [], []
    missing = ""
    if task.grade is None:
        missing = (
            " True reward and win rate were not measured: they need "
            "--grade module:function."
        )
    else:
        dpo, sft = (measured[name].per_prompt("reward") for name in ("DPO", "SFT"))
        won = estimate(wins(dpo, sft))
        cards += [
            report.Card("DPO's gain in true reward over SFT", estimate(dpo - sft)),
            report.Card("DPO's win rate over SFT", won, percent=True, digits=1),
        ]
        others = ("SFT", "control", "base")
        tables += [
            sections.reward_table(measured, against="SFT"),
            sections.difference_table(measured, "DPO", others),
        ]
    accuracy = preferences["DPO"]["accuracy"]
    cards += [
        report.Card(
            "DPO's accuracy on held-out pairs",
            estimate(accuracy),
            f"{len(accuracy)} pairs",
            percent=True,
            digits=1,
        ),
        report.Card(
            "DPO's KL to SFT", estimate(measured["DPO"].kl), "exact", 3, "nats / token"
        ),
    ]
    return report.Report(
        title="SFT, then DPO",
        subtitle="your data" if config.data else "the embedded world",
        summary=(
            f"{len(eval_prompts)} held-out prompts, {config.eval_samples} "
            f"responses each at temperature 1; intervals are 95 % bootstrap intervals "
            f"over prompts. The control is SFT continued on the chosen responses with "
            f"DPO's number of updates." + missing
        ),
        cards=tuple(cards),
        sections=(
            *tables,
            sections.behaviour_table(measured, preferences, reference="SFT"),
            _cells_table(task, preferences["DPO"], pairs[1]),
            sections.training_curves(pipeline.folder, list(stages)),
            sections.sample_table(measured, eval_prompts),
            sections.stage_table(stages),
            report.Text("Data", (*task.notes, *pipeline.notes, _pair_note(pairs))),
            report.Config("Config", dataclasses.asdict(config)),
        ),
        meta={
            **run_lib.environment(),
            "duration": seconds,
            "starts": run_lib.count_starts(pipeline.folder),
        },
    )


def _cells_table(task: tasks.Task, found, groups) -> report.Table:
    lengths = np.array([[len(r) for r in group.responses] for group in groups])
    numbers = [group.record for group in groups]
    fields = {
        name: [values[number] for number in numbers]
        for name, values in task.heldout_fields.items()
    }
    return sections.cells_table(found["accuracy"], found["margin"], lengths, fields)


def _pair_note(pairs) -> str:
    lengths = np.array([[len(r) for r in group.responses] for group in pairs[0]])
    chosen, rejected = lengths.mean(axis=0)
    longer = (lengths[:, CHOSEN] > lengths[:, REJECTED]).mean()
    return (
        f"{len(pairs[0])} training and {len(pairs[1])} held-out pairs. Chosen "
        f"responses have {chosen:.1f} tokens, rejected {rejected:.1f}; in {longer:.0%} "
        f"of the training pairs the chosen one is longer."
    )


def run_config(config: Config) -> pathlib.Path:
    """Run, or continue, the run of a config; returns its report's path."""
    began = time.perf_counter()
    watch = make_watch(
        profile=config.profile,
        num=config.profile_steps,
        wandb=config.wandb,
        compile_cache=config.compile_cache,
    )
    # Before the folder: a bad row or a wrong tokenizer leaves none behind.
    task = make_task(config)
    mesh = sharding.make_mesh()
    model, params = make_model(
        config.decoder,
        mesh,
        vocab_size=task.vocab_size,
        seed=config.seed,
        checkpoint=config.model,
        max_positions=config.max_positions,
    )
    with open_pipeline(
        config,
        mesh=mesh,
        model=model,
        encoder=task.encoder,
        notes=task.notes,
        watch=watch,
        max_new_tokens=config.max_new_tokens,
        lora=config.lora if config.adapters else None,
    ) as pipeline:
        first = "" if config.data else "base, "
        last = "DPO, control, evaluation"
        _logger.info("stages: %sSFT, pairs, %s", first, last)
        as_shipped = dataclasses.replace(
            config, name=SMALL.name, root=SMALL.root, seed=SMALL.seed
        )
        if as_shipped == SMALL:
            _logger.info("this takes 5 to 10 minutes on two CPU cores")
        results = run(config, pipeline, task, params)
        seconds = time.perf_counter() - began
        keep_record(
            "quickstart",
            config,
            pipeline,
            results=summarise(**results),
            seconds=seconds,
            notes=task.notes,
            page=make_report(config, task, pipeline, **results, seconds=seconds),
        )
        return pipeline.folder / "report.html"


def main() -> None:
    """The command line."""
    run_command(
        PRESETS,
        run_config,
        lambda config, page: where_is(page),
        default="small",
        description=__doc__,
    )


if __name__ == "__main__":
    main()
