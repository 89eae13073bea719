"""Low-rank adapters: a second, small pytree beside a base that does not change.

    y = x W + alpha / rank * (x a) b,    a [in, rank], b [rank, out], b = 0 at the start

The base stands in `TrainState.frozen` and the adapters, stacked as the layers are, in
`TrainState.params`; they are applied inside the scanned block, so no second copy of a
matrix is ever made. Without its adapters the policy is the base: it is the anchor.

    model = lora.adapted(make_decoder(config), lora_config)
    frozen, trained = lora.split(params, lora_config, key)
    params = model.combine(frozen, trained)         # what the model's functions take
    merged = lora.merge(frozen, trained, lora_config)  # a plain model again

Weight decay pulls a and b to 0, and so the policy to its base.

Source: Hu et al., arXiv:2106.09685v2, equation 3.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.models import decoder, pretrained
from pref_jax.models.decoder import DecoderConfig
from pref_jax.models.families import Tensor, axis_sizes
from pref_jax.models.pretrained import CheckpointFormatError
from pref_jax.types import Model, PyTree

# Matrices that can be adapted -> axes of their input.
_INPUTS = {
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/out": 2,
    "mlp/gate": 1,
    "mlp/up": 1,
    "mlp/down": 1,
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how much."""

    rank: int = 16
    alpha: float = 32.0  # what is added is alpha / rank * a @ b
    targets: tuple[str, ...] = ("attention/*", "mlp/*")  # patterns of matrices' names
    whole: tuple[str, ...] = ()  # trained as they are beside them: reward_head or none

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"`rank` must be at least 1 and `alpha` positive; got {self.rank} and "
                f"{self.alpha}."
            )
        if not set(self.whole) <= {"reward_head"}:
            raise ValueError(
                f"`whole` may name reward_head, which the base does without; got "
                f"{', '.join(self.whole)}."
            )
        for pattern in self.targets:
            if not fnmatch.filter(_INPUTS, pattern):
                raise ValueError(
                    f"`targets` has {pattern!r}, which matches none of "
                    f"{', '.join(_INPUTS)}."
                )

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the matrix `attention/query`, ... is adapted."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.targets)


def split(
    params: PyTree, config: LoraConfig, key: jax.Array
) -> tuple[dict, dict[str, PyTree]]:
    """The base, and what is trained on it: new adapters and `config.whole`.

    Args:
      params: of a decoder. Not copied.
      config: which matrices get adapters.
      key: of their start.

    Returns:
      (frozen, trained): `TrainState.frozen` and the `params` of `init_state`. a has
      variance 1 / inputs and b is 0: combined they are the base.

    Raises:
      ValueError: the parameters lack a name of `config.whole`, or no matrix is adapted.
    """
    for name in config.whole:
        if name not in params:
            raise ValueError(
                f"`whole` has {name!r}; the parameters are {', '.join(params)}."
            )
    adapters: dict = {}
    matrices = _matrices(params, config)
    for (path, matrix), draw in zip(
        matrices, jax.random.split(key, len(matrices)), strict=True
    ):
        layers = 1 if path[0] == "blocks" else 0
        split_at = layers + _INPUTS["/".join(path[-2:])]
        stack, inputs, outputs = (
            *(matrix.shape[:layers], matrix.shape[layers:split_at]),
            matrix.shape[split_at:],
        )
        a = jax.random.normal(draw, (*stack, *inputs, config.rank), jnp.float32)
        a *= np.prod(inputs) ** -0.5
        b = jnp.zeros((*stack, config.rank, *outputs), jnp.float32)
        _put(adapters, path, {"a": a, "b": b})
    frozen = {name: leaf for name, leaf in params.items() if name not in config.whole}
    trained = {name: params[name] for name in config.whole}
    return frozen, {**trained, "adapters": adapters}


def adapted(model: Model, config: LoraConfig) -> Model:
    """A model whose parameters are a base and what `split` trains on it.

    Its functions take `model.combine(frozen, trained)`; given the base alone they are
    the base's own, bit for bit.
    """

    def combine(frozen, trained):
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * config.scale if path[-1].key == "b" else leaf,
            trained["adapters"],
        )
        return {**frozen, **trained, "adapters": scaled}

    described = json.loads(model.description) | {"lora": dataclasses.asdict(config)}
    return dataclasses.replace(
        model,
        combine=combine,
        param_axes=param_axes,
        description=json.dumps(described),
    )


