"""Sizes of published models, for what needs a model's shape and not its weights.

Compile checks and benchmarks take them from here; a run takes them from the folder of
its model. Written down from the models' published `config.json`; not verified against
the files, since a run never relies on them.
"""

from __future__ import annotations

from pref_jax.models.decoder import DecoderConfig, LayerKind, Llama3Scaling, Rotary

LLAMA_3_8B = DecoderConfig(
    vocab_size=128_256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14_336,
    period=(LayerKind(rotary=Rotary(theta=500_000.0)),),
    tied=False,
    max_positions=8192,
)

LLAMA_3_70B = DecoderConfig(
    vocab_size=128_256,
    width=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=28_672,
    period=(LayerKind(rotary=Rotary(theta=500_000.0)),),
    tied=False,
    max_positions=8192,
)

LLAMA_3_2_1B = DecoderConfig(
    vocab_size=128_256,
    width=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_width=8192,
    period=(
        LayerKind(
            rotary=Rotary(
                theta=500_000.0,
                scaling=Llama3Scaling(
                    factor=32.0, low=1.0, high=4.0, old_positions=8192
                ),
            )
        ),
    ),
    max_positions=131_072,
)

QWEN_2_5_7B = DecoderConfig(
    vocab_size=152_064,
    width=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_width=18_944,
    period=(LayerKind(rotary=Rotary(theta=1_000_000.0)),),
    norm_eps=1e-6,
    qkv_bias=True,
    tied=False,
    max_positions=131_072,
)

SHAPES = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": LLAMA_3_70B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "qwen-2.5-7b": QWEN_2_5_7B,
}
"""Shapes by the name that a config gives."""
