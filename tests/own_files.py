"""What a user brings: pairs, a tokenizer, a checkpoint, a grade."""

import json

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pref_jax.models import pretrained
from pref_jax.models.decoder import DecoderConfig, make_decoder


def write(folder) -> None:
    """Forty pairs, a byte-level tokenizer of theirs, and a module with a grade."""
    lines = [
        {
            "prompt": f"What is {i} plus {i}?",
            "chosen": f" It is {2 * i}.",
            "rejected": f" It is {i}, I think.",
        }
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([str(line) for line in lines], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder / "tokenizer")
    (folder / "mygrade.py").write_text(
        "def short(prompt, response):\n    return -len(response)\n"
    )


def save_model(folder, tokenizer):
    """A tiny Hugging Face checkpoint with the tokenizer; returns its parameters."""
    config = DecoderConfig(300, 16, 2, 2, 1, 8, 24, max_positions=256)
    params = jax.jit(make_decoder(config).init)(jax.random.key(0))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    pretrained.save(folder, config, params, tokenizer=tokenizer)
    return params
