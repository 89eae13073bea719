"""A method from batch to loss: step 0, gradients, weights, what is required."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import oracles
from pref_jax import anchors, rewards
from pref_jax.data import anchor_cache, sources
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import nll_loss
from pref_jax.method import (
    Method,
    example_weight,
    objective,
    on_rewards,
    on_token_logps,
    token_weight,
)
from pref_jax.train import sharding
from pref_jax.train.step import weighted_mean
from pref_jax.types import Scores

BETA = 0.3
DPO = Method(
    name="dpo",
    anchor=anchors.fixed(),
    reward=functools.partial(rewards.sequence_reward, beta=BETA),
    loss=on_rewards(logistic_loss),
)
SFT = Method(
    name="sft",
    anchor=anchors.none(),
    reward=rewards.log_likelihood,
    loss=on_token_logps(nll_loss),
    weight=token_weight,
    couples_responses=False,
)


@functools.cache
def groups():
    return fixtures.random_groups(2, 9, 2)


@functools.cache
def batch():
    """Nine pairs, in rows that eight devices can share, with empty slots."""
    return fixtures.pack_all(groups(), 40, rows_multiple=8, spare_groups=1)


@functools.cache
def compiled(method):
    """(params, anchor params, batch) -> ((mean loss, metrics), gradients of both)."""

    def mean(params, anchor_params, batch):
        arguments = (method, fixtures.decoder(), params, anchor_params, batch)
        loss, weight, metrics = objective(*arguments)
        metrics = {name: weighted_mean(*pair) for name, pair in metrics.items()}
        return weighted_mean(loss, weight), metrics

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))


def oracle_logps(params):
    """f64[9][2]: summed logps of chosen and rejected over the trained targets."""
    weights = fixtures.oracle_weights(params)
    return [
        [
            sum(
                stats["logp"]
                for stats, keep in zip(
                    oracles.response_stats(
                        weights, group.prompt, response, **fixtures.ORACLE
                    ),
                    mask,
                    strict=True,
                )
                if keep
            )
            for response, mask in zip(group.responses, group.loss_masks, strict=True)
        ]
        for group in groups()
    ]


def test_dpo_of_a_batch_is_the_oracles_from_ids_to_loss():
    """Empty slots of the batch have no weight: the mean is over nine pairs."""
    assert (~batch().valid.all(-1)).any()
    params, anchor = fixtures.random_params(0), fixtures.random_params(1)
    (loss, metrics), _ = compiled(DPO)(params, anchor, batch())
    policy, reference = oracle_logps(params), oracle_logps(anchor)
    losses = oracles.dpo_loss(policy, reference, beta=BETA)
    assert float(loss) == pytest.approx(sum(losses) / 9, rel=1e-4)
    ratios = BETA * (np.array(policy) - np.array(reference))
    margins = ratios[:, 0] - ratios[:, 1]
    lengths = [[m.sum() for m in group.loss_masks] for group in groups()]
    expected = {
        "rewards/chosen": ratios[:, 0].mean(),
        "rewards/rejected": ratios[:, 1].mean(),
        "rewards/margin": margins.mean(),
        "rewards/accuracy": (margins > 0).mean(),
        "logps/chosen": np.mean(policy, axis=0)[0],
        "logps/rejected": np.mean(policy, axis=0)[1],
        "lengths/chosen": np.mean(lengths, axis=0)[0],
        "lengths/rejected": np.mean(lengths, axis=0)[1],
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_sft_of_a_batch_is_the_token_mean_of_the_oracle():
    params = fixtures.random_params(0)
    arguments = (SFT, fixtures.decoder())
    loss, weight, metrics = jax.jit(functools.partial(objective, *arguments))(
        params, (), batch()
    )
    loss = weighted_mean(loss, weight)
    total = sum(map(sum, oracle_logps(params)))
    tokens = sum(mask.sum() for group in groups() for mask in group.loss_masks)
    assert float(loss) == pytest.approx(-total / tokens, rel=1e-5)
    assert metrics == {}


# --- step 0 and the first step --------------------------------------------------------


def test_step_0_with_a_live_anchor_has_a_loss_of_log_2():
    params = fixtures.random_params(0)
    (loss, metrics), _ = compiled(DPO)(params, params, batch())
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    assert abs(float(metrics["rewards/margin"])) < 1e-6


def test_step_0_on_a_mesh_has_a_loss_of_log_2():
    """Rows, widths and heads are split here, and so is a vocabulary of 38 tokens."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(fixtures.CONFIG, vocab_size=38)
    model = fixtures.make_decoder(config)
    params = fixtures.random_params(0, config)
    places = sharding.param_shardings(mesh, model.param_axes(params), params)

    @jax.jit
    def mean(params, batch):
        loss, weight, _ = objective(DPO, model, params, params, batch)
        return weighted_mean(loss, weight), loss

    alone, expected = mean(params, batch())
    with jax.set_mesh(mesh):
        placed = sharding.place_batch(mesh, batch())
        loss, losses = mean(jax.device_put(params, places), placed)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    np.testing.assert_allclose(jax.device_get(losses), expected, atol=1e-6)


