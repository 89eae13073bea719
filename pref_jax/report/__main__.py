"""Makes the page of a finished run again."""

from __future__ import annotations

import argparse
import json

from etils import epath

from pref_jax.report.page import write_report
from pref_jax.report.parts import from_json


def main() -> None:
    """Makes `report.html` of a run folder (a disk or gs://) from its `record.json`."""
    parser = argparse.ArgumentParser(prog="pref_jax.report", description=main.__doc__)
    parser.add_argument("run_dir", type=epath.Path)
    run_dir = parser.parse_args().run_dir
    path = run_dir / "record.json"
    try:
        finished = path.exists()
    except ImportError as error:  # of the package that reads gs://
        parser.error(f"{run_dir} cannot be read: {error}")
    if not finished:
        parser.error(f"{run_dir} needs a record.json, which a finished run writes")
    record = json.loads(path.read_bytes())
    if "report" not in record:
        parser.error(f'{path} needs the key "report"; it has {sorted(record)}')
    write_report(from_json(record["report"]), run_dir / "report.html")


if __name__ == "__main__":
    main()
