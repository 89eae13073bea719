"""A model by its folder: a Hugging Face checkpoint, an adapter, or a stage of a run.

    Hugging Face folder   config.json and safetensors
    PEFT adapter          adapter_config.json; its base is found by the path in it
    stage of a run        model.json and checkpoints/; with adapters, its base likewise

Whatever it is, what comes back is a config and plain parameters: adapters are merged.
A folder may lie on `gs://`: a stage is read from there, each device its part, and the
files of the other kinds are copied to the disk of each host first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pref_jax.data.anchor_cache import params_identity
from pref_jax.models import decoder, lora, pretrained
from pref_jax.models.decoder import DecoderConfig
from pref_jax.models.pretrained import CheckpointFormatError
from pref_jax.train import loop, sharding, stage, storage
from pref_jax.train.checkpoint import Checkpoints
from pref_jax.types import PyTree

TOKENIZER_FOLDER = "tokenizer"
"""Where a run keeps the tokenizer of its models."""

_HF, _ADAPTER, _STAGE = "Hugging Face checkpoint", "adapter", "stage of a run"

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.md")
_WEIGHTS = "*.safetensors"


def _on_disk(path: str, *, weights: bool = True) -> str:
    """The folder of a checkpoint or an adapter where files are read by position."""
    return storage.fetch(path, patterns=_SMALL_FILES + (_WEIGHTS,) * weights)


def _is_folder(path: str) -> bool:
    return storage.as_folder(path).is_dir()


def _whole_path(path: str) -> str:
    """The same from wherever it is read."""
    remote = storage.is_object_store(path)
    return str(path) if remote else str(pathlib.Path(path).resolve())


def _kind(path: str) -> str:
    folder = storage.as_folder(path)
    if (folder / stage.MODEL_FILE).is_file():
        return _STAGE
    if (folder / "adapter_config.json").is_file():
        return _ADAPTER
    config = folder / "config.json"
    stages = sorted(p.parent.name for p in folder.glob(f"*/{stage.MODEL_FILE}"))
    if stages:
        raise CheckpointFormatError(
            f"{path} is a run of the stages {', '.join(stages)}; give the folder of "
            f"one of them, such as {folder / stages[-1]}."
        )
    if not config.is_file():
        raise CheckpointFormatError(
            f"{path} is no model: it has neither config.json (Hugging Face), nor "
            f"adapter_config.json (PEFT), nor {stage.MODEL_FILE} (a stage of a run)."
        )
    return _HF


def load_config(path: str, *, max_positions: int | None = None) -> DecoderConfig:
    """The decoder config of a model's folder.

    Args:
      path: of any of the three kinds.
      max_positions: as in `models.pretrained.load_config`.

    Raises:
      CheckpointFormatError: it is no such folder, or as `pretrained.load_config`.
    """
    kind = _kind(path)
    if kind == _HF:
        folder = _on_disk(path, weights=False)
        return pretrained.load_config(folder, max_positions=max_positions)
    if kind == _ADAPTER:
        return load_config(_peft_base(path), max_positions=max_positions)
    return _stage_config(storage.as_folder(path), max_positions)


def load(
    path: str,
    *,
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    max_positions: int | None = None,
    **compute,
) -> tuple[DecoderConfig, PyTree]:
    """Config and parameters of a model's folder.

    Args:
      path: of any of the three kinds. Of a stage, its best checkpoint where it has one,
        else its last.
      mesh: of `train.sharding.make_mesh`: every device reads its part. None: on the
        host, or on one device.
      param_dtype: of the parameters, float32 or bfloat16.
      max_positions: as in `load_config`.
      **compute: as in `models.pretrained.load`.

    Raises:
      CheckpointFormatError: as `load_config` and `pretrained.load`; the base of an
        adapter is not where it was, or not what it was.
    """
    kind = _kind(path)
    options = {"param_dtype": param_dtype, "max_positions": max_positions, **compute}
    if kind == _HF:
        shardings = None if mesh is None else functools.partial(_shardings, mesh)
        return pretrained.load(_on_disk(path), shardings=shardings, **options)
    if kind == _ADAPTER:
        base = _peft_base(path)
        config, params = load(base, mesh=mesh, **options)
        folder = _on_disk(path)
        lora_config, trained = lora.load_peft(folder, config, base=hf_origin(base))
        if mesh is not None:
            trained = jax.device_put(trained, _shardings(mesh, trained))
        return config, lora.merge(params, trained, lora_config)
    return _load_stage(storage.as_folder(path), mesh, options)


def tokenizer_folder(path: str) -> str:
    """Folder, on this disk, of the tokenizer that belongs to a model's folder."""
    kind = _kind(path)
    if kind == _STAGE:
        run = storage.as_folder(_whole_path(path)).parent
        return storage.fetch(run / TOKENIZER_FOLDER)
    folder = _on_disk(path, weights=False)
    own = any(pathlib.Path(folder).glob("tokenizer*"))
    return folder if kind == _HF or own else tokenizer_folder(_peft_base(path))


