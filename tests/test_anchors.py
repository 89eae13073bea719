"""Anchors: frozen, live or stored, and the same either way."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import loss_oracles
from pref_jax import anchors, losses, rewards
from pref_jax.method import Method
from pref_jax.types import Scores


@functools.cache
def batch():
    return fixtures.pack_all(fixtures.random_groups(0, 4, 2), 40, spare_groups=1)


def halved(model, params, batch):
    """A score that is not the default: half of the one parameter, on every target."""
    assert model == "model"
    return Scores(logp=jnp.where(batch.loss_mask, 0.5 * params["x"], 0.0))


FIXED, NONE = anchors.fixed(halved), anchors.none()
POLICY = Scores(logp=jnp.zeros(()))


def test_a_live_anchor_scores_the_batch_as_the_method_does():
    got = FIXED.scores("model", {"x": jnp.asarray(-3.0)}, batch(), POLICY)
    np.testing.assert_array_equal(got.logp, np.where(batch().loss_mask, -1.5, 0.0))


def test_the_default_score_of_an_anchor_is_that_of_a_method():
    default = inspect.signature(anchors.fixed).parameters["score"].default
    assert default is Method.score


def test_stored_logps_are_used_and_the_model_is_not():
    stored = np.random.default_rng(0).standard_normal(batch().loss_mask.shape)
    stored = stored.astype(np.float32)
    spoiled = np.where(batch().loss_mask, stored, np.nan)
    with_logps = dataclasses.replace(batch(), extras={"anchor_logps": spoiled})
    for params in ((), {"x": jnp.asarray(-3.0)}):
        got = FIXED.scores(None, params, with_logps, POLICY)
        expected = np.where(batch().loss_mask, stored, 0.0)
        np.testing.assert_array_equal(got.logp, expected)


def test_an_anchor_without_parameters_or_stored_logps_is_an_error():
    with pytest.raises(ValueError, match="either anchor parameters or stored logps in"):
        FIXED.scores("model", (), batch(), POLICY)


def test_no_gradient_reaches_what_an_anchor_is_made_of():
    params = {"x": jnp.asarray(-3.0)}
    logp = jnp.ones(batch().loss_mask.shape)
    stored = dataclasses.replace(batch(), extras={"anchor_logps": logp})

    def live(params):
        return FIXED.scores("model", params, batch(), POLICY).logp.sum()

    def cached(logp):
        extras = {"anchor_logps": logp}
        both = dataclasses.replace(stored, extras=extras)
        return FIXED.scores(None, (), both, POLICY).logp.sum()

    def zeros(logp):
        scores = NONE.scores(None, (), batch(), Scores(logp=logp))
        return (1.0 + scores.logp).sum()

    grads = (
        jax.grad(live)(params),
        jax.grad(cached)(logp),
        jax.grad(zeros)(logp),
    )
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads))


def test_no_anchor_is_a_logp_of_zero_for_every_field_that_is_there():
    policy = Scores(logp=jnp.full((2, 2, 3), -1.5), entropy=jnp.ones((2, 2, 3)))
    got = NONE.scores(None, (), None, policy)
    assert got.logsumexp is None
    np.testing.assert_array_equal(got.logp, np.zeros((2, 2, 3)))
    np.testing.assert_array_equal(got.entropy, np.zeros((2, 2, 3)))


@pytest.mark.parametrize("anchor", [FIXED, NONE], ids=["fixed", "none"])
def test_an_anchor_that_never_changes_is_kept_by_refresh(anchor):
    params, kept = {"x": jnp.asarray(1.0)}, {"x": jnp.asarray(-3.0)}
    assert anchor.refresh(params, jnp.asarray(7), kept) is kept
    assert anchor.refresh(params, jnp.asarray(7), ()) == ()


@pytest.mark.parametrize(
    "make",
    [anchors.fixed, functools.partial(anchors.snapshot, every=2)]
    + [functools.partial(anchors.ema, decay=0.5)],
    ids=["fixed", "snapshot", "ema"],
)
def test_no_gradient_passes_a_score_that_reads_more_than_its_parameters(make):
    def total(scale):
        def score(model, params, batch):
            return Scores(logp=scale * params["x"] * batch.loss_mask)

        params = {"x": jnp.asarray(-3.0)}
        return make(score=score).scores("model", params, batch(), POLICY).logp.sum()

    value, gradient = jax.value_and_grad(total)(2.0)
    assert float(value) == -6.0 * batch().loss_mask.sum() and float(gradient) == 0


def test_an_anchor_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FIXED.refresh = None


# --- anchors that move ----------------------------------------------------------------

MOVING = {
    "snapshot": anchors.snapshot(every=3, score=halved),
    "ema": anchors.ema(decay=0.75, score=halved),
}
every_moving = pytest.mark.parametrize("name", MOVING)


def test_a_snapshot_is_of_the_last_multiple():
    refresh = jax.jit(MOVING["snapshot"].refresh)
    anchor, found = {"x": jnp.float32(-1.0)}, []
    for step in range(1, 8):
        anchor = refresh({"x": jnp.float32(10.0 * step)}, step, anchor)
        found.append(float(anchor["x"]))
    assert found == [-1.0, -1.0, 30.0, 30.0, 30.0, 60.0, 60.0]
    every = anchors.snapshot(every=1).refresh
    assert float(every(jnp.float32(5.0), 1, jnp.float32(0.0))) == 5.0


def test_a_running_average_is_its_recursion():
    refresh = MOVING["ema"].refresh
    anchor, expected = {"x": jnp.array([2.0, -1.0])}, np.array([2.0, -1.0])
    for step in range(1, 5):
        params = np.array([step, step**2], np.float32)
        anchor = refresh({"x": jnp.asarray(params)}, step, anchor)
        expected = 0.75 * expected + 0.25 * params
        np.testing.assert_allclose(anchor["x"], expected, rtol=1e-6)
    policy = anchors.ema(decay=0.0).refresh(jnp.float32(5.0), 1, jnp.float32(2.0))
    assert float(policy) == 5.0


def test_a_running_average_of_what_does_not_move_is_exact():
    params = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    got = anchors.ema(decay=0.999).refresh(params, 1, params)
    np.testing.assert_array_equal(got, params)


@every_moving
def test_a_moving_anchor_scores_by_its_parameters_without_gradient(name):
    def total(params):
        scores = MOVING[name].scores("model", params, batch(), POLICY)
        return scores.logp.sum(), scores

    gradient, got = jax.grad(total, has_aux=True)({"x": jnp.asarray(-3.0)})
    np.testing.assert_array_equal(got.logp, np.where(batch().loss_mask, -1.5, 0.0))
    assert not gradient["x"].any()


@every_moving
def test_a_moving_anchor_takes_no_stored_logps_and_needs_parameters(name):
    stored = dataclasses.replace(
        batch(), extras={"anchor_logps": np.zeros(batch().loss_mask.shape)}
    )
    message = rf"`anchors.{name}` moves, .* `extras\['anchor_logps'\]` of one that does"
    with pytest.raises(ValueError, match=message):
        MOVING[name].scores("model", {"x": jnp.asarray(-3.0)}, stored, POLICY)
    message = f"`anchors.{name}` needs anchor parameters to start from; got none"
    with pytest.raises(ValueError, match=message):
        MOVING[name].scores("model", (), batch(), POLICY)
    with pytest.raises(ValueError, match=message):
        MOVING[name].refresh({"x": jnp.asarray(-3.0)}, 1, ())


@pytest.mark.parametrize("make", [anchors.snapshot, anchors.ema, anchors.fused])
def test_every_anchor_scores_as_a_method_does_unless_told(make):
    default = inspect.signature(make).parameters["score"].default
    assert default is Method.score


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: anchors.snapshot(every=0), "`every` must be 1 or more updates; got 0"),
        (lambda: anchors.ema(decay=1.0), r"`decay` must lie in \[0, 1\); got 1.0"),
        (lambda: anchors.ema(decay=-0.1), r"`decay` must lie in \[0, 1\); got -0.1"),
    ],
)
def test_options_of_moving_anchors_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- fusing source models -------------------------------------------------------------

FUSIONS = {
    "fuse_max_margin": anchors.fuse_max_margin,
    "fuse_average": anchors.fuse_average,
    "fuse_confidence": anchors.fuse_confidence,
}
every_fusion = pytest.mark.parametrize("name", FUSIONS)


def test_clipping_raises_the_chosen_and_lowers_the_rejected():
    sources = jnp.array([[[-3.0, -1.0, -2.0], [-3.0, -1.0, -2.0]]])
    got = anchors.clip_to_initial(sources, initial_logps=jnp.array([[-2.0, -2.5]]))
    assert got.tolist() == [[[-2.0, -1.0, -2.0], [-3.0, -2.5, -2.5]]]
    alone = anchors.clip_to_initial(sources[0], initial_logps=jnp.array([-2.0, -2.5]))
    assert alone.tolist() == got[0].tolist()


@pytest.mark.parametrize(
    ("sources", "initial", "message"),
    [
        (
            np.zeros((3, 4)),
            np.zeros(3),
            r"`source_logps` needs the shape .*f\d+\[3, 4\]",
        ),
        (np.zeros(2), np.zeros(()), r"`source_logps` needs the shape \[..., 2, M\] .*"),
        (np.zeros((2, 4)), np.zeros(4), "`initial_logps` needs the shape of `source_"),
    ],
)
def test_the_shapes_of_clipping_are_named(sources, initial, message):
    with pytest.raises(ValueError, match=message):
        anchors.clip_to_initial(sources, initial_logps=initial)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # e^-1 - e^-2 = 0.2325 > e^-2 - e^-3 > e^-2 - e^-2.5.
        ("fuse_max_margin", {}, -1.0),
        ("fuse_average", {}, -6.5 / 3),
        # Weights of 1/3, 1, 2/5, each times its own.
        ("fuse_confidence", {}, -3.0 / (1 / 3 + 1 + 2 / 5)),
        # Weights of 1/4, 1/2, 1/3.5.
        (
            "fuse_confidence",
            {"epsilon": 1.0},
            -(3 / 4 + 1 / 2 + 2.5 / 3.5) / (1 / 4 + 1 / 2 + 1 / 3.5),
        ),
    ],
)
def test_fusions_are_arithmetic(name, options, expected):
    got = FUSIONS[name](
        jnp.array([-3.0, -1.0, -2.5]), pivot_logps=jnp.array(-2.0), **options
    )
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_the_margin_is_of_probabilities_and_to_both_sides():
    """-9 is farther from -2 in nats, and e^-2 away; of -0.5, e^-0.5 - e^-2 = 0.47."""
    sources = jnp.array([[-9.0, -0.5], [-9.0, -1.9], [-1.9, -9.0]])
    got = anchors.fuse_max_margin(sources, pivot_logps=jnp.full(3, -2.0))
    assert got.tolist() == [-0.5, -9.0, -9.0]
    # Of equal margins the first is taken: here all probabilities are 0.
    got = anchors.fuse_max_margin(jnp.array([-9e8, -8e8]), pivot_logps=jnp.array(-1e8))
    assert got == np.float32(-9e8)


def test_close_probabilities_are_compared_without_cancelling():
    """One and two steps of float32 below the pivot, where exp rounds both to one."""
    pivot = np.float32(-0.02)
    near = np.nextafter(pivot, np.float32(-1))
    far = np.nextafter(near, np.float32(-1))
    assert np.exp(near) == np.exp(far)
    got = anchors.fuse_max_margin(jnp.array([near, far]), pivot_logps=jnp.array(pivot))
    assert got == far


@every_fusion
def test_a_fusion_is_the_oracles(name):
    rng = np.random.default_rng(0)
    sources = rng.uniform(-4, -0.1, (6, 3)).astype(np.float32)
    pivot = rng.uniform(-3, -0.5, 6).astype(np.float32)
    for where in ([True] * 3, [True, False, True]):
        spoiled = np.where(where, sources, np.nan)
        got = FUSIONS[name](spoiled, pivot_logps=pivot, where=np.array(where))
        options = {"pivot_logps": pivot} if name == "fuse_max_margin" else {}
        expected = getattr(loss_oracles, name)(sources, where=where, **options)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@every_fusion
def test_where_no_source_is_the_pivot_stands_in(name):
    sources = jnp.array([[-3.0, jnp.nan], [jnp.nan, jnp.nan]])
    where = jnp.array([[True, False], [False, False]])
    pivot = jnp.array([-1.0, -2.0])
    got = FUSIONS[name](sources, pivot_logps=pivot, where=where)
    np.testing.assert_allclose(got, [-3.0, -2.0], rtol=1e-6)


@every_fusion
def test_a_fusion_has_no_gradient_and_is_in_float32_or_wider(name):
    sources, pivot = jnp.array([[-3.0, -1.0]]), jnp.array([-2.0])
    gradients = jax.grad(
        lambda s, p: FUSIONS[name](s, pivot_logps=p).sum(), argnums=(0, 1)
    )(sources, pivot)
    assert not any(np.asarray(x).any() for x in gradients)
    alone = jax.grad(
        lambda p: FUSIONS[name](sources, pivot_logps=p, where=sources > 0).sum()
    )
    assert not alone(pivot).any()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (sources / 3, pivot / 3)]
    got = FUSIONS[name](narrow[0], pivot_logps=narrow[1])
    wide = [x.astype(jnp.float32) for x in narrow]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, FUSIONS[name](wide[0], pivot_logps=wide[1]))


def test_a_certain_source_has_a_finite_weight_and_nothing_is_surer():
    got = anchors.fuse_confidence(
        jnp.array([0.0, -1.0]), pivot_logps=jnp.array(-1.0), epsilon=1e-3
    )
    # Weights of 1000 and 1 / 1.001.
    expected = -(1 / 1.001) / (1000 + 1 / 1.001)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    got = anchors.fuse_confidence(
        jnp.array([0.5, -1.0]), pivot_logps=jnp.array(-1.0), epsilon=1.0
    )
    assert float(got) == pytest.approx((0.5 - 0.5) / 1.5, abs=1e-7)


@every_fusion
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source_logps": np.ones((4, 3), int)}, TypeError, "`source_logps` needs flo"),
        ({"pivot_logps": np.ones(4, int)}, TypeError, "`pivot_logps` needs floating"),
        (
            {"pivot_logps": np.ones(3)},
            ValueError,
            r"`pivot_logps` needs the shape of `source_logps`",
        ),
        ({"where": np.ones(3)}, TypeError, "`where` is inclusion and needs booleans"),
        (
            {"where": np.ones(4, bool)},
            ValueError,
            r"`where` needs a shape that broadcasts to \(4, 3\), that of `source_logps",
        ),
    ],
)
def test_the_arguments_of_fusions_are_named(name, change, error, message):
    arguments = {
        "source_logps": np.zeros((4, 3)),
        "pivot_logps": np.zeros(4),
        "where": None,
    } | change
    sources = arguments.pop("source_logps")
    with pytest.raises(error, match=message):
        FUSIONS[name](sources, **arguments)


def test_the_epsilon_of_confidence_is_positive():
    with pytest.raises(
        ValueError, match="`epsilon` must be positive and finite; got 0"
    ):
        anchors.fuse_confidence(np.zeros(2), pivot_logps=np.zeros(()), epsilon=0.0)


# --- the fused anchor -----------------------------------------------------------------

NUM_SOURCES = 3


@functools.cache
def scored_batch():
    """Pairs with what three sources say of each response; some did not score it."""
    rng = np.random.default_rng(0)
    groups = []
    for group in fixtures.random_groups(0, 4, 2):
        shape = (2, NUM_SOURCES)
        lengths = rng.integers(1, 9, shape).astype(np.float32)
        lengths[0, 1] = 0 if group.record == 1 else lengths[0, 1]
        lengths[1] = 0 if group.record == 2 else lengths[1]
        logps = np.where(lengths > 0, -3 * rng.random(shape) * lengths, np.nan)
        stored = tuple(-2 * rng.random(len(r)) for r in group.responses)
        extras = {"source_logps": logps.astype(np.float32), "source_lengths": lengths}
        extras["anchor_logps"] = stored
        groups.append(dataclasses.replace(group, extras=extras))
    return fixtures.pack_all(groups, 40, spare_groups=1)


def mean_of(logp):
    mask = scored_batch().loss_mask
    return (np.asarray(logp) * mask).sum(-1) / np.maximum(mask.sum(-1), 1)


def fused_by_hand(fuse, pivot, *, clip):
    """The oracle's fusion, one response at a time."""
    found = scored_batch()
    initial = mean_of(found.extras["anchor_logps"])
    out = initial.copy()
    for b, k in np.ndindex(initial.shape):
        lengths = found.extras["source_lengths"][b, k]
        where = (lengths > 0).tolist()
        if not any(where):
            continue
        logps = found.extras["source_logps"][b, k] / np.maximum(lengths, 1)
        if clip:
            pick = max if k == 0 else min
            logps = [pick(x, initial[b, k]) for x in logps]
        options = {"pivot_logps": [pivot[b, k]]} if fuse == "fuse_max_margin" else {}
        out[b, k] = getattr(loss_oracles, fuse)([logps], where=where, **options)[0]
    return out


