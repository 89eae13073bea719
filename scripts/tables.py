"""Run records -> tables: every figure in README and docs is written by this script.

    python scripts/tables.py                         rewrite the tables
    python scripts/tables.py --check                 fail if a table is not up to date
    python scripts/tables.py --add runs/quickstart/001 --name quickstart_seed0
                                                     keep a run's record, then rewrite
    python scripts/tables.py --add runs/rates --name sft_bridge_text
                                                     likewise a sweep, in one record

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in README.md
or a page of docs/; NAME is one of `TABLES` below.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Mapping

import experiment_tables
import measured_tables
from kept_records import make_record, read_records, write_record

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SLOT = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TABLES: Mapping[str, Callable[[Mapping[str, dict]], str]] = {
    "quickstart-differences": experiment_tables.quickstart_differences,
    "quickstart-models": experiment_tables.quickstart_models,
    "quickstart-setting": experiment_tables.quickstart_setting,
    "adpo-claims": experiment_tables.adpo_claims,
    "adpo-scenarios": experiment_tables.adpo_scenarios,
    "adpo-control": experiment_tables.adpo_control,
    "sft-bridge-claims": experiment_tables.bridge_claims,
    "sft-bridge-headline": experiment_tables.bridge_headline,
    "sft-bridge-arms": experiment_tables.bridge_arms,
    "sft-bridge-choices": experiment_tables.bridge_choices,
    "sft-bridge-values": experiment_tables.bridge_values,
    "sft-bridge-text": experiment_tables.bridge_text,
    "benchmarks": measured_tables.benchmarks,
    "gpu-benchmark": measured_tables.gpu_benchmark,
    "growth": measured_tables.growth,
    "share-of-peak": measured_tables.share_of_peak,
    "step-profile": measured_tables.step_profile,
    "loading": measured_tables.loading,
    "loss-benchmarks": measured_tables.loss_benchmarks,
    "peers": measured_tables.peers,
    "data-sets": measured_tables.data_sets,
    "mutants": measured_tables.mutants,
    "surviving-mutants": measured_tables.surviving_mutants,
    "tpu": measured_tables.tpu,
}


def rewrite(text: str, records: Mapping[str, dict], where: str) -> str:
    """A page with its tables made anew.

    Raises:
      ValueError: a table is not known.
    """

    def table(match):
        name = match[2]
        if name not in TABLES:
            raise ValueError(
                f"{where}: table {name!r} is not known; there are {', '.join(TABLES)}."
            )
        return match[1] + TABLES[name](records) + match[3]

    return _SLOT.sub(table, text)


def main(args=None, root: pathlib.Path = ROOT) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--add", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--name", help="of the record that --add keeps")
    options = parser.parse_args(args)
    if (options.add is None) != (options.name is None):
        parser.error("--add and --name belong together")
    records = read_records(root)
    if options.add is not None:
        records[options.name] = make_record(options.add)
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    # All of them before anything is written: a record may lack what a table shows.
    new = {page: rewrite(page.read_text(), records, page.name) for page in pages}
    changed = [page for page in pages if new[page] != page.read_text()]
    if options.check:
        for page in changed:
            print(f"{page.name}: a table is not of docs/records; run scripts/tables.py")
        return 1 if changed else 0
    if options.add is not None:
        write_record(root, options.name, records[options.name])
    for page in changed:
        page.write_text(new[page])
    return 0


if __name__ == "__main__":
    sys.exit(main())
