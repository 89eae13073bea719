"""Folders on a disk or in an object store: what differs between the two.

A path that begins with `gs://` lies on Google Cloud Storage. There are no folders
there, only objects with slashes in their names; an object is written whole in one
request, and can be neither appended to nor renamed. What grows while a run goes on is
therefore written to a local folder first, and `Mirror` copies it up. What is read by
position, such as data and the files of a model, is copied down first, by `fetch`.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import glob
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Sequence

from etils import epath

MIRROR_SECONDS = 30.0
"""How often a `Mirror` copies what has changed."""

CACHE_VARIABLE = "PREF_JAX_CACHE"
"""Environment variable: the folder of what `fetch` copied, ~/.cache/pref_jax if unset.
"""

_AT_ONCE = 8  # files that are copied side by side
_CHUNK = 1 << 24  # bytes of a copied file that are held

_logger = logging.getLogger(__name__)


def is_object_store(folder: str | os.PathLike) -> bool:
    """Whether a path names objects of a store rather than files.

    >>> is_object_store("gs://bucket/runs"), is_object_store("runs/quickstart")
    (True, False)
    """
    return "://" in os.fspath(folder)


def as_folder(path: str | os.PathLike) -> epath.Path:
    """A path on a disk or in a bucket, as `etils.epath` knows both.

    Args:
      path: of a folder that need not exist.

    Raises:
      ValueError: it lies in a store that is neither a disk nor `gs://`.
      ImportError: it lies on `gs://`, and the package that reads it is missing.

    >>> as_folder("runs/quickstart") / "001"
    PosixGPath('runs/quickstart/001')
    """
    path = os.fspath(path)
    if not is_object_store(path):
        return epath.Path(path)
    if not path.startswith("gs://"):
        raise ValueError(
            f"files lie on a disk or on gs://; got {path!r}. Give a path that begins "
            f"with gs://, or mount the store as a folder."
        )
    _check_installed(path)
    import fsspec.config

    # What other processes write must be seen: no listing, and no size, is remembered.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path)


def _check_installed(path: str) -> None:
    if importlib.util.find_spec("gcsfs") or _epath_uses_tensorflow():
        return
    raise ImportError(
        f"{path} lies on Google Cloud Storage, which needs the package gcsfs. Install "
        f"it with `pip install 'pref_jax[tpu]'` or `pip install gcsfs`."
    )


def _epath_uses_tensorflow() -> bool:
    wanted = os.environ.get("EPATH_USE_TF", "").lower() not in ("false", "no", "f", "0")
    return wanted and importlib.util.find_spec("tensorflow") is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file in one move: a kill leaves the old one or the new, never a part.

    >>> path = epath.Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_text(path, "one line")
    >>> path.read_text()
    'one line'
    """
    if is_object_store(path):
        epath.Path(path).write_bytes(text.encode())  # one request
        return
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def fetch(path: str | os.PathLike, *, patterns: Sequence[str] = ("*",)) -> str:
    """A path on this disk: what lies in a bucket is copied to it first, once a host.

    The copy lies in the folder of `CACHE_VARIABLE`. A file is copied again when its
    size or time in the bucket has changed, and removed when it is no longer there.
    Processes of one host wait for the first of them.

    Args:
      path: of a file, a folder, or a pattern with `*` (and no `**`); on a disk it is
        returned as it is.
      patterns: of the names of the files that are wanted of a folder. What lies in
        folders inside it is not copied.

    Raises:
      ValueError: nothing is there, the disk is too full, or the pattern has a `**`.
      ImportError: as `as_folder`.

    >>> fetch("pairs.jsonl")
    'pairs.jsonl'
    """
    path = os.fspath(path)
    if not is_object_store(path):
        return path
    names = path.removeprefix("gs://").strip("/").split("/")  # the bucket is the first
    fixed = [not glob.has_magic(name) for name in names]
    num_fixed = fixed.index(False) if False in fixed else len(names)
    pattern = "/".join(names[num_fixed:])
    if "**" in pattern:
        raise ValueError(
            f"{path}: a bucket is not searched through and through; write each level "
            f"as `*`."
        )
    if pattern:
        patterns = (pattern,)
    remote = as_folder("gs://" + "/".join(names[:num_fixed]))
    root = os.environ.get(CACHE_VARIABLE, "~/.cache/pref_jax")
    local = pathlib.Path(root).expanduser().joinpath(*names[:num_fixed])
    if remote.is_dir():
        found = _matching(remote, patterns)
    else:
        found = {"": remote} if remote.is_file() else {}
    if not found:
        raise ValueError(
            f"{path}: there is no such file or folder in the bucket, or nothing in it "
            f"that is named {', '.join(patterns)}. Give an object, a folder of objects "
            f"or a pattern that matches some."
        )
    local.parent.mkdir(parents=True, exist_ok=True)
    with (local.parent / f".{local.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _copy_changed(found, local, patterns)
    return str(local / pattern)


def _matching(folder, patterns: Sequence[str]) -> dict:
    """The files of a folder by their path inside it."""
    matches = (match for pattern in patterns for match in folder.glob(pattern))
    return {
        match.relative_to(folder).as_posix(): match
        for match in matches
        if match.is_file()
    }


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _copy_changed(found: dict, local: pathlib.Path, patterns: Sequence[str]) -> None:
    """Make the files of `local` those that were found in the bucket."""
    note = local.parent / f".{local.name}.json"  # file -> [size, time] in the bucket
    copied = json.loads(note.read_text()) if note.is_file() else {}
    stats = {name: file.stat() for name, file in found.items()}
    states = {name: [stat.length, stat.mtime] for name, stat in stats.items()}
    changed = [
        name
        for name, state in states.items()
        if copied.get(name) != state or _size(local / name) != state[0]
    ]
    if local.is_dir():
        for name, file in _matching(local, patterns).items():
            if name not in found:
                file.unlink()
    if not changed:
        return
    needed = sum(states[name][0] for name in changed)
    free = shutil.disk_usage(local.parent).free
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:.1f} GB are to be copied to {local}, and its disk has "
            f"{free / 1e9:.1f} GB left. Set {CACHE_VARIABLE} to a folder on a larger "
            f"one, or mount the bucket as a folder and give that."
        )
    _logger.info("copying %d files, %.2f GB, to %s", len(changed), needed / 1e9, local)

    def copy(name):
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with found[name].open("rb") as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
        temporary.replace(target)

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, changed))
    write_text(note, json.dumps(copied | states))