def test_the_sources_of_these_tests_miss_some_responses():
    there = scored_batch().extras["source_lengths"] > 0
    valid = scored_batch().valid
    assert (there.any(-1) & ~there.all(-1)).any()
    assert (valid & ~there.any(-1)).any()
    assert np.isnan(scored_batch().extras["source_logps"]).any()


@every_fusion
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("pivot_is_policy", [True, False])
def test_the_fused_anchor_is_one_number_a_response(name, clip, pivot_is_policy):
    anchor = anchors.fused(
        FUSIONS[name], clip=clip, pivot_is_policy=pivot_is_policy, score=halved
    )
    found = scored_batch()
    rng = np.random.default_rng(9)
    policy = -4 * rng.random(found.loss_mask.shape).astype(np.float32)
    got = anchor.scores(None, (), found, Scores(logp=jnp.asarray(policy)))
    stored = found.extras["anchor_logps"]
    pivot = mean_of(policy if pivot_is_policy else stored)
    expected = fused_by_hand(name, pivot, clip=clip)
    np.testing.assert_allclose(got.mean_logp, expected, rtol=1e-5, atol=1e-6)
    assert got.logp is None
    assert anchor.refresh({"x": 1}, 3, "kept") == "kept"


def test_unless_told_a_fused_anchor_clips_and_measures_from_before_training():
    found = scored_batch()
    policy = jnp.full(found.loss_mask.shape, -9.0)
    got = anchors.fused().scores(None, (), found, Scores(logp=policy))
    initial = mean_of(found.extras["anchor_logps"])
    expected = fused_by_hand("fuse_max_margin", initial, clip=True)
    np.testing.assert_allclose(got.mean_logp, expected, rtol=1e-5, atol=1e-6)


