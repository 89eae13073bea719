"""DPO is TRL's DPO: its loss on random log-probs, and its whole path on a tiny Llama.

Its other losses are in `test_trl_losses.py`.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from transformers import LlamaForCausalLM  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from parity import trl_losses, write_golden  # noqa: E402
from pref_jax.logps import response_sum  # noqa: E402
from pref_jax.losses.pairwise import dpo_loss  # noqa: E402
from pref_jax.method import objective  # noqa: E402
from pref_jax.models import pretrained  # noqa: E402
from pref_jax.train.step import weighted_mean  # noqa: E402
from test_golden_llama import (  # noqa: E402
    CASES,
    GOLDEN,
    GRADIENT_TOLERANCE,
    Case,
    assert_close,
    assert_trees_close,
    pack,
)

STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


def dpo_of_token_logps(logps, anchor_logps, mask, beta):
    """Mean loss and metrics of f32[B, 2, T]."""
    loss, metrics = dpo_loss(
        response_sum(logps, where=mask),
        anchor_logps=response_sum(anchor_logps, where=mask),
        beta=beta,
    )
    return loss.mean(), metrics


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_dpo_loss_and_its_gradient_by_token_are_trls(beta, scale):
    num_pairs, num_tokens = 16, 12
    rng = np.random.default_rng(int(10 * beta + scale))
    shape = (num_pairs, 2, num_tokens)
    logps, anchor_logps = -scale * rng.exponential(size=(2, *shape)).astype(np.float32)
    lengths = rng.integers(1, num_tokens + 1, size=(num_pairs, 2, 1))
    mask = np.arange(num_tokens) < lengths
    ours, metrics = dpo_of_token_logps(logps, anchor_logps, mask, beta)
    gradient, _ = jax.grad(dpo_of_token_logps, has_aux=True)(
        jnp.asarray(logps), anchor_logps, mask, beta
    )

    leaf = torch.tensor(logps, requires_grad=True)
    rows = trl_losses.in_rows(torch.tensor(mask))
    masked_sums = (anchor_logps * mask).sum(-1)
    inputs = trl_losses.with_a_prompt(rows) | {
        "ref_chosen_logps": torch.tensor(masked_sums[:, 0]),
        "ref_rejected_logps": torch.tensor(masked_sums[:, 1]),
    }
    model = trl_losses.model_of(trl_losses.in_rows(leaf), rows)
    theirs, their_metrics = trl_losses.dpo_trainer_loss(model, inputs, beta=beta)
    theirs.backward()

    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    # exp(-margin) of margins up to a hundred: their rounding is what is seen.
    np.testing.assert_allclose(gradient, leaf.grad, rtol=3e-5, atol=1e-30)
    assert not np.asarray(gradient)[~mask].any()
    for our_name, their_name in (
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("rewards/margin", "rewards/margins"),
        ("rewards/accuracy", "rewards/accuracies"),
    ):
        assert_close(metrics[our_name].mean(), their_metrics[their_name], our_name)


@pytest.mark.parametrize("name", CASES)
def test_dpo_on_packed_rows_is_trls_with_its_collator_and_fused_head(name, tmp_path):
    case = Case(GOLDEN / name)
    beta = case.record["beta"]
    # TRL trains every token of a response.
    pairs = case.values | {"mask": case.values["response"] >= 0}
    batch = pack(pairs, rows_multiple=1)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        loss, weight, _ = objective(
            case.method, case.model, params, case.reference, batch
        )
        return weighted_mean(loss, weight)

    ours, gradient = loss_and_gradient(case.params)

    model = LlamaForCausalLM.from_pretrained(case.folder / "weights").train()
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data *= case.record["reference_scale"]
    add_fused_lm_head(model, outputs=STATISTICS)
    add_fused_lm_head(reference)
    inputs = DataCollatorForPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": prompt[prompt >= 0].tolist(),
                "chosen_ids": chosen[chosen >= 0].tolist(),
                "rejected_ids": rejected[rejected >= 0].tolist(),
            }
            for prompt, (chosen, rejected) in zip(
                pairs["prompt"], pairs["response"], strict=True
            )
        ]
    )
    theirs, _ = trl_losses.dpo_trainer_loss(
        model, inputs, beta=beta, ref_model=reference
    )
    theirs.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    plain = LlamaForCausalLM.from_pretrained(case.folder / "weights")
    write_golden.save_as(plain, grads, tmp_path)

    assert_close(ours, theirs.item(), "loss")
    _, expected = pretrained.load(tmp_path)
    assert_trees_close(gradient, expected, GRADIENT_TOLERANCE)
