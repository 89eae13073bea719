"""The bridge: what V tells is measured against what else would tell it."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from experiments.sft_bridge import values, verdicts
from experiments.sft_bridge.config import SMALL, SMOKE
from experiments.sft_bridge.values import SFT, SIGNALS
from experiments.worlds import key_door
from experiments.worlds.claims import FAILS, HOLDS
from experiments.worlds.key_door import MOVES, Room, World

WORLD = World()
ROOM = Room(0, 5, 15)
MODELS = ("SFT", "DPO", "base", "untrained")
IDS = [5, 6, 7, 8]  # of the four moves
RNG = np.random.default_rng(0)


def tokens(text):
    return [IDS[MOVES.index(word)] for word in text.split()]


def test_reference_rows_are_any_move_alike_and_end_with_a_win():
    rows = values.reference_rows(WORLD, [ROOM, Room(14, 13, 15)], 400, seed=0)
    moves = [key_door.moves_of(row["response"]) for row in rows]
    counts = np.bincount(np.concatenate([m[:1] for m in moves]), minlength=4)
    assert (np.abs(counts / 400 - 0.25) < 0.08).all()
    for row, made in zip(rows, moves, strict=True):
        room = key_door.room_of(WORLD, row["prompt"])
        states, won = key_door.states_along(WORLD, room, made)
        assert len(states) == len(made) and (won or len(made) == WORLD.max_moves)
    assert any(len(m) < WORLD.max_moves for m in moves)


def test_a_response_is_read_up_to_its_end_or_to_what_is_no_move():
    text = "right down right right down down down"
    won = values.read_played(WORLD, ROOM, [*tokens(text), 0], IDS, RNG)
    assert (
        won.won and len(won.states) == len(won.ids) == 6
    )  # at the door before the last
    cut = values.read_played(
        WORLD, ROOM, [*tokens("up up"), 0, *tokens("up")], IDS, RNG
    )
    assert not cut.won and len(cut.states) == 2
    assert (cut.ids != cut.changed).sum() == 1 and cut.ids[0] != cut.changed[0]
    assert values.read_played(WORLD, ROOM, [*tokens("up"), 0], IDS, RNG) is None


def test_true_values_are_those_of_the_states():
    played = values.read_played(WORLD, ROOM, tokens("right down right"), IDS, RNG)
    found = values.true_values(WORLD, played)
    solution = key_door.solve(WORLD, ROOM)
    assert found[0] == solution.value[0, 0, 0]
    assert found[2] == solution.value[2, 5, 1]  # with the key


def test_what_controls_explain_is_taken_off():
    rng = np.random.default_rng(0)
    time, other = rng.normal(size=(2, 4000))
    truth = time + 0.3 * rng.normal(size=4000)
    assert abs(values.beyond(time, truth, [time])) < 1e-6
    follows = values.beyond(time + 0.01 * other, truth, [time])
    assert abs(follows) < 0.05
    assert values.beyond(truth, truth, [time, other]) == pytest.approx(1.0)
    assert values.beyond(truth - 2 * time, truth, [time]) > 0.9


def test_signals_are_ranked_against_the_truth_and_the_end():
    truth = np.arange(6.0)
    signals = {"same": truth**3, "against": -truth, "flat": np.zeros(6)}
    found = values.correlations(signals, truth)
    assert found == {
        "same": pytest.approx(1.0),
        "against": pytest.approx(-1.0),
        "flat": 0.0,
    }
    won = truth > 3
    assert values.success_auc(signals, won) == {
        "same": 1.0,
        "against": 0.0,
        "flat": 0.5,
    }
    assert set(values.success_auc(signals, truth < 9).values()) == {0.5}


def test_at_each_move_time_tells_nothing_and_rare_times_are_left_out():
    rng = np.random.default_rng(0)
    moved = np.repeat(np.arange(4), (200, 100, 50, 10))
    left = rng.normal(size=len(moved))
    truth = left - 3.0 * moved
    signals = {"time": -moved, "left": left, "against": -left}
    assert values.correlations(signals, truth)["time"] > 0.8
    found = values.at_each_move(signals, truth, moved)
    assert found == {
        "time": 0.0,
        "left": pytest.approx(1.0),
        "against": pytest.approx(-1.0),
    }
    turned = np.where(moved == 3, -truth, truth)  # of 10 states alone
    assert values.at_each_move(signals, turned, moved)["left"] == pytest.approx(1.0)
    assert values.at_each_move(signals, truth, np.arange(360))["left"] == 0.0


def test_a_model_that_knows_v_is_told_from_one_that_does_not():
    rng = np.random.default_rng(1)
    rooms = key_door.rooms(WORLD, "test", 60, seed=0)
    played = [
        values.read_played(
            WORLD,
            room,
            [
                IDS[m]
                for m in key_door.play(WORLD, room, key_door.solve(WORLD, room), rng)
            ],
            IDS,
            rng,
        )
        for room in rooms
    ]
    played = [p for p in played if p is not None]

    def numbers(p, ids, knows):
        moves = [IDS.index(i) for i in ids]
        value = key_door.solve(WORLD, p.room).value
        state, found = key_door.start(p.room), []
        for move in moves:
            found.append(value[state])
            state, _ = key_door.step(WORLD, p.room, state, move)
            if state.moved >= WORLD.max_moves:
                break
        found += [0.0] * (len(moves) - len(found))
        noise = rng.normal(size=len(moves))
        value = np.array(found) if knows else noise
        return {"value": value, "entropy": noise, "log_sum_sq": -noise}

    def read(knows):
        return [[numbers(p, ids, knows) for ids in (p.ids, p.changed)] for p in played]

    found = values.measure(
        SMALL.values,
        played,
        {name: read(name in ("SFT", "DPO")) for name in MODELS},
        seed=0,
        num_too_short=20,
    )
    assert found["won"] == sum(p.won for p in played) / (len(played) + 20)
    assert found["too_short"] == 20
    place = {name: i for i, name in enumerate(SIGNALS)}
    assert found["correlation"][place[SFT]] == pytest.approx(1.0)
    assert found["beyond"] > 0.99
    assert found["at_move"][place[SFT]] == pytest.approx(1.0)
    assert found["at_move"][place["moves left"]] == 0
    assert abs(found["at_move"][place["V of the base model"]]) < 0.2
    assert found["correlation"][place[values.DPO]] == pytest.approx(1.0)
    assert abs(found["correlation"][place["V of the base model"]]) < 0.15
    shifted = found["correlation"][place["V of the SFT model, shifted"]]
    assert 0.4 < shifted < 0.9
    assert found["drop"][place[SFT]] > 0.9 > found["drop"][place["V of the base model"]]
    # Time is the same on both sides of a wrong move.
    assert found["drop"][place["moves left"]] == 0.5


# --- verdicts -------------------------------------------------------------------------


def results(sft=0.9, control=0.5, beyond=0.4):
    rows = {}
    for seed in range(5):
        line = [sft + 0.01 * seed] + [control] * (len(SIGNALS) - 1)
        rows[f"values/seed{seed}"] = {
            **{measure: line for measure in verdicts.REPORTED},
            "beyond": beyond + 0.01 * seed,
        }
    return rows


def judged(rows):
    return verdicts.judge_values(verdicts.ValuesMeasured(rows))


def test_v_must_be_above_its_strongest_control():
    assert {v.verdict for v in judged(results())} == {HOLDS}
    beaten = results()
    place = SIGNALS.index("moves left")
    for run in beaten.values():
        run["auc"] = [*run["auc"][:place], 0.95, *run["auc"][place + 1 :]]
    found = {v.unit.split(",")[0]: v for v in judged(beaten)}
    auc = found[verdicts.MEASURES["auc"]]
    assert auc.verdict == FAILS and auc.unit.endswith("less that of: moves left")
    assert auc.effect.mean == pytest.approx(-0.03)
    assert found[verdicts.MEASURES["correlation"]].verdict == HOLDS


def test_a_control_that_falls_where_the_value_rises_is_as_strong_as_one_that_rises():
    beaten = results(sft=0.4, control=0.3)
    place = SIGNALS.index("moves left")
    for run in beaten.values():
        line = run["correlation"]
        run["correlation"] = [*line[:place], -0.47, *line[place + 1 :]]
    found = {v.unit.split(",")[0]: v for v in judged(beaten)}
    correlation = found[verdicts.MEASURES["correlation"]]
    assert correlation.verdict == FAILS
    assert correlation.unit.endswith("less that of: moves left, turned round")
    assert correlation.effect.mean == pytest.approx(0.42 - 0.47)
    # Of an area under a curve, 0.4 tells as much as 0.6, and less than 0.7.
    low = {v.unit.split(",")[0]: v for v in judged(results(sft=0.7, control=0.4))}
    auc = low[verdicts.MEASURES["auc"]]
    assert auc.verdict == HOLDS and auc.effect.mean == pytest.approx(0.72 - 0.6)


def test_no_correlation_beyond_the_controls_is_a_failure():
    *_, last = judged(results(beyond=-0.02))
    assert last.verdict == FAILS and last.claim.startswith(
        "V of the SFT model tells more"
    )


def test_jobs_are_counted_before_they_run():
    jobs = values.jobs(SMALL.values, epath.Path("nowhere"), None)
    assert [(job.name, job.num_runs) for job in jobs] == [
        (f"values/seed{seed}", 3) for seed in range(1, 6)
    ]
    with pytest.raises(ValueError, match="`num_seeds` must be 2 or more; got 1"):
        dataclasses.replace(SMOKE.values, num_seeds=1)


@pytest.mark.slow
def test_the_smoke_command_makes_a_report_and_continues(tmp_path, pytestconfig):
    def run():
        result = subprocess.run(
            [sys.executable, "-m", "experiments.sft_bridge", "--preset", "smoke"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    assert "report: runs/sft_bridge/001/report.html" in run().stdout
    folder = tmp_path / "runs" / "sft_bridge" / "001"
    assert "V of an untrained model" in (folder / "report.html").read_text()
    record = json.loads((folder / "record.json").read_text())
    assert len(record["results"]["values"]["signals"]) == len(SIGNALS)
    # As if it had been killed before its last seed was measured.
    (folder / "record.json").unlink()
    (folder / "results" / "values" / "seed2.json").unlink()
    again = run()
    assert "of which 3 runs are left" in again.stderr
    assert (
        json.loads((folder / "record.json").read_text())["results"]
        == (record["results"])
    )
