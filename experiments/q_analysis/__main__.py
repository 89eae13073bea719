"""python -m experiments.q_analysis: reads models over responses and writes a page."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tyro

from experiments import q_analysis
from experiments.q_analysis import findings, page
from experiments.q_analysis.findings import Read
from experiments.q_analysis.readings import (
    CORRUPTED,
    GIVEN,
    OWN,
    SAMPLED,
    WITH_REFERENCE,
    derived,
    with_copies,
)
from experiments.worlds.pipeline import leaving_room, prompt_text
from experiments.worlds.tasks import load_grade
from experiments.worlds.token_numbers import read_model
from pref_jax import model_folders, report
from pref_jax.data import readers, sources, templates
from pref_jax.data.records import parse_rename
from pref_jax.models.decoder import make_decoder
from pref_jax.sampling import SamplingConfig, make_sampler, sample_responses
from pref_jax.train import run as run_lib
from pref_jax.train import sharding
from pref_jax.train.logging import configure_logging
from pref_jax.types import TokenGroup

_logger = logging.getLogger("pref_jax.experiments")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is read, by which models."""

    model: str  # folder: Hugging Face, adapters, or a stage of a run
    data: str  # file, folder, glob or tfds:NAME of prompts with responses
    reference: str | None = None  # folder of the model before training
    out: str = "runs/q_analysis"  # folder of the page and the numbers
    tokenizer: str | None = None  # folder; None: that of the model
    split: str | None = None  # of a tfds data set
    rename: tuple[str, ...] = ()  # fields of the data, such as correct=labels
    on_error: str = "raise"  # rows that cannot be used or encoded: raise or skip
    beta: float = 0.1  # reward per nat
    max_prompts: int = 200  # rows that are read
    num_samples: int = 0  # responses sampled for each prompt; 0: those of the data
    max_new_tokens: int = 256  # of a sampled response
    grade: str | None = None  # module:function of (prompt, response), for samples
    num_shown: int = 4  # rows whose tokens are on the page
    groups_per_step: int = 8  # prompts at once
    dtype: str = "float32"  # of matrix products: float32 or bfloat16
    seed: int = 0  # of samples and of replaced tokens

    def __post_init__(self):
        for name in ("max_prompts", "num_shown", "groups_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more; got {getattr(self, name)}."
                )
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")
        if self.grade is not None and not self.num_samples:
            raise ValueError(
                "`grade` belongs to sampled responses; give --num-samples too. Those "
                "of the data are judged by their labels."
            )


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model, its parameters and its name."""

    name: str
    model: object
    params: object


def _check_same_tokenizer(encoder: templates.TextEncoder, path: str) -> None:
    """Refuse a reference that reads other tokens: its numbers would mean nothing."""
    folder = model_folders.tokenizer_folder(path)
    other = templates.TextEncoder(templates.load_tokenizer(folder))
    if other.identity()["tokenizer"] != encoder.identity()["tokenizer"]:
        raise ValueError(
            f"the tokenizer of the reference, in {folder}, is not that of the model. "
            f"If both read the same tokens nevertheless, give --tokenizer."
        )


def _load(path: str, tokenizer, config: Config, mesh) -> _Loaded:
    model_config, params = model_folders.load(path, mesh=mesh, dtype=config.dtype)
    templates.check_vocabulary(tokenizer, model_config.vocab_size)
    name = pathlib.Path(path).resolve().name
    return _Loaded(name, make_decoder(model_config), params)


def _sampled(config: Config, policy: _Loaded, encoder, groups, records, mesh):
    """Groups of sampled responses to the same prompts, graded if there is a grade."""
    settings = SamplingConfig(
        num_samples=config.num_samples, max_new_tokens=config.max_new_tokens
    )
    with jax.set_mesh(mesh):
        samples = sample_responses(
            make_sampler(policy.model, settings, end_ids=encoder.end_ids),
            policy.params,
            [group.prompt for group in groups],
            key=jax.random.key(config.seed),
            batch_size=min(config.groups_per_step, len(groups)),
        )
    grade = None if config.grade is None else load_grade(config.grade)
    found = []
    for group, row, lengths in zip(groups, samples.tokens, samples.length, strict=True):
        ids = tuple(row[k, :n] for k, n in enumerate(lengths))
        labels = (0.0,) * len(ids)
        if grade is not None:
            prompt = records[group.record].prompt
            texts = map(encoder.decode, ids)
            labels = tuple(grade(prompt, text)["reward"] for text in texts)
        found.append(
            TokenGroup(
                prompt=group.prompt,
                responses=ids,
                loss_masks=tuple(np.ones(len(r), bool) for r in ids),
                labels=labels,
                record=group.record,
            )
        )
    return found


def _most_common_size(groups) -> tuple[list[TokenGroup], int]:
    """Groups of one number of responses, which a batch needs, and how many are not."""
    sizes = [len(group.responses) for group in groups]
    size = max(set(sizes), key=sizes.count)
    kept = [group for group in groups if len(group.responses) == size]
    return kept, len(groups) - len(kept)


def read_all(config: Config) -> tuple[list[Read], list[str], list[str], object]:
    """Every response, and its copy, read by the model and its reference.

    Returns:
      (responses, names of the models, what was read and left out, tokenizer).

    Raises:
      ValueError: the data or a model cannot be read, or the reference has another
        tokenizer.
    """
    path = config.tokenizer or model_folders.tokenizer_folder(config.model)
    tokenizer = templates.load_tokenizer(path)
    encoder = templates.TextEncoder(tokenizer)
    records = readers.read(
        config.data,
        split=config.split,
        on_error=config.on_error,
        rename=parse_rename(config.rename),
    )
    notes = [records.summary()]
    used = [records[i] for i in range(min(config.max_prompts, len(records)))]
    if len(used) < len(records):
        notes.append(
            f"The first {len(used)} of {len(records)} rows were read (--max-prompts)."
        )
    groups = encoder.encode_all(used, on_error=config.on_error)
    if encoder.left_out:
        where, problem = encoder.left_out[0]
        notes.append(
            f"{len(encoder.left_out)} rows could not be encoded and were left out, "
            f"such as {where}: {problem}"
        )
    if config.reference is not None and config.tokenizer is None:
        _check_same_tokenizer(encoder, config.reference)
    by_record = {record.row: record for record in used}
    mesh = sharding.make_mesh()
    policy = _load(config.model, tokenizer, config, mesh)
    kind, labelled = GIVEN, True
    if config.num_samples:
        kind, labelled = SAMPLED, config.grade is not None
        groups, left_out = leaving_room(
            groups,
            lambda group: len(group.prompt),
            max_positions=policy.model.max_positions,
            max_new_tokens=config.max_new_tokens,
        )
        if left_out:
            notes.append(f"{left_out}.")
        groups = _sampled(config, policy, encoder, groups, by_record, mesh)
    groups, others = _most_common_size(groups)
    if others:
        notes.append(
            f"{others} rows with another number of responses than "
            f"{len(groups[0].responses)} were left out."
        )
    prompts = [prompt_text(by_record[group.record].prompt) for group in groups]
    groups, described = with_copies(
        groups, prompts, kind=kind, labelled=labelled, seed=config.seed
    )
    fitted, counts = sources.fit_groups(
        groups,
        sources.longest_group(groups),
        policy="drop",
        max_positions=policy.model.max_positions,
    )
    if counts["dropped"]:
        notes.append(
            f"{counts['dropped']} rows are longer than the model's "
            f"{policy.model.max_positions} positions and were left out."
        )
        kept = {group.record for group in fitted}
        described = [row for row in described if row[0].record in kept]
    unchanged = sum(
        response.kind == CORRUPTED and response.changed is None
        for row in described
        for response in row
    )
    if unchanged:
        notes.append(f"{unchanged} responses have no token that could be replaced.")

    def numbers(loaded):
        return read_model(
            loaded.name,
            loaded.model,
            loaded.params,
            fitted,
            beta=config.beta,
            groups_per_step=config.groups_per_step,
            mesh=mesh,
        )

    own, names, reference = numbers(policy), [policy.name], None
    del policy  # the reference may need its memory
    if config.reference is not None:
        loaded = _load(config.reference, tokenizer, config, mesh)
        reference = numbers(loaded)
        names.append(loaded.name)
    reads = []
    for i, row in enumerate(described):
        for k, response in enumerate(row):
            theirs = None if reference is None else reference[i][k]
            reads.append(
                Read(
                    response,
                    derived(response, own[i][k], theirs, beta=config.beta),
                    None
                    if theirs is None
                    else derived(response, theirs, None, beta=config.beta),
                )
            )
    return reads, names, notes, tokenizer


def token_texts(tokenizer, ids) -> list[str]:
    """What each id adds to the text; a part of a letter as the tokenizer names it."""

    def decode(part):
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    # Decoded behind the token before it, as some tokenizers drop a leading space.
    ids, found, first, known = [int(i) for i in ids], [], 0, ""
    for i, token in enumerate(ids):
        piece = decode(ids[first : i + 1])[len(known) :]
        if not piece or "\ufffd" in piece:
            found.append(tokenizer.convert_ids_to_tokens(token))
            continue
        found.append(piece)
        first, known = i, decode([token])
    return found


def write_tokens(path, reads, tokenizer, names) -> None:
    """A line for every token of every response, in Parquet."""
    columns: dict[str, list] = {}
    keys = [*OWN, *(WITH_REFERENCE if len(names) > 1 else ())]
    for read in reads:
        response = read.response
        size = len(response.ids)
        facts = {
            "record": response.record,
            "response": response.slot,
            "kind": response.kind,
            "label": response.label,
            "changed": response.changed,
        }
        lines = {name: [value] * size for name, value in facts.items()}
        lines["position"] = list(range(size))
        lines["counts"] = response.where.tolist()
        lines["token_id"] = [int(i) for i in response.ids]
        lines["token"] = token_texts(tokenizer, response.ids)
        lines |= {name: read.own[name].tolist() for name in keys}
        if read.reference is not None:
            lines |= {f"reference_{n}": read.reference[n].tolist() for n in OWN}
        for name, values in lines.items():
            columns.setdefault(name, []).extend(values)
    pa.parquet.write_table(pa.table(columns), path)


def _check_out(config: Config) -> None:
    """Refuse a folder that holds the page of another config: it would be lost."""
    path = pathlib.Path(config.out) / run_lib.RECORD_FILE
    if not path.exists():
        return
    old = json.loads(path.read_text()).get("config", {})
    new = run_lib.as_read_back(dataclasses.asdict(config))
    changed = run_lib.differences({**old, "out": config.out}, new)
    if changed:
        raise ValueError(
            f"{config.out} holds a page of another config ({changed}); give another "
            f"--out, or remove it."
        )


def run(config: Config) -> pathlib.Path:
    """Read, find, and write; returns the page's path.

    Raises:
      ValueError: as `read_all`, or `out` holds the page of another config.
    """
    _check_out(config)
    began = time.perf_counter()
    reads, names, notes, tokenizer = read_all(config)
    signals, drops = findings.find_signals(reads), findings.find_drops(reads)
    rows = list(dict.fromkeys(read.response.record for read in reads))
    on_page = set(rows[: config.num_shown])
    shown = [read for read in reads if read.response.record in on_page]
    folder = pathlib.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(config)
    finished = page.make_report(
        reads,
        shown,
        [token_texts(tokenizer, read.response.ids) for read in shown],
        signals=signals,
        drops=drops,
        names=names,
        config=values,
        notes=notes,
        meta=run_lib.environment() | {"duration": time.perf_counter() - began},
    )
    write_tokens(folder / "tokens.parquet", reads, tokenizer, names)
    report.write_report(finished, folder / "report.html")
    record = {
        "experiment": "q_analysis",
        "results": {
            "signals": [dataclasses.asdict(signal) for signal in signals],
            "drops": [dataclasses.asdict(drop) for drop in drops],
        },
        "config": values,
        "environment": run_lib.environment(),
        "seconds": time.perf_counter() - began,
        "report": report.to_json(finished),
    }
    run_lib.write_json(folder / run_lib.RECORD_FILE, record)
    return folder / "report.html"


def main() -> None:
    """The command line."""
    configure_logging()
    try:
        path = run(tyro.cli(Config, description=q_analysis.__doc__))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"report: {path}\n        {path.resolve().as_uri()}")


if __name__ == "__main__":
    main()
