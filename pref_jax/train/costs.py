"""What a compiled program costs, from shapes alone: memory, flops, bytes, time.

    costs = measure(program, mesh)
    costs.memory.total, costs.flops, costs.collectives
    roofline(costs, mesh, chip).with_overlap

Nothing is run and no array is made. Times are estimates, and say so.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import jax
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from pref_jax.loops import most_turns
from pref_jax.train import topology as topology_lib
from pref_jax.train.hlo import (
    Collective,
    bytes_accessed,
    collectives,
    unknown_loops,
)
from pref_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: such as "train step".
      function: of `jax.jit`, with its shardings and donations.
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings.
      useful_flops: flops that the model needs for one call, all chips together, by a
        closed formula: forward and backward, each prompt once, logits at scored
        positions only, nothing computed twice.
      formula: that formula in words.
    """

    name: str
    function: Callable
    arguments: tuple
    useful_flops: float
    formula: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip, as the compiler counts them."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, those that take the place of donated arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Arguments + outputs - aliased + temporaries + code."""
        held = self.arguments + self.outputs - self.aliased
        return held + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one call of a program costs.

    Attributes:
      name: of the program.
      num_chips: that it runs on.
      useful_flops: of the program, all chips together.
      formula: of `useful_flops`.
      flops: of its matrix products as they are written, all chips together.
      memory: of one chip.
      hbm_bytes: read and written by one chip; see `hlo.bytes_accessed`.
      collectives: of one chip.
      unknown_loops: scopes of loops that turn an unknown number of times: `hbm_bytes`
        and `collectives` take them once, and are too small.
      compile_seconds: lowering included.
    """

    name: str
    num_chips: int
    useful_flops: float
    formula: str
    flops: float
    memory: Memory
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    compile_seconds: float

    def sent(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(kind, mesh axes) -> bytes that one chip sends, the largest first."""
        totals = collections.Counter()
        for collective in self.collectives:
            totals[collective.kind, collective.axes] += collective.total_bytes
        return dict(totals.most_common())


