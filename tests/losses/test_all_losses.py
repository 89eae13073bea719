"""What holds for every loss: its oracle, its gradient, what is dropped, extremes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from losses.loss_cases import BATCH, ITEMS_KEPT
from losses.loss_cases import CASES as FIRST_CASES
from losses.more_loss_cases import CASES as MORE_CASES
from pref_jax import losses

CASES = FIRST_CASES + MORE_CASES
ANCHORS = {"anchor_logps", "anchor_errors"}

every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def cases(predicate):
    """The losses of which something is true."""
    found = [case for case in CASES if predicate(case)]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.id)


def assert_same(actual, expected):
    """Equal trees, bit for bit; a missing or another key is a difference."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    def compare(x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)

    jax.tree.map(compare, actual, expected)


def value_and_gradient(case, arrays, where=None):
    """((loss, metrics), gradient of the summed loss by every float input)."""
    flags = {k: x for k, x in arrays.items() if np.asarray(x).dtype == bool}
    floats = {k: jnp.asarray(x) for k, x in arrays.items() if k not in flags}

    def total(floats):
        loss, metrics = case.call({k: (flags | floats)[k] for k in arrays}, where)
        return loss.sum(), (loss, metrics)

    gradient, results = jax.grad(total, has_aux=True)(floats)
    return results, gradient


@functools.cache
def usual(case_id):
    """Results and gradients of a batch of which some is dropped."""
    case = next(case for case in CASES if case.id == case_id)
    arrays = case.draw(1)
    return arrays, *value_and_gradient(case, arrays, case.kept)


def test_the_table_has_every_loss():
    names = {name for name in losses.__all__ if name.endswith("_loss")}
    # The one has no metrics and a file of its own; the other takes pictures.
    expected = (names | {"listwise_cross_entropy"}) - {"nll_loss", "dspo_loss"}
    assert {case.name for case in CASES} == expected
    assert len({case.id for case in CASES}) == len(CASES)


# --- values ---------------------------------------------------------------------------


@every_loss
def test_the_loss_and_its_metrics_are_the_oracles(case):
    arrays, (loss, metrics), _ = usual(case.id)
    assert_close(loss, case.expected_loss(arrays, case.kept))
    assert_close(metrics, case.expected_metrics(arrays, case.kept))
    assert {x.shape for x in (loss, *metrics.values())} == {(BATCH,)}
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype(jnp.float32)}


@every_loss
def test_without_where_nothing_is_dropped(case):
    arrays = case.draw(2)
    loss, metrics = case.call(arrays)
    assert_close(loss, case.expected_loss(arrays))
    assert_close(metrics, case.expected_metrics(arrays))


@every_loss
def test_float64_stays_and_is_exact_to_its_precision(case):
    with jax.enable_x64(True):
        arrays = case.draw(1)
        results = case.call({k: jnp.asarray(x) for k, x in arrays.items()}, case.kept)
        assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype(jnp.float64)}
        results = jax.device_get(results)
    expected = case.expected_loss(arrays, case.kept)
    np.testing.assert_allclose(results[0], expected, rtol=1e-11, atol=1e-12)


@every_loss
def test_bfloat16_is_widened_before_anything_is_computed(case):
    narrow, wide = {}, {}
    for name, x in case.draw(4).items():
        narrow[name] = x if x.dtype == bool else jnp.asarray(x, jnp.bfloat16)
        wide[name] = x if x.dtype == bool else narrow[name].astype(jnp.float32)
    results = case.call(narrow, case.kept)
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}
    assert_same(results, case.call(wide, case.kept))


# --- gradients ------------------------------------------------------------------------


@cases(lambda case: not case.stopped)
def test_the_gradient_is_that_of_the_oracle(case):
    """Central differences of the oracle, in float64."""
    arrays, size = case.draw(5), 1e-5
    with jax.enable_x64(True):
        gradient = value_and_gradient(case, arrays, case.kept)[1][case.first]
        gradient = np.asarray(gradient)
    expected = np.zeros_like(gradient)
    for slot in np.ndindex(gradient.shape[1:] if not case.of_batch else (BATCH, 2)):
        # Examples do not meet, unless they are a batch: all of a slot at once.
        index = slot if case.of_batch else (slice(None), *slot)
        sides = []
        for change in (size, -size):
            moved = {k: x.copy() for k, x in arrays.items()}
            moved[case.first][index] += change
            sides.append(case.expected_loss(moved, case.kept))
        difference = (sides[0] - sides[1]) / (2 * size)
        expected[index] = difference.sum() if case.of_batch else difference
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected).max() > 1e-3


