"""`generate` of transformers, on torch, with the weights of one of our decoders."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from pref_jax.models import pretrained
from pref_jax.models.decoder import DecoderConfig
from pref_jax.types import PyTree


def make_generate(
    sizes: DecoderConfig, params: PyTree, prompts: Sequence[np.ndarray], *, seed: int
) -> Callable[..., np.ndarray] | None:
    """The function that generates for these prompts, or None without torch.

    Prompts are padded on the left, as decoder-only models of transformers want them.

    Returns:
      (num_samples K, max_new_tokens S, greedy) -> ids [B, K, S]: of the whole
      distribution at temperature 1, or the likeliest; no token ends a response.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(folder, sizes, params, family="llama")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [np.pad(p, (n, 0)) for p, n in zip(prompts, padding, strict=True)]
    batch = transformers.BatchEncoding(
        {
            "input_ids": np.stack(ids).astype(np.int64),
            "attention_mask": np.arange(longest) >= np.array(padding)[:, None],
        },
        tensor_type="pt",
    )

    def generate(num_samples: int, max_new_tokens: int, greedy: bool = False):
        settings = transformers.GenerationConfig(
            num_return_sequences=num_samples,
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            pad_token_id=0,
            **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        )
        ids = model.generate(**batch, generation_config=settings).numpy()
        return ids[:, longest:].reshape(len(prompts), num_samples, max_new_tokens)

    return generate
