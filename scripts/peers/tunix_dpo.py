"""The contestant Tunix: `DPOTrainer`, with its defaults or with its best settings here.

Its trainer is given padded ids, so neither row tokenises. It has no setting for stored
reference logps: the reference scores every batch in both rows.
"""

from __future__ import annotations

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo import dpo_trainer

MULTIPLE = 32
"""Of the padded lengths of the best row, to which its steps are compiled."""


def padded_lengths(job: blocks.Job, pairs) -> list[tuple[int, int]]:
    """Prompt and response length of each batch.

    `settings`: "defaults" takes one shape for all, since every shape is compiled: the
    next power of two that holds every record, as its examples give. "best" takes the
    least multiple of 32 that holds a batch, in an order that keeps texts of like length
    together; all shapes are compiled in the block of the warm-up.
    """
    longest = np.array(
        [
            [
                max(len(pairs[i][0]) for i in batch),
                max(len(response) for i in batch for response in pairs[i][1:]),
            ]
            for batch in job.batches
        ]
    )
    if job.options["settings"] == "defaults":
        longest[:] = 2 ** np.ceil(np.log2(longest.max(0))).astype(int)
    else:
        longest = -(-longest // MULTIPLE) * MULTIPLE
    return [(int(prompt), int(response)) for prompt, response in longest]


def pad_batch(pairs, prompt_length: int, response_length: int):
    """A batch as the trainer takes it: prompts padded left, responses right."""

    def pad(rows, length, left):
        ids = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            part = slice(length - len(row), None) if left else slice(len(row))
            ids[i, part], mask[i, part] = row, True
        return ids, mask

    prompts, chosen, rejected = zip(*pairs, strict=True)
    prompt_ids, prompt_mask = pad(prompts, prompt_length, left=True)
    chosen_ids, chosen_mask = pad(chosen, response_length, left=False)
    rejected_ids, rejected_mask = pad(rejected, response_length, left=False)
    return dpo_trainer.TrainingInput(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        chosen_ids=chosen_ids,
        chosen_mask=chosen_mask,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
    )


def load(job: blocks.Job) -> nnx.Module:
    """The initial model."""
    sizes = job.sizes
    config = llama.ModelConfig(
        num_layers=sizes["num_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["width"],
        hidden_dim=sizes["mlp_width"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_kv_heads"],
        rope_theta=int(sizes["rotary_base"]),
        norm_eps=sizes["norm_eps"],
        weight_tying=sizes["tied"],
    )
    return llama_params.create_model_from_safe_tensors(
        job.model, config, mesh=None, dtype=jnp.float32
    )


class Trainer(dpo_trainer.DPOTrainer):
    """Keeps the loss of each step."""

    def __init__(self, *args, **kwargs):
        self.losses = []
        super().__init__(*args, **kwargs)

    def _buffer_metrics(self, metrics_buffer, loss, *args, **kwargs):
        self.losses.append(loss)
        return super()._buffer_metrics(metrics_buffer, loss, *args, **kwargs)


def train(job: blocks.Job) -> None:
    """Train block by block, until no more is asked for."""
    pairs = blocks.read_pairs(job.data)
    lengths = padded_lengths(job, pairs)
    num_steps = len(job.batches) * (job.num_blocks + 1)
    trainer = Trainer(
        load(job),
        load(job),
        optax.adamw(**job.optimizer, weight_decay=0.0),
        dpo_trainer.DPOTrainingConfig(
            beta=job.beta,
            eval_every_n_steps=num_steps,  # required; there is nothing to evaluate
            # Without it there is no progress bar, which reads from every step.
            max_steps=num_steps if job.options["settings"] == "defaults" else None,
        ),
    )
    widths = [prompt + response for prompt, response in lengths]
    rows = 2 * len(job.batches[0])
    real = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    gate = blocks.Gate(
        job,
        settle=lambda: jax.block_until_ready(nnx.state(trainer.model)),
        losses=trainer.losses,
        about={
            "shape": f"[{rows}, {min(widths)} to {max(widths)}]",
            "fill": real / sum(rows * width for width in widths),
        },
        packages=("google-tunix", "jax", "jaxlib", "flax", "optax"),
    )
    numbers = blocks.passed(gate, range(len(job.batches)), job.num_blocks)
    trainer.train(
        pad_batch([pairs[i] for i in job.batches[n]], *lengths[n]) for n in numbers
    )


if __name__ == "__main__":
    train(blocks.read_job())
