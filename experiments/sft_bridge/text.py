"""SFT, then DPO, on text of your own: one learning rate, one divergence, one run.

    python -m experiments.sft_bridge.text --preset small --tokenizer DIR \
        --demonstrations.data sft.jsonl --pairs.data pairs.jsonl
    python -m experiments.sft_bridge.text --preset llama-3-8b-v5p-4x4x4 --model DIR \
        --demonstrations.data ultrachat.jsonl --pairs.data ultrafeedback.jsonl

The base is a checkpoint, or a small decoder that the run pre-trains on the text of
`documents`, prompts included. SFT is plain, or keeps near the base by a `divergence`;
DPO is anchored to the SFT model. What the run tells without any judge: the loss on
held-out demonstrations, how far SFT has moved from the base on them, and how often the
implicit reward puts the chosen response of a held-out pair first: SFT's against the
base, log(pi / pi_0), and DPO's against both. Answers of both models to held-out prompts
lie in `responses.jsonl`, for a judge; with `grade` they are graded.

Several learning rates or divergences are a sweep:

    python scripts/sweep.py experiments.sft_bridge.text --root runs/rates \
        --grid sft.optimizer.learning_rate=2e-5,1e-5,5e-6,2e-6,1e-6 --grid seed=0,1,2 \
        --metrics results.SFT.loss results.SFT.accuracy_from_base \
        results.DPO.accuracy results.DPO.accuracy_from_base -- --preset PRESET ...

Source: arXiv:2507.00018, whose settings are not verified. The preset of Llama 3 8B has
the public recipe of SimPO's repository instead (UltraChat-200k at 2e-5, UltraFeedback
at beta 0.01 and 5e-7, one epoch each, 128 a step, warm-up of a tenth); their rates
below 2e-5 are ours, and so are rows of 4,096 positions, where the recipe cuts texts at
2,048. Hardware: of the preset; docs/tpu.md says what was compiled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tyro.conf import AvoidSubcommands

from experiments.worlds import methods, sections, tasks
from experiments.worlds.command import run_command, where_is
from experiments.worlds.models import COMPUTE, DecoderSizes, make_model, make_stage
from experiments.worlds.pipeline import (
    Grade,
    Pipeline,
    make_watch,
    measure_loss,
    measure_preferences,
    prompt_text,
    store_anchor,
)
from experiments.worlds.planned import MeshSizes, Planned, Programs
from experiments.worlds.single import keep_record, open_pipeline
from pref_jax import model_folders, processes, report
from pref_jax.data import sources
from pref_jax.data.records import parse_rename
from pref_jax.data.templates import TextEncoder
from pref_jax.evals.preference import bootstrap_interval
from pref_jax.losses.supervised import TOTAL_VARIATION
from pref_jax.method import Method
from pref_jax.models import published
from pref_jax.train import run as run_lib
from pref_jax.train import sharding, storage
from pref_jax.train.costs import Program
from pref_jax.train.loop import Fitted, LoopConfig
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.profiling import ProfileConfig
from pref_jax.train.stage import StageConfig
from pref_jax.types import PyTree, TokenGroup

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where rows come from."""

    data: tuple[str, ...] = ()  # files, folders, patterns, tfds:NAME, gs://
    heldout: str | None = None  # to measure on; None: a tenth of `data`, by prompt
    split: str | None = None  # of `data`, if it is a tfds data set
    rename: tuple[str, ...] = ()  # fields, such as answer=response


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the run depends on."""

    sft: StageConfig  # on demonstrations
    dpo: StageConfig  # on pairs
    base: AvoidSubcommands[StageConfig | None] = None  # on text, without `model`
    sft_epochs: float | None = None  # set SFT's steps, warm-up and validations
    dpo_epochs: float | None = None  # likewise DPO's
    warmup: float = 0.1  # share of a stage whose epochs are given
    beta: float = 0.1  # reward per nat of DPO
    divergence: str | None = None  # of SFT that keeps near the base; None: plain SFT
    fsft: methods.FsftConfig = methods.FsftConfig()  # how it keeps near
    demonstrations: Rows = Rows()
    pairs: Rows = Rows()
    documents: Rows = Rows()  # text of the base; no data: that of the demonstrations
    model: str | None = None  # folder of the checkpoint that is the base
    shape: str = "llama-3-8b"  # of models/published.py: what `programs` compiles
    decoder: DecoderSizes = DecoderSizes()  # a fresh base; of `model` how it computes
    tokenizer: str | None = None  # folder; None: that of `model`
    max_positions: int | None = None  # longest text of `model`; None: as it says
    grade: str | None = None  # module:function of (prompt, response) -> true reward
    num_eval_prompts: int = 100  # that SFT and DPO answer; 0: none
    max_new_tokens: int = 256  # of an answer
    on_error: str = "raise"  # bad rows: raise or skip
    row_length: int | None = None  # L, positions; None: the longest group
    long_groups: str = "drop"  # longer than a row: drop, keep_start or keep_end
    cache: str = "runs/token_cache"  # folder of what was tokenised
    mesh: MeshSizes = MeshSizes()
    planned: Planned = Planned()  # what `programs` compiles; a run has its own sizes
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/sft_bridge_text"  # folder of the runs; may be gs://
    seed: int = 0  # of a fresh base and of the order of data
    wandb: str | None = None  # project on Weights & Biases; None: not sent
    compile_cache: str | None = None  # folder of compiled programs, for the next start

    @property
    def trains_base(self) -> bool:
        """Whether the run begins with a fresh decoder."""
        return self.model is None and self.base is not None

    def __post_init__(self):
        methods.check_divergence(self.divergence, self.fsft, self.sft)
        if self.warmup != 0.1 and self.sft_epochs is None and self.dpo_epochs is None:
            raise ValueError("`warmup` is of stages whose epochs are given.")
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")
        if self.documents != Rows() and not self.trains_base:
            raise ValueError("`documents` are text for a base, and none is trained.")
        for name in ("sft_epochs", "dpo_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive or None; got {value}.")
        if self.shape not in published.SHAPES:
            raise ValueError(
                f"`shape` must be one of {', '.join(published.SHAPES)}; got "
                f"{self.shape!r}."
            )
        if self.grade is not None and not self.num_eval_prompts:
            raise ValueError("`grade` needs answers; give --num-eval-prompts.")


def make_sft(config: Config) -> Method:
    """Plain SFT, or the one that keeps near the base."""
    if config.divergence is None:
        return methods.make_sft()
    divergence = methods.find_divergence(config.divergence)
    return methods.make_fsft(divergence, **dataclasses.asdict(config.fsft))


# --- data -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run learns and measures; pairs of training and held-out groups.

    Attributes:
      demonstrations: K = 1.
      pairs: K = 2.
      documents: text of the base, or None.
      prompts: held out, of the demonstrations; that the models answer.
      grade: of an answer, or None.
      encoder: text <-> ids.
      vocab_size: of a fresh decoder.
      notes: what was read and left out.
    """

    demonstrations: tuple[Sequence[TokenGroup], Sequence[TokenGroup]]
    pairs: tuple[Sequence[TokenGroup], Sequence[TokenGroup]]
    documents: tuple[Sequence[TokenGroup], Sequence[TokenGroup]] | None
    prompts: list
    grade: Grade | None
    encoder: TextEncoder
    vocab_size: int
    notes: tuple[str, ...]


