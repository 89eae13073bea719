"""A decoder-only language model in one file; every family is a config of it.

Read it from top to bottom: config, blocks, model, functions. The modules are Flax NNX
and exist while a function is traced; `make_decoder` returns a record of pure functions
over a plain nested dict of arrays, which is all that the rest of the library sees.

    x = embedding[tokens]
    for each layer:   x += attention(norm(x));  x += mlp(norm(x))
    hidden = norm(x);  logits = hidden @ unembedding.T

Layers are scanned over the family's period: the layers at one place of the period are
stacked, one scan step is one period, and what the period leaves over is unrolled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pref_jax.models import attention as attention_lib
from pref_jax.types import Model

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds saved: everything, matrix products, or block inputs."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one period."""

    window: int | None = None  # sliding attention window in positions; None: no limit
    rope_theta: float = 10000.0  # base of the rotary frequencies


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """All sizes of a decoder, and how it computes."""

    vocab_size: int  # entries of the embedding
    width: int  # D, of the residual stream
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # key and value heads; divides num_heads
    head_dim: int
    mlp_width: int  # of the gated MLP's inner layer
    period: tuple[LayerKind, ...] = (LayerKind(),)  # repeated over the layers
    norm_eps: float = 1e-5  # inside the square root of RMSNorm
    tied: bool = True  # unembedding = embedding
    embedding_scale: float = 1.0  # what the embedding of a token is multiplied by
    max_positions: int | None = None  # longest text that it is made for; None: any
    dtype: str = "float32"  # of matrix products: float32 or bfloat16
    attention: str = "auto"  # a name of attention.IMPLEMENTATIONS
    remat: str = "none"  # a name of REMAT_POLICIES

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {self}.")
        if self.max_positions is not None and self.max_positions < 1:
            raise ValueError(f"`max_positions` must be at least 1; got {self}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_kv_heads`; got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even for rotary embedding; got {self.head_dim}."
            )
        for name, allowed in (
            ("dtype", ("float32", "bfloat16")),
            ("attention", attention_lib.IMPLEMENTATIONS),
            ("remat", REMAT_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}; got "
                    f"{getattr(self, name)!r}."
                )


# Logical axes of each parameter by the last two names of its path. `sharding` maps
# logical axes to mesh axes; stacked layers have one more axis, "layers", in front.
PARAM_AXES = {
    "attention/query": ("embed", "heads", "head_dim"),
    "attention/key": ("embed", "kv_heads", "head_dim"),
    "attention/value": ("embed", "kv_heads", "head_dim"),
    "attention/out": ("heads", "head_dim", "embed"),
    "mlp/gate": ("embed", "mlp"),
    "mlp/up": ("embed", "mlp"),
    "mlp/down": ("mlp", "embed"),
    "attention_norm/scale": ("norm",),
    "mlp_norm/scale": ("norm",),
    "final_norm/scale": ("norm",),
    "embedding": ("vocab", "embed"),
    "unembedding": ("vocab", "embed"),
}


def _normal(rngs, shape, std):
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _residual_std(config, fan_in):
    """Of a matrix that writes into the residual stream, at initialisation.

    What all layers add up to is as large as the embedding that they are added to: a
    larger sum would drown the token, and copying would be learnt late.
    """
    embedding_size = config.embedding_scale * config.width**-0.5
    return embedding_size * (2 * config.num_layers * fan_in) ** -0.5


