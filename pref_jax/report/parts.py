"""What a report is made of: plain, immutable data that goes to JSON and back.

Statistics are not made here: whoever builds a report brings means and intervals.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping

_TYPE = "$type"  # key that names the kind of a JSON object


class _Node:
    """Base of all records here: plain, immutable, equal after a trip through JSON."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            value = _plain(getattr(self, field.name), where)
            if not _fits(value, hints[field.name]):
                raise TypeError(
                    f"`{where}` needs {field.type}; got {reprlib.repr(value)}."
                )
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class Estimate(_Node):
    """A number with its interval; the level (95 %) belongs in a note."""

    mean: float
    low: float
    high: float

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(
                f"`Estimate` needs low <= high; got [{self.low}, {self.high}]."
            )


@dataclasses.dataclass(frozen=True)
class NotRun(_Node):
    """A cell that has no number, and why; a bare None is shown as a dash."""

    reason: str


Cell = str | int | float | None | Estimate | NotRun


@dataclasses.dataclass(frozen=True)
class Card(_Node):
    """A headline number at the top of the page.

    Attributes:
      label: what the number is.
      value: a cell; an `Estimate` shows its interval.
      note: one line below.
      digits: digits after the point of a float.
      unit: written after the number.
      percent: the value is a fraction; 0.5 is shown as 50 %.
    """

    label: str
    value: Cell
    note: str = ""
    digits: int = 2
    unit: str = ""
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Text(_Node):
    """A section of paragraphs: plain text, never markup."""

    title: str
    paragraphs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Column(_Node):
    """How a column of a table reads; `digits`, `unit`, `percent` as in `Card`."""

    title: str
    digits: int = 2
    unit: str = ""
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Table(_Node):
    """A table whose first column names its rows.

    Attributes:
      title: heading of the section.
      columns: one `Column` for each cell of a row.
      rows: rows of cells: str, int, float, None, `Estimate` or `NotRun`.
      note: caption: what is measured, on how many, at which level the intervals are.
      footnotes: title of a column, or first cell of a row -> remark on it.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    footnotes: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for i, row in enumerate(self.rows):
            _need_length(f"Table.rows[{i}]", row, of="columns", like=self.columns)
        names = [c.title for c in self.columns] + [row[0] for row in self.rows if row]
        for key in self.footnotes:
            if key not in names:
                raise ValueError(
                    f"`Table.footnotes` needs titles of columns or first cells of "
                    f"rows, of {names}; got {key!r}."
                )


@dataclasses.dataclass(frozen=True)
class Series(_Node):
    """A named line. One name has one colour in the whole report.

    Attributes:
      name: entry of the legend.
      x: N numbers.
      y: N numbers. A non-finite one leaves a gap, and the page counts them.
      low: N numbers, or empty: lower edge of a band around the line.
      high: N numbers, or empty: its upper edge.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _need_length(f"Series.y of {self.name!r}", self.y, of="x", like=self.x)
        if self.low or self.high:
            _need_length(f"Series.low of {self.name!r}", self.low, of="x", like=self.x)
            _need_length(
                f"Series.high of {self.name!r}", self.high, of="x", like=self.x
            )


@dataclasses.dataclass(frozen=True)
class Panel(_Node):
    """One pair of axes with lines in it."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


@dataclasses.dataclass(frozen=True)
class Curves(_Node):
    """Panels of lines side by side, under one legend."""

    title: str
    panels: tuple[Panel, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison(_Node):
    """One pair of axes with a point and its interval for each name, from the top.

    Attributes:
      title: heading of the panel.
      x_label: the quantity, with its unit.
      estimates: name -> number and interval. A non-finite one is not drawn, and the
        page says so.
      marked: a number that is drawn as a line to compare with, such as chance; or None.
    """

    title: str
    x_label: str
    estimates: dict[str, Estimate]
    marked: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparisons(_Node):
    """Panels of estimates side by side."""

    title: str
    panels: tuple[Comparison, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Histogram(_Node):
    """Counts in bins that several series share, as `np.histogram` returns them.

    Attributes:
      title: heading of the section.
      x_label: the quantity, with its unit.
      y_label: what is counted.
      edges: N + 1 bin edges.
      counts: name of a series -> N counts (or shares).
      note: caption.
    """

    title: str
    x_label: str
    y_label: str
    edges: tuple[float, ...]
    counts: dict[str, tuple[float, ...]]
    note: str = ""

    def __post_init__(self):
        super().__post_init__()
        for name, counts in self.counts.items():
            bins = self.edges[1:]
            _need_length(
                f"Histogram.counts[{name!r}]", counts, of="bins of edges", like=bins
            )


@dataclasses.dataclass(frozen=True)
class Response(_Node):
    """One response of `Samples`.

    Attributes:
      text: the response, shown as it is.
      verdict: a line below it: a score, a judgement.
      right: marks the verdict as right or wrong; None: neither.
    """

    text: str
    verdict: str = ""
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Sample(_Node):
    """A prompt and one response for each column of `Samples`."""

    prompt: str
    responses: tuple[Response, ...]


@dataclasses.dataclass(frozen=True)
class Samples(_Node):
    """Responses to the same prompts, side by side."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sample, ...]
    note: str = ""

    def __post_init__(self):
        super().__post_init__()
        for i, row in enumerate(self.rows):
            where = f"Samples.rows[{i}].responses"
            _need_length(where, row.responses, of="columns", like=self.columns)


@dataclasses.dataclass(frozen=True)
class TokenMap(_Node):
    """A response, token by token, with numbers for each token.

    Attributes:
      tokens: N texts, shown as they are.
      values: name of a quantity -> N numbers; what is not finite has no colour.
      marked: numbers of the tokens, from 0, that are underlined.
    """

    tokens: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    marked: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for name, values in self.values.items():
            _need_length(
                f"TokenMap.values[{name!r}]", values, of="tokens", like=self.tokens
            )


@dataclasses.dataclass(frozen=True)
class TokenSample(_Node):
    """A response to a prompt, and one map of it for each column of `TokenMaps`."""

    prompt: str
    name: str
    maps: tuple[TokenMap, ...]


@dataclasses.dataclass(frozen=True)
class TokenMaps(_Node):
    """Responses whose tokens are coloured by a quantity that the reader chooses.

    Attributes:
      title: heading of the section.
      columns: what made the numbers, such as two models, side by side.
      quantities: name -> what it is, with its unit; the first is shown at first. A
        token tells all of its numbers when the pointer is on it.
      rows: the responses.
      note: caption.
    """

    title: str
    columns: tuple[str, ...]
    quantities: dict[str, str]
    rows: tuple[TokenSample, ...]
    note: str = ""

    def __post_init__(self):
        super().__post_init__()
        for i, row in enumerate(self.rows):
            where = f"TokenMaps.rows[{i}].maps"
            _need_length(where, row.maps, of="columns", like=self.columns)
            for found in row.maps:
                unknown = sorted(set(found.values) - set(self.quantities))
                if unknown:
                    raise ValueError(
                        f"`{where}` needs values of {list(self.quantities)}; got "
                        f"{unknown} too."
                    )


@dataclasses.dataclass(frozen=True)
class Config(_Node):
    """Settings as nested dicts of plain values, folded until the reader opens them."""

    title: str
    values: dict[str, object]


Section = Text | Table | Curves | Comparisons | Histogram | Samples | TokenMaps | Config


@dataclasses.dataclass(frozen=True)
class Report(_Node):
    """What the page says.

    Attributes:
      title: heading of the page.
      subtitle: one line: method, model, data.
      summary: one paragraph: what was found.
      cards: headline numbers.
      sections: `Text`, `Table`, `Curves`, `Comparisons`, `Histogram`, `Samples`,
        `TokenMaps` or `Config`.
      meta: facts of the run for the foot of the page, in this order: versions (a
        dict), commit, command, hardware and the like; `duration` is in seconds.
    """

    title: str
    subtitle: str = ""
    summary: str = ""
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    meta: dict[str, object] = dataclasses.field(default_factory=dict)


def to_json(value: object) -> object:
    """What `json.dumps(..., allow_nan=False)` can write of a report or its parts.

    Args:
      value: a `Report`, or any part of one.

    Returns:
      dicts, lists and plain values; `from_json` gives back an equal report.

    >>> to_json(Estimate(0.5, 0.25, math.inf))["high"]
    {'$type': 'float', 'value': 'Infinity'}
    """
    if isinstance(value, _Node):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {_TYPE: type(value).__name__} | to_json(fields)
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity"
        return {_TYPE: "float", "value": f"-{name}" if value < 0 else name}
    return value


def from_json(data: object) -> object:
    """The report that `to_json` wrote.

    Args:
      data: what `json.loads` returned.

    Returns:
      the `Report`, or the part of one that was written.

    Raises:
      ValueError: an object is of no kind known here, or its parts do not agree.
      TypeError: a field is missing, unknown, or of another type.

    >>> import json
    >>> report = Report("Run 7", cards=(Card("win rate", Estimate(0.6, 0.5, 0.7)),))
    >>> from_json(json.loads(json.dumps(to_json(report)))) == report
    True
    """
    if isinstance(data, list):
        return tuple(from_json(entry) for entry in data)
    if not isinstance(data, dict):
        return data
    fields = {key: from_json(entry) for key, entry in data.items() if key != _TYPE}
    if _TYPE not in data:
        return fields
    if data[_TYPE] == "float":
        return float(fields["value"])
    kinds = {kind.__name__: kind for kind in _Node.__subclasses__()}
    if data[_TYPE] not in kinds:
        raise ValueError(
            f"a report is made of {sorted(kinds)}; got {data[_TYPE]!r}. Read it with "
            f"the version that wrote it."
        )
    return kinds[data[_TYPE]](**fields)


def _plain(value: object, where: str) -> object:
    """`value` as JSON gives it back: tuples, dicts by name, Python's own numbers."""
    if isinstance(value, float) and math.isnan(value):
        return math.nan  # one object, since tuples compare by identity first
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, _Node):
        return value
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and jax
        return _plain(value.tolist(), where)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(entry, where) for entry in value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _TYPE:
                raise TypeError(
                    f"`{where}` needs strings as keys, not {_TYPE!r}; got {key!r}."
                )
        return {key: _plain(value[key], f"{where}[{key!r}]") for key in value}
    raise TypeError(
        f"`{where}` needs plain values (str, int, float, bool, None, lists, dicts); "
        f"got {type(value).__name__}: {reprlib.repr(value)}."
    )


def _fits(value: object, hint: object) -> bool:
    """Whether `value` is of the annotated type, contents included."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        fits = isinstance(value, dict)
        return fits and all(_fits(v, args[1]) for v in value.values())
    return isinstance(value, (int, float) if hint is float else hint)


def _need_length(where: str, values: tuple, *, of: str, like: tuple) -> None:
    if len(values) != len(like):
        raise ValueError(
            f"`{where}` needs {len(like)} entries, as many as `{of}`; got "
            f"{len(values)}."
        )
