"""Arms on the twelve scenarios: tuned on clean validation, reported on clean tests.

Every arm has nine settings and the same seeds to choose one for each scenario, and
other seeds for the report, which all arms share: the same truth, contexts, labels,
reference and order of batches. Nothing is chosen on test contexts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adpo.arms import ADPO, ARMS, ONE_PAIR, SAME_PAIRS, Arm, Setting
from experiments.worlds import bandits
from experiments.worlds.jobs import Job, in_blocks

REFERENCE = "reference"
"""Name of the policy that all arms start from, in results."""

MEDIUM = tuple(name for name in bandits.SCENARIOS if name.endswith("medium"))
"""The scenarios of the sweeps."""

_FIRST_TUNING_SEED = 10_000
_NUM_BINS = 10  # of the calibration


@dataclasses.dataclass(frozen=True)
class BanditConfig:
    """The bandit suite."""

    world: bandits.World = bandits.World()
    num_steps: int = 400  # updates of a run; ours
    num_seeds: int = 10  # of a report; the paper's
    num_tuning_seeds: int = 2  # ours
    sizes: tuple[int, ...] = (128, 256)  # hidden sizes beside the world's; the paper's
    reference_steps: tuple[int, ...] = (100, 300)  # beside the world's; ours
    taus: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the sweep; ours
    temperatures: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # likewise
    runs_at_once: int = 20  # in one compiled program

    def __post_init__(self):
        for name in ("num_steps", "num_seeds", "num_tuning_seeds", "runs_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more; got {getattr(self, name)}."
                )
        if self.num_seeds >= _FIRST_TUNING_SEED:
            raise ValueError(
                f"`num_seeds` must be below {_FIRST_TUNING_SEED}, the first seed that "
                f"settings are chosen on; got {self.num_seeds}."
            )


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: what the labels went through, with which numbers, of which seed."""

    scenario: str  # a name of `bandits.SCENARIOS`
    seed: int
    setting: Setting = Setting()

    @property
    def row(self) -> tuple:
        """Seed, noise and setting as numbers that are mapped over."""
        numbers = bandits.SCENARIOS[self.scenario], self.setting
        return np.uint32(self.seed), *jax.tree.map(np.float32, numbers)


def _calibration(arm: Arm, setting, logps, anchor_logps, labels):
    """What the arm was to say of items, by what it says: means in bins of the latter.

    Returns:
      f32[bins, 3]: items of each bin, and the sums of p~ and of q over them.
    """
    said = jax.nn.softmax((logps - anchor_logps) / setting.tau)
    meant = arm.targets(labels, setting)
    place = jnp.clip((said * _NUM_BINS).astype(int), 0, _NUM_BINS - 1)
    of_bin = jax.nn.one_hot(place, _NUM_BINS)
    parts = jnp.stack([jnp.ones_like(said), said, meant], axis=-1)
    return jnp.einsum("bkn,bkc->nc", of_bin, parts)


def _run(arm: Arm | None, world: bandits.World, num_steps: int, data, started, setting):
    """A run from its data and reference to its measures, by "set/measure"."""
    key, reference = started
    policy = bandits.Policy(world.size, world.hidden)
    params, anchor = reference, reference
    if arm is not None:
        train = data.train
        if arm.sees == ONE_PAIR:
            train = dataclasses.replace(train, pairs=data.one_pair)
        state = bandits.train(
            arm.method(setting),
            policy,
            reference,
            train,
            key=key,
            groups_per_step=world.groups_per_step,
            num_steps=num_steps,
            optimizer=bandits.make_optimizer(world, setting.learning_rate),
        )
        params, anchor = state.params, state.anchor
    found = {}
    for name in ("validation", "test"):
        batch = getattr(data, name)
        logps, reference_logps = (
            policy.logps(p, batch.context, batch.items) for p in (params, reference)
        )
        measures = bandits.measure(logps, reference_logps, batch.labels)
        found |= {f"{name}/{key}": value for key, value in measures.items()}
    if arm is not None and arm.targets is not None:
        # Of the last set, the clean test contexts; without an anchor all logps are 0.
        scores = bandits.score(policy, params, batch)
        anchor_logps = arm.anchor.scores(policy, anchor, batch, scores).logp[..., 0]
        found["calibration"] = _calibration(
            arm, setting, logps, anchor_logps, batch.labels
        )
    return found


