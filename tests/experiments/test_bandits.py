"""Bandits: the truth, the noise and the training are what the module says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.worlds import bandits
from pref_jax import anchors, targets
from pref_jax.evals.ranking import win_mass

SMALL = bandits.World(
    num_train=96, num_validation=40, num_test=50, num_reference=64, groups_per_step=32
)
POLICY = bandits.Policy(SMALL.size, 16)
CLEAN = bandits.Noise()


def draw(noise=CLEAN, *, world=SMALL, seed=0):
    function = functools.partial(bandits.draw_data, world=world)
    return jax.jit(function)(jax.random.key(seed), noise=noise)


def test_the_clean_reward_is_the_formula():
    truth = bandits.draw_truth(jax.random.key(0), 5)
    context, items = bandits.draw_contexts(jax.random.key(1), 3, 5, 4)
    found = truth.rewards(context, items)
    matrix, vector, context, items = map(
        np.float64, (truth.matrix, truth.vector, context, items)
    )
    for b in range(3):
        for k in range(4):
            item = items[b, k]
            expected = 1.5 * context[b] @ matrix @ item / 5**0.5
            expected += np.tanh(item @ vector / 5**0.5)
            np.testing.assert_allclose(found[b, k], expected, rtol=1e-5, atol=1e-5)


def test_each_noise_spoils_labels_as_it_says():
    rewards = jax.random.normal(jax.random.key(0), (20000, 4)) + 3
    spoil = functools.partial(bandits.spoil, jax.random.key(1), rewards)
    error = spoil(bandits.Noise(gaussian=0.5)) - rewards
    assert float(error.std()) == pytest.approx(0.5, rel=0.02)
    flipped = spoil(bandits.Noise(flip_rate=0.2))
    share = (flipped[:, 0] == -rewards[:, 0]).mean()
    assert float(share) == pytest.approx(0.2, abs=0.01)
    np.testing.assert_array_equal(  # a list is negated as a whole
        (flipped == -rewards).all(-1), (flipped == -rewards).any(-1)
    )
    error = spoil(bandits.Noise(cauchy=0.5)) - rewards
    assert float(jnp.median(jnp.abs(error))) == pytest.approx(0.5, rel=0.03)
    error = spoil(bandits.Noise(outlier_rate=0.1, outlier_scale=50.0)) - rewards
    assert float((error != 0).mean()) == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(spoil(bandits.Noise()), rewards)


def test_the_shift_moves_the_mean_of_the_test_contexts_alone():
    world = dataclasses.replace(SMALL, num_test=20000, num_validation=20000)
    data = draw(bandits.Noise(shift=2.0), world=world)
    norms = [
        float(jnp.linalg.norm(part.context.mean(0)))
        for part in (data.test, data.validation)
    ]
    assert norms == pytest.approx([2.0, 0.0], abs=0.05)


def test_the_one_pair_of_a_context_is_drawn_among_all():
    data = draw(bandits.SCENARIOS["cauchy, heavy"])
    assert data.one_pair.shape == (96, 1, 2) and data.train.pairs.shape == (96, 28, 2)
    every = {tuple(pair) for pair in data.train.pairs[0].tolist()}
    assert {tuple(pair) for pair in data.one_pair[:, 0].tolist()} <= every
    assert len(np.unique(data.one_pair[:, 0], axis=0)) > 20


def test_scenarios_spoil_the_same_contexts():
    light, heavy = (draw(bandits.SCENARIOS[f"cauchy, {x}"]) for x in ("light", "heavy"))
    np.testing.assert_array_equal(light.train.items, heavy.train.items)
    assert (light.train.labels != heavy.train.labels).all()
    np.testing.assert_array_equal(light.test.labels, heavy.test.labels)


def test_an_epoch_holds_every_record_once():
    order = np.asarray(bandits._batches(jax.random.key(0), 96, 32, 7))
    assert order.shape == (7, 32)
    for epoch in (order[:3], order[3:6]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(96))
    assert (order[:3] != order[3:6]).any()


def test_the_measures_are_those_of_the_library():
    rng = np.random.default_rng(0)
    logps = jax.nn.log_softmax(jnp.float32(rng.normal(size=(30, 6))))
    rewards = jnp.float32(rng.normal(size=(30, 6)))
    found = bandits.measure(logps, logps, rewards)
    np.testing.assert_allclose(
        found["win_mass"], win_mass(logps, rewards).mean(), rtol=1e-5
    )
    assert float(found["kl"]) == 0
    best = (np.argmax(logps, -1) == np.argmax(rewards, -1)).mean()
    np.testing.assert_allclose(found["accuracy"], best, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["fixed", "snapshot"])
def test_seeds_that_train_together_are_seeds_that_train_alone(anchor):
    anchor = {
        "fixed": anchors.fixed(bandits.score),
        "snapshot": anchors.snapshot(every=3, score=bandits.score),
    }[anchor]
    method = bandits.make_list_method(
        "list",
        anchor,
        beta=0.5,
        make_targets=functools.partial(targets.softmax, temperature=0.7),
    )

    def one(seed):
        key = jax.random.key(seed)
        data = bandits.draw_data(key, SMALL, bandits.Noise())
        return bandits.train(
            method,
            POLICY,
            POLICY.init(key),
            data.train,
            key=key,
            groups_per_step=32,
            num_steps=8,
            optimizer=bandits.make_optimizer(SMALL, 1e-2),
        ).params

    together = jax.jit(jax.vmap(one))(jnp.arange(2))
    for seed in range(2):
        alone = jax.jit(one)(seed)
        for name, leaf in alone.items():
            np.testing.assert_allclose(together[name][seed], leaf, rtol=1e-4, atol=1e-5)
