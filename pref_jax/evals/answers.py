"""Answers to the prompts of public benchmarks, and the judgments that come back.

Files are written in the layouts that the benchmarks read, and their judges' files are
read into one outcome a prompt, which `pref_jax.evals.preference` takes. Rows are held
to the prompts that they were asked for: a row that is missing, doubled or left without
a verdict is an error, and none is dropped.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class AlpacaOutcomes(NamedTuple):
    """What AlpacaEval's judge says, in the order of the instructions asked for.

    Attributes:
      outcomes: f64[N] in [0, 1], 1 where the model's output is preferred.
      length_differences: i64[N], characters of the model's output minus the reference's
        (alpaca_eval counts characters too).
    """

    outcomes: np.ndarray
    length_differences: np.ndarray


class ArenaOutcomes(NamedTuple):
    """What Arena-Hard's judge says, in the order of the ids asked for.

    Attributes:
      outcomes: f64[N] in [0, 1], the mean of both games, a strong verdict counted
        `strong_weight` times.
      weights: f64[N], how many verdicts that mean is over. The benchmark's own score is
        sum(weights * outcomes) / sum(weights).
    """

    outcomes: np.ndarray
    weights: np.ndarray


def write_alpaca_answers(
    path,
    *,
    instructions: Sequence[str],
    outputs: Sequence[str],
    generator: str,
    dataset: str,
) -> None:
    """Write a model's answers as AlpacaEval's `model_outputs`.

        [{"instruction": ..., "output": ..., "generator": ..., "dataset": ...}, ...]

    Source: github.com/tatsu-lab/alpaca_eval, README.md (`model_outputs`) and
    src/alpaca_eval/annotators/pairwise_evaluator.py (`annotate_head2head`), which joins
    model and reference on `instruction`: doubled ones would be paired crosswise.

    Args:
      path: of the JSON file; written anew.
      instructions: N prompts, without a template.
      outputs: N texts. An empty text is an answer, and is written.
      generator: the model's name on the leaderboard.
      dataset: where the instructions come from.

    Raises:
      ValueError: there are no instructions, not as many outputs, or an instruction
        occurs twice.
      TypeError: an instruction or an output is not a string.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "answers.json"
    >>> write_alpaca_answers(
    ...     path, instructions=["Hi"], outputs=["Ho"], generator="ours", dataset="own"
    ... )
    >>> json.loads(path.read_text())[0]["output"]
    'Ho'
    """
    _check_texts(outputs, ids=instructions, of="instructions", name="outputs")
    rows = [
        {
            "instruction": instruction,
            "output": output,
            "generator": generator,
            "dataset": dataset,
        }
        for instruction, output in zip(instructions, outputs, strict=True)
    ]
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_arena_answers(
    path,
    *,
    uids: Sequence[str],
    prompts: Sequence[str],
    outputs: Sequence[str],
    model: str,
    tstamp: float = 0.0,
) -> None:
    """Write a model's answers as Arena-Hard v2's `model_answer/MODEL.jsonl`.

        {"uid": ..., "ans_id": ..., "model": ...,
         "messages": [{"role": "user", "content": prompt},
                      {"role": "assistant", "content": {"answer": output}}],
         "tstamp": ...}

    Source: github.com/lmarena/arena-hard-auto, src/arenahard/gen_answer.py at bed1604
    (v2.0; the judge reads `messages[-1]["content"]["answer"]`). `metadata`, token and
    markdown counts for its style control, is left out: utils/add_markdown_info.py of
    the same repository adds it, with the tokenizer that it prescribes.

    Args:
      path: of the JSON Lines file; written anew.
      uids: N ids of the benchmark's questions.
      prompts: N texts.
      outputs: N texts. An empty text is an answer, and is written.
      model: the name that the judge's settings know the model by.
      tstamp: seconds since 1970 for all rows. No score depends on it; `ans_id` is made
        from model and uid, so that equal answers are equal files.

    Raises:
      ValueError: there are no questions, not as many prompts or outputs, or a uid
        occurs twice.
      TypeError: a uid, a prompt or an output is not a string.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ours.jsonl"
    >>> write_arena_answers(
    ...     path, uids=["q1"], prompts=["Hi"], outputs=["Hello"], model="ours"
    ... )
    >>> json.loads(path.read_text())["messages"][1]["content"]
    {'answer': 'Hello'}
    """
    _check_texts(prompts, ids=uids, of="uids", name="prompts")
    _check_texts(outputs, ids=uids, of="uids", name="outputs")
    _write_lines(
        path,
        (
            {
                "uid": uid,
                "ans_id": _answer_id(model, uid),
                "model": model,
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": {"answer": output}},
                ],
                "tstamp": tstamp,
            }
            for uid, prompt, output in zip(uids, prompts, outputs, strict=True)
        ),
    )


def write_arena_v01_answers(
    path,
    *,
    question_ids: Sequence[str],
    outputs: Sequence[str],
    model: str,
    tstamp: float = 0.0,
) -> None:
    """Write a model's answers as Arena-Hard v0.1's `model_answer/MODEL.jsonl`.

        {"question_id": ..., "answer_id": ..., "model_id": ...,
         "choices": [{"index": 0, "turns": [{"content": output}]}], "tstamp": ...}

    Source: github.com/lmarena/arena-hard-auto, gen_answer.py at 8f2f44d (v0.1, one
    choice of one turn). `conv_metadata`, read by its style control alone, is left out.

    Args:
      path: of the JSON Lines file; written anew.
      question_ids: N ids of the benchmark's questions.
      outputs: as in `write_arena_answers`.
      model: as in `write_arena_answers`.
      tstamp: as in `write_arena_answers`.

    Raises:
      ValueError, TypeError: as `write_arena_answers`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ours.jsonl"
    >>> write_arena_v01_answers(
    ...     path, question_ids=["q1"], outputs=["Hello"], model="ours"
    ... )
    >>> json.loads(path.read_text())["choices"]
    [{'index': 0, 'turns': [{'content': 'Hello'}]}]
    """
    _check_texts(outputs, ids=question_ids, of="question_ids", name="outputs")
    _write_lines(
        path,
        (
            {
                "question_id": question_id,
                "answer_id": _answer_id(model, question_id),
                "model_id": model,
                "choices": [{"index": 0, "turns": [{"content": output}]}],
                "tstamp": tstamp,
            }
            for question_id, output in zip(question_ids, outputs, strict=True)
        ),
    )


def read_alpaca_annotations(
    path, *, instructions: Sequence[str], generator: str
) -> AlpacaOutcomes:
    """Read AlpacaEval's `annotations.json` into an outcome for each instruction.

        outcome = preference - 1        (a preference of 0, an old tie, is 1/2)

    `preference` is 1 where `output_1`, the reference's, is better, 2 where `output_2`,
    the model's, is, 1.5 for a tie, and between for judges that weigh with their
    probabilities.

    Source: github.com/tatsu-lab/alpaca_eval, src/alpaca_eval/main.py (`outputs_1` is
    the reference) and src/alpaca_eval/metrics/helpers.py (`describe_head2head`: the
    subtraction, and 0 read as 1.5). That function leaves out rows without a preference;
    here they are errors.

    Args:
      path: of the JSON file, a list of objects.
      instructions: N prompts that were judged, in the order wanted.
      generator: the model's name, which each row must have as `generator_2`.

    Raises:
      ValueError: the file is not such a list, or a row lacks a field, has a preference
        that is neither 0 nor in [1, 2], is of other generators, or is missing, doubled
        or not asked for; the row is named.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "annotations.json"
    >>> row = {"instruction": "Hi", "generator_1": "gpt4", "generator_2": "ours"}
    >>> row |= {"output_1": "Hello", "output_2": "Hey", "preference": 1.25}
    >>> _ = path.write_text(json.dumps([row]))
    >>> found = read_alpaca_annotations(path, instructions=["Hi"], generator="ours")
    >>> found.outcomes.tolist(), found.length_differences.tolist()
    ([0.25], [-2])
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path.name}: needs a JSON list of annotations; got {type(rows).__name__}."
        )
    found = {}
    for number, row in enumerate(rows):
        where = f"{path.name}, row {number}"
        instruction = _field(row, "instruction", str, where)
        for name in ("generator_1", "generator_2"):
            _field(row, name, str, where)
        if row["generator_2"] != generator:
            raise ValueError(
                f"{where}: `generator_2` must be {generator!r}, the model whose wins "
                f"are counted; got {row['generator_2']!r} against "
                f"{row['generator_1']!r}."
            )
        outputs = [_field(row, name, str, where) for name in ("output_1", "output_2")]
        preference = row.get("preference")
        # A bool is an int, and no preference.
        is_number = type(preference) in (int, float)
        if not is_number or not (preference == 0 or 1 <= preference <= 2):
            raise ValueError(
                f"{where}: `preference` must be in [1, 2], or 0 for a tie; got "
                f"{preference!r}. Judge the instruction again."
            )
        _add(
            found,
            instruction,
            (preference - 1 if preference else 0.5, len(outputs[1]) - len(outputs[0])),
            where,
        )
    outcomes, differences = _in_order(found, instructions, "instructions", path)
    return AlpacaOutcomes(np.array(outcomes, np.float64), np.array(differences))


