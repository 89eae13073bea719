"""What experiments share: stages on groups, sampled pairs, evaluation by sampling.

The rooms of the library do not know each other; experiments are where they meet, and
this is the meeting that most of them have in common.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pref_jax import model_folders
from pref_jax.axes import whole
from pref_jax.data import anchor_cache, rows, sources
from pref_jax.data.records import Message
from pref_jax.data.templates import TextEncoder
from pref_jax.logps import response_scores, token_kl
from pref_jax.method import Method, objective
from pref_jax.models import lora
from pref_jax.models.lora import LoraConfig
from pref_jax.sampling import Samples, SamplingConfig, make_sampler, sample_responses
from pref_jax.train import sharding, storage
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.logging import Progress
from pref_jax.train.loop import Fitted, Preempted, Watch
from pref_jax.train.profiling import ProfileConfig, StartClock, enable_compile_cache
from pref_jax.train.stage import StageConfig, train_stage
from pref_jax.train.step import evaluate, make_eval_step
from pref_jax.train.tracking import WandbConfig
from pref_jax.types import Model, PyTree, TokenGroup

_logger = logging.getLogger("pref_jax.experiments")

T = TypeVar("T")
Grade = Callable[[object, str], dict[str, float]]
"""(prompt, response) -> parts of the true reward by name, "reward" among them."""


class ToolPrompt(NamedTuple):
    """The prompt of a chat whose template is told of tools.

    Attributes:
      messages: of the chat.
      tools: as in `Record.tools`.
    """

    messages: tuple[Message, ...]
    tools: tuple[str, ...]


def leaving_room(
    prompts: Sequence[T],
    length: Callable[[T], int],
    *,
    max_positions: int | None,
    max_new_tokens: int,
) -> tuple[list[T], str]:
    """The prompts that leave a model room for a whole response.

    Args:
      prompts: texts, messages or groups.
      length: tokens of one.
      max_positions: of the model; None: any number.
      max_new_tokens: of a response.

    Returns:
      The prompts, and what was left out; "": nothing was.

    Raises:
      ValueError: none does.

    >>> kept, left_out = leaving_room(
    ...     ["short", "too long"], len, max_positions=10, max_new_tokens=4
    ... )
    >>> kept, left_out.split(":")[0]
    (['short'], 'of 2 prompts 1 were left out')
    """
    if max_positions is None:
        return list(prompts), ""
    room = max_positions - max_new_tokens
    fitted = [prompt for prompt in prompts if length(prompt) <= room]
    if len(fitted) == len(prompts):
        return fitted, ""
    left_out = (
        f"of {len(prompts)} prompts {len(prompts) - len(fitted)} were left out: with "
        f"{max_new_tokens} new tokens they are longer than the model's "
        f"{max_positions} positions"
    )
    if not fitted:
        raise ValueError(
            f"{left_out}. Use shorter prompts, or a smaller --max-new-tokens."
        )
    return fitted, left_out


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What every stage of a run needs.

    Attributes:
      folder: of the run; each stage has one of its own in it.
      guard: says when to stop.
      mesh: of `sharding.make_mesh`.
      model: the functions.
      encoder: text <-> ids.
      seed: of data order and sampling.
      max_new_tokens: of a sampled response.
      row_length: L, positions; None: the longest group, at least 128.
      long_groups: policy for groups that are longer than a row.
      lora: adapters that stages train on what they start from; None: everything is
        trained.
      watch: what is looked at while stages train.
      notes: what was dropped, cut or left out on the way, for the report.
    """

    folder: epath.Path
    guard: PreemptionGuard
    mesh: jax.sharding.Mesh
    model: Model
    encoder: TextEncoder
    seed: int
    max_new_tokens: int
    row_length: int | None = None
    long_groups: str = "drop"
    lora: LoraConfig | None = None
    watch: Watch = Watch()
    notes: list[str] = dataclasses.field(default_factory=list)

    def fit(self, groups: Sequence[TokenGroup]) -> tuple[list[TokenGroup], int]:
        """The groups that fit a row and the model, and the length of a row.

        What was dropped or cut is logged, and stands in `notes`.
        """
        fitted, counts = sources.fit_groups(
            groups,
            self.row_length or sources.longest_group(groups),
            policy=self.long_groups,
            max_positions=self.model.max_positions,
        )
        length = self.row_length or max(128, sources.longest_group(fitted))
        if counts["dropped"] or counts["cut"]:
            self.note(
                f"of {counts['groups']} groups {counts['dropped']} were dropped and "
                f"{counts['cut']} cut (policy {self.long_groups}): rows have {length} "
                f"positions, the model {self.model.max_positions or 'any number'}"
            )
        return fitted, length

    def fit_prompts(self, prompts: Sequence) -> list:
        """The prompts that leave the model room for a whole response.

        What was left out is logged, and stands in `notes`.

        Raises:
          ValueError: none does.
        """
        fitted, left_out = leaving_room(
            prompts,
            lambda prompt: len(self.encode_prompt(prompt)),
            max_positions=self.model.max_positions,
            max_new_tokens=self.max_new_tokens,
        )
        if left_out:
            self.note(left_out)
        return fitted

    def encode_prompt(self, prompt) -> np.ndarray:
        """The ids that the model continues."""
        if isinstance(prompt, ToolPrompt):
            return self.encoder.encode_prompt(prompt.messages, tools=prompt.tools)
        return self.encoder.encode_prompt(prompt)

    def note(self, text: str) -> None:
        """Log a text, and keep it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            _logger.warning("%s", text)

    def batches(self, groups, row_length: int, stage: StageConfig) -> sources.Batches:
        """Every group once, in order; of each batch this process's rows."""
        return self.own_rows(
            sources.evaluation_batches(
                groups,
                groups_per_step=stage.groups_per_step,
                row_length=row_length,
                rows_multiple=sharding.num_row_shards(self.mesh),
            )
        )

    @property
    def disk_folder(self) -> pathlib.Path:
        """Folder of what is read by position: that of the run, or one on this disk."""
        if storage.is_object_store(self.folder):
            return pathlib.Path("runs", *self.folder.parts[1:])
        return pathlib.Path(self.folder)

    def own_rows(self, batches: sources.Batches) -> sources.Batches:
        """The batches, of which this process builds what its devices hold."""
        return batches.of_rows(sharding.own_rows(self.mesh, batches.shape.num_rows))

    def train(
        self,
        name: str,
        method: Method,
        params: PyTree,
        groups: Sequence[TokenGroup],
        heldout: Sequence[TokenGroup],
        stage: StageConfig,
        *,
        unit: str,
        start: str | None = None,
        consume: bool = False,
    ) -> tuple[PyTree, Fitted]:
        """One stage without a live anchor; validated on the held-out groups.

        Args:
          name: of the stage and its folder.
          method: the five functions.
          params: what it starts from; with `lora` the base of its adapters.
          groups: to train on.
          heldout: to validate on.
          stage: how it trains.
          unit: what the progress line calls an example.
          start: folder that `params` are the model of; `lora` needs it.
          consume: free `params` once training has a copy of them; not with `lora`.

        Returns:
          All parameters after training, adapters merged; and how the stage went.
        """
        groups, row_length = self.fit(groups)
        heldout, heldout_length = self.fit(heldout)
        batches = sources.training_batches(
            groups,
            groups_per_step=stage.groups_per_step,
            num_steps=stage.loop.num_steps,
            row_length=row_length,
            seed=self.seed,
            rows_multiple=sharding.num_row_shards(self.mesh) * stage.num_microbatches,
        )
        model, frozen, base = self.model, (), None
        if self.lora is not None:
            if start is None:
                raise ValueError(
                    f"stage {name} trains adapters, which need a base: give --model."
                )
            dtype = jax.tree.leaves(params)[0].dtype.name
            base = model_folders.base_identity(start, dtype=dtype)
            model = lora.adapted(model, self.lora)
            # Each stage's own, apart from the draws of samples.
            use = zlib.crc32(f"adapters of {name}".encode())
            key = jax.random.fold_in(jax.random.key(self.seed), use)
            frozen, params = lora.split(params, self.lora, key)
        trained, fitted = train_stage(
            name,
            folder=self.folder / name,
            config=stage,
            method=method,
            model=model,
            params=params,
            anchor=(),
            frozen=frozen,
            base=base,
            source=sources.OfflineSource(self.own_rows(batches)),
            validation=self.batches(heldout, heldout_length, stage),
            count=rows.count_batch,
            mesh=self.mesh,
            seed=self.seed,
            guard=self.guard,
            unit=unit,
            watch=self.watch,
            consume=consume and self.lora is None,
            data=rows.measure(groups).digest(),
        )
        if self.lora is not None:
            trained = lora.merge(frozen, trained, self.lora)
        return trained, fitted

    def sample(self, params, prompts, *, num_samples: int, use: int) -> Samples:
        """Responses to each prompt at temperature 1; `use` names the draw."""
        settings = SamplingConfig(
            num_samples=num_samples, max_new_tokens=self.max_new_tokens
        )
        shards = sharding.num_row_shards(self.mesh)
        with (
            jax.set_mesh(self.mesh),
            self.progress("sampling", len(prompts)) as count,
        ):
            return sample_responses(
                _sampler(self.model, settings, self.encoder.end_ids),
                params,
                [self.encode_prompt(prompt) for prompt in prompts],
                key=jax.random.fold_in(jax.random.key(self.seed), use),
                batch_size=-(-min(64, len(prompts)) // shards) * shards,
                on_batch=count,
            )

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows work without metrics, and ends it when asked to stop.

        Yields:
          To be called with the number of steps done, after each.
        """
        with Progress(name, total) as progress:

            def count(done: int) -> None:
                progress.count(done)
                if self.guard.agreed():
                    raise Preempted(f"stopped in {name}, {done} of {total} done")

            yield count


# Compiled functions are kept: a run measures several models of one shape.
@functools.cache
def _sampler(model: Model, settings: SamplingConfig, end_ids: tuple[int, ...]):
    return make_sampler(model, settings, end_ids=end_ids)


@functools.cache
def _compiled(function: Callable, model: Model):
    """Every process gets the whole result."""

    def call(*args, **options):
        return whole(function(model, *args, **options))

    return jax.jit(call)


def make_watch(
    *, profile: int | None, num: int, wandb: str | None, compile_cache: str | None
) -> Watch:
    """What a run's config says is to be looked at; turns the compile cache on.

    Args:
      profile: step of each stage that a trace begins with, or None.
      num: steps that are traced.
      wandb: project on Weights & Biases, or None.
      compile_cache: folder of compiled programs, or None.

    Raises:
      ValueError: `num` is changed and nothing is traced.
    """
    if profile is None and num != ProfileConfig.num:
        raise ValueError("`profile_steps` belongs to `profile`; give --profile too.")
    cache = None if compile_cache is None else enable_compile_cache(compile_cache)
    return Watch(
        profile=None if profile is None else ProfileConfig(profile, num),
        wandb=None if wandb is None else WandbConfig(wandb),
        clock=StartClock(cache),
    )


def save_tokenizer(encoder: TextEncoder, folder) -> None:
    """Write the tokenizer of a run into its folder, on a disk or in a bucket."""
    target = folder / model_folders.TOKENIZER_FOLDER
    if storage.is_object_store(target):
        with storage.Mirror(target, seconds=None) as mirror:
            encoder.save_tokenizer(mirror.folder)
    else:
        encoder.save_tokenizer(target)


def prompt_text(prompt) -> str:
    """A prompt as one string, for files and reports."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, ToolPrompt):
        prompt = prompt.messages
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def only_responses(slot: int, groups: Sequence[TokenGroup]) -> Sequence[TokenGroup]:
    """Demonstrations, each made of one response of a group."""

    def only(group):
        return dataclasses.replace(
            group,
            responses=(group.responses[slot],),
            loss_masks=(group.loss_masks[slot],),
            labels=(1.0,),
            extras={},
        )

    return sources.mapped(only, groups)


def store_anchor(
    pipeline: Pipeline, name: str, params, groups, stage: StageConfig
) -> Sequence[TokenGroup]:
    """Groups with a model's token logps, which may then leave memory.

    Args:
      pipeline: the run.
      name: of the groups; the logps lie in `anchor_logps/<name>` of the run folder, or
        of a folder on this disk if the run's is in a bucket.
      params: of the anchor.
      groups: the ids.
      stage: whose batch size scoring takes.
    """
    if isinstance(groups, sources.Mixture):
        parts = [
            store_anchor(pipeline, f"{name}_{i}", params, part, stage)
            for i, part in enumerate(groups.parts)
        ]
        return sources.Mixture(parts, groups.weights)
    groups, row_length = pipeline.fit(groups)
    batches = pipeline.batches(groups, row_length, stage)
    score = _compiled(response_scores, pipeline.model)
    with (
        jax.set_mesh(pipeline.mesh),
        pipeline.progress(f"anchor logps, {name}", len(batches)) as count,
    ):

        def logps(number, batch):
            count(number)
            placed = sharding.place_batch(pipeline.mesh, batch)
            return score(params, placed).logp

        return anchor_cache.with_anchor_logps(
            groups,
            folder=pipeline.disk_folder / "anchor_logps" / name,
            batches=batches,
            score=logps,
            key={"model": anchor_cache.params_identity(params)},
        )


@functools.cache
def eval_step(method: Method, model: Model, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step of `train.step.evaluate`; every process gets the sums."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(make_eval_step(method, model), out_shardings=everywhere)


def measure_loss(
    pipeline: Pipeline,
    method: Method,
    params: PyTree,
    groups: Sequence[TokenGroup],
    stage: StageConfig,
) -> dict[str, float]:
    """Mean loss and metrics of a method on some groups, on stored logps or none."""
    groups, row_length = pipeline.fit(groups)
    batches = pipeline.batches(groups, row_length, stage)
    step = eval_step(method, pipeline.model, pipeline.mesh)
    with jax.set_mesh(pipeline.mesh):
        placed = (sharding.place_batch(pipeline.mesh, batch) for batch in batches)
        return evaluate(step, params, (), placed)


def measure_preferences(
    pipeline: Pipeline,
    method: Method,
    models: Mapping[str, PyTree],
    groups: Sequence[TokenGroup],
    stage: StageConfig,
) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy and margin of each model's rewards on each of some groups.

    Returns:
      {model: {"accuracy": f[N], "margin": f[N]}}, in the order of the groups that fit;
      of lists, which have no margin, the accuracy alone.
    """
    groups, row_length = pipeline.fit(groups)
    batches = pipeline.batches(groups, row_length, stage)
    pair_metrics = _compiled(_metrics_of(method), pipeline.model)
    keys = ("accuracy", "margin") if len(groups[0].responses) == 2 else ("accuracy",)
    found = {name: {key: np.zeros(len(groups)) for key in keys} for name in models}
    num_tokens = rows.measure(groups).num_tokens
    with (
        jax.set_mesh(pipeline.mesh),
        pipeline.progress("preferences", len(batches)) as count,
    ):
        for number, batch in enumerate(batches):
            count(number)
            placed = sharding.place_batch(pipeline.mesh, batch)
            members = np.array(batches.indices(number))
            places = rows.slots(num_tokens[members].tolist(), batches.shape)
            for name, params in models.items():
                metrics = pair_metrics(params, placed)
                for key, values in found[name].items():
                    values[members] = np.asarray(metrics[f"rewards/{key}"][0])[places]
    return found


@functools.cache
def _metrics_of(method):
    def metrics(model, params, batch):
        return objective(method, model, params, (), batch)[2]

    return metrics


def _token_means(model, params, batch, *, anchor_params):
    """KL and entropy, f32[B], means over all tokens of a group; and i32[B], which."""
    kl = token_kl(model, params, batch, anchor_params=anchor_params)
    entropy = response_scores(model, params, batch, want=("entropy",)).entropy
    entropy = jnp.where(batch.loss_mask, entropy, 0.0)
    number = jnp.maximum(batch.loss_mask.sum((1, 2)), 1)
    return kl.sum((1, 2)) / number, entropy.sum((1, 2)) / number, batch.record


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model on the evaluation prompts; N prompts, S responses each.

    Attributes:
      texts: N lists of S responses.
      parts: name -> f[N, S], parts of the true reward; empty without a grade.
      length: i[N, S], tokens, the end token included.
      ended: bool[N, S].
      kl: f[N], mean over tokens of the exact KL to the reference, nats.
      entropy: f[N], mean over tokens of that of the next token, nats.
    """

    texts: list[list[str]]
    parts: dict[str, np.ndarray]
    length: np.ndarray
    ended: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray

    def per_prompt(self, part: str) -> np.ndarray:
        """Mean of one part over the responses to each prompt, f[N]."""
        return self.parts[part].mean(axis=1)


def measure_responses(
    pipeline: Pipeline,
    params,
    prompts,
    grade: Grade | None,
    *,
    reference,
    num_samples: int,
    use: int,
    stage: StageConfig,
) -> Measured:
    """Sample, grade, and compare with a reference model token by token."""
    samples = pipeline.sample(params, prompts, num_samples=num_samples, use=use)
    ids = [
        [row[k, :n] for k, n in enumerate(lengths)]
        for row, lengths in zip(samples.tokens, samples.length, strict=True)
    ]
    texts = [[pipeline.encoder.decode(response) for response in row] for row in ids]
    parts = {}
    if grade is not None:
        grades = [
            [grade(prompt, text) for text in row]
            for prompt, row in zip(prompts, texts, strict=True)
        ]
        parts = {
            name: np.array([[g[name] for g in row] for row in grades])
            for name in grades[0][0]
        }
    groups = [
        TokenGroup(
            prompt=pipeline.encode_prompt(prompt),
            responses=tuple(row),
            loss_masks=tuple(np.ones(len(response), bool) for response in row),
            labels=(0.0,) * len(row),
            record=i,
        )
        for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True))
    ]
    kl, entropy = np.zeros((2, len(groups)))
    token_means = _compiled(_token_means, pipeline.model)
    batches = pipeline.batches(groups, sources.longest_group(groups), stage)
    with (
        jax.set_mesh(pipeline.mesh),
        pipeline.progress("exact KL", len(batches)) as count,
    ):
        for number, batch in enumerate(batches):
            count(number)
            placed = sharding.place_batch(pipeline.mesh, batch)
            *means, numbers = map(
                np.asarray, token_means(params, placed, anchor_params=reference)
            )
            there = numbers >= 0
            kl[numbers[there]], entropy[numbers[there]] = (x[there] for x in means)
    return Measured(texts, parts, samples.length, samples.ended, kl, entropy)
