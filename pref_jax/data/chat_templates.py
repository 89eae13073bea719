"""Chats to text: what a sampler is given, and which text is the assistant's.

A chat template is a program that somebody else wrote; all that is asked of it here is
its text, and that is checked. There are two kinds.

Without markers, a template has to be prefix-preserving: the prompt with the opening of
a response, as a sampler gets it, must begin the text of prompt and response, and so
must each turn of a response of several. The assistant's text is what is added. A
template that writes a turn otherwise once another follows is refused.

With markers, `{% generation %}` ... `{% endgeneration %}`, the template says itself
which text the assistant wrote. The spans are those blocks, in the one text of the whole
conversation; turns may then be written by what follows them. What a sampler is given is
still the prompt with the opening of a response if a response leaves that as it is, and
otherwise the text before the block of a response.

In both cases a turn's span ends with its end of turn, whether or not the block does:
nothing that the template writes after it is trained.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pref_jax.data.boundary import Span
from pref_jax.data.records import Message, RecordError

_QUESTION = Message("user", "Which colour is the sky?")  # the probe conversation
_ANSWER = Message("assistant", "Blue-7Q")


class Render(Protocol):
    """Runs the template: messages to text and, if it has markers, their blocks."""

    def __call__(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[str],
        *,
        generation: bool = False,
    ) -> tuple[str, list[Span] | None]:
        """Return the text, and a span for each generation block or None.

        Raises:
          RecordError: the template refuses the conversation.
        """


class Tokenize(Protocol):
    """Text to ids, i32[n], and offsets, i64[n, 2], without any token around it."""

    def __call__(self, text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and the characters that each of them covers."""