class Mirror:
    """A local folder whose files are copied to an object store now and then.

    A file is copied whole when its size or time has changed since it was copied last.
    Nothing is ever removed from the store, and what is there is not looked at.

    Args:
      remote: folder in the store.
      seconds: how often a background thread copies; None: only `flush` does.

    Attributes:
      folder: the local folder, `pathlib.Path`; removed by `close`.
      lock: held while a file is read. Who holds it while writing is never seen half
        done.

    >>> remote = epath.Path(tempfile.mkdtemp())
    >>> with Mirror(remote, seconds=None) as mirror:
    ...     _ = (mirror.folder / "a.txt").write_text("copied at the end")
    >>> (remote / "a.txt").read_text()
    'copied at the end'
    """

    def __init__(
        self, remote: str | os.PathLike, *, seconds: float | None = MIRROR_SECONDS
    ):
        self.lock = threading.Lock()
        self._remote = epath.Path(remote)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="pref_jax-"))
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._copying = threading.Lock()  # one copier at a time
        self._ended = threading.Event()
        self._thread = None
        if seconds is not None:
            self._thread = threading.Thread(
                target=self._copy_every, args=(seconds,), daemon=True
            )
            self._thread.start()

    def flush(self) -> None:
        """Copy what has changed; return once it is in the store.

        Raises:
          OSError: the store refused.
        """
        with self._copying:
            for path in sorted(self.folder.rglob("*")):
                if not path.is_symlink() and path.is_file():
                    self._copy(path)

    def _copy(self, path: pathlib.Path) -> None:
        with self.lock:
            stat = path.stat()
            state = stat.st_size, stat.st_mtime_ns
            if self._copied.get(path) == state:
                return
            data = path.read_bytes()
        (self._remote / path.relative_to(self.folder).as_posix()).write_bytes(data)
        self._copied[path] = state

    def _copy_every(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.flush()
            except Exception as error:  # tried again; `flush` and `close` raise it
                _logger.warning("could not copy to %s: %s", self._remote, error)

    def close(self) -> None:
        """Copy for the last time and remove the local folder.

        Raises:
          OSError: the store refused; the local folder stays, and the message names it.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if not self.folder.exists():
            return
        try:
            self.flush()
        except Exception as error:
            raise OSError(
                f"could not copy to {self._remote}: {error}\nThe files stay in "
                f"{self.folder}; copy them by hand."
            ) from error
        shutil.rmtree(self.folder)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_) -> None:
        self.close()
