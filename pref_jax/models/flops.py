"""The flops that a model needs, by a closed formula: what MFU is measured against.

Each prompt is counted once, logits at scored positions only, attention over the keys
that a token sees, and nothing that is computed twice. A multiply-add is two flops.

    forward = 2 N tokens + 2 V D scored + 4 layers H head_dim seen

N are the parameters of the layers, `tokens` prompts and responses, `scored` the targets
of the responses, `seen` the (query, key) pairs of attention.
"""

from __future__ import annotations

from collections.abc import Iterable

from pref_jax.models.decoder import DecoderConfig, make_decoder

FORMULA = (
    "passes * (2 * N * tokens + 2 * V * D * scored + 4 * layers * H * head_dim * seen)"
)
"""The formula in words; three passes are forward and backward."""


def forward_flops(
    config: DecoderConfig, groups: Iterable[tuple[int, tuple[int, ...]]]
) -> float:
    """Flops of one forward pass over prompts with their responses.

    Sliding windows are not looked at: tokens count as seeing all that comes before.

    Args:
      config: of the decoder.
      groups: tokens of each prompt, and of its responses.

    >>> tiny = DecoderConfig(vocab_size=7, width=4, num_layers=1, num_heads=1,
    ...                      num_kv_heads=1, head_dim=4, mlp_width=8)
    >>> forward_flops(tiny, [(1, (1,))]) - forward_flops(tiny, [(1, ())])
    432.0
    """
    unembedding = 2.0 * config.vocab_size * config.width
    layers = make_decoder(config).flops_per_token - unembedding
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim
    tokens = scored = seen = 0
    for prompt, responses in groups:
        tokens += prompt + sum(responses)
        scored += sum(responses)
        seen += prompt * (prompt + 1) // 2
        seen += sum(n * prompt + n * (n + 1) // 2 for n in responses)
    return layers * tokens + unembedding * scored + attention * seen
