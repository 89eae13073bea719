r"""A grid with a key and a door, written as text, whose values are known exactly.

Why: that the logits of a language model tell how much is still to be won can only be
judged where that is known. Here a response is a sequence of moves, one token each, and
V* of every state is found by dynamic programming in a moment.

    "agent b2 key d1 door a4 :"        " down down left up ..."

The agent, the key and the door stand on three cells of a square grid. A move into the
border leaves the agent where it is; on the key's cell it takes the key; on the door's
cell with the key it has won, and the response ends. So it does after `max_moves`. A win
is worth 1, at the move that wins; every move costs `move_cost`.

The token MDP. Before every move the agent chooses among four, the reference policy all
alike, and with a KL penalty of weight beta

    Q*(s, a) = r(s, a) + beta log(1/4) + V*(s'),  V* = 0 where the response ends
    V*(s)    = beta log sum_a exp(Q*(s, a) / beta)
    pi*(a|s) = exp((Q*(s, a) - V*(s)) / beta)

so that V* = beta log E[exp(what is still to come / beta)] over the reference.
Demonstrations are
drawn from pi*: a model that imitates them perfectly has pi* as its policy, and what its
log-sum-exps say of V* is the question. They need not say anything: softmax does not see
what is added to all logits of a state.

Source: the sizes and the reward are ours; the setting is that of a claim of "Implicit
reward as the bridge", arXiv:2507.00018, whose body is not verified.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOVES = ("up", "down", "left", "right")
END_TOKEN = "<|end|>"
SPLITS = ("train", "validation", "test")
_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns of `MOVES`


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of the grid and of the penalty; all ours."""

    size: int = 4  # cells of a side
    max_moves: int = 12  # of a response; at least what the farthest room needs
    beta: float = 0.1  # reward a nat; smaller: the demonstrators err less
    move_cost: float = 0.05  # reward that a move takes
    validation_rate: float = 0.1  # share of the rooms
    test_rate: float = 0.2  # share of the rooms

    def __post_init__(self):
        if not 2 <= self.size <= len(string.ascii_lowercase):
            raise ValueError(
                f"`size` must lie in [2, {len(string.ascii_lowercase)}], as rows have "
                f"letters; got {self.size}."
            )
        farthest = 4 * (self.size - 1)
        if self.max_moves < farthest:
            raise ValueError(
                f"`max_moves` must be {farthest} or more, the way to a key and a door "
                f"in opposite corners; got {self.max_moves}."
            )
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")
        if self.move_cost < 0:
            raise ValueError(f"`move_cost` must not be negative; got {self.move_cost}.")
        if min(self.validation_rate, self.test_rate) < 0 or (
            self.validation_rate + self.test_rate >= 1
        ):
            raise ValueError(
                "`validation_rate` and `test_rate` must be shares that leave some for "
                f"training; got {self.validation_rate} and {self.test_rate}."
            )


class Room(NamedTuple):
    """Where things stand: numbers of three different cells, row by row."""

    agent: int
    key: int
    door: int


class State(NamedTuple):
    """Moves that were made, the agent's cell, and whether it has the key (0 or 1)."""

    moved: int
    cell: int
    has_key: int


@dataclasses.dataclass(frozen=True)
class Solution:
    """The optimum of a room's key and door, for every state.

    Attributes:
      q: f64[max_moves, cells, 2, 4], by moves made, cell, key in hand, and move.
      value: f64[max_moves + 1, cells, 2]; 0 when no move is left.
      logps: as q, log pi* in nats.
    """

    q: np.ndarray
    value: np.ndarray
    logps: np.ndarray


def cell_name(world: World, cell: int) -> str:
    """A row's letter and a column's number.

    >>> cell_name(World(), 5)
    'b2'
    """
    row, column = divmod(cell, world.size)
    return f"{string.ascii_lowercase[row]}{column + 1}"


def prompt_of(world: World, room: Room) -> str:
    """The text of a room.

    >>> prompt_of(World(), Room(5, 12, 3))
    'agent b2 key d1 door a4 :'
    """
    agent, key, door = (cell_name(world, cell) for cell in room)
    return f"agent {agent} key {key} door {door} :"


def room_of(world: World, prompt: str) -> Room:
    """The room of a text.

    Raises:
      ValueError: the text is not that of a room of this world.

    >>> room_of(World(), "agent b2 key d1 door a4 :")
    Room(agent=5, key=12, door=3)
    """
    words = prompt.split()
    cells = {cell_name(world, i): i for i in range(world.size**2)}
    found = [cells.get(word) for word in words[1:6:2]]
    whole = len(found) == 3 and None not in found
    if not whole or words != prompt_of(world, Room(*found)).split():
        raise ValueError(f"{prompt!r} is no room of a grid of {world.size} cells.")
    return Room(*found)


def moves_of(response: str) -> list[int]:
    """Numbers of the moves of a response.

    Raises:
      ValueError: a word is no move.

    >>> moves_of("up left")
    [0, 2]
    """
    unknown = [word for word in response.split() if word not in MOVES]
    if unknown:
        raise ValueError(f"moves are {', '.join(MOVES)}; got {unknown[0]!r}.")
    return [MOVES.index(word) for word in response.split()]


def start(room: Room) -> State:
    """The state before the first move."""
    return State(0, room.agent, 0)


