"""The model of an experiment, its own or a fresh small decoder, and plain stages."""

from __future__ import annotations

import dataclasses
import functools

import jax

from pref_jax import model_folders
from pref_jax.models import decoder
from pref_jax.train import sharding
from pref_jax.train.loop import LoopConfig
from pref_jax.train.optimizer import OptimizerConfig
from pref_jax.train.stage import StageConfig
from pref_jax.types import Model, PyTree

COMPUTE = ("dtype", "attention", "remat")
"""Fields of `DecoderSizes` that say how a model computes, and not what it is."""


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """The fresh decoder; with a checkpoint only how it computes."""

    width: int = 128  # ours
    num_layers: int = 5  # ours: about 1.1 M parameters in all
    num_heads: int = 4  # ours
    num_kv_heads: int = 4  # ours
    mlp_width: int = 384  # ours
    dtype: str = "float32"  # of matrix products: float32 or bfloat16
    attention: str = "auto"  # auto (by length of the row), xla or blockwise
    remat: str = "none"  # none, dots or full


def make_model(
    sizes: DecoderSizes,
    mesh: jax.sharding.Mesh,
    *,
    vocab_size: int,
    seed: int,
    checkpoint: str | None = None,
    max_positions: int | None = None,
) -> tuple[Model, PyTree]:
    """A model and its initial parameters on a mesh.

    Args:
      sizes: of the fresh decoder.
      mesh: that the parameters are placed on.
      vocab_size: of the fresh decoder.
      seed: of its parameters.
      checkpoint: folder of a model to take in its place; None: a fresh one.
      max_positions: longest text of the checkpoint; None: as it says.

    Raises:
      CheckpointFormatError: as `model_folders.load`.
    """
    if checkpoint is not None:
        found, params = model_folders.load(
            checkpoint,
            mesh=mesh,
            max_positions=max_positions,
            **{name: getattr(sizes, name) for name in COMPUTE},
        )
        return decoder.make_decoder(found), params
    fresh = decoder.DecoderConfig(
        vocab_size=vocab_size,
        head_dim=sizes.width // sizes.num_heads,
        embedding_scale=sizes.width**0.5,  # tokens enter the residual stream at size 1
        **dataclasses.asdict(sizes),
    )
    model = _decoder(fresh)
    return model, sharding.init_params(model, mesh, jax.random.key(seed))


# One record of functions a shape: what is compiled for it serves every seed.
_decoder = functools.cache(decoder.make_decoder)


def make_stage(
    groups: int, num_steps: int, rate: float, *, weight_decay: float = 0.05, **loop
) -> StageConfig:
    """A stage of a small model: a twentieth of warm-up, four validations.

    Args:
      groups: of a step.
      num_steps: updates.
      rate: of AdamW, at its highest.
      weight_decay: of AdamW.
      **loop: further fields of `LoopConfig`.
    """
    optimizer = OptimizerConfig(
        learning_rate=rate, warmup_steps=num_steps // 20, weight_decay=weight_decay
    )
    return StageConfig(
        groups_per_step=groups,
        optimizer=optimizer,
        loop=LoopConfig(
            num_steps=num_steps,
            validate_every=num_steps // 4,
            checkpoint_every=num_steps // 4,
            **loop,
        ),
    )
