"""Token maps -> spans with a colour for each quantity and a text for the pointer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pref_jax.report.parts import TokenMap, TokenMaps

_UP, _DOWN = "15 98 196", "220 106 12"  # of what is above zero, and below
_SHARE = 98  # per cent of the values that are not beyond the darkest colour


class Span(NamedTuple):
    """A token as the page shows it.

    Attributes:
      text: the token; the end of a line is seen.
      style: a CSS variable for each quantity that has a finite number.
      tip: a line for each quantity.
      marked: whether it is underlined.
    """

    text: str
    style: str
    tip: str
    marked: bool


def scales(section: TokenMaps) -> dict[str, float]:
    """The number of each quantity that has the darkest colour; 0: it has none."""
    found = {}
    for name in section.quantities:
        parts = [m.values.get(name, ()) for row in section.rows for m in row.maps]
        values = np.abs(np.concatenate([np.zeros(0), *map(np.array, parts)]))
        values = values[np.isfinite(values)]
        found[name] = float(np.percentile(values, _SHARE)) if values.size else 0.0
    return found


def spans(section: TokenMaps, shown: TokenMap, darkest: dict[str, float]) -> list[Span]:
    """The tokens of one map.

    Args:
      section: whose quantities are numbered.
      shown: the map.
      darkest: of `scales`.
    """
    names = [name for name in section.quantities if name in shown.values]
    number = {name: i for i, name in enumerate(section.quantities)}
    found = []
    for i, token in enumerate(shown.tokens):
        values = {name: shown.values[name][i] for name in names}
        style = ";".join(
            f"--q{number[name]}:{_colour(value, darkest[name])}"
            for name, value in values.items()
            if math.isfinite(value) and darkest[name] > 0
        )
        tip = "\n".join(f"{name} {_written(value)}" for name, value in values.items())
        text = token.replace("\n", "\u21b5\n")
        found.append(Span(text, style, tip, i in shown.marked))
    return found


def _colour(value: float, darkest: float) -> str:
    share = min(abs(value) / darkest, 1.0)
    return f"rgb({_UP if value > 0 else _DOWN}/{0.75 * share:.2f})"


def _written(value: float) -> str:
    text = f"{value:.3f}" if math.isfinite(value) else "\u2013"
    return text.replace("-", "\u2212")
