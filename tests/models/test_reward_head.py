"""A reward head reads the last response token, and learns what is preferred."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import oracles
from pref_jax import anchors, rewards
from pref_jax.data import rows, sources
from pref_jax.data.readers import read
from pref_jax.data.templates import TextEncoder, load_tokenizer
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.method import Method, on_rewards
from pref_jax.models import decoder, pretrained, reward_head
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.loop import LoopConfig
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig, train_stage
from pref_jax.train.step import evaluate, make_eval_step

REWARD_MODEL = Method(
    "reward model",
    anchors.none(),
    reward=rewards.explicit_reward,
    loss=on_rewards(logistic_loss),
    score=reward_head.reward_score,
)


@functools.cache
def model_and_params():
    """The decoder of the fixtures with a head: its functions, parameters and config."""
    config, params = reward_head.add(
        fixtures.CONFIG, fixtures.random_params(0), jax.random.key(0)
    )
    return decoder.make_decoder(config), params, config


def score(batch, params=None):
    model, own, _ = model_and_params()
    return compiled(model)(own if params is None else params, batch)


@functools.cache
def compiled(model):
    return jax.jit(lambda p, batch: reward_head.reward_score(model, p, batch).value)


def test_values_are_the_head_on_the_state_of_the_last_response_token():
    """By the oracle, each response alone behind its own copy of the prompt."""
    groups = fixtures.random_groups(3, 4, 2)
    batch = fixtures.pack_all(groups, 40, spare_groups=1)
    values = np.asarray(score(batch))
    weights = fixtures.oracle_weights(fixtures.random_params(0))
    head = np.asarray(model_and_params()[1]["reward_head"], np.float64)
    slots = {int(r): b for b, r in enumerate(batch.record) if r >= 0}
    for group in groups:
        for k, response in enumerate(group.responses):
            text = [*group.prompt, *response]
            hidden = oracles.decoder_hidden(weights, text, **fixtures.ORACLE)
            expected = hidden[-1] @ head
            assert values[slots[group.record], k] == pytest.approx(expected, abs=2e-4)
    assert not values[batch.record < 0].any()


def test_a_group_that_fills_its_row_is_read_at_its_end():
    groups = fixtures.random_groups(3, 1, 2)
    rows_of = (groups[0].num_tokens, groups[0].num_tokens + 9)
    full, roomy = (score(fixtures.pack_all(groups, n)) for n in rows_of)
    np.testing.assert_allclose(full[:1], roomy[:1], rtol=1e-5, atol=1e-5)


def test_a_value_depends_on_its_own_response_alone():
    groups = fixtures.random_groups(3, 4, 2)
    other = dataclasses.replace(groups[0], responses=(groups[0].responses[0],) * 2)
    other = dataclasses.replace(other, loss_masks=(groups[0].loss_masks[0],) * 2)
    batch, changed = (fixtures.pack_all(g, 40) for g in (groups, [other, *groups[1:]]))
    values = [np.asarray(score(b))[b.record == 0] for b in (batch, changed)]
    np.testing.assert_allclose(values[0][:, 0], values[1][:, 0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(values[0][:, 1], values[1][:, 1])


def test_a_reward_model_starts_without_an_unembedding_and_near_zero():
    _, params, config = model_and_params()
    assert "unembedding" not in params and config.tied
    assert params["embedding"] is fixtures.random_params(0)["embedding"]
    wide = dataclasses.replace(fixtures.CONFIG, width=4096)
    head = reward_head.add(wide, {}, jax.random.key(1))[1]["reward_head"]
    assert head.shape == (4096,)
    assert np.asarray(head).var() * 4097 == pytest.approx(1.0, rel=0.1)


def test_a_second_head_and_none_are_errors():
    model, params, config = model_and_params()
    with pytest.raises(ValueError, match="have a `reward_head` already; train that"):
        reward_head.add(config, params, jax.random.key(0))
    batch = fixtures.pack_all(fixtures.random_groups(3, 1, 2), 40)
    with pytest.raises(ValueError, match="needs a `reward_head` among the parameters"):
        reward_head.reward_score(model, fixtures.random_params(0), batch)


def test_the_head_has_a_logical_axis_and_a_gradient():
    model, params, _ = model_and_params()
    assert model.param_axes(params)["reward_head"] == ("embed",)
    batch = fixtures.pack_all(fixtures.random_groups(3, 2, 2), 40)
    grad = jax.jit(jax.grad(lambda p: score(batch, p).sum()))(params)
    assert jnp.abs(grad["reward_head"]).min() > 0


def test_a_bfloat16_reward_model_has_float32_values():
    model, params, config = model_and_params()
    other = decoder.make_decoder(dataclasses.replace(config, dtype="bfloat16"))
    batch = fixtures.pack_all(fixtures.random_groups(3, 4, 2), 40)
    got = compiled(other)(params, batch)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, compiled(model)(params, batch), atol=0.3)


# --- Bradley-Terry --------------------------------------------------------------------


def train_reward_model(folder, config, params, groups, heldout, *, num_steps, rate):
    """Bradley-Terry: what was trained, and held-out accuracy before and after."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shape = {
        "groups_per_step": 8,
        "row_length": sources.longest_group([*groups, *heldout]),
        "rows_multiple": 1,
    }
    model = decoder.make_decoder(config)
    batches = sources.training_batches(groups, num_steps=num_steps, seed=0, **shape)
    validation = sources.evaluation_batches(heldout, **shape)
    step = jax.jit(make_eval_step(REWARD_MODEL, model))
    before = evaluate(step, params, (), validation)["rewards/accuracy"]
    stage = StageConfig(
        groups_per_step=8,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=5),
        loop=LoopConfig(num_steps, validate_every=num_steps, checkpoint_every=50),
    )
    with PreemptionGuard() as guard:
        trained, _ = train_stage(
            "reward model",
            folder=folder,
            config=stage,
            method=REWARD_MODEL,
            model=model,
            params=params,
            anchor=(),
            source=sources.OfflineSource(batches),
            validation=validation,
            count=rows.count_batch,
            mesh=mesh,
            seed=0,
            guard=guard,
        )
    after = evaluate(step, trained, (), validation)["rewards/accuracy"]
    return trained, before, after


