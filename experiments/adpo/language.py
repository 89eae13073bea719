"""ADPO and pairwise losses on language-model preferences whose labels lie.

On the embedded world a base and an SFT model are trained once; the SFT model answers
prompts K times, and the true reward of each answer is known. Then the labels of some
lists are negated: best becomes worst, and all pairs of such a list are wrong. Every
method sees the same lists, with the same labels, in the same order, K answers of each;
methods on pairs take all K (K - 1) / 2 of a list. What a trained model is worth is the
true reward of its answers to prompts that no stage has seen.

Each method chooses among four settings for each share of wrong labels, by the true
reward on validation prompts and one seed that is not reported; a seed draws the wrong
labels and the order. The share of wrong labels is told to those that ask for it (cDPO,
robust DPO), which nobody would know in practice.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.adpo.arms import Setting
from experiments.worlds import instructions, methods, tasks
from experiments.worlds.jobs import Job
from experiments.worlds.models import DecoderSizes, make_model
from experiments.worlds.pipeline import (
    Pipeline,
    measure_responses,
    store_anchor,
)
from experiments.worlds.sampled import sample_lists
from experiments.worlds.short_runs import ShortRuns, adamw, method_loss
from pref_jax import anchors
from pref_jax.losses.pairwise import ipo_loss, logistic_loss, robust_loss
from pref_jax.method import Method
from pref_jax.rewards import sequence_reward
from pref_jax.train import sharding
from pref_jax.train.stage import StageConfig
from pref_jax.types import PyTree, TokenGroup

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The language-model part; all numbers are ours."""

    base: StageConfig  # language modelling on the world's text
    sft: StageConfig  # on demonstrations
    world: instructions.World = instructions.World()
    decoder: DecoderSizes = DecoderSizes()
    num_documents: int = 36_000
    num_demonstrations: int = 20_000
    num_list_prompts: int = 1_200
    list_size: int = 4  # K
    flip_rates: tuple[float, ...] = (0.0, 0.2, 0.4)  # share of lists that are negated
    lists_per_step: int = 16
    num_steps: int = 100
    num_seeds: int = 5
    num_eval_prompts: int = 300  # and as many for validation
    eval_samples: int = 4
    max_new_tokens: int = 32
    seed: int = 0  # of the world's draws and of the base model

    def __post_init__(self):
        for rate in self.flip_rates:
            if not 0 <= rate < 0.5:
                raise ValueError(
                    f"`flip_rates` must lie in [0, 0.5); got {rate}. From one half on "
                    f"the labels say nothing, or the opposite."
                )


# --- methods --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageArm:
    """A method without its numbers.

    Attributes:
      name: in tables.
      make: (setting, share of wrong labels) -> Method.
      settings: to choose among.
    """

    name: str
    make: Callable[[Setting, float], Method]
    settings: tuple[Setting, ...]


def ordered_pairs(values, labels):
    """All pairs of each list, the higher label first.

    Args:
      values: f32[B, K].
      labels: f32[B, K].

    Returns:
      f32[B, M, 2], and bool[B, M], False where two labels are equal; M = K (K - 1) / 2.
    """
    first, second = jnp.triu_indices(labels.shape[-1], k=1)
    swap = labels[:, first] < labels[:, second]
    better = jnp.where(swap, values[:, second], values[:, first])
    worse = jnp.where(swap, values[:, first], values[:, second])
    unequal = labels[:, first] != labels[:, second]
    return jnp.stack([better, worse], axis=-1), unequal


def _on_pairs(beta, loss_fn) -> Method:
    """The mean of a loss over the pairs of unequal labels of each list."""

    def reward(scores, anchor_scores, batch):
        return sequence_reward(scores, anchor_scores, batch, beta=beta)

    def loss(rewards, scores, batch):
        del scores
        pairs, unequal = ordered_pairs(rewards, batch.labels)
        values, metrics = loss_fn(pairs, where=unequal)
        accuracy = metrics["rewards/accuracy"]
        weights = unequal.astype(jnp.float32)
        number = jnp.maximum(weights.sum(-1), 1)
        whole = batch.valid.all(-1).astype(jnp.float32)
        mean = (accuracy * weights).sum(-1) / number
        return values.sum(-1) / number, {"rewards/accuracy": (mean, whole)}

    return Method(
        name="",
        anchor=anchors.fixed(),
        reward=reward,
        loss=loss,
        requires=frozenset({"anchor_logps"}),
    )


