"""Hugging Face checkpoints -> our config and parameters, and back.

Only safetensors are read. Everything that a folder says and that the decoder does not
compute is an error, and so is every tensor that is missing, left over or of another
shape: a model that loads is the model that was saved, and a folder that is written
reads back as the same model. What families there are stands in `models/families.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.models.decoder import DecoderConfig, LongScaling, make_decoder
from pref_jax.models.families import (
    FAMILIES,
    MULTIMODAL,
    Family,
    Tensor,
    UnsupportedConfigError,
    axis_sizes,
)
from pref_jax.models.tensor_files import (
    DTYPES,
    CheckpointFormatError,
    StoredTensor,
    copy_turned,
    stored_tensors,
)
from pref_jax.types import PyTree

_logger = logging.getLogger(__name__)

_COMPUTE = ("dtype", "attention", "remat")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
_TOKENIZER_FILES += ("added_tokens.json", "chat_template*")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# --- config ---------------------------------------------------------------------------


def load_config(path: str, *, max_positions: int | None = None) -> DecoderConfig:
    """The decoder config that a Hugging Face folder describes.

    Args:
      path: folder with `config.json`.
      max_positions: longest text that the model will read. None: as the config says;
        for a model with LongRoPE (Phi-3, Phi-4-mini) its length before the extension,
        since it computes longer texts with other frequencies.

    Raises:
      CheckpointFormatError: no config, another architecture, or a feature of it that
        the decoder does not compute.
    """
    _, config = _read_config(path)
    try:
        return with_max_positions(config, max_positions)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from error


def with_max_positions(config: DecoderConfig, longest: int | None) -> DecoderConfig:
    """A config that reads texts of up to this many tokens.

    Args:
      config: of any decoder.
      longest: None: as it is; with LongRoPE its length before the extension.

    Raises:
      ValueError: it has fewer learned positions, or `longest` is not positive.
    """
    scalings = {kind.rotary and kind.rotary.scaling for kind in config.period}
    for scaling in scalings:
        if isinstance(scaling, LongScaling):
            if longest is None:
                longest = scaling.old_positions
            config = _with_long_positions(config, longest > scaling.old_positions)
    if longest is None:
        return config
    return dataclasses.replace(config, max_positions=longest)


def _with_long_positions(config: DecoderConfig, is_long: bool) -> DecoderConfig:
    def kind_of(kind):
        scaling = dataclasses.replace(kind.rotary.scaling, is_long=is_long)
        rotary = dataclasses.replace(kind.rotary, scaling=scaling)
        return dataclasses.replace(kind, rotary=rotary)

    return dataclasses.replace(config, period=tuple(map(kind_of, config.period)))


def _hf_config(path):
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointFormatError(
            f"{path} has no config.json; give the folder of a Hugging Face checkpoint."
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any type: the file is the user's
        raise CheckpointFormatError(
            f"{path}/config.json cannot be read: {error}"
        ) from error


def _read_config(path) -> tuple[Family, DecoderConfig]:
    """The family of a folder, and its config as it stands."""
    config = _hf_config(path)
    name = MULTIMODAL.get(config.model_type, config.model_type)
    if config.model_type in MULTIMODAL:
        config = config.text_config
    if name not in FAMILIES or config.model_type != name:
        raise CheckpointFormatError(
            f"{path} is of model type {config.model_type!r}; these are read: "
            f"{', '.join(sorted({*FAMILIES, *MULTIMODAL}))}."
        )
    try:
        return FAMILIES[name], DecoderConfig(**FAMILIES[name].read(config))
    except UnsupportedConfigError as error:
        raise CheckpointFormatError(f"{path}/config.json {error}") from error
    except (ValueError, ArithmeticError, KeyError, TypeError) as error:
        raise CheckpointFormatError(
            f"{path}/config.json describes no decoder: {error!r}."
        ) from error


def find_family(name: str | None, folder: str | None = None) -> Family:
    """A family by its model type, or that of a Hugging Face folder.

    Raises:
      CheckpointFormatError: there is no such family or folder.
    """
    if name is None and folder is None:
        raise CheckpointFormatError(
            "the model came from no Hugging Face folder, so its tensors have no names; "
            "give the `family` that they are to have."
        )
    if name is None:
        return _read_config(folder)[0]
    if name not in FAMILIES:
        raise CheckpointFormatError(
            f"`family` must be one of {', '.join(FAMILIES)}; got {name!r}."
        )
    return FAMILIES[name]


# --- reading --------------------------------------------------------------------------

_TEXT_PART = re.compile(r"^(language_model\.|model\.language_model\.)")
_OTHER_PART = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def _text_part(tensors: dict[str, StoredTensor], path) -> dict[str, StoredTensor]:
    """The tensors of a multimodal model's text part, named as the text model's."""
    found = {}
    for name, stored in tensors.items():
        if _OTHER_PART.match(name):
            continue
        prefix = _TEXT_PART.match(name)
        if prefix:
            base = "model." if prefix[1] == "model.language_model." else ""
            name = base + name[prefix.end() :]
        found[name] = stored
    _logger.info(
        "%s: the text part is read; %d of %d tensors belong to other parts",
        *(path, len(tensors) - len(found), len(tensors)),
    )
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter of ours lies: one tensor, or one for each layer of a stack."""

    tensors: tuple[Tensor, ...]
    stacked: bool