def read_arena_judgments(
    path, *, uids: Sequence[str], model: str, strong_weight: int = 3
) -> ArenaOutcomes:
    """Read Arena-Hard's `model_judgment/JUDGE/MODEL.jsonl` into an outcome a question.

    A row holds two games. In the first the baseline is assistant A and the model B, in
    the second they have changed places; `score` is one of A>>B, A>B, A=B, B>A, B>>A (or
    the same mirrored, A<B). With s the share of the win that goes to the model, 1, 1/2
    or 0, and w = `strong_weight` for >> and <<, else 1:

        outcome = (w_1 s_1 + w_2 s_2) / (w_1 + w_2)

    Source: github.com/lmarena/arena-hard-auto, show_result.py at 005ac12 (v2.0,
    `load_judgments`, weight 3) and at 0489bf3 (v0.1, `get_battles_from_row`): the rows
    of v2.0 have `uid`, those of v0.1 `question_id`; both are read. The benchmark leaves
    out rows without a score; here they are errors.

    Args:
      path: of the JSON Lines file.
      uids: N ids of the questions that were judged, in the order wanted.
      model: the name that each row must have as `model`.
      strong_weight: positive; how often a strong verdict counts.

    Raises:
      ValueError: a line is not an object, lacks a field, is of another model, does not
        hold two games with a score each, or is missing, doubled or not asked for; the
        line is named. `strong_weight` is not positive.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ours.jsonl"
    >>> row = {"uid": "q1", "model": "ours", "games": [{"score": "B>>A"}]}
    >>> row["games"].append({"score": "A=B"})
    >>> _ = path.write_text(json.dumps(row))
    >>> found = read_arena_judgments(path, uids=["q1"], model="ours")
    >>> found.outcomes.tolist(), found.weights.tolist()
    ([0.875], [4.0])
    """
    path = Path(path)
    if strong_weight <= 0:
        raise ValueError(f"`strong_weight` must be positive; got {strong_weight}.")
    found = {}
    for where, row in _lines(path):
        if "uid" not in row and "question_id" not in row:
            raise ValueError(f"{where}: field `uid` (v0.1: `question_id`) is missing.")
        uid = _field(row, "uid" if "uid" in row else "question_id", str, where)
        if _field(row, "model", str, where) != model:
            raise ValueError(
                f"{where}: `model` must be {model!r}; got {row['model']!r}."
            )
        games = _field(row, "games", list, where)
        if len(games) != 2:
            raise ValueError(
                f"{where}: `games` needs two, with the places changed; got "
                f"{len(games)}."
            )
        shares, weights = [], []
        for number, (game, places) in enumerate(zip(games, ("BA", "AB"), strict=True)):
            score = game.get("score") if isinstance(game, dict) else None
            if not isinstance(score, str) or score not in _VERDICTS:
                raise ValueError(
                    f"{where}: game {number} needs a score such as 'A>B'; got "
                    f"{score!r}. Judge {uid!r} again."
                )
            better, strong = _VERDICTS[score]
            ours = places[0]  # the letter that stands for the model in this game
            shares.append(0.5 if better == "=" else float(better == ours))
            weights.append(strong_weight if strong else 1)
        _add(found, uid, (np.average(shares, weights=weights), sum(weights)), where)
    outcomes, weights = _in_order(found, uids, "uids", path)
    return ArenaOutcomes(np.array(outcomes), np.array(weights, np.float64))