def _dpo(setting, flip_rate):
    del flip_rate
    return _on_pairs(1 / setting.tau, logistic_loss)


def _cdpo(setting, flip_rate):
    smoothed = functools.partial(logistic_loss, label_smoothing=flip_rate)
    return _on_pairs(1 / setting.tau, smoothed)


def _robust(setting, flip_rate):
    return _on_pairs(
        1 / setting.tau, functools.partial(robust_loss, flip_rate=flip_rate)
    )


def _ipo(setting, flip_rate):
    del flip_rate
    return _on_pairs(1.0, functools.partial(ipo_loss, beta=1 / setting.tau))


def _adpo(setting, flip_rate):
    del flip_rate
    return methods.make_adpo(1 / setting.tau, setting.temperature)


_PAIR_SETTINGS = tuple(
    Setting(tau=tau, learning_rate=rate) for tau in (10.0, 3.0) for rate in (1e-4, 2e-4)
)
_LIST_SETTINGS = tuple(
    Setting(tau=tau, temperature=temperature, learning_rate=2e-4)
    for tau in (3.0, 1.0)
    for temperature in (0.1, 0.3)
)
ADPO = "ADPO list"
ARMS = (
    LanguageArm(ADPO, _adpo, _LIST_SETTINGS),
    LanguageArm("DPO", _dpo, _PAIR_SETTINGS),
    LanguageArm("cDPO", _cdpo, _PAIR_SETTINGS),
    LanguageArm("robust DPO", _robust, _PAIR_SETTINGS),
    LanguageArm("IPO", _ipo, _PAIR_SETTINGS),
)
"""What is compared."""


# --- training and evaluation ----------------------------------------------------------