def find_place(family: Family, config: DecoderConfig, path: str) -> Place:
    """Where the parameter at a path such as `blocks/0/mlp/up` lies in the files.

    Raises:
      CheckpointFormatError: the family has no such parameter.
    """
    period = len(config.period)
    num_periods = config.num_layers // period
    room, _, rest = path.partition("/")
    if room in ("blocks", "last_blocks"):
        offset, _, path_in_layer = rest.partition("/")
        first = int(offset)
        if room == "blocks":
            layers = range(first, num_periods * period, period)
        else:
            layers = range(num_periods * period + first, config.num_layers, period)
        tensors = tuple(family.tensor(path_in_layer, layer) for layer in layers)
    else:
        tensors = (family.tensor(path),)
    if tensors[0] is None:
        raise CheckpointFormatError(
            f"checkpoints of {family.model_type} have no place for the parameter "
            f"{path}."
        )
    return Place(tensors, stacked=room == "blocks")


class _Reader:
    """Our parameters of a folder, one part of one parameter at a time."""

    def __init__(self, path, family: Family, config: DecoderConfig):
        self.path, self.family, self.config = path, family, config
        self.sizes = axis_sizes(config)
        self.tensors = stored_tensors(pathlib.Path(path))
        if _hf_config(path).model_type in MULTIMODAL:
            self.tensors = _text_part(self.tensors, path)
        if not any(name.startswith(family.base) for name in self.tensors):
            # Files of the bare model, as GPT-2's own: only heads keep their names.
            head = ("lm_head.", "score.", "embed_out.")
            self.tensors = {
                name if name.startswith(head) else family.base + name: stored
                for name, stored in self.tensors.items()
            }
        self.unread = {
            name for name in self.tensors if not name.endswith(family.ignored)
        }

    def find(self, tensor: Tensor) -> StoredTensor:
        """The tensor in the files, whose shape and type are as they must be."""
        shape = tensor.shape(self.sizes)
        if tensor.name not in self.tensors:
            raise CheckpointFormatError(
                f"{self.path} lacks the tensor {tensor.name} {shape}."
            )
        stored = self.tensors[tensor.name]
        if stored.shape != shape:
            raise CheckpointFormatError(
                f"{self.path}: tensor {tensor.name} has shape {stored.shape}; "
                f"config.json makes it {shape}."
            )
        if stored.dtype not in DTYPES:
            raise CheckpointFormatError(
                f"{self.path}: tensor {tensor.name} is of type {stored.dtype}; only "
                f"{', '.join(DTYPES)} are read."
            )
        self.unread.discard(tensor.name)
        return stored

    def read(self, place: Place, index, dtype) -> np.ndarray:
        """The part of a parameter that an index, one slice an axis, speaks of."""
        layers, inside = (index[0], index[1:]) if place.stacked else (slice(1), index)
        chosen = place.tensors[layers]
        whole = (self.sizes[letter] for letter in chosen[0].ours)
        shape = [
            len(range(*part.indices(n))) for part, n in zip(inside, whole, strict=True)
        ]
        out = np.empty((len(chosen), *shape), dtype)

        def read_layer(number):
            stored = self.find(chosen[number])
            view = chosen[number].view(stored.array(), self.sizes)
            copy_turned(out[number], view[tuple(inside)])
            del view
            stored.release()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(read_layer, range(len(chosen))))
        return out if place.stacked else out[0]


