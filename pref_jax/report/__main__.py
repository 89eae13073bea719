"""Makes the page of a finished run again."""

from __future__ import annotations

import argparse
import json
import pathlib

from pref_jax.report.page import write_report
from pref_jax.report.parts import from_json


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


if __name__ == "__main__":
    main()
