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
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pref_jax.axes import GATHERED, constrain, parts, per_device
from pref_jax.models import attention as attention_lib
from pref_jax.models.products import project, with_leading_axes
from pref_jax.types import Model

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds saved: everything, matrix products, or block inputs."""

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""The non-linearity of the MLP by name."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by a factor: positions that are squeezed.

    Source: Chen et al., arXiv:2306.15595.
    """

    factor: float
    amplitude = 1.0

    def __call__(self, frequency):
        """f32[N] -> f32[N], radians a position."""
        return frequency / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by a factor, high ones kept, those between mixed.

    Source: the code that Llama 3.1 was released with; no paper has the formula.
    """

    factor: float
    low: float  # turns within the old length below which a frequency is low
    high: float  # turns above which it is high
    old_positions: int  # longest text before the extension
    amplitude = 1.0

    def __call__(self, frequency):
        """f32[N] -> f32[N], radians a position."""
        turns = self.old_positions * frequency / np.float32(2 * math.pi)
        mix = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return ((1 - mix) * frequency / self.factor + mix * frequency).astype("float32")


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """Each rotary frequency divided by a factor of its own, and a larger amplitude.

    Source: LongRoPE, arXiv:2402.13753, as Phi-3 and Phi-4-mini use it.
    """

    short: tuple[float, ...]  # a factor for each frequency, for texts of the old length
    long: tuple[float, ...]  # the same for longer texts
    is_long: bool  # which of the two a model computes with
    old_positions: int  # longest text before the extension
    new_positions: int  # and after it
    amplitude: float  # of sine and cosine

    def __call__(self, frequency):
        """f32[N] -> f32[N], radians a position."""
        factors = self.long if self.is_long else self.short
        return frequency / np.asarray(factors, np.float32)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embedding: how far each pair of a head's entries turns per position."""

    theta: float = 10000.0  # base of the frequencies
    fraction: float = 1.0  # of the head's entries that turn; its first ones
    scaling: LinearScaling | Llama3Scaling | LongScaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """f32[N]: radians a position of each of the N pairs that turn."""
        exponent = np.arange(0, self.size(head_dim), 2, dtype=np.float32)
        exponent /= np.float32(self.size(head_dim))
        frequency = np.float32(1.0) / np.float32(self.theta) ** exponent
        return frequency if self.scaling is None else self.scaling(frequency)

    def size(self, head_dim: int) -> int:
        """Entries of a head that turn."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one period."""

    window: int | None = None  # sliding attention window in positions; None: no limit
    rotary: Rotary | None = Rotary()  # None: attention is not told of positions


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """All sizes of a decoder, and how it computes."""

    vocab_size: int  # entries of the embedding
    width: int  # D, of the residual stream
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # key and value heads; divides num_heads
    head_dim: int
    mlp_width: int  # of the MLP's inner layer
    period: tuple[LayerKind, ...] = (LayerKind(),)  # repeated over the layers
    norm: str = "rms"  # rms (RMSNorm) or layer (LayerNorm)
    norm_eps: float = 1e-5  # inside the square root of the norm
    norm_offset: float = 0.0  # added to the scale of RMSNorm; Gemma's is 1
    norm_placement: str = "pre"  # where a block is normed: pre, post, or both
    qk_norm: str = "none"  # of queries and keys: none, head (each) or all (together)
    qkv_bias: bool = False
    out_bias: bool = False  # of attention
    mlp_bias: bool = False
    gated: bool = True  # down(act(gate(x)) * up(x)), or down(act(up(x)))
    activation: str = "silu"  # a name of ACTIVATIONS
    parallel: bool = False  # attention and MLP of a layer read the same state
    attention_scale: float | None = None  # of the logits; None: head_dim ** -0.5
    attention_softcap: float | None = None  # bound of attention's logits
    logit_softcap: float | None = None  # bound of the logits over the vocabulary
    learned_positions: int = 0  # vectors, one for each position; 0: none
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
        longest = self.max_positions or math.inf
        if self.learned_positions and longest > self.learned_positions:
            raise ValueError(
                f"`max_positions` can be at most {self.learned_positions}, the number "
                f"of `learned_positions`; got {self.max_positions}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_kv_heads`; got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive or None; got {value}.")
        for name, allowed in (
            ("norm", NORMS),
            ("norm_placement", ("pre", "post", "both")),
            ("qk_norm", ("none", "head", "all")),
            ("activation", ACTIVATIONS),
            ("dtype", ("float32", "bfloat16")),
            ("attention", attention_lib.IMPLEMENTATIONS),
            ("remat", REMAT_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}; got "
                    f"{getattr(self, name)!r}."
                )
        for kind in self.period:
            self._check_kind(kind)

    def _check_kind(self, kind: LayerKind):
        if kind.window is not None and kind.window < 1:
            raise ValueError(f"`window` must be at least 1 or None; got {kind.window}.")
        if kind.rotary is None:
            return
        size = kind.rotary.size(self.head_dim)
        if size % 2 or not 0 < size <= self.head_dim:
            raise ValueError(
                f"rotary embedding turns an even number of a head's entries, 2 or "
                f"more; got {size} of `head_dim` {self.head_dim}."
            )
        scaling = kind.rotary.scaling
        if isinstance(scaling, LongScaling):
            lengths = {len(scaling.short), len(scaling.long)}
            if lengths != {size // 2}:
                raise ValueError(
                    f"`LongScaling` needs a factor for each of {size // 2} "
                    f"frequencies; got {len(scaling.short)} and {len(scaling.long)}."
                )


def describe(config: DecoderConfig) -> dict:
    """A config as plain JSON values, which `from_description` reads back."""
    values = dataclasses.asdict(config)
    for kind, described in zip(config.period, values["period"], strict=True):
        if kind.rotary is not None and kind.rotary.scaling is not None:
            name = type(kind.rotary.scaling).__name__
            described["rotary"]["scaling"]["type"] = name
    return values


def from_description(values: dict) -> DecoderConfig:
    """The config that `describe` described."""

    def read_kind(window, rotary):
        if rotary is None:
            return LayerKind(window, None)
        scaling = rotary["scaling"]
        if scaling is not None:
            read = {x.__name__: x for x in (LinearScaling, Llama3Scaling, LongScaling)}
            fields = {k: v for k, v in scaling.items() if k != "type"}
            lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
            scaling = read[scaling["type"]](**fields | lists)
        return LayerKind(window, Rotary(**rotary | {"scaling": scaling}))

    period = tuple(read_kind(**kind) for kind in values["period"])
    return DecoderConfig(**values | {"period": period})


# Logical axes of each parameter by the last two names of its path. `pref_jax.axes` maps
# them to mesh axes; stacked layers have one more axis, "layers", in front.
PARAM_AXES = {
    "attention/query": ("embed", "heads", "head_dim"),
    "attention/key": ("embed", "kv_heads", "head_dim"),
    "attention/value": ("embed", "kv_heads", "head_dim"),
    "attention/out": ("heads", "head_dim", "embed"),
    "attention/query_bias": ("heads", "bias"),
    "attention/key_bias": ("kv_heads", "bias"),
    "attention/value_bias": ("kv_heads", "bias"),
    "attention/out_bias": ("bias",),
    "query_norm/scale": ("norm", "norm"),
    "key_norm/scale": ("norm", "norm"),
    "mlp/gate": ("embed", "mlp"),
    "mlp/up": ("embed", "mlp"),
    "mlp/down": ("mlp", "embed"),
    "mlp/gate_bias": ("bias",),
    "mlp/up_bias": ("bias",),
    "mlp/down_bias": ("bias",),
    "scale": ("norm",),  # of the norms of the residual stream
    "bias": ("norm",),
    "embedding": ("vocab", "embed"),
    "positions": ("positions", "embed"),
    "unembedding": ("vocab", "embed"),
    "reward_head": ("embed",),  # of `models/reward_head.py`
}


def _normal(rngs, shape, std):
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _zeros(*shape):
    return nnx.Param(jnp.zeros(shape))


def _residual_std(config, fan_in):
    """Of a matrix that writes into the residual stream, at initialisation.

    What all layers add up to is as large as the embedding that they are added to: a
    larger sum would drown the token, and copying would be learnt late.
    """
    embedding_size = config.embedding_scale * config.width**-0.5
    return embedding_size * (2 * config.num_layers * fan_in) ** -0.5


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset), in float32.

    The mean is over as many of the last axes as the scale has, of 1 or more entries.
    """

    def __init__(self, config: DecoderConfig, *shape: int):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - self.offset))

    def __call__(self, x):
        """[..., *shape] -> the same."""
        scale = self.scale[...].astype(jnp.float32) + self.offset
        axes = [-i for i, size in enumerate(scale.shape[::-1], 1) if size > 1 or i == 1]
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean + self.eps)
        return (normed * with_leading_axes(scale, x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias, in float32."""

    def __init__(self, config: DecoderConfig, *shape: int):
        self.eps = config.norm_eps
        self.scale, self.bias = nnx.Param(jnp.ones(shape)), _zeros(*shape)

    def __call__(self, x):
        """[..., D] -> [..., D]."""
        scale, bias = (
            with_leading_axes(param[...].astype(jnp.float32), x.ndim)
            for param in (self.scale, self.bias)
        )
        normed = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.eps)
        return (normed * scale + bias).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
