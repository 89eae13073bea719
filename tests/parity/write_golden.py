"""Write the golden files: what torch makes of tiny random Llamas and of a story.

    python tests/parity/write_golden.py

Needs the extra [parity]. The default tests hold our side to the files; the tests beside
this script make the same values anew and hold our side to those. Each case is

    weights/   gradient/   after_sgd/    three folders as transformers saves a model
    values.npz                           inputs and outputs
    record.json                          what was computed, by which versions, and when

torch reads each response alone after its own copy of the prompt, padded on the left or
on the right with random ids, with an attention mask and position ids.
"""

import copy
import datetime
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
STORIES = ROOT.parent / "shared" / "data" / "stories260k"

# No size, eps or theta is a default; the tied heads are together wider than the state.
CASES = {
    "llama_untied": {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "tie_word_embeddings": False,
    },
    "llama_tied": {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "rms_norm_eps": 3e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "tie_word_embeddings": True,
    },
}
PADDING = {"llama_untied": "left", "llama_tied": "right"}  # of the recorded files
CONSTANTS = {"beta": 0.3, "learning_rate": 0.1, "reference_scale": 0.9}

PROMPT_LENGTHS = (5, 1, 9, 2, 3)
RESPONSE_LENGTHS = ((4, 7), (1, 3), (6, 2), (5, 5), (2, 9))
STORY = (
    "Tom had a big red ball. He gave it to his friend Sue, and they played in the "
    "park until it was dark. Then they went home to their mom."
)


def make_pairs(
    vocab_size: int,
    rng,
    *,
    prompt_lengths=PROMPT_LENGTHS,
    response_lengths=RESPONSE_LENGTHS,
) -> dict[str, np.ndarray]:
    """Ragged pairs: prompt i64[B, P], response i64[B, 2, T], mask bool[B, 2, T].

    Ids are -1 in padding; about a fifth of the response tokens are not trained.
    """
    lengths = np.array(response_lengths)
    prompt = rng.integers(vocab_size, size=(len(lengths), max(prompt_lengths)))
    prompt[np.arange(prompt.shape[1]) >= np.array(prompt_lengths)[:, None]] = -1
    response = rng.integers(vocab_size, size=(*lengths.shape, lengths.max()))
    response[np.arange(lengths.max()) >= lengths[..., None]] = -1
    mask = (rng.random(response.shape) < 0.8) & (response >= 0)
    mask[..., 0] = True
    return {"prompt": prompt, "response": response, "mask": mask}


def token_logps(model, pairs, *, padding: str, rng) -> torch.Tensor:
    """f32[B, 2, T], 0 where the mask of `pairs` is False."""
    sequences, prompt_lengths = [], []
    for prompt, responses in zip(pairs["prompt"], pairs["response"], strict=True):
        for response in responses:
            sequences.append(np.concatenate([prompt[prompt >= 0], response]))
            sequences[-1] = sequences[-1][sequences[-1] >= 0]
            prompt_lengths.append((prompt >= 0).sum())
    length = max(map(len, sequences))
    ids = rng.integers(model.config.vocab_size, size=(len(sequences), length))
    offset = np.array([length - len(s) if padding == "left" else 0 for s in sequences])
    position = np.arange(length) - offset[:, None]
    for i, sequence in enumerate(sequences):
        ids[i, offset[i] : offset[i] + len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences])[:, None]
    output = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(((position >= 0) & (position < lengths)) * 1),
        position_ids=torch.tensor(position.clip(0)),
    )
    mask = pairs["mask"]
    last = (offset + np.array(prompt_lengths) - 1).reshape(mask.shape[:2])
    row = np.arange(len(sequences)).reshape(mask.shape[:2])
    where = np.minimum(last[..., None] + np.arange(mask.shape[-1]), length - 1)
    logps = output.logits.log_softmax(-1)[
        torch.tensor(row[..., None]),
        torch.tensor(where),
        torch.tensor(pairs["response"].clip(0)),
    ]
    return torch.where(torch.tensor(mask), logps, 0.0)


