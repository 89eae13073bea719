"""TPUs that are not there: meshes to compile for, and what their chips can do.

    mesh = topology_mesh("v5p:4x4x4", fsdp=16, tensor=4)

`jax.jit(f).lower(...).compile()` for arrays on such a mesh makes a real TPU program on
any machine that has the `libtpu` package. It cannot run there.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import metadata

import jax
import numpy as np
from jax.sharding import Mesh
from packaging.requirements import Requirement

from pref_jax.train import logging as logging_lib
from pref_jax.train import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one TPU chip can do. One chip is one device of `jax.devices()`."""

    device_kind: str  # of `jax.Device`
    hbm_bytes: float  # that a program may use
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second sent, one direction, all links together
    num_links: int  # to neighbours in the torus, one for each direction of a dimension
    wraps: str  # which dimensions of a slice close to a ring: "cubes" or "full"
    source: str

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 flops per second."""
        return logging_lib.peak_flops(self.device_kind)

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second that one link sends."""
        return self.ici_bandwidth / self.num_links


# hbm_bytes: what the TPU compiler (libtpu 0.0.42.1) lets a program use, as it says when
# it refuses one. The pages give 16 GB, 95 GiB (of 96), 32 GB and 32 GiB: a little is
# kept for the system.
# ici_bandwidth: half of "Bidirectional inter-chip interconnect (ICI) bandwidth per
# chip". v4's page has none: "All-reduce bandwidth per Pod" (1.1 PB/s) by 4,096 chips,
# which for v5e and v6e gives exactly that half. Older pages gave 1,600 Gbps for v5e and
# 4,800 Gbps for v5p, the same, and 3,584 Gbps for v6e, 12 % more.
# num_links: "ICI ports per chip" of v5e and v6e; v4 and v5p are 3D tori.
# wraps: v5p's page says that slices of 4x4x4 and larger are full tori, v4's that a
# torus needs multiples of 4. That v5e and v6e close a dimension of 16 alone is not
# verified.
# Latency, and what all of this reaches in practice, is not in these figures.
CHIPS = {
    "v4": Chip(
        device_kind="TPU v4",
        hbm_bytes=30.75 * 2**30,
        hbm_bandwidth=1200e9,
        ici_bandwidth=1.1e15 / 4096,
        num_links=6,
        wraps="cubes",
        source="TPU v4, cloud.google.com/tpu/docs/v4",
    ),
    "v5e": Chip(
        device_kind="TPU v5 lite",
        hbm_bytes=15.75 * 2**30,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        num_links=4,
        wraps="full",
        source="TPU v5e, cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        device_kind="TPU v5",
        hbm_bytes=95.74 * 2**30,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        num_links=6,
        wraps="cubes",
        source="TPU v5p, cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        device_kind="TPU v6 lite",
        hbm_bytes=31.25 * 2**30,
        hbm_bandwidth=1638e9,
        ici_bandwidth=400e9,
        num_links=4,
        wraps="full",
        source="TPU v6e, cloud.google.com/tpu/docs/v6e",
    ),
}
"""What is known of each generation, by the name that topologies begin with."""


def find_chip(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x4".

    Raises:
      ValueError: nothing is known of such chips.

    >>> find_chip("v5e:16x16").peak_flops / 1e12
    197.0
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"`topology` must begin with {', '.join(CHIPS)}, as in v5p:4x4x4; got "
            f"{topology!r}."
        )
    return CHIPS[name]


_INSTALL = "pip install 'jax[tpu]'"


def _check_libtpu() -> None:
    """That libtpu, where it is installed, is one that jax names as its own.

    Others compile programs whose text jax cannot read back, and fail late.
    """
    try:
        installed = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return  # jax says so itself
    for line in metadata.requires("jax") or ():
        needed = Requirement(line)
        if needed.name == "libtpu" and installed not in needed.specifier:
            raise RuntimeError(
                f"jax {jax.__version__} needs libtpu{needed.specifier} to compile for "
                f"TPUs; libtpu {installed} is installed: {_INSTALL} takes the right "
                f"one."
            )


def topology_mesh(
    topology: str,
    *,
    num_slices: int = 1,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A mesh of TPUs that need not be there, to compile for.

    Set JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 before jax is imported, on a machine
    without TPUs: otherwise libtpu looks for some.

    Args:
      topology: generation and shape of a slice, such as v5p:4x4x4 or v5e:16x16.
      num_slices: that a data-center network joins. What they send each other is not in
        the program's text, and so not in what `costs` counts.
      data: as in `sharding.make_mesh`.
      fsdp: as in `sharding.make_mesh`.
      tensor: as in `sharding.make_mesh`.

    Raises:
      ValueError: an unknown topology, or one whose chips the axes do not use.
      RuntimeError: libtpu is missing, is not the one that this jax needs, or is in use.
    """
    from jax.experimental import topologies

    find_chip(topology)
    _check_libtpu()
    # Without it the two cores of a v4 chip are two devices.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except RuntimeError as error:  # that of jax for a wrong name is one, too
        if "lockfile" in str(error):
            raise RuntimeError(
                "another process of this machine uses libtpu: wait until it has ended, "
                "or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile beside it. jax says: "
                f"{error}"
            ) from error
        if "not installed" in str(error) or "libtpu" in str(error):
            raise RuntimeError(
                f"compiling for TPUs needs the package libtpu: {_INSTALL}. jax says: "
                f"{error}"
            ) from error
        raise ValueError(
            f"`topology` must be a shape that the compiler knows, such as v5p:4x4x4, "
            f"v5e:16x16 or v6e:16x16; got {topology!r}. The compiler says: {error}"
        ) from error
    return sharding.make_mesh(
        data=data, fsdp=fsdp, tensor=tensor, devices=description.devices
    )


def axis_links(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> int:
    """Links over which a chip can send at once in a ring along mesh axes.

    Two for each dimension of the torus that the axes cover from end to end where the
    slice closes it to a ring, one for each other dimension along which they extend.

    Args:
      mesh: of devices with `coords`.
      axes: of the mesh.
      chip: of the devices.

    Returns:
      1 or more: at most `chip.num_links`.
    """
    coords = np.array([d.coords for d in mesh.devices.flat])
    extent = coords.max(axis=0) - coords.min(axis=0) + 1
    coords = coords.reshape(*mesh.devices.shape, -1)
    one_group = coords[
        tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    ].reshape(-1, coords.shape[-1])
    closed = extent % 4 == 0 if chip.wraps == "cubes" else extent == 16
    if chip.wraps == "cubes":
        closed &= closed.all()
    links = 0
    for dimension in range(coords.shape[-1]):
        covered = len(np.unique(one_group[:, dimension]))
        if covered > 1:
            ring = closed[dimension] and covered == extent[dimension]
            links += 2 if ring else 1
    return max(links, 1)


def local_bytes(tree) -> int:
    """Bytes of a pytree of arrays or shapes on one device, by their shardings.

    >>> local_bytes({"a": jax.ShapeDtypeStruct((8, 4), "float32")})
    128
    """

    def of_leaf(leaf):
        shape, sharded = leaf.shape, getattr(leaf, "sharding", None)
        shape = shape if sharded is None else sharded.shard_shape(shape)
        dtype = leaf.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return 0  # some words: not worth telling
        return math.prod(shape) * dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))
