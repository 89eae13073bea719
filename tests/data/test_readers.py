"""Readers: every kind of source gives the same records, and cuts are told."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import strategies
from pref_jax.data import builder
from pref_jax.data.readers import read
from pref_jax.data.records import RecordError

PAIR = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}
KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
CUTS = {"jsonl.gz": "gzip", "jsonl.zst": "zstd", "parquet": "parquet"}


def pair(number, **fields):
    return {**PAIR, "prompt": f"{number} + 1 =", **fields}


def write(path, *rows, end="\n"):
    """Writes rows (objects, or lines as bytes) as the name says; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({n: [row.get(n) for row in rows] for n in names})
        options = {"compression": "none", "use_dictionary": False}
        options |= {"row_group_size": 2, "write_page_checksum": True}
        parquet.write_table(table, path, **options)
        return path
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    data = b"\n".join(lines) + end.encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.write_bytes(pack.get(path.suffix.lower(), bytes)(data))
    return path


def alike(records):
    """The records without their places."""
    return [(record.row, record.to_row()) for record in records]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.jsonl.zst"])
def test_a_file_gives_its_rows_with_their_lines(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), PAIR)
    records = read(path)
    assert records.source == name and len(records) == 2 and records.num_responses == 2
    assert [(r.row, r.where) for r in records] == [(0, f"{name}:1"), (1, f"{name}:2")]
    assert records[1].responses == ("2", "3") and records[:1] == (records[0],)


def test_only_line_feeds_end_a_row(tmp_path):
    odd = {"prompt": "a\u2028b\x85c", "response": "d"}
    line = json.dumps(odd, ensure_ascii=False).encode()
    records = read(write(tmp_path / "x.jsonl", line + b"\r", line))
    assert [record.prompt for record in records] == [odd["prompt"]] * 2


def test_blank_lines_between_rows_are_counted_and_trailing_ones_are_not(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR, b"", b" ", PAIR, PAIR, b"", b"")
    records = read(path)
    assert records.counts["blank_lines"] == 2 and records.counts["read"] == 3
    assert [r.row for r in records] == [0, 1, 2]
    assert [r.where for r in records] == ["x.jsonl:1", "x.jsonl:4", "x.jsonl:5"]
    assert "blank lines between rows: 2" in records.summary()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a\xff"}', r"x.jsonl:2: is not UTF-8: byte 13 .* is 0xff"),
        (b'{"prompt": "a', r"x.jsonl:2: is not one JSON object on one line"),
        (b"{", "x.jsonl:2: is not one JSON object on one line"),
        (b"7", r"x.jsonl:2: needs an object with fields; got 7 \(int\)"),
        (b"[" * 100_000, "x.jsonl:2: is not one JSON object on one line"),
        (
            b'{"prompt": "a", "response": "b", "prompt": "c"}',
            "x.jsonl:2: .*field given twice: prompt",
        ),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", PAIR, line, PAIR)
    with pytest.raises(RecordError, match=message):
        read(path)
    assert [record.row for record in read(path, on_error="skip")] == [0, 2]


def test_a_last_line_that_is_cut_says_so(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR, b'{"prompt": "a', end="")
    with pytest.raises(RecordError, match="file ends in this line: is it cut"):
        read(path)


@pytest.mark.parametrize("whole", [0, 3])
def test_a_cut_gzip_file_says_how_many_whole_rows_came_before(tmp_path, whole):
    rng = np.random.default_rng(0)  # bytes that gzip cannot shrink: the cut is exact
    rows = [pair(0, note=rng.bytes(3000).hex()) for _ in range(whole + 2)]
    data = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(data[: int(len(data) * (whole + 0.5) / (whole + 2))])
    message = f"x.jsonl.gz: the gzip file is cut or damaged .*; {whole} whole rows"
    with pytest.raises(RecordError, match=message):
        read(path)
    if whole:
        records = read(path, on_error="skip")
        assert len(records) == whole and records.counts["skipped"] == 1
        assert records.skipped[0][0] == "x.jsonl.gz"
    else:
        with pytest.raises(RecordError, match="has no usable row.*is cut or damaged"):
            read(path, on_error="skip")


