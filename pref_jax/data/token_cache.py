"""Text tokenised once: groups of ids on disk, read at random.

    FOLDER/key.json             what the groups are made from, part by part
    FOLDER/00000.array_record   the groups of the first records of the source
    FOLDER/00000.npz            their lengths, and what was counted on the way
    FOLDER/00001.array_record   the groups of the next records, and so on
    FOLDER/index.npz            all lengths and counts; written last

A part of the key that differs is an error that names it: a cache is never read for
another file, tokenizer, template or policy. A cache that was interrupted goes on after
its last whole file, and ends with the same bytes. Several processes may ask for one
cache: the first writes it, the others wait for it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from pref_jax.data.records import Record
from pref_jax.data.rows import LazyGroups, Lengths, fit_group, measure
from pref_jax.data.templates import TextEncoder
from pref_jax.types import EXTRAS, TokenGroup

KEY_FILE = "key.json"
INDEX_FILE = "index.npz"

_FORMAT = "1"  # of the files; part of every key
_RECORDS_PER_SHARD = 4096  # what a kill loses at most
_NOTES_SHOWN = 6
_WRITER_OPTIONS = "group_size:1"  # one record is read without its neighbours

_logger = logging.getLogger(__name__)


class CacheError(ValueError):
    """A cache that belongs to something else, or that is damaged."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The groups of some records of a source, one after the other.

    Attributes:
      groups: those that are used, in order.
      counts: what happened on the way, by name; added up over shards.
      notes: examples and problems to show; all are kept.
    """

    groups: Sequence[TokenGroup]
    counts: Mapping[str, int]
    notes: Sequence[str] = ()


def cached_groups(
    folder: str | os.PathLike,
    *,
    key: Mapping[str, str],
    make_shards: Callable[[int], Iterator[Shard]],
) -> CachedGroups:
    """The groups of a cache, which is written first where it is not complete.

    Args:
      folder: of the cache; made if it is missing.
      key: what the groups are made from, such as a hash of the data, of the tokenizer
        and of the template, by name.
      make_shards: number of the first shard that is missing -> that shard and all later
        ones. A pure function of the key: the same shards whenever it is called.

    Returns:
      The groups, as a sequence.

    Raises:
      CacheError: the folder holds a cache with another key, or no cache and other
        files, or a damaged one.
      ValueError: there is no group.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_key(folder, key)
    if not (folder / INDEX_FILE).exists():
        with locked(folder):
            if not (folder / INDEX_FILE).exists():
                _write_shards(folder, make_shards)
    return CachedGroups(folder)