def _with_leading_axes(x, ndim):
    """A vector as [1, ..., 1, n], so that it multiplies without rank promotion."""
    return x.reshape((1,) * (ndim - 1) + x.shape)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""

    def __init__(self, config: DecoderConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.width))

    def __call__(self, x):
        """[..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean + self.eps)
        scale = _with_leading_axes(self.scale[...].astype(jnp.float32), x.ndim)
        return (normed * scale).astype(x.dtype)


def rotate(x, position, theta):
    """Rotary embedding, half-split: the first half of a head pairs with the second.

    Args:
      x: [..., H, head_dim].
      position: i32[...].
      theta: base of the frequencies.

    Source: Su et al., arXiv:2104.09864, in the order that Hugging Face checkpoints use.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency = _with_leading_axes(frequency, position.ndim + 1)
    angle = position.astype(jnp.float32)[..., None] * frequency
    sin, cos = jnp.sin(angle)[..., None, :], jnp.cos(angle)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(out, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; `attend` says over which keys."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.kind = kind
        width, head_dim = config.width, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        std = width**-0.5
        out_std = _residual_std(config, heads * head_dim)
        self.query = _normal(rngs, (width, heads, head_dim), std)
        self.key = _normal(rngs, (width, kv_heads, head_dim), std)
        self.value = _normal(rngs, (width, kv_heads, head_dim), std)
        self.out = _normal(rngs, (heads, head_dim, width), out_std)

    def __call__(self, x, position, attend):
        """[..., D] -> [..., D], and what `attend` keeps."""
        query, key, value = (
            jnp.einsum("...d,dhf->...hf", x, weight[...].astype(x.dtype))
            for weight in (self.query, self.key, self.value)
        )
        query = rotate(query, position, self.kind.rope_theta)
        key = rotate(key, position, self.kind.rope_theta)
        out, kept = attend(query, key, value, self.kind.window)
        return jnp.einsum("...hf,hfd->...d", out, self.out[...].astype(x.dtype)), kept


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        self.gate = _normal(rngs, (width, inner), width**-0.5)
        self.up = _normal(rngs, (width, inner), width**-0.5)
        self.down = _normal(rngs, (inner, width), _residual_std(config, inner))

    def __call__(self, x):
        """[..., D] -> [..., D]."""
        gate = jax.nn.silu(x @ self.gate[...].astype(x.dtype))
        up = x @ self.up[...].astype(x.dtype)
        return (gate * up) @ self.down[...].astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention, then MLP, each normed before and added after."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, kind, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, position, attend):
        """[..., D] -> [..., D], and what `attend` keeps."""
        out, kept = self.attention(self.attention_norm(x), position, attend)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kept


class Decoder(nnx.Module):
    """The parameters, and the walk through the layers that all functions share."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.width)
        self.embedding = _normal(rngs, shape, config.width**-0.5)
        self.num_periods, rest = divmod(config.num_layers, len(config.period))

        def stacked(kind):
            @nnx.split_rngs(splits=self.num_periods)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return Block(config, kind, rngs=rngs)

            return make(rngs)

        if self.num_periods:
            self.blocks = nnx.Dict(
                {str(i): stacked(kind) for i, kind in enumerate(config.period)}
            )
        if rest:
            self.last_blocks = nnx.Dict(
                {
                    str(i): Block(config, kind, rngs=rngs)
                    for i, kind in enumerate(config.period[:rest])
                }
            )
        self.final_norm = RMSNorm(config)
        if not config.tied:
            self.unembedding = _normal(rngs, shape, config.width**-0.5)

    def walk(self, tokens, position, make_attend, carry):
        """Run all layers; returns the normed state, the carry and what layers kept.

        `make_attend(carry, layer)` returns the `attend` of a layer; what `attend`
        keeps is (new carry, output stacked over layers).
        """
        x = self.embedding[...][tokens] * self.config.embedding_scale
        x = x.astype(self.config.dtype)
        period = len(self.config.period)
        kept = []
        if self.num_periods:
            blocks, state = nnx.split(self.blocks)

            def one_period(carry_x, inputs):
                state, index = inputs
                layers = nnx.merge(blocks, state)
                x, carry = carry_x
                outputs = []
                for i in range(period):
                    attend = make_attend(carry, index * period + i)
                    x, (carry, output) = layers[str(i)](x, position, attend)
                    outputs.append(output)
                outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
                return (x, carry), outputs

            if self.config.remat != "none":
                one_period = jax.checkpoint(
                    one_period,
                    policy=REMAT_POLICIES[self.config.remat],
                    prevent_cse=False,  # inside a scan the barrier only costs time
                )
            indices = jnp.arange(self.num_periods)
            (x, carry), outputs = jax.lax.scan(one_period, (x, carry), (state, indices))
            kept.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs))
        for i in range(self.config.num_layers - self.num_periods * period):
            attend = make_attend(carry, self.num_periods * period + i)
            x, (carry, output) = self.last_blocks[str(i)](x, position, attend)
            kept.append(jax.tree.map(lambda y: y[None], output))
        kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept)
        return self.final_norm(x), carry, kept


def make_decoder(config: DecoderConfig) -> Model:
    """The functions of a decoder of this config.

    >>> config = DecoderConfig(vocab_size=7, width=8, num_layers=2, num_heads=2,
    ...                        num_kv_heads=1, head_dim=4, mlp_width=16)
    >>> model = make_decoder(config)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> tokens = jnp.array([[1, 2, 3]])
    >>> position = jnp.arange(3)[None]
    >>> jax.jit(model.hidden)(params, tokens, position, jnp.full((1, 3), 3)).shape
    (1, 3, 8)
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: _build(config, 0)))

    def module(params) -> Decoder:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    sizes = jax.tree.leaves(nnx.to_pure_dict(abstract))
    num_params = sum(leaf.size for leaf in sizes)
    embedding_size = config.vocab_size * config.width
    # The lookup costs nothing; the unembedding does, tied or not.
    flops = 2.0 * (num_params - (0 if config.tied else embedding_size))
    return Model(
        init=lambda key: nnx.to_pure_dict(nnx.state(_build(config, key))),
        hidden=functools.partial(_hidden, module, config),
        unembedding=lambda params: params[
            "embedding" if config.tied else "unembedding"
        ],
        init_cache=functools.partial(_init_cache, config),
        prefill=functools.partial(_prefill, module, config),
        decode=functools.partial(_decode, module),
        param_axes=param_axes,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        flops_per_token=flops,
    )


