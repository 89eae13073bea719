"""TRL's own losses as functions of log-probabilities.

In TRL a loss is a method of a trainer. Here each is called on a stand-in that holds
what the method reads, with a model that returns the given log-probabilities; no line of
a loss is written again. Tensors in, the mean loss out, a scalar with a gradient.

    token_logps    [B, 2, T], chosen in slot 0; what lies outside the mask is ignored
    mask           bool [B, 2, T], the tokens of responses

`as_tokens` makes sums [..., 2] such tensors: a response of one token.
"""

import collections
import os
import types

import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO stand there

from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402
from trl.trainer.reward_trainer import RewardTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.sft_trainer import SFTTrainer  # noqa: E402

DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
"""All of `DPOTrainer`, as it names them."""


def accelerator():
    """One process on the CPU."""
    return types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )


def metrics():
    """Where a trainer logs: {mode: {name: [value]}}."""
    return collections.defaultdict(lambda: collections.defaultdict(list))


def as_tokens(logps):
    """Sums [..., 2] as responses of one token: token logps and mask, [..., 2, 1]."""
    return logps[..., None], torch.ones(*logps.shape, 1, dtype=torch.bool)


def in_rows(pairs):
    """[B, 2, ...] -> [2B, ...], the chosen first, as in TRL's batches."""
    return pairs.transpose(0, 1).flatten(0, 1)


def model_of(token_logps, mask, log_sum_sq=None):
    """A model that returns these [N, T], and 0 outside the mask as TRL's head does."""
    zeros = torch.zeros_like(token_logps, requires_grad=False)
    outputs = types.SimpleNamespace(
        log_probs=token_logps.masked_fill(~mask, 0.0),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    if log_sum_sq is not None:
        outputs.log_sum_sq_probs = log_sum_sq

    def model(**inputs):
        return outputs

    model.training, model._modules = True, {}  # with PEFT installed TRL looks for parts
    model.is_gradient_checkpointing = False
    return model


def with_a_prompt(mask):
    """What a batch says of rows with a prompt of one token before the response."""
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.cat([ones, mask.long()], 1),
        "completion_mask": torch.cat([0 * ones, mask.long()], 1),
    }


# --- DPOTrainer -----------------------------------------------------------------------


def dpo_trainer_loss(model, inputs, *, beta, ref_model=None, **options):
    """The loss of `DPOTrainer` for a model, and the metrics that it logs."""
    logged = metrics()
    trainer = types.SimpleNamespace(
        model=model,
        ref_model=ref_model,
        precompute_ref_logps=ref_model is None,
        accelerator=accelerator(),
        args=types.SimpleNamespace(
            gradient_checkpointing_kwargs=None,
            discopop_tau=options.pop("discopop_tau", 0.05),
        ),
        beta=beta,
        aux_loss_enabled=False,
        _metrics=logged,
        _total_train_tokens=0,
        _tp_size=1,
    )
    defaults = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    }
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"DPOTrainer has no {', '.join(sorted(unknown))}.")
    vars(trainer).update(defaults | options)
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in logged["train"].items()}


def dpo(
    token_logps, anchor_token_logps, mask, *, beta, log_sum_sq=None, **options
) -> torch.Tensor:
    """A loss of `DPOTrainer`.

    Args:
      token_logps: of the policy.
      anchor_token_logps: of the reference, as `token_logps`.
      mask: of responses.
      beta: as TRL's.
      log_sum_sq: [B, 2, T]. The loss is weighted as in WPO.
      options: `loss_types` (a list of `DPO_LOSSES`), `loss_weights`, `label_smoothing`,
        `f_divergence_type`, `f_alpha_divergence_coef`, `ld_alpha`, `discopop_tau`.
    """
    rows = in_rows(mask)
    if log_sum_sq is not None:
        options["use_weighting"] = True
        log_sum_sq = in_rows(log_sum_sq)
    loss, _ = dpo_trainer_loss(
        model_of(in_rows(token_logps), rows, log_sum_sq),
        with_a_prompt(rows),
        beta=beta,
        ref_model=model_of(in_rows(anchor_token_logps), rows),
        **options,
    )
    return loss


