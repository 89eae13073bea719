"""SFT, DPO or ADPO of a checkpoint on your own data: one stage, from a GPU to a pod.

    python -m experiments.finetune --preset llama-3-8b-dpo-v5p-4x4x4 \
        --model DIR --data pairs.jsonl
    python -m experiments.finetune --preset smoke --model DIR --data pairs.jsonl

With `beta` it is DPO on pairs, anchored to the model that it starts from; with
`temperature` too, ADPO on pairs or on lists of K responses, whose labels are grades;
without, SFT on demonstrations, or on the chosen response of each pair, which with
`divergence` keeps near the model that it starts from. All parameters are trained, or
low-rank adapters. The anchor's logps are stored before training, so that its parameters
leave memory. After DPO or ADPO the rewards of held-out groups are measured. The model
is a stage in the run's folder, which --model of any experiment takes and
`scripts/convert_checkpoint.py` turns into a Hugging Face folder. Model and data may lie
on `gs://`.

The presets name a model, what is trained, and the TPU slice whose mesh and
micro-batches they set. What they plan for (`planned`) is a batch of groups of a stated
size: that is what `scripts/compile_for_tpu.py` compiles, from shapes alone. A run takes
the sizes of its data instead.

Source: DPO, arXiv:2305.18290v3; ADPO, arXiv:2510.18913v6; SFT by a divergence,
arXiv:2507.00018. Reproduces no table.
Hardware: of the preset; not run there. docs/tpu.md says which presets were compiled for
their slice.
"""

from __future__ import annotations

import dataclasses
import logging
import time

from experiments.worlds import methods, tasks
from experiments.worlds.command import run_command
from experiments.worlds.pipeline import (
    Pipeline,
    make_watch,
    measure_preferences,
    store_anchor,
)
from experiments.worlds.planned import Compute, MeshSizes, Planned, Programs
from experiments.worlds.single import keep_record, open_pipeline
from pref_jax import model_folders
from pref_jax.data.records import parse_rename
from pref_jax.evals.preference import bootstrap_interval
from pref_jax.method import Method
from pref_jax.models import decoder, published
from pref_jax.models.lora import LoraConfig
from pref_jax.train import sharding
from pref_jax.train.costs import Program
from pref_jax.train.loop import LoopConfig
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the run depends on."""

    stage: StageConfig  # how it trains
    beta: float | None = None  # reward per nat of DPO or ADPO; None: SFT
    temperature: float | None = None  # of ADPO's targets, unit of the labels; None: DPO
    adaptive: bool = False  # let ADPO's tau follow entropy and grades
    adaptive_tau: methods.AdaptiveTau = methods.AdaptiveTau()
    divergence: str | None = None  # of SFT that keeps near its start; None: plain SFT
    fsft: methods.FsftConfig = methods.FsftConfig()  # how it keeps near
    adapters: bool = False  # train low-rank adapters instead of all parameters
    lora: LoraConfig = LoraConfig()  # the adapters
    model: str | None = None  # folder of the checkpoint: Hugging Face, adapter, stage
    shape: str = "llama-3-8b"  # of models/published.py: what `programs` compiles
    data: tuple[str, ...] = ()  # pairs or demonstrations: files, folders, ...
    weights: tuple[float, ...] = ()  # share of each of `data`; none: by its size
    rename: tuple[str, ...] = ()  # fields of `data`, such as correct=labels
    split: str | None = None  # of `data`, if it is a tfds data set
    heldout: str | None = None  # to evaluate on; None: a tenth of `data`, by prompt
    tokenizer: str | None = None  # folder; None: that of `model`
    max_positions: int | None = None  # longest text of `model`; None: as it says
    on_error: str = "raise"  # bad rows of `data`: raise or skip
    row_length: int | None = None  # L, positions; None: the longest group
    long_groups: str = "drop"  # longer than a row: drop, keep_start or keep_end
    cache: str = "runs/token_cache"  # folder of what was tokenised of `data`
    compute: Compute = Compute()
    mesh: MeshSizes = MeshSizes()
    planned: Planned = Planned()  # what `programs` compiles; a run has its own sizes
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/finetune"  # folder of the runs; may be gs://
    seed: int = 0  # of data order and adapters
    profile: int | None = None  # step that a trace begins with
    profile_steps: int = 3  # that are traced
    wandb: str | None = None  # project on Weights & Biases; None: not sent
    compile_cache: str | None = None  # folder of compiled programs, for the next start

    def __post_init__(self):
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"`beta` must be positive or None; got {self.beta}.")
        if self.temperature is not None:
            if not self.temperature > 0:
                raise ValueError(
                    f"`temperature` must be positive or None; got {self.temperature}."
                )
            if self.beta is None:
                raise ValueError("`temperature` belongs to `beta`; give --beta too.")
        if self.adaptive and self.temperature is None:
            raise ValueError("`adaptive` belongs to ADPO; give --temperature too.")
        if self.adaptive_tau != methods.AdaptiveTau() and not self.adaptive:
            raise ValueError("`adaptive_tau` belongs to `adaptive`; give --adaptive.")
        methods.check_divergence(self.divergence, self.fsft, self.stage)
        if self.divergence is not None and self.beta is not None:
            raise ValueError(
                "`divergence` is of SFT and `beta` of DPO; give one of them."
            )
        if self.shape not in published.SHAPES:
            raise ValueError(
                f"`shape` must be one of {', '.join(published.SHAPES)}; got "
                f"{self.shape!r}."
            )
        if self.lora != LoraConfig() and not self.adapters:
            raise ValueError("`lora` belongs to `adapters`; give --adapters too.")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"`weights` needs a number for each of {len(self.data)} sources of "
                f"`data`; got {self.weights}."
            )


def make_method(config: Config) -> Method:
    """DPO, ADPO or SFT by a divergence against stored logps, or plain SFT."""
    if config.divergence is not None:
        return methods.make_fsft(
            methods.find_divergence(config.divergence),
            **dataclasses.asdict(config.fsft),
        )
    if config.beta is None:
        return methods.make_sft()
    if config.temperature is not None:
        adaptive = config.adaptive_tau if config.adaptive else None
        return methods.make_adpo(config.beta, config.temperature, adaptive)
    return methods.make_dpo(config.beta)


def make_task(config: Config) -> tasks.Task:
    """The user's own data."""
    if config.model is None or not config.data:
        raise ValueError("a run needs a model and data; give --model DIR --data FILE.")
    task = tasks.own_task(
        config.data,
        weights=config.weights,
        rename=parse_rename(config.rename),
        split=config.split,
        heldout=config.heldout,
        tokenizer=config.tokenizer,
        model=config.model,
        max_positions=config.max_positions,
        grade=None,
        on_error=config.on_error,
        num_eval_prompts=0,
        row_length=config.row_length,
        long_groups=config.long_groups,
        cache=config.cache,
        samples_pairs=False,
        takes_lists=config.temperature is not None,
    )
    if config.beta is not None and task.pairs is None:
        wanted = "pairs" + " or lists" * (config.temperature is not None)
        raise ValueError(
            f"{', '.join(config.data)} holds demonstrations, and "
            f"{make_method(config).name} compares responses. Give {wanted}, or a "
            f"preset of SFT."
        )
    return task


