"""Contestants take turns, ratios are formed within a round, and losses must agree."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

import measured_tables
from peers import blocks, curves, environments, rounds
from scripts import benchmark_peers

FAKE = """
import dataclasses, sys
import numpy as np
import blocks

job = blocks.read_job()
losses = []
gate = blocks.Gate(
    job,
    settle=lambda: print("settled"),
    losses=losses,
    about={"shape": "[1, 2]", "fill": 1.0},
    packages=("numpy",),
)
with open(job.scratch, "a") as turns:
    for batch in blocks.passed(gate, job.batches, job.num_blocks):
        if len(batch) > job.options["most"]:
            raise ValueError("a batch that is too large")
        turns.write(job.options["name"])
        turns.flush()
        print("what a library prints")
        losses.append(np.float32(sum(batch)))
"""


@pytest.fixture
def start(tmp_path, pytestconfig):
    """`start(name)`: a contestant that writes its name down in every step."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    started = []

    def start_one(name, *, most=9):
        job = blocks.Job(
            model="",
            data="",
            scratch=str(tmp_path / "turns"),
            batches=[[0, 1], [2, 5]],
            num_blocks=3,
            beta=0.1,
            optimizer={},
            sizes={},
            seed=0,
            options={"name": name, "most": most},
        )
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(dataclasses.asdict(job)))
        contestant = rounds.Contestant(
            name,
            [sys.executable, str(program), str(path)],
            log=tmp_path / f"{name}.log",
            environment={"PYTHONPATH": str(pytestconfig.rootpath / "scripts/peers")},
        )
        started.append(contestant)
        return contestant

    yield start_one
    for contestant in started:
        contestant.stop()


def test_contestants_take_turns_and_say_what_each_block_took(start, tmp_path):
    contestants = [start("a"), start("b")]
    for contestant in contestants:
        contestant.wait_ready()
        assert contestant.about["about"] == {"shape": "[1, 2]", "fill": 1.0}
        assert contestant.about["versions"] == {"numpy": np.__version__}
    assert (tmp_path / "turns").read_text() == ""
    lines = []
    found = rounds.alternate(contestants, 2, say=lines.append)
    # The first blocks, then each round begun by another.
    assert (tmp_path / "turns").read_text() == "aabb" + "aabb" + "bbaa"
    assert [line.split(",")[0] for line in lines] == [
        f"round {number}: {name}" for number, name in ((1, "a"), (1, "b"))
    ] + ["round 2: b", "round 2: a"]
    for block in found:
        assert block.losses == [1.0, 7.0] * 3
        assert len(block.seconds) == len(block.cpu_seconds) == 2
        assert 0 < min(block.seconds) and 0 <= block.idle_cpu_seconds < 0.1
        assert block.peak_bytes > 10**6
    # What is printed does not stand between the answers.
    assert (tmp_path / "a.log").read_text().count("what a library prints") == 6


def test_a_contestant_that_fails_says_why(start):
    contestant = start("a", most=1)
    contestant.wait_ready()
    with pytest.raises(RuntimeError, match="(?s)a ended with exit code 1.*too large"):
        contestant.block()


def test_contestants_are_given_the_processors_that_are_asked_for():
    allowed = len(rounds.os.sched_getaffinity(0))
    with rounds.processors(1):
        assert len(rounds.os.sched_getaffinity(0)) == 1
    assert len(rounds.os.sched_getaffinity(0)) == allowed


def test_a_ratio_is_formed_within_a_round():
    # Twice as long in every round, whatever the round was like.
    assert rounds.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == [2.0, 2.0, 2.0]
    median, low, high = rounds.ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    assert (median, low, high) == (2.0, 1.0, 9.0)
    # Three of five draws or more are the least with probability 10 (1/5)^3 (4/5)^2 +
    # 5 (1/5)^4 (4/5) + (1/5)^5 = 0.058, more than the 0.025 outside the interval.
    assert rounds.ratio(range(1, 6), [1.0] * 5) == [3.0, 1.0, 5.0]
    with pytest.raises(ValueError, match="one number for each of the same rounds"):
        rounds.ratio([1.0, 2.0], [1.0])


def test_pairs_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [
        tuple(rng.integers(0, 99, n).astype(np.int32) for n in lengths)
        for lengths in ((3, 1, 4), (1, 5, 9), (2, 6, 5))
    ]
    blocks.write_pairs(tmp_path / "pairs.npz", pairs)
    for read, written in zip(
        blocks.read_pairs(tmp_path / "pairs.npz"), pairs, strict=True
    ):
        for x, y in zip(read, written, strict=True):
            np.testing.assert_array_equal(x, y)


def test_both_orders_hold_the_same_pairs_and_one_sorts_them_by_length():
    config = benchmark_peers.Config(steps=4, pairs_per_step=3)
    pairs, _ = benchmark_peers.take_pairs(config)
    orders = {
        order: benchmark_peers.batches_in_order(pairs, order, config)
        for order in ("drawn", "by length")
    }
    for batches in orders.values():
        assert sorted(i for batch in batches for i in batch) == list(range(12))
    assert orders["drawn"][0] == [0, 1, 2]
    longest = [
        [len(pairs[i][0]) + max(map(len, pairs[i][1:])) for i in batch]
        for batch in sorted(orders["by length"], key=lambda b: len(pairs[b[0]][0]))
    ]
    spans = sorted((min(lengths), max(lengths)) for lengths in longest)
    assert all(a[1] <= b[0] for a, b in zip(spans[:-1], spans[1:], strict=True))


