"""Everything that the experiment depends on, and its presets."""

from __future__ import annotations

import dataclasses

from experiments.sft_bridge.values import ValuesConfig
from experiments.worlds.models import DecoderSizes, make_stage


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts of the experiment."""

    values: ValuesConfig
    name: str | None = None  # of the run; None: continue an unfinished run, or a number
    root: str = "runs/sft_bridge"  # folder of the runs


# SFT is as long as it takes to win nearly all rooms.
SMALL = Config(
    values=ValuesConfig(
        base=make_stage(64, 300, 2e-3, weight_decay=0.0),
        sft=make_stage(64, 3_000, 3e-3, weight_decay=0.0),
    )
)
SMOKE = Config(
    values=ValuesConfig(
        base=make_stage(16, 8, 2e-3, weight_decay=0.0),
        sft=make_stage(16, 8, 1e-3, weight_decay=0.0),
        decoder=DecoderSizes(
            width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=32
        ),
        num_rooms=64,
        num_demonstrations=256,
        num_test_rooms=16,
        num_seeds=2,
    )
)
PRESETS = {"small": SMALL, "smoke": SMOKE}
