"""Records for tests: made by hand, and drawn by hypothesis."""

from hypothesis import strategies as st

from data.tokenizer_kinds import SPECIALS, WORDS
from pref_jax.data.records import Message, Record


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


texts = st.one_of(
    st.lists(st.sampled_from([*WORDS.split(" "), " ", "\n", "é", "🎉", "ﬁ", "\u0301"])),
    st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=4), max_size=4),
).map("".join)
responses = st.lists(texts.filter(str.strip), min_size=1, max_size=3)


def encode_one(encoder, record):
    """Prompt, first response and its mask."""
    group = encoder.encode(record)
    return group.prompt.tolist(), group.responses[0].tolist(), group.loss_masks[0]


pieces = st.one_of(texts, st.sampled_from([*SPECIALS, "<think>", "</think>", "</s> "]))
hostile_texts = st.lists(pieces, max_size=4).map("".join)


def _messages(roles):
    return st.builds(Message, st.sampled_from(roles), hostile_texts)


@st.composite
def chat_responses(draw):
    """The assistant's messages with any number of a tool's between them."""
    spoken = st.builds(
        Message, st.just("assistant"), hostile_texts.filter(lambda text: text.strip())
    )
    turns = [draw(spoken)]
    for _ in range(draw(st.integers(0, 2))):
        turns += draw(st.lists(_messages(["tool"]), max_size=2))
        turns.append(draw(spoken))
    return tuple(turns)


@st.composite
def chat_prompts(draw):
    """Any roles in any order, but for an assistant's message at the end."""
    roles = ["system", "user", "assistant", "tool"]
    turns = draw(st.lists(_messages(roles), max_size=3))
    return (*turns, draw(_messages(["system", "user", "user", "user", "tool"])))


chat_records = st.builds(
    lambda prompt, turns: strings(prompt, *turns),
    chat_prompts(),
    st.lists(chat_responses(), min_size=1, max_size=2),
)
string_records = st.builds(
    lambda prompt, turns: strings(prompt, *turns),
    hostile_texts,
    st.lists(hostile_texts.filter(str.strip), min_size=1, max_size=2),
)
