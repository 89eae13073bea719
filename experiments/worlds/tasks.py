"""What an experiment learns and measures: the embedded world, or the user's files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence

from experiments.worlds import instructions
from experiments.worlds.pipeline import (
    Grade,
    ToolPrompt,
    only_responses,
    prompt_text,
)
from pref_jax import model_folders
from pref_jax.data import readers, records, sources, templates, token_cache
from pref_jax.train import storage
from pref_jax.types import CHOSEN, TokenGroup


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt and measured: the world's, or your own.

    Attributes:
      encoder: text <-> ids.
      vocab_size: of a fresh decoder, so that every id has an embedding.
      documents: training and held-out text to pre-train on; None: nothing is.
      demonstrations: training and held-out groups, K = 1.
      pairs: training and held-out groups of responses that are compared, K = 2 or, of
        lists, more; None: sampled for `pair_prompts`.
      pair_prompts: training and held-out prompts.
      eval_prompts: prompts of the final evaluation.
      heldout_fields: name -> a value for each `record` number of the held-out pairs,
        for groups in the report.
      grade: (prompt, response) -> parts of the true reward, "reward" first; or None.
      notes: what was read, left out and counted, for the report.
    """

    encoder: templates.TextEncoder
    vocab_size: int
    documents: tuple[list[TokenGroup], list[TokenGroup]] | None
    demonstrations: tuple[Sequence[TokenGroup], Sequence[TokenGroup]]
    pairs: tuple[Sequence[TokenGroup], Sequence[TokenGroup]] | None
    pair_prompts: tuple[list, list]
    eval_prompts: list
    grade: Grade | None
    notes: tuple[str, ...]
    heldout_fields: dict[str, list] = dataclasses.field(default_factory=dict)


