"""A run folder: what was asked for, by which code, and whether it is finished.

`runs/<experiment>/<name>/` holds `config.json` from the start and `record.json` at the
end. A command that is given again continues its unfinished run; a finished run is kept
and the next gets a new name.

The folder lies on a disk or on `gs://`. Of several processes the first one alone writes
into it, and all of them must see it.
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
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

import jax
from etils import epath

from pref_jax import processes
from pref_jax.train import lease, storage

CONFIG_FILE = "config.json"
RECORD_FILE = "record.json"

Config = TypeVar("Config")

_SEEN_WITHIN_SECONDS = 10.0  # a network disk may show another host's file late

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
    root: str,
    *,
    config: dict,
    name: str | None = None,
    aside: Collection[str] = (),
) -> Iterator[epath.Path]:
    """Choose, lock and describe the folder of a run.

    Without a name, the latest unfinished run of the same config that no process is
    working on is continued; if there is none, the next free number becomes the name.
    On several processes the first one does this, and all get the same folder.

    A process that dies releases a folder on a disk at once. One on `gs://` stays locked
    for `lease.STALE_SECONDS`, which the next start waits for.

    Args:
      root: folder of the experiment's runs, on a disk or `gs://`.
      config: resolved config, plain JSON values.
      name: of the run; None: chosen as above.
      aside: fields of the config that do not change what a run computes, such as where
        its metrics are shown: they may differ when it is continued.

    Yields:
      The run's folder, locked until the block is left. Its `config.json` holds the
      config, each environment that the run was started or continued in, and how often.

    Raises:
      RunFolderError: the named run is finished, has another config, or is in use; or a
        process does not see the folder that the first one has chosen.
      ValueError: the processes have different configs.
      ImportError: `root` lies on `gs://`, and the package for it is missing.
    """
    config = as_read_back(config)
    processes.check_same("the config of the run", config)
    folder_of_runs = storage.as_folder(root)
    with contextlib.ExitStack() as stack:

        def start() -> dict:
            folder = _claim(stack, folder_of_runs, config, name, aside)
            saved = _describe(folder, config)
            return {"name": name or folder.name, "id": saved["id"]}

        chosen = processes.on_first(start, errors=(RunFolderError,))
        folder = folder_of_runs / chosen["name"]
        _check_shared(folder, chosen["id"])
        yield folder


def _describe(folder: epath.Path, config: dict) -> dict:
    """Write what `config.json` says at this start, and return it."""
    path = folder / CONFIG_FILE
    saved = read_json(path) if path.exists() else {"config": config}
    saved.setdefault("id", secrets.token_hex(8))
    environments = saved.setdefault("environments", [])
    if environment() not in environments:
        environments.append(environment())
    saved["starts"] = saved.get("starts", 0) + 1
    write_json(path, saved)
    return saved


def _check_shared(folder: epath.Path, identity: str) -> None:
    """Fail on all processes unless each of them sees the first one's folder."""
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while not (seen := _sees(folder, identity)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = processes.which(not seen)
    if blind:
        numbers = ", ".join(map(str, blind))
        raise RunFolderError(
            f"the run folder must be one that all processes share; process {numbers} "
            f"does not see {folder}. Give a --root on a network disk or on gs://."
        )


def _sees(folder: epath.Path, identity: str) -> bool:
    try:
        return read_json(folder / CONFIG_FILE).get("id") == identity
    except (OSError, ValueError):
        return False


def count_starts(folder: epath.Path) -> int:
    """How often a run was started or continued, the present time included."""
    return read_json(folder / CONFIG_FILE)["starts"]


def _claim(stack, root, config, name, aside) -> epath.Path:
    def counted(config):
        return {key: value for key, value in config.items() if key not in aside}

    if name is not None:
        folder = root / name
        _check_free(folder, config, counted)
        if not _lock(stack, folder):
            raise RunFolderError(f"run {folder} is in use by another process.")
        _check_free(folder, config, counted)  # it may have been waited for
        return folder
    numbers = sorted(
        int(path.name)
        for path in (root.iterdir() if root.is_dir() else ())
        if path.name.isdigit() and path.is_dir()
    )
    for number in reversed(numbers):
        folder = root / _number_name(number)
        if not _is_unfinished(folder):
            continue
        if counted(_read_config(folder)) != counted(config):
            continue
        with contextlib.ExitStack() as attempt:
            if _lock(attempt, folder) and _is_unfinished(folder):
                stack.push(attempt.pop_all())
                return folder
    number = numbers[-1] + 1 if numbers else 1
    while not _lock(stack, root / _number_name(number)):
        number += 1
    return root / _number_name(number)


def _is_unfinished(folder: epath.Path) -> bool:
    started = folder.is_dir() and (folder / CONFIG_FILE).exists()
    return started and not (folder / RECORD_FILE).exists()


def _check_free(folder: epath.Path, config: dict, counted: Callable) -> None:
    if (folder / RECORD_FILE).exists():
        raise RunFolderError(f"run {folder} is finished; give another --name, or none.")
    if (folder / CONFIG_FILE).exists():
        changed = differences(counted(_read_config(folder)), counted(config))
        if changed:
            raise RunFolderError(
                f"run {folder} was started with another config: {changed}. "
                f"Continue it with its own, or give another --name."
            )


def _number_name(number: int) -> str:
    return f"{number:03d}"


def _lock(stack: contextlib.ExitStack, folder: epath.Path) -> bool:
    if storage.is_object_store(folder):
        held = lease.take(lease.open_store(str(folder)), name=f"run {folder}")
        if held is not None:
            stack.callback(held.release)
        return held is not None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")  # noqa: SIM115 the stack closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    stack.callback(file.close)
    return True


def _read_config(folder: epath.Path) -> dict:
    return read_json(folder / CONFIG_FILE)["config"]


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


def write_json(path: epath.PathLike, value) -> None:
    """Write strict JSON in one move: a kill leaves the old file or the new.

    Whoever calls this writes. Of several processes that is the first one alone; with
    `processes.on_first(lambda: write_json(path, value))` the others wait for it, and
    fail if it does.

    Args:
      path: of the file, on a disk or `gs://`; its folder exists.
      value: plain JSON values.

    Raises:
      ValueError: the value has no place in JSON.

    >>> import tempfile
    >>> path = epath.Path(tempfile.mkdtemp()) / "done.json"
    >>> write_json(path, {"steps": 10})
    >>> read_json(path)
    {'steps': 10}
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    storage.write_text(path, text)


def read_json(path: epath.PathLike):
    """What `write_json` wrote, on a disk or `gs://`.

    Raises:
      FileNotFoundError: there is no such file.
    """
    return json.loads(epath.Path(path).read_bytes())


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
