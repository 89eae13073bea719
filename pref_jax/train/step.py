"""The pure train step: gradients of a weighted mean over the whole global batch.

One reducer: every average of a run is `weighted_mean`, numerators and denominators
carried apart over micro-batches and divided once. jit, donation and shardings are
applied outside (`train.sharding.CompiledStep`), so a step can be vmapped.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pref_jax import checks
from pref_jax.method import Method, objective
from pref_jax.train.state import TrainState
from pref_jax.types import PyTree


def weighted_sum(values, weights):
    """(sum of weight * value, sum of weight); an entry of weight 0 counts as 0.

    A NaN of weight 0 is dropped, a NaN of another weight stays.
    """
    weights = jnp.broadcast_to(weights, values.shape)
    safe = jnp.where(weights == 0, 0.0, values)
    return (safe * weights).sum(), weights.sum()


def weighted_mean(values, weights):
    """Sum of weight * value over sum of weight; 0 where all weights are 0.

    >>> float(weighted_mean(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([1.0, 2.0, 0.0])))
    3.0
    """
    return _divide(*weighted_sum(values, weights))


def _divide(numerator, denominator):
    return numerator / jnp.where(denominator == 0, 1.0, denominator)


def split_batch(batch: PyTree, num_microbatches: int) -> PyTree:
    """Give every leaf a leading axis of micro-batches.

    Rows are dealt out in turn, row i to micro-batch i modulo their number, so that each
    micro-batch has rows of every device and none has to move.

    Raises:
      ValueError: the number of rows is not a multiple of the number of micro-batches.
    """
    num_rows = _num_rows(batch)
    if num_rows % num_microbatches:
        raise ValueError(
            f"{num_rows} rows cannot be split into {num_microbatches} micro-batches; "
            f"build the batches with `rows_multiple` a multiple of it."
        )

    def split(leaf):
        per_row = leaf.shape[0] // num_rows
        shape = (num_rows // num_microbatches, num_microbatches, per_row)
        dealt = leaf.reshape(*shape, *leaf.shape[1:]).swapaxes(0, 1)
        return dealt.reshape(num_microbatches, -1, *leaf.shape[1:])

    return jax.tree.map(split, batch)


def _num_rows(batch):
    return min(leaf.shape[0] for leaf in jax.tree.leaves(batch))


def _undo_split(leaf, num_rows):
    """[micro-batches, B / micro-batches] -> [B], in the order of the batch."""
    num_microbatches = leaf.shape[0]
    dealt = leaf.reshape(num_microbatches, num_rows // num_microbatches, -1)
    return dealt.swapaxes(0, 1).reshape(-1)


def policy_params(model, state: TrainState, params: PyTree = None) -> PyTree:
    """All parameters of the policy: the trained ones on what is frozen of it.

    Args:
      model: a `pref_jax.types.Model`.
      state: of the run.
      params: trained parameters in the place of the state's own.
    """
    params = state.params if params is None else params
    if not jax.tree.leaves(state.frozen):
        return params
    return model.combine(state.frozen, params)


def anchor_params(model, state: TrainState) -> PyTree:
    """All parameters of the anchor; without any of its own it is what is frozen."""
    if not jax.tree.leaves(state.frozen):
        return state.anchor
    if jax.tree.leaves(state.anchor):
        return model.combine(state.frozen, state.anchor)
    return state.frozen


def _sums(method: Method, model, params, anchor, batch):
    """Numerators and denominators, and which groups have a finite loss."""
    loss, weight, metrics = objective(method, model, params, anchor, batch)
    numerator, denominator = weighted_sum(loss, weight)
    sums = {"loss": (numerator, denominator)}
    sums |= {name: weighted_sum(*pair) for name, pair in metrics.items()}
    counted = jnp.where(weight == 0, 0.0, loss)
    finite = jnp.isfinite(counted).reshape(counted.shape[0], -1).all(axis=-1)
    return numerator, (sums, finite)


def make_train_step(
    method: Method,
    model,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    num_microbatches: int = 1,
    observe: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict]]:
    """One update by the gradient of the batch's weighted mean loss.

    Args:
      method: the five functions.
      model: a `pref_jax.types.Model`.
      optimizer: an optax transformation.
      schedule: the optimiser's learning rate by updates done, for the metrics.
      num_microbatches: parts of the batch that are computed one after the other; loss,
        metrics and gradient are those of the whole batch. With more than one, what
        looks across the batch (`losses.batch_coupled`) is an error.
      observe: batch -> arrays that the caller wants to know of the whole batch, which
        no process holds on several hosts, such as its number of tokens.

    Returns:
      (state, batch) -> (state, outputs). `outputs["metrics"]` are float32 scalars: the
      loss, the method's metrics, `grad_norm` and `update_norm` of this update, and
      `learning_rate` if there is a schedule.
      `outputs["finite"]` is bool[B]: whether the loss of each group is a finite number.
      `outputs["observed"]` is what `observe` returns, if it is given.
    """

    def step(state: TrainState, batch):
        anchor = anchor_params(model, state)
        gradient = jax.grad(
            lambda params, part: _sums(
                method, model, policy_params(model, state, params), anchor, part
            ),
            has_aux=True,
        )
        if num_microbatches == 1:
            grads, (sums, finite) = gradient(state.params, batch)
        else:
            parts = split_batch(batch, num_microbatches)

            def accumulate(total, part):
                grads, (sums, finite) = gradient(state.params, part)
                return jax.tree.map(jnp.add, total, (grads, sums)), finite

            with checks.microbatches(num_microbatches):
                first = jax.tree.map(lambda x: x[0], parts)
                shapes = jax.eval_shape(gradient, state.params, first)
                zeros = jax.tree.map(
                    lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0])
                )
                (grads, sums), finite = jax.lax.scan(accumulate, zeros, parts)
            finite = _undo_split(finite, _num_rows(batch))
        _, denominator = sums["loss"]
        grads = jax.tree.map(lambda g: _divide(g, denominator), grads)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {name: _divide(*pair) for name, pair in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        number = state.step + 1
        state = TrainState(
            step=number,
            params=params,
            opt_state=opt_state,
            rng=state.rng,
            anchor=method.anchor.refresh(params, number, state.anchor),
            data=state.data + 1,
            frozen=state.frozen,
        )
        outputs = {"metrics": metrics, "finite": finite}
        if observe is not None:
            outputs["observed"] = observe(batch)
        return state, outputs

    return step


def make_eval_step(method: Method, model) -> Callable[..., dict]:
    """Numerators and denominators of loss, metrics and analyses of one batch.

    Returns:
      (params, anchor, batch) -> {name: (numerator, denominator)}; add them up over
      batches and divide once, as `evaluate` does.
    """

    def step(params, anchor, batch):
        _, (sums, _) = _sums(method, model, params, anchor, batch)
        for analysis in method.analyses:
            metrics = analysis(model, params, anchor, batch)
            sums |= {name: weighted_sum(*pair) for name, pair in metrics.items()}
        return sums

    return step


def evaluate(eval_step, params, anchor, batches) -> dict[str, float]:
    """Means over all batches of an evaluation set.

    Args:
      eval_step: of `make_eval_step`, compiled.
      params: of the policy.
      anchor: of the anchor.
      batches: placed batches.
    """
    totals: dict[str, list[float]] = {}
    for batch in batches:
        for name, pair in jax.device_get(eval_step(params, anchor, batch)).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float(pair[0])
            total[1] += float(pair[1])
    return {name: a / b if b else 0.0 for name, (a, b) in totals.items()}
