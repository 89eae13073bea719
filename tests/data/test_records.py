"""The record schema: every form that is read, and what is said of every other row."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import strategies
from pref_jax.data.records import (
    Message,
    Record,
    RecordError,
    from_objects,
    parse_record,
    parse_rename,
)
from pref_jax.data.templates import TextEncoder

PAIR = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}
CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi."}]
USER = {"role": "user", "content": "More?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
TOOL = {"role": "tool", "content": ""}


@pytest.mark.parametrize(
    ("row", "responses", "labels"),
    [
        ({"prompt": "a", "response": "b"}, ("b",), (1.0,)),
        (PAIR, ("2", "3"), (1.0, 0.0)),
        (
            {"prompt": "a", "responses": ["x", "y", "z"], "labels": [0, -1.5, True]},
            ("x", "y", "z"),
            (0.0, -1.5, 1.0),
        ),
        ({"prompt": "a", "responses": ["b"], "labels": [2]}, ("b",), (2.0,)),
        ({"prompt": "", "response": "b", "chosen": None}, ("b",), (1.0,)),
    ],
)
def test_each_form_becomes_responses_and_labels(row, responses, labels):
    record = parse_record(row, where="x:1", number=4)
    assert record == Record(row["prompt"], responses, labels, 4, "x:1")
    assert all(type(label) is float for label in record.labels)


def test_chat_messages_are_read_and_a_string_response_becomes_one_message():
    turns = [ASSISTANT, TOOL, ASSISTANT]
    row = {"prompt": CHAT, "chosen": turns, "rejected": " No."}
    record = parse_record(row, where="x:1", number=0)
    assert record.prompt == (Message("system", ""), Message("user", "Hi."))
    assert record.responses == (
        tuple(Message(turn["role"], turn["content"]) for turn in turns),
        (Message("assistant", " No."),),
    )


def test_numpy_labels_are_numbers():
    labels = [np.float32(0.5), np.int64(2), np.bool_(True)]
    row = {"prompt": "a", "responses": ["x", "y", "z"], "labels": labels}
    assert parse_record(row, where="x:1", number=0).labels == (0.5, 2.0, 1.0)


def bad(**fields):
    return {**PAIR, **fields}


def listed(labels, responses=("x", "y")):
    return {"prompt": "a", "responses": list(responses), "labels": labels}


FORMS = "needs `prompt` and exactly one of"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"needs an object with fields; got \[1\] \(list\)"),
        ({}, f"{FORMS}.*Got the fields: none"),
        ({"response": "a b"}, f"{FORMS}.*`response`"),
        ({"chosen": "a b", "rejected": "a c", "response": "x"}, f"{FORMS}.*`response`"),
        ({"prompt": "a", "chosen": "b"}, FORMS),
        ({"prompt": "a", "responses": ["b"]}, FORMS),
        (bad(response="b"), FORMS),
        (bad(labels=[1, 0]), FORMS),
        (bad(chosen=3), r"field `chosen` needs a string or a list .*; got 3 \(int\)"),
        (bad(chosen=""), r"field `chosen` needs a text that is not blank; got ''"),
        (bad(rejected=" \n"), "field `rejected` needs a text that is not blank"),
        (bad(prompt=[]), r"field `prompt` needs .*one or more messages; got \[\]"),
        (bad(prompt=7), "field `prompt` needs a string or a list"),
        (bad(prompt="\ud800"), r"field `prompt` holds '\\ud800' at character 0"),
        (bad(prompt=[*CHAT, ASSISTANT]), "`prompt` ends with an assistant message"),
        (bad(prompt=["Hi."]), r'field `prompt\[0\]` needs a {"role", "content"}'),
        (bad(prompt=[{"content": "x"}]), r'field `prompt\[0\]` needs a {"role"'),
        (
            bad(prompt=[{"role": "user"}]),
            r"`prompt\[0\].content` needs a string; got None",
        ),
        (
            bad(prompt=[{"role": "human", "content": "x"}]),
            r"`prompt\[0\].role` needs one of system, user, assistant, tool; got 'hum",
        ),
        (
            bad(prompt=[{"role": "user", "content": [{"text": "x"}]}]),
            r"field `prompt\[0\].content` needs a string; got \[",
        ),
        (bad(chosen=[ASSISTANT]), "is a list of messages but `prompt` is a string"),
        (bad(prompt=CHAT, chosen=[USER]), r"`chosen\[0\].role` needs one of assistant"),
        (bad(prompt=CHAT, chosen=[ASSISTANT, TOOL]), "begin and end with an assistant"),
        (bad(prompt=CHAT, chosen=[TOOL, ASSISTANT]), "got the roles tool, assistant"),
        (
            bad(prompt=CHAT, chosen=[{"role": "assistant", "content": " "}]),
            r"field `chosen\[0\].content` needs a text that is not blank",
        ),
        (listed([1, 0], responses=["x", ""]), r"field `responses\[1\]` needs a text"),
        (listed([], responses=[]), "`responses` needs a list of one or more"),
        (listed([1]), r"field `labels` needs a list of 2 numbers"),
        (listed("10"), "field `labels` needs a list of 2 numbers"),
        (listed([1, "0"]), r"field `labels\[1\]` needs a finite number"),
        (listed([float("nan"), 0]), r"field `labels\[0\]` needs a finite number"),
        (listed([0, float("-inf")]), r"field `labels\[1\]` needs a finite number"),
        (listed([10**400, 0]), r"field `labels\[0\]` needs a finite number"),
        (listed([1e39, 0]), r"field `labels\[0\]` needs a finite number"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_what_is_needed(row, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, where="pairs.jsonl:12", number=11)
    assert str(caught.value).startswith("pairs.jsonl:12: ")


def test_on_error_raise_stops_at_the_first_bad_row_and_says_how_to_skip():
    with pytest.raises(RecordError, match=r'rows\[1\]: .*pass on_error="skip"'):
        from_objects([PAIR, bad(chosen=""), bad(chosen=3)])


def test_on_error_skip_leaves_bad_rows_out_counts_and_lists_them():
    rows = [PAIR, bad(chosen=""), PAIR, 5, {"prompt": "a", "response": "b"}]
    records = from_objects(rows, name="mine", on_error="skip")
    assert [record.row for record in records] == [0, 2]
    assert [record.where for record in records] == ["mine[0]", "mine[2]"]
    assert [where for where, _ in records.skipped] == ["mine[1]", "mine[3]", "mine[4]"]
    assert records.counts["read"] == 5 and records.counts["skipped"] == 3
    assert "mine: 2 records, 2 response(s) each; 5 rows read, 3" in records.summary()
    assert "skipped mine[3]: needs an object" in records.summary()


def test_on_error_is_raise_or_skip():
    with pytest.raises(ValueError, match="`on_error` must be .*; got 'ignore'"):
        from_objects([PAIR], on_error="ignore")


def test_all_records_have_one_number_of_responses():
    message = r"rows\[2\]: has 1 response\(s\), but rows\[0\] has 2"
    with pytest.raises(RecordError, match=message):
        from_objects([PAIR, PAIR, {"prompt": "a", "response": "b"}])


def test_no_usable_row_is_an_error_with_the_first_problem():
    with pytest.raises(RecordError, match="rows: has no usable row among 0"):
        from_objects([])
    with pytest.raises(RecordError, match=r"among 2. The first problem: rows\[0\]: n"):
        from_objects([1, 2], on_error="skip")


def test_equal_responses_and_unread_fields_are_counted_and_shown():
    named = [{"role": "user", "content": "a", "id": "Ann", "weight": None}]
    rows = [
        bad(rejected="2", spans=[1]),
        bad(spans={}, note=None),
        bad(prompt=named, score=float("nan")),
    ]
    records = from_objects(rows)
    assert records.counts["equal_responses"] == 1
    unread = {"spans": 2, "score": 1, "prompt.id": 1}
    assert records.counts["unread_fields"] == unread
    assert "equal responses in 1 records" in records.summary()
    assert "fields not read (rows): spans (2)" in records.summary()
    chats = {"prompt": CHAT, "responses": [[{**ASSISTANT, "id": 1}]], "labels": [1]}
    assert from_objects([chats]).counts["unread_fields"] == {"responses.id": 1}


def test_plain_fields_are_kept_to_group_by_and_counted_apart():
    rows = [
        bad(topic="sums", level=2, is_easy=True, share=np.float32(0.5), tags=["a"]),
        bad(topic="sums", odd="\ud800", level=None),
    ]
    records = from_objects(rows)
    assert records[0].fields == {
        **{"topic": "sums", "level": 2, "is_easy": True, "share": 0.5}
    }
    assert type(records[0].fields["share"]) is float
    assert records[1].fields == {"topic": "sums"}
    kept = {"topic": 2, "level": 1, "is_easy": 1, "share": 1}
    assert records.counts["kept_fields"] == kept
    assert records.counts["unread_fields"] == {"tags": 1, "odd": 1}
    assert "fields kept (rows): topic (2), level (1)" in records.summary()


def test_duplicates_are_records_with_the_prompt_tools_and_responses_of_another():
    chat = bad(prompt=CHAT)
    rows = [PAIR, bad(margin=1), bad(rejected="4"), chat, {**chat, "tools": [{"a": 1}]}]
    records = from_objects([*rows, PAIR, chat])
    assert records.counts["duplicates"] == 3
    assert "with the prompt and responses of another: 3" in records.summary()
    assert from_objects(rows[2:]).counts["duplicates"] == 0


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (["Q: 1 + 1? A: 2", "Q: 1 + 1? A: 3"], "Q: 1 + 1? A:"),
        (["Say it.\n\nYes.", "Say it.\n\nNo."], "Say it."),
        (["Tell me: Hello", "Tell me: Help"], "Tell me:"),
        (["Why? so", "Why?\nno"], "Why?"),
        (["a b", "a b c"], "a"),
        (["a b c", "a bd"], "a"),
        (["a b c  ", "a b c  "], "a b"),
        (["a b x", "a b y", "a c z"], "a"),
    ],
)
def test_the_prompt_of_strings_is_what_they_share_up_to_whitespace(texts, prompt):
    row = {"responses": texts, "labels": [1] * len(texts)}
    record = parse_record(row, where="x:1", number=0)
    assert record.prompt == prompt
    assert [prompt + response for response in record.responses] == texts


def turns(*letters):
    """Small letters are the user's, capitals the assistant's; `t` is a tool's."""
    roles = {"s": "system", "t": "tool"}
    return [
        {
            "role": "assistant" if c[0].isupper() else roles.get(c[0], "user"),
            "content": c,
        }
        for c in letters
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "size"),
    [
        (turns("u", "A"), turns("u", "B"), 1),
        (turns("s", "u", "A", "v", "B"), turns("s", "u", "A", "v", "C"), 4),
        (turns("u", "A", "B"), turns("u", "A", "C"), 1),
        (turns("u", "A"), turns("u", "A"), 1),
        (turns("u", "A", "t", "B"), turns("u", "A", "t", "C"), 3),
        (turns("u", "A", "t1", "B"), turns("u", "A", "t2", "C"), 1),
    ],
)
def test_the_prompt_of_chats_is_the_messages_they_share(chosen, rejected, size):
    row = {"chosen": chosen, "rejected": rejected}
    record = parse_record(row, where="x:1", number=0)
    explicit = {
        "prompt": chosen[:size],
        "chosen": chosen[size:],
        "rejected": rejected[size:],
    }
    assert record == parse_record(explicit, where="x:1", number=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "yes", "rejected": "no"}, "share no beginning.*Give the field `p"),
        ({"chosen": "a b", "rejected": "a"}, "share no beginning"),
        ({"chosen": " b", "rejected": " c"}, "share no beginning"),
        ({"responses": ["a b"], "labels": [1]}, "two or more responses share no"),
        ({"chosen": turns("u", "A"), "rejected": "u B"}, "share no beginning"),
        ({"chosen": turns("u", "A"), "rejected": turns("v", "A")}, "share no begin"),
        ({"chosen": turns("u", "A"), "rejected": turns("u")}, "share no beginning"),
        (
            {"chosen": turns("s", "u", "A"), "rejected": turns("s", "v", "B")},
            "share no beginning",
        ),
        (
            {
                "chosen": turns("u", "A", "v", "B"),
                "rejected": turns("u", "C", "v", "B"),
            },
            r"`chosen\[2\].role` needs one of assistant, tool in a response",
        ),
        (
            {"chosen": turns("u", "A", "t"), "rejected": turns("u", "B")},
            "`chosen` must begin and end with an assistant message; got the roles "
            "assistant, tool",
        ),
    ],
)
def test_responses_without_a_shared_beginning_are_an_error(row, message):
    with pytest.raises(RecordError, match=f"x:1: .*{message}"):
        parse_record(row, where="x:1", number=0)