def tokenised(
    records: Sequence[Record],
    encoder: TextEncoder,
    root: str | os.PathLike,
    *,
    policy: str,
    row_length: int | None = None,
    max_positions: int | None = None,
    on_error: str = "raise",
) -> CachedGroups:
    """The groups of records, tokenised once and fitted to rows and model.

    The folder of the cache is named after its key, so that each data set, tokenizer,
    template and policy has its own below `root`.

    Args:
      records: of a reader.
      encoder: text to ids.
      root: folder of the caches.
      policy: one of `rows.FIT_POLICIES`, for groups that are longer than a row or whose
        text is longer than the model.
      row_length: L; None: a row takes any group.
      max_positions: longest text of the model; None: any.
      on_error: "raise" or "skip", for records that cannot be encoded.

    Returns:
      The groups. `counts` has `records`, which are `used`, `left_out` (not encoded) or
      `dropped` (by the policy), and `cut` of those that are used; and what the encoder
      counted.

    Raises:
      RecordError: a record cannot be encoded, and `on_error` is "raise".
      ValueError: no group is left.
    """
    key = {
        "records": _digest(records),
        **encoder.identity(),
        "policy": policy,
        "row_length": str(row_length),
        "max_positions": str(max_positions),
        "on_error": on_error,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def shard(part: Sequence[Record]) -> Shard:
        before = collections.Counter(encoder.counts)
        encoder.examples = {}  # so that they are the shard's, whatever was before
        encoded = encoder.encode_all(part, on_error=on_error)
        fitted = [
            fit_group(
                group,
                row_length or group.num_tokens,
                policy,
                max_positions=max_positions,
            )
            for group in encoded
        ]
        used = [group for group in fitted if group is not None]
        counts = dict(collections.Counter(encoder.counts) - before) | {
            "records": len(part),
            "used": len(used),
            "left_out": len(part) - len(encoded),
            "dropped": len(encoded) - len(used),
            "cut": sum(
                new is not None and new is not old
                for new, old in zip(fitted, encoded, strict=True)
            ),
        }
        examples = [f"{k}: {text}" for k, v in encoder.examples.items() for text in v]
        return Shard(used, counts, examples)

    def make_shards(number: int) -> Iterator[Shard]:
        for first in range(
            number * _RECORDS_PER_SHARD, len(records), _RECORDS_PER_SHARD
        ):
            yield shard(records[first : first + _RECORDS_PER_SHARD])

    return cached_groups(pathlib.Path(root) / name, key=key, make_shards=make_shards)


def check_key(folder: pathlib.Path, key: Mapping[str, str]) -> None:
    """Hold a cache to its key, or give a new one its key.

    Raises:
      CacheError: a part of the key differs, or the folder holds something else.
    """
    key = {"format": _FORMAT, **key}
    path = folder / KEY_FILE
    if not path.exists():
        others = sorted(entry.name for entry in folder.iterdir())
        if [name for name in others if not name.startswith((KEY_FILE, "lock"))]:
            raise CacheError(
                f"{folder} has no {KEY_FILE} and holds {others[0]}: it is no cache. "
                f"Name another folder."
            )
        _write_whole(path, (json.dumps(key, indent=1) + "\n").encode())
    saved = json.loads(path.read_text())
    changed = [
        f"{name} was {saved.get(name, 'not there')}, now {key.get(name, 'not there')}"
        for name in sorted(saved.keys() | key.keys())
        if saved.get(name) != key.get(name)
    ]
    if changed:
        raise CacheError(
            f"the cache {folder} was made from something else: {'; '.join(changed)}. "
            f"Delete the folder to make it anew, or name another."
        )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a cache; waits for a process that writes it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process that writes %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CachedGroups(LazyGroups):
    """The groups of a complete cache, each read when it is asked for.

    Reading is safe from several threads.

    Attributes:
      folder: of the cache.
      lengths: of all groups, from the index.
      counts: what was counted while it was written.
      notes: what was noted.
      key: what they were made from, part by part.

    Args:
      folder: of the cache.

    Raises:
      CacheError: the cache is not complete, or its files do not agree.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        path = self.folder / INDEX_FILE
        if not path.exists():
            raise CacheError(f"{self.folder} holds no complete cache: no {INDEX_FILE}.")
        with np.load(path) as index:
            self.lengths = Lengths(
                **{f.name: index[f.name] for f in dataclasses.fields(Lengths)}
            )
            account = json.loads(str(index["account"]))
        self.counts: dict[str, int] = account["counts"]
        self.notes: list[str] = account["notes"]
        self.key: dict[str, str] = json.loads((self.folder / KEY_FILE).read_text())
        self._records = open_records(self.folder, len(self.lengths.num_tokens))

    def summary(self) -> str:
        """A few lines for the start of a run: what became of the records."""
        names = ("records", "used", "left_out", "dropped", "cut")
        counts = {name: self.counts.get(name, 0) for name in names} | self.counts
        shown = [f"{name} {count}" for name, count in counts.items() if count]
        notes = [f"  {note}" for note in self.notes[:_NOTES_SHOWN]]
        if len(self.notes) > _NOTES_SHOWN:
            notes.append(f"  and {len(self.notes) - _NOTES_SHOWN} more examples")
        return "\n".join([f"tokens: {', '.join(shown)}", *notes])

    def __len__(self) -> int:
        return len(self.lengths.num_tokens)

    def read(self, index: int) -> TokenGroup:
        """Return group `index`."""
        return _from_bytes(self._records[index])

    def __getstate__(self):
        return {"folder": self.folder}

    def __setstate__(self, state):
        self.__init__(state["folder"])


def shard_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """The file of a shard."""
    return folder / f"{number:05d}.array_record"


def open_records(folder: pathlib.Path, num_records: int):
    """The records of all shards of a folder, by number, as bytes.

    Raises:
      CacheError: there are more or fewer than `num_records`.
    """
    from grain.sources import ArrayRecordDataSource

    paths = sorted(str(path) for path in folder.glob("*.array_record"))
    records = ArrayRecordDataSource(paths) if paths else []
    if len(records) != num_records:
        raise CacheError(
            f"{folder} holds {len(records)} records and its index speaks of "
            f"{num_records}: a file was lost or added. Delete the folder to make it "
            f"anew."
        )
    return records


def write_records(path: pathlib.Path, records: Sequence[bytes]) -> None:
    """Write a shard in one move: a kill leaves no half of it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # Processes of several hosts may write into one folder.
    temporary = path.with_suffix(f".{jax.process_index()}.{os.getpid()}.tmp")
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()
    temporary.replace(path)


def _digest(records: Sequence[Record]) -> str:
    """A hash of what the records say; not of where they were read."""
    digest = hashlib.sha256()
    for record in records:
        row = (record.to_row(), record.row)
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _write_shards(folder, make_shards) -> None:
    number = 0
    # The lengths of a shard are written after its groups: it is whole if they stand.
    while shard_path(folder, number).with_suffix(".npz").exists():
        number += 1
    for shard in make_shards(number):
        path = shard_path(folder, number)
        write_records(path, [_to_bytes(group) for group in shard.groups])
        account = {"counts": dict(shard.counts), "notes": list(shard.notes)}
        _write_arrays(path.with_suffix(".npz"), measure(shard.groups), account)
        number += 1
    parts, counts, notes = [], collections.Counter(), []
    for i in range(number):
        with np.load(shard_path(folder, i).with_suffix(".npz")) as part:
            parts.append({f.name: part[f.name] for f in dataclasses.fields(Lengths)})
            account = json.loads(str(part["account"]))
        counts.update(account["counts"])
        notes += account["notes"]
    lengths = Lengths(
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    )
    if not len(lengths.num_tokens):
        raise ValueError(
            f"no group is left of the source: {dict(counts)}. {' '.join(notes[:3])}"
        )
    _write_arrays(folder / INDEX_FILE, lengths, {"counts": counts, "notes": notes})


def _write_arrays(path: pathlib.Path, lengths: Lengths, account: dict) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **dataclasses.asdict(lengths), account=json.dumps(account))
    temporary.replace(path)


def _write_whole(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _to_bytes(group: TokenGroup) -> bytes:
    from safetensors.numpy import save

    arrays = {
        "prompt": np.asarray(group.prompt, np.int32),
        "num_tokens": np.array([len(r) for r in group.responses], np.int32),
        "responses": np.concatenate(group.responses).astype(np.int32),
        "loss_masks": np.concatenate(group.loss_masks).astype(bool),
        "labels": np.array(group.labels, np.float64),
        "record": np.array(group.record, np.int64),
    }
    if group.step_ids is not None:
        arrays["step_ids"] = np.concatenate(group.step_ids).astype(np.int32)
    for name, value in group.extras.items():
        whole = np.concatenate(value) if EXTRAS[name].endswith("T") else value
        arrays[f"extras/{name}"] = np.asarray(whole, np.float32)
    return save(arrays)


def _from_bytes(data: bytes) -> TokenGroup:
    from safetensors.numpy import load

    arrays = load(data)
    cuts = np.cumsum(arrays["num_tokens"])[:-1]

    def by_response(name):
        return tuple(np.split(arrays[name], cuts))

    extras = {}
    for key in arrays:
        _, is_extra, name = key.rpartition("extras/")
        if is_extra:
            extras[name] = (
                by_response(key) if EXTRAS[name].endswith("T") else arrays[key]
            )
    return TokenGroup(
        prompt=arrays["prompt"],
        responses=by_response("responses"),
        loss_masks=by_response("loss_masks"),
        labels=tuple(arrays["labels"].tolist()),
        record=int(arrays["record"]),
        step_ids=by_response("step_ids") if "step_ids" in arrays else None,
        extras=extras,
    )
