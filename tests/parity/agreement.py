"""What it means that a loss is TRL's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch


def assert_same(ours, theirs, array):
    """Two functions of one array have the same value and gradient, in float64.

    Args:
      ours: jax array -> number.
      theirs: torch tensor -> number.
      array: of NumPy.
    """
    with jax.enable_x64(True):
        value, gradient = jax.device_get(jax.value_and_grad(ours)(jnp.asarray(array)))
    tensor = torch.tensor(array, requires_grad=True)
    expected = theirs(tensor)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert np.abs(gradient).max() > 1e-4
