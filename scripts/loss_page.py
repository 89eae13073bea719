"""Docstrings of the maths -> docs/losses.md.

    python scripts/loss_page.py            write the page
    python scripts/loss_page.py --check    fail if the page is not up to date

A docstring has a first line, equations (indented), remarks, and labelled lines:
`Source`, `Convention`, `Looks across the batch`, `Reduces to`, `Checked`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "losses.md"
LABELS = ("Source", "Convention", "Looks across the batch", "Reduces to", "Checked")
_LABEL = re.compile(rf"^({'|'.join(LABELS)}):", re.MULTILINE)

LOSSES = {
    "pairwise": "Pairs",
    "reference_free": "Pairs without an anchor",
    "unpaired": "Single responses",
    "batch_coupled": "Across the batch",
    "listwise": "Lists",
    "supervised": "Demonstrations",
    "reward_models": "Reward models",
    "policy_gradient": "Policy gradients",
    "diffusion": "Diffusion models",
}
PARTS = {
    "rewards": (
        "Rewards",
        (
            "implicit_reward",
            "forward_kl_reward",
            "jensen_shannon_reward",
            "alpha_divergence_reward",
            "adaptive_beta",
            "step_rewards",
            "denoising_error",
            "denoising_reward",
        ),
    ),
    "logps": (
        "Token weights and sums",
        (
            "length_desensitized_weights",
            "wpo_weights",
            "response_sum",
            "response_mean",
            "step_sum",
            "step_mean",
            "spread_steps",
            "episode_sum",
            "shift_targets",
            "token_logps",
        ),
    ),
    "targets": (
        "Targets and weights of lists",
        (
            "hard",
            "soft",
            "softmax",
            "smoothed",
            "kde",
            "ndcg_weights",
            "reciprocal_rank_weights",
            "position_weights",
        ),
    ),
    "anchors": (
        "Anchors",
        (
            "none",
            "fixed",
            "snapshot",
            "ema",
            "fused",
            "clip_to_initial",
            "fuse_max_margin",
            "fuse_average",
            "fuse_confidence",
        ),
    ),
    "q_values": (
        "Q-functions",
        ("logit_values", "token_rewards", "soft_bellman_residual", "response_values"),
    ),
}

HEAD = """# Losses, and what goes into them

<!-- written by scripts/loss_page.py from the docstrings; do not edit -->

Every loss is a function of arrays: one positional, the rest by name, the last axis the
responses of a prompt with the chosen one in slot 0. It returns `(loss, metrics)`, not
reduced, in nats, and runs under `jax.jit`, `jax.vmap` and `jax.grad`. `where=` drops
entries, whatever they hold. `beta` scales once, in the reward: losses see scaled
rewards, but for those whose formula holds beta elsewhere, which take `log_ratios` and
say so.

```python
import jax
import jax.numpy as jnp

from pref_jax import dpo_loss

logps = jnp.array([[-4.0, -6.0], [-5.0, -3.0]])  # [B, 2]: chosen, rejected
anchor_logps = jnp.array([[-5.0, -5.0], [-4.0, -4.0]])


@jax.jit
def mean_loss(logps):
    loss, metrics = dpo_loss(logps, anchor_logps=anchor_logps, beta=0.1)
    return loss.mean()


print(jax.value_and_grad(mean_loss)(logps))
```

In the equations s is the sigmoid, h the margin of the two rewards, [w] the chosen and
[l] the rejected response. *Checked* says what a function was compared with, besides its
equation written once more in plain loops in float64: another library's code, run or
read, or an outside value. *One source* means that there was none.