"""Norms of the residual stream by name."""


def rotate(x, position, rotary: Rotary):
    """Rotary embedding, half-split: the first half of what turns pairs with the second.

    Args:
      x: [..., H, head_dim].
      position: i32[...].
      rotary: which entries turn, and how far.

    Source: Su et al., arXiv:2104.09864, in the order that Hugging Face checkpoints use.
    """
    frequency = jnp.asarray(rotary.frequencies(x.shape[-1]))
    frequency = with_leading_axes(frequency, position.ndim + 1)
    angle = (position.astype(jnp.float32)[..., None] * frequency)[..., None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if rotary.scaling is not None and rotary.scaling.amplitude != 1:
        sin, cos = sin * rotary.scaling.amplitude, cos * rotary.scaling.amplitude
    half = frequency.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(y.astype(x.dtype) for y in turned), rest], axis=-1)


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
        bias = config.qkv_bias
        self.query_bias = _zeros(heads, head_dim) if bias else None
        self.key_bias = _zeros(kv_heads, head_dim) if bias else None
        self.value_bias = _zeros(kv_heads, head_dim) if bias else None
        self.out_bias = _zeros(width) if config.out_bias else None
        together = config.qk_norm == "all"
        self.query_norm, self.key_norm = (
            None
            if config.qk_norm == "none"
            else RMSNorm(config, number if together else 1, head_dim)
            for number in (heads, kv_heads)
        )

    def __call__(self, x, position, attend, adapters):
        """[..., D] -> [..., D], and what `attend` keeps."""
        query, key, value = (
            project(
                x, matrix, bias, adapters.get(name), PARAM_AXES[f"attention/{name}"]
            )
            for name, matrix, bias in (
                ("query", self.query, self.query_bias),
                ("key", self.key, self.key_bias),
                ("value", self.value, self.value_bias),
            )
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.kind.rotary is not None:
            query = rotate(query, position, self.kind.rotary)
            key = rotate(key, position, self.kind.rotary)
        with jax.named_scope("attend"):
            out, kept = attend(query, key, value, self.kind.window)
        out = project(
            out,
            self.out,
            self.out_bias,
            adapters.get("out"),
            PARAM_AXES["attention/out"],
            inputs=2,
        )
        return out, kept


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, inner, bias = config.width, config.mlp_width, config.mlp_bias
        self.activation = config.activation
        gated = config.gated
        self.gate = _normal(rngs, (width, inner), width**-0.5) if gated else None
        self.up = _normal(rngs, (width, inner), width**-0.5)
        self.down = _normal(rngs, (inner, width), _residual_std(config, inner))
        self.gate_bias = _zeros(inner) if bias and gated else None
        self.up_bias = _zeros(inner) if bias else None
        self.down_bias = _zeros(width) if bias else None

    def __call__(self, x, adapters):
        """[..., D] -> [..., D]."""
        activation = ACTIVATIONS[self.activation]

        def times(x, name, matrix, bias):
            axes = PARAM_AXES[f"mlp/{name}"]
            return project(x, matrix, bias, adapters.get(name), axes)

        inner = [times(x, "up", self.up, self.up_bias)]
        if self.gate is not None:
            inner.insert(0, times(x, "gate", self.gate, self.gate_bias))

        # Nothing between the wide products and the narrow one is kept for the backward
        # pass. In a scan, the barrier against computing it once only costs time.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def finish(first, *others):
            inner = math.prod(others, start=activation(first))
            return times(inner, "down", self.down, self.down_bias)

        return finish(*inner)


class Block(nnx.Module):
    """One layer: attention, then MLP or beside it, each normed and added."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.parallel = config.parallel
        self.attention = Attention(config, kind, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        norm = functools.partial(NORMS[config.norm], config, config.width)
        before = config.norm_placement in ("pre", "both")
        after = config.norm_placement in ("post", "both")
        self.attention_norm = norm() if before else None
        self.attention_post_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp_post_norm = norm() if after else None

    def __call__(self, x, position, attend, adapters):
        """[..., D] -> [..., D], and what `attend` keeps."""
        # Traces and compiled programs tell the parts apart by these names.
        with jax.named_scope("attention"):
            normed = _optional(self.attention_norm, x)
            out, kept = self.attention(
                normed, position, attend, adapters.get("attention", {})
            )
            after = x + _optional(self.attention_post_norm, out)
            after = constrain(after, "rows", None, "width")
        with jax.named_scope("mlp"):
            out = self.mlp(
                _optional(self.mlp_norm, x if self.parallel else after),
                adapters.get("mlp", {}),
            )
            after += _optional(self.mlp_post_norm, out)
            return constrain(after, "rows", None, "width"), kept


def _optional(norm, x):
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """The parameters, and the walk through the layers that all functions share."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.width)
        self.embedding = _normal(rngs, shape, config.width**-0.5)
        # Positions are smaller than the embedding, so that the token is heard.
        self.positions = (
            _normal(
                rngs,
                (config.learned_positions, config.width),
                0.1 * config.embedding_scale * config.width**-0.5,
            )
            if config.learned_positions
            else None
        )
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
        self.final_norm = NORMS[config.norm](config, config.width)
        if not config.tied:
            self.unembedding = _normal(rngs, shape, config.width**-0.5)

    def walk(self, tokens, position, make_attend, carry, adapters):
        """Run all layers; returns the normed state, the carry and what layers kept.

        `make_attend(carry, layer)` returns the `attend` of a layer; what `attend`
        keeps is (new carry, output stacked over layers). `adapters` has the layout of
        the blocks, with {"a", "b"} in the place of a matrix; {}: none.
        """
        # A device looks up its part of the width for all rows that share it, then the
        # devices exchange rows for widths. The table is not gathered over fsdp; where
        # tensor splits the vocabulary, the compiler gathers those parts of it.
        x = constrain(self.embedding[...][tokens], "fsdp_rows", None, "embed")
        x = x.astype(jnp.float32) * self.config.embedding_scale
        if self.positions is not None:
            # NaN, not the last one, where there is none.
            learned = jnp.take(self.positions[...], position, axis=0, mode="fill")
            x += constrain(learned, "fsdp_rows", None, "embed").astype(jnp.float32)
        x = constrain(x.astype(self.config.dtype), "rows", None, "width")
        period = len(self.config.period)
        kept = []
        if self.num_periods:
            blocks, state = nnx.split(self.blocks)

            def one_period(carry_x, inputs):
                state, adapters, index = inputs
                layers = nnx.merge(blocks, state)
                x, carry = carry_x
                outputs = []
                for i in range(period):
                    attend = make_attend(carry, index * period + i)
                    x, (carry, output) = layers[str(i)](
                        x, position, attend, adapters.get(str(i), {})
                    )
                    outputs.append(output)
                outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
                return (x, carry), outputs

            policy = REMAT_POLICIES[self.config.remat]
            if policy is None and parts("embed") > 1:
                # All is kept but what would be the whole model on every device.
                policy = jax.checkpoint_policies.save_anything_except_these_names(
                    GATHERED
                )
            if policy is not None:
                one_period = jax.checkpoint(
                    one_period,
                    policy=policy,
                    prevent_cse=False,  # inside a scan the barrier only costs time
                )
            inputs = (state, adapters.get("blocks", {}), jnp.arange(self.num_periods))
            with jax.named_scope("layers"):
                (x, carry), outputs = jax.lax.scan(one_period, (x, carry), inputs)
            kept.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs))
        last_adapters = adapters.get("last_blocks", {})
        for i in range(self.config.num_layers - self.num_periods * period):
            attend = make_attend(carry, self.num_periods * period + i)
            x, (carry, output) = self.last_blocks[str(i)](
                x, position, attend, last_adapters.get(str(i), {})
            )
            kept.append(jax.tree.map(lambda y: y[None], output))
        kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept)
        return self.final_norm(x), carry, kept


