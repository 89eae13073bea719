"""Anchors: frozen, live or stored, and the same either way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
from pref_jax import anchors, logps
from pref_jax.types import Scores


@functools.cache
def batch():
    return fixtures.pack_all(fixtures.random_groups(0, 4, 2), 40, spare_groups=1)


@functools.cache
def compiled(anchor):
    return jax.jit(functools.partial(anchor.scores, fixtures.decoder()))


FIXED, NONE = anchors.fixed(), anchors.none()
POLICY = Scores(logp=jnp.zeros(()))


def test_a_live_anchor_scores_the_batch_with_its_own_parameters():
    params = fixtures.random_params(3)
    got = compiled(FIXED)(params, batch(), POLICY).logp
    expected = fixtures.scorer()(params, batch()).logp
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert np.asarray(got).any()


def test_stored_logps_are_used_and_the_model_is_not():
    stored = np.random.default_rng(0).standard_normal(batch().loss_mask.shape)
    stored = stored.astype(np.float32)
    spoiled = np.where(batch().loss_mask, stored, np.nan)
    with_logps = dataclasses.replace(batch(), extras={"anchor_logps": spoiled})
    for params in ((), fixtures.random_params(3)):
        got = FIXED.scores(None, params, with_logps, POLICY)
        expected = np.where(batch().loss_mask, stored, 0.0)
        np.testing.assert_array_equal(got.logp, expected)


def test_an_anchor_without_parameters_or_stored_logps_is_an_error():
    with pytest.raises(ValueError, match="either anchor parameters or stored logps in"):
        FIXED.scores(fixtures.decoder(), (), batch(), POLICY)


def test_an_anchor_scores_as_the_method_does():
    """Another `score` is used for the anchor when it is given."""

    def entropy(model, params, batch):
        return logps.response_scores(model, params, batch, want=("entropy",))

    anchor = anchors.fixed(entropy)
    params = fixtures.random_params(3)
    got = compiled(anchor)(params, batch(), POLICY)
    expected = fixtures.scorer(("entropy",))(params, batch())
    assert got.logp is None
    np.testing.assert_allclose(got.entropy, expected.entropy, rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_what_an_anchor_is_made_of():
    params = fixtures.random_params(3)
    logp = jnp.ones(batch().loss_mask.shape)
    stored = dataclasses.replace(batch(), extras={"anchor_logps": logp})

    def live(params):
        return FIXED.scores(fixtures.decoder(), params, batch(), POLICY).logp.sum()

    def cached(logp):
        extras = {"anchor_logps": logp}
        both = dataclasses.replace(stored, extras=extras)
        return FIXED.scores(None, (), both, POLICY).logp.sum()

    def zeros(logp):
        scores = NONE.scores(None, (), batch(), Scores(logp=logp))
        return (1.0 + scores.logp).sum()

    grads = (
        jax.jit(jax.grad(live))(params),
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
    params, kept = fixtures.random_params(1), fixtures.random_params(3)
    assert anchor.refresh(params, jnp.asarray(7), kept) is kept
    assert anchor.refresh(params, jnp.asarray(7), ()) == ()
