"""Write the golden files of all families: what torch makes of tiny random models.

    PYTHONPATH=tests python -m parity.write_family_golden

Needs the extra [parity]. The cases are those of `tests/family_cases.py`, and each is

    weights/   gradient/     two folders as transformers saves a model
    values.npz               inputs and outputs
    record.json              what was computed, by which versions, and when

The gradient is that of the log-probabilities of all responses, each token times a fixed
random weight. torch reads each response alone, as in `write_golden.py`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import family_cases
from parity import write_golden

GOLDEN = write_golden.GOLDEN / "families"
SEED, PADDING = 0, "left"  # of the recorded files


def make_model(name: str, *, seed: int, auto=AutoModelForCausalLM, **changes):
    """A random model of a case, in which every part matters to the output."""
    torch.manual_seed(seed)
    model_type, fields = family_cases.settings(name)
    config = AutoConfig.for_model(model_type, **fields | changes)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name or ".ln_" in parameter_name
            if is_norm or parameter_name.endswith("bias"):
                parameter += torch.rand_like(parameter) - 0.5
    return model


def write_case(folder: Path, name: str, *, padding: str, seed: int) -> None:
    """Write one case."""
    rng = np.random.default_rng(seed)
    model = make_model(name, seed=seed)
    vocab_size = model.config.vocab_size
    pairs = write_golden.make_pairs(
        vocab_size,
        rng,
        prompt_lengths=family_cases.PROMPT_LENGTHS,
        response_lengths=family_cases.RESPONSE_LENGTHS,
    )
    sequence = rng.integers(vocab_size, size=family_cases.SEQUENCE)
    write_golden.save_as(model, model.parameters(), folder / "weights")
    with torch.no_grad():
        hidden = write_golden.hidden_by_layer(model, sequence)
        logits = model(torch.tensor(sequence)[None]).logits[0]
    logps = write_golden.token_logps(model, pairs, padding=padding, rng=rng)
    weights = rng.standard_normal(pairs["mask"].shape).astype(np.float32)
    (logps * torch.tensor(weights)).sum().backward()
    gradient = [parameter.grad for parameter in model.parameters()]
    write_golden.save_as(model, gradient, folder / "gradient")

    values = {"hidden": hidden, "logits": logits, "logps": logps}
    arrays = {key: value.detach().numpy() for key, value in values.items()}
    arrays |= pairs | {"sequence": sequence, "weights": weights}
    np.savez_compressed(folder / "values.npz", **arrays)
    record = {"padding": padding, "seed": seed}
    record |= write_golden.origin("tests/parity/write_family_golden.py")
    (folder / "record.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    for name in family_cases.FAMILY_CASES:
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        write_case(GOLDEN / name, name, padding=PADDING, seed=SEED)
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