# Three programs, since what draws the data takes longest to compile, and is the same
# for all arms and all anchors.


@functools.lru_cache(maxsize=4)
def _compiled_draw(world: bandits.World):
    def draw(seed, noise):
        key = jax.random.split(jax.random.key(seed), 3)[0]
        return bandits.draw_data(key, world, noise)

    return jax.jit(jax.vmap(draw))


@functools.lru_cache(maxsize=4)
def _compiled_start(world: bandits.World):
    def start(seed, batch):
        keys = jax.random.split(jax.random.key(seed), 3)
        policy = bandits.Policy(world.size, world.hidden)
        steps = world.reference_steps
        params = bandits.train_reference(keys[1], world, policy, batch, steps)
        return keys[2], params

    return jax.jit(jax.vmap(start))


def start_runs(world: bandits.World, seeds, noises):
    """Data and reference of a block of runs: the same for all methods of a seed.

    Args:
      world: sizes.
      seeds: u32[runs].
      noises: `Noise` of f32[runs].

    Returns:
      (`bandits.Data`, (key of what is left to draw, the reference's parameters)), with
      an axis of runs.
    """
    # Neither the network nor the reference has a part in the data.
    draw = _compiled_draw(dataclasses.replace(world, hidden=0, reference_steps=0))
    data = draw(seeds, noises)
    return data, _compiled_start(world)(seeds, data.reference)


@functools.lru_cache(maxsize=4)
def _compiled_run(arm: Arm | None, world: bandits.World, num_steps: int):
    return jax.jit(jax.vmap(functools.partial(_run, arm, world, num_steps)))


def run(
    arm: Arm | None,
    world: bandits.World,
    cases: Sequence[Case],
    *,
    num_steps: int,
    runs_at_once: int,
) -> dict[str, np.ndarray]:
    """Train and measure every case, a block at a time in one compiled program.

    Args:
      arm: the method; None: the reference itself.
      world: sizes.
      cases: the runs.
      num_steps: updates of each.
      runs_at_once: of a block; the last one is filled up.

    Returns:
      "set/measure" -> f32[len(cases)]; of a listwise arm also `calibration`,
      f32[len(cases), bins, 3].
    """
    compute = _compiled_run(arm, world, num_steps)

    def block(rows):
        seeds, noises, settings = rows
        return compute(*start_runs(world, seeds, noises), settings)

    return in_blocks(block, [case.row for case in cases], runs_at_once)


def tuning_seeds(num: int) -> range:
    """Seeds that settings are chosen on; none of them is reported."""
    return range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + num)


def best_setting(settings: Sequence[Setting], win_mass) -> Setting:
    """The setting of the highest mean over seeds; what diverged is not chosen.

    Args:
      settings: to choose from.
      win_mass: f32[settings, seeds], on validation contexts.
    """
    means = np.nan_to_num(np.mean(win_mass, axis=-1), nan=-1.0)
    return settings[int(means.argmax())]


def _tune(arm: Arm, config: BanditConfig) -> dict[str, dict]:
    """scenario -> the setting of the highest mean win mass on validation contexts."""
    settings = arm.settings()
    seeds = tuning_seeds(config.num_tuning_seeds)
    cases = [
        Case(scenario, seed, setting)
        for scenario in bandits.SCENARIOS
        for setting in settings
        for seed in seeds
    ]
    found = run(
        arm,
        config.world,
        cases,
        num_steps=config.num_steps,
        runs_at_once=config.runs_at_once,
    )["validation/win_mass"]
    found = found.reshape(len(bandits.SCENARIOS), len(settings), len(seeds))
    return {
        scenario: dataclasses.asdict(best_setting(settings, values))
        for scenario, values in zip(bandits.SCENARIOS, found, strict=True)
    }


