"""Text to ids: the cut in token space, one BOS, one trained end, masks from lengths."""

import functools
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pref_jax.data.readers import read
from pref_jax.data.records import Message, Record, RecordError
from pref_jax.data.templates import TextEncoder, check_vocabulary, load_tokenizer

WORDS = "hello world, the  world\nsays: hello there! an answer to the question is 42"
SPECIALS = ["<s>", "</s>", "<|turn|>", "<|im_end|>"]
KINDS = ["byte", "metaspace", "unigram"]
ENDS = ["no_bos", "one_special", "adds_bos", "adds_bos_and_eos"]
SHARED = Path(__file__).parents[3] / "shared" / "data"

# Writes a newline after the end of turn, as ChatML does.
CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Ends the conversation with an EOS of its own, after the end of turn.
WITH_BOS_AND_EOS = (
    "{{ bos_token }}" + CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
)
# Shows reasoning in the last message alone.
LAST_ONLY = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.replace('think:', '') }}",
)


@functools.cache
def train(kind):
    """A small tokenizer; its ids 0 to 3 are `SPECIALS`."""
    shared = {"vocab_size": 400, "special_tokens": SPECIALS, "show_progress": False}
    corpus = [WORDS, "hello world says the answer"] * 4
    if kind == "byte":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **shared)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(**shared)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        tokenizer.decoder = decoders.Metaspace()
        shared["special_tokens"] = [*SPECIALS, "<unk>"]
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **shared)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def make(kind="byte", ends="adds_bos", **tokens):
    """A Hugging Face tokenizer of a kind, with one of the habits of `ENDS`."""
    backend = Tokenizer.from_str(train(kind))
    steps = [processors.ByteLevel(trim_offsets=True)] if kind == "byte" else []
    if ends.startswith("adds_bos"):
        single = "<s> $A </s>" if ends == "adds_bos_and_eos" else "<s> $A"
        ids = [("<s>", 0), ("</s>", 1)]
        steps += [processors.TemplateProcessing(single=single, special_tokens=ids)]
    backend.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if ends == "no_bos":
        del names["bos_token"]
    elif ends == "one_special":
        names = dict.fromkeys(["bos_token", "eos_token", "pad_token"], "</s>")
    if kind == "unigram":
        names["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names | tokens)


@functools.cache
def shared_encoder(kind, ends):
    tokenizer = make(kind, ends)
    return tokenizer, TextEncoder(tokenizer, chat_template=CHATML)


def strings(prompt, *responses):
    labels = tuple(float(k == 0) for k in range(len(responses)))
    return Record(prompt, responses, labels, 7, "x.jsonl:8")


def user(text="the question"):
    return (Message("user", text),)


def chat(*responses, prompt=None):
    """Responses are strings, or tuples of strings that alternate with a tool's."""
    turns = [(r,) if isinstance(r, str) else r for r in responses]
    roles = ("assistant", "tool", "assistant")
    messages = [tuple(Message(*m) for m in zip(roles, t, strict=False)) for t in turns]
    return strings(prompt or user(), *messages)


def encode_one(encoder, record):
    group = encoder.encode(record)
    return group.prompt.tolist(), group.responses[0].tolist(), group.loss_masks[0]


texts = st.one_of(
    st.lists(st.sampled_from([*WORDS.split(" "), " ", "\n", "é", "🎉", "ﬁ", "\u0301"])),
    st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=4), max_size=4),
).map("".join)
responses = st.lists(texts.filter(str.strip), min_size=1, max_size=3)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_chat", [False, True])
@settings(max_examples=25, deadline=None)
@given(prompt=texts, responses=responses)
def test_prompt_and_response_ids_are_those_of_the_whole_rendering(
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
def test_the_prompt_is_the_longest_common_run_of_tokens_before_the_response(
    prompt, responses
):
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


def test_a_straddling_token_opens_the_response_and_is_counted_and_shown():
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
def test_the_prompt_has_one_bos_or_none_and_the_response_none(
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
def test_a_bos_in_the_text_is_not_doubled(ends):
    tokenizer = make("byte", ends, bos_token="<s>")
    encoder = TextEncoder(tokenizer, chat_template=WITH_BOS_AND_EOS)
    for record in (strings("<s>hello", " world"), chat("world")):
        prompt, response, _ = encode_one(encoder, record)
        assert prompt.count(0) == 1 and prompt[0] == 0 and 0 not in response
    assert encoder.counts["extra_bos_in_prompt"] == 0
    encoder.encode(strings("<s>hello<s>", "world"))
    assert encoder.counts["extra_bos_in_prompt"] == 1


def test_a_bos_in_the_text_of_a_response_is_an_error():
    encoder = TextEncoder(make())
    with pytest.raises(RecordError, match=r"x.jsonl:8: response 1 holds the text '<s>"):
        encoder.encode(strings("hello", " world", " <s>there"))
    with pytest.raises(RecordError, match="response 0 holds the text '<s>'"):
        encoder.encode(strings("", "<s>there"))


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


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_string_ends_with_one_eos_that_is_trained(kind, ends):
    encoder = TextEncoder(make(kind, ends))
    assert encoder.end_ids == (1,)
    for response in (" world", " world</s>"):
        _, ids, mask = encode_one(encoder, strings("hello", response))
        assert ids.count(1) == 1 and ids[-1] == 1 and mask.all()
    assert encoder.counts["special_tokens_in_response"] == 0


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("template", [CHATML, WITH_BOS_AND_EOS])
def test_a_chat_ends_with_one_end_of_turn_that_is_trained_and_no_eos(template, ends):
    encoder = TextEncoder(make("byte", ends, bos_token="<s>"), chat_template=template)
    assert encoder.end_ids == (3, 1)
    _, ids, mask = encode_one(encoder, chat("world"))
    assert ids.count(3) == 1 and ids[-1] == 3 and 1 not in ids and mask.all()
    assert encoder.decode(ids) == "world"


def test_a_template_without_an_end_of_turn_token_gets_the_eos():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = TextEncoder(make(), chat_template=template)
    prompt, ids, _ = encode_one(encoder, chat("hello world"))
    assert encoder.end_ids == (1,) and ids[-1] == 1 and ids.count(1) == 1
    whole = "<s>user: the question\nassistant: hello world</s>"
    assert prompt + ids == make()(whole, add_special_tokens=False)["input_ids"]


def test_a_template_that_ends_turns_with_plain_text_is_an_error():
    template = "{% for m in messages %}{{ m.content }} ###{% endfor %}"
    with pytest.raises(ValueError, match="with ' ###', which holds no special token"):
        TextEncoder(make(), chat_template=template)


def test_a_tokenizer_that_ends_text_with_another_token_than_eos_is_an_error():
    with pytest.raises(
        ValueError, match=r"ends plain text with \['</s>'\], and a resp"
    ):
        TextEncoder(make(ends="adds_bos_and_eos", eos_token="<|im_end|>"))


@pytest.mark.parametrize("pad_token", ["</s>", "world", "<|turn|>", None])
def test_masks_come_from_lengths_whatever_the_pad_token_is(pad_token):
    tokenizer = make("metaspace", "adds_bos", pad_token=pad_token)
    encoder = TextEncoder(tokenizer)
    assert encoder.pad_id == (tokenizer.pad_token_id if pad_token else 1)
    group = encoder.encode(strings("hello", " world</s> world", " world"))
    assert [mask.all() for mask in group.loss_masks] == [True, True]
    assert [len(m) for m in group.loss_masks] == [len(r) for r in group.responses]
    assert [r[-1] for r in group.responses] == [1, 1]


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


def test_text_that_a_template_writes_before_a_response_is_trained_and_shown():
    block = "<think>\n</think>\n"
    content = "{{ m.content }}"
    opened = f"{{% if m.role == 'assistant' %}}{block}{{% endif %}}{content}"
    encoder = TextEncoder(make(), chat_template=CHATML.replace(content, opened))
    _, ids, mask = encode_one(encoder, chat("world"))
    assert encoder.decode(ids) == f"{block}world" and mask.all()
    assert f"the template opens a response with {block!r}" in encoder.summary()
    assert "opens" not in TextEncoder(make(), chat_template=CHATML).summary()


def test_a_tokenizer_without_offsets_is_an_error():
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="must be a fast one, .* got SimpleNamespace"):
        TextEncoder(slow)


def test_only_the_assistant_of_a_long_response_is_trained():
    tokenizer = make()
    encoder = TextEncoder(tokenizer, chat_template=CHATML)
    response = ("hello", "the world", "an answer")
    prompt, ids, mask = encode_one(encoder, chat(response))
    begin = "<s><|turn|>user\nthe question<|im_end|>\n<|turn|>assistant\n"
    tool = "\n<|turn|>tool\nthe world<|im_end|>\n<|turn|>assistant\n"
    parts = [begin, "hello<|im_end|>", tool, "an answer<|im_end|>"]
    pieces = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts]
    assert prompt == pieces[0]
    assert ids == [*pieces[1], *pieces[2], *pieces[3]]
    sizes = [len(piece) for piece in pieces[1:]]
    assert mask.tolist() == np.repeat([True, False, True], sizes).tolist()
    assert encoder.counts["special_tokens_in_response"] == 0
    assert encoder.counts["straddling_tokens"] == 0


