"""Losses of demonstrations."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from pref_jax.losses.supervised import nll_loss
from pref_jax.train.step import weighted_mean


def fixed_logps(i: int, t: int) -> float:
    return -(0.3 + 0.1 * ((5 * i**2 + 3 * t + i) % 11))


def test_the_token_mean_of_fixed_logps_is_trls():
    """TRL 1.16.0, DPOTrainer with the loss "sft": the token mean of the chosen."""
    lengths = [4, 3, 2, 5]
    logps = np.array([[fixed_logps(i, t) for t in range(6)] for i in range(4)])
    # Two prompt tokens; shifted position t predicts token t + 1.
    where = np.array([[0 <= t - 1 < n for t in range(6)] for n in lengths])
    loss, _ = nll_loss(jnp.asarray(logps, jnp.float32), where=where)
    got = weighted_mean(loss, jnp.asarray(where, jnp.float32))
    assert float(got) == pytest.approx(0.8285714, abs=1e-6)
    assert oracles.weighted_mean(-logps, where) == pytest.approx(0.8285714, abs=1e-7)


logps_and_masks = st.lists(
    st.tuples(st.floats(-30, 0, width=32), st.booleans()), min_size=1, max_size=6
)


@given(entries=logps_and_masks)
def test_the_loss_is_the_oracles(entries):
    logps, where = map(list, zip(*entries, strict=True))
    loss, metrics = nll_loss(jnp.array(logps), where=jnp.array(where))
    np.testing.assert_allclose(loss, oracles.nll(logps, where), rtol=1e-6)
    assert metrics == {}


@given(entries=logps_and_masks)
def test_masked_tokens_change_neither_loss_nor_gradient(entries):
    logps, where = (jnp.array(list(x)) for x in zip(*entries, strict=True))
    spoiled = jnp.where(where, logps, jnp.nan)

    def total(x):
        return nll_loss(x, where=where)[0].sum()

    np.testing.assert_array_equal(total(spoiled), total(logps))
    gradient = jax.grad(total)(spoiled)
    np.testing.assert_array_equal(gradient, -where.astype(jnp.float32))


def test_without_a_mask_every_token_counts_and_nan_stays():
    loss, _ = nll_loss(jnp.array([-1.5, jnp.nan]))
    assert loss[0] == 1.5 and np.isnan(loss[1])


def test_leading_axes_vmap_and_jit_agree():
    rng = np.random.default_rng(0)
    logps = -rng.random((2, 3, 4), np.float32)
    where = rng.random((2, 3, 4)) < 0.5
    expected, _ = nll_loss(logps, where=where)
    assert expected.shape == (2, 3, 4)
    jitted, _ = jax.jit(lambda x, m: nll_loss(x, where=m))(logps, where)
    mapped, _ = jax.vmap(jax.vmap(lambda x, m: nll_loss(x, where=m)))(logps, where)
    np.testing.assert_array_equal(jitted, expected)
    np.testing.assert_array_equal(mapped, expected)


def test_the_gradient_is_minus_one_a_token():
    with jax.enable_x64(True):
        logps = jnp.array([-0.5, -2.0, -8.0])
        jax.test_util.check_grads(lambda x: nll_loss(x)[0], (logps,), order=2)
        gradient = jax.grad(lambda x: nll_loss(x)[0].sum())(logps)
        assert gradient.dtype == jnp.float64 and (gradient == -1).all()


def test_bfloat16_becomes_float32():
    loss, _ = nll_loss(jnp.array([-1.0, -2.5], jnp.bfloat16))
    assert loss.dtype == jnp.float32
    assert loss.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("logps", "where", "error", "message"),
    [
        (np.zeros(3, int), None, TypeError, "`token_logps` needs floating-point"),
        (np.zeros(3), np.ones(3), TypeError, "`where` is inclusion and needs booleans"),
        (np.zeros(3), np.ones(2, bool), ValueError, r"broadcasts to \(3,\), that of"),
        (np.zeros(3), np.ones((2, 3), bool), ValueError, r"got bool\[2, 3\]"),
    ],
)
def test_wrong_arguments_are_named(logps, where, error, message):
    with pytest.raises(error, match=message):
        nll_loss(logps, where=where)
