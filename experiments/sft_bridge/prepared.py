"""What all arms of a seed share: a base, demonstrations, judged pairs, prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.sft_bridge.arms import StagesConfig
from experiments.worlds import instructions, methods
from experiments.worlds.models import make_model
from experiments.worlds.pipeline import Grade, Pipeline, store_anchor
from experiments.worlds.sampled import prefers
from experiments.worlds.tasks import world_task
from pref_jax.data import records, sources
from pref_jax.train import sharding
from pref_jax.types import PyTree, TokenGroup


def judged_pairs(world, prompts, num: int, temperature: float, seed: int) -> list[dict]:
    """Two responses of the crowd to each prompt, as a noisy judge orders them.

    Pairs of equal rewards are left out.

    Args:
      world: its annotators write, its reward judges.
      prompts: of the language, more than `num`.
      num: pairs.
      temperature: of the judge.
      seed: of responses and judgements.

    Raises:
      ValueError: too few pairs are left.
    """
    rng = np.random.default_rng([seed, 11])
    sides = [instructions.annotate(world, prompts, seed=2 * seed + k) for k in (0, 1)]
    found = []
    for prompt, *pair in zip(prompts, *sides, strict=True):
        first, second = (
            instructions.grade(prompt, r, world=world).reward for r in pair
        )
        if first != second:
            if not prefers(first, second, temperature, rng):
                pair.reverse()
            found.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    if len(found) < num:
        raise ValueError(
            f"{len(prompts)} prompts gave {len(found)} pairs of unequal rewards, and "
            f"{num} are asked for; give fewer pairs, or annotators who differ more."
        )
    return found[:num]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all arms of a seed share.

    Attributes:
      pipeline: of the seed, with its order and its draws.
      grade: the true reward.
      base: parameters before SFT.
      demonstrations: of the expert, with the base's logps.
      heldout_demonstrations: likewise.
      pairs: of the crowd, judged.
      heldout_pairs: likewise, with the base's logps.
      pair_prompts: whose responses are compared.
      validation: prompts that settings are chosen on.
      test: prompts that are reported.
      expert_rewards: f[test], of one response of the expert to each.
    """

    pipeline: Pipeline
    grade: Grade
    base: PyTree
    demonstrations: Sequence[TokenGroup]
    heldout_demonstrations: Sequence[TokenGroup]
    pairs: Sequence[TokenGroup]
    heldout_pairs: Sequence[TokenGroup]
    pair_prompts: list[str]
    validation: list[str]
    test: list[str]
    expert_rewards: np.ndarray


def prepare(config: StagesConfig, folder, guard, seed: int) -> Prepared:
    """Data and base model of a seed; goes on with what the folder holds."""
    world, mesh = config.world, sharding.make_mesh()
    num_pairs = config.num_pairs + config.num_heldout
    task = world_task(
        world,
        seed=seed,
        num_documents=config.num_documents,
        num_demonstrations=config.num_crowd,
        num_pair_prompts=2 * num_pairs,
        num_eval_prompts=config.num_eval_prompts,
    )
    rows = judged_pairs(
        world, task.pair_prompts[0], num_pairs, config.label_temperature, seed
    )
    encoder = task.encoder
    model, params = make_model(
        config.decoder, mesh, vocab_size=task.vocab_size, seed=seed
    )
    pipeline = Pipeline(
        folder=folder / f"seed{seed}",
        guard=guard,
        mesh=mesh,
        model=model,
        encoder=encoder,
        seed=seed,
        max_new_tokens=config.max_new_tokens,
    )

    def encode(rows):
        return encoder.encode_all(records.from_objects(rows))

    text = [
        sources.Mixture(parts, [1 - config.crowd_share, config.crowd_share])
        for parts in zip(task.documents, task.demonstrations, strict=True)
    ]
    base, _ = pipeline.train(
        "base", methods.make_sft(), params, *text, config.base, unit="documents"
    )
    shown = config.num_demonstrations
    written = encode(
        # Of another stream than the crowd's, whose instructions would be the same.
        instructions.demonstrations(
            config.expert, shown + config.num_heldout, seed=seed + 1
        )
    )
    judged = encode(rows)

    def with_base(name, groups):
        return store_anchor(pipeline, name, base, groups, config.base)

    answers = instructions.annotate(config.expert, task.eval_prompts, seed=seed)
    graded = zip(task.eval_prompts, answers, strict=True)
    return Prepared(
        pipeline=pipeline,
        grade=task.grade,
        base=base,
        demonstrations=with_base("demonstrations", written[:shown]),
        heldout_demonstrations=with_base("held_out", written[shown:]),
        pairs=judged[: config.num_pairs],
        heldout_pairs=with_base("held_out_pairs", judged[config.num_pairs :]),
        pair_prompts=[row["prompt"] for row in rows[: config.num_pairs]],
        validation=instructions.prompts(
            world, "validation", config.num_tuning_prompts, seed
        ),
        test=task.eval_prompts,
        expert_rewards=np.array([task.grade(*pair)["reward"] for pair in graded]),
    )