def hidden_by_layer(model, sequence) -> torch.Tensor:
    """f32[N, S, D]: the final norm of the state after 1, 2, .. N layers."""
    base = model.base_model
    norms = ("norm", "final_layer_norm", "ln_f")
    norm = next(getattr(base, name) for name in norms if hasattr(base, name))
    outputs = base(torch.tensor(sequence)[None], output_hidden_states=True)
    *states, last = outputs.hidden_states[1:]  # the last is normed already
    return torch.cat([*map(norm, states), last])


def save_as(model, tensors, folder: Path) -> None:
    """Save `tensors` in the place of the model's parameters."""
    model = copy.deepcopy(model)
    for parameter, tensor in zip(model.parameters(), tensors, strict=True):
        parameter.data = tensor.detach().clone()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_model(settings: dict, *, seed: int) -> LlamaForCausalLM:
    """A random Llama, in which every part matters to the output."""
    torch.manual_seed(seed)
    # At the usual initial size attention is nearly uniform and rotations do not show.
    config = LlamaConfig(**settings, initializer_range=0.3, attention_dropout=0.0)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def write_case(folder: Path, settings: dict, *, padding: str, seed: int) -> None:
    """Write one case: outputs, the DPO loss, its gradient, and one SGD step."""
    rng = np.random.default_rng(seed)
    model = make_model(settings, seed=seed)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data *= CONSTANTS["reference_scale"]
    pairs = make_pairs(settings["vocab_size"], rng)
    sequence = rng.integers(settings["vocab_size"], size=24)
    save_as(model, model.parameters(), folder / "weights")

    with torch.no_grad():
        hidden = hidden_by_layer(model, sequence)
        logits = model(torch.tensor(sequence)[None]).logits[0]
        reference_logps = token_logps(reference, pairs, padding=padding, rng=rng)
    logps = token_logps(model, pairs, padding=padding, rng=rng)
    rewards = CONSTANTS["beta"] * (logps - reference_logps).sum(-1)
    loss = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
    loss.mean().backward()
    gradient = [parameter.grad for parameter in model.parameters()]
    save_as(model, gradient, folder / "gradient")
    torch.optim.SGD(model.parameters(), lr=CONSTANTS["learning_rate"]).step()
    save_as(model, model.parameters(), folder / "after_sgd")

    values = {
        "hidden": hidden,
        "logits": logits,
        "logps": logps,
        "reference_logps": reference_logps,
        "rewards": rewards,
        "loss": loss,
        "gradient_norm": torch.stack([g.square().sum() for g in gradient]).sum().sqrt(),
    }
    arrays = {name: value.detach().numpy() for name, value in values.items()}
    np.savez_compressed(folder / "values.npz", **pairs, sequence=sequence, **arrays)
    settings = {**CONSTANTS, "padding": padding, "seed": seed}
    (folder / "record.json").write_text(json.dumps(settings | origin(), indent=1))


def story_values(folder: Path) -> dict:
    """Ids, token logps and mean negative log-likelihood of `STORY` under a model."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor(tokenizer(STORY, add_special_tokens=False)["input_ids"])
    ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])
    with torch.no_grad():
        logps = model(ids[None, :-1]).logits[0].log_softmax(-1)
    logps = logps[torch.arange(len(ids) - 1), ids[1:]]
    return {
        "text": STORY,
        "ids": ids.tolist(),
        "token_logps": logps.tolist(),
        "mean_nll": -float(logps.mean()),
    }


def origin(script: str = "tests/parity/write_golden.py") -> dict:
    """Script, commit, versions and date, for the record of a file."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "script": script,
        "after_commit": commit.strip(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    for name, settings in CASES.items():
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        write_case(GOLDEN / name, settings, padding=PADDING[name], seed=0)
        print(f"wrote {name}")
    if STORIES.is_dir():
        values = story_values(STORIES) | origin()
        (GOLDEN / "stories260k.json").write_text(json.dumps(values, indent=1))
        print("wrote stories260k.json")
    else:
        print("kept stories260k.json: no ../shared/data/stories260k")


if __name__ == "__main__":
    main()