def load(
    path: str,
    *,
    shardings: Callable[[PyTree], PyTree] | None = None,
    param_dtype: str = "float32",
    max_positions: int | None = None,
    **compute,
) -> tuple[DecoderConfig, dict]:
    """Read a checkpoint folder.

    The files are mapped into memory, and each device reads only its part of each
    parameter, one parameter at a time: no device and no process ever holds more than it
    keeps, beside one part that is on its way.

    Args:
      path: folder with `config.json` and `model.safetensors`, or the parts that
        `model.safetensors.index.json` names. Of a multimodal model (Gemma 3, Mistral
        Small 3.1) the text part is read. A reward model
        (`AutoModelForSequenceClassification` with one label) is read with its head.
      shardings: shapes of the parameters -> the sharding of each, as
        `model_folders.load` makes them of a mesh. None: arrays of NumPy on the host.
      param_dtype: of the parameters: float32 to train them, bfloat16 to keep them.
      max_positions: as in `load_config`.
      **compute: fields of `DecoderConfig` that say how to compute: `dtype`, `attention`
        and `remat`.

    Returns:
      The config, and the parameters in the nested dict that `make_decoder(config)`
      takes; a reward model has its head under `reward_head`, [D], and counts as tied
      unless an unembedding lies beside it.

    Raises:
      CheckpointFormatError: as `load_config`; no safetensors; a tensor is missing, left
        over, or of another shape than the config says.
      ValueError: a field of `compute` is not one of the three, or a wrong
        `param_dtype`.
    """
    unknown = sorted(set(compute) - set(_COMPUTE))
    if unknown or param_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"`load` takes {', '.join(_COMPUTE)}, and a `param_dtype` of float32 or "
            f"bfloat16; got {', '.join(unknown) or repr(param_dtype)}."
        )
    family, _ = _read_config(path)
    config = load_config(path, max_positions=max_positions)
    config = dataclasses.replace(config, **compute)
    reader = _Reader(path, family, config)
    head = family.tensor("reward_head")
    is_reward_model = head.name in reader.tensors
    if is_reward_model and family.tensor("unembedding").name not in reader.tensors:
        config = dataclasses.replace(config, tied=True)
    shapes = param_shapes(config, is_reward_model)
    if config.tied:
        _check_tied_copy(reader)
    dtype = np.dtype(jnp.dtype(param_dtype))

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    places = [find_place(family, config, _path_name(path)) for path, _ in leaves]
    for place in places:
        for tensor in place.tensors:
            reader.find(tensor)
    surplus = sorted(reader.unread)
    if surplus:
        raise CheckpointFormatError(
            f"{path} has {len(surplus)} tensors that the config does not speak of, "
            f"first {surplus[0]}."
        )

    def read(place, leaf, sharding):
        if sharding is None:
            return reader.read(place, (slice(None),) * len(leaf.shape), dtype)
        parts: dict = {}  # devices that hold the same part share one read

        def part(index):
            key = tuple((s.start, s.stop) for s in index)
            if key not in parts:
                parts[key] = reader.read(place, index, dtype)
            return parts[key]

        array = jax.make_array_from_callback(leaf.shape, sharding, part)
        return array.block_until_ready()

    placed = [None] * len(leaves)
    if shardings is not None:
        placed = structure.flatten_up_to(shardings(shapes))
    values = [
        read(place, leaf, sharding)
        for place, (_, leaf), sharding in zip(places, leaves, placed, strict=True)
    ]
    return config, jax.tree.unflatten(structure, values)


