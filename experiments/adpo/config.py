"""Everything that the experiment depends on, and its presets."""

from __future__ import annotations

import dataclasses

from tyro.conf import AvoidSubcommands

from experiments.adpo.distillation import SIMULATED, DistillationConfig
from experiments.adpo.language import LanguageConfig
from experiments.adpo.online import OnlineConfig
from experiments.adpo.suite import BanditConfig
from experiments.worlds.bandits import World
from experiments.worlds.models import DecoderSizes, make_stage


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts of the experiment; None: that part is left out."""

    language: AvoidSubcommands[LanguageConfig | None]
    bandits: AvoidSubcommands[BanditConfig | None] = BanditConfig()
    online: AvoidSubcommands[OnlineConfig | None] = OnlineConfig()
    distillation: AvoidSubcommands[DistillationConfig | None] = DistillationConfig()
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/adpo"  # folder of the runs


SMALL = Config(
    language=LanguageConfig(
        base=make_stage(32, 1000, 2e-3),
        sft=make_stage(48, 500, 1e-3, best="validation/loss"),
    )
)
_TINY = World(
    num_train=256, num_validation=128, num_test=256, num_reference=128, hidden=16
)
SMOKE = Config(
    distillation=DistillationConfig(
        num_states=128,
        num_steps=4,
        num_seeds=2,
        num_episodes=4,
        temperatures=(1.0, 2.0),
        teacher_updates=2,
    ),
    language=LanguageConfig(
        base=make_stage(16, 20, 2e-3),
        sft=make_stage(16, 20, 1e-3, best="validation/loss"),
        decoder=DecoderSizes(
            width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=64
        ),
        num_documents=600,
        num_demonstrations=300,
        num_list_prompts=48,
        flip_rates=(0.4,),
        lists_per_step=8,
        num_steps=3,
        num_seeds=2,
        num_eval_prompts=16,
        eval_samples=2,
        max_new_tokens=12,
    ),
    bandits=BanditConfig(
        world=_TINY,
        num_steps=20,
        num_seeds=2,
        num_tuning_seeds=1,
        sizes=(),
        reference_steps=(),
        taus=(0.5, 2.0),
        temperatures=(0.5, 2.0),
        runs_at_once=36,
    ),
    online=OnlineConfig(
        world=_TINY,
        num_steps=20,
        measure_every=10,
        num_seeds=2,
        num_tuning_seeds=1,
        runs_at_once=24,
    ),
)
CONTROL = Config(
    language=None,
    bandits=None,
    online=None,
    distillation=DistillationConfig(
        tasks=SIMULATED,
        hidden=64,
        num_states=10_000,
        num_steps=3_000,
        states_per_step=256,
        num_episodes=10,
    ),
)
PRESETS = {"small": SMALL, "smoke": SMOKE, "control": CONTROL}
