"""Readers: files, folders, tfds data sets and Python objects to `Records`.

    read("pairs.jsonl")                  also .jsonl.gz, .jsonl.zst and .parquet
    read("pairs/")                       all such files in the folder, in sorted order
    read("pairs/**/*.parquet")           all such files that the pattern matches
    read("tfds:my_pairs", split="train") a prepared tfds data set, by NAME[/CONFIG] and,
                                         after a colon, its version
    read(rows), read(dataset)            mappings, or a Hugging Face `datasets.Dataset`
    read(datasets, split="train")        a mapping of splits, such as `DatasetDict`

A reader is a generator of `(where, row)`, or of `(where, RecordError)` for what cannot
be read; `pref_jax.data.records` makes records of them, by the same rules for all.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from immutabledict import immutabledict

from pref_jax.data.records import RecordError, Records, collect, from_objects

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The names of data files end so, in letters of either case."""

_TFDS = "tfds:"
_ROWS_AT_ONCE = 256  # of a parquet file or a data source, held as Python objects
_BYTES_AT_ONCE = 1 << 16  # of a compressed file; these may be a thousand times as many
_ARRAY_TO_LINES = (
    'python -c "import json, sys; [print(json.dumps(row)) for row in '
    'json.load(sys.stdin)]" < rows.json > rows.jsonl'
)


def read(
    source: str | os.PathLike | Iterable[Mapping[str, Any]] | Mapping[str, Any],
    *,
    split: str | None = None,
    on_error: str = "raise",
    rename: Mapping[str, str] = immutabledict(),
) -> Records:
    """Records of a file, a folder, a pattern, a tfds data set or Python objects.

    A `.jsonl` file is UTF-8 with one JSON object a line; blank lines are no rows, and
    those between rows are counted. A folder is not searched below its first level (give
    a pattern with `**`); its files, like those of a pattern, may be of several kinds.

    A tfds data set is looked for in `$TFDS_DATA_DIR`, or else in ~/tensorflow_datasets,
    and read without tensorflow: it has to be prepared, as `array_record`
    (`pref_jax.data.builder` does that with your files). Without VERSION the newest is
    read.

    Args:
      source: as the module shows.
      split: of a tfds data set (also as "train[:80%]"; may be left out where there is
        one split) or of a mapping of splits.
      on_error: "raise" stops at the first row that cannot be used. "skip" leaves such
        rows out, counts and lists them; of a file that is cut or damaged it keeps the
        whole rows before that point and lists the cut as one skipped row.
      rename: {field of the rows: name of the schema}, such as {"correct": "labels"}.

    Returns:
      The records and an account of what was left out. A row's `where` is the file,
      relative to the folder, and the line (from 1), or the source and [row] (from 0).

    Raises:
      TypeError: `source` is none of these.
      ValueError: `on_error` is neither, or `split` does not apply.
      RecordError: a row cannot be used and `on_error` is "raise"; or, with either, the
        source is missing, of another kind, not prepared, empty, or has no usable row;
        a tfds data set holds another number of rows than its metadata says; or no row
        has a field of `rename`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}')
    >>> read(path)[0].responses
    ('2', '3')
    >>> read([{"prompt": "1 + 1 =", "response": "2"}])[0].where
    'rows[0]'
    """
    if isinstance(source, str) and source.startswith(_TFDS):
        return _read_tfds(source.removeprefix(_TFDS), split, on_error, rename)
    if isinstance(source, Mapping):
        return _read_split(source, split, on_error, rename)
    if split is not None:
        raise ValueError(
            f"`split` is for {_TFDS}NAME and for a mapping of splits; got "
            f"split={split!r} with {_named(source)}. Leave it out."
        )
    if isinstance(source, str | os.PathLike):
        if "://" in os.fspath(source):
            raise RecordError(
                os.fspath(source),
                "lies in an object store, and files are read from a disk. Copy it "
                "there first; `pref_jax.train.storage.fetch` does that, and so do the "
                "experiments.",
            )
        return _read_files(Path(source), on_error, rename)
    return _read_objects(source, "rows", on_error, rename)


def _named(source: Any) -> str:
    paths = isinstance(source, str | os.PathLike)
    return str(source) if paths else f"a {type(source).__name__}"


def _read_split(splits: Mapping[str, Any], split, on_error, rename) -> Records:
    if split not in splits:
        raise ValueError(
            f"`source` is a mapping of splits, so `split` must be one of "
            f"{', '.join(map(repr, splits))}; got {split!r}. (One row goes in a list.)"
        )
    return _read_objects(splits[split], split, on_error, rename)


def _read_objects(rows: Any, name: str, on_error, rename) -> Records:
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise TypeError(
            f"`source` must be a path, {_TFDS}NAME, or an iterable of mappings; got "
            f"{type(rows).__name__}."
        )
    if hasattr(rows, "with_format"):  # a Hugging Face data set: rows as Python objects
        rows = rows.with_format(None)
    rows = map(_plain, rows)
    return from_objects(rows, name=name, on_error=on_error, rename=rename)


