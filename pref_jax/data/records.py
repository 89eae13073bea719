"""Text as users hold it, checked once: the record schema.

A row has a `prompt` and one of three forms of responses:

    {"prompt": ..., "response": ...}                          K = 1, label 1.0
    {"prompt": ..., "chosen": ..., "rejected": ...}           K = 2, labels 1.0 and 0.0
    {"prompt": ..., "responses": [...], "labels": [...]}      K = n, finite numbers

A text is a string or a chat: a list of {"role": ..., "content": ...}, where a message
may also have `name`, `tool_call_id` and, of an assistant, `tool_calls`. A row may add:

    tools        for the chat template: a list of JSON schemas
    margin       of a pair: a finite number, into `Record.extras`
    soft_label   of a pair: probability p that `chosen` is better, labels p and 1 - p
    any name     a text, number or true/false, kept in `Record.fields` to group by

Where `prompt` is left out, it is what two or more responses begin with (see
`parse_record`). The readers of files and data sets are in `pref_jax.data.readers`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from immutabledict import immutabledict

from pref_jax.data import messages
from pref_jax.data.messages import (
    PROMPT_ROLES,
    RESPONSE_ROLES,
    Message,
    RecordError,
    field_error,
    is_empty,
    parse_messages,
    parse_objects,
    parse_text,
    show,
    to_json,
)

_FORMS = (("response",), ("chosen", "rejected"), ("responses", "labels"))
_RESPONSE_FIELDS = tuple(name for form in _FORMS for name in form)
_TEXT_FIELDS = ("prompt", "response", "chosen", "rejected", "responses")
_PAIR_FIELDS = ("margin", "soft_label")
_FIELDS = ("prompt", *_RESPONSE_FIELDS, *_PAIR_FIELDS, "tools")
_MAX_NUMBER = float(np.finfo(np.float32).max)  # labels and extras become float32


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt, its K responses and what the data says of them.

    Attributes:
      prompt: a string, or the messages of a chat.
      responses: K responses. Strings after a string; after a chat, messages that begin
        and end with the assistant's.
      labels: K finite numbers. For a pair 1.0 (chosen, slot 0) and 0.0 (rejected), or
        its soft label p and 1 - p.
      row: number of the row in its source, from 0.
      where: the row's place for messages, such as `pairs.jsonl:12`.
      tools: JSON objects, one for each tool that a chat template is told of.
      fields: the row's other texts, finite numbers and truth values, to group by.
      extras: numbers for the methods that ask for them: `margin`.
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str | tuple[Message, ...], ...]
    labels: tuple[float, ...]
    row: int
    where: str
    tools: tuple[str, ...] = ()
    fields: Mapping[str, str | int | float | bool] = immutabledict()
    extras: Mapping[str, float] = immutabledict()

    def to_row(self) -> dict[str, Any]:
        """The row, of plain JSON values, that `parse_record` makes this record of.

        >>> row = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3", "margin": 0.5}
        >>> parse_record(row, where="x:1", number=0).to_row() == row
        True
        """
        texts = [
            text if isinstance(text, str) else [turn.to_dict() for turn in text]
            for text in (self.prompt, *self.responses)
        ]
        row = {"prompt": texts[0]}
        if self.labels == (1.0,):
            row["response"] = texts[1]
        elif self.labels == (1.0, 0.0) or self.extras:
            row |= {"chosen": texts[1], "rejected": texts[2]}
            if self.labels != (1.0, 0.0):
                row["soft_label"] = self.labels[0]
        else:
            row |= {"responses": texts[1:], "labels": list(self.labels)}
        if self.tools:
            row["tools"] = [json.loads(tool) for tool in self.tools]
        return row | dict(self.extras) | dict(self.fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """The usable rows of one source, and an account of the others.

    Attributes:
      source: name of the file, the folder, the data set or of the objects.
      records: the records, in the order of the source.
      skipped: (where, problem) of each row that was left out.
      counts: `read` (rows of the source), `skipped` (of these); of the records,
        `equal_responses` (two of its responses are equal), `duplicates` (an earlier
        record has the same prompt, tools and responses) and `implicit_prompts` (the
        prompt is what the responses begin with); `blank_lines` (between rows); `files`
        ({name: rows read}) and `unread_files` (names, of a folder's or pattern's other
        files); `kept_fields` ({name: records that have it in `fields`}) and
        `unread_fields` ({name: records whose row has it}; `chosen.id` is the field `id`
        of a message in `chosen`).
    """

    source: str
    records: tuple[Record, ...]
    skipped: list[tuple[str, str]]
    counts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    @property
    def num_responses(self) -> int:
        """K, the same for all records."""
        return len(self.records[0].responses)

    def summary(self) -> str:
        """A few lines for the start of a run: what was read, left out and not used."""
        counts = self.counts
        head = (
            f"{self.source}: {len(self)} records, {self.num_responses} response(s) each"
        )
        lines = [f"{head}; {counts['read']} rows read, {counts['skipped']} skipped"]
        lines += [f"  skipped {where}: {what}" for where, what in self.skipped[:3]]
        if counts["skipped"] > 3:
            lines.append(f"  ... and {counts['skipped'] - 3} more")
        if len(counts["files"]) > 1:
            lines.append(f"  files (rows): {_listed(counts['files'])}")
        if counts["unread_files"]:
            lines.append(f"  files not read: {', '.join(counts['unread_files'])}")
        for name, text in (
            ("equal_responses", "equal responses in {} records"),
            ("duplicates", "records with the prompt and responses of another: {}"),
            ("implicit_prompts", "prompts taken from what the responses share: {}"),
            ("blank_lines", "blank lines between rows: {}"),
        ):
            if counts[name]:
                lines.append(f"  {text.format(counts[name])}")
        if counts["kept_fields"]:
            lines.append(f"  fields kept (rows): {_listed(counts['kept_fields'])}")
        if counts["unread_fields"]:
            lines.append(
                f"  fields not read (rows): {_listed(counts['unread_fields'])}"
            )
        return "\n".join(lines)


def from_objects(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str = "rows",
    on_error: str = "raise",
    rename: Mapping[str, str] = immutabledict(),
) -> Records:
    """Records of objects in memory, held to the same rules as a file's rows.

    Args:
      rows: mappings with the fields of a row.
      name: what messages call the source.
      on_error: "raise" or "skip", as in `pref_jax.data.readers.read`.
      rename: {field of the rows: name of the schema}, as there.

    Returns:
      The records and an account of what was left out.

    Raises:
      ValueError: `on_error` is neither.
      RecordError: a row cannot be used and `on_error` is "raise", or none can.

    >>> records = from_objects([{"prompt": "1 + 1 =", "response": "2"}])
    >>> records[0].labels, records.num_responses
    ((1.0,), 1)
    """
    placed = ((f"{name}[{index}]", row) for index, row in enumerate(rows))
    return collect(name, placed, on_error=on_error, rename=rename)


def parse_record(row: Any, *, where: str, number: int) -> Record:
    """The one place where a row becomes a record; raises what is wrong with it.

    A field that is null counts as absent; so do null fields inside `tools` and
    `tool_calls`, and an empty `tools`, `tool_calls`, `tool_call_id` or `name`.
    Fields that are not of the schema are kept in `Record.fields` where they are a
    text, a finite number or a truth value, and otherwise left alone (the readers
    count both).

    Without `prompt`, two or more responses begin with it. Of chats it is the longest
    run of leading messages that all share, that does not end with an assistant's, and
    that an assistant's message follows in each. Of strings it is the longest text that
    all share and that ends before whitespace: each response then begins with that
    whitespace and is not blank.

    Args:
      row: a mapping with one of the three forms of responses and the other fields that
        the module lists. `tools` and `tool_calls` may be JSON texts of their lists.
      where: the row's place, for messages.
      number: number of the row in its source.

    Returns:
      The record. After a chat prompt a response given as a string becomes one
      assistant message; labels become floats (true is 1.0).

    Raises:
      RecordError: names the field, what it needs and what came.

    >>> parse_record({"prompt": "a", "response": "b"}, where="x:1", number=0).responses
    ('b',)
    >>> pair = {"chosen": "Q: 1 + 1? A: 2", "rejected": "Q: 1 + 1? A: 3"}
    >>> record = parse_record(pair | {"soft_label": 0.75}, where="x:1", number=0)
    >>> record.prompt, record.responses, record.labels
    ('Q: 1 + 1? A:', (' 2', ' 3'), (0.75, 0.25))
    """
    if not isinstance(row, Mapping):
        raise RecordError(where, f"needs an object with fields; got {show(row)}.")
    given = {name: value for name, value in row.items() if value is not None}
    present = tuple(name for name in _RESPONSE_FIELDS if name in given)
    implicit = "prompt" not in given
    if present not in _FORMS or (implicit and present == ("response",)):
        raise RecordError(
            where,
            "needs `prompt` and exactly one of: `response`; `chosen` and `rejected`; "
            f"`responses` and `labels`. Got the fields: "
            f"{', '.join(f'`{name}`' for name in given) or 'none'}.",
        )
    names, values, labels = _parse_form(given, present, where)
    if implicit:
        prompt, responses = _split_prompt(names, values, where)
    else:
        prompt = _parse_prompt(given["prompt"], where)
        responses = tuple(
            _parse_response(value, name, where, chat=not isinstance(prompt, str))
            for name, value in zip(names, values, strict=True)
        )
    extras = {}
    if "margin" in given:
        need = "a finite number (float32)"
        extras["margin"] = _parse_number(given["margin"], "margin", need, where)
    tools = given.get("tools")
    tools = () if is_empty(tools) else parse_objects(tools, "tools", where)
    if tools and isinstance(prompt, str):
        raise RecordError(
            where,
            "field `tools` is for a chat template, and the prompt is a string. Give "
            'the prompt as [{"role": "user", "content": ...}].',
        )
    return Record(
        prompt,
        responses,
        labels,
        number,
        where,
        tuple(to_json(tool) for tool in tools),
        immutabledict(_plain_fields(row)),
        immutabledict(extras),
    )


def _parse_form(
    given: Mapping[str, Any], present: tuple[str, ...], where: str
) -> tuple[Sequence[str], Sequence[Any], tuple[float, ...]]:
    """Names, values and labels of the responses."""
    for name in _PAIR_FIELDS:
        if name in given and present != ("chosen", "rejected"):
            raise RecordError(
                where,
                f"field `{name}` belongs to a pair, with `chosen` and `rejected`; this "
                f"row has {' and '.join(f'`{name}`' for name in present)}.",
            )
    if present == ("responses", "labels"):
        values, labels = _parse_list(given["responses"], given["labels"], where)
        return [f"responses[{k}]" for k in range(len(values))], values, labels
    labels = (1.0, 0.0)[: len(present)]
    if "soft_label" in given:
        need = "the probability that `chosen` is better, from 0 to 1"
        value = given["soft_label"]
        share = _parse_number(value, "soft_label", need, where, low=0.0, high=1.0)
        labels = (share, 1.0 - share)
    return present, [given[name] for name in present], labels


def _split_prompt(
    names: Sequence[str], values: Sequence[Any], where: str
) -> tuple[str | tuple[Message, ...], tuple[str | tuple[Message, ...], ...]]:
    """The prompt that responses begin with, and what follows it in each."""
    named = list(zip(names, values, strict=True))
    num_strings = sum(isinstance(value, str) for value in values)
    if num_strings == len(values):
        texts = [parse_text(value, name, where) for name, value in named]
        size = _shared_text(texts)
    elif num_strings == 0:
        texts = [parse_messages(v, name, where, PROMPT_ROLES) for name, v in named]
        size = _shared_turns(texts)
    else:
        size = 0
    if not size or len(values) < 2:
        raise RecordError(
            where,
            "has no `prompt`, and two or more responses share no beginning that could "
            "be one (leading messages up to an assistant's; of strings, a text that "
            "ends before whitespace). Give the field `prompt`.",
        )
    if num_strings == 0:
        for name, turns in zip(names, texts, strict=True):
            _check_turns(turns, name, where, begin=size)
    return texts[0][:size], tuple(text[size:] for text in texts)


def _shared_text(texts: Sequence[str]) -> int:
    """Length of the longest shared text that ends before whitespace in all, or 0."""
    last = min(len(text.rstrip()) for text in texts) - 1  # no response is blank
    for size in range(min(len(os.path.commonprefix(texts)), last), 0, -1):
        if texts[0][size - 1].isspace():
            continue
        if all(text[size].isspace() for text in texts):
            return size
    return 0


def _shared_turns(chats: Sequence[tuple[Message, ...]]) -> int:
    """Number of leading messages that all share and an assistant's follows, or 0."""
    shared = 0
    for turns in zip(*chats, strict=False):
        if len(set(turns)) > 1:
            break
        shared += 1
    for size in range(min(shared, *(len(chat) - 1 for chat in chats)), 0, -1):
        if chats[0][size - 1].role == "assistant":
            continue
        if all(chat[size].role == "assistant" for chat in chats):
            return size
    return 0


