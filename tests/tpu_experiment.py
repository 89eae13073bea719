"""A tiny experiment that can be compiled for other machines, for their tests."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax.train.costs import Program


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a stack of square matrices."""

    num_layers: int = 3
    width: int = 256
    rows: int = 64
    data_file: str = "pairs.jsonl"


PRESETS = {
    "small": Config(),
    # 192 GiB of matrices: more than any chip has.
    "huge": Config(num_layers=48, width=32768, rows=64),
}


def loss(stack, rows):
    """Mean square of what the matrices make of the rows, one after the other."""

    def layer(x, matrix):
        return jnp.tanh(x @ matrix), None

    with jax.named_scope("layers"):
        x, _ = jax.lax.scan(jax.checkpoint(layer), rows, stack)
    return (x.astype(jnp.float32) ** 2).mean()


def programs(config, mesh) -> list[Program]:
    """Loss, and a step of gradient descent; rows and matrices split over fsdp."""
    by_matrix = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    layers, width, rows = config.num_layers, config.width, config.rows
    arguments = (
        jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=by_matrix),
        jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=by_row),
    )

    def step(stack, rows):
        return stack - 0.1 * jax.grad(loss)(stack, rows)

    products = 2.0 * layers * rows * width**2
    return [
        Program(
            name="loss",
            function=jax.jit(loss),
            arguments=arguments,
            useful_flops=products,
            formula="2 * layers * rows * width^2",
        ),
        Program(
            name="step",
            function=jax.jit(step, out_shardings=by_matrix, donate_argnums=0),
            arguments=arguments,
            useful_flops=3 * products,
            formula="3 * 2 * layers * rows * width^2",
        ),
    ]