def test_step_0_from_stored_logps_has_a_loss_of_log_2(tmp_path):
    """The logps were made from rows of another length and batch size."""
    params = fixtures.random_params(0)
    stored = anchor_cache.with_anchor_logps(
        groups(),
        folder=tmp_path,
        batches=sources.evaluation_batches(groups(), groups_per_step=4, row_length=52),
        score=lambda number, batch: fixtures.scorer()(params, batch).logp,
        key={},
    )
    cached = fixtures.pack_all(stored, 40, rows_multiple=8, spare_groups=1)
    (loss, metrics), (of_policy, _) = compiled(DPO)(params, (), cached)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(metrics["rewards/margin"])) < 1e-5
    # And the gradient is that of a live anchor.
    _, (expected, _) = compiled(DPO)(params, params, batch())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max())
        ),
        of_policy,
        expected,
    )


def test_gradients_reach_the_policy_and_never_the_anchor():
    params = fixtures.random_params(0)
    for anchor in (params, fixtures.random_params(1)):
        _, (of_policy, of_anchor) = compiled(DPO)(params, anchor, batch())
        assert all(np.asarray(x).any() for x in jax.tree.leaves(of_policy))
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_anchor))


def test_after_one_step_of_sgd_the_margin_has_moved():
    anchor = fixtures.random_params(0)
    (before, _), (grads, _) = compiled(DPO)(anchor, anchor, batch())
    params = jax.tree.map(lambda x, g: x - 1e-3 * g, anchor, grads)
    (after, metrics), _ = compiled(DPO)(params, anchor, batch())
    assert float(metrics["rewards/margin"]) > 1e-3
    assert float(after) < float(before) - 1e-3


# --- slots, weights, adapters ---------------------------------------------------------


def test_a_prompt_counts_when_all_its_slots_are_filled():
    valid = np.array([[True, True], [True, False], [False, False]])
    partly = dataclasses.replace(batch(), valid=valid)
    assert example_weight(partly).tolist() == [1.0, 0.0, 0.0]


def test_every_trained_token_of_a_filled_slot_counts():
    mask = np.array([[[True, False, True]], [[True, True, False]]])
    valid = np.array([[True], [False]])
    partly = dataclasses.replace(batch(), valid=valid, loss_mask=mask)
    assert token_weight(partly).tolist() == [[[1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]


def test_a_loss_on_rewards_leaves_out_prompts_with_an_empty_slot():
    valid = np.array([[True, True], [True, False]])
    mask = np.array([[[True, True], [True, False]], [[True, False], [False, False]]])
    partly = dataclasses.replace(batch(), valid=valid, loss_mask=mask)
    scores = Scores(logp=jnp.array([[[-1.0, -2.0], [-4.0, 0.0]]] * 2))
    given = jnp.array([[2.0, 1.0], [jnp.nan, 1.0]])
    loss, metrics = on_rewards(logistic_loss)(given, scores, partly)
    assert loss.tolist() == [pytest.approx(math.log1p(math.exp(-1.0))), 0.0]
    assert all(weight.tolist() == [1.0, 0.0] for _, weight in metrics.values())
    assert metrics["rewards/margin"][0].tolist() == [1.0, 0.0]
    assert metrics["logps/chosen"][0][0] == -3.0
    assert metrics["logps/rejected"][0][0] == -4.0
    assert metrics["lengths/chosen"][0][0] == 2.0
    assert metrics["lengths/rejected"][0][0] == 1.0


def test_a_loss_on_lists_has_no_metrics_of_pairs():
    def spread(rewards, *, where):
        return jnp.where(where, rewards.max(-1), 0.0), {"rewards/best": rewards.max(-1)}

    three = dataclasses.replace(batch(), valid=np.ones((2, 3), bool))
    loss, metrics = on_rewards(spread)(jnp.ones((2, 3)), Scores(), three)
    assert loss.tolist() == [1.0, 1.0]
    assert set(metrics) == {"rewards/best"}


def test_metrics_of_a_token_loss_carry_the_weight_of_tokens():
    mask = np.array([[[True, False]], [[True, True]]])
    partly = dataclasses.replace(
        batch(), valid=np.array([[True], [False]]), loss_mask=mask
    )

    def with_metric(token_logps, *, where):
        return jnp.where(where, -token_logps, 0.0), {"logps/token": token_logps}

    logp = jnp.array([[[-1.0, -2.0]], [[-4.0, -8.0]]])
    loss, metrics = on_token_logps(with_metric)(logp, Scores(), partly)
    assert loss.tolist() == [[[1.0, 0.0]], [[0.0, 0.0]]]
    value, weight = metrics["logps/token"]
    assert float(weighted_mean(value, weight)) == -1.0


def test_a_missing_extra_is_named_before_anything_is_computed():
    method = dataclasses.replace(DPO, requires=frozenset({"explore", "advantage"}))
    message = "method dpo requires the extras advantage, explore; the batch has none"
    with pytest.raises(ValueError, match=message):
        objective(method, None, (), (), batch())
    partly = dataclasses.replace(batch(), extras={"explore": np.zeros(3)})
    with pytest.raises(ValueError, match="extras advantage; the batch has explore"):
        objective(method, None, (), (), partly)