def _as_text(groups: Sequence[TokenGroup]) -> Sequence[TokenGroup]:
    """Documents: all of a demonstration is predicted from its first token."""

    def text(group: TokenGroup) -> TokenGroup:
        ids = np.concatenate([group.prompt[1:], group.responses[0]])
        return dataclasses.replace(
            group,
            prompt=group.prompt[:1],
            responses=(ids,),
            loss_masks=(np.ones(len(ids), bool),),
            extras={},
        )

    return sources.mapped(text, groups)


def read_data(config: Config) -> Data:
    """The user's files, tokenised.

    Raises:
      ValueError: what the run needs is missing, or is not what it needs.
    """
    trained = config.trains_base and config.tokenizer is not None
    if config.model is None and not trained:
        raise ValueError(
            "a run needs a base: give --model DIR, or a preset that trains one and "
            "--tokenizer DIR."
        )

    def read(name: str, rows: Rows, grade: str | None = None) -> tasks.Task:
        if not rows.data:
            raise ValueError(f"a run needs {name}; give --{name}.data FILE.")
        return tasks.own_task(
            rows.data,
            weights=(),
            rename=parse_rename(rows.rename),
            split=rows.split,
            heldout=rows.heldout,
            tokenizer=config.tokenizer,
            model=config.model,
            max_positions=config.max_positions,
            grade=grade,
            on_error=config.on_error,
            num_eval_prompts=config.num_eval_prompts,
            row_length=config.row_length,
            long_groups=config.long_groups,
            cache=config.cache,
            samples_pairs=False,
            option=f"--{name}.heldout",
        )

    shown = read("demonstrations", config.demonstrations, config.grade)
    compared = read("pairs", config.pairs)
    if compared.pairs is None:
        raise ValueError(
            f"{', '.join(config.pairs.data)} holds demonstrations, and DPO compares "
            f"responses; give pairs."
        )
    documents, notes = None, (*shown.notes, *compared.notes)
    if config.trains_base:
        text = shown
        if config.documents.data:
            text = read("documents", config.documents)
            notes += text.notes
        documents = tuple(map(_as_text, text.demonstrations))
    return Data(
        demonstrations=shown.demonstrations,
        pairs=compared.pairs,
        documents=documents,
        prompts=shown.eval_prompts,
        grade=shown.grade,
        encoder=shown.encoder,
        vocab_size=shown.vocab_size,
        notes=tuple(dict.fromkeys(notes)),
    )