def make_mesh(config: Config, devices=None):
    """The mesh of a config, on all devices or on these."""
    return sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)


_HOURS = LoopConfig(num_steps=500, validate_every=100, checkpoint_every=100)

SFT = Config(
    stage=StageConfig(
        groups_per_step=128,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20),  # ours
        loop=_HOURS,
    ),
)
FSFT = dataclasses.replace(SFT, divergence="chi-squared")
DPO = dataclasses.replace(
    SFT,
    beta=0.1,
    stage=dataclasses.replace(
        SFT.stage,
        optimizer=OptimizerConfig(learning_rate=5e-7, warmup_steps=50),  # ours
    ),
)


ADPO = dataclasses.replace(
    DPO,
    beta=1.0,  # 1 / tau_anc; ours: the paper's is not verified
    temperature=0.5,  # the paper's December text has 0.5, the public recipe 0.8
    planned=Planned(num_rows=64, groups_per_row=1),
)


def _with_adapters(config: Config) -> Config:
    optimizer = dataclasses.replace(config.stage.optimizer, learning_rate=1e-4)  # ours
    stage = dataclasses.replace(config.stage, optimizer=optimizer)
    return dataclasses.replace(config, adapters=True, stage=stage)


_ON_EVERY_SLICE = {
    "sft": SFT,
    "dpo": DPO,
    "sft-lora": _with_adapters(SFT),
    "dpo-lora": _with_adapters(DPO),
}
METHODS = {**_ON_EVERY_SLICE, "fsft": FSFT, "adpo": ADPO}
SLICES = {
    "llama-3-8b": {
        "v5e-16x16": (MeshSizes(fsdp=64, tensor=4), 1),
        "v5p-2x2x2": (MeshSizes(fsdp=8), 4),
        "v5p-4x4x4": (MeshSizes(fsdp=16), 1),
        "v6e-4x4": (MeshSizes(fsdp=16), 4),
    },
    "qwen-2.5-7b": {"v5p-4x4x4": (MeshSizes(fsdp=16), 1)},
    "llama-3-70b": {"v5p-8x8x8": (MeshSizes(fsdp=64, tensor=8), 1)},
}
"""Model -> slice -> mesh, and micro-batches of a step."""