def test_implicit_prompts_are_counted():
    implicit = {"chosen": "a b", "rejected": "a c"}
    records = from_objects([implicit, PAIR, {**implicit, "prompt": None}])
    assert records.counts["implicit_prompts"] == 2
    assert "taken from what the responses share: 2" in records.summary()


@given(record=strategies.records(form="pair", chat=True))
def test_an_explicit_chat_prompt_is_found_again_or_a_longer_one(record):
    chats = [
        [turn.to_dict() for turn in (*record.prompt, *response)]
        for response in record.responses
    ]
    row = {"chosen": chats[0], "rejected": chats[1], "tools": None}
    found = parse_record(row, where="x:1", number=0)
    assert found.prompt[: len(record.prompt)] == record.prompt
    for response, before in zip(found.responses, record.responses, strict=True):
        assert found.prompt + response == record.prompt + before


def test_margins_and_soft_labels_of_pairs():
    record = parse_record(bad(margin=-2, soft_label=0.25), where="x:1", number=0)
    assert record.extras == {"margin": -2.0} and record.labels == (0.25, 0.75)
    assert type(record.extras["margin"]) is float and record.fields == {}
    for p in (0, 1):
        soft = parse_record(bad(soft_label=p), where="x:1", number=0)
        assert soft.labels == (p, 1 - p) and soft.extras == {}


