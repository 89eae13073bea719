"""Turns a run's records into tables, plots and one self-contained `report.html`.

A `Report` is plain data: a title, headline cards, sections and facts of the run. It
goes to JSON and back unchanged, so the run's `record.json` keeps it under the key
"report", and

    python -m pref_jax.report RUN_DIR

makes the page again from the run folder alone. The page asks the network for nothing,
needs no javascript, and follows the reader's light or dark setting. Statistics
are not made here: whoever builds the report brings means and intervals.

>>> import pathlib, tempfile
>>> table = Table(
...     "True reward",
...     columns=(Column("stage"), Column("parts right", digits=1, percent=True)),
...     rows=(
...         ("base", Estimate(0.412, 0.38, 0.44)),
...         ("DPO", NotRun("no accelerator")),
...     ),
...     note="Means with 95 % intervals.",
... )
>>> report = Report("DPO, end to end", sections=(table,), meta={"duration": 75})
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pathlib.Path(folder) / "report.html"
...     write_report(report, path)
...     page = path.read_text(encoding="utf-8")
>>> "41.2" in page, "[38.0, 44.0]" in page, "1 min 15 s" in page
(True, True, True)
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import html
import io
import json
import logging
import math
import os
import pathlib
import re
import reprlib
import types
import typing
from collections.abc import Mapping

import jinja2
import numpy as np

_logger = logging.getLogger(__name__)

_TYPE = "$type"  # key that names the kind of a JSON object
_NON_FINITE = (
    "NaN",
    "Infinity",
    "-Infinity",
)  # how strict JSON spells them, as strings


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
class Config(_Node):
    """Settings as nested dicts of plain values, folded until the reader opens them."""

    title: str
    values: dict[str, object]


Section = Text | Table | Curves | Histogram | Samples | Config


@dataclasses.dataclass(frozen=True)
class Report(_Node):
    """What the page says.

    Attributes:
      title: heading of the page.
      subtitle: one line: method, model, data.
      summary: one paragraph: what was found.
      cards: headline numbers.
      sections: `Text`, `Table`, `Curves`, `Histogram`, `Samples` or `Config`.
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