_LIST_USE, _VALIDATION_USE, _TEST_USE = 1, 2, 3  # draws that must differ
_TUNING_SEED = 10_000


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all runs share.

    Attributes:
      pipeline: of the run.
      grade: the true reward.
      reference: parameters of the SFT model.
      groups: lists of K responses with their true rewards and anchor logps.
      validation: prompts that settings are chosen on.
      test: prompts that are reported.
    """

    pipeline: Pipeline
    grade: tasks.Grade
    reference: PyTree
    groups: Sequence[TokenGroup]
    validation: list
    test: list


def prepare(config: LanguageConfig, folder, guard) -> Prepared:
    """Base and SFT model, lists and their anchor; continues what the folder holds."""
    task = tasks.world_task(
        config.world,
        seed=config.seed,
        num_documents=config.num_documents,
        num_demonstrations=config.num_demonstrations,
        num_pair_prompts=config.num_list_prompts,
        num_eval_prompts=config.num_eval_prompts,
    )
    mesh = sharding.make_mesh()
    model, params = make_model(
        config.decoder, mesh, vocab_size=task.vocab_size, seed=config.seed
    )
    pipeline = Pipeline(
        folder=folder,
        guard=guard,
        mesh=mesh,
        model=model,
        encoder=task.encoder,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    sft = methods.make_sft()
    params, _ = pipeline.train(
        "base", sft, params, *task.documents, config.base, unit="documents"
    )
    reference, _ = pipeline.train(
        "SFT", sft, params, *task.demonstrations, config.sft, unit="demonstrations"
    )
    groups = sample_lists(
        pipeline,
        reference,
        task.pair_prompts[0],
        task.grade,
        num_samples=config.list_size,
        use=_LIST_USE,
        path=folder / "lists.jsonl",
    )
    return Prepared(
        pipeline=pipeline,
        grade=task.grade,
        reference=reference,
        groups=store_anchor(pipeline, "lists", reference, groups, config.sft),
        validation=task.pair_prompts[1],
        test=task.eval_prompts,
    )


def wrong_labels(num_lists: int, flip_rate: float, seed: int) -> np.ndarray:
    """Which lists are negated: bool[num_lists]; more of them at a higher rate."""
    return np.random.default_rng([seed, 0]).random(num_lists) < flip_rate


class Trainer:
    """Runs of one arm; compiled once.

    Args:
      prepared: what all runs share.
      config: sizes.
      arm: the method.
    """

    def __init__(self, prepared: Prepared, config: LanguageConfig, arm: LanguageArm):
        self._prepared, self._config = prepared, config
        pipeline = prepared.pipeline
        groups, row_length = pipeline.fit(prepared.groups)
        stage = dataclasses.replace(config.sft, groups_per_step=config.lists_per_step)
        whole = len(groups) // config.lists_per_step * config.lists_per_step
        if not whole:
            raise ValueError(
                f"`lists_per_step` is {config.lists_per_step}, and only {len(groups)} "
                f"lists have grades that differ; sample for more prompts."
            )
        if whole < len(groups):
            _logger.info(
                "%d of %d lists fill no batch and are not trained on",
                *(len(groups) - whole, len(groups)),
            )
        self._batches = pipeline.batches(groups[:whole], row_length, stage)
        self._num_records = 1 + max(group.record for group in groups)

        def loss(params, anchor, batch, numbers):
            method = arm.make(*numbers)
            return method_loss(method, pipeline.model, params, anchor, batch)

        def optimizer(numbers, anchor):
            del anchor
            return adamw(numbers[0].learning_rate)

        self._runs = ShortRuns(pipeline.mesh, loss, optimizer)

    def train(self, setting: Setting, flip_rate: float, seed: int) -> PyTree:
        """Parameters after all updates on lists of which this share is negated."""
        config = self._config
        wrong = wrong_labels(self._num_records, flip_rate, seed)
        rng = np.random.default_rng([seed, 1])
        order = np.concatenate(
            [
                rng.permutation(len(self._batches))
                for _ in range(-(-config.num_steps // len(self._batches)))
            ]
        )[: config.num_steps]

        def judged(number):
            batch = self._batches[int(number)]
            sign = np.where(wrong[batch.record], -1.0, 1.0).astype(np.float32)
            return dataclasses.replace(batch, labels=batch.labels * sign[:, None])

        return self._runs.train(
            self._prepared.reference, map(judged, order), (setting, flip_rate)
        )


def _measure(prepared: Prepared, config: LanguageConfig, params, prompts, use) -> dict:
    """Means over prompts: true reward, its part `right`, exact KL, length."""
    found = measure_responses(
        prepared.pipeline,
        params,
        prompts,
        prepared.grade,
        reference=prepared.reference,
        num_samples=config.eval_samples,
        use=use,
        stage=config.sft,
    )
    return {
        "reward": found.per_prompt("reward").mean(),
        "right": found.per_prompt("right").mean(),
        "kl": found.kl.mean(),
        "length": found.length.mean(),
    }


def _compare(
    prepared: Prepared,
    config: LanguageConfig,
    trainer: Trainer,
    settings: Sequence[Setting],
    flip_rate: float,
) -> dict:
    """Choose a setting, then report it on other seeds."""

    def run(setting, seed, prompts, use):
        params = trainer.train(setting, flip_rate, seed)
        return _measure(prepared, config, params, prompts, use)

    tuning = [
        run(setting, _TUNING_SEED, prepared.validation, _VALIDATION_USE)["reward"]
        for setting in settings
    ]
    setting = settings[int(np.argmax(tuning))]
    found = [
        run(setting, seed, prepared.test, _TEST_USE) for seed in range(config.num_seeds)
    ]
    return {
        "setting": dataclasses.asdict(setting),
        "validation": np.array(tuning),
        **{name: np.array([run[name] for run in found]) for name in found[0]},
    }


def jobs(config: LanguageConfig, folder, guard) -> list[Job]:
    """The SFT model itself, and every method at every share of wrong labels.

    Args:
      config: sizes.
      folder: of the models and lists.
      guard: says when to stop.
    """
    prepared = functools.cache(lambda: prepare(config, folder, guard))
    trainer = functools.cache(lambda arm: Trainer(prepared(), config, arm))

    def reference(results):
        del results
        here = prepared()
        found = _measure(here, config, here.reference, here.test, _TEST_USE)
        labels = np.array([group.labels for group in here.groups])
        return found | {"num_lists": len(labels), "best_of_list": labels.max(1).mean()}

    stages = config.base.loop.num_steps + config.sft.loop.num_steps
    found = [Job("language/SFT", 2, 0.15 * stages, reference)]
    for rate in config.flip_rates:
        for arm in ARMS:
            num_runs = len(arm.settings) + config.num_seeds
            seconds = 10 + num_runs * (0.08 * config.num_steps + 5)
            found.append(
                Job(
                    f"language/{rate}/{arm.name}",
                    num_runs,
                    seconds,
                    lambda results, arm=arm, rate=rate: _compare(
                        prepared(), config, trainer(arm), arm.settings, rate
                    ),
                )
            )
    return found