DEMONSTRATION = {"prompt": "a", "response": "b"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"b": 1, "a": 2}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (bad(margin="1"), r"field `margin` needs a finite number.*; got '1' \(str\)"),
        (bad(margin=float("nan")), "field `margin` needs a finite number"),
        (bad(margin=1e39), "field `margin` needs a finite number"),
        (bad(soft_label=1.01), "field `soft_label` needs the probability.*got 1.01"),
        (bad(soft_label=-0.1), "field `soft_label` needs the probability"),
        (bad(soft_label=float("nan")), "field `soft_label` needs the probability"),
        ({**DEMONSTRATION, "margin": 1}, "`margin` belongs to a pair.*has `response`"),
        (
            {**listed([1, 0]), "soft_label": 1},
            "`soft_label` belongs to a pair.*`responses` and `labels`",
        ),
        (bad(tools=[{}]), "field `tools` is for a chat template, and the prompt is a"),
        (bad(prompt=CHAT, tools={}), r"`tools` needs a list of one or more objects"),
        (bad(prompt=CHAT, tools=[1]), "`tools` needs a list of one or more objects"),
        (bad(prompt=CHAT, tools="{"), "field `tools` holds what JSON cannot"),
        (bad(prompt=CHAT, tools="{}"), "`tools` needs a list of one or more objects"),
        (bad(prompt=CHAT, tools=[{"a": b""}]), "`tools` holds what JSON cannot.*bytes"),
        (bad(prompt=CHAT, tools=[{"a": np.nan}]), "`tools` holds what JSON cannot"),
        (bad(prompt=CHAT, tools=[{"a": ENDLESS}]), "`tools` holds what JSON cannot"),
        (bad(prompt=CHAT, tools=[{"a": "\ud800"}]), "`tools` holds .* surrogate pair"),
        (
            bad(prompt=[{**CHAT[1], "tool_calls": [CALL]}]),
            r"`prompt\[0\].tool_calls` belongs to an assistant message.*role user",
        ),
        (
            bad(prompt=CHAT, chosen=[{**CALLING, "tool_calls": "x"}]),
            r"field `chosen\[0\].tool_calls` holds what JSON cannot",
        ),
        (
            bad(prompt=CHAT, chosen=[{**CALLING, "tool_calls": None}]),
            r"field `chosen\[0\].content` needs a string; got None",
        ),
        (
            bad(prompt=[{**CHAT[1], "name": 3}]),
            r"field `prompt\[0\].name` needs a string; got 3",
        ),
        (
            bad(prompt=[{**CHAT[1], "name": "\ud800"}]),
            r"field `prompt\[0\].name` holds",
        ),
    ],
)
def test_what_a_row_adds_is_checked(row, message):
    with pytest.raises(RecordError, match=f"x:1: .*{message}"):
        parse_record(row, where="x:1", number=0)


