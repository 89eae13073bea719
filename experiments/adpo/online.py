"""Anchors that move while the policy meets new contexts: fixed, followed, renewed.

In every step the policy draws candidates for fresh contexts, without replacement, and
sees their labels once. The target is the softmax of the labels, standardised within the
candidates; the loss compares the candidates alone. Each anchor has the same nine
settings to choose from, on the scenario's validation contexts.

Source: the online algorithm of ADPO, arXiv:2510.18913 (December text); its sizes are
not published, and all numbers are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adpo.arms import Setting
from experiments.adpo.suite import (
    MEDIUM,
    Case,
    best_setting,
    start_runs,
    tuning_seeds,
)
from experiments.worlds import bandits
from experiments.worlds.jobs import Job, in_blocks
from pref_jax import anchors, targets
from pref_jax.losses.policy_gradient import group_advantages
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step

FIXED = "fixed"

ANCHORS = {
    FIXED: anchors.fixed(bandits.score),
    "snapshot, every 50": anchors.snapshot(every=50, score=bandits.score),
    "snapshot, every 200": anchors.snapshot(every=200, score=bandits.score),
    "EMA": anchors.ema(decay=0.99, score=bandits.score),
    "on policy": anchors.snapshot(every=1, score=bandits.score),
}
"""What is compared; all but the first move."""

SETTINGS = tuple(
    Setting(tau, 0.5, rate)
    for tau, rate in itertools.product((0.5, 1.0, 2.0), (2.5e-4, 5e-4, 1e-3))
)
"""What each anchor chooses from; the temperature, of standardised labels, is ours."""


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """The online part."""

    world: bandits.World = bandits.World()
    num_offered: int = 32  # items of a context; ours
    num_drawn: int = 8  # of them, the candidates; ours
    num_steps: int = 600  # ours
    measure_every: int = 50  # steps
    num_seeds: int = 10
    num_tuning_seeds: int = 2
    runs_at_once: int = 20  # in one compiled program

    def __post_init__(self):
        if not 2 <= self.num_drawn <= self.num_offered:
            raise ValueError(
                f"`num_drawn` needs 2 <= num_drawn <= num_offered; got "
                f"{self.num_drawn} and {self.num_offered}."
            )
        if self.measure_every < 1 or self.num_steps % self.measure_every:
            raise ValueError(
                f"`num_steps` must be a multiple of `measure_every`; got "
                f"{self.num_steps} and {self.measure_every}."
            )


def draw_candidates(key, logps, num: int):
    """Draws items without replacement, by the policy, through Gumbel noise.

    Args:
      key: of the draw.
      logps: f32[B, K], nats.
      num: of each context's items.

    Returns:
      i32[B, num].
    """
    return jax.lax.top_k(logps + jax.random.gumbel(key, logps.shape), num)[1]


def _one(anchor, config: OnlineConfig, data, started, noise, setting):
    """Win mass along the way, the start first: f32[points] by set."""
    world = config.world
    key, reference = started
    keys = jax.random.split(key)
    policy = bandits.Policy(world.size, world.hidden)

    def make_targets(labels):
        advantages = group_advantages(labels)
        return targets.softmax(advantages, temperature=setting.temperature)

    method = bandits.make_list_method(
        "ADPO", anchor, beta=1 / setting.tau, make_targets=make_targets
    )
    optimizer = bandits.make_optimizer(world, setting.learning_rate)
    step = make_train_step(method, policy, optimizer)
    state = init_state(reference, optimizer, rng=keys[0], anchor=reference)
    pairs = bandits.all_pairs(config.num_drawn)

    def one(state, key):
        keys = jax.random.split(key, 3)
        context, items = bandits.draw_contexts(
            keys[0], world.groups_per_step, world.size, config.num_offered
        )
        logps = policy.logps(state.params, context, items)
        picked = draw_candidates(keys[1], logps, config.num_drawn)
        items = jnp.take_along_axis(items, picked[..., None], axis=1)
        rewards = data.truth.rewards(context, items)
        labels = bandits.spoil(keys[2], rewards, noise)
        return step(state, bandits.make_batch(context, items, labels, pairs))[0], None

    def measured(state):
        def win_mass(batch):
            logps, reference_logps = (
                policy.logps(params, batch.context, batch.items)
                for params in (state.params, reference)
            )
            measures = bandits.measure(logps, reference_logps, batch.labels)
            return measures["win_mass"]

        return {
            "validation": win_mass(data.validation),
            "test": win_mass(data.test),
        }

    def stretch(state, keys):
        state = jax.lax.scan(one, state, keys)[0]
        return state, measured(state)

    num_points = config.num_steps // config.measure_every
    keys = jax.random.split(keys[1], config.num_steps)
    keys = keys.reshape(num_points, config.measure_every)
    _, found = jax.lax.scan(stretch, state, keys)
    return jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), measured(state), found
    )


@functools.lru_cache(maxsize=2)
def _compiled(name: str, config: OnlineConfig):
    return jax.jit(jax.vmap(functools.partial(_one, ANCHORS[name], config)))


def run(
    name: str, config: OnlineConfig, cases: Sequence[Case]
) -> dict[str, np.ndarray]:
    """Win mass along the way of every case.

    Args:
      name: of `ANCHORS`.
      config: sizes.
      cases: the runs.

    Returns:
      "validation" and "test" -> f32[cases, points].
    """
    world = dataclasses.replace(config.world, num_items=config.num_offered)
    compute = _compiled(name, config)

    def block(rows):
        seeds, noises, settings = rows
        return compute(*start_runs(world, seeds, noises), noises, settings)

    return in_blocks(block, [case.row for case in cases], config.runs_at_once)


def _compare(name: str, config: OnlineConfig, results) -> dict:
    """Choose a setting for each scenario, then report it on other seeds."""
    del results
    seeds = tuning_seeds(config.num_tuning_seeds)
    cases = [Case(x, seed, s) for x in MEDIUM for s in SETTINGS for seed in seeds]
    tuning = run(name, config, cases)["validation"][:, -1]
    tuning = tuning.reshape(len(MEDIUM), len(SETTINGS), len(seeds))
    settings = [best_setting(SETTINGS, values) for values in tuning]
    seeds = range(config.num_seeds)
    cases = [
        Case(x, seed, s)
        for x, s in zip(MEDIUM, settings, strict=True)
        for seed in seeds
    ]
    found = run(name, config, cases)["test"]
    return {
        "settings": [dataclasses.asdict(setting) for setting in settings],
        "win_mass": found.reshape(len(MEDIUM), len(seeds), -1),
    }


def jobs(config: OnlineConfig) -> list[Job]:
    """Every anchor on the scenarios of medium severity."""
    num_runs = len(SETTINGS) * config.num_tuning_seeds + config.num_seeds
    num_runs *= len(MEDIUM)
    seconds = 15 + num_runs * config.num_steps * config.world.groups_per_step * 1e-5
    return [
        Job(
            f"online/{name}",
            num_runs,
            seconds,
            functools.partial(_compare, name, config),
        )
        for name in ANCHORS
    ]
