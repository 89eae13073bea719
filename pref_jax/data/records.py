"""Text as users hold it, checked once: the record schema and its readers.

A row has a `prompt` and one of three forms of responses:

    {"prompt": ..., "response": ...}                          K = 1, label 1.0
    {"prompt": ..., "chosen": ..., "rejected": ...}           K = 2, labels 1.0 and 0.0
    {"prompt": ..., "responses": [...], "labels": [...]}      K = n, finite numbers

A text is a string or a chat: a list of {"role": ..., "content": ...}. A reader is a
function that yields `(where, row)`; `parse_record` and `on_error` are the same for all.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_FORMS = (("response",), ("chosen", "rejected"), ("responses", "labels"))
_RESPONSE_FIELDS = tuple(name for form in _FORMS for name in form)
_FIELDS = ("prompt", *_RESPONSE_FIELDS)
_PROMPT_ROLES = ("system", "user", "assistant", "tool")
_RESPONSE_ROLES = ("assistant", "tool")
_MAX_LABEL = float(np.finfo(np.float32).max)  # labels become float32
_ARRAY_TO_LINES = (
    'python -c "import json, sys; [print(json.dumps(row)) for row in '
    'json.load(sys.stdin)]" < rows.json > rows.jsonl'
)


class RecordError(ValueError):
    """A row or a file that cannot be used: where it stands and what is wrong.

    Attributes:
      where: file and line, such as `pairs.jsonl:12`, or the file alone.
      problem: what was needed, what came, what to do.

    >>> str(RecordError("pairs.jsonl:12", "field `chosen` is missing."))
    'pairs.jsonl:12: field `chosen` is missing.'
    """

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
      role: system, user, assistant or tool.
      content: the text of the turn.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt, its K responses and what the data says of them.

    Attributes:
      prompt: a string, or the messages of a chat.
      responses: K responses. Strings after a string; after a chat, messages that begin
        and end with the assistant's.
      labels: K finite numbers. For a pair 1.0 (chosen, slot 0) and 0.0 (rejected).
      row: number of the row in its source, from 0.
      where: the row's place for messages, such as `pairs.jsonl:12`.
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str | tuple[Message, ...], ...]
    labels: tuple[float, ...]
    row: int
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """The usable rows of one source, and an account of the others.

    Attributes:
      source: name of the file or of the objects.
      records: the records, in the order of the source.
      skipped: (where, problem) of each row that was left out.
      counts: `read` (rows of the source), `skipped` (of these), `equal_responses`
        (records with two equal responses), `blank_lines` (between rows), and
        `unread_fields` ({name: rows that have it}; `chosen.name` is the field `name` of
        a message in `chosen`).
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
        if counts["equal_responses"]:
            lines.append(f"  equal responses in {counts['equal_responses']} records")
        if counts["blank_lines"]:
            lines.append(f"  blank lines between rows: {counts['blank_lines']}")
        if unread := counts["unread_fields"]:
            named = ", ".join(f"{name} ({rows})" for name, rows in unread.items())
            lines.append(f"  fields not read (rows): {named}")
        return "\n".join(lines)


def read_jsonl(path: str | os.PathLike, *, on_error: str = "raise") -> Records:
    """Records of a `.jsonl` or `.jsonl.gz` file: UTF-8, one JSON object a line.

    Blank lines are no rows; those between rows are counted.

    Args:
      path: the file.
      on_error: "raise" stops at the first row that cannot be used. "skip" leaves such
        rows out, counts and lists them; of a gzip file that is cut or damaged it keeps
        the whole rows before that point and lists the cut among the skipped.

    Returns:
      The records and an account of what was left out.

    Raises:
      ValueError: `on_error` is neither.
      RecordError: a row cannot be used and `on_error` is "raise"; or, with either, the
        file is missing, of another kind, empty, or has no usable row.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}')
    >>> read_jsonl(path)[0].responses
    ('2', '3')
    """
    path = Path(path)
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise RecordError(
            str(path),
            "`read_jsonl` reads .jsonl and .jsonl.gz (one JSON object a line); convert "
            "the file, or pass its rows to `from_objects`.",
        )
    if path.is_dir():
        raise RecordError(str(path), "is a folder; name one file in it.")
    if not path.exists():
        raise RecordError(str(path), "no such file.")
    counts = Counter()
    return _collect(path.name, _jsonl_rows(path, counts), on_error, counts)


