"""The key and the door: its values against all responses, its text, its splits."""

import itertools

import numpy as np
import pytest

from experiments.worlds import key_door
from experiments.worlds.key_door import MOVES, Room, State, World
from pref_jax.data import templates
from pref_jax.data.records import from_objects

SMALL = World(size=2, max_moves=4, beta=0.5)
ROOM = Room(agent=0, key=1, door=3)


def outcomes(world, room):
    """Every response of the reference policy: moves -> (probability, reward, won)."""
    found = {}
    for moves in itertools.product(range(4), repeat=world.max_moves):
        states, won = key_door.states_along(world, room, moves)
        made = moves[: len(states)]
        reward = won - world.move_cost * len(made)
        found[made] = (0.25 ** len(made), reward, won)
    return found


def test_the_probabilities_of_all_responses_add_up_to_one():
    assert sum(p for p, *_ in outcomes(SMALL, ROOM).values()) == pytest.approx(1.0)


def test_v_is_the_log_of_the_mean_exponential_reward_of_the_reference():
    mean = sum(
        p * np.exp(reward / SMALL.beta)
        for p, reward, _ in outcomes(SMALL, ROOM).values()
    )
    found = key_door.solve(SMALL, ROOM).value[key_door.start(ROOM)]
    assert found == pytest.approx(SMALL.beta * np.log(mean), abs=1e-12)


def test_the_best_policy_weighs_responses_by_their_reward():
    solution = key_door.solve(SMALL, ROOM)
    value = solution.value[key_door.start(ROOM)]
    total = 0.0
    for moves, (p, reward, _) in outcomes(SMALL, ROOM).items():
        states, _ = key_door.states_along(SMALL, ROOM, moves)
        logp = sum(solution.logps[s][m] for s, m in zip(states, moves, strict=True))
        assert logp == pytest.approx(
            np.log(p) + (reward - value) / SMALL.beta, abs=1e-9
        )
        total += np.exp(logp)
    assert total == pytest.approx(1.0)


def test_rooms_are_won_with_the_key_alone_and_walls_hold():
    world = World(size=2, max_moves=4)
    right, down, up = MOVES.index("right"), MOVES.index("down"), MOVES.index("up")
    assert key_door.states_along(world, ROOM, [right, down, up])[1]
    states, won = key_door.states_along(world, ROOM, [up, down, right, up])
    assert not won  # at the door without a key, and then the key
    assert states == [State(0, 0, 0), State(1, 0, 0), State(2, 2, 0), State(3, 3, 0)]
    assert len(key_door.states_along(world, ROOM, [up] * 9)[0]) == 4


def test_values_grow_with_the_key_and_where_a_win_is_near():
    world = World()
    room = Room(0, 5, 15)
    value = key_door.solve(world, room).value
    assert (value[:-1, :, 1] >= value[:-1, :, 0] - 1e-12).all()
    assert value[0, 0, 0] > value[6, 0, 0] > value[9, 0, 0]
    assert (value <= 1 - world.move_cost).all()
    assert (value >= -world.move_cost * world.max_moves - 1e-12).all()
    # Beside the door with the key a careful demonstrator hardly misses.
    sure = key_door.solve(World(beta=0.01), room)
    assert np.exp(sure.logps[0, 14, 1, MOVES.index("right")]) > 0.9


def test_demonstrations_are_drawn_as_the_best_policy_has_it():
    rng = np.random.default_rng(0)
    solution = key_door.solve(SMALL, ROOM)
    drawn = [key_door.play(SMALL, ROOM, solution, rng) for _ in range(8000)]
    first = np.bincount([moves[0] for moves in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(
        first, np.exp(solution.logps[key_door.start(ROOM)]), atol=0.02
    )
    won = np.mean([key_door.states_along(SMALL, ROOM, m)[1] for m in drawn])
    value = solution.value[key_door.start(ROOM)]
    expected = sum(
        p * np.exp((reward - value) / SMALL.beta)
        for p, reward, wins in outcomes(SMALL, ROOM).values()
        if wins
    )
    assert won == pytest.approx(expected, abs=0.02)


def test_splits_share_no_room_and_are_drawn_by_seed():
    world = World()
    parts = {s: key_door.rooms(world, s, 250, seed=0) for s in key_door.SPLITS}
    assert len(set().union(*parts.values())) == 750
    again = key_door.rooms(world, "train", 300, seed=0)
    assert again[:250] == parts["train"]
    assert key_door.rooms(world, "train", 250, seed=1) != parts["train"]
    for split, found in parts.items():
        assert {key_door.split_of(world, room) for room in found} == {split}


def test_text_and_rooms_are_one_to_one():
    world = World(size=3, max_moves=8)
    for room in key_door.rooms(world, "train", 100, seed=0):
        assert key_door.room_of(world, key_door.prompt_of(world, room)) == room


def test_a_row_is_a_token_a_word_and_one_end():
    world = World()
    rooms = key_door.rooms(world, "train", 3, seed=0)
    rows = key_door.demonstrations(world, rooms, 5, seed=0)
    assert rows == key_door.demonstrations(world, rooms, 6, seed=0)[:5]
    assert rows[0]["prompt"] == rows[3]["prompt"] != rows[1]["prompt"]
    tokenizer = key_door.train_tokenizer(world)
    encoder = templates.TextEncoder(tokenizer)
    for row, group in zip(rows, encoder.encode_all(from_objects(rows)), strict=True):
        moves = key_door.moves_of(row["response"])
        assert len(group.responses[0]) == len(moves) + 1
        assert group.responses[0][-1] == encoder.end_ids[0]
        assert " " + encoder.decode(group.responses[0]) == row["response"]
        assert encoder.decode(group.prompt) == row["prompt"]
    assert encoder.counts["unknown_tokens"] == 0


def test_one_move_is_replaced_by_the_worst_there():
    world, room, rng = World(), Room(0, 5, 15), np.random.default_rng(1)
    solution = key_door.solve(world, room)
    for _ in range(20):
        moves = key_door.play(world, room, solution, rng)
        place, changed = key_door.worst_move(world, room, solution, moves, rng)
        assert [
            i for i, (a, b) in enumerate(zip(moves, changed, strict=True)) if a != b
        ] == [place] and place < len(moves) - 1
        state = key_door.states_along(world, room, moves)[0][place]
        others = np.delete(solution.q[state], moves[place])
        assert solution.q[state][changed[place]] == others.min()
    with pytest.raises(ValueError, match="one move"):
        key_door.worst_move(world, room, solution, [1], rng)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: World(size=1), "`size` must lie in"),
        (lambda: World(max_moves=11), "`max_moves` must be 12 or more"),
        (lambda: World(beta=0), "`beta` must be positive"),
        (lambda: World(move_cost=-1), "`move_cost` must not be negative"),
        (lambda: World(validation_rate=0.5, test_rate=0.5), "leave some for training"),
        (lambda: key_door.rooms(World(), "dev", 1, 0), "must be one of train"),
        (lambda: key_door.rooms(SMALL, "test", 99, 0), "may be at most"),
        (lambda: key_door.moves_of("up jump"), "got 'jump'"),
        (lambda: key_door.room_of(World(), "agent b2 key d1 door z9 :"), "no room of"),
        (lambda: key_door.room_of(World(), "agent b2 key d1"), "no room of"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
