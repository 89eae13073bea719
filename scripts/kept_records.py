"""Run records in docs/records: small JSON files of numbers, config and versions.

They hold no paths and no host names; scripts/tables.py makes the tables of them.
"""

from __future__ import annotations

import json
import pathlib

RECORDS = "docs/records"
_KEPT = ("experiment", "results", "config", "environment", "seconds")


def read_records(root: pathlib.Path) -> dict[str, dict]:
    """Name -> record, of all files in docs/records."""
    files = sorted((root / RECORDS).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def add_record(root: pathlib.Path, run: pathlib.Path, name: str) -> None:
    """Keep the numbers of a finished run, or of a finished sweep.

    Raises:
      ValueError: the run is not finished, or its record lacks a part.
    """
    sweep = run / "sweep.json"
    kept = _kept_sweep(sweep) if sweep.is_file() else _kept(run / "record.json")
    target = root / RECORDS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")


def _kept(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no record.json; finish the run first.")
    record = json.loads(path.read_text())
    missing = [key for key in _KEPT if key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it cannot be kept.")
    kept = {key: record[key] for key in _KEPT}
    return kept | {"config": _without_folders(record["config"])}


def _kept_sweep(path: pathlib.Path) -> dict:
    """Rows of all runs, and what their first one says of itself."""
    rows = json.loads(path.read_text())
    left = sum(row["status"] != "finished" for row in rows)
    if left:
        raise ValueError(f"{path}: {left} of {len(rows)} runs are not finished.")
    first = _kept(min(path.parent.glob("*/record.json")))
    names = list(rows[0])
    place = names.index("status")
    results = {
        "fields": names[:place],
        "metrics": [name for name in names[place + 1 :] if name != "seconds"],
        "rows": _without_folders(rows),
    }
    seconds = sum(row["seconds"] for row in rows)
    return first | {"results": results, "seconds": seconds}


def _without_folders(values):
    """Plain values whose absolute paths are cut to their last names."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_folders(value) for value in values]
    if isinstance(values, str) and values.startswith("/"):
        return pathlib.PurePath(values).name
    return values