def test_the_fused_anchor_starts_from_live_parameters_too():
    extras = {k: v for k, v in scored_batch().extras.items() if k != "anchor_logps"}
    live = dataclasses.replace(scored_batch(), extras=extras)
    params = {"x": jnp.asarray(-3.0)}
    logp = np.where(live.loss_mask, -1.5, 0.0).astype(np.float32)
    stored = dataclasses.replace(live, extras=extras | {"anchor_logps": logp})
    anchor = anchors.fused(score=halved)
    got = anchor.scores("model", params, live, Scores(logp=jnp.asarray(logp)))
    expected = anchor.scores(None, (), stored, Scores(logp=jnp.asarray(logp)))
    np.testing.assert_allclose(got.mean_logp, expected.mean_logp, rtol=1e-6)


def test_no_gradient_passes_a_fused_anchor():
    found = scored_batch()
    anchor = anchors.fused(pivot_is_policy=True)

    def total(logp, stored):
        extras = found.extras | {"anchor_logps": stored}
        with_stored = dataclasses.replace(found, extras=extras)
        return anchor.scores(None, (), with_stored, Scores(logp=logp)).mean_logp.sum()

    arrays = [jnp.full(found.loss_mask.shape, x) for x in (-1.0, -0.5)]
    gradients = jax.grad(total, argnums=(0, 1))(*arrays)
    assert not any(np.asarray(x).any() for x in gradients)