def make_decoder(config: DecoderConfig) -> Model:
    """The functions of a decoder of this config.

    Its parameters may carry low-rank `adapters` (`models/lora.py`); what else they hold
    beside the decoder's own, such as a reward head, is for others.

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
    shapes = nnx.to_pure_dict(abstract)

    def walk(params, tokens, position, make_attend, carry):
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, {name: params[name] for name in shapes})
        decoder = nnx.merge(graph, state)
        adapters = params.get("adapters", {})
        return decoder.walk(tokens, position, make_attend, carry, adapters)

    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # Lookups cost nothing; the unembedding does, tied or not.
    free = 0 if config.tied else config.vocab_size * config.width
    free += config.learned_positions * config.width
    return Model(
        init=lambda key: nnx.to_pure_dict(nnx.state(_build(config, key))),
        hidden=functools.partial(_hidden, walk, config),
        unembedding=lambda params: params[
            "embedding" if config.tied else "unembedding"
        ],
        init_cache=functools.partial(_init_cache, config),
        prefill=functools.partial(_prefill, walk, config),
        decode=functools.partial(_decode, walk, config),
        param_axes=param_axes,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        flops_per_token=2.0 * (num_params - free),
        logit_softcap=config.logit_softcap,
        description=json.dumps({"decoder": describe(config)}),
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


def _attention_options(config):
    return {"scale": config.attention_scale, "softcap": config.attention_softcap}


def _attention(config, query, key, value, position, end, window):
    """Each device attends over its own rows and heads."""
    attention = functools.partial(
        attention_lib.IMPLEMENTATIONS[config.attention],
        window=window,
        **_attention_options(config),
    )
    heads = ("rows", None, "kv_heads", None)
    names = (heads, heads, heads, ("rows", None), ("rows", None))
    return per_device(attention, names, heads)(query, key, value, position, end)


def _hidden(walk, config, params, tokens, position, end):
    def make_attend(carry, layer):
        del layer

        def attend(query, key, value, window):
            out = _attention(config, query, key, value, position, end, window)
            return out, (carry, ())

        return attend

    return walk(params, tokens, position, make_attend, ())[0]


def _init_cache(config, num_prompts, prompt_length, num_samples, num_steps):
    layers, heads, head_dim = config.num_layers, config.num_kv_heads, config.head_dim
    prompt = (layers, num_prompts, heads, prompt_length, head_dim)
    own = (layers, num_prompts, num_samples, heads, num_steps, head_dim)
    return {
        "prompt": {name: jnp.zeros(prompt, config.dtype) for name in ("key", "value")},
        "own": {name: jnp.zeros(own, config.dtype) for name in ("key", "value")},
    }


def _prefill(walk, config, params, tokens, length, cache):
    index = jnp.arange(tokens.shape[1])
    # Padding sees and is seen by itself alone; `length` hides it from the samples.
    position = jnp.where(index[None] < length[:, None], index[None], 0)
    end = jnp.where(index[None] < length[:, None], length[:, None], index[None] + 1)

    def make_attend(carry, layer):
        del layer

        def attend(query, key, value, window):
            out = _attention(config, query, key, value, position, end, window)
            kept = {"key": key, "value": value}
            return out, (carry, {k: x.swapaxes(1, 2) for k, x in kept.items()})

        return attend

    _, _, kept = walk(params, tokens, position, make_attend, ())
    return {**cache, "prompt": kept}


def _decode(walk, config, params, tokens, length, step, cache):
    position = jnp.broadcast_to(length[:, None] + step, tokens.shape)
    prompt = cache["prompt"]

    def make_attend(own, layer):
        def attend(query, key, value, window):
            # The whole cache is the carry and is updated in place, one token a layer.
            new = {
                name: own[name].at[layer, :, :, :, step].set(x)
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
                **_attention_options(config),
            )
            return out, (new, ())

        return attend

    hidden, own, _ = walk(params, tokens, position, make_attend, cache["own"])
    return hidden, {**cache, "own": own}
