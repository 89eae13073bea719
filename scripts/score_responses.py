"""Score responses by several models, each with its own tokenizer: only numbers leave.

    python scripts/score_responses.py --data pairs.jsonl --models A B --out scores

For every model it writes, below OUT/<name of the model's folder>:

    tokens/   the data in the model's own tokens (a token cache)
    logps/    the log-probability of every response token

and, for all models together, OUT/scores.jsonl: a line for each row of the data with
`row`, and by model's name `logps` (nats, summed over the tokens of each response) and
`lengths` (their number). A row that a model cannot take, such as one that is longer
than the model, is null there, and counted. A run that was interrupted goes on where it
stopped; another data set, model or tokenizer is refused by name.

This is what model fusion needs (InfiFPO, arXiv:2505.13878): token probabilities of two
tokenizers cannot be compared, those of whole responses can.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib

import jax
import numpy as np
import tyro

from pref_jax import model_folders
from pref_jax.data import anchor_cache, readers, sources, templates, token_cache
from pref_jax.data.records import Records, parse_rename
from pref_jax.logps import response_scores
from pref_jax.models import decoder
from pref_jax.train import sharding
from pref_jax.train.logging import Progress, configure_logging

_logger = logging.getLogger("pref_jax.score_responses")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to score, and by which models."""

    data: str  # file, folder, glob or tfds:NAME
    models: tuple[str, ...]  # folders: Hugging Face, adapters, or stages of runs
    out: str  # folder of the results
    tokenizers: tuple[str, ...] = ()  # folders, one a model; none: those of the models
    split: str | None = None  # of a tfds data set
    rename: tuple[str, ...] = ()  # fields of the data, such as correct=labels
    on_error: str = "raise"  # rows that cannot be used or encoded: raise or skip
    groups_per_step: int = 16  # prompts at once
    dtype: str = "float32"  # of matrix products: float32 or bfloat16

    def __post_init__(self):
        if self.tokenizers and len(self.tokenizers) != len(self.models):
            raise ValueError(
                f"`tokenizers` needs a folder for each of {len(self.models)} models; "
                f"got {len(self.tokenizers)}."
            )
        names = [model_name(path) for path in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(
                f"`models` needs folders of different names, since results go by them; "
                f"got {', '.join(twice) or 'none'}{' twice' if twice else ''}."
            )


def model_name(path: str) -> str:
    """The name that a model's results go by: that of its folder."""
    return pathlib.Path(path).resolve().name


def score(
    config: Config, records: Records, model_path: str, tokenizer_path: str
) -> dict[int, tuple[list[float], list[int]]]:
    """Logps and lengths of each record that a model can take, by its row."""
    name = model_name(model_path)
    folder = pathlib.Path(config.out) / name
    tokenizer = templates.load_tokenizer(tokenizer_path)
    mesh = sharding.make_mesh()
    model_config, params = model_folders.load(model_path, mesh=mesh, dtype=config.dtype)
    templates.check_vocabulary(tokenizer, model_config.vocab_size)
    groups = token_cache.tokenised(
        records,
        templates.TextEncoder(tokenizer),
        folder / "tokens",
        policy="drop",  # a response that was cut would have another probability
        max_positions=model_config.max_positions,
        on_error=config.on_error,
    )
    _logger.info("%s: %s", name, groups.summary())
    model = decoder.make_decoder(model_config)
    identity = anchor_cache.params_identity(params)
    batches = sources.evaluation_batches(
        groups,
        groups_per_step=min(config.groups_per_step, len(groups)),
        row_length=max(128, sources.longest_group(groups)),
        rows_multiple=sharding.num_row_shards(mesh),
    )
    with jax.set_mesh(mesh), Progress(name, len(batches)) as progress:
        scores = jax.jit(lambda p, batch: response_scores(model, p, batch).logp)

        def logps(number, batch):
            progress.count(number)
            return np.asarray(scores(params, sharding.place_batch(mesh, batch)))

        scored = anchor_cache.with_anchor_logps(
            groups,
            folder=folder / "logps",
            batches=batches,
            score=logps,
            key={"model": identity, "dtype": config.dtype},
        )
    found = {}
    for group in scored:
        tokens = group.extras["anchor_logps"]
        found[group.record] = (
            [float(logps.sum(dtype=np.float64)) for logps in tokens],
            [int(mask.sum()) for mask in group.loss_masks],
        )
    return found


def run(config: Config) -> pathlib.Path:
    """Score by all models; returns the path of the scores."""
    records = readers.read(
        config.data,
        split=config.split,
        on_error=config.on_error,
        rename=parse_rename(config.rename),
    )
    _logger.info("%s", records.summary())
    names = [model_name(path) for path in config.models]
    found = {
        name: score(config, records, path, tokenizer)
        for name, path, tokenizer in zip(
            *(names, config.models),
            config.tokenizers or map(model_folders.tokenizer_folder, config.models),
            strict=True,
        )
    }
    lines = []
    for record in records:
        by_model = {name: found[name].get(record.row) for name in names}
        line = {"row": record.row}
        for i, key in enumerate(("logps", "lengths")):
            line[key] = {name: pair and pair[i] for name, pair in by_model.items()}
        lines.append(json.dumps(line) + "\n")
    path = pathlib.Path(config.out) / "scores.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(path)
    for name in names:
        missing = len(records) - len(found[name])
        _logger.info("%s: %d rows scored, %d not", name, len(found[name]), missing)
    return path


def main() -> None:
    """The command line."""
    configure_logging()
    try:
        path = run(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"scores: {path}")


if __name__ == "__main__":
    main()
