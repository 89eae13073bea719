"""PEFT opens our adapters on torch's models, and we open its: for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from models.test_families import (  # noqa: E402
    GOLDEN,
    Case,
    logits_of_sequence,
    model_of,
)
from parity.test_family_parity import torch_logits, torch_model  # noqa: E402
from pref_jax.models import lora  # noqa: E402

from family_cases import FAMILY_CASES  # noqa: E402  isort: skip

TOLERANCE = 1e-4  # float32 on both sides, of logits of up to ten

# Modules as the families name them; the first has a rank, the second an alpha of its
# own.
MODULES = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
}
OTHERS = ["q_proj", "v_proj", "o_proj", "up_proj"]


@pytest.fixture(scope="module", params=FAMILY_CASES)
def case(request):
    return Case(request.param, GOLDEN / request.param)


def logits(case, params):
    return logits_of_sequence(case, params, case.config)


def test_peft_computes_what_our_adapters_do(case, tmp_path):
    config = lora.LoraConfig(rank=3, alpha=5.0)
    if case.name == "gpt2":  # some parts of a fused matrix alone
        config = lora.LoraConfig(3, 5.0, ("attention/[qvo]*", "mlp/down"))
    frozen, trained = lora.split(case.params, config, jax.random.key(0))
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), trained
    )
    base = case.folder / "weights"
    lora.save_peft(tmp_path / "a", trained, config, case.config, base=str(base))
    model = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "a").eval()
    expected = torch_logits(model, case)
    adapted = lora.adapted(model_of(case.config), config)
    unmerged = logits(case, adapted.combine(frozen, trained))
    merged = logits(case, lora.merge(frozen, trained, config))
    np.testing.assert_allclose(unmerged, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - case.values["logits"]).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_compute_what_an_adapter_of_peft_does(case, tmp_path, use_rslora):
    base = case.folder / "weights"
    torch_base = torch_model(base)
    kind = torch_base.config.model_type
    modules = MODULES.get(kind, OTHERS)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=modules,
        use_rslora=use_rslora,
        rank_pattern={modules[0]: 2},
        alpha_pattern={modules[1]: 3},
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_base, settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = torch_logits(model, case)
    model.save_pretrained(tmp_path / "a")
    config, trained = lora.load_peft(tmp_path / "a", case.config, base=str(base))
    adapted = lora.adapted(model_of(case.config), config)
    ours = logits(case, adapted.combine(case.params, trained))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - case.values["logits"]).max() > 1000 * TOLERANCE
