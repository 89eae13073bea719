"""The ways through SFT and DPO that are compared, and what each may choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.worlds import instructions
from experiments.worlds.models import DecoderSizes
from pref_jax.train.stage import StageConfig

TUNING_SEED = 10_000  # the first of them
RATES = "rates"  # the job that finds the whole rate
PLAIN, RATE, KL, DECAY = "plain", "rate", "KL", "decay"
NO_SFT, JOINT = "no SFT", "joint"
DIVERGENCES = ("chi-squared", "hellinger", "jensen-shannon")


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """The part on SFT and DPO; all numbers are ours."""

    base: StageConfig  # on text and on what the crowd writes
    world: instructions.World = instructions.World(  # its crowd
        wrong_rate=0.3, sloppy_rate=0.6, wordy_rate=0.6
    )
    expert: instructions.World = instructions.World(  # good, and nearly always wordy
        wrong_rate=0.1, sloppy_rate=0.1, wordy_rate=0.9
    )
    decoder: DecoderSizes = DecoderSizes(
        width=96, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=288
    )
    num_documents: int = 18_000
    num_crowd: int = 18_000  # prompts with responses of the crowd
    crowd_share: float = 0.1  # of them in the groups that the base learns
    num_demonstrations: int = 1_600
    num_pairs: int = 4_000
    label_temperature: float = 0.1  # of the judge, in reward
    groups_per_step: int = 32  # of SFT and of DPO
    sft_steps: int = 150  # three epochs
    dpo_steps: int = 125  # one epoch
    warmup: float = 0.1  # share of a stage
    sft_rates: tuple[float, ...] = (7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3)
    fractions: tuple[float, ...] = (0.5, 0.25, 0.1)  # of the best of them
    dpo_betas: tuple[float, ...] = (0.003, 0.01, 0.03)
    dpo_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4)
    kl_weights: tuple[float, ...] = (0.1, 0.3, 1.0)
    decay_weights: tuple[float, ...] = (10.0, 30.0, 100.0)  # times the rate
    divergence_betas: tuple[float, ...] = (0.03, 0.1, 0.3)
    joint_weights: tuple[float, ...] = (0.3, 1.0, 3.0)  # lambda
    joint_rates: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)  # of the best of them
    stop_every: int = 2  # updates between two looks at the loss to stop at
    num_heldout: int = 320  # demonstrations and pairs
    num_eval_prompts: int = 300
    num_tuning_prompts: int = 200
    eval_samples: int = 4
    max_new_tokens: int = 32
    num_tuning_seeds: int = 2  # that settings are chosen on
    num_seeds: int = 5  # that are reported

    @property
    def joint_steps(self) -> int:
        """Updates of the joint stage: those of both others."""
        return self.sft_steps + self.dpo_steps

    def __post_init__(self):
        if not 2 <= self.num_seeds < TUNING_SEED:
            raise ValueError(
                f"`num_seeds` must lie in [2, {TUNING_SEED}); got {self.num_seeds}."
            )
        if self.num_tuning_seeds < 1:
            raise ValueError(
                f"`num_tuning_seeds` must be 1 or more; got {self.num_tuning_seeds}."
            )
        rates = ("wrong_rate", "sloppy_rate", "wordy_rate")
        same = {name: getattr(self.world, name) for name in rates}
        if dataclasses.replace(self.expert, **same) != self.world:
            raise ValueError(
                f"`world` and `expert` may differ in {', '.join(rates)} alone: they "
                f"need the same splits and the same reward."
            )
        budgets = {
            "dpo_betas": self.dpo_betas,
            "fractions": self.fractions,
            "kl_weights": self.kl_weights,
            "decay_weights": self.decay_weights,
            "divergence_betas": self.divergence_betas,
            "joint_weights": self.joint_weights,
        }
        if len(set(map(len, budgets.values()))) > 1 or len(self.joint_rates) != len(
            self.dpo_rates
        ):
            raise ValueError(
                f"every arm needs the same number of settings: {', '.join(budgets)} "
                f"are to have one length, and `dpo_rates` and `joint_rates` one."
            )
        if not 0 < self.crowd_share < 1:
            raise ValueError(
                f"`crowd_share` must lie in (0, 1); got {self.crowd_share}."
            )
        if not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(
                f"`fractions` are of the whole rate, which is an arm of its own: each "
                f"must lie in (0, 1); got {self.fractions}."
            )


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way through SFT, without the numbers that are chosen.

    Attributes:
      name: in tables.
      kind: `PLAIN`, `RATE`, `KL`, `DECAY`, `NO_SFT`, `JOINT` or one of `DIVERGENCES`;
        `RATE` is plain at a fraction of the whole learning rate.
      fraction: of the whole learning rate.
      knobs: values of its own number; None alone: it has none.
      stops: whether SFT ends at the validation loss of the reduced rate.
    """

    name: str
    kind: str = PLAIN
    fraction: float = 1.0
    knobs: tuple[float | None, ...] = (None,)
    stops: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an arm chooses."""

    knob: float | None  # its own number, if it has one
    dpo_beta: float
    dpo_rate: float


WHOLE = Arm("whole rate")
REDUCED = "reduced rate"  # that of the arms of `RATE` which does best
EARLY = Arm("early stop", stops=True)


def make_arms(config: StagesConfig) -> list[Arm]:
    """All arms; those that others need come first."""
    return [
        WHOLE,
        *(Arm(f"{x:g} of the rate", RATE, x) for x in config.fractions),
        EARLY,
        Arm("explicit KL", KL, knobs=config.kl_weights),
        Arm("decay to the base", DECAY, knobs=config.decay_weights),
        Arm("no SFT", NO_SFT),
        *(Arm(name, name, knobs=config.divergence_betas) for name in DIVERGENCES),
        Arm("joint", JOINT, knobs=config.joint_weights),
    ]


def settings_of(
    arm: Arm, config: StagesConfig, results: Mapping[str, dict]
) -> list[Setting]:
    """The settings that an arm chooses among; those of one knob together.

    An arm with a number of its own, a fraction of the rate among them, has the beta of
    DPO that the whole rate has chosen.

    Args:
      arm: what is trained.
      config: the values.
      results: of the rates and of the whole rate's choice, if the arm has a number of
        its own.
    """
    betas, rates = config.dpo_betas, config.dpo_rates
    if arm.kind not in (PLAIN, NO_SFT):
        betas = (chosen_setting(results, WHOLE, config).dpo_beta,)
    if arm.kind == JOINT:
        best = best_rate(results, config)
        rates = tuple(fraction * best for fraction in config.joint_rates)
    return [
        Setting(knob, beta, rate)
        for knob in arm.knobs
        for beta in betas
        for rate in rates
    ]


def seeds_of(config: StagesConfig) -> range:
    """The reported seeds: from 1 on, since sizes were set by trials of seed 0."""
    return range(1, config.num_seeds + 1)


def tuning_seeds(config: StagesConfig) -> range:
    """The seeds that settings are chosen on."""
    return range(TUNING_SEED, TUNING_SEED + config.num_tuning_seeds)


def tuned(results, job: str, key: str, config: StagesConfig) -> np.ndarray:
    """What a tuning job has found: f64[tuning seeds, ...]."""
    numbers = tuning_seeds(config)
    return np.array([results[f"stages/tune{n}/{job}"][key] for n in numbers], float)


def best_rate(results: Mapping[str, dict], config: StagesConfig) -> float:
    """The learning rate whose SFT has the lowest validation loss, over tuning seeds."""
    losses = tuned(results, RATES, "losses", config).mean(axis=0)
    return config.sft_rates[int(np.nanargmin(losses))]


def chosen_setting(results, arm: Arm, config: StagesConfig) -> Setting:
    """The setting with the highest reward, a mean over the tuning seeds."""
    rewards = tuned(results, arm.name, "rewards", config).mean(axis=0)
    return settings_of(arm, config, results)[int(np.argmax(rewards))]


def reduced_arm(results, config: StagesConfig) -> Arm:
    """The fraction of the whole rate that is best with its best setting."""
    return max(
        (arm for arm in make_arms(config) if arm.kind == RATE),
        key=lambda arm: tuned(results, arm.name, "rewards", config).mean(axis=0).max(),
    )


def at_ends(chosen: Setting, tried: Sequence[Setting]) -> list[str]:
    """Which numbers of a chosen setting are the lowest or highest that were tried."""
    found = []
    for label, key in (
        ("its own number", "knob"),
        ("beta", "dpo_beta"),
        ("learning rate", "dpo_rate"),
    ):
        grid = {getattr(setting, key) for setting in tried}
        for end, which in ((min, "lowest"), (max, "highest")):
            if len(grid) > 1 and getattr(chosen, key) == end(grid):
                found.append(f"{which} {label}")
    return found
