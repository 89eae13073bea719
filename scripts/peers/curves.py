"""The picture of the losses that the contestants share, from the record.

    python scripts/peers/curves.py docs/records/peers.json docs/peers.png

All curves of one order of the pairs should be one line: each is drawn thinner than the
one below it.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(record: dict, path: pathlib.Path) -> None:
    """Write the picture.

    Args:
      record: of `scripts/benchmark_peers.py`.
      path: of the .png file.
    """
    found = record["contestants"]
    orders = sorted({of["order"] for of in found.values()}, reverse=True)
    figure, panels = plt.subplots(
        1, len(orders), figsize=(8, 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, order in zip(panels[0], orders, strict=True):
        curves = {
            name: of["losses"] for name, of in found.items() if of["order"] == order
        }
        for i, (name, losses) in enumerate(curves.items()):
            width = 1 + 2.5 * (len(curves) - 1 - i)
            axes.plot(range(1, len(losses) + 1), losses, linewidth=width, label=name)
        axes.axhline(math.log(2), color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(f"pairs {order}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6, frameon=False)
    panels[0][0].set_ylabel("loss, nats", fontsize=8)
    # Without the version of matplotlib, which is no part of the picture.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("record", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    options = parser.parse_args()
    draw(json.loads(options.record.read_text()), options.picture)


if __name__ == "__main__":
    main()