def _parse_prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return parse_text(value, "prompt", where)
    messages = parse_messages(value, "prompt", where, PROMPT_ROLES)
    if messages[-1].role == "assistant":
        raise RecordError(
            where,
            "field `prompt` ends with an assistant message, which the responses would "
            "follow; move it to the responses.",
        )
    return messages


def _parse_response(
    value: Any, name: str, where: str, *, chat: bool
) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise field_error(where, name, "a text that is not blank", value)
        text = parse_text(value, name, where)
        return (Message("assistant", text),) if chat else text
    messages = parse_messages(value, name, where, RESPONSE_ROLES)
    if not chat:
        raise RecordError(
            where,
            f"field `{name}` is a list of messages but `prompt` is a string: the chat "
            "template needs both as messages. Give the prompt as "
            '[{"role": "user", "content": ...}].',
        )
    _check_turns(messages, name, where)
    return messages


def _check_turns(
    messages: tuple[Message, ...], name: str, where: str, *, begin: int = 0
) -> None:
    """Raise if the messages from `begin` on are no response."""
    turns = list(enumerate(messages))[begin:]
    for index, message in turns:
        field = f"{name}[{index}]"
        if message.role not in RESPONSE_ROLES:
            need = f"one of {', '.join(RESPONSE_ROLES)} in a response"
            raise field_error(where, f"{field}.role", need, message.role)
        calls = "tool_calls" in json.loads(message.fields)
        if message.role == "assistant" and not calls and not message.content.strip():
            need = "a text that is not blank"
            raise field_error(where, f"{field}.content", need, message.content)
    if {turns[0][1].role, turns[-1][1].role} != {"assistant"}:
        raise RecordError(
            where,
            f"field `{name}` must begin and end with an assistant message; got "
            f"the roles {', '.join(message.role for _, message in turns)}.",
        )


