"""The families of Hugging Face checkpoints: configs and tensor names, both ways.

A family is a record, and all that differs between families is here: how its
`config.json` becomes a `DecoderConfig` and back, and where each parameter of ours lies
in its files. `pref_jax.models.pretrained` reads and writes by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from pref_jax.models.decoder import (
    DecoderConfig,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rotary,
)


class UnsupportedConfigError(ValueError):
    """A `config.json` that asks for something that the decoder does not compute."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter of ours lies in the files.

    Attributes:
      name: of the tensor in the files.
      disk: its axes there, separated by commas, each made of letters: d width, h query
        heads, k key heads, f head_dim, m MLP, v vocabulary, p positions; a digit is an
        axis of which `pick` is ours. `a+b` on the first axis: a after b, and `pick` is
        the number of ours.
      ours: the letters in our order.
      pick: which part of a fused tensor is ours.
    """

    name: str
    disk: str
    ours: str
    pick: int = 0

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the tensor in the files."""
        return tuple(
            sum(_product(part, sizes) for part in axis.split("+"))
            for axis in self.disk.split(",")
        )

    def size(self, sizes: Mapping[str, int]) -> int:
        """Entries of our parameter."""
        return _product(self.ours, sizes)

    def view(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our parameter as a view of the whole tensor: to read it, or to fill it in."""
        first, *others = self.disk.split(",")
        parts = first.split("+")
        if len(parts) > 1:
            start = sum(_product(part, sizes) for part in parts[: self.pick])
            first = parts[self.pick]
            array = array[start : start + _product(first, sizes)]
        letters = "".join((first, *others))
        view = array.reshape([_size(letter, sizes) for letter in letters])
        digits = [i for i, letter in enumerate(letters) if letter.isdigit()]
        for axis in digits:
            view = view[(slice(None),) * axis + (self.pick,)]
            letters = letters[:axis] + letters[axis + 1 :]
        return view.transpose([letters.index(letter) for letter in self.ours])


def _size(letter: str, sizes: Mapping[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def _product(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(_size(letter, sizes) for letter in letters)


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Length of each letter that `Tensor` speaks of."""
    return {
        "d": config.width,
        "h": config.num_heads,
        "k": config.num_kv_heads,
        "f": config.head_dim,
        "m": config.mlp_width,
        "v": config.vocab_size,
        "p": config.learned_positions,
        "o": 1,
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """One layout of checkpoints.

    Attributes:
      model_type: as in `config.json`.
      architecture: class of `transformers` that computes it.
      read: Hugging Face config -> fields of `DecoderConfig`.
      write: `DecoderConfig` -> fields of a Hugging Face config.
      tensors: our parameter's path, without the number of the layer -> where it lies.
      layer: prefix of a layer's tensors, with {} for its number.
      base: prefix of all but the head's tensors; files of a bare model lack it.
      ignored: ends of the names of tensors that follow from the config.
      transposed: matrices are stored as [in, out].
      reward_architecture: the class with a reward head; "": as `architecture`, with
        `ForSequenceClassification` at its end.
    """

    model_type: str
    architecture: str
    read: Callable
    write: Callable
    tensors: Mapping[str, Tensor]
    layer: str = "model.layers.{}."
    base: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    transposed: bool = False
    reward_architecture: str = ""

    def tensor(self, path: str, layer: int | None = None) -> Tensor | None:
        """Where the parameter at a path of ours, `blocks/0` cut off, lies."""
        found = self.tensors.get(path)
        if found is None or layer is None:
            return found
        return dataclasses.replace(found, name=self.layer.format(layer) + found.name)


# --- configs --------------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedConfigError(
            f"has the activation {name!r}; the decoder computes "
            f"{', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _need(config, **values) -> None:
    """Raise unless these fields of a config are absent, None or as given."""
    for name, needed in values.items():
        value = getattr(config, name, None)
        if value is not None and value != needed:
            raise UnsupportedConfigError(
                f"has {name} = {value!r}; the decoder computes {needed!r} only."
            )


def _read_rotary(
    rope: Mapping, *, config, partial: bool = False, stretched: bool = False
) -> Rotary:
    """A rotary embedding; only some families compute partial ones and LongRoPE."""
    kind = rope.get("rope_type", "default")
    old = rope.get("original_max_position_embeddings")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(float(rope["factor"]))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            float(rope["factor"]),
            low=float(rope["low_freq_factor"]),
            high=float(rope["high_freq_factor"]),
            old_positions=old,
        )
    elif kind == "longrope" and stretched:
        new = config.max_position_embeddings
        ratio = rope.get("factor") or new / old
        amplitude = rope.get("attention_factor")
        if amplitude is None:
            amplitude = max(1.0, math.sqrt(1 + math.log(ratio) / math.log(old)))
        scaling = LongScaling(
            short=tuple(rope["short_factor"]),
            long=tuple(rope["long_factor"]),
            is_long=False,
            old_positions=old,
            new_positions=new,
            amplitude=amplitude,
        )
    else:
        raise UnsupportedConfigError(
            f"has rope_type = {kind!r}; the decoder computes default, linear, llama3, "
            f"and longrope of phi3."
        )
    fraction = rope.get("partial_rotary_factor") or 1.0
    if fraction != 1.0 and not partial:
        raise UnsupportedConfigError(
            f"has partial_rotary_factor = {fraction}, which models of type "
            f"{config.model_type} do not compute."
        )
    return Rotary(float(rope["rope_theta"]), float(fraction), scaling)


def _write_rotary(rotary: Rotary) -> dict:
    rope: dict = {"rope_type": "default", "rope_theta": rotary.theta}
    if rotary.fraction != 1.0:
        rope["partial_rotary_factor"] = rotary.fraction
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.old_positions,
        }
    elif isinstance(scaling, LongScaling):
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.old_positions,
            "attention_factor": scaling.amplitude,
        }
    return rope


