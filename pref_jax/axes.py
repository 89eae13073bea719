"""Logical axes and the mesh axes that they are split over: the rules, in one place.

Models and scoring name the axes of their arrays; these rules say which axes of the mesh
hold the parts. Without a mesh, or on one device, everything here hands on what it gets.

    slice     devices of another slice: rows, over the slow network between slices
    data      different rows, all parameters
    fsdp      different rows, and a part of each parameter, which is gathered for use
    tensor    one row: a part of each product
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

MESH_AXES = ("slice", "data", "fsdp", "tensor")

ROW_AXES = ("slice", "data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

RULES = {
    # of parameters
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "bias": None,
    "positions": None,
    "rank": None,
    # of what is computed
    "rows": ROW_AXES,
    "fsdp_rows": ("slice", "data"),  # rows of all devices that share the parameters
    "width": None,
}
"""Logical axis -> mesh axis, or axes, that it is split over, or None."""


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes by the rules on logical ones; None is an axis that is not split.

    >>> spec(("embed", "heads", None))
    P('fsdp', 'tensor', None)
    """
    return PartitionSpec(*(name and RULES[name] for name in names))


def constrain(x, *names: str | None):
    """Ask for the sharding of an array by its logical axes.

    Args:
      x: an array of as many axes as there are names.
      names: logical axes. One that the mesh does not divide is left whole.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting_spec(mesh, x.shape, names))


def whole(tree):
    """Ask for all arrays of a tree on every device: every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


GATHERED = "gathered"
"""Name that rematerialisation knows gathered parameters by: they are not kept."""


def gather(x, names: tuple[str | None, ...]):
    """A parameter whole over fsdp, for one use; its gradient goes back to its parts.

    The parts of a product that tensor holds stay where they are. Called inside the loop
    over layers, it holds one layer at a time, provided that the backward pass gathers
    it again, as the decoder's does; the transfer is in the dtype of `x`, so cast first.

    Args:
      x: a parameter, or its layer of a stack.
      names: its logical axes.
    """
    if _mesh() is None:
        return x
    return checkpoint_name(_gather(x, names), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, names):
    kept = (None if name and RULES[name] == "fsdp" else name for name in names)
    return constrain(x, *kept)


def _gather_forward(x, names):
    return _gather(x, names), None


def _gather_backward(names, _, grad):
    return (constrain(grad, *names),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_all(params, names):
    """Every parameter whole over fsdp, as `gather` does it for one.

    Args:
      params: a nested dict of parameters.
      names: logical axes of each.
    """
    return jax.tree.map(lambda x, axes: gather(x, axes), params, names)


def per_device(
    function: Callable, names: Sequence[Sequence[str | None]], out: Sequence[str | None]
) -> Callable:
    """A function that every device calls on its own parts, without any exchange.

    Args:
      function: of arrays; each part of the result needs only the same parts of the
        arguments.
      names: logical axes of each argument.
      out: logical axes of the result.
    """

    def call(*arguments):
        mesh = _mesh()
        if mesh is None:
            return function(*arguments)
        specs = [
            _fitting_spec(mesh, x.shape, axes)
            for x, axes in zip(arguments, names, strict=True)
        ]
        # An axis is split in all arguments or in none.
        split = {
            name: all(
                of[axes.index(name)] is not None
                for of, axes in zip(specs, names, strict=True)
                if name in axes
            )
            for axes in names
            for name in axes
            if name
        }

        def kept(axes):
            return spec([name if name and split[name] else None for name in axes])

        return jax.shard_map(
            function,
            in_specs=tuple(kept(axes) for axes in names),
            out_specs=kept(out),
            check_vma=False,
        )(*arguments)

    return call


def row_shards(num_rows: int) -> int:
    """Parts that so many rows are split into by the mesh that is set; 1 without one."""
    shards = parts("rows")
    return shards if num_rows % shards == 0 else 1


def parts(name: str) -> int:
    """How many parts of a logical axis the mesh that is set has; 1 without one."""
    mesh = _mesh()
    return 1 if mesh is None else _num_parts(mesh, name)


def _mesh():
    """The mesh that is set, unless it lacks one of our axes or has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return None
    return mesh


def _num_parts(mesh, name):
    axes = RULES[name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes)


def _fitting_spec(mesh, shape, names):
    if len(names) != len(shape):
        raise ValueError(f"an array of shape {shape} has the logical axes {names}.")
    return spec(
        [
            name if name and size % _num_parts(mesh, name) == 0 else None
            for size, name in zip(shape, names, strict=True)
        ]
    )