def from_objects(
    rows: Iterable[Mapping[str, Any]], *, name: str = "rows", on_error: str = "raise"
) -> Records:
    """Records of objects in memory, held to the same rules as a file's rows.

    Args:
      rows: mappings with the fields of a row.
      name: what messages call the source.
      on_error: "raise" or "skip", as in `read_jsonl`.

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
    return _collect(name, placed, on_error, Counter())


def parse_record(row: Any, *, where: str, number: int) -> Record:
    """The one place where a row becomes a record; raises what is wrong with it.

    A field that is null counts as absent. Fields that are not of the schema are left
    alone (the readers count them).

    Args:
      row: a mapping with `prompt` and one of the three forms.
      where: the row's place, for messages.
      number: number of the row in its source.

    Returns:
      The record. After a chat prompt a response given as a string becomes one
      assistant message; labels become floats (true is 1.0).

    Raises:
      RecordError: names the field, what it needs and what came.

    >>> parse_record({"prompt": "a", "response": "b"}, where="x:1", number=0).responses
    ('b',)
    """
    if not isinstance(row, Mapping):
        raise RecordError(where, f"needs an object with fields; got {_show(row)}.")
    fields = {name: value for name, value in row.items() if value is not None}
    present = tuple(name for name in _RESPONSE_FIELDS if name in fields)
    if "prompt" not in fields or present not in _FORMS:
        raise RecordError(
            where,
            "needs `prompt` and exactly one of: `response`; `chosen` and `rejected`; "
            f"`responses` and `labels`. Got the fields: "
            f"{', '.join(f'`{name}`' for name in fields) or 'none'}.",
        )
    prompt = _parse_prompt(fields["prompt"], where)
    if "responses" in fields:
        values, labels = _parse_list(fields["responses"], fields["labels"], where)
        names = [f"responses[{k}]" for k in range(len(values))]
    else:
        names, values = present, [fields[name] for name in present]
        labels = (1.0, 0.0)[: len(present)]
    responses = tuple(
        _parse_response(value, name, where, chat=not isinstance(prompt, str))
        for name, value in zip(names, values, strict=True)
    )
    return Record(prompt, responses, labels, number, where)


def _parse_prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return _parse_text(value, "prompt", where)
    messages = _parse_messages(value, "prompt", where, _PROMPT_ROLES)
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
            raise _field_error(where, name, "a text that is not blank", value)
        text = _parse_text(value, name, where)
        return (Message("assistant", text),) if chat else text
    messages = _parse_messages(value, name, where, _RESPONSE_ROLES)
    if not chat:
        raise RecordError(
            where,
            f"field `{name}` is a list of messages but `prompt` is a string: the chat "
            "template needs both as messages. Give the prompt as "
            '[{"role": "user", "content": ...}].',
        )
    for index in (0, -1):
        if messages[index].role != "assistant":
            raise RecordError(
                where,
                f"field `{name}` must begin and end with an assistant message; got "
                f"the roles {', '.join(message.role for message in messages)}.",
            )
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            field = f"{name}[{index}].content"
            raise _field_error(
                where, field, "a text that is not blank", message.content
            )
    return messages


def _parse_messages(
    value: Any, name: str, where: str, roles: tuple[str, ...]
) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _field_error(
            where, name, "a string or a list of one or more messages", value
        )
    messages = []
    for index, item in enumerate(value):
        field = f"{name}[{index}]"
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise _field_error(where, field, 'a {"role", "content"} object', item)
        if item["role"] not in roles:
            need = f"one of {', '.join(roles)}"
            raise _field_error(where, f"{field}.role", need, item["role"])
        if not isinstance(item["content"], str):
            raise _field_error(where, f"{field}.content", "a string", item["content"])
        text = _parse_text(item["content"], f"{field}.content", where)
        messages.append(Message(item["role"], text))
    return tuple(messages)


def _parse_text(value: str, name: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no tokenizer takes it.
        raise RecordError(
            where,
            f"field `{name}` holds {value[error.start]!a} at character {error.start}, "
            "half of a surrogate pair and no character.",
        ) from None
    return value


def _parse_list(
    responses: Any, labels: Any, where: str
) -> tuple[Sequence, tuple[float, ...]]:
    if not isinstance(responses, list | tuple) or not responses:
        need = "a list of one or more responses"
        raise _field_error(where, "responses", need, responses)
    if not isinstance(labels, list | tuple) or len(labels) != len(responses):
        need = f"a list of {len(responses)} numbers, one for each response"
        raise _field_error(where, "labels", need, labels)
    for index, label in enumerate(labels):
        # Written so that NaN fails, and an int too large for a float as well.
        number = isinstance(label, int | float | np.integer | np.floating | np.bool_)
        if not number or not abs(label) <= _MAX_LABEL:
            need = "a finite number (float32)"
            raise _field_error(where, f"labels[{index}]", need, label)
    return responses, tuple(float(label) for label in labels)


def _field_error(where: str, name: str, need: str, value: Any) -> RecordError:
    return RecordError(where, f"field `{name}` needs {need}; got {_show(value)}.")


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def _unread_fields(row: Mapping[str, Any]) -> set[str]:
    """Names of what `parse_record` did not look at, in the row and in its messages."""
    unread = {name for name in row if name not in _FIELDS and row[name] is not None}
    for name in _FIELDS:
        values = row.get(name)
        for value in values if isinstance(values, list | tuple) else ():
            # `responses` is a list of responses, the others are lists of messages.
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Mapping):
                    unread |= {
                        f"{name}.{key}"
                        for key in item
                        if key not in ("role", "content") and item[key] is not None
                    }
    return {str(name) for name in unread}


def _jsonl_rows(path: Path, counts: Counter) -> Iterator[tuple[str, Any]]:
    """Yields (where, object), or (where, RecordError) for a line that has none."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    rows = blank = 0
    with open_file(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):  # splits at \n, no other
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if not line.strip():
                    blank += 1
                    continue
                if rows == 0 and line.lstrip().startswith(b"["):
                    raise RecordError(
                        path.name,
                        "begins with `[`: it looks like one JSON array, and one JSON "
                        f"object a line is needed. Convert it with: {_ARRAY_TO_LINES}",
                    )
                counts["blank_lines"] += blank
                blank = 0
                rows += 1
                where = f"{path.name}:{number}"
                try:
                    yield where, _parse_line(line, where)
                except RecordError as error:
                    yield where, error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield (
                path.name,
                RecordError(
                    path.name,
                    f"the gzip file is cut or damaged ({error}); {rows} whole rows "
                    "before that point could be read.",
                ),
            )


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique_fields)
    except UnicodeDecodeError as error:
        raise RecordError(
            where,
            f"is not UTF-8: byte {error.start} of the line is "
            f"0x{line[error.start]:02x} ({error.reason}).",
        ) from None
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else " The file ends in this line: is it cut?"
        raise RecordError(
            where, f"is not one JSON object on one line ({error}).{cut}"
        ) from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = [
            name for name, n in Counter(name for name, _ in pairs).items() if n > 1
        ]
        raise ValueError(f"field given twice: {', '.join(twice)}")
    return fields


def _collect(
    source: str, rows: Iterable[tuple[str, Any]], on_error: str, counts: Counter
) -> Records:
    """Parses the rows of any reader; holds them to one K and to `on_error`."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f'`on_error` must be "raise" or "skip"; got {on_error!r}.')
    records, skipped, unread = [], [], Counter()
    for number, (where, row) in enumerate(rows):
        counts["read"] += 1
        try:
            if isinstance(row, RecordError):
                raise row
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
        unread.update(_unread_fields(row))
        counts["equal_responses"] += len(set(record.responses)) < len(record.responses)
    if not records:
        first = f" The first problem: {RecordError(*skipped[0])}" if skipped else ""
        raise RecordError(source, f"has no usable row among {counts['read']}.{first}")
    names = ("read", "equal_responses", "blank_lines")
    return Records(
        source=source,
        records=tuple(records),
        skipped=skipped,
        counts={name: counts[name] for name in names}
        | {"skipped": len(skipped), "unread_fields": dict(unread)},
    )