# Which assistant a verdict prefers, and whether strongly.
_VERDICTS = {
    **{score: ("A", False) for score in ("A>B", "B<A")},
    **{score: ("A", True) for score in ("A>>B", "B<<A")},
    **{score: ("=", False) for score in ("A=B", "B=A")},
    **{score: ("B", False) for score in ("B>A", "A<B")},
    **{score: ("B", True) for score in ("B>>A", "A<<B")},
}


def _check_texts(texts, *, ids, of: str, name: str) -> None:
    """Raise unless `ids` are distinct strings and there is a text for each."""
    if not len(ids):
        raise ValueError(f"`{of}` is empty: there is nothing to answer.")
    if len(texts) != len(ids):
        raise ValueError(
            f"`{name}` needs one for each of {len(ids)} `{of}`; got {len(texts)}."
        )
    _check_distinct(ids, of)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`{name}[{row}]`, of {_short(ids[row])}, must be a string; got "
                f"{text!r}."
            )


def _check_distinct(ids, of: str) -> None:
    seen = {}
    for row, key in enumerate(ids):
        if not isinstance(key, str):
            raise TypeError(f"`{of}[{row}]` must be a string; got {key!r}.")
        if key in seen:
            raise ValueError(
                f"`{of}[{row}]` repeats `{of}[{seen[key]}]`: {_short(key)}."
            )
        seen[key] = row


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _answer_id(model: str, question: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model, question])).hex