def in_epochs(
    stage: StageConfig, epochs: float | None, num_groups: int, warmup: float
) -> StageConfig:
    """A stage of so many epochs, ten validations or more; None: the stage as it is.

    Args:
      stage: how it trains.
      epochs: or None.
      num_groups: of an epoch.
      warmup: share of the stage.
    """
    if epochs is None:
        return stage
    num_steps = max(1, round(epochs * num_groups / stage.groups_per_step))
    tenth = max(1, num_steps // 10)
    return dataclasses.replace(
        stage,
        optimizer=dataclasses.replace(
            stage.optimizer, warmup_steps=int(warmup * num_steps)
        ),
        loop=dataclasses.replace(
            stage.loop,
            num_steps=num_steps,
            validate_every=tenth,
            checkpoint_every=tenth,
        ),
    )


# --- the run --------------------------------------------------------------------------

_ANSWERS_USE = 1
_LIKELIHOOD = methods.make_sft()
_LOG_RATIO = methods.make_fsft(TOTAL_VARIATION, 1.0)  # its loss: minus the log-ratio
_REWARD = methods.make_dpo(1.0)


def _implicit(pipeline: Pipeline, params, groups, stage) -> dict:
    """Accuracy and margin of log(pi / anchor) on pairs that carry its logps."""
    found = measure_preferences(pipeline, _REWARD, {"": params}, groups, stage)[""]
    return {name: bootstrap_interval(values) for name, values in found.items()}


def _answers(pipeline: Pipeline, params, prompts, model: str) -> list[dict]:
    """One answer to each prompt, at temperature 1, for `responses.jsonl`."""
    samples = pipeline.sample(params, prompts, num_samples=1, use=_ANSWERS_USE)
    return [
        {
            "prompt": prompt_text(prompt),
            "model": model,
            "response": pipeline.encoder.decode(tokens[0, : length[0]]),
            "ended": bool(ended[0]),
        }
        for prompt, tokens, length, ended in zip(
            prompts, samples.tokens, samples.length, samples.ended, strict=True
        )
    ]


def _of_epochs(pipeline, name: str, stage, epochs, groups, config: Config):
    """`in_epochs`, and a note of what it has set in the place of the stage's own."""
    found = in_epochs(stage, epochs, len(groups), config.warmup)
    if found is not stage:
        pipeline.note(
            f"{name}: {found.loop.num_steps} steps ({epochs:g} epochs of {len(groups)} "
            f"groups), {found.optimizer.warmup_steps} of them warm-up, validated every "
            f"{found.loop.validate_every}; what --{name.lower()}.loop and "
            f"--{name.lower()}.optimizer say of these counts only with "
            f"--{name.lower()}-epochs None"
        )
    return found


def run(
    config: Config, pipeline: Pipeline, data: Data, params: PyTree
) -> tuple[dict, dict[str, Fitted]]:
    """Base, SFT, DPO, and what each is; continues what the folder already holds.

    Returns:
      The results for the record, and how the stages went.
    """
    fitted, results = {}, {}
    if config.trains_base:
        params, fitted["base"] = pipeline.train(
            *("base", _LIKELIHOOD, params, *data.documents, config.base),
            unit="documents",
            consume=True,
        )
    method = make_sft(config)

    def with_base(name, groups):
        return store_anchor(pipeline, f"base_{name}", params, groups, config.sft)

    shown, heldout = data.demonstrations
    measured = with_base("heldout", heldout)
    compared = with_base("heldout_pairs", data.pairs[1])
    if "anchor_logps" in method.requires:
        shown, heldout = with_base("demonstrations", shown), measured

    def tell(name, params):
        """What a model is, against the base."""

        def loss(method):
            return measure_loss(pipeline, method, params, measured, config.sft)["loss"]

        results[name] = {"loss": loss(_LIKELIHOOD), "log_ratio": -loss(_LOG_RATIO)}
        implicit = _implicit(pipeline, params, compared, config.dpo)
        results[name] |= {f"{key}_from_base": x for key, x in implicit.items()}
        if data.prompts:
            return _answers(pipeline, params, data.prompts, name)
        return []

    base_loss = measure_loss(pipeline, _LIKELIHOOD, params, measured, config.sft)
    results["base"] = {"loss": base_loss["loss"]}
    stage = _of_epochs(pipeline, "SFT", config.sft, config.sft_epochs, shown, config)
    params, fitted["SFT"] = pipeline.train(
        *("SFT", method, params, shown, heldout, stage),
        unit="demonstrations",
        consume=True,
    )
    answers = tell("SFT", params)
    pairs = [
        store_anchor(pipeline, f"SFT_{name}", params, groups, config.dpo)
        for name, groups in zip(("pairs", "heldout_pairs"), data.pairs, strict=True)
    ]
    stage = _of_epochs(pipeline, "DPO", config.dpo, config.dpo_epochs, pairs[0], config)
    dpo = methods.make_dpo(config.beta)
    params, fitted["DPO"] = pipeline.train(
        *("DPO", dpo, params, *pairs, stage), unit="pairs", consume=True
    )
    answers += tell("DPO", params)
    results["DPO"] |= _implicit(pipeline, params, pairs[1], config.dpo)
    if data.grade is not None:
        for prompt, answer in zip(2 * data.prompts, answers, strict=True):
            answer["reward"] = data.grade(prompt, answer["response"])["reward"]
        for name in ("SFT", "DPO"):
            rewards = [x["reward"] for x in answers if x["model"] == name]
            results[name]["reward"] = bootstrap_interval(np.array(rewards))
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    if answers:
        path = pipeline.folder / "responses.jsonl"
        processes.on_first(lambda: storage.write_text(path, text))
    return results, fitted


def make_report(
    config: Config,
    data: Data,
    pipeline: Pipeline,
    results: Mapping[str, dict],
    fitted: Mapping[str, Fitted],
    seconds: float,
) -> report.Report:
    """The page of a run that took so many seconds since its last start."""

    def shown(name, key):
        value = results[name].get(key)
        if isinstance(value, tuple):
            return report.Estimate(*value)
        return value

    keys = {
        "loss": report.Column("loss on demonstrations", 3, "nats / token"),
        "log_ratio": report.Column("log(pi / pi_0) on them", 3, "nats / token"),
        "accuracy_from_base": report.Column(
            "accuracy of log(pi / pi_0)", 1, percent=True
        ),
        "accuracy": report.Column("accuracy of log(pi / SFT)", 1, percent=True),
        "reward": report.Column("grade of its answers", 3),
    }
    how = "plain" if config.divergence is None else f"by {config.divergence}"
    return report.Report(
        title="SFT, then DPO",
        subtitle="on text of your own, arXiv:2507.00018",
        summary=f"One run: SFT {how} at a learning rate of "
        f"{config.sft.optimizer.learning_rate:g}, then DPO. All measured on held-out "
        f"rows; no judge has read the answers.",
        cards=tuple(
            report.Card(f"{name}: preference accuracy", estimate, "", 1, percent=True)
            for name in ("SFT", "DPO")
            for estimate in [shown(name, "accuracy_from_base")]
        ),
        sections=(
            report.Table(
                "What each model is",
                columns=(report.Column("model"), *keys.values()),
                rows=tuple(
                    (name, *(shown(name, key) for key in keys)) for name in results
                ),
                note="pi_0 is the base. Accuracy: how often the reward puts the "
                "chosen response of a held-out pair first, with 95 % intervals over "
                "pairs; a tie is half. One run has one seed: what a setting does is "
                "told by a sweep over several.",
            ),
            sections.stage_table(fitted),
            sections.training_curves(pipeline.folder, list(fitted)),
            report.Text("Data", tuple([*data.notes, *pipeline.notes])),
            report.Config("Config", dataclasses.asdict(config)),
        ),
        meta={
            **run_lib.environment(),
            "duration": seconds,
            "starts": run_lib.count_starts(pipeline.folder),
        },
    )


def run_config(config: Config):
    """Run, or continue, the run of a config; returns its report's path."""
    began = time.perf_counter()
    watch = make_watch(
        profile=None,
        num=ProfileConfig.num,
        wandb=config.wandb,
        compile_cache=config.compile_cache,
    )
    data = read_data(config)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    model, params = make_model(
        config.decoder,
        mesh,
        vocab_size=data.vocab_size,
        seed=config.seed,
        checkpoint=config.model,
        max_positions=config.max_positions,
    )
    with open_pipeline(
        config,
        mesh=mesh,
        model=model,
        encoder=data.encoder,
        notes=data.notes,
        watch=watch,
        max_new_tokens=config.max_new_tokens,
    ) as pipeline:
        prompts = pipeline.fit_prompts(data.prompts) if data.prompts else []
        data = dataclasses.replace(data, prompts=prompts)
        results, fitted = run(config, pipeline, data, params)
        seconds = time.perf_counter() - began
        keep_record(
            "sft_bridge_text",
            config,
            pipeline,
            results=results,
            seconds=seconds,
            notes=data.notes,
            page=make_report(config, data, pipeline, results, fitted, seconds),
        )
        return pipeline.folder / "report.html"


# --- presets --------------------------------------------------------------------------


def programs(config: Config, mesh) -> list[Program]:
    """What is to be compiled for this config, from shapes alone.

    Args:
      config: of a preset; with `model` the sizes of that checkpoint.
      mesh: of `make_mesh`.

    Returns:
      Both train steps, the scoring passes of their anchors, and the sampler on
      parameters of bfloat16; a run's are float32.
    """
    sizes = published.SHAPES[config.shape]
    if config.model is not None:
        sizes = model_folders.load_config(config.model)
    compute = {name: getattr(config.decoder, name) for name in COMPUTE}
    found = Programs(dataclasses.replace(sizes, **compute), config.planned, mesh)
    dpo = methods.make_dpo(config.beta)
    return [
        found.scoring("scoring pass, demonstrations", _LOG_RATIO, 1),
        found.step("SFT step", config.sft, make_sft(config), 1),
        found.scoring("scoring pass, pairs", dpo, 2),
        found.step("DPO step", config.dpo, dpo, 2),
        found.sampler(),
    ]


def _paper_stage(rate: float) -> StageConfig:
    return StageConfig(
        groups_per_step=128,
        optimizer=OptimizerConfig(learning_rate=rate, b2=0.999),
        loop=LoopConfig(num_steps=500, validate_every=100, checkpoint_every=100),
    )


PAPER = Config(
    sft=_paper_stage(2e-5),
    dpo=_paper_stage(5e-7),
    sft_epochs=1.0,
    dpo_epochs=1.0,
    beta=0.01,
    decoder=DecoderSizes(dtype="bfloat16", remat="full"),
    row_length=4096,  # a pair of 2048 positions a side
    num_eval_prompts=500,
    max_new_tokens=1024,
    mesh=MeshSizes(fsdp=16),
    planned=Planned(num_rows=128, groups_per_row=1, prompt=1024, response=1023),
)
SMALL = Config(
    base=make_stage(32, 600, 2e-3),
    sft=make_stage(32, 200, 1e-3),
    dpo=make_stage(16, 100, 1e-4, weight_decay=0.0),
)
_SHORT = LoopConfig(num_steps=4, validate_every=2, checkpoint_every=2)


def _short(rate: float) -> StageConfig:
    return StageConfig(8, OptimizerConfig(learning_rate=rate), _SHORT)


SMOKE = dataclasses.replace(
    SMALL,
    base=_short(1e-3),
    sft=_short(1e-3),
    dpo=_short(1e-4),
    decoder=DecoderSizes(
        width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=32
    ),
    num_eval_prompts=4,
    max_new_tokens=8,
)
PRESETS = {
    "small": SMALL,
    "smoke": SMOKE,
    "llama-3-8b-v5p-4x4x4": PAPER,
    "llama-3-8b-chi-squared-v5p-4x4x4": dataclasses.replace(
        PAPER, divergence="chi-squared"
    ),
}


def main() -> None:
    """The command line."""
    run_command(
        PRESETS,
        run_config,
        lambda config, path: where_is(path),
        default="small",
        description=__doc__,
    )


if __name__ == "__main__":
    main()
