"""Curves from the numbers that a run has written."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
from etils import epath

_logger = logging.getLogger(__name__)

_NON_FINITE = (
    "NaN",
    "Infinity",
    "-Infinity",
)  # strings: strict JSON has no such number


def read_metrics(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    r"""Curves from a run's `metrics.jsonl`.

    Each line is a strict JSON object: an integer `step`, and numbers by name (`loss`,
    `rewards/accuracy`, `time/...`). A number that is not finite is written as the
    string "NaN", "Infinity" or "-Infinity". Where a resumed run wrote a step again,
    the later line counts, and the log says how many values gave way.

    Args:
      path: the file, on a disk or `gs://`.

    Returns:
      name -> (steps i64[N], values f64[N]), by rising step.

    Raises:
      ValueError: a line is not such an object; the message has file and line.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "metrics.jsonl"
    ...     _ = path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": "NaN"}')
    ...     steps, values = read_metrics(path)["loss"]
    >>> steps.tolist(), values.tolist()
    ([1, 2], [0.7, nan])
    """
    curves: dict[str, dict[int, float]] = {}
    num_replaced = 0
    lines = epath.Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        step, values = _read_line(line.decode(), f"{path}, line {number}")
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
