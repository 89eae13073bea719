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
      frozen: what they stand on and is not trained, such as the base under adapters;
        `()` where all is trained. Never donated, copied or saved.
      opt_state: of the optimiser.
      rng: the run's key. A use folds in the step and a constant of its own.
      anchor: parameters of the anchor, or `()`: the batch carries its logps, the method
        has none, or it is the base, `frozen` alone.
      data: i32[], number of the next batch.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    rng: jax.Array
    anchor: PyTree
    data: jax.Array
    frozen: PyTree = ()


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array,
    anchor: PyTree = (),
    frozen: PyTree = (),
) -> TrainState:
    """A state before the first update. Copies what it is given: steps donate it.

    All but `frozen`, of which the state holds the arrays that it is given.

    Args:
      params: of the policy; what is trained of them.
      optimizer: whose state to start.
      rng: typed key, `jax.random.key(seed)`.
      anchor: parameters of the anchor or `()`; beside `frozen` in the layout of
        `params`.
      frozen: what is not trained of the policy, or `()`.
    """
    params, anchor, rng = jax.tree.map(jnp.copy, (params, anchor, rng))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=rng,
        anchor=anchor,
        data=jnp.zeros((), jnp.int32),
        frozen=frozen,
    )