def test_no_gradient_passes_a_fusion_of_ones_own():
    found = scored_batch()

    def fuse(source_logps, *, pivot_logps, where):
        return jnp.where(where, source_logps, pivot_logps[..., None]).mean(-1)

    def total(source_logps):
        extras = found.extras | {"source_logps": source_logps}
        scored = dataclasses.replace(found, extras=extras)
        anchor = anchors.fused(fuse, clip=False)
        return anchor.scores(None, (), scored, POLICY).mean_logp.sum()

    value, gradient = jax.value_and_grad(total)(
        jnp.full(found.extras["source_logps"].shape, -1.0)
    )
    assert float(value) < 0 and not gradient.any()


@pytest.mark.parametrize("name", ["source_logps", "source_lengths"])
def test_a_fused_anchor_names_the_extra_that_is_missing(name):
    extras = {k: v for k, v in scored_batch().extras.items() if k != name}
    without = dataclasses.replace(scored_batch(), extras=extras)
    message = rf"`anchors.fused` needs `batch.extras\['{name}'\]`; the batch has anchor"
    with pytest.raises(ValueError, match=message):
        anchors.fused().scores(None, (), without, POLICY)
    with pytest.raises(
        ValueError, match="the batch has no extras. Score the responses"
    ):
        anchors.fused().scores(None, (), batch(), POLICY)


