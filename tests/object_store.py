"""A bucket in memory that refuses what Google Cloud Storage cannot do.

`install(monkeypatch)` puts it behind `gs://` for `etils.epath` and for the lock.
Objects appear whole or not at all, and nothing can be appended to or renamed.
"""

import io

import tensorstore
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from pref_jax.train import lease, storage


class Bucket(MemoryFileSystem):
    """Objects by name."""

    protocol = ("gcs", "gs")
    cachable = False
    store = {}
    pseudo_dirs = [""]
    puts = []  # names, in the order of the requests that wrote them

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("gs://").removeprefix("gcs://")
        return "/" + path.strip("/") if path.strip("/") else ""

    def mkdir(self, path, create_parents=True, **kwargs):
        """A store has no folders; asking for one does nothing."""

    def makedirs(self, path, exist_ok=False):
        """A store has no folders; asking for one does nothing."""

    def mv(self, *args, **kwargs):
        raise AssertionError("a store cannot rename")

    rename = move = mv

    def cp_file(self, *args, **kwargs):
        raise AssertionError("nothing here copies inside the store")

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return super()._open(path, mode, **kwargs)
        assert mode == "wb", f"a store has no mode {mode!r}"
        return _Put(self, path)


class _Put(io.BytesIO):
    """What is written appears when it is closed, and not if that fails."""

    def __init__(self, bucket, path):
        super().__init__()
        self._bucket, self._path = bucket, bucket._strip_protocol(path)

    def close(self):
        if not self.closed:
            data = self.getvalue()
            with MemoryFileSystem._open(self._bucket, self._path, "wb") as file:
                file.write(data)
            Bucket.puts.append(self._path)
        super().close()


def install(monkeypatch):
    """An empty bucket behind every `gs://` path until the test ends."""
    context = tensorstore.Context()

    def open_store(folder):
        path = str(folder).removeprefix("gs://") + "/"
        spec = {"driver": "memory", "path": path}
        return tensorstore.KvStore.open(spec, context=context).result()

    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "puts", [])
    monkeypatch.setattr(lease, "open_store", open_store)
    monkeypatch.setattr(storage, "_check_installed", lambda path: None)
    bucket = Bucket()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: bucket)
    return Bucket
