"""The ways through SFT and DPO that are compared, and what each may choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.worlds import instructions
from experiments.worlds.models import DecoderSizes
from pref_jax.train.stage import StageConfig

TUNING_SEED = 10_000
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
    fractions: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)  # of the best of them
    dpo_betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    dpo_rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    kl_weights: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    decay_weights: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0)  # times the rate
    divergence_betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    joint_weights: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # lambda
    joint_rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # of the best of `sft_rates`
    stop_every: int = 2  # updates between two looks at the loss to stop at
    num_heldout: int = 320  # demonstrations and pairs
    num_eval_prompts: int = 300
    num_tuning_prompts: int = 200
    eval_samples: int = 4
    max_new_tokens: int = 32
    num_seeds: int = 5

    @property
    def joint_steps(self) -> int:
        """Updates of the joint stage: those of both others."""
        return self.sft_steps + self.dpo_steps

    def __post_init__(self):
        if not 1 <= self.num_seeds < TUNING_SEED:
            raise ValueError(
                f"`num_seeds` must lie in [1, {TUNING_SEED}); got {self.num_seeds}."
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
      kind: `PLAIN`, `RATE`, `KL`, `DECAY`, `NO_SFT`, `JOINT` or one of `DIVERGENCES`.
      fraction: of the whole learning rate; of `RATE` it is the knob.
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
REDUCED = "reduced rate"
EARLY = Arm("early stop", stops=True)


def make_arms(config: StagesConfig) -> list[Arm]:
    """All arms; those that others need come first."""
    return [
        WHOLE,
        *(Arm(f"{x:g} of the rate", fraction=x) for x in config.fractions),
        Arm(REDUCED, RATE, knobs=config.fractions),
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

    Args:
      arm: what is trained.
      config: the values.
      results: of the rates and of the whole rate's choice, if the arm has a number of
        its own.
    """
    betas, rates = config.dpo_betas, config.dpo_rates
    if arm.knobs != (None,):
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


def best_rate(results: Mapping[str, dict], config: StagesConfig) -> float:
    """The learning rate whose SFT has the lowest validation loss."""
    losses = np.array(results["stages/rates"]["losses"], float)
    return config.sft_rates[int(np.nanargmin(losses))]


def chosen_setting(results, arm: Arm, config: StagesConfig) -> Setting:
    """The setting with the highest reward on the tuning seed."""
    rewards = results[f"stages/tune/{arm.name}"]["rewards"]
    return settings_of(arm, config, results)[int(np.argmax(rewards))]
