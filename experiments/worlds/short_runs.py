"""Many short trainings that differ in numbers: one compiled step for all of them.

A stage (`Pipeline.train`) keeps checkpoints and metrics of one long training, and
compiles its learning rate into its step. Here rates, betas and weights are arguments,
and a run is kept by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from pref_jax.method import Method, objective
from pref_jax.train import sharding
from pref_jax.train.step import weighted_mean
from pref_jax.types import PyTree

Loss = Callable[[PyTree, PyTree, PyTree, PyTree], jax.Array]
"""(params, anchor_params, batch, setting) -> f32[]; the numbers of `setting` traced."""


def method_loss(method: Method, model, params, anchor_params, batch) -> jax.Array:
    """The loss of a method on a batch, averaged as `train.step` does: f32[]."""
    return weighted_mean(*objective(method, model, params, anchor_params, batch)[:2])


def towards(anchor_params: PyTree, weight) -> optax.GradientTransformation:
    """Weight decay to given parameters in the place of 0, decoupled as AdamW's.

    Stands where `optax.add_decayed_weights` would.

    Args:
      anchor_params: that parameters decay to, such as those before training (L2-SP).
      weight: strength, as of weight decay.
    """

    def update(updates, params):
        return jax.tree.map(
            lambda u, p, a: u + weight * (p - a), updates, params, anchor_params
        )

    return optax.stateless(update)


def adamw(
    schedule, *decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Clip at norm 1, Adam, what decays, and a schedule that may be traced.

    Args:
      schedule: learning rate, a number or a function of the updates done.
      *decay: transformations between Adam and the rate, such as `towards`.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        *decay,
        optax.scale_by_learning_rate(schedule),
    )


class ShortRuns:
    """Trainings by one loss and one optimiser, compiled once a shape of the batches.

    Args:
      mesh: that batches are placed on.
      loss: of a batch.
      optimizer: (setting, anchor parameters) -> an optax transformation.
    """

    def __init__(self, mesh: jax.sharding.Mesh, loss: Loss, optimizer: Callable):
        self._mesh, self._optimizer = mesh, optimizer

        def step(params, opt_state, anchor, batch, setting):
            grads = jax.grad(loss)(params, anchor, batch, setting)
            updates, opt_state = optimizer(setting, anchor).update(
                grads, opt_state, params
            )
            return optax.apply_updates(params, updates), opt_state

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def train(
        self,
        params: PyTree,
        batches: Iterable[PyTree],
        setting: PyTree,
        *,
        anchor: PyTree = (),
        watch: Callable[[int, PyTree], bool] | None = None,
    ) -> PyTree:
        """Parameters after an update on each batch.

        Args:
          params: to start from; they stay as they are.
          batches: host batches, in order.
          setting: numbers, whose leaves are traced.
          anchor: parameters that do not change, for loss and optimiser.
          watch: (updates done, parameters) -> whether to stop; called before the first
            update and after each. Parameters that it keeps must be copies.
        """
        setting = jax.tree.map(jnp.float32, setting)
        with jax.set_mesh(self._mesh):
            params = jax.tree.map(jnp.copy, params)
            opt_state = self._optimizer(setting, anchor).init(params)
            if watch is not None and watch(0, params):
                return params
            for number, batch in enumerate(batches, start=1):
                placed = sharding.place_batch(self._mesh, batch)
                params, opt_state = self._step(
                    params, opt_state, anchor, placed, setting
                )
                if watch is not None and watch(number, params):
                    break
        return params
