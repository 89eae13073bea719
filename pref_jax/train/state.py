"""The state of a training run: everything that a checkpoint holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from pref_jax.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one train step takes and returns.

    Attributes:
      step: i32[], updates done.
      params: the trained parameters, float32.
      opt_state: of the optimiser.
      rng: the run's key. A use folds in the step and a constant of its own.
      anchor: frozen parameters, or `()` when the batch carries the anchor's logps or
        the method has none.
      data: i32[], number of the next batch.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    rng: jax.Array
    anchor: PyTree
    data: jax.Array


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array,
    anchor: PyTree = (),
) -> TrainState:
    """A state before the first update. Copies what it is given: steps donate it.

    Args:
      params: of the policy.
      optimizer: whose state to start.
      rng: typed key, `jax.random.key(seed)`.
      anchor: frozen parameters or `()`.
    """
    params, anchor, rng = jax.tree.map(jnp.copy, (params, anchor, rng))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=rng,
        anchor=anchor,
        data=jnp.zeros((), jnp.int32),
    )