@pytest.mark.slow  # sixty steps
def test_bradley_terry_learns_which_token_is_preferred(tmp_path):
    """Chosen responses hold token 5 and rejected ones token 6, in any place."""

    def pair(group):
        def with_token(response, token):
            out = np.where(np.isin(response, (5, 6)), 7, response)
            out[group.record % len(out)] = token
            return out

        responses = tuple(map(with_token, group.responses, (5, 6)))
        return dataclasses.replace(group, responses=responses)

    groups = [pair(g) for g in fixtures.random_groups(0, 120, 2)]
    _, params, config = model_and_params()
    params = jax.tree.map(lambda x: 0.3 * x, params)
    trained, before, after = train_reward_model(
        tmp_path, config, params, groups[:80], groups[80:], num_steps=60, rate=5e-3
    )
    assert before < 0.75 and after > 0.95
    assert jax.tree.structure(trained) == jax.tree.structure(params)


@pytest.mark.slow
def test_bradley_terry_on_real_pairs_runs_from_text_to_a_folder(shared_data, tmp_path):
    """gsm8k_pref by the tiny pretrained model: trained, resumed from, saved, read."""
    folder = shared_data("stories260k")
    encoder = TextEncoder(load_tokenizer(folder))
    config, params = pretrained.load(folder)
    config, params = reward_head.add(config, params, jax.random.key(0))

    def groups(name):
        found = [encoder.encode(r) for r in read(shared_data("gsm8k_pref") / name)]
        return sources.fit_groups(found, 768, policy="drop", max_positions=512)[0]

    training, heldout = groups("train.jsonl.gz")[:400], groups("validation.jsonl.gz")
    trained, before, after = train_reward_model(
        tmp_path / "stage", config, params, training, heldout, num_steps=40, rate=3e-4
    )
    assert np.isfinite([before, after]).all() and len(heldout) > 100
    saved = pretrained.save(tmp_path / "hf", config, trained, like=folder)
    _, again = pretrained.load(saved)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(trained))
    print(f"accuracy on {len(heldout)} held-out pairs: {before:.3f} -> {after:.3f}")
