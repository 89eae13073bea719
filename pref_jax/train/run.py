"""A run folder: what was asked for, by which code, and whether it is finished.

`runs/<experiment>/<name>/` holds `config.json` from the start and `record.json` at the
end. A command that is given again continues its unfinished run; a finished run is kept
and the next gets a new name.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax

CONFIG_FILE = "config.json"
RECORD_FILE = "record.json"

Config = TypeVar("Config")

_VERSIONS_OF = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)


class RunFolderError(ValueError):
    """A run folder that cannot be used for this config."""


def environment() -> dict:
    """What ran: commit, versions, hardware and command; no paths and no host name."""
    versions = {}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "commit": _commit(),
        "command": _command(),
        "python": platform.python_version(),
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return commit + (" with uncommitted changes" if dirty else "")


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else pathlib.Path(sys.argv[0]).name
    arguments = [_without_folders(argument) for argument in sys.argv[1:]]
    return shlex.join(["python", *program.split(" "), *arguments])


def _without_folders(argument: str) -> str:
    """An argument whose absolute path, if it holds one, is cut to the last name."""
    return re.sub(r"(^|=)(?:/|~/)(?:[^/=]*/)*([^/=]+)", r"\1\2", argument)


@contextlib.contextmanager
def open_run(
    root: str, *, config: dict, name: str | None = None
) -> Iterator[pathlib.Path]:
    """Choose, lock and describe the folder of a run.

    Without a name, the latest unfinished run of the same config that no process is
    working on is continued; if there is none, the next free number becomes the name.

    Args:
      root: folder of the experiment's runs.
      config: resolved config, plain JSON values.
      name: of the run; None: chosen as above.

    Yields:
      The run's folder, locked until the block is left. Its `config.json` holds the
      config, each environment that the run was started or continued in, and how often.

    Raises:
      RunFolderError: the named run is finished, has another config, or is in use.
    """
    config = as_read_back(config)
    with contextlib.ExitStack() as stack:
        folder = _claim(stack, pathlib.Path(root), config, name)
        path = folder / CONFIG_FILE
        saved = json.loads(path.read_text()) if path.exists() else {"config": config}
        environments = saved.setdefault("environments", [])
        if environment() not in environments:
            environments.append(environment())
        saved["starts"] = saved.get("starts", 0) + 1
        write_json(path, saved)
        yield folder


def count_starts(folder: pathlib.Path) -> int:
    """How often a run was started or continued, the present time included."""
    return json.loads((folder / CONFIG_FILE).read_text())["starts"]


def _claim(stack, root, config, name) -> pathlib.Path:
    if name is not None:
        folder = root / name
        if (folder / RECORD_FILE).exists():
            raise RunFolderError(
                f"run {folder} is finished; give another --name, or none."
            )
        if (folder / CONFIG_FILE).exists():
            changed = differences(_read_config(folder), config)
            if changed:
                raise RunFolderError(
                    f"run {folder} was started with another config: {changed}. "
                    f"Continue it with its own, or give another --name."
                )
        if not _lock(stack, folder):
            raise RunFolderError(f"run {folder} is in use by another process.")
        return folder
    numbers = sorted(
        int(path.name)
        for path in root.glob("*")
        if path.is_dir() and path.name.isdigit()
    )
    for number in reversed(numbers):
        folder = root / _number_name(number)
        unfinished = folder.is_dir() and not (folder / RECORD_FILE).exists()
        if not unfinished or not (folder / CONFIG_FILE).exists():
            continue
        if _read_config(folder) == config and _lock(stack, folder):
            return folder
    number = numbers[-1] + 1 if numbers else 1
    while not _lock(stack, root / _number_name(number)):
        number += 1
    return root / _number_name(number)


def _number_name(number: int) -> str:
    return f"{number:03d}"


def _lock(stack: contextlib.ExitStack, folder: pathlib.Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    stack.callback(file.close)
    return True


def _read_config(folder: pathlib.Path) -> dict:
    return json.loads((folder / CONFIG_FILE).read_text())["config"]


def differences(saved, needed, path: str = "") -> str:
    """The fields in which two configs differ, as `a.b: saved 1, now 2`.

    Args:
      saved: plain JSON values.
      needed: plain JSON values.
      path: of the field that holds them, for messages.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    'a.b: saved 1, now 2'
    """
    if isinstance(saved, dict) and isinstance(needed, dict):
        parts = [
            differences(
                saved.get(key, "nothing"),
                needed.get(key, "nothing"),
                f"{path}.{key}".lstrip("."),
            )
            for key in sorted(saved.keys() | needed.keys())
        ]
        return "; ".join(part for part in parts if part)
    return "" if saved == needed else f"{path}: saved {saved!r}, now {needed!r}"


def as_read_back(values):
    """Plain values as they come back from JSON: tuples become lists."""
    return json.loads(json.dumps(values))


def write_json(path: pathlib.Path, value) -> None:
    """Write strict JSON in one move: a kill leaves the old file or the new."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def parse_config(
    presets: Mapping[str, Config], *, default: str, description: str, args=None
) -> Config:
    """A config from the command line: a preset, and a typed override of any field.

    `--preset NAME` is read first; the command line of the fields is made from the
    config's annotations and comments by tyro. An unknown field ends the program with
    the nearest names and exit code 2.

    Args:
      presets: name -> config dataclass, all of one type.
      default: the preset without `--preset`.
      description: shown by `--help`.
      args: of the command line; None: the program's own.
    """
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=default, choices=list(presets))
    chosen, rest = parser.parse_known_args(args)
    preset = presets[chosen.preset]
    return tyro.cli(
        type(preset),
        default=preset,
        args=rest,
        description=f"{description}\n\n--preset {{{','.join(presets)}}} is read first; "
        f"the defaults below are those of {chosen.preset}.",
    )