def test_a_gzip_file_that_is_none_or_damaged_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(json.dumps(PAIR).encode())
    with pytest.raises(RecordError, match="Not a gzipped file.*; 0 whole rows"):
        read(path)
    data = bytearray(gzip.compress(json.dumps(PAIR).encode() + b"\n"))
    data[-6] ^= 1  # the checksum
    path.write_bytes(data)
    with pytest.raises(RecordError, match="CRC check failed.*; 1 whole rows"):
        read(path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_json_array_is_an_error_whose_command_converts_it(tmp_path, indent, on_error):
    text = json.dumps([PAIR, PAIR], indent=indent)
    path = write(tmp_path / "x.jsonl", text.encode())
    with pytest.raises(RecordError, match="looks like one JSON array") as caught:
        read(path, on_error=on_error)
    command = str(caught.value).split("Convert it with: ")[1]
    assert command.startswith("python ")
    (tmp_path / "rows.json").write_text(text)
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(read(tmp_path / "rows.jsonl")) == 2


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_the_last_line_needs_no_line_feed(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", pair(0), pair(1), end="")
    assert alike(read(path)) == alike(read([pair(0), pair(1)]))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_an_empty_file_has_no_usable_row(tmp_path, kind):
    (tmp_path / f"e.{kind}").write_bytes(b"")
    with pytest.raises(RecordError, match=f"e.{kind}: has no usable row among 0"):
        read(tmp_path / f"e.{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_records(tmp_path, kind):
    chat = {
        "prompt": [{"role": "user", "content": "Añ?", "name": "Ann"}],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "3"},
        ],
        "rejected": [{"role": "assistant", "content": "No."}],
        "tools": [{"name": "f", "strict": True}, {"name": "g"}],
        "margin": 0.1,
        "topic": "sums",
    }
    rows = [chat, {**chat, "margin": None, "soft_label": 0.75}, {**chat, "level": 2}]
    records = read(write(tmp_path / f"rows.{kind}", *rows))
    assert alike(records) == alike(read(rows))
    assert records[0].extras == {"margin": 0.1} and records[2].fields["level"] == 2
    assert records.source == f"rows.{kind}"


@settings(max_examples=15)
@given(rows=st.lists(strategies.rows(form="pair", chat=True), min_size=1, max_size=4))
def test_chats_survive_every_kind_of_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for kind in KINDS:
        assert alike(read(write(folder / f"x.{kind}", *rows))) == alike(read(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_cannot_be_used_is_named_in_every_format(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", PAIR, {**PAIR, "chosen": " "}, PAIR)
    where = "x.parquet[1]" if kind == "parquet" else f"x.{kind}:2"
    with pytest.raises(RecordError, match=f"{re.escape(where)}: field `chosen` needs"):
        read(path)
    records = read(path, on_error="skip")
    assert [record.row for record in records] == [0, 2]
    assert records.skipped[0][0] == where
    assert records.counts["read"] == 3 and records.counts["files"] == {path.name: 3}


@settings(max_examples=15)
@given(
    rows=st.lists(strategies.json_rows(), max_size=5),
    kind=st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst"]),
)
def test_rows_of_a_file_are_used_or_left_out(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("rows") / f"x.{kind}"
    records = read(write(path, PAIR, *rows), on_error="skip")
    assert records.counts["read"] == 1 + len(rows)
    assert len(records) + len(records.skipped) == 1 + len(rows)


@settings(max_examples=15)
@given(
    texts=st.lists(st.tuples(*[st.one_of(st.none(), strategies.TEXTS)] * 3), max_size=5)
)
def test_rows_of_parquet_and_objects_are_used_or_left_out(tmp_path_factory, texts):
    rows = [dict(zip(PAIR, values, strict=True)) for values in texts]
    path = write(tmp_path_factory.mktemp("rows") / "x.parquet", PAIR, *rows)
    for source in (path, [PAIR, *rows], {"train": [PAIR, *rows]}):
        split = "train" if isinstance(source, dict) else None
        records = read(source, split=split, on_error="skip")
        assert records.counts["read"] == 1 + len(rows)
        assert len(records) + len(records.skipped) == 1 + len(rows)


def test_any_cut_of_a_zstd_file_is_told_with_the_whole_rows_before_it(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.jsonl.zst"
    rows = [pair(i, note=rng.bytes(30_000).hex()) for i in range(8)]
    halves = [rows[:4], rows[4:]]  # two frames, as `zstd` makes of two files
    data = b"".join(
        write(tmp_path / "half.jsonl.zst", *half).read_bytes() for half in halves
    )
    path.write_bytes(data)
    assert alike(read(path)) == alike(read(rows))
    whole = []
    for size in range(9, len(data), len(data) // 20):
        path.write_bytes(data[:size])
        message = r"x.jsonl.zst: the zstd file is cut.*inside a frame\); \d whole rows"
        with pytest.raises(RecordError, match=message) as caught:
            read(path)
        whole.append(int(re.search(r"(\d) whole rows", str(caught.value))[1]))
        if whole[-1]:
            records = read(path, on_error="skip")
            assert alike(records) == alike(read(rows[: whole[-1]]))
            assert records.counts["read"] == whole[-1] + 1
    assert whole == sorted(whole) and whole[0] == 0 and whole[-1] >= 6


def test_damaged_zstd_and_parquet_files_are_errors(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(json.dumps(PAIR).encode())
    with pytest.raises(RecordError, match="zstd file is cut or damaged.*; 0 whole row"):
        read(path)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(RecordError, match="parquet file is cut or .*; 0 whole rows"):
        read(path)


def test_a_parquet_file_that_is_cut_or_damaged_says_how_many_rows_came_before(tmp_path):
    path = write(tmp_path / "x.parquet", *map(pair, range(6)))
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    for on_error in ("raise", "skip"):
        with pytest.raises(RecordError, match="parquet file is cut .*; 0 whole rows"):
            read(path, on_error=on_error)
    path.write_bytes(data)
    column = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    end = column.data_page_offset + column.total_compressed_size
    assert data[end - 1 : end] == b"="
    data[end - 1 : end] = b"?"  # still a text: only the checksum tells
    path.write_bytes(data)
    with pytest.raises(RecordError, match="parquet file is cut .*; 4 whole rows"):
        read(path)
    records = read(path, on_error="skip")
    assert alike(records) == alike(read(list(map(pair, range(4)))))
    assert records.counts["read"] == 5 and records.skipped[0][0] == "x.parquet"


def test_a_parquet_column_given_twice_is_an_error(tmp_path):
    column = pyarrow.array(["a"])
    table = pyarrow.Table.from_arrays([column, column], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(RecordError, match="x.parquet: field given twice: prompt"):
        read(tmp_path / "x.parquet")


def test_a_folder_is_all_its_files_in_sorted_order(tmp_path):
    for number, name in enumerate(["b.jsonl.gz", "a.parquet", "c.JSONL"]):
        write(tmp_path / name, pair(number), pair(number + 10))
    write(tmp_path / ".hidden.jsonl", PAIR)
    write(tmp_path / "below" / "d.jsonl", PAIR)
    (tmp_path / "notes.txt").touch()
    records = read(tmp_path)
    assert [record.row for record in records] == list(range(6))
    places = ["a.parquet[0]", "a.parquet[1]", "b.jsonl.gz:1", "b.jsonl.gz:2"]
    assert [r.where for r in records] == [*places, "c.JSONL:1", "c.JSONL:2"]
    assert [r.prompt for r in records[:3]] == ["1 + 1 =", "11 + 1 =", "0 + 1 ="]
    files = {"a.parquet": 2, "b.jsonl.gz": 2, "c.JSONL": 2}
    assert records.counts["files"] == files and records.counts["read"] == 6
    assert records.counts["unread_files"] == ["notes.txt"]
    assert "files (rows): a.parquet (2), b.jsonl.gz (2)" in records.summary()
    assert "files not read: notes.txt" in records.summary()


def test_a_pattern_is_all_files_that_it_matches(tmp_path, monkeypatch):
    for name in ("x/1/a.jsonl", "x/2/a.jsonl", "x/b.jsonl", "x/c.parquet", "x/c.txt"):
        write(tmp_path / name, PAIR)
    records = read(tmp_path / "x" / "**" / "*.jsonl")
    assert [r.where for r in records] == ["1/a.jsonl:1", "2/a.jsonl:1", "b.jsonl:1"]
    records = read(str(tmp_path / "x" / "[bc].*"))
    assert [r.where for r in records] == ["b.jsonl:1", "c.parquet[0]"]
    assert records.counts["unread_files"] == ["c.txt"]
    monkeypatch.chdir(tmp_path)
    assert [r.where for r in read("*/b.jsonl")] == ["x/b.jsonl:1"]
    write(tmp_path / "odd[1].jsonl", PAIR)  # a file that looks like a pattern
    assert read("odd[1].jsonl")[0].where == "odd[1].jsonl:1"


def test_files_of_a_folder_have_one_number_of_responses_and_skip_their_own(tmp_path):
    write(tmp_path / "a.jsonl", PAIR, {**PAIR, "chosen": 3})
    write(tmp_path / "b.jsonl", {"prompt": "a", "response": "b"})
    write(tmp_path / "c.jsonl.gz", PAIR).write_bytes(b"no")
    records = read(tmp_path, on_error="skip")
    assert len(records) == 1 and records.counts["read"] == 4
    places = [where for where, _ in records.skipped]
    assert places == ["a.jsonl:2", "b.jsonl:1", "c.jsonl.gz"]
    message = "skipped b.jsonl:1: has 1 response(s), but a.jsonl:1 has 2"
    assert message in records.summary()


LOOKED = r"looked for names that end in .jsonl, .jsonl.gz, .jsonl.zst and .parquet"


def test_a_source_without_data_files_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.csv").touch()
    message = rf"the folder has no data file: {LOOKED}, found a.csv.*\*\*"
    with pytest.raises(RecordError, match=message):
        read(tmp_path)
    with pytest.raises(RecordError, match=rf"the pattern has no .*{LOOKED}, found no"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(RecordError, match="x.json: files are read that end in .jsonl"):
        read(write(tmp_path / "x.json", PAIR))
    with pytest.raises(RecordError, match="y.jsonl: no such file or folder"):
        read(tmp_path / "y.jsonl")


class Rows:
    """What a Hugging Face data set shows of itself."""

    def __init__(self, rows, form=None):
        self.rows, self.form = rows, form

    def with_format(self, form):
        return Rows(self.rows, form)

    def __iter__(self):
        assert self.form is None
        return iter(self.rows)


def test_objects_and_splits_of_objects_are_read():
    rows = [pair(0), pair(1, responses=None)]
    expected = alike(read(rows))
    for source in (tuple(rows), iter(rows), Rows(rows, "numpy"), map(dict, rows)):
        assert alike(read(source)) == expected
    splits = {"train": Rows(rows), "test": rows[:1]}
    assert alike(read(splits, split="train")) == expected
    frozen = types.MappingProxyType(splits)
    assert [record.where for record in read(frozen, split="test")] == ["test[0]"]


def test_arrays_bytes_and_columns_of_messages_are_plain_values():
    columns = {
        "role": np.array(["user"]),
        "content": [b"Hi \xc3\xa9."],
        "name": [np.str_("Ann")],
    }
    row = {
        "prompt": columns,
        "responses": np.array(["a", "b", "c"], object),
        "labels": np.array([1, 0.5, 0], np.float32),
        "level": np.int64(3),
    }
    record = read([row])[0]
    assert record.prompt[0].to_dict() == {
        **{"role": "user", "content": "Hi é.", "name": "Ann"}
    }
    assert record.labels == (1.0, 0.5, 0.0) and record.fields == {"level": 3}
    with pytest.raises(RecordError, match=r"`chosen` needs .*got b'\\xff' \(bytes\)"):
        read([{**PAIR, "chosen": b"\xff"}])
    uneven = {"role": ["user"], "content": []}
    with pytest.raises(RecordError, match="`prompt` needs a string or a list"):
        read([{**PAIR, "prompt": uneven}])


def test_an_option_that_does_not_apply_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR)
    with pytest.raises(ValueError, match="`split` is for tfds:NAME.*x.jsonl. Leave it"):
        read(path, split="train")
    with pytest.raises(ValueError, match="`split` is for .*split='train' with a list"):
        read([PAIR], split="train")
    for split in (None, "validation"):
        with pytest.raises(ValueError, match="must be one of 'train', 'test'; got"):
            read({"train": [PAIR], "test": [PAIR]}, split=split)
    with pytest.raises(ValueError, match="must be one of 'prompt'.*One row goes in"):
        read(PAIR)
    with pytest.raises(ValueError, match="`on_error` must be .*; got 'ignore'"):
        read(path, on_error="ignore")
    for source in (7, b"x.jsonl"):
        with pytest.raises(
            TypeError, match=r"an iterable of mappings; got (int|bytes)"
        ):
            read(source)
    with pytest.raises(TypeError, match="an iterable of mappings; got str"):
        read({"train": "x.jsonl"}, split="train")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the prepared data set of tests/data/tiny_builder."""
    from data.tiny_builder.tiny_pairs import TinyPairs

    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def home(prepared, tmp_path, monkeypatch):
    """A copy of it that a test may damage, where `read` looks."""
    shutil.copytree(prepared, tmp_path / "tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def tfds_rows(split):
    from data.tiny_builder.tiny_pairs import NUM_ROWS, row

    return [row(number) for number in range(NUM_ROWS[split])]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_tfds_data_set_gives_the_rows_that_its_builder_wrote(home, split):
    for name in ("tiny_pairs", "tiny_pairs:1.2.0"):
        records = read(f"tfds:{name}", split=split)
        assert alike(records) == alike(read(tfds_rows(split)))
        assert records.counts["unread_fields"] == {"tags": len(records)}
        assert records[1].where == f"tfds:tiny_pairs:1.2.0/{split}[1]"
    assert "tensorflow" not in sys.modules


def test_a_part_of_a_tfds_split_is_read(home):
    records = read("tfds:tiny_pairs", split="train[:40%]")
    assert alike(records) == alike(read(tfds_rows("train")[:2]))
    whole = read("tfds:tiny_pairs", split="train+test")
    assert len(whole) == 7


def test_the_newest_version_is_read_and_configs_are_folders(home):
    shutil.copytree(home / "tiny_pairs" / "1.2.0", home / "tiny_pairs" / "1.10.0")
    info = home / "tiny_pairs" / "1.10.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("1.2.0", "1.10.0"))
    assert read("tfds:tiny_pairs", split="test").source == "tfds:tiny_pairs:1.10.0/test"
    shutil.move(
        home / "tiny_pairs" / "1.10.0", home / "tiny_pairs" / "short" / "1.10.0"
    )
    info = home / "tiny_pairs" / "short" / "1.10.0" / "dataset_info.json"
    fields = json.loads(info.read_text()) | {"configName": "short"}
    info.write_text(json.dumps(fields))
    source = "tfds:tiny_pairs/short:1.10.0/test"
    assert read("tfds:tiny_pairs/short:1.10.0", split="test").source == source
    assert read("tfds:tiny_pairs", split="test").source == "tfds:tiny_pairs:1.2.0/test"


def test_a_tfds_data_set_that_cannot_be_read_says_what_to_do(home):
    message = r"tfds:none: is not prepared in .* \(prepared there: none of this name\)"
    with pytest.raises(RecordError, match=message + ".*Prepare it first"):
        read("tfds:none", split="train")
    message = r"tiny_pairs:2.0.0: is not prepared.*there: tiny_pairs/1.2.0 of this"
    with pytest.raises(RecordError, match=message):
        read("tfds:tiny_pairs:2.0.0", split="train")
    with pytest.raises(RecordError, match=r"written as tfds:NAME\[/CONFIG\]\[:VERSION"):
        read("tfds:../tiny_pairs", split="train")
    for split in (None, "validation"):
        message = "must be one of 'train', 'test' or a part.*'train.:80%.'; got"
        with pytest.raises(ValueError, match=message):
            read("tfds:tiny_pairs", split=split)
    info = home / "tiny_pairs" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = 'prepared as tfrecord, and only array_record.*file_format="array_record"'
    with pytest.raises(RecordError, match=message):
        read("tfds:tiny_pairs", split="train")


@pytest.mark.parametrize(("taken", "split"), [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("part", ["", "[:1]"])
def test_more_or_fewer_rows_than_the_metadata_says_are_an_error(
    home, taken, split, part
):
    folder = home / "tiny_pairs" / "1.2.0"
    files = {
        name: next(folder.glob(f"*{name}.array_record*")) for name in ("train", "test")
    }
    shutil.copy(files[taken], files[split])
    numbers = {"train": 5, "test": 2}
    message = (
        f"files hold {numbers[taken]} rows, and the metadata says {numbers[split]}"
    )
    for on_error in ("raise", "skip"):
        with pytest.raises(RecordError, match=message):
            read("tfds:tiny_pairs", split=split + part, on_error=on_error)


def test_a_tfds_file_that_is_cut_or_damaged_is_an_error(home):
    file = next(home.rglob("*train.array_record*"))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordError, match="array_record data is cut.*; 0 whole rows"):
        read("tfds:tiny_pairs", split="train")
    file.write_bytes(data[:200] + b"\xff" * 30 + data[230:])
    with pytest.raises(RecordError, match="array_record data is cut.*; 0 whole rows"):
        read("tfds:tiny_pairs", split="train")
    with pytest.raises(
        RecordError, match="no usable row among 1.*array_record data is"
    ):
        read("tfds:tiny_pairs", split="train", on_error="skip")
    file.unlink()
    with pytest.raises(RecordError, match="array_record data is cut.*; 0 whole rows"):
        read("tfds:tiny_pairs", split="train")


def test_your_files_become_a_tfds_data_set_of_the_same_records(tmp_path, monkeypatch):
    rows = [
        {"responses": ["a b", "a c", "a d"], "labels": [1, 0.5, 0], "topic": "é"},
        {
            "prompt": [{"role": "user", "content": "Hi."}],
            "responses": [[{"role": "assistant", "content": x}] for x in "abc"],
            "labels": [3, 2, 1],
            "tools": [{"name": "f"}],
        },
        {"prompt": "a", "responses": ["b"], "labels": [1], "note": "left out"},
    ]
    write(tmp_path / "rows" / "a.jsonl", *rows[:1])
    write(tmp_path / "rows" / "b.jsonl", *rows[1:])
    splits = {"train": tmp_path / "rows", "test": rows[:1]}
    home = tmp_path / "home"
    with pytest.raises(RecordError, match=r"b.jsonl:2: has 1 response\(s\)"):
        builder.prepare("mine", splits, data_dir=home)
    written = builder.prepare("mine", splits, data_dir=home, on_error="skip")
    assert written["train"].counts["skipped"] == 1 and len(written["train"]) == 2
    monkeypatch.setenv("TFDS_DATA_DIR", str(home))
    for split, records in written.items():
        assert alike(read("tfds:mine", split=split)) == alike(records)
    with pytest.raises(ValueError, match="1.0.0 is there already.*another `version`"):
        builder.prepare("mine", splits, data_dir=home, on_error="skip")
    builder.prepare("mine", {"only": rows[:1]}, data_dir=home, version="2.0.0")
    assert read("tfds:mine").source == "tfds:mine:2.0.0/only"  # its one split
    with pytest.raises(ValueError, match="`name` must be small letters.*got 'My-set'"):
        builder.prepare("My-set", splits, data_dir=home)


def test_a_build_whose_files_hold_other_rows_is_an_error(tmp_path, monkeypatch):
    real = builder._make_builder

    def losing(name, version, found, data_dir):
        fewer = {split: records[:1] for split, records in found.items()}
        return real(name, version, fewer, data_dir)

    monkeypatch.setattr(builder, "_make_builder", losing)
    with pytest.raises(RecordError, match="2 records were to be written, and 1 were"):
        builder.prepare("mine", {"only": [pair(0), pair(1)]}, data_dir=tmp_path)


@settings(max_examples=5)
@given(rows=st.lists(strategies.rows(form="list"), min_size=1, max_size=4))
def test_any_records_survive_a_tfds_data_set(tmp_path_factory, rows):
    home = tmp_path_factory.mktemp("home")
    written = builder.prepare("mine", {"only": rows}, data_dir=home)["only"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(home))
        assert alike(read("tfds:mine")) == alike(written)


def test_readers_load_what_they_need_when_they_need_it():
    heavy = ("pyarrow", "zstandard", "tensorflow_datasets", "array_record")
    program = (
        f"import sys, pref_jax.data.readers\nprint({{*{heavy}}} & {{*sys.modules}})"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    shown = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr
