"""The tests of `test_families.py` on values that torch makes here and now, and more.

Other weights and ids than the golden files hold. torch also opens what we save, draws
greedily what our sampler draws, and scores what our reward heads score.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

import family_cases  # noqa: E402
from family_cases import FAMILY_CASES, LONG  # noqa: E402
from models.test_families import (  # noqa: E402, F401  tests: they take the fixture below
    GOLDEN,
    Case,
    assert_close,
    logits_of_sequence,
    model_of,
    quick_compiles,
    test_hidden_states_after_each_layer_are_torchs,
    test_logits_are_torchs,
    test_texts_are_longer_than_windows_and_than_a_model_before_its_extension,
    test_token_logps_of_packed_rows_and_their_gradient_are_torchs,
)
from parity import write_family_golden  # noqa: E402
from pref_jax.models import pretrained  # noqa: E402
from pref_jax.sampling import SamplingConfig, make_sampler  # noqa: E402

SEED = 1
PROMPTS = (5, 1, 14, 9)  # tokens; with the response some are longer than any window
NUM_NEW = 12


@pytest.fixture(scope="module", params=FAMILY_CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    padding = "right"  # the files have it on the left
    write_family_golden.write_case(folder, request.param, padding=padding, seed=SEED)
    return Case(request.param, folder)


def torch_model(folder, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def torch_logits(model, case):
    """[S, V] of the one sequence."""
    with torch.no_grad():
        return model(torch.tensor(case.values["sequence"])[None]).logits[0].numpy()


def load(folder, name, **options):
    return pretrained.load(folder, max_positions=LONG.get(name), **options)


def assert_trees_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_the_script_still_writes_the_recorded_values(name, tmp_path):
    recorded = Case(name, GOLDEN / name)
    padding, seed = recorded.record["padding"], recorded.record["seed"]
    write_family_golden.write_case(tmp_path, name, padding=padding, seed=seed)
    made = Case(name, tmp_path)
    assert made.config == recorded.config
    assert_trees_equal(made.params, recorded.params)
    assert made.values.keys() == recorded.values.keys()
    for key, value in made.values.items():
        if key in ("hidden", "logits", "logps"):
            assert_close(value, recorded.values[key], key)
        else:
            np.testing.assert_array_equal(value, recorded.values[key])


@pytest.mark.parametrize("is_like", [False, True], ids=["alone", "like"])
def test_torch_opens_what_is_saved_and_computes_the_same(case, tmp_path, is_like):
    like = case.folder / "weights" if is_like else None
    folder = pretrained.save(tmp_path / "saved", case.config, case.params, like=like)
    model = torch_model(folder)
    original = torch_model(case.folder / "weights")
    # Without `like` a Mistral that has no window is a Llama.
    assert type(model) is type(original) or not is_like
    assert model.config.architectures == [type(model).__name__]
    ours, expected = torch_logits(model, case), torch_logits(original, case)
    if case.name == "gpt_neox_in_turn" and not is_like:
        # gelu_fast is saved under another name, and computed in another order.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours, expected)
    config, params = load(folder, case.name)
    assert config == case.config
    assert_trees_equal(params, case.params)


def test_greedy_responses_are_torchs(case):
    rng = np.random.default_rng(0)
    # torch changes LongRoPE's factors as a text grows; one that starts long keeps them.
    lengths = (20, 17) if case.name in LONG else PROMPTS
    prompts = [rng.integers(case.config.vocab_size, size=n) for n in lengths]
    padded = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = torch_model(case.folder / "weights")
    config = SamplingConfig(max_new_tokens=NUM_NEW, temperature=0.0)
    sampler = make_sampler(model_of(case.config), config, end_ids=())
    keys = jax.random.split(jax.random.key(0), len(prompts))
    samples = sampler(case.params, padded, np.array(lengths, np.int32), keys)
    for prompt, tokens in zip(prompts, samples.tokens[:, 0], strict=True):
        expected = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


# --- reward models --------------------------------------------------------------------


def scores(name, config, params, texts):
    """[N]: our head at the last token of each text."""
    length = max(map(len, texts))
    index = np.broadcast_to(np.arange(length), (len(texts), length))
    sizes = np.array([len(text) for text in texts])
    tokens = np.zeros_like(index)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    end = np.where(index < sizes[:, None], sizes[:, None], index + 1)
    with jax.disable_jit():
        hidden = model_of(config).hidden(params, tokens, index, end)
    return hidden[np.arange(len(texts)), sizes - 1] @ jnp.asarray(params["reward_head"])


def torch_scores(model, texts, *, padding):
    """[N] of padded texts."""
    length = max(map(len, texts))
    ids, mask, position = np.zeros((3, len(texts), length), np.int64)
    for i, text in enumerate(texts):
        start = length - len(text) if padding == "left" else 0
        place = slice(start, start + len(text))
        ids[i, place], mask[i, place] = text, 1
        position[i, place] = np.arange(len(text))
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(position),
        )
    return output.logits[:, 0].numpy()


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_reward_models_are_torchs_and_are_saved_as_torch_opens_them(name, tmp_path):
    model = write_family_golden.make_model(
        name,
        seed=SEED,
        auto=AutoModelForSequenceClassification,
        num_labels=1,
        pad_token_id=0,
    )
    model.save_pretrained(tmp_path / "theirs")
    config, params = load(tmp_path / "theirs", name)
    assert params["reward_head"].shape == (config.width,)
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, config.vocab_size, size=n) for n in (20, 3, 11, 1)]
    ours = scores(name, config, params, texts)
    for padding in ("left", "right"):
        theirs = torch_scores(model, texts, padding=padding)
        assert_close(ours, theirs, f"padded on the {padding}")
    assert np.ptp(ours) > 0.1, "the texts differ"

    for like in (None, tmp_path / "theirs"):
        folder = tmp_path / f"ours-{like is None}"
        pretrained.save(folder, config, params, like=like)
        settings = AutoConfig.from_pretrained(folder)
        settings.pad_token_id = 0  # without `like` there is none
        settings.save_pretrained(folder)
        opened = torch_model(folder, AutoModelForSequenceClassification)
        assert type(opened) is type(model) or like is None
        assert settings.architectures == [type(opened).__name__]
        expected = torch_scores(model, texts, padding="left")
        again = torch_scores(opened, texts, padding="left")
        exact = name != "gpt_neox_in_turn" or like is not None
        np.testing.assert_allclose(again, expected, rtol=0, atol=0 if exact else 1e-5)


# --- multimodal models ----------------------------------------------------------------


def multimodal_model(name):
    """A tiny multimodal model of random weights."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    if name == "gemma3":
        _, text = family_cases.settings("gemma3")
        text["final_logit_softcapping"] = None  # this class has no cap
        config = Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1
        )
        return Gemma3ForConditionalGeneration(config)
    _, text = family_cases.settings("mistral_small")
    config = Mistral3Config(
        text_config={"model_type": "mistral"} | text,
        vision_config={"model_type": "pixtral", "head_dim": 8} | vision,
        image_token_index=1,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_the_text_part_of_a_multimodal_model_is_torchs(name, tmp_path):
    torch.manual_seed(SEED)
    model = multimodal_model(name).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter += torch.rand_like(parameter) - 0.5
    model.save_pretrained(tmp_path)
    config, params = pretrained.load(tmp_path)
    recorded = Case("gemma3", GOLDEN / "gemma3")
    ours = logits_of_sequence(recorded, params, config)
    assert_close(ours, torch_logits(model, recorded), "logits")
    assert np.ptp(ours) > 0.1, "the logits differ"
    folder = pretrained.save(tmp_path / "text", config, params, like=tmp_path)
    again = torch_logits(torch_model(folder), recorded)
    np.testing.assert_array_equal(again, torch_logits(model, recorded))