@every_loss
def test_only_the_policy_has_a_gradient(case):
    _, _, gradients = usual(case.id)
    assert np.asarray(gradients[case.first]).any()
    others = {k: x for k, x in gradients.items() if k != case.first}
    assert not any(np.asarray(x).any() for x in others.values())


@cases(lambda case: case.differences)
def test_a_number_added_to_all_rewards_changes_nothing(case):
    arrays, (loss, _), gradients = usual(case.id)
    total = np.asarray(gradients[case.first]).sum(-1)
    np.testing.assert_allclose(total, 0.0, atol=2e-6)
    added = np.linspace(-4, 4, BATCH)[:, None]
    moved = arrays | {case.first: arrays[case.first] + added}
    assert_close(case.call(moved, case.kept)[0], loss, atol=1e-5)


@cases(lambda case: case.differences)
def test_what_all_rewards_share_costs_no_digits(case):
    """Sums in steps of 2^-6 near 2^13 are exact in float32, and so are differences."""
    arrays = case.draw(12)
    moved = dict(arrays)
    for name in ({case.first} | ANCHORS) & set(arrays):
        arrays[name] = np.round(64 * arrays[name]) / 64
        moved[name] = arrays[name] + 2.0**13
    assert_close(case.call(moved)[0], case.expected_loss(arrays))


@cases(lambda case: "anchor_logps" in case.inputs)
def test_a_number_added_to_policy_and_anchor_changes_no_reward(case):
    arrays, (loss, metrics), _ = usual(case.id)
    added = np.linspace(-40, 40, 2 * BATCH).reshape(BATCH, 2)
    if case.kind == "list" or case.of_batch:
        added = added[:, :1]
    if case.kind == "response":
        added = added[:, 0]
    moved = dict(arrays)
    for name in ("logps", "anchor_logps"):
        moved[name] = arrays[name] + added
    after, metrics_after = case.call(moved, case.kept)
    if "loss/preference" in metrics:  # the other term sees the policy alone
        loss, after = metrics["loss/preference"], metrics_after["loss/preference"]
    assert_close(after, loss, rtol=1e-4, atol=1e-4)  # of sums near 50
    for name in (name for name in metrics if name.startswith("rewards/")):
        assert_close(metrics_after[name], metrics[name], atol=1e-4)


# --- what is dropped ------------------------------------------------------------------


def spoiled(case, arrays, value):
    """The arrays with `value` in everything that `case.kept` drops."""
    out = {}
    for name, x in arrays.items():
        if x.dtype == bool:
            out[name] = x
            continue
        kept = case.kept
        if not case.inputs[name].of_responses and kept.ndim > x.ndim:
            continue
        kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
        out[name] = np.where(kept, x, value)
    return out


@every_loss
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_dropped_is_zero_and_changes_nothing_whatever_it_holds(case, value):
    arrays, results, gradients = usual(case.id)
    bad = spoiled(case, arrays, value)
    assert any(not np.isfinite(x).all() for x in bad.values())
    after, after_gradients = value_and_gradient(case, bad, case.kept)
    assert_same(after, results)
    assert_same(after_gradients, gradients)
    dropped = ~case.kept
    assert not np.asarray(gradients[case.first])[dropped].any()
    whole = dropped.all(-1) if case.kind == "list" else dropped
    assert whole.any()
    for x in jax.tree.leaves(results):
        assert not np.asarray(x)[whole].any()


@every_loss
def test_if_all_is_dropped_all_is_zero(case):
    arrays = {
        k: x if x.dtype == bool else np.full_like(x, np.nan)
        for k, x in case.draw(7).items()
    }
    results = value_and_gradient(case, arrays, np.zeros_like(case.kept))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(results))