# --- KTOTrainer -----------------------------------------------------------------------


def kto(
    token_logps,
    anchor_token_logps,
    mask,
    *,
    desirable,
    beta,
    mismatched=None,
    loss_type="kto",
    desirable_weight=1.0,
    undesirable_weight=1.0,
) -> torch.Tensor:
    """A loss of `KTOTrainer`; here a row is one response.

    Args:
      token_logps: [N, T], of the policy.
      anchor_token_logps: [N, T], of the reference.
      mask: bool [N, T].
      desirable: bool [N].
      beta: as TRL's.
      mismatched: for "kto": (token logps, anchor token logps, mask) of each prompt with
        the response of another, from which TRL estimates the KL divergence.
      loss_type: "kto" or "apo_zero_unpaired".
      desirable_weight: of desirable responses.
      undesirable_weight: of the others.
    """
    inputs = with_a_prompt(mask) | {"label": desirable}
    if mismatched is not None:
        of_kl = with_a_prompt(mismatched[2])
        inputs |= {f"KL_{name}": value for name, value in of_kl.items()}

    def model(i, of_batch):
        of_batch = model_of(of_batch, mask)
        if mismatched is None:
            return of_batch
        of_mismatched = model_of(mismatched[i], mismatched[2])

        def call(*, input_ids, **rest):
            is_kl = input_ids is inputs["KL_input_ids"]
            return of_mismatched() if is_kl else of_batch()

        call.training, call._modules = True, {}
        call.is_gradient_checkpointing = False
        return call

    policy, anchor = model(0, token_logps), model(1, anchor_token_logps)
    trainer = types.SimpleNamespace(
        model=policy,
        ref_model=anchor,
        precompute_ref_logps=False,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        accelerator=accelerator(),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        aux_loss_enabled=False,
        _metrics=metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, trainer)
    return KTOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)


# --- trainers whose method takes one number per response ------------------------------


def cpo(
    logps, *, beta, loss_type="sigmoid", simpo_gamma=0.0, label_smoothing=0.0
) -> torch.Tensor:
    """The preference term of `CPOTrainer`, of [B, 2].

    Args:
      logps: sums; means over each response's tokens for "simpo" and "ipo".
      beta: as TRL's.
      loss_type: "sigmoid", "hinge", "ipo" or "simpo".
      simpo_gamma: for "simpo".
      label_smoothing: for "sigmoid" and "simpo".
    """
    trainer = types.SimpleNamespace(
        accelerator=accelerator(),
        alpha=0.0,
        beta=beta,
        loss_type=loss_type,
        simpo_gamma=simpo_gamma,
        label_smoothing=label_smoothing,
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, logps[:, 0], logps[:, 1])
    return losses.mean()


def orpo_odds_ratio(mean_logps, *, beta) -> torch.Tensor:
    """The odds-ratio term of `ORPOTrainer` as it enters the loss, of [B, 2].

    Args:
      mean_logps: means over each response's tokens. TRL works in float32 whatever they
        are.
      beta: the weight of the term, lambda in the paper.
    """
    trainer = types.SimpleNamespace(accelerator=accelerator(), beta=beta)
    losses, *_ = ORPOTrainer.odds_ratio_loss(
        trainer, mean_logps[:, 0], mean_logps[:, 1]
    )
    return -losses.mean()  # `get_batch_loss_metrics` subtracts it


