"""What the tables of README and docs are put together from."""

from __future__ import annotations

import numpy as np
import scipy.stats


def markdown(columns, rows) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def interval(values, digits: int = 3) -> str:
    """A mean with its bounds; what rounds to zero has no sign."""
    mean, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def over_seeds(values) -> str:
    """Mean of one value a seed with its 95 % interval of Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return interval((mean, mean - reach, mean + reach))


def where_run(record) -> str:
    """A line on the device, the version of jax and the commit of a record."""
    environment = record["environment"]
    versions = environment["versions"]
    return (
        f"\nOn {environment['device']}, jax {versions['jax']}; commit "
        f"{environment['commit'][:12]}.\n"
    )
