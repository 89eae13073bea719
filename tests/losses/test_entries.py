"""What all losses share at their door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.losses import entries


def test_what_is_dropped_is_filled_over_any_number_of_axes():
    where = jnp.array([True, False])
    array = jnp.full((2, 2, 3), jnp.nan).at[0].set(5.0)
    filled = entries.fill(array, where, 7.0)
    np.testing.assert_array_equal(filled, [np.full((2, 3), 5.0), np.full((2, 3), 7.0)])
    np.testing.assert_array_equal(entries.fill(array[..., 0, 0], where), [5.0, 0.0])
    assert entries.fill(array, None) is array


def test_nothing_that_is_dropped_lets_a_gradient_through():
    def total(array):
        return jnp.square(entries.fill(array, jnp.array([True, False]))).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([3.0, jnp.inf])), [6.0, 0])


def test_a_constant_takes_shape_and_type_of_what_it_belongs_to():
    like = jnp.zeros((2, 3), jnp.float32)
    constant = entries.read_constant("x", np.arange(3), like=like, of="rewards")
    assert constant.dtype == jnp.float32
    np.testing.assert_array_equal(constant, [[0, 1, 2], [0, 1, 2]])
    with pytest.raises(ValueError, match=r"`x` needs a shape .* that of `rewards`"):
        entries.read_constant("x", np.arange(2), like=like, of="rewards")


def test_a_length_is_at_least_one():
    like = jnp.zeros(3)
    lengths = entries.read_lengths(np.array([0, 1, 5]), like=like, of="logps")
    np.testing.assert_array_equal(lengths, [1.0, 1.0, 5.0])


def test_numbers_that_are_there_are_all_equal_or_not():
    values = np.array([[2.0, 2.0, 5.0], [2.0, 2.5, 2.0], [-1.0, 7.0, 9.0]])
    there = np.array([[True, True, False], [True, True, True], [False, False, False]])
    found = entries.all_equal(values, there, -1)
    assert found.tolist() == [[True], [False], [True]]
    assert entries.all_equal(values, there, (0, 1)).tolist() == [[False]]
    assert entries.all_equal(values, there & (values == 2), (0, 1)).tolist() == [[True]]
    assert entries.all_equal(-values, there, -1).tolist() == found.tolist()
    assert entries.all_equal(values[:, :0], there[:, :0], -1).all()
