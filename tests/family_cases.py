"""Tiny models of every family, as fields of a Hugging Face config.

No size, eps or theta is a default. Windows, caps and scaled rotations are such that
they matter within `SEQUENCE` tokens, and within a prompt and its response.
"""

SEQUENCE = 40  # tokens of the one text whose logits are recorded
PROMPT_LENGTHS = (5, 1, 12, 2, 9)  # some longer than the windows
RESPONSE_LENGTHS = ((4, 7), (1, 3), (6, 9), (5, 5), (2, 9))

_COMMON = {
    "vocab_size": 29,
    # At the usual initial size attention is nearly uniform and rotations do not show.
    "initializer_range": 0.3,
    # The defaults lie beyond the vocabulary, or keep a gradient from the padding's id.
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
_SMALL = _COMMON | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
}


def _rope(**fields) -> dict:
    return {"rope_type": "default", "rope_theta": 70.0} | fields


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3],
    "long_factor": [1.5, 3.0],
    "partial_rotary_factor": 0.5,
}
_WIDE_HEADS = {"num_attention_heads": 2}  # of 8 entries: 4 turn
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True}
_GEMMA2 = {
    **_GEMMA,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 5,
    "final_logit_softcapping": 3.0,
    "sliding_window": 6,
}

FAMILY_CASES = {
    "llama2": ("llama", {"rope_parameters": _rope(), "num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {
            "rope_parameters": _rope(**_LLAMA3),
            "tie_word_embeddings": True,
            "head_dim": 8,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral": ("mistral", {"rope_parameters": _rope(), "sliding_window": 6}),
    "mistral_small": (
        "mistral",
        {"rope_parameters": _rope(), "sliding_window": None, "head_dim": 8},
    ),
    "qwen2": (
        "qwen2",
        {
            "rope_parameters": _rope(),
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"rope_parameters": _rope(), "head_dim": 8}),
    "gemma": ("gemma", {**_GEMMA, "rope_parameters": _rope()}),
    "gemma2": (
        "gemma2",
        {**_GEMMA2, "rope_parameters": _rope(), "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA2,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": _rope(),
                "full_attention": _rope(
                    rope_type="linear", factor=4.0, rope_theta=300.0
                ),
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            **_WIDE_HEADS,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
            "sliding_window": 6,
        },
    ),
    "phi4_mini": (
        "phi3",
        {
            **_WIDE_HEADS,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(**_LONGROPE),
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"rope_parameters": _rope()}),
    "pythia": (
        "gpt_neox",
        {
            **_WIDE_HEADS,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
            "layer_norm_eps": 1e-2,
        },
    ),
    "gpt_neox_in_turn": (
        "gpt_neox",
        {
            "rope_parameters": _rope(partial_rotary_factor=1.0),
            "layer_norm_eps": 1e-2,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 24,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-2,
        },
    ),
}
"""Name -> (model type, what differs from the common sizes)."""

LONG = {"phi4_mini": 64}
"""Cases with more positions than the model had before its extension."""


def settings(name: str) -> tuple[str, dict]:
    """(model type, all fields of the config)."""
    model_type, fields = FAMILY_CASES[name]
    if model_type == "gpt2":
        return model_type, _COMMON | fields
    common = dict(_SMALL)
    if model_type == "gpt_neox":
        del common["num_key_value_heads"], common["rms_norm_eps"]
    return model_type, common | fields
