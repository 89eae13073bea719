"""The cut of texts into prompt and response, over tokenizers of many habits."""

import functools
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fixtures
from data.chat_strategies import (
    chat,
    chat_records,
    encode_one,
    responses,
    string_records,
    strings,
    texts,
    user,
)
from data.tokenizer_kinds import CHATML, ENDS, KINDS, WITH_BOS_AND_EOS, make
from pref_jax.data.readers import read
from pref_jax.data.records import Message, RecordError, from_objects
from pref_jax.data.rows import FIT_POLICIES
from pref_jax.data.sources import fit_groups
from pref_jax.data.templates import TextEncoder, load_tokenizer

SPEAKERS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@functools.cache
def shared_encoder(kind, ends):
    tokenizer = make(kind, ends)
    return tokenizer, TextEncoder(tokenizer, chat_template=CHATML)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_chat", [False, True])
@settings(max_examples=25, deadline=None)
@given(prompt=texts, responses=responses)
def test_t1_prompt_and_response_ids_are_those_of_the_whole_rendering(
    kind, ends, as_chat, prompt, responses
):
    tokenizer, encoder = shared_encoder(kind, ends)
    try:
        if as_chat:
            group = encoder.encode(chat(*responses, prompt=user(prompt)))
        else:
            group = encoder.encode(strings(prompt, *responses))
    except RecordError as error:
        assume("no token but the end" not in str(error))
        raise
    prefix = [0] if ends.startswith("adds_bos") else []
    for k, response in enumerate(responses):
        if as_chat:
            turns = [("user", prompt), ("assistant", response)]
            messages = [{"role": role, "content": text} for role, text in turns]
            text = tokenizer.apply_chat_template(
                messages, chat_template=CHATML, tokenize=False
            ).removesuffix("\n")
        else:
            text = prompt + response
        whole = prefix + tokenizer(text, add_special_tokens=False)["input_ids"]
        whole += [] if as_chat else [tokenizer.eos_token_id]
        ids = group.prompt.tolist() + group.responses[k].tolist()
        if len(ids) > len(whole):  # the stand-in of a prompt without a token
            assert ids.pop(0) == tokenizer.eos_token_id
        assert ids == whole
        assert group.loss_masks[k].all()
        assert group.loss_masks[k].shape == group.responses[k].shape
    assert all(ids.dtype == np.int32 for ids in (group.prompt, *group.responses))
    assert group.labels == strings("", *responses).labels and group.record == 7


@settings(max_examples=150, deadline=None)
@given(prompt=texts, responses=responses)
def test_t1_the_prompt_is_the_longest_common_run_before_the_response(prompt, responses):
    tokenizer, encoder = shared_encoder("byte", "adds_bos")
    wholes = [tokenizer.tokenize(prompt + response) for response in responses]
    cut, num_bytes = 0, 0
    # A byte-level token has one character for each byte of the text.
    for column in zip(*wholes, strict=False):
        num_bytes += len(column[0])
        if len(set(column)) > 1 or num_bytes > len(prompt.encode()):
            break
        cut += 1
    group = encoder.encode(strings(prompt, *responses))
    tokens = tokenizer.convert_ids_to_tokens(group.prompt.tolist())
    assert tokens == ["<s>", *wholes[0][:cut]]


def test_t1_a_straddling_token_opens_the_response_and_is_counted():
    tokenizer = make()  # trims offsets: there ` world` seems to begin with its `w`
    encoder = TextEncoder(tokenizer)
    record = strings("hello ", "world", "!")
    group = encoder.encode(record)
    first, second = (tokenizer.convert_ids_to_tokens(r) for r in group.responses)
    assert tokenizer.convert_ids_to_tokens(group.prompt) == ["<s>", "hello"]
    # The prompts of a pair are one: the blank belongs to both responses.
    assert first == ["Ġworld", "</s>"] and second == ["Ġ", "!", "</s>"]
    assert all(mask.all() for mask in group.loss_masks)
    assert encoder.counts["straddling_tokens"] == 2
    assert encoder.counts["records_with_straddling"] == 1
    assert encoder.examples["straddling_tokens"] == [
        "x.jsonl:8: ' world' in 'hello ' | 'world'",
        "x.jsonl:8: ' ' in 'hello ' | '!'",
    ]
    for _ in range(3):
        encoder.encode(record)
    assert len(encoder.examples["straddling_tokens"]) == 3
    assert encoder.counts["records"] == 4
    encoder.encode(strings("hello", " world"))
    assert encoder.counts["records_with_straddling"] == 4
    assert "straddling_tokens: 8" in encoder.summary()
    assert "\n    x.jsonl:8: ' world' in" in encoder.summary()