def base_identity(path: str, *, dtype: str = "float32") -> dict[str, str]:
    """What checkpoints of adapters say of their base: its path, its hash, its type.

    The hash is that of what is stored: of files, or of what a stage trained and of the
    base below it. Merged products, which differ in their last bits from mesh to mesh,
    are not in it.

    Args:
      path: of any of the three kinds.
      dtype: that the base is held in while adapters are trained on it.
    """
    return {"path": _whole_path(path), "hash": _hash(path), "dtype": dtype}


def _hash(path: str) -> str:
    kind = _kind(path)
    digest = hashlib.sha256(kind.encode())
    if kind == _STAGE:
        folder = storage.as_folder(path)
        digest.update(params_identity(_restore_trained(folder, None)).encode())
        base = _base_of_stage(folder)
        below = base and base["path"]
    else:
        folder = pathlib.Path(_on_disk(path))
        for file in sorted((*folder.glob("*config.json"), *folder.glob(_WEIGHTS))):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        below = _peft_base(path) if kind == _ADAPTER else None
    if below:
        digest.update(_hash(below).encode())
    return digest.hexdigest()


def hf_origin(path: str) -> str | None:
    """The Hugging Face folder that a model came from, through all its bases.

    Of one in a bucket, its copy on this disk, which may be without the weights.
    """
    kind = _kind(path)
    if kind == _HF:
        return _on_disk(path, weights=False)
    if kind == _ADAPTER:
        return hf_origin(_peft_base(path))
    folder = storage.as_folder(path)
    base = _base_of_stage(folder)
    start = base["path"] if base else _run_config(folder).get("model")
    return hf_origin(start) if start and _is_folder(start) else None


def export_adapters(path: str, out: str) -> pathlib.Path:
    """Write the adapters of a stage in PEFT's format.

    Raises:
      CheckpointFormatError: the folder is no stage, has no adapters, or its base is no
        Hugging Face folder, which PEFT could not open.
    """
    folder = storage.as_folder(path)
    base = _base_of_stage(folder) if _kind(path) == _STAGE else None
    if base is None:
        raise CheckpointFormatError(f"{path} is no stage of a run with adapters.")
    if _kind(base["path"]) != _HF:
        raise CheckpointFormatError(
            f"the adapters of {path} stand on {base['path']}, which is no Hugging Face "
            f"folder; convert that first, or write {path} merged."
        )
    trained = _restore_trained(folder, None)
    description = _description(path)
    return lora.save_peft(
        out,
        trained,
        _lora_config(description["lora"]),
        decoder.from_description(description["decoder"]),
        base=base["path"],
    )


def card(path: str) -> str:
    """The model card of a stage of a run; of other folders their own, if any."""
    folder = storage.as_folder(_whole_path(path))
    if _kind(path) != _STAGE:
        own = folder / "README.md"
        return own.read_text(encoding="utf-8") if own.is_file() else ""
    description, config = _description(path), _run_config(folder)
    base = _base_of_stage(folder) or {"path": config.get("model")}
    return pretrained.model_card(
        f"{folder.parent.name}, {folder.name}",
        method=description["method"],
        paper=description["paper"] or None,
        data=", ".join(config.get("data") or ()) or "the experiment's own",
        base=base["path"] and pathlib.Path(base["path"]).name,
        config={
            "stage": json.loads((folder / stage.CONFIG_FILE).read_text()),
            "run": config,
        },
        metrics=_last_validation(folder),
    )