def test_messages_keep_the_fields_that_templates_read():
    answer = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "sum"}
    row = bad(prompt=CHAT, chosen=[{**CALLING, "id": 7}, answer, ASSISTANT])
    calling, tool, last = parse_record(row, where="x:1", number=0).responses[0]
    assert calling.content == "" and calling.to_dict() == {**CALLING, "content": ""}
    assert calling.fields.index('"b"') < calling.fields.index('"a"')  # as given
    assert tool.to_dict() == answer and last.fields == "{}"
    assert tool.fields == '{"name": "sum", "tool_call_id": "c1"}'


@pytest.mark.parametrize("empty", [None, "", []])
def test_nulls_and_empty_optional_fields_are_absent(empty):
    nulls = {**CALL, "id": None, "function": {**CALL["function"], "strict": None}}
    calls = [{**CALLING, "tool_calls": [nulls], "name": empty}]
    row = bad(prompt=CHAT, chosen=calls, tools=empty)
    expected = bad(prompt=CHAT, chosen=[CALLING])
    assert parse_record(row, where="x", number=0) == parse_record(
        expected, where="x", number=0
    )


def test_lists_of_objects_may_be_json_texts():
    tools = [{"type": "function", "function": {"name": "é"}}]
    plain = bad(prompt=CHAT, tools=tools, chosen=[CALLING])
    texts = bad(
        prompt=CHAT,
        tools=json.dumps(tools),
        chosen=[{**CALLING, "tool_calls": json.dumps([CALL])}],
    )
    record = parse_record(texts, where="x", number=0)
    assert record == parse_record(plain, where="x", number=0)
    assert record.tools == ('{"type": "function", "function": {"name": "é"}}',)