def _report(
    arm: Arm | None,
    world: bandits.World,
    settings: Mapping[str, Setting],
    config: BanditConfig,
) -> dict[str, np.ndarray]:
    """Measures on test contexts: measure -> f32[scenarios, seeds].

    `calibration` is f32[bins, 3], of all runs together.
    """
    cases = [
        Case(scenario, seed, setting)
        for scenario, setting in settings.items()
        for seed in range(config.num_seeds)
    ]
    found = run(
        arm,
        world,
        cases,
        num_steps=config.num_steps,
        runs_at_once=config.runs_at_once,
    )
    measures = {
        name.removeprefix("test/"): values.reshape(len(settings), config.num_seeds)
        for name, values in found.items()
        if name.startswith("test/")
    }
    if "calibration" in found:
        measures["calibration"] = found["calibration"].sum(axis=0)
    return measures


# --- the jobs -------------------------------------------------------------------------

COMPARED = (ADPO, "DPO, one pair", "DPO, all pairs", "unanchored list", "PPO")
"""Arms that are also trained with larger networks."""


def _seconds(num_runs: int, config: BanditConfig, hidden: int) -> float:
    """Of so many runs, as measured on two cores; a larger network takes more."""
    updates = config.num_steps + config.world.reference_steps
    share = config.world.groups_per_step / 128 * (hidden / 64) ** 1.2
    return 2 + num_runs * updates * share * 7e-4


def jobs(config: BanditConfig) -> list[Job]:
    """Everything that the suite computes."""
    found = []
    world, num_seeds = config.world, config.num_seeds

    def add(name, num_runs, compute, hidden=world.hidden):
        seconds = _seconds(num_runs, config, hidden)
        found.append(Job(f"bandits/{name}", num_runs, seconds, compute))

    def tuned(results, arm, scenarios):
        settings = results[f"bandits/tuned/{arm.name}"]
        return {name: Setting(**settings[name]) for name in scenarios}

    def report(arm, scenarios, world=world, **changes):
        def compute(results):
            settings = {
                name: dataclasses.replace(setting, **changes)
                for name, setting in tuned(results, arm, scenarios).items()
            }
            return _report(arm, world, settings, config)

        return compute

    every = tuple(bandits.SCENARIOS)
    add(
        REFERENCE,
        len(every) * num_seeds,
        lambda results: _report(None, world, dict.fromkeys(every, Setting()), config),
    )
    for arm in ARMS.values():
        num_tuning = len(every) * len(arm.settings()) * config.num_tuning_seeds
        add(
            f"tuned/{arm.name}", num_tuning, lambda results, arm=arm: _tune(arm, config)
        )
        add(f"test/{arm.name}", len(every) * num_seeds, report(arm, every))
    num_runs = len(MEDIUM) * num_seeds
    for hidden in config.sizes:
        larger = dataclasses.replace(world, hidden=hidden)
        for name in COMPARED:
            compute = report(ARMS[name], MEDIUM, larger)
            add(f"size/{hidden}/{name}", num_runs, compute, hidden)
    for steps in config.reference_steps:
        better = dataclasses.replace(world, reference_steps=steps)
        for name in (name for arms in SAME_PAIRS for name in arms):
            compute = report(ARMS[name], MEDIUM, better)
            add(f"quality/{steps}/{name}", num_runs, compute)
    for tau in config.taus:
        add(f"tau/{tau}", num_runs, report(ARMS[ADPO], MEDIUM, tau=tau))
    for temperature in config.temperatures:
        compute = report(ARMS[ADPO], MEDIUM, temperature=temperature)
        add(f"temperature/{temperature}", num_runs, compute)
    return found