def count_flops(jaxpr) -> float:
    """Flops of all matrix products and convolutions, 2 for each multiply-add.

    Products whose result nobody needs are left out first, as the compiler does. A
    `scan` counts its body as often as it turns, `cond` and `switch` their most
    expensive branch, a loop of `pref_jax.loops` its body as often as it turns at most,
    `shard_map` its body on every device, a Pallas kernel its body at every point of its
    grid; what is rematerialised counts again.

    Args:
      jaxpr: such as `jax.jit(f).trace(*arguments).jaxpr`.

    Returns:
      Flops over all devices.

    Raises:
      ValueError: a product that cannot be counted: one inside another `while_loop`,
        whose number of turns is not known, or of a kind that is not counted here.

    >>> import jax.numpy as jnp
    >>> shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    >>> count_flops(jax.jit(lambda x: x @ x).trace(shape).jaxpr)
    128.0
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(_flops(needed))


_NOT_COUNTED = ("ragged_dot", "ragged_dot_general", "scaled_matmul")


def _flops(jaxpr) -> float:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    if name in _NOT_COUNTED:
        raise ValueError(
            f"`count_flops` does not count {name}; write the product as a dot_general, "
            f"or add its formula."
        )
    inside = [_flops(inner) for inner in _inner_jaxprs(params.values())]
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "cond":
        return max(inside)
    if name == "while":
        turns = most_turns(str(equation.source_info.name_stack))
        if any(inside) and turns is None:
            raise ValueError(
                "`count_flops` cannot count the matrix products inside a while_loop, "
                "whose number of turns is not known; use lax.scan, lax.fori_loop with "
                "constant bounds, or a loop of pref_jax.loops, which says how often it "
                "turns at most."
            )
        return (turns or 0) * sum(inside)
    if name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        return sum(inside) * math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return sum(inside) * math.prod(params["grid_mapping"].grid)
    return sum(inside)


def _inner_jaxprs(values: Iterable):
    for value in values:
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
            yield getattr(value, "jaxpr", value)
        elif isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)


# The program is compiled also where it does not fit, to see by how much.
_TPU_OPTIONS = {"xla_tpu_no_crash_on_oom": True}


def measure(program: Program, mesh: Mesh) -> Costs:
    """Compile a program and count what it costs.

    Args:
      program: to compile.
      mesh: of its arguments; it is set while the program is traced.

    Raises:
      TypeError: the program's function is not one of `jax.jit`.
      ValueError: as `count_flops`, or an array that no chip can hold.
    """
    if not hasattr(program.function, "trace"):
        raise TypeError(
            f"`function` of the program {program.name!r} must be made by jax.jit; got "
            f"{program.function!r}. Wrap it, with its shardings and donations."
        )
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
        lowered = traced.lower()
    try:
        compiled = lowered.compile(_TPU_OPTIONS if on_tpu else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"the program {program.name!r} cannot be compiled, since one array alone "
            f"is larger than a chip's memory; split it over more chips. The compiler "
            f"says: {error}"
        ) from error
    seconds = time.perf_counter() - begin
    found, text = compiled.memory_analysis(), compiled.as_text()
    return Costs(
        name=program.name,
        num_chips=mesh.devices.size,
        useful_flops=program.useful_flops,
        formula=program.formula,
        flops=count_flops(traced.jaxpr),
        memory=Memory(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            code=found.generated_code_size_in_bytes,
        ),
        hbm_bytes=bytes_accessed(text),
        collectives=tuple(collectives(text, mesh)),
        unknown_loops=tuple(unknown_loops(text)),
        compile_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of one call by three limits: an estimate, not run.

    Attributes:
      compute: flops / (chips * peak flops). Products of float32 are taken for bfloat16.
      hbm: bytes read and written by one chip / bandwidth of its memory.
      ici: over the sets of mesh axes, the sum of bytes sent / (links * bandwidth of a
        link), the links being those that a ring along these axes has; latency is 0.
      useful: useful flops / (chips * peak flops).
    """

    compute: float
    hbm: float
    ici: float
    useful: float

    @property
    def with_overlap(self) -> float:
        """Seconds if the three go on at once: the longest of them."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def without_overlap(self) -> float:
        """Seconds if they follow each other: their sum."""
        return self.compute + self.hbm + self.ici

    @property
    def limit(self) -> str:
        """Which of the three takes longest: compute, hbm or ici."""
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))

    def mfu(self, seconds: float) -> float:
        """Useful flops / (chips * peak flops * seconds)."""
        return self.useful / seconds


def roofline(costs: Costs, mesh: Mesh, chip: topology_lib.Chip) -> Roofline:
    """Bounds on the time of a program by what its chips can do at most.

    Args:
      costs: of the program.
      mesh: of TPUs, whose `coords` say how axes lie on the torus.
      chip: of the mesh.
    """
    peak = costs.num_chips * chip.peak_flops
    seconds = 0.0
    for collective in costs.collectives:
        if collective.kind == "collective-permute":
            links = 1  # to one neighbour
        else:
            links = topology_lib.axis_links(mesh, collective.axes, chip)
        seconds += collective.total_bytes / (links * chip.link_bandwidth)
    return Roofline(
        compute=costs.flops / peak,
        hbm=costs.hbm_bytes / chip.hbm_bandwidth,
        ici=seconds,
        useful=costs.useful_flops / peak,
    )


def advice(
    program: Program, costs: Costs, mesh: Mesh, chip: topology_lib.Chip
) -> list[str]:
    """What would make a program smaller that does not fit, the cheapest first.

    Args:
      program: that was measured.
      costs: of it.
      mesh: that it was compiled for.
      chip: of the mesh.

    Returns:
      Nothing if it fits. Numbers are bytes of one chip, in GiB.
    """
    memory, limit = costs.memory, chip.hbm_bytes
    if memory.total <= limit:
        return []
    gib = 2**30
    missing = (memory.total - limit) / gib
    half = memory.temporaries / 2 / gib
    lines = [
        f"more micro-batches: twice as many free at most {half:.1f} GiB, half of the "
        f"temporaries (a sum of gradients stays); {missing:.1f} GiB are missing",
        "remat=full: layers keep their inputs alone",
    ]
    states = [x for x in program.arguments if isinstance(x, TrainState)]
    of = {
        part: sum(topology_lib.local_bytes(getattr(s, part)) for s in states) / gib
        for part in ("params", "opt_state", "anchor")
    }
    free = mesh.shape["data"]
    if free > 1:
        kept = memory.arguments / gib
        lines.append(
            f"a larger fsdp axis: {free} times as large, with no data axis, frees at "
            f"most {kept * (1 - 1 / free):.1f} of {kept:.1f} GiB of arguments"
        )
    if of["anchor"]:
        lines.append(
            f"anchor log-probabilities that are stored ahead: frees {of['anchor']:.1f} "
            f"GiB of anchor parameters, and their forward pass"
        )
    if of["opt_state"]:
        lines.append(
            f"LoRA: frees nearly all of the optimiser's {of['opt_state']:.1f} GiB, the "
            f"gradients, as large as the {of['params']:.1f} GiB of parameters, and the "
            f"anchor"
        )
    more = math.ceil(memory.total / limit)
    lines.append(f"more chips: {more} times as many, if all of it is split further")
    return lines