def param_shapes(config: DecoderConfig, is_reward_model: bool = False) -> PyTree:
    """Shape and type of every parameter of a config's decoder."""
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    if is_reward_model:
        shapes["reward_head"] = jax.ShapeDtypeStruct((config.width,), jnp.float32)
    return shapes


def _path_name(key_path) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _check_tied_copy(reader: _Reader) -> None:
    """Some savers write the tied copy; one that differs makes another model."""
    embedding, copy = map(reader.family.tensor, ("embedding", "unembedding"))
    if copy.name not in reader.tensors:
        return
    values = [reader.find(tensor).array() for tensor in (embedding, copy)]
    if not np.array_equal(*values):
        raise CheckpointFormatError(
            f"{reader.path}/config.json has tie_word_embeddings = True, and the tensor "
            f"{copy.name} differs from {embedding.name}; set it to false to read both."
        )


# --- saving ---------------------------------------------------------------------------


def save(
    path: str,
    config: DecoderConfig,
    params: PyTree,
    *,
    like: str | None = None,
    family: str | None = None,
    tokenizer=None,
    card: str = "",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> pathlib.Path:
    """Write a folder that `transformers` opens.

    Args:
      path: of the folder; new or empty.
      config: of the decoder.
      params: its parameters, arrays of any kind; with a `reward_head` the folder is one
        of `AutoModelForSequenceClassification`.
      like: a Hugging Face folder that the model came from: family, token ids,
        generation config and, without `tokenizer`, tokenizer files are taken from it.
      family: a model type of `families.FAMILIES`. None: that of `like`; without it the
        first that can say all of `config`.
      tokenizer: of `transformers`; saved with its chat template.
      card: text of README.md, as of `model_card`.
      dtype: of the tensors: float32, bfloat16 or float16; None: that of `params`.
      max_shard_bytes: of a file; more tensors go into another.

    Returns:
      The folder. It reads back as `config` and the same bits; where no family has the
      config's `embedding_scale`, as `without_embedding_scale` of it.

    Raises:
      FileExistsError: the folder holds something.
      CheckpointFormatError: the family cannot say all of `config`, or has no place for
        a parameter (adapters are to be merged first).
      ValueError: a parameter is missing, unknown, or not fully on this process.
    """
    is_reward_model = "reward_head" in params
    try:
        chosen, hf_config = _describe(config, like, family, is_reward_model)
    except CheckpointFormatError:
        if config.embedding_scale == 1:
            raise
        config, params = without_embedding_scale(config, params)
        chosen, hf_config = _describe(config, like, family, is_reward_model)
    plan = _plan_files(chosen, config, params, is_reward_model, dtype)
    hf_config.architectures = [chosen.architecture]
    if is_reward_model:
        default = chosen.architecture.replace(
            "ForCausalLM", "ForSequenceClassification"
        )
        hf_config.architectures = [chosen.reward_architecture or default]
        hf_config.num_labels = 1
    if tokenizer is not None:
        for name in _TOKEN_IDS:
            if getattr(tokenizer, name) is not None:
                setattr(hf_config, name, getattr(tokenizer, name))
    hf_config.dtype = next(iter(plan.values())).dtype.name
    with new_folder(path) as folder:
        _write_tensors(folder, plan, max_shard_bytes)
        hf_config.save_pretrained(folder)
        _write_companions(folder, hf_config, like, tokenizer, is_reward_model)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return pathlib.Path(path)


def without_embedding_scale(
    config: DecoderConfig, params: PyTree
) -> tuple[DecoderConfig, dict]:
    """The same model with the scale multiplied into the embedding.

    A tied model becomes an untied one: its unembedding has no scale.
    """
    scaled = jnp.asarray(params["embedding"]) * config.embedding_scale
    unembedding = {"unembedding": params["embedding"]} if config.tied else {}
    if "reward_head" in params:
        unembedding = {}
    config = dataclasses.replace(
        config, embedding_scale=1.0, tied=config.tied and not unembedding
    )
    return config, {**params, **unembedding, "embedding": scaled}


def model_card(
    name: str,
    *,
    method: str,
    data: str,
    config: dict,
    metrics: dict[str, float],
    paper: str | None = None,
    base: str | None = None,
) -> str:
    """README.md of a trained model, with the header that model hubs read.

    Args:
      name: of the model.
      method: how it was trained, such as DPO.
      data: what it was trained on.
      config: plain values of the training.
      metrics: name -> value, of the last validation.
      paper: of the method, with its version.
      base: name of the model that it started from.
    """
    header = ["---", "library_name: transformers"]
    header += [f"base_model: {json.dumps(base)}"] if base else []
    header += ["tags:", "- pref_jax", f"- {json.dumps(method.lower())}", "---"]
    about = [f"- Method: {method}" + (f" ({paper})" if paper else "")]
    about += [f"- Started from: {base}"] if base else []
    about += [f"- Data: {data}", "- Trained with pref_jax"]
    table = ["| metric | value |", "| --- | --- |"]
    table += [f"| {key} | {value:.6g} |" for key, value in sorted(metrics.items())]
    sections = [
        "\n".join(header),
        f"# {name}",
        "\n".join(about),
        "## Last validation",
        "\n".join(table) if metrics else "None was recorded.",
        "## Configuration",
        "```json\n" + json.dumps(config, indent=1) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def check_new(path: str) -> None:
    """Raise unless a folder can be written there.

    Raises:
      FileExistsError: it is a file, or holds something.
    """
    folder = pathlib.Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; save into a new folder.")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes its place in one move when it is whole.

    Raises:
      FileExistsError: as `check_new`.
    """
    check_new(path)
    folder = pathlib.Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as temporary:
        inside = pathlib.Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        inside.replace(folder)


def _describe(config, like, family, is_reward_model):
    """The family that says all of a config, and its Hugging Face config."""
    if like is not None:
        its_family, its_config = _read_config(like)
        hf_config = _hf_config(like)
        hf_config = getattr(hf_config, "text_config", hf_config)
        same = not _differences(config, its_config, is_reward_model, like)
        if same and family in (None, its_family.model_type):
            return its_family, hf_config
        family = family or its_family.model_type
    problems = []
    asked = FAMILIES.values() if family is None else (find_family(family),)
    for candidate in asked:
        hf_config, problem = _try_family(candidate, config, is_reward_model)
        if problem:
            problems.append(f"{candidate.model_type}: {problem}")
            continue
        if like is not None:
            for name in _TOKEN_IDS:
                setattr(hf_config, name, getattr(_hf_config(like), name, None))
        return candidate, hf_config
    raise CheckpointFormatError(
        "no family of checkpoints says all of this config; what each would change: "
        + "; ".join(problems)
    )


def _try_family(family: Family, config, is_reward_model):
    """A Hugging Face config, and what is lost when it is read back: "" if nothing."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # most of those that are tried do not fit
    try:
        hf_config = AutoConfig.for_model(
            family.model_type,
            **dict.fromkeys(_TOKEN_IDS),  # its defaults are another model's
            **family.write(config),
        )
        back = DecoderConfig(**family.read(hf_config))
    except (ValueError, StrictDataclassError) as error:
        return None, str(error)
    finally:
        hf_logging.set_verbosity(verbosity)
    return hf_config, _differences(config, back, is_reward_model)


def _differences(config, other, is_reward_model, like=None) -> str:
    """Fields that two configs differ in, but for how they compute."""
    ignored = set(_COMPUTE)
    if is_reward_model and config.tied:
        ignored.add("tied")  # without an unembedding there is nothing to tie
    scalings = [kind.rotary and kind.rotary.scaling for kind in config.period]
    is_stretched = any(isinstance(x, LongScaling) for x in scalings)
    # Files of a model that was told to read shorter texts keep their own length.
    shortened = is_stretched or config.learned_positions
    if config.max_positions is None or shortened or like is not None:
        ignored.add("max_positions")
    if is_stretched:
        config, other = (_with_long_positions(c, False) for c in (config, other))
    found = []
    for field in dataclasses.fields(DecoderConfig):
        values = getattr(config, field.name), getattr(other, field.name)
        if field.name not in ignored and values[0] != values[1]:
            found.append(f"{field.name} {values[0]} -> {values[1]}")
    return ", ".join(found)


@dataclasses.dataclass
class _Planned:
    """One tensor to write: its shape and type, and which parameters fill it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sizes: dict[str, int]  # of the axes that `Tensor` speaks of
    sources: list[tuple[Tensor, jax.Array | np.ndarray, int | None]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _plan_files(family, config, params, is_reward_model, dtype) -> dict[str, _Planned]:
    expected = param_shapes(config, is_reward_model)
    given, needed = (
        {_path_name(k): leaf for k, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, expected)
    )
    for name in sorted(given.keys() ^ needed.keys()):
        state = "lack" if name in needed else "have"
        raise ValueError(
            f"the parameters {state} {name}, against their config; merge adapters "
            f"before saving (`lora.merge`)."
        )
    sizes = axis_sizes(config)
    plan: dict[str, _Planned] = {}
    for name, leaf in given.items():
        if tuple(leaf.shape) != needed[name].shape:
            raise ValueError(
                f"parameter {name} has shape {leaf.shape}; its config makes it "
                f"{needed[name].shape}."
            )
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"parameter {name} lies on other processes too; gather it before "
                f"saving (`jax.experimental.multihost_utils.process_allgather`)."
            )
        of_leaf = np.dtype(jnp.dtype(dtype or leaf.dtype))
        place = find_place(family, config, name)
        for number, tensor in enumerate(place.tensors):
            planned = plan.setdefault(
                tensor.name, _Planned(tensor.shape(sizes), of_leaf, sizes, [])
            )
            planned.sources.append((tensor, leaf, number if place.stacked else None))
    for name, planned in plan.items():
        filled = sum(t.size(sizes) for t, _, _ in planned.sources)
        if filled != np.prod(planned.shape):
            raise CheckpointFormatError(
                f"checkpoints of {family.model_type} have one tensor {name}, of which "
                f"the parameters fill a part only."
            )
    return plan


def _write_tensors(folder, plan: dict[str, _Planned], max_shard_bytes: int) -> None:
    """safetensors files, one file's tensors in memory at a time."""
    from safetensors.numpy import save_file

    files: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, planned in plan.items():
        if planned.num_bytes > room and files[-1]:
            files.append([])
            room = max_shard_bytes
        files[-1].append(name)
        room -= planned.num_bytes
    names = {}
    for number, members in enumerate(files, 1):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _assemble(plan[name]) for name in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(members, file)
    if len(files) > 1:
        total = sum(planned.num_bytes for planned in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")


def _assemble(planned: _Planned) -> np.ndarray:
    out = np.empty(planned.shape, planned.dtype)
    for tensor, leaf, number in planned.sources:
        values = leaf if number is None else leaf[number]
        tensor.view(out, planned.sizes)[...] = np.asarray(values)
    return out


def _write_companions(folder, hf_config, like, tokenizer, is_reward_model) -> None:
    """Tokenizer, chat template, generation config."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif like is not None:
        for pattern in _TOKENIZER_FILES:
            for file in sorted(pathlib.Path(like).glob(pattern)):
                copy = shutil.copytree if file.is_dir() else shutil.copy
                copy(file, folder / file.name)
    if is_reward_model:
        return
    generation = pathlib.Path(like or "") / "generation_config.json"
    if like is not None and generation.is_file():
        shutil.copy(generation, folder / generation.name)
        return
    from transformers import GenerationConfig

    ids = {name: getattr(hf_config, name, None) for name in _TOKEN_IDS}
    GenerationConfig(**ids).save_pretrained(folder)