def test_a_token_that_straddles_a_later_turn_is_trained_and_counted():
    template = CHATML.replace("assistant\n", "assistant ").replace(
        "{{ m.role }}\n", "{{ m.role }} "
    )
    tokenizer = make()
    encoder = TextEncoder(tokenizer, chat_template=template)
    _, ids, mask = encode_one(encoder, chat(("hello", "the", "world")))
    trained = np.array(tokenizer.convert_ids_to_tokens(ids))[mask].tolist()
    assert trained[-2:] == ["Ġworld", "<|im_end|>"] and encoder.end_ids[0] == 3
    assert encoder.counts["straddling_tokens"] == 2  # ` hello` and ` world`


def test_a_template_that_rewrites_the_prompt_is_refused_at_construction():
    template = CHATML.replace(
        "{% if add_generation_prompt %}<|turn|>assistant\n",
        "{% if add_generation_prompt %}<|turn|>assistant\n<think>\n",
    )
    message = (
        "`chat_template` is not prefix-preserving.*After .*assistant.*it wrote "
        r"'<think>.n' alone and 'Blue-7Q<\|im_end\|>.n' with the response"
    )
    with pytest.raises(ValueError, match=message):
        TextEncoder(make(), chat_template=template)


def test_a_record_whose_turns_are_rewritten_is_named():
    tokenizer = make()
    tokenizer.name_or_path = "my_tokenizer"
    tokenizer.chat_template = LAST_ONLY
    encoder = TextEncoder(tokenizer)
    encoder.encode(chat("think: hello", ("hello", "the", "think: world")))
    message = (
        "x.jsonl:8: the chat template of 'my_tokenizer' is not prefix-preserving.*"
        r"wrote 'think: hello<\|im_end\|>' alone and ' hello<"
    )
    with pytest.raises(RecordError, match=message):
        encoder.encode(chat(("think: hello", "the", "world")))


