"""What does not fit a row or the model is left out, counted and said."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import tiny_stage
from experiments.worlds import pipeline as pipeline_lib
from experiments.worlds.pipeline import Pipeline
from experiments.worlds.sampled import prefers, sample_pairs
from pref_jax.data.records import Message
from pref_jax.sampling import Samples
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.types import TokenGroup


class Encoder:
    """A token a character."""

    end_ids = ()

    def encode_prompt(self, prompt):
        return np.zeros(len(prompt), np.int32)

    def decode(self, ids):
        return "".join("abc"[i] for i in ids)


def pipeline(*, max_positions=None, row_length=None, long_groups="drop"):
    return Pipeline(
        folder=None,
        guard=None,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
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
    with pytest.raises(ValueError, match="of 1 prompts 1 were left out: with 4 new"):
        short.fit_prompts(prompts[1:])


# --- what is sampled and measured -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A model of which the logits of u after t are embedding[t] @ embedding[u]."""

    vocab_size: int = 3
    max_positions: int | None = None
    logit_softcap = None

    def hidden(self, params, tokens, position, end):
        return params[tokens]

    def unembedding(self, params):
        return params


def drawn(tokens, length) -> Samples:
    tokens, length = np.array(tokens), np.array(length)
    return Samples(tokens, length, np.ones(length.shape, bool), None, None)


@dataclasses.dataclass(frozen=True)
class Scripted(Pipeline):
    """A pipeline whose samples are given."""

    samples: Samples | None = None

    def sample(self, params, prompts, *, num_samples, use):
        return self.samples


def scripted(samples=None):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = {"guard": PreemptionGuard(), "mesh": mesh, "model": Bigram()}
    return Scripted(**vars(pipeline()) | parts, samples=samples)


STAGE = types.SimpleNamespace(groups_per_step=2)


def shortest(prompt, response):
    return {"reward": -len(response)}


def make_pairs(path, *samples, num_samples=4, **options):
    run = scripted(drawn(*samples))
    options |= {"num_samples": num_samples, "use": 0, "path": path}
    return sample_pairs(run, None, ["x"], shortest, **options)


def test_the_higher_grade_of_two_samples_is_chosen_and_a_tie_is_no_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    tokens = [[[2, 2, 0], [1, 0, 0], [1, 1, 0], [2, 2, 0]]]
    (pair,) = make_pairs(path, tokens, [[2, 1, 2, 2]])
    assert [response.tolist() for response in pair.responses] == [[1], [2, 2]]
    assert (pair.prompt.tolist(), pair.labels) == ([0], (1.0, 0.0))
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["chosen"], line["rejected"]) == ("b", "cc")
    assert line["rewards"] == [-1, -2]
    with pytest.raises(ValueError, match="all grades are equal"):
        make_pairs(tmp_path / "ties.jsonl", tokens, [[1, 1, 2, 2]])


def test_a_judge_with_a_temperature_is_a_coin_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    taken = np.mean([prefers(0.3, 0.1, 0.2, rng) for _ in range(20_000)])
    assert taken == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.01)
    taken = np.mean([prefers(0.1, 0.3, 0.2, rng) for _ in range(20_000)])
    assert taken == pytest.approx(1 / (1 + np.exp(1.0)), abs=0.01)
    assert prefers(0.3, 0.1, 0.0, None) and not prefers(0.1, 0.3, 0.0, None)


def test_sampled_pairs_may_be_judged_with_noise(tmp_path):
    tokens, length = [[[2, 0], [1, 1]] * 500], [[1, 2] * 500]
    options = {"num_samples": 1000, "temperature": 0.5}
    pairs = make_pairs(tmp_path / "pairs.jsonl", tokens, length, **options)
    right = np.mean([len(pair.responses[0]) == 1 for pair in pairs])
    assert len(pairs) == 500
    assert right == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.04)
    lines = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert all(
        line["rewards"] == [-len(line["chosen"]), -len(line["rejected"])]
        for line in lines
    )