class Rendering(NamedTuple):
    """The text of a prompt and one response, up to and with its last end of turn.

    Attributes:
      text: the text.
      spans: of the assistant's messages in the response; the last ends with the text.
    """

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    r"""A chat template, as far as training needs to know it.

    Attributes:
      end_id: the id that ends an assistant's turn: the first special token that the
        template writes after a message, or else the EOS.
      opening: what the template writes between the prompt as a sampler gets it and the
        assistant's message, such as an empty think block.
      probe: the text of a conversation of one question and one answer.

    Args:
      render: runs the template.
      tokenize: the tokenizer, to find the end of turn.
      ending: ids that can end a turn: the special tokens and the EOS.
      eos_id: ends the turns of a template that writes no token for it, or None.
      name: what messages call the template.

    Raises:
      RecordError: the template cannot be rendered, is not prefix-preserving and has no
        generation markers, marks other text than the assistant's, or ends turns with
        plain text.

    >>> def render(messages, where, tools, *, generation=False):
    ...     turns = (f"{m.role}: {m.content}\n" for m in messages)
    ...     return "".join(turns) + "assistant: " * generation, None
    >>> def tokenize(text, where):
    ...     spans = np.stack([np.arange(len(text)), np.arange(len(text)) + 1], axis=1)
    ...     return np.array([ord(c) for c in text], np.int32), spans
    >>> template = ChatTemplate(render, tokenize, ending=(), eos_id=0, name="plain")
    >>> head, (rendering,) = template.renderings(
    ...     [Message("user", "2 + 2?")], [[Message("assistant", "4")]], where="x:1"
    ... )
    >>> head, rendering
    ('user: 2 + 2?\nassistant: ', Rendering(text=...assistant: 4', spans=((24, 25),)))
    """

    def __init__(
        self,
        render: Render,
        tokenize: Tokenize,
        *,
        ending: Collection[int],
        eos_id: int | None,
        name: str,
    ):
        self._render, self._name = render, name
        where = "chat template"
        self._has_markers = self._check_blocks(where)
        head = self.head([_QUESTION], where)
        self.probe, _ = render([_QUESTION, _ANSWER], where, ())
        self._check_prefix(head, self.probe, where)
        begin = self.probe.find(_ANSWER.content, len(head))
        if begin < 0:
            raise RecordError(
                where,
                f"{name} does not write the assistant's message: {_ANSWER.content!r} "
                f"is not in {self.probe[len(head) :]!r}.",
            )
        self.opening = self.probe[len(head) : begin]
        self._tail = self.probe.rpartition(_ANSWER.content)[2]
        ids, offsets = tokenize(self._tail, where)
        found = np.flatnonzero([token_id in ending for token_id in ids.tolist()])
        if len(found):
            # What the template writes after the end of turn is no part of a response.
            self.end_id = int(ids[found[0]])
            self._num_kept = int(offsets[found[0], 1])
        elif self._tail.strip() or eos_id is None:
            raise RecordError(
                where,
                f"{name} ends an assistant's turn with {self._tail!r}, which holds no "
                "special token of the tokenizer, so that a response has no end. Pass a "
                "`chat_template=` that writes the eos_token there.",
            )
        else:
            self.end_id, self._num_kept = eos_id, 0

    def head(
        self, prompt: Sequence[Message], where: str, tools: Sequence[str] = ()
    ) -> str:
        """What a sampler is given: the prompt with the opening of a response.

        Args:
          prompt: the messages.
          where: the record's place, for messages.
          tools: JSON objects that the template is told of.

        Raises:
          RecordError: the template refuses the conversation.
        """
        asked, blocks = self._render(prompt, where, tools, generation=True)
        if blocks is None:
            return asked
        shown, marked = self._render([*prompt, _ANSWER], where, tools)
        if shown.startswith(asked):
            return asked
        if len(marked) <= len(blocks):
            raise self._unmarked(len(marked) - len(blocks), 0, 1, where)
        return shown[: marked[len(blocks)][0]]

    def renderings(
        self,
        prompt: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        where: str,
        tools: Sequence[str] = (),
    ) -> tuple[str, list[Rendering]]:
        """The head, and for each response the text that begins with it.

        Args:
          prompt: the messages.
          responses: K responses; each begins and ends with the assistant's message.
          where: the record's place, for messages.
          tools: JSON objects that the template is told of.

        Raises:
          RecordError: the template refuses the conversation, or writes it in a way that
            does not say which text is the assistant's.
        """
        head = self.head(prompt, where, tools)
        render = self._render_marked if self._has_markers else self._render_turns
        return head, [render(prompt, head, r, where, tools) for r in responses]

    def _render_turns(
        self,
        prompt: Sequence[Message],
        head: str,
        response: Sequence[Message],
        where: str,
        tools: Sequence[str],
    ) -> Rendering:
        """The spans by rendering the conversation up to each turn, and with it."""
        turns = [*prompt, *response]
        text = self._render_ended(turns, where, tools)
        spans = []
        for index in range(len(prompt), len(turns)):
            if turns[index].role != "assistant":
                continue
            first, last = index == len(prompt), index == len(turns) - 1
            before = head if first else self.head(turns[:index], where, tools)
            after = text
            if not last:
                after = self._render_ended(turns[: index + 1], where, tools)
            self._check_prefix(before, text, where)
            self._check_prefix(after, text, where)
            spans.append((len(before), len(after)))
        return Rendering(text, tuple(spans))

    def _render_ended(
        self, turns: Sequence[Message], where: str, tools: Sequence[str]
    ) -> str:
        """The text up to and with the token that ends the last turn."""
        text, _ = self._render(turns, where, tools)
        if not text.endswith(self._tail):
            raise RecordError(
                where,
                f"{self._name} ends turns with {self._tail!r}, but this one with "
                f"{text[-40:]!r}.",
            )
        return text[: len(text) - len(self._tail) + self._num_kept]

    def _render_marked(
        self,
        prompt: Sequence[Message],
        head: str,
        response: Sequence[Message],
        where: str,
        tools: Sequence[str],
    ) -> Rendering:
        """The spans by the generation blocks that end after the head."""
        turns = [*prompt, *response]
        text, blocks = self._render(turns, where, tools)
        self._check_prefix(head, text, where)
        spoken = [i for i, m in enumerate(turns) if m.role == "assistant"]
        spoken = [i for i in spoken if i >= len(prompt)]
        spans, num_ended, stop = [], 0, None
        for begin, end in blocks:
            begin = max(begin, len(head))  # a block may hold the opening as well
            if begin >= end:
                continue
            stop = self._find_stop(text, begin, end)
            spans.append((begin, end if stop is None else stop))
            if stop is not None:
                num_ended += 1
                if num_ended < len(spoken):
                    asked, _ = self._render(
                        turns[: spoken[num_ended]], where, tools, generation=True
                    )
                    head = asked if text.startswith(asked) else text[:stop]
        # A turn may have several blocks, say of thoughts and of the answer.
        if num_ended != len(spoken) or stop is None:
            raise self._unmarked(len(spans), num_ended, len(spoken), where)
        return Rendering(text[:stop], tuple(spans))

    def _find_stop(self, text: str, begin: int, end: int) -> int | None:
        """Where the end of turn is over that the block ends before, in or after."""
        for inside in range(min(len(self._tail), end - begin), -1, -1):
            tail = self._tail[: max(inside, self._num_kept)]
            if text.startswith(tail, end - inside):
                return end - inside + self._num_kept
        return None

    def _check_blocks(self, where: str) -> bool:
        """Whether there are markers; raises if they miss the assistant's text."""
        turns = []
        for round_ in ("", " now"):
            turns.append(Message("user", _QUESTION.content + round_))
            _, before = self._render(turns, where, (), generation=True)
            if before is None:
                return False
            turns.append(Message("assistant", _ANSWER.content + round_))
            text, blocks = self._render(turns, where, ())
            marked = [text[begin:end] for begin, end in blocks[len(before) :]]
            if not any(turns[-1].content in block for block in marked):
                raise RecordError(
                    where,
                    f"{self._name} marks {marked} as the assistant's message, which "
                    f"was {turns[-1].content!r}. Put `{{% generation %}}` and "
                    "`{% endgeneration %}` around the message and its end of turn, and "
                    "not inside a macro or a `set` block, where they are not seen.",
                )
        return True

    def _unmarked(
        self, num_blocks: int, num_ended: int, num_turns: int, where: str
    ) -> RecordError:
        end = self._tail[: self._num_kept]
        return RecordError(
            where,
            f"{self._name} writes {num_blocks} generation blocks for {num_turns} "
            f"messages of the assistant, {num_ended} of them up to an end of turn "
            f"({end!r}); each message needs one. Put the `{{% generation %}}` markers "
            "around every message of the assistant.",
        )

    def _check_prefix(self, part: str, text: str, where: str) -> None:
        if text.startswith(part):
            return
        same = len(os.path.commonprefix([part, text]))
        raise RecordError(
            where,
            f"{self._name} is not prefix-preserving: it writes the beginning of the "
            "conversation otherwise once the response follows. After "
            f"{text[max(same - 30, 0) : same]!r} it wrote {part[same:][:40]!r} alone "
            f"and {text[same:][:40]!r} with the response. Pass a `chat_template=` that "
            "writes each turn whatever follows it, or one that has "
            "`{% generation %}` markers around the assistant's text.",
        )