def param_axes(params: PyTree) -> PyTree:
    """Logical axis names of each parameter, adapters among them: for `Model`."""
    axes = decoder.param_axes(
        {name: tree for name, tree in params.items() if name != "adapters"}
    )
    if "adapters" in params:

        def of_adapter(path, leaf):
            *_, room, name, part = (entry.key for entry in path)
            known = decoder.PARAM_AXES[f"{room}/{name}"]
            inputs = _INPUTS[f"{room}/{name}"]
            if part == "a":
                known = (*known[:inputs], "rank")
            else:
                known = ("rank", *known[inputs:])
            return ("layers",) * (jnp.ndim(leaf) - len(known)) + known

        axes["adapters"] = jax.tree_util.tree_map_with_path(
            of_adapter, params["adapters"]
        )
    return axes


def merge(frozen: PyTree, trained: PyTree, config: LoraConfig) -> dict:
    """One plain set of parameters: W + alpha / rank * a b, in the dtype of W."""
    merged = jax.tree.map(lambda leaf: leaf, {**frozen, **trained})
    del merged["adapters"]
    for path, adapter in _adapters(trained["adapters"]):
        matrix = _get(frozen, path)
        add = functools.partial(_add_product, scale=config.scale)
        add = add if path[0] == "last_blocks" else jax.vmap(add)
        # No device makes more of the product than it keeps of the matrix.
        sharding = matrix.sharding if isinstance(matrix, jax.Array) else None
        _put(merged, path, jax.jit(add, out_shardings=sharding)(matrix, **adapter))
    return merged


def _add_product(matrix, a, b, *, scale):
    product = scale * jnp.tensordot(a, b, 1, precision="highest")
    return (matrix.astype(jnp.float32) + product).astype(matrix.dtype)