def test_a_turn_that_ends_otherwise_than_the_probe_is_named():
    template = CHATML.replace(
        "<|im_end|>", "{{ '<|im_end|>' if m.content|length < 30 }}"
    )
    encoder = TextEncoder(make(), chat_template=template)
    with pytest.raises(RecordError, match=r"x.jsonl:8: .* ends turns with '<\|im_end"):
        encoder.encode(chat("hello " * 9))


def test_a_template_that_refuses_a_conversation_is_quoted():
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    )
    encoder = TextEncoder(make(), chat_template=refusing + CHATML)
    prompt = (Message("system", "hello"), *user())
    with pytest.raises(RecordError, match="refuses the roles system, user: none"):
        encoder.encode(chat("world", prompt=prompt))
    with pytest.raises(ValueError, match="chat template: `chat_template` refuses the"):
        TextEncoder(make(), chat_template="{% if %}")
    with pytest.raises(ValueError, match="does not write the assistant's message"):
        TextEncoder(make(), chat_template="{{ messages[0].content }}")


def test_a_chat_without_a_template_says_what_to_pass():
    encoder = TextEncoder(make())
    with pytest.raises(
        RecordError, match="x.jsonl:8: is a chat.*Pass `chat_template=`"
    ):
        encoder.encode(chat("world"))


def test_the_argument_replaces_the_template_of_the_tokenizer():
    tokenizer = make()
    tokenizer.chat_template = WITH_BOS_AND_EOS.replace("<|im_end|>", "</s>")
    assert TextEncoder(tokenizer).end_ids == (1,)
    assert TextEncoder(tokenizer, chat_template=CHATML).end_ids == (3, 1)


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/data is absent")
@pytest.mark.parametrize(
    ("folder", "prefix", "end"),
    [("gpt2_tokenizer", [], 50256), ("stories260k", [1], 2)],
)
def test_real_pairs_and_tokenizers_keep_the_ids_of_the_whole_text(folder, prefix, end):
    tokenizer = load_tokenizer(SHARED / folder)
    encoder = TextEncoder(tokenizer)
    records = read(SHARED / "gsm8k_pref" / "smoke.jsonl.gz")
    for record in records:
        group = encoder.encode(record)
        for response, ids in zip(record.responses, group.responses, strict=True):
            whole = tokenizer(record.prompt + response)["input_ids"]
            assert group.prompt.tolist() + ids.tolist() == [*whole, end]
            assert group.prompt.tolist()[: len(prefix)] == prefix
    assert encoder.counts["records"] == len(records) == 100
    assert encoder.counts["unknown_tokens"] == encoder.counts["dropped_characters"] == 0
