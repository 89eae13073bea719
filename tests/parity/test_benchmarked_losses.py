"""What the benchmark times beside each other is the same loss of the same numbers."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

import loss_variants  # noqa: E402

CASES = {name: case for name, case in loss_variants.cases(0).items() if case.trl}
# TRL's method computes one term of these, times the weight that it has in the loss.
TERMS = {"cpo_loss": ("loss/preference", 1.0), "orpo_loss": ("loss/odds_ratio", 0.1)}


@pytest.fixture(scope="module")
def trl():
    return loss_variants.trl_losses()


@pytest.mark.parametrize("name", CASES)
def test_what_is_timed_is_one_loss(name, trl):
    case = CASES[name]
    ours = loss_variants.value_and_gradient(case)
    (loss, metrics), gradient = jax.jit(ours)(case.array)
    theirs, their_gradient = loss_variants.trl_value_and_gradient(case, trl)(
        np.asarray(case.array)
    )
    if name in TERMS:
        term, weight = TERMS[name]
        np.testing.assert_allclose(weight * metrics[term], theirs, rtol=1e-5)
        return
    np.testing.assert_allclose(loss, theirs, rtol=1e-5)
    scale = np.abs(their_gradient).max()
    # AOT's gaps of one rank nearly cancel; both sides are float32.
    np.testing.assert_allclose(gradient, their_gradient, atol=5e-4 * float(scale))
