"""A report -> one self-contained HTML page."""

from __future__ import annotations

import collections
import json
import math
import os

import jinja2
from etils import epath

from pref_jax.report import heat, plots
from pref_jax.report.parts import (
    Card,
    Cell,
    Column,
    Comparison,
    Estimate,
    Histogram,
    NotRun,
    Panel,
    Report,
    TokenMaps,
    to_json,
)


def write_report(report: Report, path: str | os.PathLike) -> None:
    """Writes the page: one HTML file that needs no other and no network.

    The same report always gives the same bytes.

    Args:
      report: what to show.
      path: the file, on a disk or `gs://`; its folder exists.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pref_jax", "report"),
        autoescape=True,  # of everything: responses are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = []  # (kind, "Table 1", section)
    numbers = collections.Counter()
    for section in report.sections:
        kind = type(section).__name__
        noun = "Figure" if kind in ("Curves", "Comparisons", "Histogram") else kind
        numbers[noun] += 1
        sections.append((kind, f"{noun} {numbers[noun]}", section))
    styles = plots.line_styles(report)
    page = environment.get_template("page.html.jinja").render(
        report=report,
        sections=sections,
        styles=styles,
        draw=lambda panel, prefix: plots.draw(
            panel, styles, prefix, label=_described(panel)
        ),
        fact=_fact,
        heat_scales=heat.scales,
        heat_spans=heat.spans,
        most_quantities=max(
            (len(s.quantities) for s in report.sections if isinstance(s, TokenMaps)),
            default=0,
        ),
        number=_number,
        left_out=plots.left_out,
        series_names=plots.series_names,
        shown=_shown,
        unit=_unit,
    )
    epath.Path(path).write_bytes(page.encode())


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


def _described(panel: Panel | Comparison | Histogram) -> str:
    """What a plot shows, in words, for readers who hear the page."""
    if isinstance(panel, Comparison):
        shown = (
            f"{name}: {_number(e.mean, 3)} [{_number(e.low, 3)}, {_number(e.high, 3)}]."
            for name, e in panel.estimates.items()
        )
        return " ".join([f"{panel.title}, {panel.x_label}.", *shown])
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