def reward_model(rewards, *, margin=None, centering=None) -> torch.Tensor:
    """The loss of `RewardTrainer` for rewards [B, 2] and margins [B].

    `centering` is TRL's `center_rewards_coefficient`.
    """
    outputs = types.SimpleNamespace(logits=in_rows(rewards)[:, None])

    def model(**inputs):
        return outputs

    model.training, model._modules = True, {}  # with PEFT installed TRL looks for parts
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=accelerator(),
        args=types.SimpleNamespace(center_rewards_coefficient=centering),
        _metrics=metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * len(rewards), 1, dtype=torch.long)}
    if margin is not None:
        inputs["margin"] = margin
    return RewardTrainer.compute_loss(trainer, model, inputs)


# --- SFTTrainer -----------------------------------------------------------------------


def sft(token_logps, mask, *, loss_type) -> torch.Tensor:
    """The loss of `SFTTrainer`: "nll" or "dft", of [N, T], the mean over tokens."""
    zeros = torch.zeros_like(token_logps, requires_grad=False)
    outputs = types.SimpleNamespace(
        log_probs=token_logps.masked_fill(~mask, 0.0),
        label_mask=mask,
        entropy=zeros,
        is_top1=zeros.bool(),
    )

    def model(**inputs):
        return outputs

    model.training, model._modules = True, {}  # with PEFT installed TRL looks for parts
    gathering = accelerator()
    gathering.parallelism_config = None
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=gathering,
        args=types.SimpleNamespace(
            loss_type=loss_type, average_tokens_across_devices=False
        ),
        compute_loss_func=None,
        label_smoother=None,
        aux_loss_enabled=False,
        _metrics=metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": mask.long(), "labels": mask.long()}
    return SFTTrainer.compute_loss(trainer, model, inputs)


# --- GRPOTrainer and RLOOTrainer ------------------------------------------------------


def _sampled(mask, advantages):
    """What both trainers read of a batch of sampled responses [N, T]."""
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
    }


def _policy_trainer(token_logps, clip_low, clip_high, **more):
    gathering = accelerator()
    gathering.reduce = lambda x, reduction: x
    gathering.num_processes = 1
    zeros = torch.zeros_like(token_logps, requires_grad=False)
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=gathering,
        aux_loss_enabled=False,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        _get_per_token_logps_and_entropies=lambda *_, **__: (token_logps, zeros, None),
        _metrics=metrics(),
        **more,
    )


def grpo(
    token_logps,
    mask,
    *,
    behaviour_logps,
    advantages,
    loss_type,
    clip_low,
    clip_high,
    level="token",
    delta=None,
    beta=0.0,
    anchor_logps=None,
    max_length=None,
) -> torch.Tensor:
    """The loss of `GRPOTrainer`; here a row is one response.

    Args:
      token_logps: [N, T], of the policy.
      mask: bool [N, T].
      behaviour_logps: [N, T], of the policy that sampled.
      advantages: [N], or [N, T].
      loss_type: "grpo", "bnpo", "dapo" or "dr_grpo".
      clip_low: TRL's `epsilon`.
      clip_high: TRL's `epsilon_high`.
      level: "token", or "sequence" as in GSPO.
      delta: TRL's bound of the ratio.
      beta: weight of the divergence from the anchor.
      anchor_logps: [N, T], if `beta` is not 0.
      max_length: for "dr_grpo".
    """
    trainer = _policy_trainer(
        token_logps,
        clip_low,
        clip_high,
        args=types.SimpleNamespace(
            delta=delta, use_bias_correction_kl=False, steps_per_generation=1
        ),
        beta=beta,
        current_gradient_accumulation_steps=1,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=max_length,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    inputs = _sampled(mask, advantages) | {
        "old_per_token_logps": behaviour_logps,
        "ref_per_token_logps": anchor_logps,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def rloo(
    token_logps, mask, *, behaviour_logps, advantages, clip_low, clip_high
) -> torch.Tensor:
    """The loss of `RLOOTrainer`, by the arguments of `grpo`; summed [N] from before."""
    trainer = _policy_trainer(token_logps, clip_low, clip_high)
    inputs = _sampled(mask, advantages) | {"old_logps": behaviour_logps}
    return RLOOTrainer._compute_loss(trainer, None, inputs)
