"""What a run on many devices compiles, known from shapes alone: no data, no devices.

`scripts/compile_for_tpu.py` compiles it for slices that are not there. A run takes the
sizes of its data instead of those that are planned for.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pref_jax.data import rows
from pref_jax.logps import response_scores
from pref_jax.method import Method
from pref_jax.models import decoder, flops, lora
from pref_jax.models.decoder import DecoderConfig
from pref_jax.models.lora import LoraConfig
from pref_jax.sampling import SamplingConfig, make_sampler
from pref_jax.train import sharding
from pref_jax.train.costs import Program
from pref_jax.train.stage import StageConfig, plan_stage


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model computes."""

    dtype: str = "bfloat16"  # of matrix products: float32 or bfloat16
    attention: str = "auto"  # auto (by length of the row), xla or blockwise
    remat: str = "full"  # none, dots or full


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh, of one slice."""

    data: int = -1  # different rows, all parameters; -1: what is left
    fsdp: int = 1  # different rows, parts of the parameters
    tensor: int = 1  # parts of each product


@dataclasses.dataclass(frozen=True)
class Planned:
    """The batch that a preset is compiled for: groups of one size."""

    num_rows: int = 64  # G
    groups_per_row: int = 2  # E
    prompt: int = 256  # tokens of a prompt
    response: int = 383  # tokens of each of its responses
    list_size: int = 8  # responses to a prompt, for ADPO
    sampled_prompts: int = 64  # of the sampler
    samples: int = 4  # to each of them
    new_tokens: int = 512  # of a sampled response


class Programs:
    """Programs of one model on one mesh.

    Args:
      sizes: of the model.
      plan: of the batches.
      mesh: of `sharding.make_mesh`.
      adapters: what is trained instead of all parameters, or None.
      param_dtype: of the parameters that are not trained.
    """

    def __init__(
        self,
        sizes: DecoderConfig,
        plan: Planned,
        mesh,
        *,
        adapters: LoraConfig | None = None,
        param_dtype: str = "float32",
    ):
        self._sizes, self._plan, self._mesh = sizes, plan, mesh
        self._adapters, self._param_dtype = adapters, param_dtype
        self._plain = decoder.make_decoder(sizes)
        self._whole = jax.eval_shape(self._plain.init, jax.random.key(0))

    def step(
        self, name: str, stage: StageConfig, method: Method, num_responses: int
    ) -> Program:
        """The train step of a stage, on groups of so many responses."""
        model, trained, frozen, passes = self._plain, self._whole, (), 3
        if self._adapters is not None:
            model, passes = lora.adapted(model, self._adapters), 2
            split = functools.partial(
                lora.split, config=self._adapters, key=jax.random.key(0)
            )
            frozen, trained = jax.eval_shape(split, self._whole)
            frozen = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, self._param_dtype), frozen
            )
        planned = plan_stage(
            stage,
            method=method,
            model=model,
            params=trained,
            anchor=(),
            count=rows.count_batch,
            mesh=self._mesh,
            frozen=frozen,
        )
        batch, forward = self._batch(method, num_responses)
        return Program(
            name=name,
            function=planned.step.program,
            arguments=planned.step.arguments(planned.state, batch),
            useful_flops=passes * forward,
            formula=f"{flops.FORMULA}, {passes} passes",
        )

    def scoring(self, name: str, method: Method, num_responses: int) -> Program:
        """The pass that stores the anchor's logps."""
        batch, forward = self._batch(method, num_responses)
        return Program(
            name=name,
            function=jax.jit(functools.partial(response_scores, self._plain)),
            arguments=(self._held(self._param_dtype), batch),
            useful_flops=forward,
            formula=f"{flops.FORMULA}, 1 pass",
        )

    def sampler(self) -> Program:
        """The sampler, on parameters of bfloat16."""
        plan = self._plan
        prompts, count = plan.sampled_prompts, plan.samples
        settings = SamplingConfig(num_samples=count, max_new_tokens=plan.new_tokens)
        sampled = (plan.prompt, (plan.new_tokens,) * count)
        everywhere = jax.sharding.NamedSharding(
            self._mesh, jax.sharding.PartitionSpec()
        )
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))

        def numbers(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)

        return Program(
            name="sampler",
            function=make_sampler(self._plain, settings, end_ids=(0,)).draw,
            arguments=(
                self._held(jnp.bfloat16),
                numbers(prompts, plan.prompt),
                numbers(prompts),
                sharding.with_shardings(keys, everywhere),
            ),
            useful_flops=flops.forward_flops(self._sizes, [sampled] * prompts),
            formula=f"{flops.FORMULA}, 1 pass",
        )

    def _batch(self, method: Method, num_responses: int):
        """Shapes of a batch, and the flops of a forward pass on it."""
        plan = self._plan
        group = (plan.prompt, (plan.response,) * num_responses)
        num_groups = plan.num_rows * plan.groups_per_row
        length = plan.groups_per_row * (
            plan.prompt - 1 + num_responses * (plan.response + 1)
        )
        shape = rows.RowShape(
            num_rows=plan.num_rows,
            row_length=-(-length // 128) * 128,
            groups_per_row=plan.groups_per_row,
            num_predict=plan.groups_per_row * num_responses * plan.response,
            num_responses=num_responses,
            num_targets=plan.response,
        )
        batch = sharding.batch_shapes(
            self._mesh, rows.batch_shapes(shape, sorted(method.requires))
        )
        return batch, flops.forward_flops(self._sizes, [group] * num_groups)

    def _held(self, dtype):
        """The parameters of a dtype, on the mesh."""
        shardings = sharding.param_shardings(
            self._mesh, self._plain.param_axes(self._whole), self._whole
        )
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), self._whole)
        return sharding.with_shardings(cast, shardings)