def world_task(
    world: instructions.World,
    *,
    seed: int,
    num_documents: int,
    num_demonstrations: int,
    num_pair_prompts: int,
    num_eval_prompts: int,
) -> Task:
    """The embedded world: text, demonstrations, prompts and the true grade."""
    tokenizer = instructions.train_tokenizer(world)
    encoder = templates.TextEncoder(tokenizer)

    def encode(rows):
        return encoder.encode_all(records.from_objects(rows))

    text = instructions.documents(world, num_documents, seed)
    documents = encode({"prompt": "", "response": line} for line in text)
    demonstrations = encode(
        instructions.demonstrations(world, num_demonstrations, seed)
    )

    def prompts(split, num):
        return instructions.prompts(world, split, num, seed)

    def grade(prompt, response):
        parts = instructions.grade(prompt, response, world=world)
        return {name: getattr(parts, name) for name in _WORLD_PARTS}

    return Task(
        encoder=encoder,
        vocab_size=len(tokenizer),
        documents=_cut(documents),
        demonstrations=_cut(demonstrations),
        pairs=None,
        pair_prompts=(
            prompts("train", num_pair_prompts),
            prompts("validation", max(16, num_pair_prompts // 5)),
        ),
        eval_prompts=prompts("test", num_eval_prompts),
        grade=grade,
        notes=(
            "The embedded instruction language; training, validation and test "
            "prompts share no instruction.",
        ),
    )


_MOST_GROUPS = 8  # values of a field that make groups
_WORLD_PARTS = ("reward", "right", "format", "length")


def _cut(groups, rate=0.05):
    """The last share of already shuffled groups is held out."""
    num_heldout = max(1, int(len(groups) * rate))
    return groups[:-num_heldout], groups[-num_heldout:]


def own_task(
    data: Sequence[str],
    *,
    weights: Sequence[float],
    rename: Mapping[str, str],
    split: str | None,
    heldout: str | None,
    tokenizer: str | None,
    model: str | None,
    max_positions: int | None = None,
    grade: str | None,
    on_error: str,
    num_eval_prompts: int,
    row_length: int | None,
    long_groups: str,
    cache: str,
    samples_pairs: bool = True,
    takes_lists: bool = False,
    option: str = "--heldout",
) -> Task:
    """Your own files, tokenizer and grade in the place of the world's.

    Args:
      data: sources of pairs or demonstrations, as `readers.read` takes them, or on
        `gs://`; so may be `heldout`, `tokenizer` and `model`.
      weights: share of each source in training; none: by its size.
      rename: {field of the rows: name of the schema}.
      split: of a tfds source.
      heldout: source for the evaluation; None: a tenth of `data`, by prompt.
      tokenizer: folder of the tokenizer; None: that of `model`.
      model: folder of the model that the ids must fit; None: a fresh decoder.
      max_positions: longest text of that model; None: as it says.
      grade: module:function of (prompt, response) -> true reward; None: not known.
      on_error: "raise" or "skip", for bad rows.
      num_eval_prompts: most prompts of the final evaluation.
      row_length: L; None: a row takes any group.
      long_groups: policy for groups that are longer than a row or than the model.
      cache: folder of what was tokenised.
      samples_pairs: whether demonstrations are of use only with a grade, because pairs
        are then sampled.
      takes_lists: whether more than two responses a row are of use.
      option: of the command line that gives `heldout`, for messages.

    Raises:
      ValueError: the files hold neither pairs nor demonstrations (nor, if they are
        taken, lists of one size), a split is empty,
        demonstrations come without a grade, or the grade is no finite number.
    """
    loaded = templates.load_tokenizer(
        storage.fetch(tokenizer) if tokenizer else model_folders.tokenizer_folder(model)
    )
    most = None
    if model is not None:
        config = model_folders.load_config(model, max_positions=max_positions)
        most = config.max_positions
        templates.check_vocabulary(loaded, config.vocab_size)
    encoder = templates.TextEncoder(loaded)

    def read(source, **options):
        here = storage.fetch(source)
        return readers.read(here, on_error=on_error, rename=rename, **options)

    found = [read(source, split=split) for source in data]
    if heldout is None:
        everything = found
        evaluation = [r for part in found for r in part if _is_heldout(r.prompt)]
        training = [[r for r in part if not _is_heldout(r.prompt)] for part in found]
    else:
        evaluation, training = read(heldout), found
        everything = [*found, evaluation]
    # Their numbers lead to their fields, whichever source they are of.
    evaluation = [dataclasses.replace(r, row=i) for i, r in enumerate(evaluation)]
    sizes = {part.num_responses for part in everything}
    wanted = "pairs (or lists of one size) or demonstrations"
    if not takes_lists:
        wanted = "pairs or demonstrations"
    fits = len(sizes) == 1 and (takes_lists or max(sizes) <= 2)
    if not fits or not all(training) or not evaluation:
        raise ValueError(
            f"{', '.join(part.source for part in everything)}: "
            f"{' and '.join(map(str, sorted(sizes)))} responses a row, "
            f"{sum(map(len, training))} training and {len(evaluation)} held-out rows. "
            f"This experiment takes {wanted}, not both, and some of both splits; give "
            f"{option} FILE if a tenth of the prompts is too few."
        )
    compares = sizes != {1}
    if not compares and grade is None and samples_pairs:
        raise ValueError(
            f"{', '.join(data)} holds demonstrations, so pairs have to be sampled and "
            f"graded: give --grade module:function, or a file of pairs."
        )
    notes = [part.summary() for part in everything]
    seen = {record.prompt for part in training for record in part}
    shared = sum(record.prompt in seen for record in evaluation)
    if shared:
        notes.append(
            f"{shared} of {len(evaluation)} held-out rows have a prompt that is in "
            f"the training data too: what is measured on them is not held out."
        )
    tokenise = functools.partial(
        token_cache.tokenised,
        encoder=encoder,
        root=cache,
        policy=long_groups,
        row_length=row_length,
        max_positions=most,
        on_error=on_error,
    )
    parts = [tokenise(part) for part in training]
    groups = (
        sources.Mixture(parts, weights or [len(part) for part in parts]),
        tokenise(evaluation),
    )
    notes += [part.summary() for part in (*parts, groups[1])]
    prompts = [
        list(dict.fromkeys(map(_prompt, part)))
        for part in ((record for part in training for record in part), evaluation)
    ]
    grade_parts = None
    if grade is not None:
        grade_parts = load_grade(grade)
        # A grade that fails should do so now, and not when everything is trained.
        grade_parts(prompts[1][0], encoder.decode(groups[1][0].responses[0]))
    return Task(
        encoder=encoder,
        vocab_size=len(loaded),
        documents=None,
        demonstrations=tuple(only_responses(CHOSEN, part) for part in groups),
        pairs=groups if compares else None,
        pair_prompts=tuple(prompts),
        eval_prompts=prompts[1][:num_eval_prompts],
        grade=grade_parts,
        notes=(*notes, encoder.describe()),
        heldout_fields=_fields(evaluation),
    )


def _fields(evaluation: Sequence[records.Record]) -> dict[str, list]:
    """Fields of the held-out rows that make groups: numbers, and a few other values."""
    found = {}
    for name in sorted({name for record in evaluation for name in record.fields}):
        values = [record.fields.get(name, "not given") for record in evaluation]
        kinds = set(map(type, values))
        few = len(set(values)) <= _MOST_GROUPS
        if len(set(values)) > 1 and len(kinds) == 1 and (few or kinds == {float}):
            found[name] = values
    return found


def _prompt(record: records.Record):
    """What a sampler is given of a record."""
    if record.tools:
        return ToolPrompt(record.prompt, record.tools)
    return record.prompt


def _is_heldout(prompt, rate=0.1) -> bool:
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


def load_grade(name: str):
    """The user's function; a plain number becomes {"reward": number}."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        grade = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--grade {name} must name module:function of (prompt, response) -> "
            f"number, importable from here: {error}"
        ) from error

    def checked(prompt, response):
        if isinstance(prompt, ToolPrompt):
            prompt = prompt.messages
        value = grade(prompt, response)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"--grade {name} must return a finite number; it returned {value!r} "
                f"for the prompt {prompt_text(prompt)[:60]!r} and the response "
                f"{response[:60]!r}."
            )
        return {"reward": number}

    return checked