def test_message_fields_and_tools_reach_the_chat_template():
    words = ["<e>", "[sum]", "(sum)", "{sum}", "3", "Yes.", "Hi."]
    model = models.WordLevel({word: number for number, word in enumerate(words)})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="<e>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.name }}] {% endfor %}"
        "{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}) {% endfor %}"
        "{% if m.name %}{{ '{' + m.name + '}' }} {% endif %}{{ m.content }} "
        "{% if m.role == 'assistant' %}<e> {% endif %}{% endfor %}"
    )
    answer = {"role": "tool", "content": "3", "name": "sum"}
    row = {
        "prompt": CHAT[1:],
        "response": [CALLING, answer, ASSISTANT],
        "tools": [{"name": "sum"}],
    }
    record = parse_record(row, where="x:1", number=0)
    group = TextEncoder(tokenizer).encode(record)
    ids = [*group.prompt.tolist(), *group.responses[0].tolist()]
    assert [words[i] for i in ids] == "[sum] Hi. (sum) <e> {sum} 3 Yes. <e>".split()
    prompt = TextEncoder(tokenizer).encode_prompt(record.prompt, tools=record.tools)
    assert prompt.tolist() == group.prompt.tolist()


@settings(max_examples=300)
@given(row=strategies.json_rows())
def test_any_row_is_a_record_or_an_error_that_names_place_and_field(row):
    try:
        record = parse_record(row, where="pairs.jsonl:12", number=3)
    except RecordError as error:
        assert error.where == "pairs.jsonl:12"
        names = ("fields", "field", "prompt")
        assert any(name in error.problem for name in names)
        return
    assert len(record.labels) == len(record.responses) >= 1
    assert all(map(np.isfinite, record.labels))
    assert record == pickle.loads(pickle.dumps(record))
    assert hash(record) == hash(dataclasses.replace(record))
    for text in (record.prompt, *record.responses):
        for part in [text] if isinstance(text, str) else [m.content for m in text]:
            part.encode()