def step(world: World, room: Room, state: State, move: int) -> tuple[State, bool]:
    """The state after a move, and whether it has won.

    >>> step(World(), Room(0, 1, 2), State(0, 0, 0), 3)
    (State(moved=1, cell=1, has_key=1), False)
    """
    row, column = divmod(state.cell, world.size)
    down, right = _STEPS[move]
    row = min(max(row + down, 0), world.size - 1)
    column = min(max(column + right, 0), world.size - 1)
    cell = row * world.size + column
    has_key = int(state.has_key or cell == room.key)
    return State(state.moved + 1, cell, has_key), bool(has_key and cell == room.door)


def states_along(world: World, room: Room, moves: Sequence[int]):
    """The states before each move that is made, and whether the room was won.

    Args:
      world: sizes.
      room: where things stand.
      moves: of a response; what comes after a win or after `max_moves` is not made.

    Returns:
      (states, won).
    """
    states, state = [], start(room)
    for move in moves:
        if len(states) == world.max_moves:
            break
        states.append(state)
        state, won = step(world, room, state, move)
        if won:
            return states, True
    return states, False


def solve(world: World, room: Room) -> Solution:
    """V*, Q* and pi* of every state, by going back from the last move.

    The agent's own cell in `room` does not matter.

    >>> found = solve(World(size=2, max_moves=4), Room(0, 1, 3))
    >>> bool(found.value[0, 0, 0] < found.value[1, 1, 1] < 1)
    True
    """
    return _solved(world, room.key, room.door)


@functools.lru_cache(maxsize=4096)
def _solved(world: World, key: int, door: int) -> Solution:
    room, cells, moves = Room(key, key, door), world.size**2, len(MOVES)
    value = np.zeros((world.max_moves + 1, cells, 2))
    q = np.zeros((world.max_moves, cells, 2, moves))
    for moved in reversed(range(world.max_moves)):
        for cell in range(cells):
            for has_key in range(2):
                for move in range(moves):
                    after, won = step(world, room, State(moved, cell, has_key), move)
                    ahead = (1.0 if won else value[after]) - world.move_cost
                    q[moved, cell, has_key, move] = ahead - world.beta * np.log(moves)
        value[moved] = world.beta * np.logaddexp.reduce(q[moved] / world.beta, axis=-1)
    return Solution(q=q, value=value, logps=(q - value[:-1, ..., None]) / world.beta)


def split_of(world: World, room: Room) -> str:
    """The split that a room belongs to, by its hash."""
    digest = hashlib.blake2b(bytes(room), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < world.test_rate:
        return "test"
    return "validation" if place < world.test_rate + world.validation_rate else "train"


def rooms(world: World, split: str, num: int, seed: int) -> list[Room]:
    """Rooms of a split, none twice.

    Args:
      world: sizes and splits.
      split: one of `SPLITS`.
      num: of rooms. The first ones are the same for every `num`.
      seed: of their order, non-negative.

    Raises:
      ValueError: there is no such split, or it has fewer.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    cells = range(world.size**2)
    every = [Room(a, k, d) for a in cells for k in cells for d in cells]
    every = [room for room in every if len(set(room)) == 3]
    found = [room for room in every if split_of(world, room) == split]
    if num > len(found):
        raise ValueError(
            f"`num` may be at most {len(found)}, the {split} rooms of a grid of "
            f"{world.size} by {world.size}; got {num}."
        )
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(found))
    return [found[i] for i in order[:num]]


def play(world: World, room: Room, solution: Solution, rng) -> list[int]:
    """Moves drawn from pi*, to the end of the response."""
    moves, state, won = [], start(room), False
    while not won and state.moved < world.max_moves:
        logps = solution.logps[state]
        moves.append(int((logps + rng.gumbel(size=len(MOVES))).argmax()))
        state, won = step(world, room, state, moves[-1])
    return moves


def demonstrations(
    world: World, rooms: Sequence[Room], num: int, seed: int
) -> list[dict[str, str]]:
    """Responses of pi* to these rooms, one room after the other, again and again.

    Args:
      world: sizes.
      rooms: of a split.
      num: of rows `{"prompt": ..., "response": ...}`.
      seed: of the moves, non-negative.
    """
    rng = np.random.default_rng([seed, 7])
    rows = []
    for i in range(num):
        room = rooms[i % len(rooms)]
        moves = play(world, room, solve(world, room), rng)
        response = "".join(f" {MOVES[move]}" for move in moves)
        rows.append({"prompt": prompt_of(world, room), "response": response})
    return rows


def worst_move(
    world: World, room: Room, solution: Solution, moves: Sequence[int], rng
) -> tuple[int, list[int]]:
    """A response with one of its moves replaced by the worst one there.

    Args:
      world: sizes.
      room: where things stand.
      solution: of the room.
      moves: of the response.
      rng: draws the place, any but the last.

    Returns:
      (place, moves); the moves behind the place are the same, and may lead elsewhere.

    Raises:
      ValueError: the response has fewer than two moves.
    """
    states, _ = states_along(world, room, moves)
    if len(states) < 2:
        raise ValueError("a response of one move has no move but its last.")
    place = int(rng.integers(len(states) - 1))
    q = solution.q[states[place]].copy()
    q[moves[place]] = np.inf
    changed = list(moves)
    changed[place] = int(q.argmin())
    return place, changed


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word of the world."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cells = [cell_name(world, i) for i in range(world.size**2)]
    words = [END_TOKEN, "agent", "key", "door", ":", *MOVES, *cells]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=END_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN)
