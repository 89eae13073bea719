"""`python -m pref_jax.data`: what the library makes of files, before any training.

    python -m pref_jax.data inspect pairs.jsonl
    python -m pref_jax.data inspect pairs.jsonl --tokenizer DIR --row-length 512
    python -m pref_jax.data survey a.jsonl 'b.jsonl?question=prompt' --tokenizer DIR

`inspect` shows one source: without a tokenizer what its rows hold, with one also how
they become tokens. `survey` takes one epoch of each source and shows a table of rows
used and left out; fields of other names follow a question mark.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import tyro

from pref_jax.data import inspection, readers, templates
from pref_jax.data.records import parse_rename


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what the library understands of a source."""

    source: tyro.conf.Positional[str]  # file, folder, glob or tfds:NAME
    tokenizer: str | None = None  # folder; None: only the rows are read
    split: str | None = None  # of a tfds data set
    row_length: int | None = None  # L, positions; None: the longest group
    max_positions: int | None = None  # longest text of the model, tokens
    rename: tuple[str, ...] = ()  # fields, such as correct=labels
    on_error: str = "skip"  # bad rows: skip (and list) or raise
    show: int = 3  # groups to show token by token

    def text(self) -> str:
        """All that is shown."""
        records = readers.read(
            self.source,
            split=self.split,
            on_error=self.on_error,
            rename=parse_rename(self.rename),
        )
        parts = [records.summary()]
        if self.tokenizer is None:
            parts.append("give --tokenizer DIR to see tokens, lengths and masks")
            return "\n\n".join(parts)
        encoder = templates.TextEncoder(templates.load_tokenizer(self.tokenizer))
        groups = encoder.encode_all(records, on_error=self.on_error)
        found = inspection.inspect_groups(
            groups, row_length=self.row_length, max_positions=self.max_positions
        )
        parts += [encoder.summary(), found.text()]
        if self.show:
            shown = groups[: self.show]
            parts.append(inspection.show_groups(shown, encoder.decode))
        return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Survey:
    """Take one epoch of each source and account for every row."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # as for inspect; ?old=new&old=new
    tokenizer: str  # folder
    row_length: int = 1024  # L, positions
    write: str | None = None  # file for the figures, as JSON

    def text(self) -> str:
        """One line a source; the figures go to `write`."""
        tokenizer = templates.load_tokenizer(self.tokenizer)
        lines, found = ["rows -> used (rows filled)  left out"], []
        for source in self.sources:
            path, _, query = source.partition("?")
            rename = parse_rename(query.split("&") if query else ())
            records = readers.read(path, on_error="skip", rename=rename)
            encoder = templates.TextEncoder(tokenizer)
            figures = inspection.survey(records, encoder, row_length=self.row_length)
            name = "/".join(pathlib.Path(path).parts[-2:])
            found.append(figures | {"source": name})
            reasons = [f"{what}: {n}" for what, n in figures["left_out"].items()]
            lines.append(
                f"{figures['rows']:6d} -> {figures['used']:6d} "
                f"({100 * figures['fill']:3.0f} %)  {', '.join(reasons) or '-'}  {name}"
            )
        if self.write is not None:
            record = {"row_length": self.row_length, "sources": found}
            pathlib.Path(self.write).write_text(json.dumps(record, indent=1) + "\n")
        return "\n".join(lines)


def main(args=None) -> None:
    """The command line."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"inspect": Inspect, "survey": Survey}, args=args, description=__doc__
    )
    try:
        sys.stdout.write(command.text() + "\n")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