def _run_config(stage_folder: epath.Path) -> dict:
    """The config of the run that a stage belongs to; {}: it belongs to none."""
    path = storage.as_folder(_whole_path(stage_folder)).parent / "config.json"
    return json.loads(path.read_text())["config"] if path.is_file() else {}


def _last_validation(folder: epath.Path) -> dict[str, float]:
    path = folder / "metrics.jsonl"
    # A killed run may have left half a line.
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    found = [json.loads(line) for line in lines]
    measured = [
        {k: v for k, v in line.items() if k.startswith("validation/")} for line in found
    ]
    return next((metrics for metrics in reversed(measured) if metrics), {})


def _peft_base(path) -> str:
    settings = lora.read_settings(_on_disk(path, weights=False))
    named = settings.get("base_model_name_or_path") or ""
    if not storage.is_object_store(named):
        named = os.path.expanduser(named)
    # From where we are, or from where the adapter lies.
    found = [named, os.path.join(path, named)]
    found = [folder for folder in found if named and _is_folder(folder)]
    if not found or _whole_path(found[0]) == _whole_path(path):
        raise CheckpointFormatError(
            f"{path}/adapter_config.json names the base {named!r}, which is no folder "
            f"of a model here. Put the base's path there."
        )
    return found[0]


def _description(path) -> dict:
    file = storage.as_folder(path) / stage.MODEL_FILE
    try:
        found = json.loads(file.read_text())
        decoder.from_description(found["decoder"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFormatError(
            f"{file} does not describe a decoder: {error!r}."
        ) from error
    return found


def _stage_config(folder: epath.Path, max_positions: int | None) -> DecoderConfig:
    config = decoder.from_description(_description(folder)["decoder"])
    if max_positions is None:
        return config  # as it was trained
    return pretrained.with_max_positions(config, max_positions)


def _shardings(mesh: Mesh, shapes: PyTree) -> PyTree:
    return sharding.param_shardings(mesh, lora.param_axes(shapes), shapes)


def _chosen_step(folder: epath.Path) -> int | None:
    """The best checkpoint of a finished stage that has one; None: the last."""
    done = folder / loop.DONE_FILE
    try:
        return json.loads(done.read_text())["best_step"] if done.is_file() else None
    except (ValueError, KeyError) as error:
        raise CheckpointFormatError(f"{done} cannot be read: {error!r}") from error


def _base_of_stage(folder: epath.Path) -> dict[str, str] | None:
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return (checkpoints.restore_meta(_chosen_step(folder)) or {}).get("base")


def _restore_trained(folder: epath.Path, mesh: Mesh | None) -> PyTree:
    """What a stage trained, placed on a mesh or on one device."""
    step = _chosen_step(folder)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        shapes = checkpoints.saved_shapes("params", step)
        if mesh is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            if jax.process_count() > 1:  # an array of all of them, whole on each
                here = NamedSharding(sharding.make_mesh(), PartitionSpec())
            shardings = jax.tree.map(lambda _: here, shapes)
        else:
            shardings = _shardings(mesh, shapes)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            *(shapes, shardings),
        )
        return checkpoints.restore(abstract, step, field="params")


def _load_stage(folder: epath.Path, mesh, options):
    description = _description(folder)
    config = _stage_config(folder, options.pop("max_positions"))
    dtype = jnp.dtype(options.pop("param_dtype"))
    config = dataclasses.replace(config, **options)
    params, base = _restore_trained(folder, mesh), _base_of_stage(folder)
    if base is not None:
        params = _on_base(folder, base, description["lora"], params, mesh)
    return config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def _on_base(folder, base, lora_values, trained, mesh):
    if not _is_folder(base["path"]):
        raise CheckpointFormatError(
            f"the adapters of {folder} stand on {base['path']}, which is no folder "
            f"here. Put the base back there."
        )
    if _hash(base["path"]) != base["hash"]:
        raise CheckpointFormatError(
            f"the adapters of {folder} stand on {base['path']}, which has changed: its "
            f"hash is not {base['hash']}."
        )
    _, params = load(base["path"], mesh=mesh, param_dtype=base["dtype"])
    return lora.merge(params, trained, _lora_config(lora_values))


def _lora_config(values: dict) -> lora.LoraConfig:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return lora.LoraConfig(**values)
