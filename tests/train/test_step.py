"""One update is that of the mean over the whole batch, however it is cut or placed."""

import dataclasses
import functools
import gc
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
import tiny_stage
from pref_jax import anchors, losses
from pref_jax.data import sources
from pref_jax.logps import response_scores
from pref_jax.method import Method, objective, on_token_logps
from pref_jax.train import sharding
from pref_jax.train.state import init_state
from pref_jax.train.step import (
    evaluate,
    make_eval_step,
    make_train_step,
    split_batch,
    weighted_mean,
    weighted_sum,
)
from pref_jax.types import Scores
from tiny_stage import DPO, SFT, SHALLOW, make_groups

RATE = 0.1
# Plain gradient descent that also keeps the gradient. (Adam divides by its size and
# turns rounding into whole updates.)
SGD = optax.chain(optax.trace(decay=0.0), optax.scale(-RATE))

make_params = functools.partial(tiny_stage.make_params, model=SHALLOW)
quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


# --- the one average ------------------------------------------------------------------


@st.composite
def entries(draw):
    """Values and weights; where a weight is 0 the value may be anything."""
    shape = draw(hnp.array_shapes(max_dims=3, max_side=4))
    finite = st.floats(-100, 100, width=32)
    weights = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0, 1, 2.5])))
    values = draw(hnp.arrays(np.float32, shape, elements=finite))
    junk = draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
    return np.where(weights == 0, junk, values), weights


@hypothesis.given(entries())
def test_weighted_mean_is_the_loop_over_entries_that_count(pair):
    values, weights = pair
    mean = weighted_mean(jnp.asarray(values), jnp.asarray(weights))
    expected = oracles.weighted_mean(values, weights)
    np.testing.assert_allclose(float(mean), expected, rtol=1e-5, atol=1e-4)


def test_weighted_sum_carries_both_parts():
    values = jnp.array([[1.0, 4.0], [math.nan, math.inf]])
    weights = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    assert [float(x) for x in weighted_sum(values, weights)] == [9.0, 3.0]


def test_a_weight_for_several_values_counts_for_each():
    values = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    sums = weighted_sum(values, jnp.array([[1.0], [2.0]]))
    assert [float(x) for x in sums] == [28.0, 6.0]


def test_an_entry_that_counts_stays_nan():
    values = jnp.array([1.0, math.nan])
    assert math.isnan(weighted_mean(values, jnp.array([1.0, 1e-6])))


def test_no_weight_at_all_is_zero_and_has_no_gradient():
    values = jnp.array([math.nan, math.inf, 3.0])
    value, gradient = jax.value_and_grad(weighted_mean)(values, jnp.zeros(3))
    assert float(value) == 0.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]


# --- micro-batches --------------------------------------------------------------------

TOKEN_MEAN = dataclasses.replace(
    SFT,
    anchor=anchors.fixed(),
    reward=lambda scores, anchor_scores, batch: scores.logp - anchor_scores.logp,
    loss=on_token_logps(
        lambda log_ratios, *, where: (
            jnp.where(where, -log_ratios, 0.0),
            {"likelier": jnp.heaviside(log_ratios, 0.5)},
        )
    ),
)
METHODS = {"pair mean": DPO, "token mean": TOKEN_MEAN}
NUM_MICROBATCHES = (1, 2, 4, 8)


def with_random_anchor(groups):
    """Stored anchor logps, so that pairs have margins and one can be poisoned."""
    rng = np.random.default_rng(5)
    return [
        dataclasses.replace(
            group,
            extras={
                "anchor_logps": tuple(
                    -5 * rng.random(len(r), np.float32) for r in group.responses
                )
            },
        )
        for group in groups
    ]


