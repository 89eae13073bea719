"""The record schema: every form that is read, and what is said of every other row."""

import gzip
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pref_jax.data.records import (
    Message,
    Record,
    RecordError,
    from_objects,
    parse_record,
    read_jsonl,
)

PAIR = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}
CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi."}]
USER = {"role": "user", "content": "More?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
TOOL = {"role": "tool", "content": ""}


def write(path, *rows, end="\n"):
    """Writes rows (objects, or lines as bytes) and returns the path."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    data = b"\n".join(lines) + end.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("row", "responses", "labels"),
    [
        ({"prompt": "a", "response": "b"}, ("b",), (1.0,)),
        (PAIR, ("2", "3"), (1.0, 0.0)),
        (
            {"prompt": "a", "responses": ["x", "y", "z"], "labels": [0, -1.5, True]},
            ("x", "y", "z"),
            (0.0, -1.5, 1.0),
        ),
        ({"prompt": "a", "responses": ["b"], "labels": [2]}, ("b",), (2.0,)),
        ({"prompt": "", "response": "b", "chosen": None}, ("b",), (1.0,)),
    ],
)
def test_each_form_becomes_responses_and_labels(row, responses, labels):
    record = parse_record(row, where="x:1", number=4)
    assert record == Record(row["prompt"], responses, labels, 4, "x:1")
    assert all(type(label) is float for label in record.labels)


def test_chat_messages_are_read_and_a_string_response_becomes_one_message():
    turns = [ASSISTANT, TOOL, ASSISTANT]
    row = {"prompt": CHAT, "chosen": turns, "rejected": " No."}
    record = parse_record(row, where="x:1", number=0)
    assert record.prompt == (Message("system", ""), Message("user", "Hi."))
    assert record.responses == (
        tuple(Message(turn["role"], turn["content"]) for turn in turns),
        (Message("assistant", " No."),),
    )


def test_numpy_labels_are_numbers():
    labels = [np.float32(0.5), np.int64(2), np.bool_(True)]
    row = {"prompt": "a", "responses": ["x", "y", "z"], "labels": labels}
    assert parse_record(row, where="x:1", number=0).labels == (0.5, 2.0, 1.0)


def bad(**fields):
    return {**PAIR, **fields}


def listed(labels, responses=("x", "y")):
    return {"prompt": "a", "responses": list(responses), "labels": labels}


FORMS = "needs `prompt` and exactly one of"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"needs an object with fields; got \[1\] \(list\)"),
        ({}, f"{FORMS}.*Got the fields: none"),
        ({"chosen": "a", "rejected": "b"}, f"{FORMS}.*`chosen`, `rejected`"),
        ({"prompt": "a", "chosen": "b"}, FORMS),
        ({"prompt": "a", "responses": ["b"]}, FORMS),
        (bad(response="b"), FORMS),
        (bad(labels=[1, 0]), FORMS),
        (bad(chosen=3), r"field `chosen` needs a string or a list .*; got 3 \(int\)"),
        (bad(chosen=""), r"field `chosen` needs a text that is not blank; got ''"),
        (bad(rejected=" \n"), "field `rejected` needs a text that is not blank"),
        (bad(prompt=[]), r"field `prompt` needs .*one or more messages; got \[\]"),
        (bad(prompt=7), "field `prompt` needs a string or a list"),
        (bad(prompt="\ud800"), r"field `prompt` holds '\\ud800' at character 0"),
        (bad(prompt=[*CHAT, ASSISTANT]), "`prompt` ends with an assistant message"),
        (bad(prompt=["Hi."]), r'field `prompt\[0\]` needs a {"role", "content"}'),
        (bad(prompt=[{"role": "user"}]), r'field `prompt\[0\]` needs a {"role"'),
        (
            bad(prompt=[{"role": "human", "content": "x"}]),
            r"`prompt\[0\].role` needs one of system, user, assistant, tool; got 'hum",
        ),
        (
            bad(prompt=[{"role": "user", "content": [{"text": "x"}]}]),
            r"field `prompt\[0\].content` needs a string; got \[",
        ),
        (bad(chosen=[ASSISTANT]), "is a list of messages but `prompt` is a string"),
        (bad(prompt=CHAT, chosen=[USER]), r"`chosen\[0\].role` needs one of assistant"),
        (bad(prompt=CHAT, chosen=[ASSISTANT, TOOL]), "begin and end with an assistant"),
        (bad(prompt=CHAT, chosen=[TOOL, ASSISTANT]), "got the roles tool, assistant"),
        (
            bad(prompt=CHAT, chosen=[{"role": "assistant", "content": " "}]),
            r"field `chosen\[0\].content` needs a text that is not blank",
        ),
        (listed([1, 0], responses=["x", ""]), r"field `responses\[1\]` needs a text"),
        (listed([], responses=[]), "`responses` needs a list of one or more"),
        (listed([1]), r"field `labels` needs a list of 2 numbers"),
        (listed("10"), "field `labels` needs a list of 2 numbers"),
        (listed([1, "0"]), r"field `labels\[1\]` needs a finite number"),
        (listed([float("nan"), 0]), r"field `labels\[0\]` needs a finite number"),
        (listed([0, float("-inf")]), r"field `labels\[1\]` needs a finite number"),
        (listed([10**400, 0]), r"field `labels\[0\]` needs a finite number"),
        (listed([1e39, 0]), r"field `labels\[0\]` needs a finite number"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_what_is_needed(row, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, where="pairs.jsonl:12", number=11)
    assert str(caught.value).startswith("pairs.jsonl:12: ")


def test_on_error_raise_stops_at_the_first_bad_row_and_says_how_to_skip():
    with pytest.raises(RecordError, match=r'rows\[1\]: .*pass on_error="skip"'):
        from_objects([PAIR, bad(chosen=""), bad(chosen=3)])


def test_on_error_skip_leaves_bad_rows_out_counts_and_lists_them():
    rows = [PAIR, bad(chosen=""), PAIR, 5, {"prompt": "a", "response": "b"}]
    records = from_objects(rows, name="mine", on_error="skip")
    assert [record.row for record in records] == [0, 2]
    assert [record.where for record in records] == ["mine[0]", "mine[2]"]
    assert [where for where, _ in records.skipped] == ["mine[1]", "mine[3]", "mine[4]"]
    assert records.counts["read"] == 5 and records.counts["skipped"] == 3
    assert "mine: 2 records, 2 response(s) each; 5 rows read, 3" in records.summary()
    assert "skipped mine[3]: needs an object" in records.summary()


def test_on_error_is_raise_or_skip():
    with pytest.raises(ValueError, match="`on_error` must be .*; got 'ignore'"):
        from_objects([PAIR], on_error="ignore")


def test_all_records_have_one_number_of_responses():
    message = r"rows\[2\]: has 1 response\(s\), but rows\[0\] has 2"
    with pytest.raises(RecordError, match=message):
        from_objects([PAIR, PAIR, {"prompt": "a", "response": "b"}])


def test_no_usable_row_is_an_error_with_the_first_problem():
    with pytest.raises(RecordError, match="rows: has no usable row among 0"):
        from_objects([])
    with pytest.raises(RecordError, match=r"among 2. The first problem: rows\[0\]: n"):
        from_objects([1, 2], on_error="skip")


def test_equal_responses_and_unread_fields_are_counted_and_shown():
    named = [{"role": "user", "content": "a", "name": "Ann", "tool_calls": None}]
    rows = [
        bad(rejected="2", system="x"),
        bad(system="y", note=None),
        bad(prompt=named),
    ]
    records = from_objects(rows)
    assert records.counts["equal_responses"] == 1
    assert records.counts["unread_fields"] == {"system": 2, "prompt.name": 1}
    assert "equal responses in 1 records" in records.summary()
    assert "fields not read (rows): system (2), prompt.name (1)" in records.summary()
    chats = {"prompt": CHAT, "responses": [[{**ASSISTANT, "id": 1}]], "labels": [1]}
    assert from_objects([chats]).counts["unread_fields"] == {"responses.id": 1}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_file_gives_its_rows_with_their_lines(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), PAIR)
    records = read_jsonl(path)
    assert records.source == name and len(records) == 2 and records.num_responses == 2
    assert [(r.row, r.where) for r in records] == [(0, f"{name}:1"), (1, f"{name}:2")]
    assert records[1].responses == ("2", "3") and records[:1] == (records[0],)


def test_only_line_feeds_end_a_row(tmp_path):
    odd = {"prompt": "a\u2028b\x85c", "response": "d"}
    line = json.dumps(odd, ensure_ascii=False).encode()
    records = read_jsonl(write(tmp_path / "x.jsonl", line + b"\r", line))
    assert [record.prompt for record in records] == [odd["prompt"]] * 2


def test_blank_lines_between_rows_are_counted_and_trailing_ones_are_not(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR, b"", b" ", PAIR, PAIR, b"", b"")
    records = read_jsonl(path)
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
        read_jsonl(path)
    assert [record.row for record in read_jsonl(path, on_error="skip")] == [0, 2]


def test_a_last_line_that_is_cut_says_so(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR, b'{"prompt": "a', end="")
    with pytest.raises(RecordError, match="file ends in this line: is it cut"):
        read_jsonl(path)


@pytest.mark.parametrize("whole", [0, 3])
def test_a_cut_gzip_file_says_how_many_whole_rows_came_before(tmp_path, whole):
    rng = np.random.default_rng(0)  # bytes that gzip cannot shrink: the cut is exact
    rows = [bad(note=rng.bytes(3000).hex()) for _ in range(whole + 2)]
    data = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(data[: int(len(data) * (whole + 0.5) / (whole + 2))])
    message = f"x.jsonl.gz: the gzip file is cut or damaged .*; {whole} whole rows"
    with pytest.raises(RecordError, match=message):
        read_jsonl(path)
    if whole:
        records = read_jsonl(path, on_error="skip")
        assert len(records) == whole and records.counts["skipped"] == 1
        assert records.skipped[0][0] == "x.jsonl.gz"
    else:
        with pytest.raises(RecordError, match="has no usable row.*is cut or damaged"):
            read_jsonl(path, on_error="skip")


def test_a_gzip_file_that_is_none_or_damaged_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(json.dumps(PAIR).encode())
    with pytest.raises(RecordError, match="Not a gzipped file.*; 0 whole rows"):
        read_jsonl(path)
    data = bytearray(gzip.compress(json.dumps(PAIR).encode() + b"\n"))
    data[-6] ^= 1  # the checksum
    path.write_bytes(data)
    with pytest.raises(RecordError, match="CRC check failed.*; 1 whole rows"):
        read_jsonl(path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_json_array_is_an_error_whose_command_converts_it(tmp_path, indent, on_error):
    text = json.dumps([PAIR, PAIR], indent=indent)
    path = write(tmp_path / "x.jsonl", text.encode())
    with pytest.raises(RecordError, match="looks like one JSON array") as caught:
        read_jsonl(path, on_error=on_error)
    command = str(caught.value).split("Convert it with: ")[1]
    assert command.startswith("python ")
    (tmp_path / "rows.json").write_text(text)
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(read_jsonl(tmp_path / "rows.jsonl")) == 2


def test_a_file_that_cannot_be_read_says_what_is_needed(tmp_path):
    with pytest.raises(RecordError, match="reads .jsonl and .jsonl.gz"):
        read_jsonl(write(tmp_path / "x.json", PAIR))
    with pytest.raises(RecordError, match="no such file"):
        read_jsonl(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").mkdir()
    with pytest.raises(RecordError, match="is a folder"):
        read_jsonl(tmp_path / "z.jsonl")
    for name in ("e.jsonl", "e.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(RecordError, match=f"{name}: has no usable row among 0"):
            read_jsonl(tmp_path / name)


def test_errors_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(RecordError("x:1", "is bad.")))
    assert (error.where, error.problem, str(error)) == (
        "x:1",
        "is bad.",
        "x:1: is bad.",
    )