@every_loss
def test_one_that_is_left_has_its_own_loss(case):
    arrays, where = case.draw(8), np.zeros_like(case.kept)
    where[2] = True
    loss, metrics = case.call(arrays, where)
    expected = case.expected_loss(arrays, where)
    assert not np.delete(expected, 2).any()
    assert_close(loss, expected)
    assert_close(metrics, case.expected_metrics(arrays, where))


@every_loss
def test_nan_that_counts_stays(case):
    arrays = case.draw(9)
    arrays[case.first].reshape(BATCH, -1)[0, 0] = np.nan
    loss, _ = case.call(arrays, case.kept)
    assert np.isnan(loss[0])
    assert case.of_batch or np.isfinite(loss[1:]).all()


# --- extremes -------------------------------------------------------------------------


def with_rewards(case, rewards):
    """Inputs whose log-ratios or rewards are given; log-probabilities stay below 0."""
    arrays = case.draw(10, (len(rewards),))
    if case.kind == "response":
        rewards = rewards[:, 0]
    if "anchor_errors" in arrays:
        arrays["anchor_errors"] = np.zeros_like(rewards)
    if "logps" not in case.first:
        return arrays | {case.first: rewards}
    top = rewards.max()
    arrays[case.first] = rewards - top
    if "anchor_logps" in arrays:
        arrays["anchor_logps"] = np.full_like(rewards, -top)
    return arrays


@every_loss
def test_huge_rewards_have_a_finite_loss_and_gradient(case):
    large = 1e4
    rows = [[0, 0], [1, -1], [-1, 1], [1, 1], [-1, -1], [0, 1], [1, 0], [0, -1]]
    rewards = large * np.array(rows, float)  # of 8, as the other batches
    if case.kind == "list":
        rewards = np.concatenate([rewards, rewards[::-1]], axis=-1)
    arrays = with_rewards(case, rewards)
    for where in (None, case.kept):
        (loss, metrics), gradients = value_and_gradient(case, arrays, where)
        assert_close(loss, case.expected_loss(arrays, where))
        for x in (*metrics.values(), gradients[case.first]):
            assert np.isfinite(x).all()
    narrow = {
        k: x if x.dtype == bool else jnp.asarray(x, jnp.bfloat16)
        for k, x in arrays.items()
    }
    (loss, _), gradients = value_and_gradient(case, narrow)
    for x in (loss, gradients[case.first].astype(jnp.float32)):
        assert np.isfinite(x).all()


LEVELS = np.array([0.5, 0.0, -0.75, 2.0, -2.0, 0.25, 1.0, -1.5])[:, None]


@every_loss
def test_ties_have_the_oracles_loss_and_count_one_half(case):
    width = 4 if case.kind == "list" else 2
    arrays = with_rewards(case, np.repeat(LEVELS, width, axis=1))
    if "lengths" in arrays:
        arrays["lengths"] = np.full_like(arrays["lengths"], 3.0)
    for name in ("kl", "delta"):
        if name in arrays:
            arrays[name] = arrays[case.first]
    if "anchor_errors" in arrays:  # with a beta of 1/2 the reward is the error, the kl
        arrays["anchor_errors"] = 3 * arrays[case.first]
    if case.kind == "response" and "labels" in arrays:
        arrays["labels"] = np.full_like(arrays["labels"], 0.5)
    (loss, metrics), gradients = value_and_gradient(case, arrays)
    assert_close(loss, case.expected_loss(arrays))
    if "rewards/accuracy" in metrics:
        np.testing.assert_array_equal(metrics["rewards/accuracy"], [0.5] * BATCH)
    assert np.isfinite(gradients[case.first]).all()


# --- equal forms ----------------------------------------------------------------------


@every_loss
def test_jit_on_eight_devices_and_vmap_give_the_same_values(case):
    arrays, expected, _ = usual(case.id)
    mesh = jax.make_mesh((BATCH,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(
        (jax.tree.map(np.float32, arrays) | flags(arrays), case.kept),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(placed))
    assert_close(jax.device_get(jax.jit(case.call)(*placed)), expected)
    if not case.of_batch:
        assert_close(jax.vmap(case.call)(arrays, case.kept), expected)
        return
    twice = jax.tree.map(lambda x: np.stack([x, x[::-1]]), (arrays, case.kept))
    both = jax.vmap(case.call)(*twice)
    assert_close(jax.tree.map(lambda x: x[0], both), expected)
    assert_close(jax.tree.map(lambda x: x[1, ::-1], both), expected)


def flags(arrays):
    return {k: x for k, x in arrays.items() if x.dtype == bool}


@cases(lambda case: not case.of_batch)
def test_any_leading_axes_agree(case):
    arrays, expected, _ = usual(case.id)

    def shaped(tree, *leading):
        return jax.tree.map(lambda x: np.reshape(x, (*leading, *x.shape[1:])), tree)

    got = case.call(shaped(arrays, 4, 2), shaped(case.kept, 4, 2))
    assert_close(got, shaped(expected, 4, 2))
    # One alone has no axis left; its values are those of vmap, above.
    first = jax.tree.map(lambda x: x[0], (arrays, case.kept))
    alone = jax.eval_shape(case.call, *first)
    assert {x.shape for x in jax.tree.leaves(alone)} == {()}


@cases(lambda case: not case.of_batch)
def test_where_is_broadcast(case):
    arrays = case.draw(11, (4, 2))
    where = np.array([[True], [False], [True], [True]])
    if case.kind == "list":
        where = ITEMS_KEPT[:4, None]
    full = np.broadcast_to(where, (4, 2, *where.shape[2:]))
    assert_same(case.call(arrays, where), case.call(arrays, full))


@every_loss
def test_permuting_the_batch_permutes_the_results(case):
    arrays, results, _ = usual(case.id)
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    permuted = {name: x[order] for name, x in arrays.items()}
    got = case.call(permuted, case.kept[order])
    assert_close(got, jax.tree.map(lambda x: x[order], results))


# Which outcomes of one kind meet depends on their order, by its name.
@cases(lambda case: case.kind == "list" and case.name != "matched_outcomes_loss")
def test_permuting_the_items_with_their_labels_changes_nothing(case):
    arrays, results, gradients = usual(case.id)
    order = np.array([0, 3, 1, 2] if case.name == "sdpo_loss" else [2, 3, 1, 0])
    permuted = {name: x[:, order] for name, x in arrays.items()}
    got = value_and_gradient(case, permuted, case.kept[:, order])
    expected = {k: np.asarray(x)[:, order] for k, x in gradients.items()}
    assert_close(got, (results, expected))


@cases(lambda case: case.kind == "pair")
def test_swapping_the_pair_negates_the_margin(case):
    arrays, (_, metrics), _ = usual(case.id)
    swapped = {
        k: x[:, ::-1] if case.inputs[k].of_responses else x for k, x in arrays.items()
    }
    _, got = case.call(swapped, case.kept)
    assert_close(got["rewards/margin"], -metrics["rewards/margin"])
    assert_close(got["rewards/chosen"], metrics["rewards/rejected"])
    flipped = np.where(case.kept, 1 - metrics["rewards/accuracy"], 0.0)
    np.testing.assert_array_equal(got["rewards/accuracy"], flipped)


@cases(lambda case: any(isinstance(x, float) for x in case.options.values()))
def test_numbers_may_be_arguments_of_what_is_compiled(case):
    """A schedule of beta compiles once."""
    arrays, results, _ = usual(case.id)
    numbers = {k: x for k, x in case.options.items() if isinstance(x, float)}

    def call(numbers):
        traced = dataclasses.replace(case, options=case.options | numbers)
        return traced.call(arrays, case.kept)

    assert_close(jax.jit(call)(numbers), results)


# --- errors ---------------------------------------------------------------------------


def of_width(case, width):
    shape = (BATCH, width) if case.kind != "response" else (BATCH,)
    return case.draw(0) | {
        k: np.zeros(shape) for k in {case.first} | ANCHORS if k in case.inputs
    }


@cases(lambda case: case.kind == "pair")
def test_a_pair_has_two_responses(case):
    message = rf"`{case.first}` needs a last axis of 2 .*; got f32\[8, 3\].\n.*listwise"
    with pytest.raises(ValueError, match=message):
        case.call(of_width(case, 3))


@cases(lambda case: case.kind == "list" and case.first == "rewards")
def test_a_list_has_at_least_two_responses(case):
    message = r"`rewards` needs a last axis of at least 2 responses; got f32\[8, 1\]"
    with pytest.raises(ValueError, match=message):
        case.call(case.draw(0, num_responses=1))
    with pytest.raises(ValueError, match=r"at least 2 responses; got f32\[\]"):
        case.call({name: np.float64(0.0) for name in case.inputs})


@every_loss
def test_the_first_argument_is_of_floats_and_the_only_one_by_position(case):
    arrays = case.draw(0)
    integers = {k: x.astype(int) if x.dtype != bool else x for k, x in arrays.items()}
    with pytest.raises(TypeError, match=f"`{case.first}` needs floating-point numbers"):
        case.call(arrays | {case.first: integers[case.first]})
    others = [x for k, x in arrays.items() if k != case.first]
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        getattr(losses, case.name)(
            arrays[case.first], *others, None, **case.options, where=None
        )


@every_loss
def test_where_is_boolean_and_of_the_shape(case):
    arrays = case.draw(0)
    with pytest.raises(TypeError, match="`where` is inclusion and needs booleans; got"):
        case.call(arrays, case.kept.astype(float))
    with pytest.raises(ValueError, match=r"`where` needs a shape that broadcasts to"):
        case.call(arrays, np.ones((BATCH + 1, *case.kept.shape[1:]), bool))


def others_of_a_shape():
    for case in CASES:
        for name in case.inputs:
            if name not in {case.first} | ANCHORS:
                yield pytest.param(case, name, id=f"{case.id}-{name}")


@pytest.mark.parametrize(("case", "name"), list(others_of_a_shape()))
def test_what_belongs_to_responses_broadcasts_to_their_shape(case, name):
    arrays = case.draw(0)
    wrong = np.zeros((BATCH + 1, *arrays[name].shape[1:]), arrays[name].dtype)
    message = rf"`{name}` needs a shape that broadcasts to \(8.*; got .*\[9"
    with pytest.raises(ValueError, match=message):
        case.call(arrays | {name: wrong})


@cases(lambda case: ANCHORS & set(case.inputs))
def test_the_anchor_is_of_the_shape_and_kind_of_the_policy(case):
    arrays = case.draw(0)
    name = f"anchor_{case.first}"
    with pytest.raises(ValueError, match=f"`{name}` needs the shape of `{case.first}`"):
        case.call(arrays | {name: arrays[name][:1]})
    integers = arrays[name].astype(int)
    with pytest.raises(TypeError, match=f"`{name}` needs floating-point numbers"):
        case.call(arrays | {name: integers})


@cases(lambda case: "beta" in case.options)
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_beta_is_positive_and_finite(case, beta):
    wrong = case.options | {"beta": beta}
    function = getattr(losses, case.name)
    arrays = case.draw(0)
    first = arrays.pop(case.first)
    message = f"`beta` must be positive and finite; got {beta}"
    with pytest.raises(ValueError, match=message):
        function(first, **arrays, **wrong)


@cases(lambda case: "label_smoothing" in case.options)
@pytest.mark.parametrize("smoothing", [-0.1, 0.6])
def test_label_smoothing_is_at_most_one_half(case, smoothing):
    arrays = case.draw(0)
    first = arrays.pop(case.first)
    options = case.options | {"label_smoothing": smoothing}
    message = rf"`label_smoothing` must lie in \[0.0, 0.5\] .*; got {smoothing}"
    with pytest.raises(ValueError, match=message):
        getattr(losses, case.name)(first, **arrays, **options)


# --- derivatives as JAX sees them (slow, so last) -------------------------------------


@cases(lambda case: not case.stopped)
def test_the_second_derivative_is_that_of_the_first(case):
    with jax.enable_x64(True):
        arrays = {k: jnp.asarray(x) for k, x in case.draw(6).items()}
        first = arrays.pop(case.first)

        def total(x):
            return case.call({case.first: x} | arrays)[0].sum()

        jax.test_util.check_grads(
            jax.grad(total), (first,), order=1, modes=["fwd"], rtol=1e-4, atol=1e-4
        )