def one_batch(groups, rows_multiple=8):
    return sources.evaluation_batches(
        groups,
        groups_per_step=len(groups),
        row_length=tiny_stage.ROW_LENGTH,
        rows_multiple=rows_multiple,
    )[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, its plain mean and gradient, and the steps that are held to them."""

    batch: object
    params: object
    steps: dict
    loss: np.ndarray
    weight: np.ndarray
    metrics: dict
    gradient: object

    def run(self, num_microbatches, batch=None):
        state = init_state(self.params, SGD, rng=jax.random.key(0))
        return self.steps[num_microbatches](state, batch or self.batch)


@pytest.fixture(scope="module", params=METHODS)
def case(request):
    method = METHODS[request.param]
    groups = make_groups(11, seed=3, num_responses=2 if method is DPO else 1)
    batch, params = one_batch(with_random_anchor(groups)), make_params(0)
    assert batch.tokens.shape[0] == 8 and not batch.valid.all()
    assert not batch.loss_mask[batch.valid].all()

    def mean(params):
        loss, weight, metrics = objective(method, SHALLOW, params, (), batch)
        return (loss * weight).sum() / weight.sum(), (loss, weight, metrics)

    gradient, (loss, weight, metrics) = jax.jit(jax.grad(mean, has_aux=True))(params)
    steps = {
        n: jax.jit(make_train_step(method, SHALLOW, SGD, num_microbatches=n))
        for n in NUM_MICROBATCHES
    }
    return Case(batch, params, steps, loss, weight, metrics, gradient)


def assert_trees_close(actual, expected, tolerance=1e-5):
    """Close relative to the norm of each leaf: small entries are sums that cancel."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("num_microbatches", NUM_MICROBATCHES)
def test_microbatches_change_nothing(case, num_microbatches):
    state, outputs = case.run(num_microbatches)
    metrics = {name: float(x) for name, x in outputs["metrics"].items()}
    expected = {"loss": oracles.weighted_mean(case.loss, case.weight)}
    expected |= {k: oracles.weighted_mean(*pair) for k, pair in case.metrics.items()}
    squares = [
        np.sum(np.square(leaf, dtype=np.float64))
        for leaf in jax.tree.leaves(case.gradient)
    ]
    expected["grad_norm"] = math.sqrt(sum(squares))
    expected["update_norm"] = RATE * expected["grad_norm"]
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert_trees_close(state.opt_state[0].trace, case.gradient)
    after = jax.tree.map(lambda p, g: p - RATE * g, case.params, case.gradient)
    assert_trees_close(state.params, after)
    assert outputs["finite"].all()


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_the_mean_of_micro_means_would_be_another_number(case, num_microbatches):
    parts = split_batch((case.batch.tokens, case.loss, case.weight), num_microbatches)
    micro_means = [oracles.weighted_mean(*x) for x in zip(*parts[1:], strict=True)]
    mean = oracles.weighted_mean(case.loss, case.weight)
    assert np.mean(micro_means) != pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("num_microbatches", NUM_MICROBATCHES)
def test_which_groups_are_finite_comes_back_in_batch_order(case, num_microbatches):
    used = np.flatnonzero(case.batch.valid.all(axis=-1))
    for bad in (used[[0, 3]], used[[-1]]):
        logps = case.batch.extras["anchor_logps"].copy()
        logps[bad, -1] = math.nan
        empty = np.flatnonzero(~case.batch.valid.any(axis=-1))
        logps[empty] = math.inf  # weight 0: never looked at
        batch = dataclasses.replace(case.batch, extras={"anchor_logps": logps})
        _, outputs = case.run(num_microbatches, batch)
        assert np.flatnonzero(~outputs["finite"]).tolist() == bad.tolist()
        assert math.isnan(outputs["metrics"]["loss"])


def test_rows_are_dealt_out_in_turn():
    # Rows 0..3 on one device and 4..7 on the other: both have rows of each micro-batch.
    batch = {"rows": np.arange(8), "groups": np.arange(16).reshape(16, 1)}
    parts = split_batch(batch, 4)
    assert parts["rows"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert parts["groups"][1, :, 0].tolist() == [2, 3, 10, 11]


def test_rows_that_do_not_divide_are_an_error():
    message = "8 rows cannot be split into 3 micro-batches.*rows_multiple"
    with pytest.raises(ValueError, match=message):
        split_batch({"rows": np.zeros(8)}, 3)


# --- policy and anchor ----------------------------------------------------------------


def anchored(batch, anchor):
    """The batch with its anchor's logps stored."""
    logps = jax.jit(functools.partial(response_scores, SHALLOW))(anchor, batch).logp
    return dataclasses.replace(batch, extras={"anchor_logps": np.asarray(logps)})


def count_like(leaf):
    gc.collect()
    return sum(x.shape == leaf.shape for x in jax.live_arrays())


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_training_starts_at_log_2_and_leaves_it(stored):
    params, batch = make_params(0), one_batch(make_groups(6, seed=3), 1)
    if stored:
        batch = anchored(batch, params)
    embedding = np.asarray(params["embedding"])
    params = jax.tree.map(np.asarray, params)
    before = count_like(embedding)
    step = jax.jit(make_train_step(DPO, SHALLOW, SGD), donate_argnums=0)
    state = init_state(
        params, SGD, rng=jax.random.key(0), anchor=() if stored else params
    )
    state, first = step(state, batch)
    state, second = step(state, batch)
    # Parameters and the optimiser's trace; the anchor once if it is live, else never.
    assert count_like(embedding) - before == (2 if stored else 3)
    assert float(first["metrics"]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(first["metrics"]["rewards/margin"]) == pytest.approx(0, abs=1e-6)
    assert float(second["metrics"]["rewards/margin"]) > 1e-3
    assert float(second["metrics"]["loss"]) < math.log(2) - 1e-3
    if not stored:
        jax.tree.map(np.testing.assert_array_equal, state.anchor, params)


def test_the_gradient_reaches_the_policy_and_not_the_anchor():
    batch = one_batch(make_groups(6, seed=3), 1)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, anchor):
        loss, weight, _ = objective(DPO, SHALLOW, params, anchor, batch)
        return weighted_mean(loss, weight)

    to_policy, to_anchor = gradients(make_params(0), make_params(1))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_policy))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_anchor))


