"""A model of any folder as a Hugging Face folder, or adapters as a PEFT folder.

    python scripts/convert_checkpoint.py --model runs/quickstart/001/DPO --out dpo_hf
    python scripts/convert_checkpoint.py --model ADAPTER --out merged --dtype bfloat16
    python scripts/convert_checkpoint.py --model runs/own/001/DPO --adapters --out a

The model is a Hugging Face folder, a PEFT adapter (merged into its base) or a stage of
a run (its best checkpoint, else its last; adapters merged). The folder that is written
holds config, safetensors, tokenizer with its chat template, generation config and a
model card; `transformers` opens it, and so does every `--model` here. With `--adapters`
the adapters of a stage are written by themselves, in PEFT's format.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib

import tyro

from pref_jax import model_folders
from pref_jax.data import templates
from pref_jax.models import pretrained
from pref_jax.train.logging import configure_logging

_logger = logging.getLogger("pref_jax.convert")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert into what."""

    model: str  # folder: Hugging Face, adapter, or a stage of a run
    out: str  # folder to write, new or empty
    dtype: str | None = None  # of the tensors; None: float32, as they are trained
    family: str | None = None  # model type to write as; None: the model's own
    tokenizer: str | None = None  # folder; None: the model's own
    adapters: bool = False  # write the adapters alone, in PEFT's format
    max_shard_gb: float = 5.0  # of a file, in units of 10^9 bytes

    def __post_init__(self):
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"`dtype` must be float32, bfloat16 or float16; got {self.dtype!r}."
            )
        if not self.max_shard_gb > 0:
            raise ValueError(
                f"`max_shard_gb` must be positive; got {self.max_shard_gb}."
            )


def convert(config: Config) -> pathlib.Path:
    """Write the folder that a config asks for; returns its path."""
    if config.adapters:
        return model_folders.export_adapters(config.model, config.out)
    pretrained.check_new(config.out)  # before anything is read
    folder = config.tokenizer or model_folders.tokenizer_folder(config.model)
    tokenizer = None
    if config.tokenizer or (pathlib.Path(folder) / "tokenizer.json").is_file():
        tokenizer = templates.load_tokenizer(folder)
    else:
        _logger.warning("%s has no tokenizer; none is written", folder)
    found, params = model_folders.load(config.model)
    return pretrained.save(
        config.out,
        found,
        params,
        like=model_folders.hf_origin(config.model),
        family=config.family,
        tokenizer=tokenizer,
        card=model_folders.card(config.model),
        dtype=config.dtype,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )


def main() -> None:
    """The command line."""
    configure_logging()
    try:
        folder = convert(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:  # what a user can act on
        _logger.debug("where it happened", exc_info=True)
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