def _parse_list(
    responses: Any, labels: Any, where: str
) -> tuple[Sequence, tuple[float, ...]]:
    if not isinstance(responses, list | tuple) or not responses:
        need = "a list of one or more responses"
        raise field_error(where, "responses", need, responses)
    if not isinstance(labels, list | tuple) or len(labels) != len(responses):
        need = f"a list of {len(responses)} numbers, one for each response"
        raise field_error(where, "labels", need, labels)
    need = "a finite number (float32)"
    return responses, tuple(
        _parse_number(label, f"labels[{index}]", need, where)
        for index, label in enumerate(labels)
    )


def _parse_number(
    value: Any,
    name: str,
    need: str,
    where: str,
    *,
    low: float = -_MAX_NUMBER,
    high: float = _MAX_NUMBER,
) -> float:
    number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
    # Written so that NaN fails, and an int too large for a float as well.
    if not number or not low <= value <= high:
        raise field_error(where, name, need, value)
    return float(value)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({rows})" for name, rows in counts.items())


def _plain_fields(row: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The fields that are not of the schema and that records can be grouped by."""
    kept = {}
    for name, value in row.items():
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(name, str) and name not in _FIELDS and _is_plain(value):
            kept[name] = value
    return kept


def _is_plain(value: Any) -> bool:
    """Whether a value equals itself, wherever it is written and read again."""
    if isinstance(value, str):
        return value.isascii() or value == value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int)


def _unread_fields(row: Mapping[str, Any], record: Record) -> set[str]:
    """Names of what `parse_record` did not look at, in the row and in its messages."""
    read = {*_FIELDS, *record.fields}
    unread = {name for name in row if name not in read and row[name] is not None}
    read = {"role", "content", *messages.FIELDS}
    for name in _TEXT_FIELDS:
        values = row.get(name)
        for value in values if isinstance(values, list | tuple) else ():
            # `responses` is a list of responses, the others are lists of messages.
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Mapping):
                    unread |= {
                        f"{name}.{key}"
                        for key in item
                        if key not in read and item[key] is not None
                    }
    return {str(name) for name in unread}


def parse_rename(pairs: Iterable[str]) -> dict[str, str]:
    """The `rename` of a reader from a command line's words.

    Args:
      pairs: such as "correct=labels": the field of the rows, and what it is read as.

    Raises:
      ValueError: a word is of another form, or a name comes twice.

    >>> parse_rename(["question=prompt", "correct=labels"])
    {'question': 'prompt', 'correct': 'labels'}
    """
    found: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not old or not new or old in found or new in found.values():
            raise ValueError(
                f"`rename` needs words such as correct=labels, each name once; got "
                f"{pair!r}."
            )
        found[old] = new
    return found


def _names(row: Any) -> set[str]:
    return set(row) if isinstance(row, Mapping) else set()


def _rename(row: Any, rename: Mapping[str, str], where: str) -> Any:
    if not rename or not isinstance(row, Mapping):
        return row
    for old, new in rename.items():
        if row.get(old) is not None and row.get(new) is not None and new not in rename:
            raise RecordError(
                where, f"has `{old}`, which is to be read as `{new}`, and `{new}` too."
            )
    others = {name: value for name, value in row.items() if name not in rename}
    return others | {new: row[old] for old, new in rename.items() if old in row}


def collect(
    source: str,
    rows: Iterable[tuple[str, Any]],
    *,
    on_error: str,
    rename: Mapping[str, str] = immutabledict(),
    counts: Mapping[str, Any] = immutabledict(),
) -> Records:
    """Parses the rows of any reader; holds them to one K and to `on_error`.

    Args:
      source: what messages call the source.
      rows: (where, row), or (where, RecordError) for what could not be read.
      on_error: "raise" stops at the first row that cannot be used, "skip" leaves such
        rows out, counts and lists them.
      rename: {field of the rows: name of the schema}.
      counts: the reader's own part of `Records.counts`, looked at after the last row.

    Returns:
      The records and an account of what was left out.

    Raises:
      ValueError: `on_error` is neither.
      RecordError: a row cannot be used and `on_error` is "raise", or none can; or no
        row has a field of `rename`.

    >>> rows = [("x:1", {"prompt": "a", "response": "b"}), ("x:2", 7)]
    >>> collect("x", rows, on_error="skip").skipped
    [('x:2', 'needs an object with fields; got 7 (int).')]
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'`on_error` must be "raise" or "skip"; got {on_error!r}.')
    records, skipped, seen, renamed = [], [], set(), set()
    found, kept, unread = Counter(), Counter(), Counter()
    for number, (where, row) in enumerate(rows):
        found["read"] += 1
        try:
            if isinstance(row, RecordError):
                raise row
            renamed |= rename.keys() & _names(row)
            row = _rename(row, rename, where)
            record = parse_record(row, where=where, number=number)
            if records and len(record.responses) != len(records[0].responses):
                raise RecordError(
                    where,
                    f"has {len(record.responses)} response(s), but {records[0].where} "
                    f"has {len(records[0].responses)}: all rows of one source need the "
                    "same number. Read them as separate sources.",
                )
        except RecordError as error:
            if on_error == "raise":
                hint = (
                    ' Fix it, or pass on_error="skip" (--on-error skip) to leave such '
                    "rows out."
                )
                raise RecordError(error.where, error.problem + hint) from None
            skipped.append((error.where, error.problem))
            continue
        records.append(record)
        kept.update(record.fields.keys())
        unread.update(_unread_fields(row, record))
        found["equal_responses"] += len(set(record.responses)) < len(record.responses)
        found["implicit_prompts"] += row.get("prompt") is None
        content = (record.prompt, record.responses, record.tools)
        found["duplicates"] += content in seen
        seen.add(content)
    missing = sorted(rename.keys() - renamed)
    if missing:
        raise RecordError(
            source,
            f"no row has the field `{missing[0]}`, which is to be read as "
            f"`{rename[missing[0]]}`.",
        )
    if not records:
        first = f" The first problem: {RecordError(*skipped[0])}" if skipped else ""
        raise RecordError(source, f"has no usable row among {found['read']}.{first}")
    names = ("read", "equal_responses", "duplicates", "implicit_prompts")
    return Records(
        source=source,
        records=tuple(records),
        skipped=skipped,
        counts={name: found[name] for name in names}
        | {"skipped": len(skipped), "kept_fields": dict(kept)}
        | {"unread_fields": dict(unread)}
        | {"blank_lines": 0, "files": {}, "unread_files": []}
        | dict(counts),
    )