def _preset(shape: str, method: str, name: str) -> Config:
    config, (mesh, num_microbatches) = METHODS[method], SLICES[shape][name]
    stage = dataclasses.replace(config.stage, num_microbatches=num_microbatches)
    return dataclasses.replace(config, shape=shape, mesh=mesh, stage=stage)


SMOKE = dataclasses.replace(
    DPO,
    compute=Compute(dtype="float32", remat="none"),
    stage=StageConfig(
        groups_per_step=8,
        optimizer=OptimizerConfig(learning_rate=1e-4),
        loop=LoopConfig(num_steps=8, validate_every=4, checkpoint_every=4),
    ),
)
_PLACES = [
    (shape, method, name)
    for shape, slices in SLICES.items()
    for name in slices
    for method in _ON_EVERY_SLICE
]
_PLACES += [("llama-3-8b", method, "v5p-4x4x4") for method in ("fsft", "adpo")]
PRESETS = {"smoke": SMOKE, **METHODS} | {
    "-".join(place): _preset(*place) for place in _PLACES
}


def _param_dtype(config: Config) -> str:
    """Of the parameters that are loaded: what is trained of them is float32."""
    return config.compute.dtype if config.adapters else "float32"


def programs(config: Config, mesh) -> list[Program]:
    """What is to be compiled for this config, from shapes alone.

    Args:
      config: of a preset; with `model` the sizes of that checkpoint.
      mesh: of `make_mesh`.

    Returns:
      The train step; for DPO the scoring pass of the anchor; and the sampler on
      parameters of bfloat16, which runs of this module do not need, but methods that
      sample while they train.
    """
    sizes = published.SHAPES[config.shape]
    if config.model is not None:
        sizes = model_folders.load_config(config.model)
    found = Programs(
        dataclasses.replace(sizes, **dataclasses.asdict(config.compute)),
        config.planned,
        mesh,
        adapters=config.lora if config.adapters else None,
        param_dtype=_param_dtype(config),
    )
    method = make_method(config)
    num_responses = 1 if config.beta is None else 2
    if config.temperature is not None:
        num_responses = config.planned.list_size
    programs = [found.step("train step", config.stage, method, num_responses)]
    if "anchor_logps" in method.requires:
        programs.append(found.scoring("scoring pass", method, num_responses))
    return [*programs, found.sampler()]


def run(config: Config, pipeline: Pipeline, task: tasks.Task, params) -> dict:
    """Train, evaluate, write the model; continues what the folder already holds.

    Returns:
      The results for the record.
    """
    method = make_method(config)
    groups, unit = task.demonstrations, "demonstrations"
    if config.beta is not None:
        unit, groups = "pairs", task.pairs
    if "anchor_logps" in method.requires:
        groups = tuple(
            store_anchor(pipeline, name, params, part, config.stage)
            for name, part in zip(("train", "heldout"), groups, strict=True)
        )
    trained, fitted = pipeline.train(
        method.name,
        method,
        params,
        *groups,
        config.stage,
        unit=unit,
        start=config.model,
        consume=True,
    )
    results = {"steps": fitted.steps, "seconds": fitted.seconds}
    if config.beta is not None:
        # Before training all rewards are 0.
        models = {"trained": trained}
        found = measure_preferences(pipeline, method, models, groups[1], config.stage)
        results["preferences"] = {
            key: bootstrap_interval(values) for key, values in found["trained"].items()
        }
    return results


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its folder."""
    began = time.perf_counter()
    watch = make_watch(
        profile=config.profile,
        num=config.profile_steps,
        wandb=config.wandb,
        compile_cache=config.compile_cache,
    )
    task, mesh = make_task(config), make_mesh(config)
    found, params = model_folders.load(
        config.model,
        mesh=mesh,
        max_positions=config.max_positions,
        param_dtype=_param_dtype(config),
        **dataclasses.asdict(config.compute),
    )
    with open_pipeline(
        config,
        mesh=mesh,
        model=decoder.make_decoder(found),
        encoder=task.encoder,
        notes=task.notes,
        watch=watch,
        max_new_tokens=1,
        lora=config.lora if config.adapters else None,
    ) as pipeline:
        results = run(config, pipeline, task, params)
        keep_record(
            "finetune",
            config,
            pipeline,
            results=results,
            seconds=time.perf_counter() - began,
            notes=task.notes,
        )
        return pipeline.folder


def main() -> None:
    """The command line."""

    def describe(config, folder):
        name = make_method(config).name
        return f"run: {folder}; the model is its folder {name}"

    run_command(PRESETS, run_config, describe, default="smoke", description=__doc__)


if __name__ == "__main__":
    main()
