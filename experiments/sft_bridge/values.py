"""V of an SFT model against V*: what it tells, and what would tell the same.

For every seed a small language model learns to write responses of the reference policy
(any move alike: the base), and from there, by SFT, demonstrations of pi*. Then it plays
in rooms that no training saw. At every state of its responses the log-sum-exp of its
logits is held against V*, which is known, and against what became of the response.

DPO goes on from there, on pairs of the SFT model's own of which one wins: that logits
are values is known of DPO, and its V stands beside. So does what needs no value
function at all:

    entropy            minus that of the next token: a sure model may be near its goal
    sureness           log of the sum of its squared probabilities, which lies between
                       the likeliest token's and its square
    moves left         what every room has in common
    base               V of the model before SFT
    untrained          V of a network with the same shape and other parameters
    shifted            V of the SFT model plus a number drawn for every state, of V's
                       own spread: it changes no probability

The last one is the caveat made a number: a V that the loss does not fix may be lost
without any change of the policy.

Source: arXiv:2507.00018; the design of this test is ours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.stats

from experiments.worlds import key_door, methods
from experiments.worlds.jobs import Job
from experiments.worlds.models import DecoderSizes, make_model
from experiments.worlds.pipeline import Pipeline, store_anchor
from experiments.worlds.sampled import sample_pairs
from experiments.worlds.token_numbers import Numbers, read_model
from pref_jax.data import records, templates
from pref_jax.train import sharding
from pref_jax.train.stage import StageConfig
from pref_jax.types import TokenGroup

SFT, DPO = "V of the SFT model", "V of the DPO model"
CONTROLS = (
    "minus entropy of the SFT model",
    "sureness of the SFT model",
    "moves left",
    "V of the base model",
    "V of an untrained model",
    "V of the SFT model, shifted",
)
"""What would tell the same without a value."""

SIGNALS = (SFT, DPO, *CONTROLS)
"""What is held against V*."""

_SAMPLING_USE, _PAIRS_USE, _MEASURING_SEED = 1, 2, 99


@dataclasses.dataclass(frozen=True)
class ValuesConfig:
    """The part on values; all numbers are ours."""

    base: StageConfig  # on responses of the reference policy
    sft: StageConfig  # on demonstrations
    dpo: StageConfig  # on pairs of the SFT model's own
    world: key_door.World = key_door.World()
    decoder: DecoderSizes = DecoderSizes(
        width=64, num_layers=3, num_heads=4, num_kv_heads=4, mlp_width=192
    )
    num_rooms: int = 1_500  # that are trained on
    num_demonstrations: int = 20_000  # and as many responses of the reference policy
    num_test_rooms: int = 300
    num_samples: int = 4  # responses to each, and to each room of the pairs
    num_seeds: int = 5

    def __post_init__(self):
        if self.num_seeds < 2:
            raise ValueError(f"`num_seeds` must be 2 or more; got {self.num_seeds}.")


@dataclasses.dataclass(frozen=True)
class Played:
    """A response of the model: the states that it went through, and its end.

    Attributes:
      room: where things stand.
      ids: i[n], tokens of the moves that were made.
      states: n states, each before its move.
      won: whether the door was reached with the key.
      place: of the move that `changed` replaces.
      changed: ids with the worst move at `place`.
    """

    room: key_door.Room
    ids: np.ndarray
    states: list[key_door.State]
    won: bool
    place: int
    changed: np.ndarray


def reference_rows(world, rooms, num: int, seed: int) -> list[dict[str, str]]:
    """Responses of the reference policy, as `key_door.demonstrations` has those of pi*.

    They end where the room is won, or with the last move.
    """
    rng = np.random.default_rng([seed, 8])
    rows = []
    for i in range(num):
        room = rooms[i % len(rooms)]
        moves = rng.integers(len(key_door.MOVES), size=world.max_moves)
        states, _ = key_door.states_along(world, room, moves)
        text = "".join(f" {key_door.MOVES[m]}" for m in moves[: len(states)])
        rows.append({"prompt": key_door.prompt_of(world, room), "response": text})
    return rows


def read_played(world, room, ids, move_ids, rng) -> Played | None:
    """What a sampled response did in its room; None: fewer than two moves.

    What is no move, and all behind it, is not made.

    Args:
      world: sizes.
      room: where things stand.
      ids: of the response.
      move_ids: the token of each move.
      rng: draws the move that is replaced.
    """
    moves = []
    for token in ids:
        if token not in move_ids:
            break
        moves.append(move_ids.index(token))
    states, won = key_door.states_along(world, room, moves)
    if len(states) < 2:
        return None
    moves = moves[: len(states)]
    solution = key_door.solve(world, room)
    place, changed = key_door.worst_move(world, room, solution, moves, rng)
    return Played(
        room=room,
        ids=np.array([move_ids[m] for m in moves], np.int32),
        states=states,
        won=won,
        place=place,
        changed=np.array([move_ids[m] for m in changed], np.int32),
    )


def true_values(world, played: Played) -> np.ndarray:
    """V* of every state of a response: f64[n]."""
    value = key_door.solve(world, played.room).value
    return np.array([value[state] for state in played.states])


def correlations(signals: dict[str, np.ndarray], truth) -> dict[str, float]:
    """Spearman's correlation of each signal with V* over all states.

    Args:
      signals: name -> f64[states].
      truth: f64[states].
    """
    return {
        name: float(scipy.stats.spearmanr(values, truth).statistic)
        if len(np.unique(values)) > 1 and len(np.unique(truth)) > 1
        else 0.0
        for name, values in signals.items()
    }


def at_each_move(signals: dict[str, np.ndarray], truth, moved) -> dict[str, float]:
    """`correlations` among states after the same number of moves, averaged over them.

    Numbers of moves that fewer than 20 states have made are left out; each of the
    others counts by its states.

    Args:
      signals: name -> f64[states].
      truth: f64[states].
      moved: i[states], moves that were made.
    """
    numbers, counts = np.unique(moved, return_counts=True)
    many = counts >= 20
    if not many.any():
        return dict.fromkeys(signals, 0.0)
    found = [
        correlations(
            {name: x[moved == n] for name, x in signals.items()}, truth[moved == n]
        )
        for n in numbers[many]
    ]
    return {
        name: float(np.average([part[name] for part in found], weights=counts[many]))
        for name in signals
    }


def beyond(values, truth, controls: Sequence[np.ndarray]) -> float:
    """Correlation of what is left of a signal and of V* beside the controls.

    All are ranked; the ranks of the signal and of V* are fitted by those of the
    controls, and what the fits leave is correlated: Spearman's partial correlation.

    Args:
      values: f64[states], the signal.
      truth: f64[states], V*.
      controls: each f64[states].
    """
    ranks = [scipy.stats.rankdata(x) for x in (values, truth, *controls)]
    known = np.stack([np.ones(len(truth)), *ranks[2:]], axis=1)
    left = [x - known @ np.linalg.lstsq(known, x, rcond=None)[0] for x in ranks[:2]]
    spreads = [x.std() for x in left]
    if min(spreads) < 1e-9 * len(truth):
        return 0.0
    return float(np.corrcoef(*left)[0, 1])


def success_auc(signals: dict[str, np.ndarray], won) -> dict[str, float]:
    """How often states of responses that win have more of a signal than the others.

    Ties are half; 0.5 if all responses win, or none does.

    Args:
      signals: name -> f64[states].
      won: bool[states].
    """
    if won.all() or not won.any():
        return dict.fromkeys(signals, 0.5)
    return {
        name: float(
            scipy.stats.mannwhitneyu(values[won], values[~won]).statistic
            / (won.sum() * (~won).sum())
        )
        for name, values in signals.items()
    }


def measure(
    config: ValuesConfig,
    played: Sequence[Played],
    read: dict[str, list[list[Numbers]]],
    seed: int,
    *,
    num_too_short: int,
) -> dict[str, np.ndarray]:
    """Every signal against V*, against the end, and at a wrong move.

    Args:
      config: sizes.
      played: responses.
      read: "SFT", "DPO", "base" and "untrained" -> for each response the numbers of it,
        and of its changed copy.
      seed: of the shifts.
      num_too_short: responses of fewer than two moves, which are in no signal: none of
        them has won.

    Returns:
      `correlation`, `at_move`, `auc` and `drop`, each f64[signals]: the second is the
      first among states after as many moves, the last how often the signal is higher
      after the move of the response than after the worst one, at the same place; and
      `beyond`, the partial correlation of V of the SFT model; `won`, the share of
      all responses that win.
    """
    world = config.world
    rng = np.random.default_rng([seed, 9])

    def values_of(copy: int):
        """name -> one array a response, a number before every move."""
        sft = [numbers[copy] for numbers in read["SFT"]]
        found = {
            SFT: [x["value"] for x in sft],
            DPO: [x[copy]["value"] for x in read["DPO"]],
            "minus entropy of the SFT model": [-x["entropy"] for x in sft],
            "sureness of the SFT model": [x["log_sum_sq"] for x in sft],
            "moves left": [
                world.max_moves - np.arange(len(x["value"]), dtype=float) for x in sft
            ],
            "V of the base model": [x[copy]["value"] for x in read["base"]],
            "V of an untrained model": [x[copy]["value"] for x in read["untrained"]],
        }
        spread = np.concatenate(found[SFT]).std()
        found["V of the SFT model, shifted"] = [
            x + rng.normal(0, spread, len(x)) for x in found[SFT]
        ]
        return found

    own, changed = values_of(0), values_of(1)
    joined = {name: np.concatenate(own[name]) for name in SIGNALS}
    truth = np.concatenate([true_values(world, p) for p in played])
    won = np.concatenate([np.full(len(p.states), p.won) for p in played])
    moved = np.concatenate([[state.moved for state in p.states] for p in played])
    found = correlations(joined, truth)
    same = at_each_move(joined, truth, moved)
    aucs = success_auc(joined, won)
    drops = {}
    for name in SIGNALS:
        after = [
            (x[p.place + 1], y[p.place + 1])
            for p, x, y in zip(played, own[name], changed[name], strict=True)
        ]
        ours, theirs = np.array(after).T
        drops[name] = float(np.mean((ours > theirs) + 0.5 * (ours == theirs)))
    controls = [
        joined[name]
        for name in (
            "minus entropy of the SFT model",
            "sureness of the SFT model",
            "moves left",
        )
    ]
    return {
        "correlation": np.array([found[name] for name in SIGNALS]),
        "at_move": np.array([same[name] for name in SIGNALS]),
        "auc": np.array([aucs[name] for name in SIGNALS]),
        "drop": np.array([drops[name] for name in SIGNALS]),
        "beyond": beyond(joined[SFT], truth, controls),
        "states": len(truth),
        "won": sum(p.won for p in played) / (len(played) + num_too_short),
        "too_short": num_too_short,
    }


def _groups(encoder, played: Sequence[Played], world) -> list[TokenGroup]:
    """Each response and its changed copy, as one group."""
    return [
        TokenGroup(
            prompt=encoder.encode_prompt(key_door.prompt_of(world, p.room)),
            responses=(p.ids, p.changed),
            loss_masks=(np.ones(len(p.ids), bool),) * 2,
            labels=(0.0, 0.0),
            record=i,
        )
        for i, p in enumerate(played)
    ]


def run(config: ValuesConfig, folder, guard, seed: int) -> dict:
    """Train the models of a seed, let that of SFT play, and measure."""
    world, mesh = config.world, sharding.make_mesh()
    tokenizer = key_door.train_tokenizer(world)
    encoder = templates.TextEncoder(tokenizer)
    rooms = key_door.rooms(world, "train", config.num_rooms, seed)
    heldout = key_door.rooms(world, "validation", 64, seed)

    def encoded(make, rooms, num):
        return encoder.encode_all(
            records.from_objects(make(world, rooms, num, seed=seed))
        )

    model, start = make_model(
        config.decoder, mesh, vocab_size=len(tokenizer), seed=seed
    )
    pipeline = Pipeline(
        folder=folder / f"seed{seed}",
        guard=guard,
        mesh=mesh,
        model=model,
        encoder=encoder,
        seed=seed,
        max_new_tokens=world.max_moves + 1,
    )
    params, trained = start, {}
    for name, make, stage in (
        ("base", reference_rows, config.base),
        ("SFT", key_door.demonstrations, config.sft),
    ):
        groups = encoded(make, rooms, config.num_demonstrations)
        params, _ = pipeline.train(
            name,
            methods.make_sft(),
            params,
            groups,
            encoded(make, heldout, 512),
            stage,
            unit="responses",
        )
        trained[name] = params
    params, num_pairs = _align(config, pipeline, params, rooms)
    trained["DPO"] = params
    tests = key_door.rooms(world, "test", config.num_test_rooms, seed)
    prompts = [key_door.prompt_of(world, room) for room in tests]
    samples = pipeline.sample(
        trained["SFT"], prompts, num_samples=config.num_samples, use=_SAMPLING_USE
    )
    move_ids = tokenizer.convert_tokens_to_ids(list(key_door.MOVES))
    rng = np.random.default_rng([seed, 10])
    found = [
        read_played(world, room, row[:n].tolist(), move_ids, rng)
        for room, rows, lengths in zip(
            tests, samples.tokens, samples.length, strict=True
        )
        for row, n in zip(rows, lengths, strict=True)
    ]
    played = [p for p in found if p is not None]
    if not played:
        raise ValueError(
            "no response of the SFT model makes two moves; train it for longer."
        )
    _, untrained = make_model(
        config.decoder, mesh, vocab_size=len(tokenizer), seed=seed + _MEASURING_SEED
    )
    groups = _groups(encoder, played, world)
    read = {
        name: read_model(
            name,
            model,
            params,
            groups,
            beta=world.beta,
            groups_per_step=64,
            mesh=mesh,
        )
        for name, params in (*trained.items(), ("untrained", untrained))
    }
    wins = [
        key_door.states_along(world, room, key_door.play(world, room, solution, rng))[1]
        for room in tests
        for solution in [key_door.solve(world, room)]
        for _ in range(config.num_samples)
    ]
    return measure(
        config, played, read, seed, num_too_short=len(found) - len(played)
    ) | {
        "won_by_best": float(np.mean(wins)),
        "pairs": num_pairs,
    }


def _align(config: ValuesConfig, pipeline: Pipeline, params, rooms):
    """DPO from the SFT model, on pairs of its own, and how many they are.

    Of two responses to a room the one that wins is chosen; both or none is no pair. A
    twentieth of the pairs validates.
    """

    def grade(prompt, response):
        room = key_door.room_of(config.world, prompt)
        moves = itertools.takewhile(key_door.MOVES.__contains__, response.split())
        numbers = [key_door.MOVES.index(move) for move in moves]
        return {"reward": float(key_door.states_along(config.world, room, numbers)[1])}

    pairs = sample_pairs(
        pipeline,
        params,
        [key_door.prompt_of(config.world, room) for room in rooms],
        grade,
        num_samples=config.num_samples,
        use=_PAIRS_USE,
        path=pipeline.folder / "pairs.jsonl",
    )
    groups = store_anchor(pipeline, "pairs", params, pairs, config.dpo)
    heldout = max(1, len(groups) // 20)
    params, _ = pipeline.train(
        "DPO",
        methods.make_dpo(config.world.beta),
        params,
        groups[:-heldout],
        groups[-heldout:],
        config.dpo,
        unit="pairs",
    )
    return params, len(pairs)


def jobs(config: ValuesConfig, folder, guard) -> list[Job]:
    """A job for each seed: three trainings, and what is read of them."""
    stages = (config.base, config.sft, config.dpo)
    steps = sum(stage.loop.num_steps for stage in stages)
    return [
        Job(
            f"values/seed{seed}",
            len(stages),
            40 + 0.05 * steps,
            lambda results, seed=seed: run(config, folder, guard, seed),
        )
        for seed in range(1, config.num_seeds + 1)  # 0 was tried to set sizes
    ]
