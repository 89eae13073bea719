"""The plots of a report as inline SVG, one drawing for light and dark pages."""

from __future__ import annotations

import html
import io
import re

import numpy as np

from pref_jax.report.parts import (
    Comparison,
    Curves,
    Histogram,
    Panel,
    Report,
    Section,
    Series,
)

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


def line_styles(report: Report) -> dict[str, tuple[int, tuple[float, ...]]]:
    """Name of a series -> (colour, dashes), in order of appearance in the report."""
    names: dict[str, None] = {}
    for section in report.sections:
        names |= dict.fromkeys(series_names(section))
    return {
        name: (i % _NUM_COLOURS, _DASHES[i // _NUM_COLOURS % len(_DASHES)])
        for i, name in enumerate(names)
    }


def series_names(section: Section) -> list[str]:
    """Names of the lines or histograms of a section, each once."""
    if isinstance(section, Histogram):
        return list(section.counts)
    panels = section.panels if isinstance(section, Curves) else ()
    return list(dict.fromkeys(line.name for panel in panels for line in panel.series))


def _drawable(line: Series, panel: Panel) -> np.ndarray:
    """bool[N]: finite points, and positive ones on a logarithmic axis."""
    x, y = np.array(line.x, np.float64), np.array(line.y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    return keep & ((x > 0) | (not panel.log_x)) & ((y > 0) | (not panel.log_y))


def _finite(comparison: Comparison) -> dict:
    """The estimates that can be drawn."""
    return {
        name: e
        for name, e in comparison.estimates.items()
        if np.isfinite([e.mean, e.low, e.high]).all()
    }


def left_out(panel: Panel | Comparison) -> list[str]:
    """What the reader cannot see in a panel, for the note below it."""
    if isinstance(panel, Comparison):
        hidden = panel.estimates.keys() - _finite(panel).keys()
        return [f"{name}, not finite" for name in panel.estimates if name in hidden]
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


def draw(
    panel: Panel | Comparison | Histogram, styles: dict, prefix: str, *, label: str
) -> str:
    """The inline SVG of one pair of axes.

    It holds no text but `label`, the numbers of the axes and the names of a comparison.

    Args:
      panel: what to draw.
      styles: of `line_styles`.
      prefix: keeps the ids of this drawing apart in the page.
      label: what the drawing shows, in words; plain text.
    """
    import matplotlib
    from matplotlib import figure, style, ticker

    # From the default style, so that no local setting changes the page.
    with style.context("default"), matplotlib.rc_context(_RC):
        height = 2.9
        if isinstance(panel, Comparison):
            height = 0.7 + 0.27 * max(1, len(_finite(panel)))
        page = figure.Figure(figsize=(5.0, height), layout="constrained")
        axes = page.add_subplot()
        page.patch.set_visible(False)
        axes.patch.set_visible(False)
        if isinstance(panel, Histogram):
            for name, counts in panel.counts.items():
                pen = _pen(*styles[name])
                area = {"color": pen["color"], "alpha": 0.18}
                axes.stairs(counts, panel.edges, fill=True, **area)
                axes.stairs(counts, panel.edges, linewidth=1.6, **pen)
        elif isinstance(panel, Comparison):
            _draw_estimates(axes, panel)
        else:
            for line in panel.series:
                pen = _pen(*styles[line.name])
                _draw_line(axes, line, _drawable(line, panel), pen)
            axes.set_xscale("log" if panel.log_x else "linear")
            axes.set_yscale("log" if panel.log_y else "linear")
        numbered = (axes.xaxis, axes.yaxis)
        for axis in numbered[:1] if isinstance(panel, Comparison) else numbered:
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
    spoken = html.escape(label, quote=True)
    return f'<svg {box} role="img" aria-label="{spoken}">{body}'


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


def _draw_estimates(axes, panel: Comparison) -> None:
    found = _finite(panel)
    places = range(len(found))
    for place, e in zip(places, found.values(), strict=True):
        axes.plot([e.low, e.high], [place, place], color="#00fe00", linewidth=1.6)
        axes.plot([e.mean], [place], "o", color="#00fe00", markersize=4.5)
    if panel.marked is not None:
        axes.axvline(panel.marked, color="#00fe10", linewidth=1.0, linestyle="--")
    axes.set_yticks(places, found)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
