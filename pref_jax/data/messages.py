"""Messages of a chat, and the errors that say what is wrong with a row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

PROMPT_ROLES = ("system", "user", "assistant", "tool")
RESPONSE_ROLES = ("assistant", "tool")
FIELDS = ("name", "tool_call_id", "tool_calls")
"""What a message may have beside its role and content."""


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
      content: the text of the turn; empty where an assistant only calls tools.
      fields: JSON object of what else a chat template reads: `name`, `tool_call_id`,
        `tool_calls`, in this order. Text, so that messages can be hashed and compared.
    """

    role: str
    content: str
    fields: str = "{}"

    def to_dict(self) -> dict[str, Any]:
        """The message as a chat template takes it.

        >>> Message("tool", "4", '{"name": "sum"}').to_dict()
        {'role': 'tool', 'content': '4', 'name': 'sum'}
        """
        return {"role": self.role, "content": self.content, **json.loads(self.fields)}


def parse_messages(
    value: Any, name: str, where: str, roles: tuple[str, ...]
) -> tuple[Message, ...]:
    """The messages of a chat; raises what is wrong with them.

    Args:
      value: what the row has in field `name`.
      name: of the field, for messages.
      where: of the row, for messages.
      roles: those that are allowed.

    Raises:
      RecordError: it is no list, or a message is none; names the part of the field.

    >>> parse_messages([{"role": "user", "content": "Hi."}], "prompt", "x:1", ("user",))
    (Message(role='user', content='Hi.', fields='{}'),)
    """
    if not isinstance(value, list | tuple) or not value:
        raise field_error(
            where, name, "a string or a list of one or more messages", value
        )
    return tuple(
        _parse_message(item, f"{name}[{index}]", where, roles)
        for index, item in enumerate(value)
    )


def _parse_message(
    item: Any, field: str, where: str, roles: tuple[str, ...]
) -> Message:
    if not isinstance(item, Mapping) or "role" not in item:
        raise field_error(where, field, 'a {"role", "content"} object', item)
    role = item["role"]
    if role not in roles:
        raise field_error(where, f"{field}.role", f"one of {', '.join(roles)}", role)
    fields = {}
    for name in FIELDS:
        value = item.get(name)
        if is_empty(value):
            continue
        if name != "tool_calls":
            if not isinstance(value, str):
                raise field_error(where, f"{field}.{name}", "a string", value)
            fields[name] = parse_text(value, f"{field}.{name}", where)
        elif role == "assistant":
            fields[name] = parse_objects(value, f"{field}.{name}", where)
        else:
            raise RecordError(
                where,
                f"field `{field}.{name}` belongs to an assistant message; this one is "
                f"of the role {role}.",
            )
    content = item.get("content")
    if content is None and "tool_calls" in fields:
        content = ""
    if not isinstance(content, str):
        raise field_error(where, f"{field}.content", "a string", content)
    return Message(
        role,
        parse_text(content, f"{field}.content", where),
        to_json(fields) if fields else "{}",
    )


def parse_text(value: str, name: str, where: str) -> str:
    """The text itself; raises if it cannot be written as UTF-8.

    >>> parse_text("a", "prompt", "x:1")
    'a'
    """
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


def parse_objects(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Objects for a chat template, from a list or from its JSON text.

    Null fields count as absent: tables of rows fill them in.

    >>> parse_objects('[{"type": "function", "id": null}]', "tools", "x:1")
    [{'type': 'function'}]
    """
    found = value
    try:
        if isinstance(found, str):
            found = json.loads(found)
        if isinstance(found, list | tuple) and found:
            found = [_without_nulls(item) for item in found]
            parse_text(to_json(found), name, where)
            if all(isinstance(item, Mapping) for item in found):
                return found
    except RecordError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            where, f"field `{name}` holds what JSON cannot: {error}."
        ) from None
    raise field_error(where, name, "a list of one or more objects", value)


def field_error(where: str, name: str, need: str, value: Any) -> RecordError:
    """An error that names the field, what it needs and what came.

    >>> print(field_error("x:1", "chosen", "a string", 3))
    x:1: field `chosen` needs a string; got 3 (int).
    """
    return RecordError(where, f"field `{name}` needs {need}; got {show(value)}.")


def show(value: Any) -> str:
    """A value and its type, cut to a line.

    >>> show([1])
    '[1] (list)'
    """
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def is_empty(value: Any) -> bool:
    """Whether an optional field is absent: null, or an empty text or list.

    >>> is_empty(""), is_empty(0)
    (True, False)
    """
    return value is None or (isinstance(value, str | list | tuple) and not value)


def to_json(value: Any) -> str:
    """JSON that any reader of JSON takes; raises on NaN and on what JSON has not.

    >>> to_json({"name": "é"})
    '{"name": "é"}'
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = value.items()
        return {name: _without_nulls(item) for name, item in items if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value