@pytest.mark.parametrize(
    ("folder", "bos", "end"), [("gpt2_tokenizer", None, 50256), ("stories260k", 1, 2)]
)
@pytest.mark.parametrize("template", [None, SPEAKERS])
def test_t1_t2_t4_t5_real_tokenizers_and_pairs(shared_data, template, folder, bos, end):
    tokenizer = load_tokenizer(shared_data(folder))
    encoder = TextEncoder(tokenizer, chat_template=template)
    records = read(shared_data("gsm8k_pref") / "smoke.jsonl.gz")
    for record in records:
        text, opening = record.prompt, ""
        if template is not None:
            turns = [(Message("assistant", r),) for r in record.responses]
            record = strings(user(record.prompt), *turns)
            text, opening = f"user: {text}{tokenizer.eos_token}\n", "assistant: "
        group = encoder.encode(record)
        prompt = group.prompt.tolist()
        for response, ids, mask in zip(
            record.responses, group.responses, group.loss_masks, strict=True
        ):
            said = response if template is None else response[0].content
            whole = tokenizer(text + opening + said)["input_ids"]
            assert prompt + ids.tolist() == [*whole, end]
            assert ids[-1] == end and (ids == end).sum() == 1 and mask.all()
            assert bos not in ids
        assert prompt.count(end) == (template is not None)
        assert (prompt[0], prompt.count(bos)) == (bos, 1) or bos is None
    assert encoder.counts["records"] == len(records) == 100
    assert encoder.counts["unknown_tokens"] == encoder.counts["dropped_characters"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize(
    ("ends", "add_bos", "num_bos"),
    [
        ("no_bos", None, 0),
        ("no_bos", False, 0),
        ("adds_bos", None, 1),
        ("adds_bos", True, 1),
        ("adds_bos", False, 0),
        ("adds_bos_and_eos", None, 1),
        ("one_special", None, 0),
        ("one_special", True, 1),
    ],
)
def test_t2_the_prompt_has_one_bos_or_none_and_the_response_none(
    kind, as_chat, ends, add_bos, num_bos
):
    tokenizer = make(kind, ends)
    encoder = TextEncoder(tokenizer, add_bos=add_bos, chat_template=CHATML)
    record = (
        chat("world", "there") if as_chat else strings("hello 42", "the world", "there")
    )
    group = encoder.encode(record)
    bos = 1 if ends == "one_special" else 0
    assert group.prompt.tolist().count(bos) == num_bos
    assert group.prompt[0] == bos or not num_bos
    for ids in group.responses:
        assert bos not in ids[:-1] and ids[-1] == (3 if as_chat else 1)
    assert encoder.encode_prompt(record.prompt).tolist().count(bos) == num_bos


@pytest.mark.parametrize("ends", ["no_bos", "adds_bos"])
def test_t2_a_bos_in_the_text_is_not_doubled(ends):
    tokenizer = make("byte", ends, bos_token="<s>")
    encoder = TextEncoder(tokenizer, chat_template=WITH_BOS_AND_EOS)
    for record in (strings("<s>hello", " world"), chat("world")):
        prompt, response, _ = encode_one(encoder, record)
        assert prompt.count(0) == 1 and prompt[0] == 0 and 0 not in response
    assert encoder.counts["extra_bos_in_prompt"] == 0
    encoder.encode(strings("<s>hello<s>", "world"))
    assert encoder.counts["extra_bos_in_prompt"] == 1


def test_t2_a_bos_in_the_text_of_a_response_is_an_error():
    encoder = TextEncoder(make())
    with pytest.raises(RecordError, match=r"x.jsonl:8: response 1 holds the text '<s>"):
        encoder.encode(strings("hello", " world", " <s>there"))
    with pytest.raises(RecordError, match="response 0 holds the text '<s>'"):
        encoder.encode(strings("", "<s>there"))


@pytest.mark.parametrize("kind", KINDS)
def test_t3_a_tokenizer_without_bos_writes_none(kind):
    tokenizer = make(kind, "no_bos")
    assert tokenizer.bos_token is None and tokenizer.bos_token_id is None
    encoder = TextEncoder(tokenizer, chat_template=WITH_BOS_AND_EOS)
    begun = TextEncoder(make(kind), chat_template=WITH_BOS_AND_EOS)
    for record in (strings("42 is 42", " world", " there"), chat("world", "there")):
        group, other = encoder.encode(record), begun.encode(record)
        for ids in (group.prompt, *group.responses):
            assert ids.dtype == np.int32 and 0 not in ids and len(ids)
        assert [0, *group.prompt] == other.prompt.tolist()
        assert "None" not in tokenizer.decode(group.prompt)
        assert [*map(list, group.responses)] == [*map(list, other.responses)]
    assert encoder.encode_prompt("").tolist() == [1]  # the EOS stands in
    assert encoder.summary().startswith("2 records encoded; begin [] [], end")


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_t4_a_string_ends_with_one_eos_that_is_trained(kind, ends):
    encoder = TextEncoder(make(kind, ends))
    assert encoder.end_ids == (1,)
    for response in (" world", " world</s>"):
        _, ids, mask = encode_one(encoder, strings("hello", response))
        assert ids.count(1) == 1 and ids[-1] == 1 and mask.all()
    assert encoder.counts["special_tokens_in_response"] == 0


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("template", [CHATML, WITH_BOS_AND_EOS])
def test_t4_a_chat_ends_with_one_end_of_turn_that_is_trained_and_no_eos(template, ends):
    encoder = TextEncoder(make("byte", ends, bos_token="<s>"), chat_template=template)
    assert encoder.end_ids == (3, 1)
    _, ids, mask = encode_one(encoder, chat("world"))
    assert ids.count(3) == 1 and ids[-1] == 3 and 1 not in ids and mask.all()
    assert encoder.decode(ids) == "world"


@pytest.mark.parametrize("pad_token", ["</s>", "w", "<|turn|>", None])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_t5_masks_come_from_lengths_whatever_the_pad_token_is(kind, ends, pad_token):
    tokenizer = make(kind, ends, pad_token=pad_token)
    encoder = TextEncoder(tokenizer)
    assert encoder.pad_id == (tokenizer.pad_token_id if pad_token else 1)
    group = encoder.encode(strings("hello", " world</s> world", " world"))
    assert [mask.all() for mask in group.loss_masks] == [True, True]
    assert [len(m) for m in group.loss_masks] == [len(r) for r in group.responses]
    assert [r[-1] for r in group.responses] == [1, 1]


def long_and_short(kind):
    """Three pairs: one fits, one is long by its prompt, one by its responses."""
    encoder = TextEncoder(make(kind), chat_template=CHATML)
    records = from_objects(
        [
            {"prompt": "hello", "chosen": " world", "rejected": " there"},
            {"prompt": "hello " * 40, "chosen": " world", "rejected": " there"},
            {"prompt": "hello", "chosen": " world" * 40, "rejected": " there the"},
        ]
    )
    return encoder, encoder.encode_all(records)


@pytest.mark.parametrize("policy", FIT_POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_t6_no_policy_leaves_a_response_without_a_trained_token(kind, policy):
    _, groups = long_and_short(kind)
    length = 40
    assert len(groups[1].prompt) >= length > groups[0].num_tokens
    fitted, counts = fit_groups(groups, length, policy=policy)
    kept = {"drop": [0], "keep_start": [0, 2], "keep_end": [0, 1]}[policy]
    assert [group.record for group in fitted] == kept
    assert counts == {"groups": 3, "dropped": 3 - len(kept), "cut": len(kept) - 1}
    batch = fixtures.pack_all(fitted, length)
    num_trained = batch.loss_mask.sum(-1)
    np.testing.assert_array_equal(num_trained > 0, batch.valid)
    # A mean over a response, and one over the batch, divide by these.
    assert batch.valid.sum() == 2 * len(kept)


def texts_in_rows(batch):
    """(record, k) -> the ids that the last token of that branch sees, in order."""
    seen, per_row = {}, len(batch.valid) // len(batch.tokens)
    for b, k in np.argwhere(batch.valid):
        row = b // per_row
        last = batch.start[b, k] + batch.length[b, k]
        visible = np.flatnonzero(last < batch.end[row][: last + 1])
        seen[batch.record[b], k] = batch.tokens[row, visible].tolist()
    return seen


@pytest.mark.parametrize("policy", FIT_POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_t7_both_of_a_pair_see_one_prompt_after_any_policy(kind, policy):
    _, groups = long_and_short(kind)
    fitted, _ = fit_groups(groups, 40, policy=policy)
    seen = texts_in_rows(fixtures.pack_all(fitted, 40))
    assert len(seen) == 2 * len(fitted)
    for group in fitted:
        assert group is groups[group.record] or group.num_tokens == 40
        whole = groups[group.record].prompt.tolist()
        kept = len(group.prompt) - 1
        prompt = [whole[0], *whole[len(whole) - kept :]]
        assert policy == "keep_end" or prompt == whole
        for k, response in enumerate(groups[group.record].responses):
            num_kept = len(seen[group.record, k]) - len(prompt)
            assert seen[group.record, k] == prompt + response[:num_kept].tolist()
            assert policy == "keep_start" or num_kept == len(response)


def test_t7_a_policy_that_is_not_known_is_an_error():
    _, groups = long_and_short("byte")
    with pytest.raises(ValueError, match="`policy` must be one of drop, keep_start, k"):
        fit_groups(groups, 40, policy="longest_first")


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_t23_an_end_token_in_the_prompt_does_not_end_the_response(kind, ends):
    encoder = TextEncoder(
        make(kind, ends), chat_template=CHATML.replace("<|im_end|>", "</s>")
    )
    assert encoder.end_ids == (1,)
    asked = (Message("system", "hello"), *user())
    for record, num_in_prompt in (
        (strings("the</s>answer</s>", " world", " there"), 2),
        (chat("world", "there", prompt=asked), 2),
        (chat(("hello", "the", "world"), "there", prompt=asked), 2),
    ):
        group = encoder.encode(record)
        assert (group.prompt[ends == "one_special" :] == 1).sum() >= num_in_prompt - 1
        for k, (ids, mask) in enumerate(
            zip(group.responses, group.loss_masks, strict=True)
        ):
            turns = record.responses[k]
            spoken = 1 if isinstance(turns, str) else (len(turns) + 1) // 2
            assert ids[-1] == 1 and mask[-1]
            assert (ids[mask] == 1).sum() == spoken


def trained_ends(encoder, record, group):
    """For each response its trained end tokens, and the turns that they end."""
    end_id = encoder.end_ids[isinstance(record.prompt, str) and -1]
    for response, ids, mask in zip(
        record.responses, group.responses, group.loss_masks, strict=True
    ):
        spoken = [response]
        if not isinstance(response, str):
            spoken = [m.content for m in response if m.role == "assistant"]
        yield int((ids[mask] == end_id).sum()), spoken


@pytest.mark.parametrize("ends", ["adds_bos", "no_bos", "one_special"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(record=st.one_of(string_records, chat_records))
def test_t1_t4_any_record_is_cut_with_its_ends_trained_or_named(kind, ends, record):
    tokenizer, encoder = shared_encoder(kind, ends)
    try:
        group = encoder.encode(record)
    except RecordError as error:
        assert error.where == record.where
        expected = "no token but the end|holds the text '<s>'"
        assert re.search(expected, error.problem)
        return
    end = "</s>" if isinstance(record.prompt, str) else "<|im_end|>"
    for num_trained, spoken in trained_ends(encoder, record, group):
        written = sum(text.count(end) for text in spoken)
        # A string that ends with the text of the EOS gets no second one.
        last = isinstance(record.prompt, str) and spoken[-1].endswith(end)
        assert num_trained == len(spoken) + written - last
    if isinstance(record.prompt, str):
        texts = [record.prompt + response for response in record.responses]
    else:
        texts = [
            tokenizer.apply_chat_template(
                [vars(m) for m in (*record.prompt, *response)],
                chat_template=CHATML,
                tokenize=False,
            ).removesuffix("\n")
            for response in record.responses
        ]
    for text, response in zip(texts, group.responses, strict=True):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = group.prompt.tolist() + response.tolist()
        begin = [0] if ends == "adds_bos" else []
        whole = whole if whole[: len(begin)] == begin else begin + whole
        whole += [] if whole and whole[-1] == response[-1] else [int(response[-1])]
        assert ids[len(ids) - len(whole) :] == whole
        assert len(ids) - len(whole) <= (begin == [])  # a stand-in
