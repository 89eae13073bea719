"""Hypothesis strategies for rows, records and what users may give in their place."""

from hypothesis import strategies as st

from pref_jax.data.records import parse_record

FIELDS = (
    *("prompt", "response", "chosen", "rejected", "responses", "labels"),
    *("margin", "soft_label", "tools", "note", "id"),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
TEXTS = st.text(max_size=12)
SPOKEN = TEXTS.filter(lambda text: text.strip())
PLAIN = st.one_of(TEXTS, st.integers(-(2**53), 2**53), FLOATS, st.booleans())
JSON = st.recursive(
    st.one_of(st.none(), PLAIN, st.floats(), st.just("\ud800")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), inner),
    ),
    max_leaves=8,
)


def messages(role: str) -> st.SearchStrategy[dict]:
    """A message of one role; a tool's is named, an assistant's may call a tool."""
    if role == "tool":
        return st.fixed_dictionaries(
            {"role": st.just(role), "content": TEXTS, "tool_call_id": SPOKEN}
        )
    said = st.fixed_dictionaries(
        {"role": st.just(role), "content": SPOKEN}, optional={"name": SPOKEN}
    )
    if role != "assistant":
        return said
    function = st.fixed_dictionaries({"name": SPOKEN, "arguments": TEXTS})
    call = st.fixed_dictionaries({"type": st.just("function"), "function": function})
    calls = st.lists(call, min_size=1, max_size=2)
    return st.one_of(
        said,
        st.fixed_dictionaries(
            {"role": st.just(role), "content": st.just(""), "tool_calls": calls}
        ),
    )


def chats(*roles: str) -> st.SearchStrategy[list[dict]]:
    """The messages of these roles, in this order."""
    return st.tuples(*map(messages, roles)).map(list)


PROMPTS = st.one_of(chats("user"), chats("system", "user", "assistant", "user"))
REPLIES = st.one_of(chats("assistant"), chats("assistant", "tool", "assistant"))


@st.composite
def rows(draw, *, form: str | None = None, chat: bool | None = None) -> dict:
    """A row that can be used.

    Args:
      draw: by hypothesis.
      form: "response", "pair" or "list"; None: any.
      chat: whether it is one; None: either.
    """
    form = draw(st.sampled_from(["response", "pair", "list"])) if form is None else form
    chat = draw(st.booleans()) if chat is None else chat
    reply = REPLIES if chat else SPOKEN
    row = {"prompt": draw(PROMPTS if chat else TEXTS)}
    if form == "response":
        row["response"] = draw(reply)
    elif form == "pair":
        row |= {"chosen": draw(reply), "rejected": draw(reply)}
        optional = {"margin": FLOATS, "soft_label": st.floats(0, 1, width=32)}
        row |= draw(st.fixed_dictionaries({}, optional=optional))
    else:
        row["responses"] = draw(st.lists(reply, min_size=3, max_size=3))
        row["labels"] = draw(st.lists(FLOATS, min_size=3, max_size=3))
    if chat and draw(st.booleans()):
        tool = {"type": "function", "function": {"name": draw(SPOKEN)}}
        row["tools"] = [tool]
    return row | draw(
        st.fixed_dictionaries({}, optional={"note": TEXTS, "id": st.integers(0, 99)})
    )


def records(**options):
    """Records of `rows(**options)`."""
    return rows(**options).map(lambda row: parse_record(row, where="x:1", number=0))


def json_rows() -> st.SearchStrategy:
    """Anything that stands where a row is expected: mostly near to one."""
    names = st.one_of(st.sampled_from(FIELDS), st.text(max_size=3))
    anything = st.dictionaries(names, JSON, max_size=4)
    changed = st.tuples(rows(), anything, st.sampled_from(FIELDS)).map(
        lambda parts: {
            name: value
            for name, value in (parts[0] | parts[1]).items()
            if name != parts[2]
        }
    )
    return st.one_of(changed, anything, JSON, rows())
