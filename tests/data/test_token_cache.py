"""Groups on disk are the groups that were written, once, from what the key says."""

import collections
import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from pref_jax.data import rows, sources, token_cache
from pref_jax.data.records import from_objects
from pref_jax.data.token_cache import CachedGroups, CacheError, Shard, cached_groups
from pref_jax.types import TokenGroup

KEY = {"data": "pairs.jsonl 1234", "tokenizer": "abcd", "policy": "drop"}
NUM_SHARDS, PER_SHARD = 3, 5


def make_groups():
    """Ragged pairs, some with steps and stored numbers."""
    groups = fixtures.random_groups(0, NUM_SHARDS * PER_SHARD, 2)
    return [
        dataclasses.replace(
            group,
            labels=(0.7, 0.3),
            step_ids=tuple(np.arange(len(r), dtype=np.int32) for r in group.responses),
            extras={
                "anchor_logps": tuple(
                    -np.arange(len(r), dtype=np.float32) for r in group.responses
                )
            },
        )
        for group in groups
    ]


def shards(first, *, fail_at=None, made=None):
    groups = make_groups()
    for number in range(first, NUM_SHARDS):
        if number == fail_at:
            raise KeyboardInterrupt
        if made is not None:
            made.append(number)
        part = groups[number * PER_SHARD :][:PER_SHARD]
        yield Shard(part, {"records": PER_SHARD + 1, "dropped": 1}, [f"note {number}"])


def assert_same(group, expected):
    for field in dataclasses.fields(expected):
        if field.name != "extras":
            assert_equal(getattr(group, field.name), getattr(expected, field.name))
    assert group.extras.keys() == expected.extras.keys()
    for name, value in expected.extras.items():
        assert_equal(group.extras[name], value)


def assert_equal(value, expected):
    if isinstance(expected, tuple):
        assert len(value) == len(expected)
        for x, y in zip(value, expected, strict=True):
            assert_equal(x, y)
    else:
        assert np.asarray(value).dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(value, expected)


def files(folder):
    return {
        path.name: path.read_bytes()
        for path in pathlib.Path(folder).iterdir()
        if path.name != "lock"
    }


def test_every_field_of_every_group_comes_back(tmp_path):
    found = cached_groups(tmp_path, key=KEY, make_shards=shards)
    expected = make_groups()
    assert len(found) == len(expected)
    for i, group in enumerate(expected):
        assert_same(found[i], group)
    assert_same(found[-1], expected[-1])
    assert [g.record for g in found[2:7:2]] == [g.record for g in expected[2:7:2]]
    with pytest.raises(IndexError, match="group 15 of 15"):
        found[15]


def test_groups_without_steps_or_extras_come_back_without(tmp_path):
    plain = fixtures.random_groups(1, 2, 3)
    found = cached_groups(
        tmp_path, key=KEY, make_shards=lambda first: iter([Shard(plain, {})])
    )
    for group, expected in zip(found, plain, strict=True):
        assert_same(group, expected)
    assert found[0].step_ids is None and found[0].extras == {}


def test_the_index_knows_the_lengths_and_the_account(tmp_path):
    found = cached_groups(tmp_path, key=KEY, make_shards=shards)
    expected = rows.measure(make_groups())
    for field in dataclasses.fields(rows.Lengths):
        np.testing.assert_array_equal(
            getattr(found.lengths, field.name), getattr(expected, field.name)
        )
    assert rows.measure(found) is found.lengths
    assert found.counts == {"records": 18, "dropped": 3}
    assert found.notes == ["note 0", "note 1", "note 2"]


def test_batches_of_a_cache_are_those_of_the_groups(tmp_path):
    found = cached_groups(tmp_path, key=KEY, make_shards=shards)
    options = {"groups_per_step": 4, "num_steps": 6, "row_length": 64, "seed": 0}
    of_cache = sources.training_batches(found, **options)
    of_list = sources.training_batches(make_groups(), **options)
    assert of_cache.shape == of_list.shape
    for a, b in zip(of_cache, of_list, strict=True):
        for field in dataclasses.fields(a):
            if field.name != "extras":
                np.testing.assert_array_equal(
                    getattr(a, field.name), getattr(b, field.name)
                )