def read_metrics(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    r"""Curves from a run's `metrics.jsonl`.

    Each line is a strict JSON object: an integer `step`, and numbers by name (`loss`,
    `rewards/accuracy`, `time/...`). A number that is not finite is written as the
    string "NaN", "Infinity" or "-Infinity". Where a resumed run wrote a step again,
    the later line counts, and the log says how many values gave way.

    Args:
      path: the file.

    Returns:
      name -> (steps i64[N], values f64[N]), by rising step.

    Raises:
      ValueError: a line is not such an object; the message has file and line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "metrics.jsonl"
    ...     _ = path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": "NaN"}')
    ...     steps, values = read_metrics(path)["loss"]
    >>> steps.tolist(), values.tolist()
    ([1, 2], [0.7, nan])
    """
    curves: dict[str, dict[int, float]] = {}
    num_replaced = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            step, values = _read_line(line, f"{path}, line {number}")
            for name, value in values.items():
                curve = curves.setdefault(name, {})
                num_replaced += step in curve
                curve[step] = value
    if num_replaced:
        _logger.warning(
            "%s: %d values were written again for the same step, as a resumed run "
            "does; the later ones count",
            path,
            num_replaced,
        )
    return {
        name: (
            np.array(sorted(curve), np.int64),
            np.array([curve[step] for step in sorted(curve)], np.float64),
        )
        for name, curve in curves.items()
    }


def write_report(report: Report, path: str | os.PathLike) -> None:
    """Writes the page: one HTML file that needs no other and no network.

    The same report always gives the same bytes.

    Args:
      report: what to show.
      path: the file; its folder exists.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pref_jax", "."),
        autoescape=True,  # of everything: responses are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = []  # (kind, "Table 1", section)
    numbers = collections.Counter()
    for section in report.sections:
        kind = type(section).__name__
        noun = {"Curves": "Figure", "Histogram": "Figure"}.get(kind, kind)
        numbers[noun] += 1
        sections.append((kind, f"{noun} {numbers[noun]}", section))
    styles = _styles(report)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        sections=sections,
        styles=styles,
        draw=lambda panel, prefix: _draw(panel, styles, prefix),
        fact=_fact,
        left_out=_left_out,
        series_names=_series_names,
        shown=_shown,
        unit=_unit,
    )
    pathlib.Path(path).write_text(page, encoding="utf-8")


def main() -> None:
    """Makes `report.html` of a run folder again from its `record.json`."""
    parser = argparse.ArgumentParser(prog="pref_jax.report", description=main.__doc__)
    parser.add_argument("run_dir", type=pathlib.Path)
    run_dir = parser.parse_args().run_dir
    path = run_dir / "record.json"
    if not path.exists():
        parser.error(f"{run_dir} needs a record.json, which a finished run writes")
    record = json.loads(path.read_text(encoding="utf-8"))
    if "report" not in record:
        parser.error(f'{path} needs the key "report"; it has {sorted(record)}')
    write_report(from_json(record["report"]), run_dir / "report.html")


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


def _read_line(line: str, where: str) -> tuple[int, dict[str, float]]:
    def reject(constant):
        raise ValueError(f'a bare {constant}, which JSON lacks; write "{constant}"')

    try:
        entries = json.loads(line, parse_constant=reject)
    except ValueError as error:
        raise ValueError(
            f"{where}: needs one JSON object; got {line.strip()[:80]!r} ({error}). "
            f"Remove the line if the run was killed while it wrote."
        ) from error
    step = entries.pop("step", None) if isinstance(entries, dict) else None
    if type(step) is not int:
        raise ValueError(
            f'{where}: needs an object with an integer "step"; got '
            f"{line.strip()[:80]!r}."
        )
    for name, value in entries.items():
        if type(value) not in (int, float) and value not in _NON_FINITE:
            raise ValueError(
                f"{where}: {name!r} needs a number, or one of {_NON_FINITE}; got "
                f"{value!r}."
            )
    return step, {name: float(value) for name, value in entries.items()}


def _number(value: float, digits: int, kind: str = "f") -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "\u2212∞"
    if isinstance(value, int):
        text = f"{value:,}"
    else:
        text = f"{value:,.{digits}{kind}}"
        if not any(c in "123456789" for c in text):
            text = text.lstrip("-")  # no minus sign before a rounded zero
    return text.replace("-", "\u2212")


def _shown(value: Cell, column: Column | Card) -> tuple[str, str, str]:
    """A cell as (text, line below, kind); kind is number, text or missing."""
    if value is None:
        return "\u2013", "", "missing"
    if isinstance(value, NotRun):
        return "not run", value.reason, "missing"
    if isinstance(value, str):
        return value, "", "text"
    if isinstance(value, bool):
        return "yes" if value else "no", "", "number"
    numbers = [value]
    if isinstance(value, Estimate):
        numbers = [float(n) for n in (value.mean, value.low, value.high)]
    if column.percent:
        numbers = [100.0 * number for number in numbers]
    # Digits that would turn every number into zero are no way to show them.
    lost = all(round(number, column.digits) == 0 for number in numbers if number)
    kind = "e" if lost and any(numbers) else "f"
    first, *interval = (_number(number, column.digits, kind) for number in numbers)
    return first, f"[{', '.join(interval)}]" if interval else "", "number"


def _unit(column: Column | Card) -> str:
    return f"% {column.unit}".strip() if column.percent else column.unit


def _fact(name: str, value: object) -> str:
    """An entry of `Report.meta` or `Config.values` as one line."""
    if name == "duration" and isinstance(value, (int, float)):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
        return " ".join(f"{n} {unit}" for n, unit in parts if n) or "under 1 s"
    if isinstance(value, dict):
        return ", ".join(f"{key}\u00a0{_fact(key, v)}" for key, v in value.items())
    return value if isinstance(value, str) else json.dumps(to_json(value))


# Drawing. Matplotlib gets stand-in colours, which become CSS variables in the page, so
# that one drawing serves light and dark. The colours lie in the template: at least 3:1
# against the page, and 23 or more apart (CIE76) in simulated colour blindness.

_NUM_COLOURS = 6
_MAX_MARKED = 25  # longer lines go without a mark at each point
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_STAND_INS = {"#00fe10": "var(--muted)", "#00fe11": "var(--rule)"} | {
    f"#00fe0{i}": f"var(--series-{i})" for i in range(_NUM_COLOURS)
}
_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#00fe11",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "font.size": 10.5,
    "grid.color": "#00fe11",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "pref_jax",
    "text.parse_math": False,
    "xtick.bottom": False,
    "xtick.color": "#00fe10",
    "xtick.minor.bottom": False,
    "ytick.color": "#00fe10",
    "ytick.left": False,
    "ytick.minor.left": False,
}


def _styles(report: Report) -> dict[str, tuple[int, tuple[float, ...]]]:
    """Name of a series -> (colour, dashes), in order of appearance in the report."""
    names: dict[str, None] = {}
    for section in report.sections:
        names |= dict.fromkeys(_series_names(section))
    return {
        name: (i % _NUM_COLOURS, _DASHES[i // _NUM_COLOURS % len(_DASHES)])
        for i, name in enumerate(names)
    }


def _series_names(section: Section) -> list[str]:
    if isinstance(section, Histogram):
        return list(section.counts)
    panels = section.panels if isinstance(section, Curves) else ()
    return list(dict.fromkeys(line.name for panel in panels for line in panel.series))


def _drawable(line: Series, panel: Panel) -> np.ndarray:
    """bool[N]: finite points, and positive ones on a logarithmic axis."""
    x, y = np.array(line.x, np.float64), np.array(line.y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    return keep & ((x > 0) | (not panel.log_x)) & ((y > 0) | (not panel.log_y))


def _left_out(panel: Panel) -> list[str]:
    """What the reader cannot see in a panel, for the note below it."""
    why = "not finite"
    if panel.log_x or panel.log_y:
        why += ", or not positive on a logarithmic axis"
    remarks = []
    for line in panel.series:
        num_hidden = int(np.sum(~_drawable(line, panel)))
        if num_hidden:
            remarks.append(
                f"{num_hidden} of {len(line.x)} points of {line.name}, {why}"
            )
        elif not line.x:
            remarks.append(f"{line.name}, which has no points")
    return remarks


def _described(panel: Panel | Histogram) -> str:
    """What a plot shows, in words, for readers who hear the page."""
    if isinstance(panel, Histogram):
        bins = f"{len(panel.edges) - 1} bins of {panel.x_label}"
        return f"Histogram of {bins} for {', '.join(panel.counts)}."
    lines = [
        f"{line.name}: {len(line.x)} points, "
        f"from {_number(line.y[0], 3)} to {_number(line.y[-1], 3)}."
        for line in panel.series
        if line.x
    ]
    return " ".join(
        [f"{panel.title} ({panel.y_label}) against {panel.x_label}.", *lines]
    )


def _draw(panel: Panel | Histogram, styles: dict, prefix: str) -> str:
    """The inline SVG of one pair of axes; `prefix` keeps its ids apart in the page.

    It holds no text but the numbers of the axes, so nothing in it needs escaping.
    """
    import matplotlib
    from matplotlib import figure, style, ticker

    # From the default style, so that no local setting changes the page.
    with style.context("default"), matplotlib.rc_context(_RC):
        page = figure.Figure(figsize=(5.0, 2.9), layout="constrained")
        axes = page.add_subplot()
        page.patch.set_visible(False)
        axes.patch.set_visible(False)
        if isinstance(panel, Histogram):
            for name, counts in panel.counts.items():
                pen = _pen(*styles[name])
                area = {"color": pen["color"], "alpha": 0.18}
                axes.stairs(counts, panel.edges, fill=True, **area)
                axes.stairs(counts, panel.edges, linewidth=1.6, **pen)
        else:
            for line in panel.series:
                pen = _pen(*styles[line.name])
                _draw_line(axes, line, _drawable(line, panel), pen)
            axes.set_xscale("log" if panel.log_x else "linear")
            axes.set_yscale("log" if panel.log_y else "linear")
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
                axis.set_major_locator(ticker.LogLocator(subs=steps))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_locator(ticker.NullLocator())
            else:
                axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        buffer = io.StringIO()
        page.savefig(buffer, format="svg")
    drawing = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', drawing).group()
    body = drawing[drawing.index("<g ") :]  # after the XML head and its metadata
    body = re.sub(r" font-family: [^;]+;", "", body)  # the page's own font
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", body)
    for stand_in, variable in _STAND_INS.items():
        body = body.replace(stand_in, variable)
    label = html.escape(_described(panel), quote=True)
    return f'<svg {box} role="img" aria-label="{label}">{body}'


def _pen(colour: int, dashes: tuple[float, ...]) -> dict[str, object]:
    return {"color": f"#00fe0{colour}", "linestyle": (0, dashes) if dashes else "-"}


def _draw_line(axes, line: Series, keep: np.ndarray, pen: dict[str, object]) -> None:
    if line.low:
        area = {"color": pen["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(line.x, line.low, line.high, where=keep, **area)
    beside = np.pad(keep, 1)
    alone = keep & ~beside[:-2] & ~beside[2:]  # a line would not show these
    marked = np.flatnonzero(keep if len(line.x) <= _MAX_MARKED else alone)
    marks = {"marker": "o", "markersize": 3.2, "markevery": marked.tolist()}
    axes.plot(line.x, np.where(keep, line.y, np.nan), **marks, **pen)


if __name__ == "__main__":
    main()