@settings(max_examples=100)
@example(row={"prompt": "a", "responses": ["b"], "labels": [2]})
@given(row=strategies.rows())
def test_a_record_gives_a_row_that_makes_it_again(row):
    record = parse_record(row, where="x:1", number=0)
    written = json.loads(json.dumps(record.to_row()))
    assert parse_record(written, where="x:1", number=0) == record


@given(rows=st.lists(strategies.json_rows(), min_size=1, max_size=6))
def test_rows_read_are_rows_used_and_rows_left_out(rows):
    try:
        records = from_objects([PAIR, *rows], on_error="skip")
    except RecordError as error:
        raise AssertionError(f"a usable row was there: {error}") from error
    assert records.counts["read"] == 1 + len(rows)
    assert len(records) + len(records.skipped) == 1 + len(rows)
    assert records.counts["skipped"] == len(records.skipped)
    places = [r.where for r in records] + [where for where, _ in records.skipped]
    assert sorted(places) == sorted(f"rows[{i}]" for i in range(1 + len(rows)))


def test_errors_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(RecordError("x:1", "is bad.")))
    assert (error.where, error.problem, str(error)) == (
        "x:1",
        "is bad.",
        "x:1: is bad.",
    )


# --- fields of other names ------------------------------------------------------------


def test_fields_of_other_names_are_read_as_those_of_the_schema():
    rows = [{"question": "1 + 1 =", "good": " 2", "bad": " 3", "prompt": None}]
    rename = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    (record,) = from_objects(rows, rename=rename)
    assert (record.prompt, record.responses) == ("1 + 1 =", (" 2", " 3"))
    swapped = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    rename = {"chosen": "rejected", "rejected": "chosen"}
    assert from_objects(swapped, rename=rename)[0].responses == ("c", "b")


def test_a_field_that_is_there_under_both_names_is_an_error():
    rows = [{"prompt": "a", "response": "b", "answer": "c"}]
    message = r"rows\[0\]: has `answer`, which is to be read as `response`, and"
    with pytest.raises(RecordError, match=message):
        from_objects(rows, rename={"answer": "response"})


def test_a_renamed_field_that_no_row_has_is_an_error():
    rows = [{"prompt": "a", "response": "b"}]
    message = "rows: no row has the field `anwser`, which is to be read as `response`"
    with pytest.raises(RecordError, match=message):
        from_objects(rows, rename={"anwser": "response"})


@pytest.mark.parametrize("word", ["labels", "=labels", "correct=", "b=prompt", "a=x"])
def test_a_word_that_renames_nothing_is_an_error(word):
    with pytest.raises(ValueError, match=f"each name once; got '{word}'"):
        parse_rename(["a=prompt", word])