LOG_2 = math.log(2)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"a": [LOG_2, 0.5], "b": [LOG_2, 0.502]}, "do not do the same work.*2.00e-03"),
        ({"a": [LOG_2 + 0.01, 0.5], "b": [LOG_2 + 0.01, 0.5]}, "1.00e-02 from log 2"),
        ({"a": [LOG_2, float("nan")], "b": [LOG_2, 0.5]}, "nan apart"),
    ],
)
def test_losses_that_disagree_are_an_error(losses, message):
    with pytest.raises(ValueError, match=message):
        benchmark_peers.check_agreement(losses, dict.fromkeys(losses, "drawn"), 1e-3)


def test_only_losses_of_one_order_are_compared():
    losses = {"a": [LOG_2, 0.5], "b": [LOG_2, 0.5001], "c": [LOG_2, 0.9]}
    orders = {"a": "drawn", "b": "drawn", "c": "by length"}
    found = benchmark_peers.check_agreement(losses, orders, 1e-3)
    assert found["losses_apart"] == pytest.approx(1e-4)
    assert found["first_loss_from_log_2"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contestants": ("TRL, best",)}, "the first among them; got TRL, best"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"num_heads": 7}, "multiple of `num_heads`; got 256 and 7"),
        ({"pairs": "x.jsonl"}, "`pairs` and `tokenizer` belong together"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark_peers.Config(**fields)


def taken(seconds, losses):
    return rounds.Blocks(
        warm_up_seconds=9.0,
        seconds=seconds,
        cpu_seconds=[s**2 for s in seconds],
        idle_cpu_seconds=0.0,
        peak_bytes=3 * 10**9,
        losses=losses,
    )


@pytest.fixture(scope="module")
def record():
    """A comparison of three, without its environment."""
    names = (benchmark_peers.STORED, benchmark_peers.LIVE, "TRL, defaults")
    config = benchmark_peers.Config(contestants=names, steps=2, rounds=3)
    losses = [LOG_2, 0.5]
    found = [taken([s, 2 * s, s], losses) for s in (1.0, 1.5, 4.0)]
    about = [
        {
            "about": {"shape": "[3, 1024]", "fill": 0.61},
            "versions": {"jax": "0.10.2"},
            "start_seconds": 7.0,
        }
    ] * 3
    return {
        "config": dataclasses.asdict(config),
        "parameters": 16_100_000,
        "data": {"lengths": "drawn", "mean_tokens": [56.0, 98.0, 95.0]},
        "environment": {"commit": "abcdef0123456789"},
        **benchmark_peers.summarise(config, list(names), found, about),
    }


def test_a_contestant_is_compared_with_both_of_ours(record):
    stored, live, theirs = record["contestants"].values()
    assert theirs["ratios"][benchmark_peers.STORED]["time"] == [4.0, 4.0, 4.0]
    assert theirs["ratios"][benchmark_peers.LIVE]["cpu"] == pytest.approx([64 / 9] * 3)
    assert list(stored["ratios"]) == [benchmark_peers.LIVE]
    assert list(live["ratios"]) == [benchmark_peers.STORED]
    assert stored["pairs_per_second"] == 16.0  # 16 pairs in the median second
    assert theirs["cpu_seconds_per_pair"] == 1.0  # 16 seconds


def test_the_table_is_that_of_the_record(record):
    table = measured_tables.peers({"peers": record})
    (row,) = [line for line in table.splitlines() if line.startswith("| TRL, defaults")]
    cells = row.strip("| ").split(" | ")
    assert cells[1:5] == ["[3, 1024], 61 %", "4.00", "1.00", "3.0"]
    assert cells[5:7] == ["4.00 [4.00, 4.00]", "16.00 [16.00, 16.00]"]
    assert "within 0e+00 of log 2" in table and "commit abcdef012345." in table
    assert measured_tables.peers({}) == "not run\n"
    assert "over ours: time 4.00 [4.00, 4.00]" in benchmark_peers.describe(record)


def test_a_record_keeps_as_many_digits_as_it_deserves():
    values = {"seconds": [1.23456789], "losses": [0.693147181], "n": 3, "s": "x"}
    assert benchmark_peers.rounded(values) == {
        "seconds": [1.235],
        "losses": [0.6931472],
        "n": 3,
        "s": "x",
    }


def test_the_curves_are_drawn(record, tmp_path):
    curves.draw(record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_environment_is_made_once_for_its_pins(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        environments.subprocess,
        "run",
        lambda command, check: (
            calls.append(command),
            (tmp_path / "trl").mkdir(exist_ok=True),
        ),
    )
    python = environments.python_of(tmp_path, "trl")
    assert python == str(tmp_path / "trl" / "bin" / "python")
    assert calls[0][1:4] == ["-m", "venv", "--clear"] and "torch==2.13.0" in calls[1]
    assert environments.python_of(tmp_path, "trl") == python and len(calls) == 2
    monkeypatch.setitem(environments.PINS, "trl", ("trl==1.17.0",))
    environments.python_of(tmp_path, "trl")
    assert len(calls) == 4
