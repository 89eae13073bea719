"""Mesh, shardings, placement: where the arrays of a run live.

One mesh with the axes of `pref_jax.axes`. Parameters follow its rules on the logical
axes that the model names; a parameter that no rule covers is an error, not a replica.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pref_jax.axes import MESH_AXES, ROW_AXES, RULES
from pref_jax.train.state import TrainState
from pref_jax.types import Model, PyTree


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of all devices; of several slices, if the devices say that they are.

    Args:
      data: devices of a slice that hold different rows and all parameters; -1: what is
        left.
      fsdp: devices that hold different rows and parts of the parameters.
      tensor: devices that split the products of one row.
      devices: None: all of the process group.

    Raises:
      ValueError: the product is not the number of devices of a slice, or the slices
        differ in size.
    """
    devices = list(jax.devices() if devices is None else devices)
    # Only TPUs have slices, each a network of its own.
    of_slices = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
    num_slices, size = len(of_slices), len(devices) // len(of_slices)
    if len(set(of_slices.values())) > 1:
        raise ValueError(
            f"the slices have {sorted(of_slices.values())} devices; all need the same "
            f"number."
        )
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if data == -1:
        sizes["data"] = size // max(1, fsdp * tensor)
    if min(sizes.values()) < 1 or np.prod(list(sizes.values())) != size:
        each = " of each slice" if num_slices > 1 else ""
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not use "
            f"{size} devices{each}; their product must be that number."
        )
    shape = (1, *sizes.values())
    if num_slices > 1:
        from jax.experimental import mesh_utils

        found = mesh_utils.create_hybrid_device_mesh(
            shape, (num_slices, 1, 1, 1), devices
        )
    else:
        found = jax.make_mesh(shape, MESH_AXES, devices=devices).devices
    # Explicit axes, jax's default, would put shardings into types.
    return Mesh(found, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def num_row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return int(np.prod([mesh.shape[name] for name in ROW_AXES]))


def own_rows(mesh: Mesh, num_rows: int) -> list[int] | None:
    """Numbers of the rows that the devices of this process hold; None: all of them.

    Args:
      mesh: of `make_mesh`.
      num_rows: of the whole batch, a multiple of `num_row_shards`.
    """
    own = _own_shards(mesh)
    if len(own) == num_row_shards(mesh):
        return None
    size = num_rows // num_row_shards(mesh)
    return [row for shard in own for row in range(shard * size, (shard + 1) * size)]


def batch_shapes(mesh: Mesh, batch: PyTree) -> PyTree:
    """Shapes and shardings of a batch, arrays or shapes, as `place_batch` makes it."""
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    return with_shardings(batch, jax.tree.map(lambda _: rows, batch))


def _own_shards(mesh) -> list[int]:
    """Which parts of the rows, of `num_row_shards`, devices of this process hold."""
    sharding, shards = (
        NamedSharding(mesh, PartitionSpec(ROW_AXES)),
        num_row_shards(mesh),
    )
    indices = sharding.addressable_devices_indices_map((shards,)).values()
    return sorted({index[0].indices(shards)[0] for index in indices})


def param_shardings(mesh: Mesh, param_axes: PyTree, params: PyTree) -> PyTree:
    """The sharding of each parameter by the rules on its logical axes.

    Args:
      mesh: of `make_mesh`.
      param_axes: logical axis names a leaf.
      params: arrays or shapes.

    Raises:
      ValueError: an axis without a rule, or a size that the mesh does not divide.
    """

    def sharding(path, leaf, axes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        unknown = [axis for axis in axes if axis not in RULES]
        if unknown or len(axes) != len(leaf.shape):
            raise ValueError(
                f"parameter {name} of shape {leaf.shape} has the logical axes {axes}; "
                f"each needs a rule in `axes.RULES`."
            )
        spec = [RULES[axis] for axis in axes]
        for axis, mesh_axis, size in zip(axes, spec, leaf.shape, strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"parameter {name} has {size} along {axis}, which the "
                    f"{mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis} do not "
                    f"divide; use a smaller {mesh_axis} axis."
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, params, param_axes)


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes of arrays and where they lie: what a program is compiled from."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def init_params(model: Model, mesh: Mesh, key: jax.Array) -> PyTree:
    """Fresh parameters, drawn where the rules put them: no device holds all of them.

    Args:
      model: a `pref_jax.types.Model`.
      mesh: of `make_mesh`; it does not change the values.
      key: typed key.
    """
    shapes = jax.eval_shape(model.init, key)
    shardings = param_shardings(mesh, model.param_axes(shapes), shapes)
    return jax.jit(model.init, out_shardings=shardings)(key)


def state_shardings(
    mesh: Mesh,
    param_axes: PyTree,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    frozen_axes: PyTree = (),
) -> TrainState:
    """The sharding of every array of a state; the optimiser's follow the parameters.

    Args:
      mesh: of `make_mesh`.
      param_axes: logical axis names a leaf of the trained parameters.
      state: arrays or shapes.
      optimizer: whose state it holds.
      frozen_axes: as `param_axes`, of what is frozen.
    """
    params = param_shardings(mesh, param_axes, state.params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    anchor = params if jax.tree.leaves(state.anchor) else ()
    return TrainState(
        step=everywhere,
        params=params,
        opt_state=opt_state,
        rng=everywhere,
        anchor=anchor,
        data=everywhere,
        frozen=param_shardings(mesh, frozen_axes, state.frozen),
    )


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Put a host batch on the mesh, rows split over slice, data and fsdp.

    Args:
      mesh: of `make_mesh`.
      batch: of the rows that this process's devices hold, `own_rows`; with one process
        these are all rows.

    Raises:
      ValueError: a leading axis is not a multiple of the number of row shards.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    shards, own = num_row_shards(mesh), _own_shards(mesh)

    def place(leaf):
        leaf = np.asarray(leaf)
        if leaf.shape[0] % len(own):
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows cannot be split over {len(own)} "
                f"devices; build it with `rows_multiple` a multiple of {shards}."
            )
        size = leaf.shape[0] // len(own)

        def part(index):
            first = own.index(index[0].indices(shards * size)[0] // size) * size
            return leaf[first : first + size]

        shape = (shards * size, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


class CompiledStep:
    """A train step on its devices: (state, batch) -> (state, outputs).

    What is frozen goes in and is handed on as it is: neither donated nor copied.

    Attributes:
      program: of `jax.jit`, to be called with `arguments`.
    """

    def __init__(self, step: Callable, mesh: Mesh, shardings: TrainState):
        rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
        everywhere = NamedSharding(mesh, PartitionSpec())
        moving = dataclasses.replace(shardings, frozen=())

        def inner(moving, frozen, batch):
            state, outputs = step(dataclasses.replace(moving, frozen=frozen), batch)
            return dataclasses.replace(state, frozen=()), outputs

        self.program = jax.jit(
            inner,
            in_shardings=(moving, shardings.frozen, rows),
            out_shardings=(moving, everywhere),
            donate_argnums=0,
        )

    @staticmethod
    def arguments(state: TrainState, batch: PyTree) -> tuple:
        """What the program takes: what moves of a state, what is frozen, the batch."""
        return dataclasses.replace(state, frozen=()), state.frozen, batch

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict]:
        """One step."""
        moving, outputs = self.program(*self.arguments(state, batch))
        return dataclasses.replace(moving, frozen=state.frozen), outputs