# --- the state, on a problem without text ---------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bandit:
    """Grades of K arms in B contexts: all that a step needs of a batch."""

    grades: jax.Array  # f32[B, K]
    valid: jax.Array  # bool[B, K]
    extras: dict = dataclasses.field(default_factory=dict)


def bandit_loss(rewards, scores, batch):
    del scores
    weight = batch.valid.all(axis=-1).astype(jnp.float32)
    error = jnp.square(rewards - batch.grades).sum(axis=-1)
    return error, {"first": (rewards[:, 0], 2 * weight)}


BANDIT = Method(
    name="bandit",
    anchor=anchors.none(),
    score=lambda model, params, batch: Scores(
        value=jnp.broadcast_to(params["arms"][None], batch.grades.shape)
    ),
    reward=lambda scores, anchor_scores, batch: scores.value,
    loss=bandit_loss,
)


def bandit_batch(seed, num_contexts=6):
    rng = np.random.default_rng(seed)
    valid = rng.random((num_contexts, 2)) < 0.8
    grades = rng.normal(size=(num_contexts, 2)).astype(np.float32)
    return Bandit(jnp.asarray(grades), jnp.asarray(valid))


def test_a_step_counts_and_keeps_the_key():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    optimizer = optax.sgd(schedule)
    step = make_train_step(BANDIT, None, optimizer, schedule=schedule)
    params = {"arms": np.zeros(2, np.float32)}
    start = init_state(params, optimizer, rng=jax.random.key(3))
    state = start
    for number in range(3):
        assert (int(state.step), int(state.data)) == (number, number)
        state, outputs = step(state, bandit_batch(number))
        rate = float(outputs["metrics"]["learning_rate"])
        assert rate == pytest.approx(1.0 - number / 10)
    assert jax.random.key_data(state.rng).tolist() == (
        jax.random.key_data(start.rng).tolist()
    )


def test_the_optimizer_is_given_the_parameters():
    """The gradient is 0 where the grades are met: decay alone halves them."""
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    params = {"arms": np.array([2.0, 4.0], np.float32)}
    state = init_state(params, optimizer, rng=jax.random.key(0))
    met = Bandit(jnp.array([[2.0, 4.0]]), jnp.ones((1, 2), bool))
    state, _ = make_train_step(BANDIT, None, optimizer)(state, met)
    assert state.params["arms"].tolist() == [1.0, 2.0]


def test_a_group_without_weight_is_never_the_bad_one():
    batch = bandit_batch(0)
    empty = np.flatnonzero(~batch.valid.all(axis=-1))
    assert empty.size
    batch = dataclasses.replace(batch, grades=batch.grades.at[empty].set(math.nan))
    state = init_state({"arms": np.zeros(2)}, SGD, rng=jax.random.key(0))
    _, outputs = make_train_step(BANDIT, None, SGD)(state, batch)
    assert outputs["finite"].all()
    assert math.isfinite(outputs["metrics"]["loss"])