def _write_lines(path, rows) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """`(file:line, object)` of each line that is not blank."""
    # By "\n" alone: a text may hold other line ends, such as U+2028.
    for number, line in enumerate(
        path.read_text(encoding="utf-8").split("\n"), start=1
    ):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: needs an object; got {type(row).__name__}.")
        yield where, row


def _field(row, name: str, kind: type, where: str):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needs an object; got {type(row).__name__}.")
    if name not in row:
        raise ValueError(f"{where}: field `{name}` is missing.")
    if not isinstance(row[name], kind):
        raise ValueError(
            f"{where}: `{name}` must be a {kind.__name__}; got {row[name]!r}."
        )
    return row[name]


def _add(found: dict, key: str, values: tuple, where: str) -> None:
    if key in found:
        raise ValueError(
            f"{where}: {_short(key)} was judged before, in {found[key][0]}."
        )
    found[key] = (where, values)


def _in_order(found: dict, ids: Sequence[str], of: str, path: Path):
    """The values of each id, in their order; raises unless both have the same ids."""
    _check_distinct(ids, of)
    wanted = set(ids)
    for key, (where, _) in found.items():
        if key not in wanted:
            raise ValueError(f"{where}: {_short(key)} is not one of {len(ids)} `{of}`.")
    for row, key in enumerate(ids):
        if key not in found:
            raise ValueError(
                f"{path.name}: no judgment of `{of}[{row}]`, {_short(key)}; "
                f"{len(found)} of {len(ids)} are there."
            )
    if not ids:
        raise ValueError(f"`{of}` is empty: there is nothing to read.")
    return zip(*(found[key][1] for key in ids), strict=True)