"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a docstring says of a function.

    Attributes:
      name: of the function.
      signature: its parameters.
      summary: the first line.
      body: paragraphs of text and equations, in Markdown.
      labels: label -> text.
    """

    name: str
    signature: str
    summary: str
    body: tuple[str, ...]
    labels: dict[str, str]


def read_entry(function) -> Entry:
    """Parse the docstring of a function.

    Raises:
      ValueError: there is none, or a paragraph mixes labels and text.
    """
    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(f"{name} has no docstring.")
    text = re.split(r"\n(?:Args|Returns|Raises)\b[^\n]*:\n|\n>>> ", text)[0]
    text = re.split(r"\nArgs(?:, returns)?,? and errors", text)[0]
    summary, *paragraphs = text.strip().split("\n\n")
    body, labels = [], {}
    for paragraph in paragraphs:
        if _LABEL.match(paragraph):
            starts = [match.start() for match in _LABEL.finditer(paragraph)]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                label, text = _split_label(paragraph[start:end])
                labels[label] = text
        elif _LABEL.search(paragraph):
            raise ValueError(f"{name}: labels begin a paragraph of their own.")
        else:
            body.append(_markdown(paragraph))
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        bare = parameter.replace(annotation=inspect.Parameter.empty)
        if bare.kind is bare.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        shown = str(bare)
        if inspect.isfunction(bare.default):
            shown = f"{bare.name}={bare.default.__name__}"
        parameters.append(shown)
    signature = f"{name}({', '.join(parameters)})"
    return Entry(name, signature, summary, tuple(body), labels)


def _markdown(paragraph: str) -> str:
    """A paragraph of a docstring; what is indented stays as it stands."""
    if paragraph.startswith("    "):
        return f"```\n{textwrap.dedent(paragraph)}\n```"
    return " ".join(paragraph.split())


def _introduction(module: str) -> str:
    """The docstring of a module of losses but its first line, which the heading is."""
    text = inspect.getdoc(importlib.import_module(module))
    return "".join(f"{_markdown(part)}\n\n" for part in text.split("\n\n")[1:])


def _split_label(text: str) -> tuple[str, str]:
    label, _, rest = text.partition(":")
    rest = " ".join(rest.split())
    return label, rest[:1].upper() + rest[1:]


def _sections():
    """(heading, module name, functions) in the order of the page."""
    for module, heading in LOSSES.items():
        found = importlib.import_module(f"pref_jax.losses.{module}")
        functions = [
            function
            for name, function in vars(found).items()
            if inspect.isfunction(function)
            and function.__module__ == found.__name__
            and not name.startswith("_")
        ]
        yield heading, found.__name__, functions
    for module, (heading, names) in PARTS.items():
        found = importlib.import_module(f"pref_jax.{module}")
        yield heading, found.__name__, [getattr(found, name) for name in names]


def _short_source(entry: Entry) -> str:
    source = entry.labels.get("Source", "-")
    paper = re.search(r"arXiv:\d{4}\.\d{5}(?:v\d+)?", source)
    title = re.split(r"[,;:]", source)[0]
    if not paper or paper[0] in title:
        return title
    return f"{title}, {paper[0]}"


def _row(entry: Entry) -> str:
    """A line of the table: what it is, from where, what it reduces to."""
    link = f"[`{entry.name}`](#{entry.name})"
    reduces = entry.labels.get("Reduces to", "-").rstrip(".")
    return f"| {link} | {_short_source(entry)} | {reduces} |\n"


def page() -> str:
    """The whole page."""
    table, text = ["| loss | source | reduces to |\n| --- | --- | --- |\n"], []
    for heading, module, functions in _sections():
        text.append(f"## {heading}\n\n`{module}`\n\n")
        if ".losses." in module:
            text.append(_introduction(module))
        for function in functions:
            entry = read_entry(function)
            if ".losses." in module:
                table.append(_row(entry))
            text.append(f"### `{entry.name}`\n\n{entry.summary}\n\n")
            text.append(f"`{entry.signature}`\n\n")
            text.extend(f"{paragraph}\n\n" for paragraph in entry.body)
            text.extend(
                f"- *{label}*: {entry.labels[label]}\n"
                for label in LABELS
                if label in entry.labels
            )
            text.append("\n" if entry.labels else "")
    return HEAD + "".join(table) + "\n" + "".join(text).rstrip() + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    expected = page()
    if not parser.parse_args().check:
        PAGE.write_text(expected)
    elif not PAGE.is_file() or PAGE.read_text() != expected:
        sys.exit("docs/losses.md is not up to date: run `python scripts/loss_page.py`.")


if __name__ == "__main__":
    main()
