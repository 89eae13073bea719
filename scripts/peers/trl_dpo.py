"""The contestant TRL: `DPOTrainer`, with its defaults or with its best settings here.

What both rows share is what the comparison asks for: float32, the optimiser without
clipping at a constant rate, eight pairs a step in a given order, nothing uploaded. The
ids are given, so neither row tokenises.
"""

from __future__ import annotations

import blocks
import datasets
import tokenizers
import transformers
import trl

SETTINGS = {
    "defaults": {},
    "best": {
        # The reference's logps once, before training, in place of a second forward
        # pass in every step.
        "precompute_ref_log_probs": True,
        # The default recomputes every layer in the backward pass, to save memory.
        "gradient_checkpointing": False,
        # Nothing is cut: batches are padded to their own longest text in any case, and
        # the order that this row is given holds texts of like length together.
        "max_length": None,
        # No log lines, no progress bar and no look at each loss for NaN, each of which
        # reads from the step.
        "logging_strategy": "no",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
    },
}
"""Arguments of `DPOConfig` by row.

Left as they are, because they are the best already or do nothing on a CPU:
`optim="adamw_torch_fused"` and SDPA attention are defaults; `padding_free` falls back
to padding with a warning in this version; the Liger kernels and the fused head that
skips prompts and padding are Triton's, and without a GPU the head scores every position
in chunks; a worker process for batches would take a processor from the step.
"""


def config_of(job: blocks.Job) -> trl.DPOConfig:
    """The arguments of a row."""
    optimizer = job.optimizer
    return trl.DPOConfig(
        output_dir=job.scratch,
        per_device_train_batch_size=len(job.batches[0]),
        # One block more than is asked for: the gate stands before its first step.
        num_train_epochs=job.num_blocks + 1,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        learning_rate=optimizer["learning_rate"],
        adam_beta1=optimizer["b1"],
        adam_beta2=optimizer["b2"],
        adam_epsilon=optimizer["eps"],
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        beta=job.beta,
        seed=job.seed,
        report_to="none",
        **SETTINGS[job.options["settings"]],
        **job.options.get("arguments", {}),
    )


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that is asked for nothing but a padding id, which masks cover."""
    model = tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        pad_token="<pad>",
        eos_token="<pad>",
    )


class Trainer(trl.DPOTrainer):
    """Takes ids as they are, and keeps the loss of each step."""

    def __init__(self, *args, **kwargs):
        self.losses = []
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def compute_loss(self, *args, **kwargs):
        """The trainer's loss, of which a reference is kept."""
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class AtGate(transformers.TrainerCallback):
    """Every step passes the gate."""

    def __init__(self, gate: blocks.Gate):
        self._gate = gate

    def on_step_begin(self, args, state, control, **kwargs):
        """What is left of the step before, logging included, is done."""
        self._gate()


def train(job: blocks.Job) -> None:
    """Train block by block, until no more is asked for."""
    pairs = blocks.read_pairs(job.data)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    records = [
        {name: ids.tolist() for name, ids in zip(names, pairs[i], strict=True)}
        for batch in job.batches
        for i in batch
    ]
    config = config_of(job)
    trainer = Trainer(
        job.model,
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer(),
    )
    longest = [
        max(len(p) + max(len(c), len(r)) for p, c, r in map(pairs.__getitem__, batch))
        for batch in job.batches
    ]
    real = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    gate = blocks.Gate(
        job,
        settle=lambda: None,  # torch has done a step when it returns from it
        losses=trainer.losses,
        about={
            "shape": f"[{2 * len(job.batches[0])}, {min(longest)} to {max(longest)}]",
            "fill": real / sum(2 * len(job.batches[0]) * n for n in longest),
        },
        packages=("trl", "torch", "transformers", "accelerate"),
    )
    trainer.add_callback(AtGate(gate))
    trainer.train()


if __name__ == "__main__":
    train(blocks.read_job())