def test_the_anchor_is_refreshed_from_the_new_parameters_and_the_new_step():
    def refresh(params, step, anchor):
        return {"arms": params["arms"] + 10 * step + 100 * anchor["arms"]}

    anchor = anchors.Anchor(anchors.none().scores, refresh)
    method = dataclasses.replace(BANDIT, anchor=anchor)
    params = {"arms": np.ones(2, np.float32)}
    state = init_state(params, SGD, rng=jax.random.key(0), anchor=params)
    new, _ = make_train_step(method, None, SGD)(state, bandit_batch(0))
    assert new.params["arms"].tolist() != [1.0, 1.0]
    expected = new.params["arms"] + 10 + 100
    np.testing.assert_allclose(new.anchor["arms"], expected, rtol=1e-6)


def moving_anchor(anchor, num_steps):
    """Parameters and anchor after each step, from unlike ones; and by NumPy.

    The loss is half the squared distance of the policy from the anchor plus the grades,
    so that a step goes towards anchor + grades by the learning rate.
    """
    grades = np.array([0.5, -2.0], np.float32)
    method = dataclasses.replace(
        BANDIT,
        anchor=anchor,
        reward=lambda scores, anchor_scores, batch: scores.value - anchor_scores.value,
        loss=lambda rewards, scores, batch: (
            0.5 * jnp.square(rewards - batch.grades).sum(-1),
            {},
        ),
    )
    batch = Bandit(jnp.asarray(grades)[None], jnp.ones((1, 2), bool))
    state = init_state(
        {"arms": np.array([1.0, 1.0], np.float32)},
        SGD,
        rng=jax.random.key(0),
        anchor={"arms": np.array([3.0, -1.0], np.float32)},
    )
    step, seen = jax.jit(make_train_step(method, None, SGD)), []
    for _ in range(num_steps):
        before = state
        state, _ = step(state, batch)
        aim = before.anchor["arms"] + grades
        expected = before.params["arms"] + RATE * (aim - before.params["arms"])
        np.testing.assert_allclose(state.params["arms"], expected, rtol=1e-5)
        seen.append(
            (np.asarray(state.params["arms"]), np.asarray(state.anchor["arms"]))
        )
    return seen


def test_a_snapshot_is_the_parameters_of_the_last_multiple():
    anchor = anchors.snapshot(every=2, score=BANDIT.score)
    seen = moving_anchor(anchor, 5)
    params, snapshots = zip(*seen, strict=True)
    assert snapshots[0].tolist() == [3.0, -1.0]
    for got, expected in zip(snapshots[1:], (1, 1, 3, 3), strict=True):
        np.testing.assert_array_equal(got, params[expected])


def test_a_running_average_is_that_of_the_parameters_after_each_step():
    seen = moving_anchor(anchors.ema(decay=0.6, score=BANDIT.score), 4)
    average = np.array([3.0, -1.0])
    for params, got in seen:
        average = 0.6 * average + 0.4 * params
        np.testing.assert_allclose(got, average, rtol=1e-5)


def coupled(name):
    """A loss of a bandit that looks across the batch."""

    def loss(rewards, scores, batch):
        if name == "aot_unpaired_loss":
            values, _ = losses.aot_unpaired_loss(rewards + batch.grades)
            return values, {}
        if name == "aot_loss":
            options = {"anchor_logps": batch.grades, "beta": 0.5}
            return losses.aot_loss(rewards, **options)[0], {}
        statistic = {
            "mean_kl": losses.mean_kl,
            "reward_shift": lambda x: losses.reward_shift(x, desirable=jnp.array(True)),
        }[name](rewards)
        return jnp.square(rewards - batch.grades + statistic).sum(-1), {}

    return dataclasses.replace(BANDIT, loss=loss)


@pytest.mark.parametrize(
    "name", ["aot_loss", "aot_unpaired_loss", "mean_kl", "reward_shift"]
)
def test_what_looks_across_the_batch_is_refused_in_parts(name):
    params = {"arms": jnp.array([0.5, 1.5])}
    state = init_state(params, SGD, rng=jax.random.key(0))
    whole = make_train_step(coupled(name), None, SGD)
    _, outputs = whole(state, bandit_batch(0))
    assert math.isfinite(outputs["metrics"]["loss"])
    parts = make_train_step(coupled(name), None, SGD, num_microbatches=2)
    message = f"`{name}` looks across the whole batch, and .* in 2 micro-batches"
    with pytest.raises(ValueError, match=message):
        parts(state, bandit_batch(0))
    whole(state, bandit_batch(0))  # the error leaves nothing behind


