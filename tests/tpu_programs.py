"""Small programs that make every collective, and their golden TPU texts.

PYTHONPATH=. python tests/tpu_programs.py      needs libtpu; writes tests/golden/tpu_hlo
"""

import os
import re
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax.train import run, topology

FOLDER = Path(__file__).parent / "golden" / "tpu_hlo"
TOPOLOGY = "v5e:4x2"
AXES = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS, WIDTH, INNER, NUM_LAYERS = 64, 256, 512, 4
BY_ROW = PartitionSpec(("data", "fsdp"))


def layers(mesh, num_layers=NUM_LAYERS):
    """Gradient of a stack of MLPs, scanned and rematerialised; and its arguments."""
    up = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    down = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    rows = NamedSharding(mesh, BY_ROW)
    inner = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))

    def layer(x, matrices):
        up, down = (matrix.astype(x.dtype) for matrix in matrices)
        hidden = jax.lax.with_sharding_constraint(jnp.tanh(x @ up), inner)
        return jax.lax.with_sharding_constraint(x + hidden @ down, rows), None

    def loss(stacks, x):
        with jax.named_scope("layers"):
            x, _ = jax.lax.scan(jax.checkpoint(layer), x, stacks)
        return (x.astype(jnp.float32) ** 2).mean()

    stacks = (
        jax.ShapeDtypeStruct((num_layers, WIDTH, INNER), jnp.float32, sharding=up),
        jax.ShapeDtypeStruct((num_layers, INNER, WIDTH), jnp.float32, sharding=down),
    )
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=rows)
    return jax.jit(jax.grad(loss), out_shardings=(up, down)), (stacks, x)


def on_all(mesh, function, shape, inside, outside, **options):
    """A function of the chips' own parts of one float32 array, and its arguments."""
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=inside,
        out_specs=outside,
        check_vma=False,
        **options,
    )
    sharding = NamedSharding(mesh, inside)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return jax.jit(mapped), (x,)


def scatter(mesh):
    """A gather over tensor, then a reduce-scatter over it whose parts need padding."""
    function, _ = on_all(
        mesh,
        lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
        (),
        PartitionSpec(),
        PartitionSpec("tensor"),
    )
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    return function, (jax.ShapeDtypeStruct((4096, 1024), "float32", sharding=sharding),)


def permute(mesh):
    """Every chip of a data and tensor pair hands its part to the next along both."""
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    return on_all(
        mesh,
        lambda x: jax.lax.ppermute(x, ("data", "tensor"), pairs),
        (4096, 1024),
        PartitionSpec(("data", "tensor")),
        PartitionSpec(("data", "tensor")),
    )


GOLDEN = {"layers": layers, "scatter": scatter, "permute": permute}


def optimised_text(program, mesh) -> str:
    """The HLO text of one of `GOLDEN`, compiled for a mesh."""
    function, arguments = program(mesh)
    return function.lower(*arguments).compile().as_text()


def shorten(text: str) -> str:
    """A text without what nobody reads: tables of the stack, tilings, configs."""
    lines = []
    for line in text.splitlines():
        if not re.match(r"HloModule|%|ENTRY|}|  ", line):
            continue
        fused = re.search(r'"async_collective_fusion_config":\{[^}]*\}', line)
        line = re.sub(r", backend_config=.*", "", line)
        line = re.sub(r"(HloModule [\w.]+).*", r"\1", line)
        line = re.sub(r":(T\([\d,]+\)(\(\d,\d\))*(\(\d\))?)", ":", line)
        line = re.sub(r", frontend_attributes=\{[^}]*\}", "", line)
        if not re.search(r"all-|reduce-scatter|collective|while", line):
            line = re.sub(r", metadata=\{[^}]*\}", "", line)
        line = re.sub(r" stack_frame_id=\d+", "", line).replace(":}", "}")
        line += ", backend_config={" + fused[0] + "}" if fused else ""
        lines.append(line + "\n")
    return "".join(lines)


def main() -> None:
    """Write the golden files."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    mesh = topology.topology_mesh(TOPOLOGY, **AXES)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, program in GOLDEN.items():
        text = shorten(optimised_text(program, mesh))
        (FOLDER / f"{name}.txt").write_text(text)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    record = {"script": "tests/tpu_programs.py", "commit": run.environment()["commit"]}
    record |= {"topology": TOPOLOGY, "mesh": AXES, "versions": versions}
    run.write_json(FOLDER / "record.json", record)


if __name__ == "__main__":
    main()
