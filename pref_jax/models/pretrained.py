"""Hugging Face checkpoints of the Llama layout -> our config and parameters.

Only safetensors are read. Everything that the folder says and that this decoder does
not compute is an error: a model that loads is the model that was saved.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from pref_jax.models.decoder import DecoderConfig, LayerKind

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class CheckpointFormatError(ValueError):
    """A checkpoint folder that cannot be read as the model it says it is."""


# Our parameter (last two names of its path) -> tensor name in a layer, and how the
# tensor of shape [out, in] becomes ours. H heads, F head_dim, D width.
_LAYER_TENSORS = {
    "attention_norm/scale": ("input_layernorm.weight", lambda x, c: x),
    "attention/query": (
        "self_attn.q_proj.weight",
        lambda x, c: x.T.reshape(c.width, c.num_heads, c.head_dim),
    ),
    "attention/key": (
        "self_attn.k_proj.weight",
        lambda x, c: x.T.reshape(c.width, c.num_kv_heads, c.head_dim),
    ),
    "attention/value": (
        "self_attn.v_proj.weight",
        lambda x, c: x.T.reshape(c.width, c.num_kv_heads, c.head_dim),
    ),
    "attention/out": (
        "self_attn.o_proj.weight",
        lambda x, c: x.T.reshape(c.num_heads, c.head_dim, c.width),
    ),
    "mlp_norm/scale": ("post_attention_layernorm.weight", lambda x, c: x),
    "mlp/gate": ("mlp.gate_proj.weight", lambda x, c: x.T),
    "mlp/up": ("mlp.up_proj.weight", lambda x, c: x.T),
    "mlp/down": ("mlp.down_proj.weight", lambda x, c: x.T),
}


def load_config(path: str) -> DecoderConfig:
    """The decoder config that a Hugging Face folder describes.

    Args:
      path: folder with `config.json`.

    Raises:
      CheckpointFormatError: no config, another architecture, or a feature of it that
        the decoder does not compute.
    """
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointFormatError(
            f"{path} has no config.json; give the folder of a Hugging Face checkpoint."
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(
            f"{path}/config.json cannot be read: {error}"
        ) from error
    if config.model_type != "llama":
        raise CheckpointFormatError(
            f"{path} is of model type {config.model_type!r}; only 'llama' is read."
        )
    rope = dict(config.rope_parameters)
    unsupported = {
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "hidden_act": (config.hidden_act, "silu"),
        "quantization_config": (getattr(config, "quantization_config", None), None),
    }
    for name, (value, needed) in unsupported.items():
        if value != needed:
            raise CheckpointFormatError(
                f"{path}/config.json has {name} = {value!r}; the decoder computes "
                f"{needed!r} only."
            )
    heads = config.num_attention_heads
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or config.hidden_size // heads,
        mlp_width=config.intermediate_size,
        period=(LayerKind(rope_theta=float(rope["rope_theta"])),),
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
    )


def load(path: str, **overrides) -> tuple[DecoderConfig, dict]:
    """Read a checkpoint folder.

    Args:
      path: folder with `config.json` and `model.safetensors`, or the parts that
        `model.safetensors.index.json` names.
      **overrides: fields of `DecoderConfig` that say how to compute, such as `dtype`,
        `attention` and `remat`.

    Returns:
      The config, and the parameters as float32 host arrays in the nested dict that
      `make_decoder(config)` takes.

    Raises:
      CheckpointFormatError: as `load_config`; no safetensors; a tensor is missing, left
        over, or of another shape than the config says.
    """
    config = dataclasses.replace(load_config(path), **overrides)
    tensors = _read_tensors(pathlib.Path(path))

    def take(name, shape):
        if name not in tensors:
            raise CheckpointFormatError(f"{path} lacks the tensor {name} {shape}.")
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise CheckpointFormatError(
                f"{path}: tensor {name} has shape {tensor.shape}; config.json makes it "
                f"{shape}."
            )
        if tensor.dtype.name not in _FLOATS:
            raise CheckpointFormatError(
                f"{path}: tensor {name} is of type {tensor.dtype}; only "
                f"{', '.join(_FLOATS)} are read."
            )
        return tensor.astype(np.float32)

    width, inner = config.width, config.mlp_width
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes = {
        "attention_norm/scale": (width,),
        "attention/query": (queries, width),
        "attention/key": (keys, width),
        "attention/value": (keys, width),
        "attention/out": (width, queries),
        "mlp_norm/scale": (width,),
        "mlp/gate": (inner, width),
        "mlp/up": (inner, width),
        "mlp/down": (width, inner),
    }
    block: dict = {}
    for ours, (theirs, convert) in _LAYER_TENSORS.items():
        stacked = np.stack(
            [
                convert(take(f"model.layers.{i}.{theirs}", shapes[ours]), config)
                for i in range(config.num_layers)
            ]
        )
        module, name = ours.split("/")
        block.setdefault(module, {})[name] = stacked
    vocabulary = (config.vocab_size, width)
    params = {
        "embedding": take("model.embed_tokens.weight", vocabulary),
        "blocks": {"0": block},
        "final_norm": {"scale": take("model.norm.weight", (width,))},
    }
    if config.tied:
        # Some savers write the tied copy; one that differs makes another model.
        copy = tensors.pop("lm_head.weight", params["embedding"])
        if not np.array_equal(copy, params["embedding"]):
            raise CheckpointFormatError(
                f"{path}/config.json has tie_word_embeddings = True, and the tensor "
                f"lm_head.weight differs from model.embed_tokens.weight; set it to "
                f"false to read both."
            )
    else:
        params["unembedding"] = take("lm_head.weight", vocabulary)
    # Old checkpoints hold the rotary frequencies, which follow from the config.
    surplus = sorted(name for name in tensors if "rotary_emb.inv_freq" not in name)
    if surplus:
        raise CheckpointFormatError(
            f"{path} has {len(surplus)} tensors that the config does not speak of, "
            f"first {surplus[0]}."
        )
    return config, params


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointFormatError(
                f"{index} does not map tensors to files: {error!r}"
            ) from error
    else:
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        if not (folder / name).is_file():
            others = sorted(p.name for p in folder.glob("*.bin"))
            raise CheckpointFormatError(
                f"{folder} has no {name}"
                + (
                    f", only {', '.join(others)}; pickles are not read"
                    if others
                    else ""
                )
                + ". Save the model with safetensors."
            )
        try:
            with safe_open(folder / name, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    tensors[key] = file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointFormatError(
                f"{folder / name} is not a whole safetensors file: {error}"
            ) from error
    return tensors