def test_one_source_without_clipping_is_length_normalized_dpo_against_it():
    found = scored_batch()
    lengths = np.maximum(found.loss_mask.sum(-1), 1).astype(np.float32)
    rng = np.random.default_rng(4)
    total = -3 * rng.random(lengths.shape).astype(np.float32) * lengths
    extras = {
        "source_logps": total[..., None],
        "source_lengths": lengths[..., None],
        "anchor_logps": found.extras["anchor_logps"],
    }
    one = dataclasses.replace(found, extras=extras)
    anchor, kept = anchors.fused(clip=False), one.valid.all(-1)

    def fused(logp):
        scores = Scores(logp=logp)
        frozen = anchor.scores(None, (), one, scores)
        reward = rewards.length_normalized_reward(scores, frozen, one, beta=2.0)
        return losses.logistic_loss(reward, where=kept)[0].sum()

    def dpo(logp):
        summed = jnp.where(one.loss_mask, logp, 0.0).sum(-1)
        options = {"anchor_logps": total, "lengths": lengths, "beta": 2.0}
        loss, _ = losses.length_normalized_dpo_loss(summed, **options, where=kept)
        return loss.sum()

    logp = -3 * jnp.asarray(rng.random(one.loss_mask.shape), jnp.float32)
    got, expected = (jax.value_and_grad(f)(logp) for f in (fused, dpo))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )
    assert np.asarray(got[1]).any()
