"""Chat templates: real formats, generation markers, what is refused and how."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings

from data.chat_strategies import chat, chat_records, encode_one, user
from data.tokenizer_kinds import CHATML, KINDS, LAST_ONLY, WITH_BOS_AND_EOS, make
from pref_jax.data.records import Message, RecordError
from pref_jax.data.templates import TextEncoder


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


def test_text_that_a_template_writes_before_a_response_is_trained_and_shown():
    block = "<think>\n</think>\n"
    content = "{{ m.content }}"
    opened = f"{{% if m.role == 'assistant' %}}{block}{{% endif %}}{content}"
    encoder = TextEncoder(make(), chat_template=CHATML.replace(content, opened))
    _, ids, mask = encode_one(encoder, chat("world"))
    assert encoder.decode(ids) == f"{block}world" and mask.all()
    assert f"the template opens a response with {block!r}" in encoder.summary()
    assert "opens" not in TextEncoder(make(), chat_template=CHATML).summary()


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


def test_t8_a_template_that_rewrites_the_prompt_is_refused_at_construction():
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


def test_t8_a_record_whose_turns_are_rewritten_is_named():
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


@dataclasses.dataclass(frozen=True)
class Family:
    """A public chat format in few words; « and » stand for the generation markers."""

    template: str
    end: str
    special: tuple[str, ...]
    system: bool = True  # takes a system message
    tool: bool = True  # takes tool messages
    bos_each_turn: bool = False  # begins each exchange with a BOS

    def encoder(self, kind="byte", ends="adds_bos", *, marked=False, **tokens):
        tokenizer = make(kind, ends, special=self.special, **tokens)
        marks = ["{% generation %}", "{% endgeneration %}"] if marked else ["", ""]
        template = self.template.replace("«", marks[0]).replace("»", marks[1])
        return TextEncoder(tokenizer, chat_template=template)


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    # A system message of its own where none is given.
    "chatml": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}«{{ m.content }}<|im_end|>»"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        IM,
    ),
    # Thoughts stand in the answers to the last question, an empty block in the last.
    "thinking": Family(
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        "«{% if loop.index0 > ns.last and (loop.last or parts|length > 1) %}<think>\n"
        "{{ parts[0].split('<think>')[-1].strip() if parts|length > 1 }}\n</think>\n\n"
        "{% endif %}{{ parts[-1].strip() }}<|im_end|>»"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        IM,
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}«{{ m.content | trim }}<|eot_id|>»"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # The system message stands in the first question; no generation prompt.
    "llama2": Family(
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
        "{% set ns.system = '' %}"
        "{% elif m.role == 'assistant' %}« {{ m.content | trim }} {{ eos_token }}»"
        "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}",
        "</s>",
        (),
        tool=False,
        bos_each_turn=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('no ' + m.role) }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' %}«{{ m.content | trim }}<end_of_turn>»"
        "{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
        tool=False,
    ),
    # Ends the conversation with an EOS after the end of turn.
    "phi": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}«{{ m.content }}<|end|>\n»"
        "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}"
        "{% endif %}",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    ),
    # The system message stands in the last question: it moves as the chat goes on.
    "mistral": Family(
        "{{ bos_token }}{% set ns = namespace(system='', last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ ns.system if loop.index0 == ns.last }}{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.role == 'assistant' %}« {{ m.content }}{{ eos_token }}»{% endif %}"
        "{% endfor %}",
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
}
# Gives a sampler an open think block, which the turn of a conversation has not.
OPEN_THINK = Family(
    CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}"
        "«{{ m.content.split('</think>')[-1] }}<|im_end|>»"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    .replace("\n{% endfor %}", "{{ '\\n' }}{% endfor %}")
    .replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    "<|im_end|>",
    (),
)
LONG = (
    Message("user", "hello"),
    Message("assistant", "the world"),
    Message("user", "the question"),
)


def pieces(encoder, ids, mask):
    """The texts of runs of trained (True) and other (False) tokens."""
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    decode = encoder._tokenizer.decode
    return [(bool(mask[run[0]]), decode(ids[run].tolist())) for run in runs]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_t8_each_family_has_one_bos_one_boundary_and_one_trained_end(
    name, kind, marked
):
    family = FAMILIES[name]
    encoder = family.encoder(kind, marked=marked)
    tokenizer = encoder._tokenizer
    end_id = tokenizer.convert_tokens_to_ids(family.end)
    assert encoder.end_ids[0] == end_id
    system = (Message("system", "an answer"),) * family.system
    for prompt in (user(), LONG, system + user(), system + LONG):
        group = encoder.encode(chat("hello world", "there", prompt=prompt))
        num_asked = sum(m.role == "user" for m in prompt)
        num_bos = num_asked if family.bos_each_turn else 1
        assert group.prompt[0] == 0 and (group.prompt == 0).sum() == num_bos
        np.testing.assert_array_equal(encoder.encode_prompt(prompt), group.prompt)
        asked = tokenizer.apply_chat_template(
            [vars(m) for m in prompt],
            chat_template=encoder._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        begin = "" if asked.startswith("<s>") else "<s>"
        whole = tokenizer(begin + asked, add_special_tokens=False)["input_ids"]
        assert group.prompt.tolist() == whole
        for ids, mask in zip(group.responses, group.loss_masks, strict=True):
            assert ids[-1] == end_id and mask.all() and (ids == end_id).sum() == 1
            assert 0 not in ids
    assert encoder.counts["straddling_tokens"] == 0
    assert encoder.counts["rewritten_messages"] == 0


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_t8_of_a_long_response_each_family_trains_the_assistants_turns(
    name, kind, marked
):
    family = FAMILIES[name]
    encoder = family.encoder(kind, marked=marked)
    record = chat(("hello", "the world", "an answer"))
    if not family.tool:
        with pytest.raises(RecordError, match="x.jsonl:8: .* refuses the roles .*no t"):
            encoder.encode(record)
        return
    if name == "thinking" and not marked:
        with pytest.raises(RecordError, match="x.jsonl:8: .* not prefix-preserving"):
            encoder.encode(record)
        return
    _, ids, mask = encode_one(encoder, record)
    end_id = encoder.end_ids[0]
    trained = ids if isinstance(ids, np.ndarray) else np.array(ids)
    assert (trained[mask] == end_id).sum() == 2 and mask[-1] and not mask.all()
    if kind == "byte":
        shown = [text for is_ours, text in pieces(encoder, trained, mask) if is_ours]
        thoughts = "<think>\n\n</think>\n\n" if name == "thinking" else ""
        blank = " " if name == "mistral" else ""
        first = f"{blank}hello{family.end}"
        assert shown == [first, f"{blank}{thoughts}an answer{family.end}"]


def test_a_family_without_system_messages_refuses_them():
    prompt = (Message("system", "hello"), *user())
    for marked in (False, True):
        encoder = FAMILIES["gemma"].encoder(marked=marked)
        with pytest.raises(RecordError, match="refuses the roles system, user.*no sys"):
            encoder.encode(chat("world", prompt=prompt))


def test_t8_thoughts_that_a_template_drops_are_counted():
    encoder = FAMILIES["thinking"].encoder(marked=True)
    said = "<think>\nthe question\n</think>\n\nan answer"
    before = Message("assistant", said.replace("question", "world"))
    earlier = (*user(), before, *user("hello"))
    group = encoder.encode(chat(said, said.replace("\n", ""), prompt=earlier))
    assert encoder.decode(group.responses[0]) == said
    assert [*group.responses[0]] == [*group.responses[1]]
    assert "<think>" not in encoder.decode(group.prompt)
    # One in the prompt; and the second response, whose line breaks are new.
    assert encoder.counts["rewritten_messages"] == 2
    assert "rewritten_messages: 2\n    x.jsonl:8: assistant: '<think>" in (
        encoder.summary()
    )


def test_t8_an_open_think_block_is_refused_without_markers():
    with pytest.raises(ValueError, match="not prefix-preserving.*`{% generation %}` m"):
        OPEN_THINK.encoder()
    encoder = OPEN_THINK.encoder(marked=True)
    for prompt in (user(), LONG):
        record = chat("<think>\nhello\n</think>world", "there", prompt=prompt)
        group = encoder.encode(record)
        # What is trained on is what a sampler is given: no think block.
        np.testing.assert_array_equal(encoder.encode_prompt(prompt), group.prompt)
        shown = encoder._tokenizer.decode(group.prompt.tolist())
        assert shown.endswith("the question<|im_end|>\n<|turn|>assistant\n")
        assert pieces(encoder, group.responses[0], group.loss_masks[0]) == [
            (True, "world<|im_end|>")
        ]
    assert encoder.counts["rewritten_messages"] == 2


def marked_chatml(before, after, tail="<|im_end|>\n"):
    """ChatML with markers: the texts before and after the content in the block."""
    opening = "{{ '<|turn|>assistant\n' }}"
    header, rest = ("", opening) if opening in before else (opening, "")
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + f"{header}{{% generation %}}{before}{{{{ m.content }}}}{after}"
        + f"{{% endgeneration %}}{{{{ {tail.removeprefix(after)!r} }}}}"
        + "{% else %}{{ '<|turn|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + "{{ '<|turn|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["", "{{ '<|turn|>assistant\n' }}"])
@pytest.mark.parametrize("after", ["", "<|im_end|>", "<|im_end|>\n"])
def test_t8_a_block_may_hold_the_opening_and_the_end_of_a_turn_or_not(
    after, before, kind
):
    plain = TextEncoder(make(kind), chat_template=CHATML)
    encoder = TextEncoder(make(kind), chat_template=marked_chatml(before, after))
    for record in (
        chat("world", "there"),
        chat(("hello", "the", "world"), prompt=LONG),
    ):
        group, expected = encoder.encode(record), plain.encode(record)
        for name in ("responses", "loss_masks"):
            for one, other in zip(
                getattr(group, name), getattr(expected, name), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(group.prompt, expected.prompt)
    assert encoder.counts == plain.counts and encoder.end_ids == plain.end_ids


def test_t8_text_that_the_markers_leave_out_is_in_the_response_and_not_trained():
    """A turn with an opening that is not marked, and two blocks."""
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}<think>"
        "{% generation %}{{ m.content.split('|')[0] }}{% endgeneration %}"
        "</think>{% generation %}{{ m.content.split('|')[-1] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}",
    ).replace("\n{% endfor %}", "{{ '\\n' }}{% endfor %}")
    encoder = TextEncoder(make(special=["<think>", "</think>"]), chat_template=template)
    group = encoder.encode(chat("hello|world"))
    assert pieces(encoder, group.responses[0], group.loss_masks[0]) == [
        (False, "<think>"),
        (True, "hello"),
        (False, "</think>"),
        (True, "world<|im_end|>"),
    ]
    assert encoder.counts["special_tokens_in_response"] == 0


def test_t8_markers_that_do_not_say_which_text_is_whose_are_refused():
    good = marked_chatml("", "<|im_end|>")
    user_marked = good.replace("== 'assistant'", "!= 'assistant'", 1)
    in_macro = (
        "{% macro turn(m) %}<|turn|>{{ m.role }} {% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
    )
    for template in (user_marked, in_macro):
        with pytest.raises(ValueError, match="marks .* as the assistant's message"):
            TextEncoder(make(), chat_template=template)
    last_only = good.replace(
        "{% if m.role == 'assistant' %}",
        "{% if m.role == 'assistant' and not loop.last and m.content == 'hello' %}"
        "{{ '<|turn|>assistant\nhello<|im_end|>\n' }}{% elif m.role == 'assistant' %}",
    )
    encoder = TextEncoder(make(), chat_template=last_only)
    encoder.encode(chat("hello"))
    message = "x.jsonl:8: .*1 generation blocks for 2 messages of the assistant, 1 of"
    with pytest.raises(RecordError, match=message):
        encoder.encode(chat(("hello", "the", "world")))


def test_t8_a_marked_template_that_opens_a_response_by_its_text_is_refused():
    template = marked_chatml("", "<|im_end|>").replace(
        "{% if m.role == 'assistant' %}",
        "{% if m.role == 'assistant' and 'hello' in m.content %}<think>{% endif %}"
        "{% if m.role == 'assistant' %}",
    )
    encoder = TextEncoder(make(), chat_template=template)
    encoder.encode(chat("world"))
    with pytest.raises(RecordError, match="x.jsonl:8: .* is not prefix-preserving"):
        encoder.encode(chat("hello world"))


def test_whatever_a_template_raises_names_the_record():
    template = CHATML.replace("{{ m.content }}", "{{ m.content + 1 }}")
    with pytest.raises(ValueError, match="refuses the roles user.*can only concat"):
        TextEncoder(make(), chat_template=template)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30)
@given(record=chat_records)
def test_t8_any_chat_gets_the_end_of_each_turn_trained_once_or_is_named(name, record):
    encoder, spelling = marked_family(name)
    try:
        group = encoder.encode(record)
    except RecordError as error:
        assert error.where == "x.jsonl:8"
        return
    for response, ids, mask in zip(
        record.responses, group.responses, group.loss_masks, strict=True
    ):
        said = [m.content for m in response if m.role == "assistant"]
        if any(text in "".join(said) for text in (spelling, "think>")):
            continue  # ends and thoughts in the data are counted elsewhere
        assert (ids[mask] == encoder.end_ids[0]).sum() == len(said)
        assert ids[-1] == encoder.end_ids[0] and mask[-1]


@functools.cache
def marked_family(name):
    return FAMILIES[name].encoder(marked=True), FAMILIES[name].end