def _plain(value: Any) -> Any:
    """Bytes to text, arrays to lists, columns of messages to messages."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value  # no text; `parse_record` says so where one is needed
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        fields = {name: _plain(item) for name, item in value.items()}
        columns = [item for item in fields.values() if isinstance(item, list)]
        lengths = {len(column) for column in columns}
        is_table = len(columns) == len(fields) and len(lengths) == 1
        if is_table and {"role", "content"} <= fields.keys():
            return _rows_of_columns(fields)
        return fields
    return value


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {
        name: _rows_of_columns(column) if isinstance(column, Mapping) else column
        for name, column in columns.items()
    }
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _read_files(path: Path, on_error, rename) -> Records:
    paths, folder, unread = _find_files(path)
    counts = Counter()
    files = {file.relative_to(folder).as_posix(): file for file in paths}
    per_file = dict.fromkeys(files, 0)

    def rows():
        for name, file in files.items():
            lower = name.lower()
            reader = _parquet_rows if lower.endswith(".parquet") else _jsonl_rows
            for placed in reader(file, name, counts):
                per_file[name] += 1
                yield placed

    source = path.name if path.is_file() else str(path)
    found = collect(source, rows(), on_error=on_error, rename=rename)
    found.counts.update(
        blank_lines=counts["blank_lines"], files=per_file, unread_files=unread
    )
    return found


def _find_files(path: Path) -> tuple[list[Path], Path, list[str]]:
    """Data files, the folder that their names are relative to, and the other files."""
    kinds = ", ".join(SUFFIXES[:-1]) + f" and {SUFFIXES[-1]}"
    if path.is_file():
        if not _is_data(path):
            raise RecordError(
                str(path),
                f"files are read that end in {kinds}; convert it, or pass its rows as "
                "Python objects.",
            )
        return [path], path.parent, []
    if path.is_dir():
        folder, what = path, "the folder"
        found = sorted(file for file in path.iterdir() if file.is_file())
    elif glob.has_magic(str(path)):
        fixed = []
        for part in path.parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        folder, what = Path(*fixed), "the pattern"
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = sorted(file for file in matches if file.is_file())
    else:
        raise RecordError(str(path), "no such file or folder.")
    files = [file for file in found if _is_data(file)]
    others = [
        file.relative_to(folder).as_posix()
        for file in found
        if not _is_data(file) and not file.name.startswith(".")
    ]
    if not files:
        hint = ""
        if what == "the folder":
            hint = f" Folders in it are not searched: give {path / '**' / '*.jsonl'}."
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise RecordError(
            str(path),
            f"{what} has no data file: looked for names that end in {kinds}, found "
            f"{shown or 'no file'}.{hint}",
        )
    return files, folder, others


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.name.lower().endswith(SUFFIXES) and not hidden


def _jsonl_rows(path: Path, name: str, counts: Counter) -> Iterator[tuple[str, Any]]:
    """Yields (where, object), or (where, RecordError) for a line that has none."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    rows = blank = 0
    try:
        for number, line in enumerate(_lines(path, kind), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
            if not line.strip():
                blank += 1
                continue
            if rows == 0 and line.lstrip().startswith(b"["):
                raise RecordError(
                    name,
                    "begins with `[`: it looks like one JSON array, and one JSON "
                    f"object a line is needed. Convert it with: {_ARRAY_TO_LINES}",
                )
            counts["blank_lines"] += blank
            blank = 0
            rows += 1
            where = f"{name}:{number}"
            try:
                yield where, _parse_line(line, where)
            except RecordError as error:
                yield where, error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield name, _cut_error(name, f"the {kind} file", error, rows)


def _cut_error(where: str, what: str, error: Exception, rows: int) -> RecordError:
    reason = " ".join(str(error).split())
    return RecordError(
        where,
        f"{what} is cut or damaged ({reason}); {rows} whole rows before that point "
        "could be read.",
    )


def _lines(path: Path, kind: str | None) -> Iterator[bytes]:
    """The lines of a file; they end at line feeds and nowhere else."""
    if kind != "zstd":
        with (gzip.open if kind else open)(path, "rb") as lines:
            yield from lines
        return
    rest = b""
    for chunk in _zstd_chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """The text of all frames; the library's own stream ends silently in a cut one."""
    import zstandard

    frame = None
    with open(path, "rb") as file:
        while chunk := file.read(_BYTES_AT_ONCE):
            while chunk:
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    text = frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                yield text
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a frame")


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique_fields)
    except UnicodeDecodeError as error:
        raise RecordError(
            where,
            f"is not UTF-8: byte {error.start} of the line is "
            f"0x{line[error.start]:02x} ({error.reason}).",
        ) from None
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else " The file ends in this line: is it cut?"
        raise RecordError(
            where, f"is not one JSON object on one line ({error}).{cut}"
        ) from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = [
            name for name, n in Counter(name for name, _ in pairs).items() if n > 1
        ]
        raise ValueError(f"field given twice: {', '.join(twice)}")
    return fields


