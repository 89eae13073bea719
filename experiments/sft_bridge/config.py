"""Everything that the experiment depends on, and its presets."""

from __future__ import annotations

import dataclasses

from tyro.conf import AvoidSubcommands

from experiments.sft_bridge.arms import StagesConfig
from experiments.sft_bridge.values import ValuesConfig
from experiments.worlds.models import DecoderSizes, make_stage


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts of the experiment; None: that part is left out."""

    stages: AvoidSubcommands[StagesConfig | None]
    values: AvoidSubcommands[ValuesConfig | None]
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/sft_bridge"  # folder of the runs

    def __post_init__(self):
        if self.stages is None and self.values is None:
            raise ValueError("`stages` and `values` are both left out: nothing to do.")


# The second SFT is as long as it takes to win nearly all rooms.
SMALL = Config(
    stages=StagesConfig(base=make_stage(64, 1_400, 3e-3)),
    values=ValuesConfig(
        base=make_stage(64, 300, 2e-3, weight_decay=0.0),
        sft=make_stage(64, 3_000, 3e-3, weight_decay=0.0),
        dpo=make_stage(32, 100, 2e-4, weight_decay=0.0),
    ),
)
_TINY = DecoderSizes(width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=32)
SMOKE = Config(
    stages=StagesConfig(
        base=make_stage(16, 8, 2e-3),
        decoder=_TINY,
        num_documents=200,
        num_crowd=200,
        num_demonstrations=64,
        num_pairs=64,
        groups_per_step=16,
        sft_steps=6,
        dpo_steps=4,
        sft_rates=(6e-4, 1.2e-3),
        fractions=(0.5, 0.1),
        dpo_betas=(0.03, 0.1),
        dpo_rates=(1e-4, 2e-4),
        kl_weights=(0.1, 1.0),
        decay_weights=(10.0, 100.0),
        divergence_betas=(0.1, 1.0),
        joint_weights=(0.1, 1.0),
        joint_rates=(0.5, 1.0),
        num_heldout=32,
        num_eval_prompts=16,
        num_tuning_prompts=16,
        eval_samples=2,
        max_new_tokens=12,
        num_tuning_seeds=1,
        num_seeds=2,
    ),
    values=ValuesConfig(
        base=make_stage(32, 80, 1e-2, weight_decay=0.0),
        sft=make_stage(32, 80, 1e-2, weight_decay=0.0),
        dpo=make_stage(4, 4, 1e-4, weight_decay=0.0),
        decoder=_TINY,
        num_rooms=64,
        num_demonstrations=256,
        num_test_rooms=16,
        num_seeds=2,
    ),
)
PRESETS = {"small": SMALL, "smoke": SMOKE}