def test_groups_are_read_from_many_threads_at_once(tmp_path):
    found = cached_groups(tmp_path, key=KEY, make_shards=shards)
    expected, wrong = make_groups(), []

    def read():
        for i in np.random.default_rng().permutation(len(found)).tolist() * 20:
            if not np.array_equal(found[i].prompt, expected[i].prompt):
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cache_goes_through_pickle_to_another_process(tmp_path):
    found = cached_groups(tmp_path, key=KEY, make_shards=shards)
    assert_same(pickle.loads(pickle.dumps(found))[3], found[3])


def test_a_complete_cache_is_not_made_again(tmp_path):
    cached_groups(tmp_path, key=KEY, make_shards=shards)
    before = files(tmp_path)

    def never(first):
        raise AssertionError("made again")

    assert len(cached_groups(tmp_path, key=KEY, make_shards=never)) == 15
    assert files(tmp_path) == before


@pytest.mark.parametrize("fail_at", range(NUM_SHARDS))
def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(tmp_path, fail_at):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    cached_groups(straight, key=KEY, make_shards=shards)
    with pytest.raises(KeyboardInterrupt):
        cached_groups(
            broken, key=KEY, make_shards=lambda first: shards(first, fail_at=fail_at)
        )
    with pytest.raises(CacheError, match="holds no complete cache"):
        CachedGroups(broken)
    made = []
    cached_groups(broken, key=KEY, make_shards=lambda first: shards(first, made=made))
    assert made == list(range(fail_at, NUM_SHARDS))
    assert files(broken) == files(straight)


def test_groups_whose_lengths_were_not_written_are_made_again(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        cached_groups(folder, key=KEY, make_shards=shards)
    (broken / "index.npz").unlink()
    (broken / "00002.npz").unlink()
    (broken / "00002.array_record").write_bytes(b"half")
    made = []
    cached_groups(broken, key=KEY, make_shards=lambda first: shards(first, made=made))
    assert made == [2]
    assert files(broken) == files(straight)


@pytest.mark.parametrize("name", sorted(KEY))
def test_a_part_of_the_key_that_differs_is_named(tmp_path, name):
    cached_groups(tmp_path, key=KEY, make_shards=shards)
    before = files(tmp_path)
    message = f"made from something else: {name} was {KEY[name]}, now other. Delete"
    with pytest.raises(CacheError, match=message):
        cached_groups(tmp_path, key=KEY | {name: "other"}, make_shards=shards)
    with pytest.raises(CacheError, match=f"{name} was {KEY[name]}, now not there"):
        fewer = {k: v for k, v in KEY.items() if k != name}
        cached_groups(tmp_path, key=fewer, make_shards=shards)
    assert files(tmp_path) == before


def test_a_cache_of_another_format_is_refused(tmp_path):
    cached_groups(tmp_path, key=KEY, make_shards=shards)
    path = tmp_path / token_cache.KEY_FILE
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"format": "0"}))
    with pytest.raises(CacheError, match="format was 0, now 1"):
        cached_groups(tmp_path, key=KEY, make_shards=shards)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CacheError, match="has no key.json and holds thesis.tex"):
        cached_groups(tmp_path, key=KEY, make_shards=shards)
    assert list(files(tmp_path)) == ["thesis.tex"]


def test_a_lost_file_is_noticed(tmp_path):
    cached_groups(tmp_path, key=KEY, make_shards=shards)
    (tmp_path / "00001.array_record").unlink()
    with pytest.raises(CacheError, match="holds 10 records and its index speaks of 15"):
        cached_groups(tmp_path, key=KEY, make_shards=shards)


def test_a_source_without_a_group_is_an_error_with_its_account(tmp_path):
    nothing = Shard([], {"dropped": 3}, ["pairs.jsonl:1 is longer than a row"])
    with pytest.raises(ValueError, match="no group is left.*'dropped': 3.*:1 is long"):
        cached_groups(tmp_path, key=KEY, make_shards=lambda first: iter([nothing]))


def test_two_processes_share_one_cache(tmp_path):
    """Both ask at once; each shard is made once, and both read all of it."""
    program = (
        "import sys, time, test_token_cache as t\n"
        "from pathlib import Path\n"
        "def slow(first):\n"
        "    for shard in t.shards(first):\n"
        "        time.sleep(0.2)\n"
        "        with open(sys.argv[2], 'a') as log: log.write('made\\n')\n"
        "        yield shard\n"
        "found = t.cached_groups(sys.argv[1], key=t.KEY, make_shards=slow)\n"
        "print(len(found), sum(g.record for g in found))\n"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    path = os.pathsep.join(str(root / p) for p in ("", "tests", "tests/data"))
    log = tmp_path / "log"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "cache", log],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    shown = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = make_groups()
    assert shown == [f"{len(expected)} {sum(g.record for g in expected)}\n"] * 2
    assert log.read_text() == "made\n" * NUM_SHARDS