def _parquet_rows(path: Path, name: str, counts: Counter) -> Iterator[tuple[str, Any]]:
    """Yields (where, row) by row groups, or (file, RecordError) where it is damaged."""
    del counts  # of lines
    import pyarrow
    from pyarrow import parquet

    rows = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            if twice := sorted({c for c in columns if columns.count(c) > 1}):
                raise RecordError(name, f"field given twice: {', '.join(twice)}.")
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield f"{name}[{rows}]", _plain(row)
                        rows += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield name, _cut_error(name, "the parquet file", error, rows)


def _read_tfds(name: str, split: str | None, on_error, rename) -> Records:
    """Records of a prepared data set, by its name, config and version."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_find_prepared(name))
    info = builder.info
    named = f"{_TFDS}{'/'.join(info.full_name.split('/')[:-1])}:{info.version}"
    splits = list(info.splits)
    if split is None and len(splits) == 1:
        split = splits[0]
    try:
        rows = info.splits[split or ""].num_examples
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"`split` of {named} must be one of {', '.join(map(repr, splits))} or a "
            f"part of one, such as '{splits[0]}[:80%]'; got {split!r}."
        ) from error
    if info.file_format.value != "array_record":
        raise RecordError(
            named,
            f"is prepared as {info.file_format.value}, and only array_record is read "
            "(the others need tensorflow or lose rows). Prepare it again with "
            '`download_and_prepare(file_format="array_record")`.',
        )
    source = f"{named}/{split}"
    placed = _tfds_rows(builder, source, split, rows)
    return collect(source, placed, on_error=on_error, rename=rename)


def _find_prepared(name: str) -> Path:
    """The folder of the asked or the newest version of a prepared data set."""
    matched = re.fullmatch(r"(\w+)(?:/([^/:]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not matched:
        raise RecordError(
            f"{_TFDS}{name}", f"must be written as {_TFDS}NAME[/CONFIG][:VERSION]."
        )
    dataset, config, version = matched.groups()
    home = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    folder = Path(home, dataset, config or "")
    found = {
        tuple(map(int, info.parent.name.split("."))): info.parent
        for info in folder.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    }
    if version is not None:
        wanted = tuple(map(int, version.split(".")))
        found = {number: path for number, path in found.items() if number == wanted}
    if not found:
        there = sorted(
            info.parent.relative_to(home).as_posix()
            for info in Path(home, dataset).rglob("dataset_info.json")
        )
        raise RecordError(
            f"{_TFDS}{name}",
            f"is not prepared in {home} (prepared there: {', '.join(there) or 'none'} "
            "of this name). Prepare it first, with "
            '`download_and_prepare(file_format="array_record")` of its builder or with '
            "`pref_jax.data.builder.prepare`, or set TFDS_DATA_DIR to the folder that "
            "holds it.",
        )
    return found[max(found)]


def _tfds_rows(
    builder: Any, source: str, split: str, num_rows: int
) -> Iterator[tuple[str, Any]]:
    """Yields (where, row); raises if the files hold more or fewer than `num_rows`."""
    features = builder.info.features
    read = 0
    try:
        check_stored(builder, split)
        rows = builder.as_data_source(split)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
            for row in rows.__getitems__(numbers):
                where = f"{source}[{read}]"
                row = _plain(_untabulate(features, row))
                if set(features) == {"json"}:
                    row = _parse_line(row["json"].encode(), where)
                yield where, row
                read += 1
    except RuntimeError as error:  # of array_record; it has no narrower class
        yield source, _cut_error(source, "the array_record data", error, read)
        return
    if read != num_rows:
        raise RecordError(
            source, f"{read} rows were read, and its metadata says {num_rows}."
        )


def check_stored(builder: Any, split: str) -> None:
    """Raise if the files of a split hold more or fewer rows than the metadata says.

    Args:
      builder: of a prepared tfds data set.
      split: a split, or an expression of several.

    Raises:
      RecordError: they differ.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for name, info in builder.info.splits.items():
        if not re.search(rf"\b{re.escape(name)}\b", split):
            continue
        stored = len(ArrayRecordDataSource([str(path) for path in info.filepaths]))
        if stored != info.num_examples:
            raise RecordError(
                f"{_TFDS}{builder.info.full_name}, {name}",
                f"the files hold {stored} rows, and the metadata says "
                f"{info.num_examples}. Prepare the data set again.",
            )


def _untabulate(feature: Any, value: Any) -> Any:
    """A sequence of dicts, which tfds gives as a dict of lists, to a list of dicts."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _untabulate(feature[name], item) for name, item in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        rows = _rows_of_columns(value) if isinstance(value, dict) else value
        return [_untabulate(inner, row) for row in rows]
    return value