def _build(config, key):
    return Decoder(config, rngs=nnx.Rngs(key))


def param_axes(params) -> Any:
    """Logical axis names of each parameter, by its path.

    Raises:
      ValueError: a parameter that `PARAM_AXES` does not name.
    """

    def axes(path, leaf):
        names = [entry.key for entry in path]
        known = PARAM_AXES.get("/".join(names[-2:])) or PARAM_AXES.get(names[-1])
        if known is None:
            raise ValueError(
                f"parameter {'/'.join(names)} has no logical axes; add it to "
                f"PARAM_AXES in models/decoder.py."
            )
        return ("layers",) * (jnp.ndim(leaf) - len(known)) + known

    return jax.tree_util.tree_map_with_path(axes, params)


def _hidden(module, config, params, tokens, position, end):
    attention = attention_lib.IMPLEMENTATIONS[config.attention]

    def make_attend(carry, layer):
        del layer

        def attend(query, key, value, window):
            out = attention(query, key, value, position, end, window=window)
            return out, (carry, ())

        return attend

    return module(params).walk(tokens, position, make_attend, ())[0]


def _init_cache(config, num_prompts, prompt_length, num_samples, num_steps):
    heads = (config.num_kv_heads, config.head_dim)
    prompt = (config.num_layers, num_prompts, prompt_length, *heads)
    own = (config.num_layers, num_prompts, num_samples, num_steps, *heads)
    return {
        "prompt": {name: jnp.zeros(prompt, config.dtype) for name in ("key", "value")},
        "own": {name: jnp.zeros(own, config.dtype) for name in ("key", "value")},
    }


def _prefill(module, config, params, tokens, length, cache):
    attention = attention_lib.IMPLEMENTATIONS[config.attention]
    index = jnp.arange(tokens.shape[1])
    position = jnp.broadcast_to(index, tokens.shape)
    # Padding sees and is seen by itself alone; `length` hides it from the samples.
    end = jnp.where(index[None] < length[:, None], length[:, None], index[None] + 1)

    def make_attend(carry, layer):
        del layer

        def attend(query, key, value, window):
            out = attention(query, key, value, position, end, window=window)
            return out, (carry, {"key": key, "value": value})

        return attend

    _, _, kept = module(params).walk(tokens, position, make_attend, ())
    return {**cache, "prompt": kept}


def _decode(module, params, tokens, length, step, cache):
    position = jnp.broadcast_to(length[:, None] + step, tokens.shape)
    prompt = cache["prompt"]

    def make_attend(own, layer):
        def attend(query, key, value, window):
            # The whole cache is the carry and is updated in place, one token a layer.
            new = {
                name: own[name].at[layer, :, :, step].set(x)
                for name, x in (("key", key), ("value", value))
            }
            out = attention_lib.branch_attention(
                query,
                prompt["key"][layer],
                prompt["value"][layer],
                new["key"][layer],
                new["value"][layer],
                prompt_length=length,
                step=step,
                window=window,
            )
            return out, (new, ())

        return attend

    hidden, own, _ = module(params).walk(tokens, position, make_attend, cache["own"])
    return hidden, {**cache, "own": own}
