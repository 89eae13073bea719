"""Preferences from a model's own answers, graded by the true reward: pairs and lists.

What was sampled lies in a file, as text and ids; a run that continues reads it back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
from etils import epath

from experiments.worlds.pipeline import Grade, Pipeline, prompt_text
from pref_jax import processes
from pref_jax.train import storage
from pref_jax.types import PyTree, TokenGroup

_logger = logging.getLogger("pref_jax.experiments")


class _Answer(NamedTuple):
    """One response; answers are ordered by grade."""

    grade: float
    text: str
    ids: list[int]


def prefers(first: float, second: float, temperature: float, rng) -> bool:
    """Whether a judge takes the first of two responses.

        P(first) = sigmoid((first - second) / temperature),   Bradley-Terry

    Args:
      first: its grade.
      second: that of the other, not equal to it.
      temperature: in the unit of the grades; 0: the higher grade is taken.
      rng: draws the judgement; not touched at 0.
    """
    if temperature == 0:
        return first > second
    return rng.random() < scipy.special.expit((first - second) / temperature)


def sample_pairs(
    pipeline: Pipeline,
    params: PyTree,
    prompts: Sequence,
    grade: Grade,
    *,
    num_samples: int,
    use: int,
    path: epath.Path,
    temperature: float = 0.0,
) -> list[TokenGroup]:
    """Sample, grade, and compare the responses to each prompt two by two.

    Samples 0 and 1 make a pair, 2 and 3 the next; the higher grade is chosen, or, at a
    temperature, drawn by `prefers`. Pairs of equal grades are left out. A response that
    was cut off stays as it is, without an end token. The log counts both.

    Args:
      pipeline: the run.
      params: of the model that answers.
      prompts: one response list each.
      grade: the true reward.
      num_samples: responses to each prompt, even.
      use: names the draw.
      path: file of the pairs. Read back if it is there.
      temperature: of the labels, in the unit of the grade.

    Returns:
      Groups of K = 2, numbered as the lines of the file.

    Raises:
      ValueError: no pair is left.
    """
    rng = np.random.default_rng([pipeline.seed, use])

    def lines_of(answers: list[_Answer]) -> list[dict]:
        found = []
        for k in range(0, num_samples, 2):
            rejected, chosen = sorted(answers[k : k + 2])
            if chosen.grade != rejected.grade:
                if not prefers(chosen.grade, rejected.grade, temperature, rng):
                    rejected, chosen = chosen, rejected
                found.append(
                    {
                        "chosen": chosen.text,
                        "rejected": rejected.text,
                        "rewards": [chosen.grade, rejected.grade],
                        "ids": [chosen.ids, rejected.ids],
                    }
                )
        return found

    lines = _sampled(
        *(pipeline, params, prompts, grade),
        num_samples=num_samples,
        use=use,
        path=path,
        lines_of=lines_of,
        unit="pairs",
        most=len(prompts) * num_samples // 2,
    )
    return [_group(line, (1.0, 0.0), number) for number, line in enumerate(lines)]


def sample_lists(
    pipeline: Pipeline,
    params: PyTree,
    prompts: Sequence,
    grade: Grade,
    *,
    num_samples: int,
    use: int,
    path: epath.Path,
) -> list[TokenGroup]:
    """Sample and grade; lists whose grades are all equal are left out.

    Args:
      pipeline: the run.
      params: of the model that answers.
      prompts: one response list each.
      grade: the true reward.
      num_samples: K.
      use: names the draw.
      path: file of the lists. Read back if it is there.

    Returns:
      Groups of K responses whose labels are their grades, numbered as the lines.

    Raises:
      ValueError: no list is left.
    """

    def lines_of(answers: list[_Answer]) -> list[dict]:
        grades = [answer.grade for answer in answers]
        if len(set(grades)) == 1:
            return []
        return [
            {
                "responses": [answer.text for answer in answers],
                "labels": grades,
                "ids": [answer.ids for answer in answers],
            }
        ]

    lines = _sampled(
        *(pipeline, params, prompts, grade),
        num_samples=num_samples,
        use=use,
        path=path,
        lines_of=lines_of,
        unit="lists",
        most=len(prompts),
    )
    return [_group(line, line["labels"], number) for number, line in enumerate(lines)]


def _sampled(
    pipeline,
    params,
    prompts,
    grade,
    *,
    num_samples: int,
    use: int,
    path: epath.Path,
    lines_of: Callable[[list[_Answer]], list[dict]],
    unit: str,
    most: int,
) -> list[dict]:
    """The lines of a file of preferences, which is made if it is not there."""
    if not processes.agree(path.exists()):
        samples = pipeline.sample(params, prompts, num_samples=num_samples, use=use)
        lines = []
        for prompt, tokens, lengths in zip(
            prompts, samples.tokens, samples.length, strict=True
        ):
            answers = []
            for row, length in zip(tokens, lengths, strict=True):
                ids = row[:length]
                text = pipeline.encoder.decode(ids)
                reward = grade(prompt, text)["reward"]
                answers.append(_Answer(reward, text, ids.tolist()))
            asked = {
                "prompt": prompt_text(prompt),
                "prompt_ids": pipeline.encode_prompt(prompt).tolist(),
            }
            lines += [asked | line for line in lines_of(answers)]
        if not lines:
            raise ValueError(
                f"no {unit} could be made of {len(prompts)} prompts: all grades are "
                f"equal. Sample for more prompts, or look at the grade."
            )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        processes.on_first(lambda: storage.write_text(path, text))
        _logger.info(
            "%s: %d %s of %d prompts, %d of equal grades left out; %d responses were "
            "cut off",
            *(path.name, len(lines), unit, len(prompts), most - len(lines)),
            int((~samples.ended).sum()),
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def _group(line: dict, labels: Sequence[float], number: int) -> TokenGroup:
    responses = tuple(np.asarray(ids, np.int32) for ids in line["ids"])
    return TokenGroup(
        prompt=np.asarray(line["prompt_ids"], np.int32),
        responses=responses,
        loss_masks=tuple(np.ones(len(ids), bool) for ids in responses),
        labels=tuple(labels),
        record=number,
    )