def _period(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest run of kinds that, repeated, gives all layers."""
    return next(
        tuple(kinds[:size])
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )


def _layers(config: DecoderConfig) -> list[LayerKind]:
    period = config.period
    return [period[i % len(period)] for i in range(config.num_layers)]


def _read_layers(config) -> tuple[LayerKind, ...]:
    """Of a config with `layer_types`, and one rotary embedding or one for each type."""
    ropes = config.rope_parameters
    if "rope_theta" in ropes:
        ropes = dict.fromkeys(("sliding_attention", "full_attention"), ropes)
    kinds = {
        "full_attention": (None, "full_attention"),
        "sliding_attention": (config.sliding_window, "sliding_attention"),
    }
    unknown = set(config.layer_types) - set(kinds)
    if unknown:
        raise UnsupportedConfigError(
            f"has layers of type {', '.join(sorted(unknown))}."
        )
    return _period(
        [
            LayerKind(
                kinds[name][0], _read_rotary(ropes[kinds[name][1]], config=config)
            )
            for name in config.layer_types
        ]
    )


def _write_layers(config: DecoderConfig) -> dict:
    """`layer_types` and the one window of those that have one."""
    layers = _layers(config)
    windows = {kind.window for kind in layers} - {None}
    return {
        "layer_types": [
            "full_attention" if kind.window is None else "sliding_attention"
            for kind in layers
        ],
        "sliding_window": min(windows, default=None),
    }


def _read_common(
    config, *, activation: str = "hidden_act", windowed: bool = False, **rotary
) -> dict:
    """What all families but GPT-NeoX and GPT-2 spell alike.

    A window in the config of a family that has none means nothing, to torch as well.
    """
    _need(config, quantization_config=None)
    heads = config.num_attention_heads
    fields = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "mlp_width": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "activation": _activation(getattr(config, activation)),
        "tied": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
    }
    if "rope_theta" in config.rope_parameters:
        window = config.sliding_window if windowed else None
        rope = _read_rotary(config.rope_parameters, config=config, **rotary)
        fields["period"] = (LayerKind(window, rope),)
    return fields


def _write_common(config: DecoderConfig, *, activation: str = "hidden_act") -> dict:
    kind = config.period[0]
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        activation: _HF_ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tied,
    }
    if config.max_positions is not None:
        fields["max_position_embeddings"] = config.max_positions
    rotary = kind.rotary or Rotary()
    fields["rope_parameters"] = _write_rotary(rotary)
    if isinstance(rotary.scaling, LongScaling):
        fields["max_position_embeddings"] = rotary.scaling.new_positions
    return fields


def _read_llama(config) -> dict:
    return _read_common(config) | {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _write_llama(config: DecoderConfig) -> dict:
    return _write_common(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _read_mistral(config) -> dict:
    return _read_common(config, windowed=True)


def _write_mistral(config: DecoderConfig) -> dict:
    return _write_common(config) | {"sliding_window": config.period[0].window}


def _read_qwen2(config) -> dict:
    return _read_common(config) | {"period": _read_layers(config), "qkv_bias": True}


def _read_qwen3(config) -> dict:
    return _read_common(config) | {
        "period": _read_layers(config),
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "qk_norm": "head",
    }


def _write_qwen(config: DecoderConfig) -> dict:
    layers = _write_layers(config)
    return (
        _write_common(config)
        | layers
        | {"use_sliding_window": layers["sliding_window"] is not None}
    )


def _write_qwen3(config: DecoderConfig) -> dict:
    return _write_qwen(config) | {"attention_bias": config.qkv_bias}


def _read_gemma(config, *, activation: str = "hidden_act") -> dict:
    _need(config, use_bidirectional_attention=False)
    return _read_common(config, activation=activation) | {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "embedding_scale": config.hidden_size**0.5,
        "norm_offset": 1.0,
    }


def _write_biased(config: DecoderConfig, *, activation: str = "hidden_act") -> dict:
    fields = _write_common(config, activation=activation)
    return fields | {"attention_bias": config.qkv_bias}


def _read_gemma2(config) -> dict:
    fields = _read_gemma(config, activation="hidden_activation")
    scale = config.query_pre_attn_scalar**-0.5
    is_default = config.query_pre_attn_scalar == fields["head_dim"]
    return fields | {
        "period": _read_layers(config),
        "norm_placement": "both",
        "attention_scale": None if is_default else scale,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


def _write_gemma2(config: DecoderConfig) -> dict:
    scale = config.attention_scale or config.head_dim**-0.5
    fields = _write_biased(config, activation="hidden_activation")
    return (
        fields
        | _write_layers(config)
        | {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def _read_gemma3(config) -> dict:
    # The config has a cap of attention's logits, which the model does not compute.
    return _read_gemma2(config) | {"qk_norm": "head", "attention_softcap": None}


def _write_gemma3(config: DecoderConfig) -> dict:
    ropes = {
        "full_attention" if kind.window is None else "sliding_attention": kind.rotary
        for kind in _layers(config)
    }
    written = {name: _write_rotary(rotary) for name, rotary in ropes.items() if rotary}
    return _write_gemma2(config) | {"rope_parameters": written}


def _read_phi3(config) -> dict:
    return _read_common(config, windowed=True, partial=True, stretched=True)


def _write_phi3(config: DecoderConfig) -> dict:
    fields = _write_common(config) | {"sliding_window": config.period[0].window}
    old = fields["rope_parameters"].get("original_max_position_embeddings")
    return fields | ({} if old is None else {"original_max_position_embeddings": old})


def _read_olmo2(config) -> dict:
    return _read_common(config) | {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "qk_norm": "all",
        "norm_placement": "post",
    }


def _read_gpt_neox(config) -> dict:
    _need(config, quantization_config=None)
    heads = config.num_attention_heads
    rotary = _read_rotary(config.rope_parameters, config=config, partial=True)
    return {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": config.hidden_size // heads,
        "mlp_width": config.intermediate_size,
        "period": (LayerKind(rotary=rotary),),
        "norm": "layer",
        "norm_eps": config.layer_norm_eps,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": True,
        "gated": False,
        "activation": _activation(config.hidden_act),
        "parallel": config.use_parallel_residual,
        "tied": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
    }


def _write_gpt_neox(config: DecoderConfig) -> dict:
    fields = _write_common(config)
    for name in ("rms_norm_eps", "num_key_value_heads", "head_dim"):
        del fields[name]
    # Left out it would be a quarter.
    fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return fields | {
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel,
    }


def _read_gpt2(config) -> dict:
    _need(
        config,
        quantization_config=None,
        add_cross_attention=False,
        scale_attn_by_inverse_layer_idx=False,
    )
    heads, width = config.num_attention_heads, config.hidden_size
    return {
        "vocab_size": config.vocab_size,
        "width": width,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_width": config.n_inner or 4 * width,
        "period": (LayerKind(rotary=None),),
        "norm": "layer",
        "norm_eps": config.layer_norm_epsilon,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": _activation(config.activation_function),
        "attention_scale": None if config.scale_attn_weights else 1.0,
        "learned_positions": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
    }


def _write_gpt2(config: DecoderConfig) -> dict:
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.learned_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation,
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tied,
    }


# --- tensors --------------------------------------------------------------------------


def _linear(path: str, name: str, disk: str, ours: str) -> dict[str, Tensor]:
    """A matrix of shape [out, in], and its bias."""
    out = disk.split(",")[0]
    return {
        path: Tensor(f"{name}.weight", disk, ours),
        f"{path}_bias": Tensor(f"{name}.bias", out, out),
    }


def _fused(paths, name: str, disk: str, bias: str, ours: str) -> dict[str, Tensor]:
    """Several parameters of ours in one matrix, and the same of their biases."""
    tensors = {}
    for pick, path in enumerate(paths):
        letters = ours.replace("h", "k") if pick and "k" in disk else ours
        tensors[path] = Tensor(f"{name}.weight", disk, letters, pick)
        letters = letters.replace("d", "")
        tensors[f"{path}_bias"] = Tensor(f"{name}.bias", bias, letters, pick)
    return tensors


def _norm(path: str, name: str) -> dict[str, Tensor]:
    return {
        f"{path}/scale": Tensor(f"{name}.weight", "d", "d"),
        f"{path}/bias": Tensor(f"{name}.bias", "d", "d"),
    }


_QKV = ("attention/query", "attention/key", "attention/value")

_ENDS = {
    "embedding": Tensor("model.embed_tokens.weight", "v,d", "vd"),
    **_norm("final_norm", "model.norm"),
    "unembedding": Tensor("lm_head.weight", "v,d", "vd"),
    "reward_head": Tensor("score.weight", "1,d", "d"),
}
_OUT = _linear("attention/out", "self_attn.o_proj", "d,hf", "hfd")
_ATTENTION = {
    **_linear("attention/query", "self_attn.q_proj", "hf,d", "dhf"),
    **_linear("attention/key", "self_attn.k_proj", "kf,d", "dkf"),
    **_linear("attention/value", "self_attn.v_proj", "kf,d", "dkf"),
    **_OUT,
}
_DOWN = _linear("mlp/down", "mlp.down_proj", "d,m", "md")
_MLP = {
    **_linear("mlp/gate", "mlp.gate_proj", "m,d", "dm"),
    **_linear("mlp/up", "mlp.up_proj", "m,d", "dm"),
    **_DOWN,
}
_PRE_NORMS = {
    **_norm("attention_norm", "input_layernorm"),
    **_norm("mlp_norm", "post_attention_layernorm"),
}
_POST_NORMS = {
    **_norm("attention_post_norm", "post_attention_layernorm"),
    **_norm("mlp_post_norm", "post_feedforward_layernorm"),
}
_BOTH_NORMS = {
    **_norm("attention_norm", "input_layernorm"),
    **_norm("mlp_norm", "pre_feedforward_layernorm"),
    **_POST_NORMS,
}
_QK_NORMS = {
    "attention/query_norm/scale": Tensor("self_attn.q_norm.weight", "of", "of"),
    "attention/key_norm/scale": Tensor("self_attn.k_norm.weight", "of", "of"),
}
_WIDE_QK_NORMS = {
    "attention/query_norm/scale": Tensor("self_attn.q_norm.weight", "hf", "hf"),
    "attention/key_norm/scale": Tensor("self_attn.k_norm.weight", "kf", "kf"),
}
_LLAMA = _ENDS | _PRE_NORMS | _ATTENTION | _MLP
_PHI3 = {
    **_ENDS,
    **_PRE_NORMS,
    **_fused(_QKV, "self_attn.qkv_proj", "hf+kf+kf,d", "hf+kf+kf", "dhf"),
    **_OUT,
    **_fused(("mlp/gate", "mlp/up"), "mlp.gate_up_proj", "2m,d", "2m", "dm"),
    **_DOWN,
}
_GPT_NEOX = {
    "embedding": Tensor("gpt_neox.embed_in.weight", "v,d", "vd"),
    **_norm("final_norm", "gpt_neox.final_layer_norm"),
    "unembedding": Tensor("embed_out.weight", "v,d", "vd"),
    "reward_head": Tensor("score.weight", "1,d", "d"),
    **_PRE_NORMS,
    **_fused(_QKV, "attention.query_key_value", "h3f,d", "h3f", "dhf"),
    **_linear("attention/out", "attention.dense", "d,hf", "hfd"),
    **_linear("mlp/up", "mlp.dense_h_to_4h", "m,d", "dm"),
    **_linear("mlp/down", "mlp.dense_4h_to_h", "d,m", "md"),
}
# GPT-2 stores its matrices as [in, out].
_GPT2 = {
    "embedding": Tensor("transformer.wte.weight", "v,d", "vd"),
    "positions": Tensor("transformer.wpe.weight", "p,d", "pd"),
    **_norm("final_norm", "transformer.ln_f"),
    "unembedding": Tensor("lm_head.weight", "v,d", "vd"),
    "reward_head": Tensor("score.weight", "1,d", "d"),
    **_norm("attention_norm", "ln_1"),
    **_norm("mlp_norm", "ln_2"),
    **_fused(_QKV, "attn.c_attn", "d,3hf", "3hf", "dhf"),
    "attention/out": Tensor("attn.c_proj.weight", "hf,d", "hfd"),
    "attention/out_bias": Tensor("attn.c_proj.bias", "d", "d"),
    "mlp/up": Tensor("mlp.c_fc.weight", "d,m", "dm"),
    "mlp/up_bias": Tensor("mlp.c_fc.bias", "m", "m"),
    "mlp/down": Tensor("mlp.c_proj.weight", "m,d", "md"),
    "mlp/down_bias": Tensor("mlp.c_proj.bias", "d", "d"),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, _LLAMA),
        Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, _LLAMA),
        Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, _LLAMA),
        Family(
            *("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
            tensors=_LLAMA | _QK_NORMS,
        ),
        Family("gemma", "GemmaForCausalLM", _read_gemma, _write_biased, _LLAMA),
        Family(
            *("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
            tensors=_ENDS | _BOTH_NORMS | _ATTENTION | _MLP,
        ),
        Family(
            *("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
            tensors=_ENDS | _BOTH_NORMS | _ATTENTION | _QK_NORMS | _MLP,
            reward_architecture="Gemma3TextForSequenceClassification",
        ),
        Family("phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, _PHI3),
        Family(
            *("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_biased),
            tensors=_ENDS | _POST_NORMS | _ATTENTION | _WIDE_QK_NORMS | _MLP,
        ),
        Family(
            *("gpt_neox", "GPTNeoXForCausalLM", _read_gpt_neox, _write_gpt_neox),
            tensors=_GPT_NEOX,
            layer="gpt_neox.layers.{}.",
            base="gpt_neox.",
            ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        ),
        Family(
            *("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2),
            tensors=_GPT2,
            layer="transformer.h.{}.",
            base="transformer.",
            ignored=("attn.bias", "attn.masked_bias"),
            transposed=True,
            reward_architecture="GPT2ForSequenceClassification",
        ),
    )
}
"""The families by `model_type`."""

MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Model types of which the text part is read -> the family of that part."""
