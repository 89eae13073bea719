"""Optimiser and learning-rate schedule from plain config values, by optax."""

from __future__ import annotations

import dataclasses

import jax
import optax

from pref_jax.types import PyTree

SCHEDULES = ("constant", "linear", "cosine")
"""What the learning rate does after warm-up: stay, or fall to 0 at the last step."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, clipping and decoupled weight decay."""

    learning_rate: float  # at its peak
    warmup_steps: int = 0  # linear from 0
    schedule: str = "cosine"  # constant, linear or cosine, over all steps
    clip_norm: float = 1.0  # of the global gradient
    weight_decay: float = 0.0  # not on norms and biases
    b1: float = 0.9  # decay of the mean gradient
    b2: float = 0.95  # decay of the mean squared gradient; ours: short runs
    eps: float = 1e-8  # added to the root of the mean squared gradient

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` must be one of {', '.join(SCHEDULES)}; got "
                f"{self.schedule!r}."
            )
        for name in ("learning_rate", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive; got {self}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1); got {self}.")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"`warmup_steps` and `weight_decay` must not be negative; got {self}."
            )


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by number of updates done.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    if config.warmup_steps > num_steps:
        raise ValueError(
            f"`warmup_steps` is {config.warmup_steps} and the run has {num_steps} "
            f"steps; the peak would never be reached."
        )
    peak, rest = config.learning_rate, max(1, num_steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    # The first update already moves: rate 0 would waste it.
    warmup = optax.linear_schedule(
        peak / (config.warmup_steps + 1), peak, config.warmup_steps
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, *, param_axes: PyTree
) -> optax.GradientTransformation:
    """Clip, AdamW, schedule.

    Args:
      config: plain values.
      num_steps: of the run.
      param_axes: logical axis names a leaf; an axis "norm" or "bias" means no decay.
    """
    mask = jax.tree.map(
        lambda axes: not {"norm", "bias"} & set(axes),
        param_axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_learning_rate(make_schedule(config, num_steps)),
    )