# --- records, tokenised -------------------------------------------------------------


class Encoder:
    """A token a character; a record whose prompt is "bad" cannot be encoded."""

    def __init__(self):
        self.counts, self.examples = collections.Counter(), {}

    def identity(self):
        return {"tokenizer": "characters"}

    def encode_all(self, records, *, on_error):
        groups = []
        for record in records:
            if record.prompt == "bad":
                if on_error == "raise":
                    raise ValueError(f"{record.where}: cannot be encoded")
                self.examples["left_out"] = [f"{record.where}: cannot be encoded"]
                self.counts["left_out"] += 1
                continue
            self.counts.update(records=1, seen=2)
            texts = [np.frombuffer(t.encode(), np.uint8) for t in record.responses]
            groups.append(
                TokenGroup(
                    prompt=np.frombuffer(record.prompt.encode(), np.uint8),
                    responses=tuple(texts),
                    loss_masks=tuple(np.ones(len(t), bool) for t in texts),
                    labels=record.labels,
                    record=record.row,
                )
            )
        return groups


ROWS = [
    {"prompt": "abc", "chosen": "de", "rejected": "f"},
    {"prompt": "bad", "chosen": "x", "rejected": "y"},
    {"prompt": "g" * 30, "chosen": "h", "rejected": "i"},
    {"prompt": "jk", "chosen": "l" * 20, "rejected": "mn"},
    {"prompt": "op", "chosen": "q", "rejected": "r"},
]


def tokenise(root, rows_=ROWS, **options):
    return token_cache.tokenised(
        from_objects(rows_),
        Encoder(),
        root,
        **{"policy": "keep_start", "row_length": 16, "on_error": "skip"} | options,
    )


def test_records_are_used_left_out_or_dropped_and_all_are_counted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(token_cache, "_RECORDS_PER_SHARD", 2)
    found = tokenise(tmp_path)
    assert [group.record for group in found] == [0, 3, 4]
    assert found.counts == {
        **{"records": 5, "used": 3, "left_out": 1, "dropped": 1, "cut": 1},
        "seen": 8,
    }
    assert found.notes == ["left_out: rows[1]: cannot be encoded"]
    assert found.summary().splitlines() == [
        "tokens: records 5, used 3, left_out 1, dropped 1, cut 1, seen 8",
        "  left_out: rows[1]: cannot be encoded",
    ]
    with pytest.raises(ValueError, match=r"rows\[1\]: cannot be encoded"):
        tokenise(tmp_path, on_error="raise")


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
        min_size=1,
        max_size=12,
    ),
    policy=st.sampled_from(rows.FIT_POLICIES),
    max_positions=st.none() | st.integers(2, 40),
    bad=st.integers(0, 12),
)
def test_no_record_is_lost_without_a_count(sizes, policy, max_positions, bad):
    rows_ = [
        {
            "prompt": "bad" if i == bad else "p" * p,
            "chosen": "c" * c,
            "rejected": "r" * r,
        }
        for i, (p, c, r) in enumerate(sizes)
    ]
    with tempfile.TemporaryDirectory() as root:
        try:
            found = tokenise(root, rows_, policy=policy, max_positions=max_positions)
        except ValueError as error:
            assert "no group is left" in str(error)
            return
        counts = {name: found.counts.get(name, 0) for name in COUNTED}
        assert counts["records"] == len(rows_)
        assert len(found) == counts["used"]
        assert counts["used"] + counts["left_out"] + counts["dropped"] == len(rows_)


COUNTED = ("records", "used", "left_out", "dropped")


def test_each_data_set_and_policy_has_a_cache_of_its_own(tmp_path):
    tokenise(tmp_path)
    tokenise(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    changed = [{**ROWS[0], "chosen": "df"}, *ROWS[1:]]
    for options in (
        {"rows_": changed},
        {"rows_": ROWS[::-1]},
        {"policy": "keep_end"},
        {"row_length": 17},
        {"max_positions": 9},
    ):
        tokenise(tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 6
