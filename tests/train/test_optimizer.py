"""Learning rates at their corners, and what AdamW is and is not allowed to touch."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pref_jax.train.optimizer import (
    SCHEDULES,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)

PEAK = 0.5


def rates(schedule, num_steps, warmup_steps=0):
    config = OptimizerConfig(PEAK, warmup_steps=warmup_steps, schedule=schedule)
    rate = make_schedule(config, num_steps)
    return [float(rate(done)) for done in range(num_steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_from_its_first_share_to_the_peak(schedule):
    warm = rates(schedule, 10, warmup_steps=4)[:5]
    assert warm == pytest.approx([PEAK * share / 5 for share in (1, 2, 3, 4, 5)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_peak(schedule):
    assert rates(schedule, 10)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_after_warm_up_the_rate_stays_or_falls_to_0(warmup_steps):
    rest = 10 - warmup_steps
    left = [1 - done / rest for done in range(rest + 1)]
    expected = {
        "constant": [PEAK] * (rest + 1),
        "linear": [PEAK * share for share in left],
        "cosine": [PEAK * (1 - math.cos(math.pi * share)) / 2 for share in left],
    }
    for schedule in SCHEDULES:
        after = rates(schedule, 10, warmup_steps)[warmup_steps:]
        assert after == pytest.approx(expected[schedule], abs=1e-6)
        # 0 is reached after the last update, not in it.
        assert after[-2] > 0


def test_a_run_of_warm_up_alone_has_a_schedule():
    expected = [PEAK / 4, PEAK / 2, 3 * PEAK / 4]
    assert rates("cosine", 3, warmup_steps=3)[:3] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_an_error():
    config = OptimizerConfig(PEAK, warmup_steps=11)
    message = "`warmup_steps` is 11 and the run has 10 steps"
    with pytest.raises(ValueError, match=message):
        make_schedule(config, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "step"}, "`schedule` must be one of constant, linear, cosine"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"learning_rate": math.nan}, "`learning_rate` must be positive"),
        ({"clip_norm": -1.0}, "`clip_norm` must be positive"),
        ({"eps": 0.0}, "`eps` must be positive"),
        ({"warmup_steps": -1}, "`warmup_steps` and `weight_decay` must not be neg"),
        ({"weight_decay": -0.1}, "`warmup_steps` and `weight_decay` must not be neg"),
        ({"b1": 1.0}, r"`b1` must lie in \[0, 1\)"),
        ({"b2": -0.1}, r"`b2` must lie in \[0, 1\)"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 0.1} | fields)


PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "block": {"query": ("layers", "embed", "heads"), "scale": ("layers", "norm")},
    "final": ("norm",),
}
PARAMS = {
    "embedding": jnp.full((3, 2), 2.0),
    "block": {"query": jnp.full((2, 2, 2), -3.0), "scale": jnp.full((2, 2), 5.0)},
    "final": jnp.full(2, 7.0),
}


def updates(config, gradient, num_steps=4):
    """The first update from `PARAMS`."""
    optimizer = make_optimizer(config, num_steps, param_axes=PARAM_AXES)
    return optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[0]


def test_decay_leaves_norms_alone():
    config = OptimizerConfig(PEAK, weight_decay=0.1, schedule="constant")
    zeros = optax.tree.zeros_like(PARAMS)
    found = updates(config, zeros)
    np.testing.assert_allclose(found["embedding"], -PEAK * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(found["block"]["query"], PEAK * 0.1 * 3.0, rtol=1e-6)
    assert not found["block"]["scale"].any()
    assert not found["final"].any()


def test_two_updates_are_adams_of_the_clipped_gradient():
    # Kingma and Ba, arXiv:1412.6980, algorithm 1; decay added after, as in AdamW.
    config = OptimizerConfig(
        PEAK,
        warmup_steps=1,
        schedule="linear",
        clip_norm=1.0,
        weight_decay=0.01,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
    )
    optimizer = make_optimizer(config, 3, param_axes=PARAM_AXES)
    state, params = optimizer.init(PARAMS), PARAMS
    x, m, v = 2.0, 0.0, 0.0  # one entry of the embedding
    for step, entry in ((1, 3.0), (2, -0.1)):
        gradient = optax.tree.zeros_like(PARAMS)
        # Norm 5 at first, which is clipped to 1; then 0.1, which is left alone.
        gradient["embedding"] = gradient["embedding"].at[0, 0].set(entry)
        gradient["final"] = gradient["final"].at[1].set(4.0 if step == 1 else 0.0)
        update, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, update)
        g = entry / 5 if step == 1 else entry
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        adam = (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-3)
        rate = PEAK * (1 / 2 if step == 1 else 1)
        x -= rate * (adam + 0.01 * x)
        assert float(params["embedding"][0, 0]) == pytest.approx(x, rel=1e-5)