def test_seeds_are_vmapped_through_one_step():
    step = make_train_step(BANDIT, None, SGD, num_microbatches=2)
    params = {"arms": jax.random.normal(jax.random.key(1), (3, 2))}

    def run(params, batch):
        return step(init_state(params, SGD, rng=jax.random.key(0)), batch)

    batches = [bandit_batch(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    together, metrics = jax.jit(jax.vmap(run))(params, stacked)
    for i, batch in enumerate(batches):
        alone, outputs = run({"arms": params["arms"][i]}, batch)
        assert_trees_close(together.params["arms"][i], alone.params["arms"])
        assert float(metrics["metrics"]["loss"][i]) == pytest.approx(
            float(outputs["metrics"]["loss"]), rel=1e-5
        )


def test_init_state_copies_so_that_donation_leaves_the_callers_arrays():
    params = {"arms": jnp.ones(2)}
    key = jax.random.key(0)
    state = init_state(params, SGD, rng=key, anchor=params)
    jax.jit(make_train_step(BANDIT, None, SGD), donate_argnums=0)(
        state, bandit_batch(0)
    )
    assert state.params["arms"].is_deleted()
    assert params["arms"].tolist() == [1.0, 1.0]
    jax.random.split(key)


# --- evaluation -----------------------------------------------------------------------


def test_evaluate_divides_once_over_all_batches():
    def analysis(model, params, anchor, batch):
        weight = batch.valid[:, 1].astype(jnp.float32)
        never = jnp.zeros_like(weight)
        return {"second": (batch.grades[:, 1], weight), "never": (weight, never)}

    method = dataclasses.replace(BANDIT, analyses=(analysis,))
    params = {"arms": jnp.array([0.3, -0.7])}
    batches = [bandit_batch(seed, num) for seed, num in ((0, 6), (1, 2), (2, 9))]
    grades, valid = (
        np.concatenate([np.asarray(getattr(batch, name)) for batch in batches])
        for name in ("grades", "valid")
    )
    error = ((np.array([0.3, -0.7]) - grades) ** 2).sum(axis=-1)
    expected = {
        "loss": oracles.weighted_mean(error, valid.all(axis=-1)),
        "first": 0.3,
        "second": oracles.weighted_mean(grades[:, 1], valid[:, 1]),
        "never": 0.0,
    }
    eval_step = make_eval_step(method, None)
    means = evaluate(eval_step, params, (), batches)
    assert means == pytest.approx(expected, rel=1e-5)
    means_of_batches = [evaluate(eval_step, params, (), [b])["loss"] for b in batches]
    assert np.mean(means_of_batches) != pytest.approx(means["loss"], rel=1e-2)


# --- one compilation ------------------------------------------------------------------


def test_a_run_traces_its_step_once_and_moves_nothing_by_itself():
    traced = []

    def reward(*args):
        traced.append(1)
        return DPO.reward(*args)

    method = dataclasses.replace(DPO, reward=reward)
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 4))
    mesh = sharding.make_mesh()
    batches = sources.training_batches(
        make_groups(9, seed=0),
        groups_per_step=4,
        num_steps=4,
        row_length=tiny_stage.ROW_LENGTH,
        seed=0,
        rows_multiple=8,
    )
    params = make_params(0)
    with jax.set_mesh(mesh):
        state = init_state(params, optimizer, rng=jax.random.key(0), anchor=params)
        shardings = sharding.state_shardings(
            mesh, SHALLOW.param_axes(params), state, optimizer
        )
        state = jax.device_put(state, shardings)
        step = make_train_step(method, SHALLOW, optimizer)
        step = sharding.CompiledStep(step, mesh, shardings)
        for batch in batches:
            placed = sharding.place_batch(mesh, batch)
            with jax.transfer_guard("disallow"):
                state, outputs = step(state, placed)
    assert len(traced) == 1
    assert math.isfinite(outputs["metrics"]["loss"])
