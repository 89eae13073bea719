"""Run folders on a disk or in an object store: what differs between the two.

A path that begins with `gs://` lies on Google Cloud Storage. There are no folders
there, only objects with slashes in their names; an object is written whole in one
request, and can be neither appended to nor renamed. What grows while a run goes on is
therefore written to a local folder first, and `Mirror` copies it up.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import shutil
import tempfile
import threading

from etils import epath

MIRROR_SECONDS = 30.0
"""How often a `Mirror` copies what has changed."""

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
            f"a run folder lies on a disk or on gs://; got {path!r}. Give a path that "
            f"begins with gs://, or mount the store as a folder."
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