def _matrices(params, config):
    """(path, matrix) of all that are adapted."""
    found = [
        (tuple(entry.key for entry in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    found = [
        (path, leaf)
        for path, leaf in found
        if "/".join(path[-2:]) in _INPUTS and config.adapts("/".join(path[-2:]))
    ]
    if not found:
        raise ValueError(
            f"no matrix of the parameters matches `targets` {config.targets}."
        )
    return found


def _adapters(tree, path=()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(path of the matrix, {"a", "b"}) of each adapter."""
    if set(tree) == {"a", "b"}:
        yield path, tree
    else:
        for name, branch in tree.items():
            yield from _adapters(branch, (*path, name))


def _get(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree, path, value):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


# --- PEFT -----------------------------------------------------------------------------

_PREFIX = "base_model.model."
_UNSUPPORTED = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "lora_bias": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # starts that alter the base


def _parts(tensor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Where a and b of a matrix lie in an adapter's files, r being the rank."""
    split_at = _INPUTS[name]
    inputs, outputs = tensor.ours[:split_at], tensor.ours[split_at:]
    out_axis = next(axis for axis in tensor.disk.split(",") if axis != inputs)
    module = _PREFIX + tensor.name.removesuffix(".weight")
    return (
        Tensor(f"{module}.lora_A.weight", f"r,{inputs}", f"{inputs}r"),
        Tensor(f"{module}.lora_B.weight", f"{out_axis},r", f"r{outputs}", tensor.pick),
    )


def _module(tensor: Tensor) -> str:
    """`self_attn.q_proj` and the like: what PEFT's targets and patterns name."""
    return ".".join(tensor.name.removesuffix(".weight").split(".")[-2:])


def _of_module(patterns: dict | None, module: str, default):
    """What PEFT's patterns, expressions for the end of a name, say of a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def save_peft(
    path: str,
    trained: PyTree,
    config: LoraConfig,
    decoder_config: DecoderConfig,
    *,
    base: str,
    family: str | None = None,
) -> pathlib.Path:
    """Write a folder that PEFT opens on its base.

    Several of our matrices may be one on disk (Phi-3, GPT-NeoX, GPT-2). Their adapters
    are written as one of the sum of their ranks, which computes the same.

    Args:
      path: of the folder; new or empty.
      trained: of `split`, after training.
      config: of the adapters.
      decoder_config: of the base.
      base: Hugging Face folder or name of the base, for the adapter's config.
      family: model type of the base. None: that of the folder `base`.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder holds something.
      CheckpointFormatError: `base` is no folder, and there is no `family`.
    """
    from safetensors.numpy import save_file

    layout = pretrained.find_family(family, base)
    fused: dict[str, list] = {}
    for adapter_path, adapter in _adapters(trained["adapters"]):
        place = pretrained.find_place(layout, decoder_config, "/".join(adapter_path))
        name = "/".join(adapter_path[-2:])
        a, b = (np.asarray(adapter[part], np.float32) for part in ("a", "b"))
        for number, tensor in enumerate(place.tensors):
            index = number if place.stacked else ...
            fused.setdefault(tensor.name, []).append((tensor, name, a[index], b[index]))
    tensors, patterns = {}, {}
    for members in fused.values():
        # One after the other along the rank; each fills its own rows of b.
        total = sum(a.shape[-1] for _, _, a, _ in members)
        sizes = axis_sizes(decoder_config) | {"r": total}
        start = 0
        for tensor, name, a, b in members:
            stop = start + a.shape[-1]
            for place, values in zip(_parts(tensor, name), (a, b), strict=True):
                out = tensors.setdefault(
                    place.name, np.zeros(place.shape(sizes), np.float32)
                )
                ranks = np.moveaxis(place.view(out, sizes), place.ours.index("r"), 0)[
                    start:stop
                ]
                ranks[...] = np.moveaxis(values, place.ours.index("r"), 0)
            start = stop
        patterns[_module(members[0][0])] = total
    whole = _whole_tensors(trained, layout)
    tensors |= {
        _PREFIX + tensor.name: _as_on_disk(tensor, trained[name], decoder_config)
        for name, tensor in whole.items()
    }
    is_reward_model = "reward_head" in whole
    own = {name: rank for name, rank in patterns.items() if rank != config.rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(patterns),
        "rank_pattern": own,
        "alpha_pattern": {name: config.scale * rank for name, rank in own.items()},
        "modules_to_save": [_module(tensor) for tensor in whole.values()] or None,
        "fan_in_fan_out": layout.transposed,
        "bias": "none",
        "inference_mode": True,
    }
    with pretrained.new_folder(path) as folder:
        metadata = {"format": "pt"}
        save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
        text = json.dumps(settings, indent=2)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return pathlib.Path(path)


def _whole_tensors(trained, layout) -> dict[str, Tensor]:
    return {name: layout.tensor(name) for name in trained if name != "adapters"}


def _as_on_disk(tensor: Tensor, leaf, decoder_config) -> np.ndarray:
    sizes = axis_sizes(decoder_config)
    out = np.empty(tensor.shape(sizes), np.float32)
    tensor.view(out, sizes)[...] = np.asarray(leaf)
    return out


def load_peft(
    path: str, decoder_config: DecoderConfig, *, base: str, family: str | None = None
) -> tuple[LoraConfig, dict]:
    """Read an adapter that PEFT, or `save_peft`, wrote.

    Args:
      path: folder with `adapter_config.json` and `adapter_model.safetensors`.
      decoder_config: of the base.
      base: Hugging Face folder of the base.
      family: model type of the base. None: that of `base`.

    Returns:
      Its config, and what `split` calls trained. Of an adapter on a fused matrix each
      of our matrices gets its own copy of a. Modules with a rank or alpha of their own
      keep the rank, and the alpha is folded into b.

    Raises:
      CheckpointFormatError: no such files; a tensor is missing, left over or of a wrong
        shape; or the adapter does what this one does not: DoRA, biases, some layers
        only, pickles.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = pathlib.Path(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointFormatError(
                f"{folder} has no {name}; give the folder of a PEFT adapter that was "
                f"saved with safetensors."
            )
    settings = read_settings(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointFormatError(
            f"{folder} is a {settings.get('peft_type')} adapter; only LORA is read."
        )
    for name, needed in _UNSUPPORTED.items():
        if settings.get(name) not in (None, needed):
            raise CheckpointFormatError(
                f"{folder}/adapter_config.json has {name} = {settings[name]!r}; only "
                f"{needed!r} is read."
            )
    start = str(settings.get("init_lora_weights"))
    if start.startswith(_CHANGES_BASE):
        raise CheckpointFormatError(
            f"{folder}/adapter_config.json has init_lora_weights = {start!r}, which "
            f"changes the base; let PEFT convert it into a plain adapter."
        )
    layout = pretrained.find_family(family, base)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise CheckpointFormatError(
            f"{folder}/adapter_model.safetensors is not a whole file: {error}"
        ) from error
    unread = set(tensors)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not (
        isinstance(rank, int) and isinstance(alpha, int | float) and rank and alpha
    ):
        raise CheckpointFormatError(
            f"{folder}/adapter_config.json needs positive r and lora_alpha; got "
            f"{rank!r} and {alpha!r}."
        )
    rs = rank**0.5 if settings.get("use_rslora") else 1.0
    shapes = pretrained.param_shapes(decoder_config)
    adapters, adapted_names = {}, set()
    for matrix_path, _ in _matrices(shapes, LoraConfig()):
        name = "/".join(matrix_path[-2:])
        place = pretrained.find_place(layout, decoder_config, "/".join(matrix_path))
        found = [_parts(tensor, name) for tensor in place.tensors]
        present = [a.name in tensors for a, _ in found]
        if not any(present):
            continue
        if not all(present):
            raise CheckpointFormatError(
                f"{folder} lacks {found[present.index(False)][0].name}: adapters of "
                f"some layers only are not read."
            )
        module = place.tensors[0].name.removesuffix(".weight")
        own_rank = _of_module(settings.get("rank_pattern"), module, rank)
        own_alpha = _of_module(settings.get("alpha_pattern"), module, alpha)
        own_rs = own_rank**0.5 if settings.get("use_rslora") else 1.0
        factor = (own_alpha * own_rs / own_rank) / (alpha * rs / rank)
        sizes = axis_sizes(decoder_config) | {"r": own_rank}
        sides = []
        for side, multiplier in ((0, 1.0), (1, factor)):
            values = []
            for parts in found:
                values.append(_take(tensors, parts[side], sizes, folder) * multiplier)
                unread.discard(parts[side].name)
            stack = np.stack(values) if place.stacked else values[0]
            sides.append(stack.astype(np.float32))
        _put(adapters, matrix_path, {"a": sides[0], "b": sides[1]})
        adapted_names.add(name)
    trained: dict = {"adapters": adapters}
    head = layout.tensor("reward_head")
    if _PREFIX + head.name in tensors:
        stored = dataclasses.replace(head, name=_PREFIX + head.name)
        sizes = axis_sizes(decoder_config)
        trained["reward_head"] = _take(tensors, stored, sizes, folder).astype(
            np.float32
        )
        unread.discard(stored.name)
    if unread or not adapters:
        raise CheckpointFormatError(
            f"{folder} has {len(unread)} tensors that are no adapters of the matrices "
            f"of {layout.model_type}, first {min(unread, default='none')}; it adapts "
            f"{', '.join(sorted(adapted_names)) or 'none of them'}."
        )
    whole = tuple(name for name in trained if name != "adapters")
    targets = tuple(sorted(adapted_names))
    return LoraConfig(rank, alpha * rs, targets, whole), trained


def read_settings(path: str) -> dict:
    """The config of a PEFT adapter.

    Raises:
      CheckpointFormatError: it is no JSON object.
    """
    file = pathlib.Path(path) / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointFormatError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointFormatError(f"{file} needs a JSON object; got {settings!r}.")
    return settings


def _take(tensors, place: Tensor, sizes, folder) -> np.ndarray:
    shape = place.shape(sizes)
    if place.name not in tensors:
        raise CheckpointFormatError(f"{folder} lacks the tensor {place.name} {shape}.")
    if tensors[place.name].shape != shape:
        raise CheckpointFormatError(
            f"{folder}: tensor {place.name} has shape {tensors[place.name].shape}; its "
            f"base and rank make it {shape}."
        )
    return place.view(tensors[place.name], sizes)
