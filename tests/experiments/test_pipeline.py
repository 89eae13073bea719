"""What does not fit a row or the model is left out, counted and said."""

import dataclasses

import numpy as np
import pytest

import tiny_stage
from experiments.worlds.pipeline import Pipeline
from pref_jax.types import TokenGroup


class Encoder:
    """A token a character."""

    def encode_prompt(self, prompt):
        return np.zeros(len(prompt), np.int32)


def pipeline(*, max_positions=None, row_length=None, long_groups="drop"):
    return Pipeline(
        folder=None,
        guard=None,
        mesh=None,
        model=dataclasses.replace(tiny_stage.MODEL, max_positions=max_positions),
        encoder=Encoder(),
        seed=0,
        row_length=row_length,
        long_groups=long_groups,
        max_new_tokens=4,
    )


def group(record, prompt, response):
    masks = (np.ones(response, bool),)
    return TokenGroup(np.arange(prompt), (np.arange(response),), masks, (1.0,), record)


GROUPS = [group(0, 20, 10), group(1, 90, 200)]


def test_rows_are_as_long_as_the_longest_group_that_fits_the_model():
    assert pipeline().fit(GROUPS) == (GROUPS, 320)  # 290 positions, in steps of 32
    short = pipeline(max_positions=100)
    assert short.fit(GROUPS) == (GROUPS[:1], 128)
    assert short.notes == [
        "of 2 groups 1 were dropped and 0 cut (policy drop): rows have 128 positions, "
        "the model 100"
    ]
    short.fit(GROUPS)
    assert len(short.notes) == 1


def test_a_stated_row_length_holds_and_the_policy_cuts():
    cutting = pipeline(row_length=150, long_groups="keep_start")
    fitted, length = cutting.fit(GROUPS)
    assert (length, [g.num_tokens for g in fitted]) == (150, [30, 150])
    assert "0 were dropped and 1 cut (policy keep_start)" in cutting.notes[0]


def test_a_prompt_leaves_room_for_a_whole_response():
    prompts = ["a" * 6, "a" * 7]
    assert pipeline().fit_prompts(prompts) == prompts
    short = pipeline(max_positions=10)
    assert short.fit_prompts(prompts) == prompts[:1]
    assert "of 2 prompts 1 were left out" in short.notes[0]
    with pytest.raises(ValueError, match="none of 1 prompts leaves room for 4 new"):
        short.fit_prompts(prompts[1:])
