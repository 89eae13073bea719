"""Short trainings are those of the train step; their numbers are arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny_stage
from experiments.worlds import methods
from experiments.worlds.short_runs import ShortRuns, adamw, method_loss, towards
from pref_jax import losses
from pref_jax.data import sources
from pref_jax.logps import response_scores
from pref_jax.train import sharding
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import TokenGroup

MODEL, SFT = tiny_stage.SHALLOW, methods.make_sft()


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def batches():
    return sources.training_batches(
        tiny_stage.make_groups(12, seed=0, num_responses=1),
        groups_per_step=4,
        num_steps=6,
        row_length=tiny_stage.ROW_LENGTH,
        seed=0,
    )


def likelihood(params, anchor, batch, setting):
    del anchor, setting
    return method_loss(SFT, MODEL, params, (), batch)


def by_rate(setting, anchor):
    del anchor
    return adamw(setting["rate"])


def gap(first, second):
    difference = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), first, second)
    return max(jax.tree.leaves(difference))


def test_a_short_run_is_that_of_the_train_step(mesh, batches):
    params = tiny_stage.make_params(0, MODEL)
    ours = ShortRuns(mesh, likelihood, by_rate).train(params, batches, {"rate": 0.01})
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.01, b2=0.95, weight_decay=0.0)
    )
    state = init_state(params, optimizer, rng=jax.random.key(0))
    step = jax.jit(make_train_step(SFT, MODEL, optimizer))
    for batch in batches:
        state, _ = step(state, batch)
    assert gap(ours, params) > 0.01
    assert gap(ours, state.params) < 1e-6


def test_another_rate_compiles_nothing_and_leaves_the_start_as_it_is(mesh, batches):
    params = tiny_stage.make_params(0, MODEL)
    before = jax.tree.map(np.array, params)
    traced = []

    def counting(*args):
        traced.append(1)
        return likelihood(*args)

    runs = ShortRuns(mesh, counting, by_rate)
    slow, fast = (runs.train(params, batches, {"rate": r}) for r in (0.001, 0.1))
    assert len(traced) == 1
    assert gap(slow, params) < gap(fast, params)
    assert gap(before, params) == 0


def test_a_watch_sees_every_update_and_may_stop(mesh, batches):
    params, seen = tiny_stage.make_params(0, MODEL), []

    def watch(number, found):
        seen.append((number, gap(found, params)))
        return number == 2

    runs = ShortRuns(mesh, likelihood, by_rate)
    stopped = runs.train(params, batches, {"rate": 0.01}, watch=watch)
    numbers, moved = zip(*seen, strict=True)
    assert numbers == (0, 1, 2) and moved[0] == 0 and 0 < moved[1] < moved[2]
    two = runs.train(params, [batches[0], batches[1]], {"rate": 0.01})
    assert gap(stopped, two) == 0
    at_once = runs.train(params, batches, {"rate": 0.01}, watch=lambda n, p: True)
    assert gap(at_once, params) == 0


def test_what_decays_towards_parameters_ends_there():
    optimizer = optax.chain(
        towards({"a": jnp.array([3.0])}, 0.5), optax.scale_by_learning_rate(0.1)
    )
    params, zero = {"a": jnp.array([1.0])}, {"a": jnp.zeros(1)}
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = optimizer.update(zero, state, params)
        params = optax.apply_updates(params, updates)
    # Every update takes 1 / 20 of what is left of 2.
    assert float(params["a"][0]) == pytest.approx(3 - 2 * 0.95**4, rel=1e-6)


# --- SFT by a divergence, as a method -------------------------------------------------


def demonstrations(anchor_logps):
    """Two demonstrations of 2 and 1 tokens, with these logps of the base."""
    groups = []
    for record, logps in enumerate(anchor_logps):
        ids = np.arange(1, 1 + len(logps), dtype=np.int32)
        masks = (np.ones(len(ids), bool),)
        extras = {"anchor_logps": (np.asarray(logps, np.float32),)}
        prompt = np.array([record], np.int32)
        groups.append(TokenGroup(prompt, (ids,), masks, (1.0,), record, extras=extras))
    (batch,) = sources.evaluation_batches(groups, groups_per_step=2, row_length=16)
    return batch


PARAMS = tiny_stage.make_params(3, MODEL)
BASE_LOGPS = ([-3.0, -4.0], [-2.5])
BETA = 0.3


def fsft(**options):
    method = methods.make_fsft(losses.CHI_SQUARED, BETA, **options)
    batch = demonstrations(BASE_LOGPS)
    value, slope = jax.value_and_grad(
        lambda p: method_loss(method, MODEL, p, (), batch)
    )(PARAMS)
    return float(value), slope


def own_logps():
    batch = demonstrations(BASE_LOGPS)
    logp = np.asarray(response_scores(MODEL, PARAMS, batch).logp)
    return [logp[0, 0, :2], logp[1, 0, :1]]


def h(v):
    return 2 * (np.sqrt(1 + v) - 1)


@pytest.mark.slow
def test_by_tokens_it_is_the_mean_of_h_over_all_tokens():
    v = BETA * np.concatenate(
        [
            own - np.array(base)
            for own, base in zip(own_logps(), BASE_LOGPS, strict=True)
        ]
    )
    assert v.min() > -0.9
    assert fsft()[0] == pytest.approx(-h(v).mean() / BETA, rel=1e-5)


def test_by_responses_it_is_the_mean_of_h_of_their_sums():
    v = np.array(
        [
            BETA * (own - np.array(base)).sum()
            for own, base in zip(own_logps(), BASE_LOGPS, strict=True)
        ]
    )
    assert v.min() > -0.9
    assert fsft(level="sequence")[0] == pytest.approx(-h(v).mean() / BETA, rel=1e-5)


def test_its_partition_can_be_solved_and_changes_the_gradient():
    zero, solved = fsft()[1], fsft(partition="solve")[1]
    assert gap(zero, solved) > 1e-4


def test_at_the_base_its_gradient_is_that_of_sft():
    method = methods.make_fsft(losses.SQUARED_HELLINGER, BETA)
    batch = demonstrations([logps.tolist() for logps in own_logps()])
    ours, plain = (
        jax.grad(lambda p, m=m: method_loss(m, MODEL, p, (), batch))(PARAMS)
        for m in (method, SFT)
    )
    assert gap(ours, plain) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "`level` must be token or sequence; got 'word'"),
        ({"partition": "one"}, "`partition` must be zero or solve; got 'one'"),
    ],
)
def test_levels_and_partitions_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fsft(**options)
