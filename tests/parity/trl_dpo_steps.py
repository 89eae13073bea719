"""TRL's half of scripts/benchmark_gpu.py, for a Python with torch and TRL, without jax.

Reads a task from standard input, prints the seconds of its optimiser steps as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402


class Trainer(trl.DPOTrainer):
    """`DPOTrainer` on ids, in their order: there is no text to tokenise."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(transformers.TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        """Start, once the GPU is idle."""
        _wait()
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """Stop, once the GPU is idle."""
        _wait()
        self.seconds.append(time.perf_counter() - self.began)


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_model(sizes: dict):
    """Random float32 weights of these sizes."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_positions"] or 4096,
        tie_word_embeddings=sizes["tied"],
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )


def make_dataset(task: dict) -> datasets.Dataset:
    """Random ids of the lengths of the task."""
    rng = np.random.default_rng(task["seed"])

    def draw(n):
        return rng.integers(1, task["sizes"]["vocab_size"], n).tolist()

    return datasets.Dataset.from_list(
        [
            {"prompt_ids": draw(p), "chosen_ids": draw(a), "rejected_ids": draw(b)}
            for p, (a, b) in task["lengths"]
        ]
    )


def run(task: dict) -> dict:
    """Train, and say how long the steps took."""
    cuda = torch.cuda.is_available()
    transformers.set_seed(task["seed"])
    model = make_model(task["sizes"])
    vocabulary = tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=folder,
                max_steps=task["steps"],
                per_device_train_batch_size=task["pairs_per_microbatch"],
                gradient_accumulation_steps=task["pairs_per_step"]
                // task["pairs_per_microbatch"],
                learning_rate=1e-6,
                beta=0.1,
                bf16=True,
                gradient_checkpointing=True,
                precompute_ref_log_probs=True,
                max_length=None,
                optim="adamw_torch_fused" if cuda else "adamw_torch",
                use_cpu=not cuda,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=make_dataset(task),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {
        "cuda": cuda,
        "seconds": clock.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "device_kind": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "trl", "transformers")
        },
    }


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
