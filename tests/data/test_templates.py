"""Text to ids: what stands in, what is counted, batches of records, identity."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from data.chat_strategies import chat, encode_one, strings
from data.tokenizer_kinds import CHATML, KINDS, SPECIALS, make
from pref_jax.data import templates
from pref_jax.data.records import RecordError
from pref_jax.data.templates import TextEncoder, check_vocabulary, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_add_bos_needs_a_bos():
    with pytest.raises(ValueError, match="`add_bos=True` needs a tokenizer with a bos"):
        TextEncoder(make(ends="no_bos"), add_bos=True)


@pytest.mark.parametrize(
    ("ends", "prompt_ids"), [("one_special", [1]), ("no_bos", [1]), ("adds_bos", [0])]
)
def test_an_empty_prompt_gets_a_stand_in_that_is_counted(ends, prompt_ids):
    encoder = TextEncoder(make(ends=ends))
    prompt, response, _ = encode_one(encoder, strings("", "hello"))
    assert prompt == prompt_ids == encoder.encode_prompt("").tolist()
    assert response == [*make()("hello", add_special_tokens=False)["input_ids"], 1]
    assert encoder.counts["stand_in_bos"] == (ends != "adds_bos")


def test_the_stand_in_is_the_bos_before_the_eos():
    encoder = TextEncoder(make(ends="no_bos", bos_token="<|turn|>"))
    assert encode_one(encoder, strings("", "hello"))[0] == [2]


def test_an_empty_prompt_without_bos_or_eos_is_an_error():
    tokenizer = make(ends="no_bos", eos_token=None)
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    encoder = TextEncoder(tokenizer, chat_template=template)
    assert encoder.end_ids == (3,) and encoder.pad_id == 0
    assert encode_one(encoder, chat("hello"))[1][-1] == 3
    with pytest.raises(RecordError, match="prompt: the prompt has no token, and the"):
        encoder.encode_prompt("")
    with pytest.raises(RecordError, match="has no eos_token to end a response"):
        encoder.encode(strings("hello", "world"))


def test_a_tokenizer_that_ends_text_with_another_token_than_eos_is_an_error():
    with pytest.raises(
        ValueError, match=r"ends plain text with \['</s>'\], and a resp"
    ):
        TextEncoder(make(ends="adds_bos_and_eos", eos_token="<|im_end|>"))


def test_special_and_unknown_tokens_in_a_response_are_counted():
    encoder = TextEncoder(make("unigram"), chat_template=CHATML)
    encoder.encode(strings("<|turn|>hello", " a</s>w<|turn|>", " a<|im_end|>"))
    assert encoder.counts["special_tokens_in_response"] == 3
    encoder.encode(chat("a<|im_end|><|im_end|>w", "a</s>"))
    assert encoder.counts["special_tokens_in_response"] == 6
    assert encoder.counts["unknown_tokens"] == 0
    encoder.encode(strings("hello 🎉", " 🎉", " world"))
    assert encoder.counts["unknown_tokens"] == 2
    assert encoder.counts["special_tokens_in_response"] == 6
    assert "unknown_tokens: 2" in encoder.summary()


def test_text_that_the_tokenizer_drops_is_counted():
    encoder = TextEncoder(make("metaspace"))
    encoder.encode(strings("hello 🎉", " the", " an 🎉🎉"))
    assert encoder.counts["dropped_characters"] == 3
    encoder = TextEncoder(make("byte"))
    encoder.encode(strings("hello 🎉", " the", " an 🎉🎉"))
    assert encoder.counts["dropped_characters"] == 0


def digits(**unknown):
    """A tokenizer that knows digits and its special tokens, and no letter."""
    names = [*SPECIALS, *unknown.values(), *"0123456789"]
    ids = {token: token_id for token_id, token in enumerate(names)}
    backend = Tokenizer(models.WordLevel(ids, **unknown))
    backend.add_special_tokens(SPECIALS)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unknown
    )


def test_a_tokenizer_without_letters_is_read_as_any_other():
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    for tokenizer in (digits(), digits(unk_token="?")):
        first = 4 + (tokenizer.unk_token is not None)
        encoder = TextEncoder(tokenizer, chat_template=template)
        assert encoder.end_ids == (3, 1)
        record = strings("12", "3")
        expected = [0, first + 1, first + 2], [first + 3, 1]
        assert encode_one(encoder, record)[:2] == expected
    with pytest.raises(
        RecordError, match="x.jsonl:8: the tokenizer cannot encode 'a3'"
    ):
        TextEncoder(digits()).encode(strings("a", "3"))
    with pytest.raises(RecordError, match="prompt: the tokenizer cannot encode"):
        TextEncoder(make()).encode_prompt("\ud800")


def test_a_response_that_the_tokenizer_drops_is_an_error():
    encoder = TextEncoder(make())
    with pytest.raises(RecordError, match="response 1 holds no token but the end"):
        encoder.encode(strings("hello", "world", "</s>"))
    encoder = TextEncoder(make("metaspace"))
    with pytest.raises(RecordError, match="response 0 holds no token but the end"):
        encoder.encode(strings("hello", "🎉", " world"))


def test_a_tokenizer_without_offsets_is_an_error():
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="must be a fast one, .* got SimpleNamespace"):
        TextEncoder(slow)


def test_the_sampler_gets_the_prompt_that_is_trained_on():
    encoder = TextEncoder(make(), chat_template=CHATML)
    for record in (strings("hello", " world"), chat("world", "there")):
        group = encoder.encode(record)
        prompt = encoder.encode_prompt(record.prompt)
        np.testing.assert_array_equal(prompt, group.prompt)
        assert prompt.dtype == np.int32
    assert encoder.counts["records"] == 2


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = make("byte", "adds_bos_and_eos")
    before = tokenizer.backend_tokenizer.to_str()
    TextEncoder(tokenizer, chat_template=CHATML, add_bos=False).encode(chat("world"))
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.chat_template is None


def test_truncation_stored_in_a_tokenizer_does_not_cut_a_text():
    tokenizer = make()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    _, ids, _ = encode_one(TextEncoder(tokenizer), strings("hello", " world" * 9))
    assert len(ids) == 10


def test_the_vocabulary_must_fit_the_model():
    tokenizer = make()
    check_vocabulary(tokenizer, len(tokenizer))
    last = len(tokenizer) - 1
    with pytest.raises(
        ValueError, match=rf"ids up to {last} .* vocab_size is {last}\."
    ):
        check_vocabulary(tokenizer, last)


def test_a_saved_tokenizer_loads_and_a_missing_one_says_so(tmp_path):
    tokenizer = make("byte", "adds_bos")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    ids = [encode_one(TextEncoder(t), chat("world"))[:2] for t in (tokenizer, loaded)]
    assert ids[0] == ids[1]
    with pytest.raises(ValueError, match="needs a folder with a tokenizer; .* is none"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ValueError, match="cannot be read: .*line 1"):
        load_tokenizer(tmp_path)


def some_records(*, bad=()):
    """Strings and chats in turn; those of `bad` hold a BOS in their response."""
    made = []
    for row in range(20):
        said = "<s>" if row in bad else f" the world {row}"
        made.append(strings(f"hello {row}", said, " there"))
        made.append(chat(("hello", f"{row}", said), "an answer 🎉"))
    return [
        dataclasses.replace(record, row=row, where=f"x.jsonl:{row + 1}")
        for row, record in enumerate(made)
    ]


def assert_equal_groups(some, others):
    for group, other in zip(some, others, strict=True):
        for name in ("responses", "loss_masks"):
            pairs = zip(getattr(group, name), getattr(other, name), strict=True)
            for one, two in pairs:
                np.testing.assert_array_equal(one, two, strict=True)
        np.testing.assert_array_equal(group.prompt, other.prompt, strict=True)
        assert (group.record, group.labels) == (other.record, other.labels)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_records_is_encoded_as_each_of_them(monkeypatch, kind, batch_size):
    monkeypatch.setattr(templates, "_BATCH_SIZE", batch_size)
    one, all_ = (TextEncoder(make(kind), chat_template=CHATML) for _ in range(2))
    records = some_records()
    groups = all_.encode_all(records)
    assert_equal_groups(groups, [one.encode(record) for record in records])
    assert one.counts == all_.counts and one.examples == all_.examples
    assert all_.counts["records"] == 40 and all_.left_out == []
    assert all_.encode_all([]) == []


def test_records_that_cannot_be_encoded_are_left_out_counted_and_listed():
    records = some_records(bad=(1, 6))
    encoder, alone = (TextEncoder(make(), chat_template=CHATML) for _ in range(2))
    groups = encoder.encode_all(records, on_error="skip")
    bad = {2, 3, 12, 13}
    usable = [record for record in records if record.row not in bad]
    assert_equal_groups(groups, [alone.encode(record) for record in usable])
    assert [where for where, _ in encoder.left_out] == [f"x.jsonl:{n + 1}" for n in bad]
    assert all("holds the text '<s>'" in problem for _, problem in encoder.left_out)
    counts = encoder.counts
    assert counts["records"] + counts["left_out"] == len(records)
    assert counts == alone.counts | {"left_out": 4}
    assert "left_out: 4\n    x.jsonl:3: response 0 holds" in encoder.summary()
    with pytest.raises(RecordError, match='x.jsonl:3: .* Fix it, or pass on_error="sk'):
        encoder.encode_all(records)
    with pytest.raises(RecordError, match="x.jsonl:3: .*no other of 2 records can be"):
        encoder.encode_all([records[2], records[12]], on_error="skip")
    with pytest.raises(ValueError, match="`on_error` must be .* got 'drop'"):
        encoder.encode_all(records, on_error="drop")


def test_a_text_that_stops_the_tokenizer_is_left_out_alone():
    records = [strings("1", "3"), strings("a", "3"), strings("2", "34")]
    encoder = TextEncoder(digits())
    groups = encoder.encode_all(records, on_error="skip")
    assert_equal_groups(
        groups, [encoder.encode(records[0]), encoder.encode(records[2])]
    )
    ((where, problem),) = encoder.left_out
    assert where == "x.jsonl:8" and "the tokenizer cannot encode 'a3'" in problem
    with pytest.raises(RecordError, match="the tokenizer cannot encode 'a3'"):
        encoder.encode_all(records)


def test_counts_have_examples():
    encoder = TextEncoder(make("unigram", "no_bos"), chat_template=CHATML)
    encoder.encode(strings("", "a<|turn|>", "hello"))
    encoder.encode(strings("🎉", " hello", " world"))
    assert encoder.examples["stand_in_bos"] == ["x.jsonl:8: id 1"]
    shown = ["x.jsonl:8: ['<|turn|>']"]
    assert encoder.examples["special_tokens_in_response"] == shown
    assert encoder.examples["unknown_tokens"] == ["x.jsonl:8: ['🎉']"]
    encoder = TextEncoder(make("metaspace"))
    encoder.encode(strings("<s>a<s> hello 🎉", " hello", " an 🎉🎉"))
    assert encoder.examples["extra_bos_in_prompt"] == ["x.jsonl:8: 2 in all"]
    assert encoder.examples["dropped_characters"] == [
        "x.jsonl:8: '🎉'",
        "x.jsonl:8: '🎉🎉'",
    ]
    summary = encoder.summary()
    assert "  dropped_characters: 3\n    x.jsonl:8: '🎉'\n" in summary


def test_the_identity_changes_with_whatever_changes_the_ids():
    def identity(kind="byte", ends="adds_bos", template=CHATML, add_bos=None, **tokens):
        tokenizer = make(kind, ends, **tokens)
        return TextEncoder(
            tokenizer, chat_template=template, add_bos=add_bos
        ).identity()

    def changed(**options):
        base, other = identity(), identity(**options)
        return {name for name in base if base[name] != other[name]}

    assert changed() == set()
    assert changed(kind="unigram") >= {"tokenizer"}
    assert changed(special=["<think>"]) == {"tokenizer"}
    assert changed(pad_token="</s>", eos_token="<|im_end|>") == {"special_ids"}
    assert changed(ends="no_bos") == {"special_ids"}
    assert changed(add_bos=False) == {"special_ids", "add_bos"}
    assert changed(add_bos=True) == {"add_bos"}
    spaced = CHATML.replace("<|turn|>", "<|turn|> ")
    assert changed(template=spaced) == {"chat_template", "chat_probe"}
    assert changed(template=CHATML + "{# a remark #}") == {"chat_template"}
    assert {"chat_template", "chat_probe"} <= changed(template=None)
    assert identity(template=None)["chat_template"] == "none"
    assert set(map(type, identity().values())) == {str}


def test_the_identity_changes_with_the_date_that_a_template_writes(monkeypatch):
    dated = "{{ strftime_now('%d %b') }}" + CHATML
    made = []
    for day in (1, 2):
        clock = types.SimpleNamespace(now=lambda day=day: datetime(2024, 5, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        made.append(TextEncoder(make(), chat_template=dated).identity())
    different = {name for name in made[0] if made[0][name] != made[1][name]}
    assert different == {"chat_probe"}


@pytest.mark.slow
def test_the_identity_is_the_same_in_every_process(tmp_path):
    tokenizer = make("unigram", special=["<think>"], pad_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import json, sys; from pref_jax.data import templates\n"
        "tokenizer = templates.load_tokenizer(sys.argv[1])\n"
        "encoder = templates.TextEncoder(tokenizer)\n"
        "tokenizer('hello', truncation=True, max_length=4, padding='max_length')\n"
        "print(json.dumps(encoder.identity()))"
    )
    here = TextEncoder(load_tokenizer(tmp_path)).identity()
    for seed in "12":
        process = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout) == here