def test_another_use_and_another_seed_draw_with_another_key(monkeypatch):
    def key_data(sampler, params, prompts, *, key, **kwargs):
        return tuple(jax.random.key_data(key).tolist())

    monkeypatch.setattr(pipeline_lib, "sample_responses", key_data)
    keys = [
        dataclasses.replace(pipeline(), seed=seed).sample(
            None, ["x"], num_samples=1, use=use
        )
        for seed, use in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_the_kl_of_a_prompt_is_the_mean_over_its_tokens():
    """Logits of 1, 4 and 4 at every position against equal ones, whatever is read."""
    run = scripted(drawn([[[0, 0, 0], [0, 0, 0]], [[0, 0, 0]] * 2], [[1, 3], [1, 1]]))
    measured = pipeline_lib.measure_responses(
        run,
        jnp.array([[1.0], [4.0], [4.0]]),
        ["x", "xx"],
        None,
        reference=jnp.ones((3, 1)),
        num_samples=2,
        use=0,
        stage=STAGE,
    )
    expected = oracles.kl_divergence([1, 4, 4], [1, 1, 1])
    np.testing.assert_allclose(measured.kl, [expected] * 2, rtol=1e-5)
    p = np.exp([1.0, 4.0, 4.0]) / np.exp([1.0, 4.0, 4.0]).sum()
    np.testing.assert_allclose(
        measured.entropy, [-(p * np.log(p)).sum()] * 2, rtol=1e-5
    )
    assert measured.texts == [["a", "aaa"], ["a", "a"]]


def with_logps(record, *logps):
    """A pair of one token each, 1 and 2 after 0, with stored logps of an anchor."""
    pair = (np.array([1]), np.array([2]))
    masks = (np.ones(1, bool), np.ones(1, bool))
    group = TokenGroup(np.array([0]), pair, masks, (1.0, 0.0), record)
    extras = {"anchor_logps": tuple(np.array([x]) for x in logps)}
    return dataclasses.replace(group, extras=extras)


def test_preferences_are_measured_on_every_pair_and_on_no_empty_slot():
    """Equal logits: a margin is -0.5 (beta) times that of the stored logps."""
    groups = [with_logps(i, *logps) for i, logps in enumerate([(-1, -3), (-3, -1)] * 2)]
    found = pipeline_lib.measure_preferences(
        scripted(), tiny_stage.DPO, {"one": jnp.ones((3, 1))}, groups[:3], STAGE
    )["one"]
    np.testing.assert_allclose(found["margin"], [-1.0, 1.0, -1.0], atol=1e-6)
    np.testing.assert_array_equal(found["accuracy"], [0.0, 1.0, 0.0])


def test_anchor_logps_are_stored_whatever_the_records_are(tmp_path):
    """Both groups were row 7 of their files."""
    params = jnp.array([[1.0], [2.0], [4.0]])
    one, other = group(7, 2, 2), group(7, 2, 3)
    line = dataclasses.replace(scripted(), folder=tmp_path)
    stored = pipeline_lib.store_anchor(line, "pairs", params, [one, other], STAGE)
    # Response 0, 1, 2 after prompt 0, 1; the logits after 0 are 1, 2, 4.
    after = [oracles.log_softmax(x * np.array([1.0, 2.0, 4.0])) for x in (2.0, 1.0)]
    expected = [after[0][0], after[1][1], after[0][2]]
    for result, length in zip(stored, (2, 3), strict=True):
        np.testing.assert_allclose(
            result.extras["anchor_logps"][0], expected[:length], rtol=1e-5
        )


def test_the_tools_of_a_chat_reach_the_encoder():
    asked = []

    class Telling(Encoder):
        def encode_prompt(self, prompt, *, tools=()):
            asked.append((prompt, tools))
            return np.zeros(3, np.int32)

    line = dataclasses.replace(pipeline(), encoder=Telling())
    chat = (Message("user", "the weather?"),)
    line.encode_prompt(pipeline_lib.ToolPrompt(chat, ('{"name": "weather"}',)))
    line.encode_prompt("plain")
    assert asked == [(chat, ('{"name": "weather"}',)), ("plain", ())]
    assert pipeline_lib.prompt_text(pipeline_lib.ToolPrompt(chat, ("{}",))) == (
        "user: the weather?"
    )


def test_preferences_come_in_the_order_of_the_pairs_whatever_rows_they_stand_in():
    """A later short pair is packed into the row of an earlier one."""
    logps = [(-1, -3), (-2, -1), (-6, -1), (-1, -2)]
    groups = [with_logps(i, *pair) for i, pair in enumerate(logps)]
    longer = [dataclasses.replace(g, prompt=np.arange(90) % 3) for g in groups[:2]]
    mixed = [longer[0], longer[1], *groups[2:]]
    found = pipeline_lib.measure_preferences(
        scripted(),
        tiny_stage.DPO,
        {"one": jnp.ones((3, 1))},
        mixed,
        types.SimpleNamespace(groups_per_step=4),
    )["one"]
    expected = [-0.5 * (chosen - rejected) for chosen, rejected in logps]
    np.testing.assert_allclose(found["margin"], expected, atol=1e-6)


def test_a_number_of_traced_steps_without_a_first_one_is_an_error():
    nothing = {"profile": None, "wandb": None, "compile_cache": None}
    assert pipeline_lib.make_watch(**nothing, num=3).profile is None
    with pytest.raises(ValueError, match="`profile_steps` belongs to `profile`"):
        pipeline_lib.make_watch(**nothing, num=4)
    watch = pipeline_lib.make_watch(**nothing | {"profile": 5}, num=4)
    assert (watch.profile.first, watch.profile.num) == (5, 4)
