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


def make_record(run: pathlib.Path) -> dict:
    """The numbers of a finished run, or of a finished sweep, to be kept.

    Raises:
      ValueError: the run is not finished, or its record lacks a part.
    """
    sweep = run / "sweep.json"
    return _kept_sweep(sweep) if sweep.is_file() else _kept(run / "record.json")


def write_record(root: pathlib.Path, name: str, record: dict) -> None:
    """Keep a record of `make_record`."""
    target = root / RECORDS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


def _kept(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no record.json; finish the run first.")
    record = json.loads(path.read_text())
    missing = [key for key in _KEPT if key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it cannot be kept.")
    kept = {key: record[key] for key in _KEPT}
    kept["environment"] = _one_commit(path, record)
    return kept | {"config": _without_folders(record["config"])}


def _one_commit(path: pathlib.Path, record: dict) -> dict:
    """The environment of a run, if all its starts had one commit."""
    file = path.with_name("config.json")
    started = json.loads(file.read_text()) if file.is_file() else {}
    environments = [*started.get("environments", []), record["environment"]]
    _check_one(str(path.parent), [e.get("commit") for e in environments])
    return record["environment"]


def _check_one(where: str, commits: list) -> None:
    if len(set(commits)) > 1:
        raise ValueError(
            f"{where} was computed at several commits, "
            f"{', '.join(sorted(map(str, set(commits))))}: what of it is whose cannot "
            f"be told. Run it again at one."
        )


def _kept_sweep(path: pathlib.Path) -> dict:
    """Rows of all runs, and what their first one says of itself."""
    rows = json.loads(path.read_text())
    left = sum(row["status"] != "finished" for row in rows)
    if left:
        raise ValueError(f"{path}: {left} of {len(rows)} runs are not finished.")
    kept = [_kept(path.parent / row["run"] / "record.json") for row in rows]
    _check_one(str(path.parent), [run["environment"].get("commit") for run in kept])
    names = list(rows[0])
    place = names.index("status")
    metrics = [n for n in names[place + 1 :] if n not in ("run", "seconds")]
    results = {
        "fields": names[:place],
        "metrics": metrics,
        "rows": _without_folders(rows),
    }
    seconds = sum(row["seconds"] for row in rows)
    return kept[0] | {"results": results, "seconds": seconds}


def _without_folders(values):
    """Plain values whose absolute paths are cut to their last names."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_folders(value) for value in values]
    if isinstance(values, str) and values.startswith("/"):
        return pathlib.PurePath(values).name
    return values
