"""Anchors: frozen, live or stored, and the same either way."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
from pref_jax import anchors
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
