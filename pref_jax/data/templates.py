"""Text to token ids: one BOS, one trained end token, masks from lengths.

A record is rendered to one text per response (string prompt + string response, or the
chat template), each rendering is tokenised **whole**, and only then cut into prompt and
response:

    rendering k:   [BOS] Which| colour| ?| Blue| .| [END]
    prompt:        the longest run of leading tokens that all K renderings share and
                   that ends at or before the character where the response begins
    response k:    the other tokens of rendering k, up to and with its end token

So prompt ids + response ids are the ids of the whole rendering, always. A token that
straddles the cut opens the response, is trained, counted and shown. What text a chat
template gives a response is the matter of `chat_templates`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pref_jax.data.boundary import (
    Span,
    common_prefix,
    dropped_characters,
    trained_tokens,
)
from pref_jax.data.chat_templates import ChatTemplate, Rendering
from pref_jax.data.records import Message, Record, RecordError
from pref_jax.types import TokenGroup

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message]

_Note = tuple[str, int, str]  # name of a count, how many, an example

_RULES = "2"  # of this file and of `chat_templates`: raise it where ids or masks change
_NUM_EXAMPLES = 3  # of each count
_BATCH_SIZE = 256  # records that `encode_all` hands to the tokenizer at once
_HAS_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; never looks at the network.

    Args:
      path: folder with `tokenizer.json` and, beside it, `tokenizer_config.json`, which
        names the BOS and EOS tokens and may hold the chat template.

    Returns:
      A Hugging Face tokenizer.

    Raises:
      ValueError: the folder or its `tokenizer.json` is missing or cannot be read.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}))
    >>> folder = tempfile.mkdtemp()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> _ = tokenizer.save_pretrained(folder)
    >>> load_tokenizer(folder).get_vocab()["no"]
    1
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"`path` needs a folder with a tokenizer; {path} is none. Save one there "
            "with `tokenizer.save_pretrained(path)`."
        )
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path} has no tokenizer.json. Load the tokenizer where it was made and "
            "save it there with `tokenizer.save_pretrained(path)`."
        )
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"The tokenizer in {path} cannot be read: {error}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise if the tokenizer can write an id that the model has no row for.

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocab_size: rows of the model's embedding.

    Raises:
      ValueError: an id of the tokenizer is `vocab_size` or larger.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}))
    >>> check_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 2)
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer writes ids up to {largest} ({token!r}), but the model's "
            f"vocab_size is {vocab_size}. Use the tokenizer that belongs to the model, "
            f"or a model with vocab_size >= {largest + 1}."
        )


class _Rendered(NamedTuple):
    """A record as text: what to tokenise, and where the responses begin in it."""

    head: str
    renderings: list[Rendering]
    end_id: int


class TextEncoder:
    """Records to token groups, by one tokenizer and its chat template.

    Strings: prompt + response, then one EOS. Chats: the template's own text, up to and
    with the token that ends an assistant's turn; what the template writes after it (a
    newline, say) is no part of the response. In a response of several messages only the
    assistant's tokens are trained, each turn with its end. If the template has
    `{% generation %}` markers, they say which text is the assistant's; if it has none,
    it must write each turn whatever follows it, or is refused
    (`pref_jax.data.chat_templates` says more).

    The ids begin with what the tokenizer puts before plain text (a BOS, or nothing),
    unless the text begins with it already. A prompt without any token gets a stand-in,
    the BOS or else the EOS, since r_1 needs a token to be predicted from.

    Attributes:
      end_ids: the ids that end a response, without repetition: of a chat the
        template's end of turn (first), of a string the EOS.
      pad_id: a legal id for padding. It may be an end id: masks come from lengths.
      counts: what was met so far: `records` (encoded), `left_out` (by `encode_all`),
        `straddling_tokens`, `records_with_straddling`, `stand_in_bos` (prompts),
        `extra_bos_in_prompt`, `special_tokens_in_response` (trained tokens other than
        the ends of turns, from special text in the data), `rewritten_messages` (of a
        chat: the template does not write the content as it stands, blanks around it
        left aside), and text that the tokenizer cannot spell: `unknown_tokens`,
        `dropped_characters` (other than blanks).
      examples: up to three of each count, for showing.
      left_out: (where, problem) of each record that `encode_all` left out.

    Args:
      tokenizer: a fast Hugging Face tokenizer. It is not changed.
      chat_template: a Jinja template that replaces the tokenizer's own.
      add_bos: None does as the tokenizer does to plain text; True puts its BOS first in
        any case; False adds nothing.

    Raises:
      ValueError: the tokenizer gives no offsets, has no BOS to add, or ends plain text
        with something else than its EOS; or the chat template cannot be rendered, is
        not prefix-preserving and has no generation markers, or writes no token that
        ends a turn.

    >>> from pref_jax.data.records import from_objects
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"</s>": 0, "2": 1, "3": 2, "1+1=": 3}))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> pair = {"prompt": "1+1= ", "chosen": "2", "rejected": "3"}
    >>> group = TextEncoder(tokenizer).encode(from_objects([pair])[0])
    >>> group.prompt.tolist(), [ids.tolist() for ids in group.responses]
    ([3], [[1, 0], [2, 0]])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        add_bos: bool | None = None,
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                "`tokenizer` must be a fast one, which gives character offsets; got "
                f"{type(tokenizer).__name__}. Save it as tokenizer.json and load that."
            )
        self._tokenizer, self._add_bos = tokenizer, add_bos
        # The post-processor adds special tokens, which is our part, and often trims
        # spaces off the offsets, so that a token which straddles the cut seems not to.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._prefix = self._find_prefix(add_bos)
        self._template, self._template_name = chat_template, "`chat_template`"
        if chat_template is None and tokenizer.chat_template is not None:
            self._template = tokenizer.get_chat_template()
            self._template_name = f"the chat template of {tokenizer.name_or_path!r}"
        added = tokenizer.added_tokens_decoder
        self._chat = None
        if self._template is not None:
            self._has_markers = bool(_HAS_MARKERS.search(self._template))
            self._chat = ChatTemplate(
                self._render,
                self._encode_text,
                ending={*added, self._eos_id},
                eos_id=self._eos_id,
                name=self._template_name,
            )
        ends = (self._chat and self._chat.end_id, self._eos_id)
        self.end_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        pads = (tokenizer.pad_token_id, self._eos_id, 0)
        self.pad_id = next(pad for pad in pads if pad is not None)
        unknown = {tokenizer.unk_token_id} - {None, self._bos_id, *self.end_ids}
        special = {token_id for token_id, token in added.items() if token.special}
        special = special.union(self.end_ids) - unknown
        size = max(tokenizer.get_vocab().values()) + 1
        self._is_unknown = np.isin(np.arange(size), list(unknown))
        self._is_special = np.isin(np.arange(size), list(special))
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.left_out: list[tuple[str, str]] = []

    def save_tokenizer(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer with the chat template that is used here."""
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.chat_template = self._template
        tokenizer.save_pretrained(folder)

    def encode(self, record: Record) -> TokenGroup:
        """The ids of a record's prompt and responses, cut as the module says.

        A chat's responses end with `end_ids[0]`, a string's with the EOS. A string
        that ends with the text of the EOS gets no second one.

        Args:
          record: from a reader of `pref_jax.data.records`.

        Returns:
          The group. Loss masks are all True, but for tokens of tool messages and the
          template's text around them in a response of several messages, and for text
          before a response that the template's generation markers leave out.

        Raises:
          RecordError: the record cannot be rendered or encoded so; says why.
        """
        rendered = self._render_record(record)
        encodings = [
            self._encode_text(text, record.where) for text, _ in rendered.renderings
        ]
        return self._make_group(record, rendered, encodings)

    def encode_all(
        self, records: Sequence[Record], *, on_error: str = "raise"
    ) -> list[TokenGroup]:
        """The groups of many records, equal to those of `encode`, and faster.

        The tokenizer gets many texts at once and uses a thread a core, or one where the
        environment variable TOKENIZERS_PARALLELISM is false.

        Args:
          records: such as `pref_jax.data.records.Records`.
          on_error: "raise" stops at the first record that cannot be encoded; "skip"
            leaves such records out, counts them and lists them in `left_out`.

        Returns:
          The groups, in order; `TokenGroup.record` says whose they are.

        Raises:
          ValueError: `on_error` is neither.
          RecordError: a record cannot be encoded and `on_error` is "raise", or none
            can.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip"; got {on_error!r}.')
        groups, problems = [], []
        for first in range(0, len(records), _BATCH_SIZE):
            for made in self._encode_batch(records[first : first + _BATCH_SIZE]):
                if isinstance(made, TokenGroup):
                    groups.append(made)
                    continue
                if on_error == "raise":
                    hint = ' Fix it, or pass on_error="skip" to leave such rows out.'
                    raise RecordError(made.where, made.problem + hint) from made
                problems.append((made.where, made.problem))
                self._note("left_out", 1, str(made))
        self.left_out += problems
        if problems and not groups:
            raise RecordError(
                problems[0][0],
                f"{problems[0][1]} And no other of {len(records)} records can be "
                "encoded.",
            )
        return groups

    def encode_prompt(self, prompt: Prompt, *, tools: Sequence[str] = ()) -> np.ndarray:
        """The ids that a sampler continues: a chat with the opening of a response.

        Args:
          prompt: a string, or the messages of a chat.
          tools: of a chat, as in `Record.tools`.

        Returns:
          i32[P], P >= 1. Equal to the prompt ids of `encode`, unless the text of a
          response changes how the end of the prompt is cut into tokens.

        Raises:
          RecordError: the prompt cannot be rendered or has no token.
        """
        head = prompt
        if not isinstance(prompt, str):
            head = self._chat_template("prompt").head(prompt, "prompt", tools)
        ids, _ = self._encode_text(head, "prompt")
        return self._complete_prompt(ids, [], "prompt")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(
            np.asarray(ids).tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def identity(self) -> dict[str, str]:
        """What the ids of a record depend on besides the record: a key for caches.

        Returns:
          Hashes and values as strings, the same in every process: `tokenizer` (its
          tokenizer.json without truncation, padding and post-processor, which are not
          used), `special_ids`, `chat_template` (its text), `chat_probe` (what it wrote
          of a short conversation: it may write today's date), `add_bos`, and `rules`, a
          number that is raised when this library encodes otherwise.
        """
        special_ids = {
            "begin": self._prefix,
            "bos": self._bos_id,
            "eos": self._eos_id,
            "end": self.end_ids,
            "pad": self.pad_id,
            "unk": self._tokenizer.unk_token_id,
        }
        return {
            "tokenizer": _digest(self._backend.to_str()),
            "special_ids": json.dumps(special_ids),
            "chat_template": _digest(self._template),
            "chat_probe": _digest(self._chat and self._chat.probe),
            "add_bos": str(self._add_bos),
            "rules": _RULES,
        }

    def summary(self) -> str:
        """A few lines for the start of a run: the special ids, and what was met."""
        lines = [f"{self.counts['records']} records encoded; {self.describe()}"]
        for name, count in self.counts.items():
            if count and name != "records":
                lines.append(f"  {name}: {count}")
                lines += [f"    {example}" for example in self.examples.get(name, ())]
        return "\n".join(lines)

    def describe(self) -> str:
        """The ids that begin and end a text and pad, and the template's opening."""
        ids = {"begin": self._prefix, "end": self.end_ids, "pad": (self.pad_id,)}
        parts = [
            f"{name} {self._tokenizer.convert_ids_to_tokens(list(value))} {list(value)}"
            for name, value in ids.items()
        ]
        if self._chat is not None and self._chat.opening:
            parts.append(f"the template opens a response with {self._chat.opening!r}")
        return ", ".join(parts)

    def _find_prefix(self, add_bos: bool | None) -> tuple[int, ...]:
        """Ids before the text: what the tokenizer adds to plain text, or as asked."""
        text = self._spellable_text()
        plain = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = self._tokenizer(text)["input_ids"]
        size = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        prefix, suffix = tuple(whole[:size]), whole[size + len(plain) :]
        if suffix not in ([], [self._eos_id]):
            raise ValueError(
                f"The tokenizer ends plain text with "
                f"{self._tokenizer.convert_ids_to_tokens(suffix)}, and a response ends "
                f"with its eos_token, {self._tokenizer.eos_token!r}. Make them agree: "
                "`tokenizer.eos_token = ...`."
            )
        if add_bos and self._bos_id is None:
            raise ValueError(
                "`add_bos=True` needs a tokenizer with a bos_token; this one has none. "
                "Set one, or leave `add_bos` out."
            )
        if add_bos and self._bos_id not in prefix:
            return (self._bos_id, *prefix)
        return () if add_bos is False else prefix

    def _spellable_text(self) -> str:
        """A text that has a token: a tokenizer of digits knows no letter."""
        added = self._tokenizer.added_tokens_decoder
        for token_id in sorted(self._tokenizer.get_vocab().values()):
            text = "" if token_id in added else self._backend.decode([token_id])
            if text.strip() and len(self._encode_text(text, "tokenizer")[0]):
                return text
        raise ValueError("The tokenizer has no token of its own that spells a text.")

    def _render_record(self, record: Record) -> _Rendered:
        prompt = record.prompt
        if not isinstance(prompt, str):
            chat = self._chat_template(record.where)
            head, renderings = chat.renderings(
                prompt, record.responses, record.where, record.tools
            )
            return _Rendered(head, renderings, chat.end_id)
        if self._eos_id is None:
            raise RecordError(
                record.where,
                "holds strings, and the tokenizer has no eos_token to end a response "
                'with. Set one: `tokenizer.eos_token = "..."`.',
            )
        texts = [prompt + response for response in record.responses]
        renderings = [Rendering(text, ((len(prompt), len(text)),)) for text in texts]
        return _Rendered(prompt, renderings, self._eos_id)

    def _chat_template(self, where: str) -> ChatTemplate:
        if self._chat is None:
            raise RecordError(
                where,
                "is a chat, and the tokenizer has no chat template. Pass "
                "`chat_template=`, or give prompt and responses as strings.",
            )
        return self._chat

    def _render(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[str],
        *,
        generation: bool = False,
    ) -> tuple[str, list[Span] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [turn.to_dict() for turn in messages]
        options = {
            "tools": [json.loads(tool) for tool in tools] or None,
            "chat_template": self._template,
            "add_generation_prompt": generation,
        }
        try:
            if not self._has_markers:
                text = self._tokenizer.apply_chat_template(
                    chat, tokenize=False, **options
                )
                return text, None
            # What `apply_chat_template` calls; it does not hand on the blocks.
            texts, blocks = render_jinja_template(
                [chat],
                return_assistant_tokens_mask=True,
                **options,
                **self._tokenizer.special_tokens_map,
            )
            return texts[0], blocks[0]
        except Exception as error:  # a template is a program and may raise anything
            raise RecordError(
                where,
                f"{self._template_name} refuses the roles "
                f"{', '.join(turn.role for turn in messages)}: {error}",
            ) from error

    def _encode_text(self, text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises no narrower class
            raise RecordError(
                where, f"the tokenizer cannot encode {text[:60]!r}: {error}"
            ) from error
        return _ids_and_offsets(encoding)

    def _encode_batch(
        self, records: Sequence[Record]
    ) -> Iterator[TokenGroup | RecordError]:
        rendered = [_attempt(self._render_record, record) for record in records]
        texts = [
            text
            for found in rendered
            if isinstance(found, _Rendered)
            for text, _ in found.renderings
        ]
        try:
            encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        except Exception:  # of one of the texts: the record is found one by one
            yield from (_attempt(self.encode, record) for record in records)
            return
        for record, found in zip(records, rendered, strict=True):
            if isinstance(found, _Rendered):
                encodings = [_ids_and_offsets(next(encoded)) for _ in found.renderings]
                found = _attempt(self._make_group, record, found, encodings)
            yield found

    def _make_group(
        self,
        record: Record,
        rendered: _Rendered,
        encodings: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> TokenGroup:
        """Cuts the ids of the renderings, and counts what was met."""
        head, renderings, end_id = rendered
        cut = common_prefix(encodings, len(head))
        notes: list[_Note] = []
        prompt = self._complete_prompt(encodings[0][0][:cut], notes, record.where)
        responses, loss_masks = [], []
        for k, (text, spans) in enumerate(renderings):
            notes += self._notes_on_text(record, k, text, len(head), encodings[k], cut)
            ids, offsets = (array[cut:] for array in encodings[k])
            mask, ends, straddling = trained_tokens(offsets, spans, len(head))
            special = self._is_special[ids] & mask
            special[ends] &= ids[ends] != end_id
            if not len(ids) or ids[-1] != end_id:
                ids, mask = np.append(ids, np.int32(end_id)), np.append(mask, True)
            self._check_response(ids, k, record.where)
            responses.append(ids)
            loss_masks.append(mask)
            for start, stop, begin in straddling:
                before, after = text[max(begin - 20, 0) : begin], text[begin:][:20]
                shown = f"{text[start:stop]!r} in {before!r} | {after!r}"
                notes.append(("straddling_tokens", 1, shown))
            tokens = self._tokenizer.convert_ids_to_tokens(
                ids[: len(special)][special].tolist()
            )
            notes.append(("special_tokens_in_response", len(tokens), str(tokens)))
        if any(name == "straddling_tokens" for name, *_ in notes):
            self.counts["records_with_straddling"] += 1
        self.counts["records"] += 1
        for name, number, example in notes:
            self._note(name, number, f"{record.where}: {example}")
        return TokenGroup(
            prompt=prompt,
            responses=tuple(responses),
            loss_masks=tuple(loss_masks),
            labels=record.labels,
            record=record.row,
            extras=dict(record.extras),
        )

    def _notes_on_text(
        self,
        record: Record,
        k: int,
        text: str,
        boundary: int,
        encoding: tuple[np.ndarray, np.ndarray],
        cut: int,
    ) -> list[_Note]:
        """What the ids do not say as the data does; the prompt's with response 0."""
        first = k == 0
        ids, offsets = (array[0 if first else cut :] for array in encoding)
        unknown = [text[a:b] for a, b in offsets[self._is_unknown[ids]]]
        dropped = dropped_characters(text, encoding[1], begin=0 if first else boundary)
        notes = [
            ("unknown_tokens", len(unknown), repr(unknown)),
            ("dropped_characters", len(dropped), repr(dropped)),
        ]
        if not isinstance(record.prompt, str):
            messages = [*(record.prompt if first else ()), *record.responses[k]]
            notes += [
                ("rewritten_messages", 1, f"{m.role}: {m.content[:40]!r}")
                for m in messages
                if m.content.strip() not in text
            ]
        return notes

    def _note(self, name: str, number: int, example: str) -> None:
        if number:
            self.counts[name] += number
            shown = self.examples.setdefault(name, [])
            shown += [example][: _NUM_EXAMPLES - len(shown)]

    def _complete_prompt(
        self, ids: np.ndarray, notes: list[_Note], where: str
    ) -> np.ndarray:
        """Puts the prefix first, once, or a stand-in where there would be no token."""
        if tuple(ids[: len(self._prefix)].tolist()) != self._prefix:
            ids = np.append(np.array(self._prefix, np.int32), ids)
        if not len(ids):
            stand_in = self._eos_id if self._bos_id is None else self._bos_id
            if stand_in is None:
                raise RecordError(
                    where,
                    "the prompt has no token, and the tokenizer no bos_token or "
                    "eos_token to stand in for one: the first token of a response "
                    "could not be predicted. Give the prompt a text, or set one.",
                )
            ids = np.array([stand_in], np.int32)
            notes.append(("stand_in_bos", 1, f"id {stand_in}"))
        if self._bos_id not in (None, *self.end_ids):
            extra = int((ids == self._bos_id).sum()) - 1
            notes.append(("extra_bos_in_prompt", max(extra, 0), f"{extra + 1} in all"))
        return ids

    def _check_response(self, ids: np.ndarray, k: int, where: str) -> None:
        if len(ids) < 2:
            raise RecordError(
                where,
                f"response {k} holds no token but the end: the tokenizer drops its "
                "text. Leave the row out.",
            )
        if self._bos_id not in (None, *self.end_ids) and self._bos_id in ids:
            raise RecordError(
                where,
                f"response {k} holds the text {self._tokenizer.bos_token!r}, which the "
                "tokenizer reads as its BOS; a BOS stands in the prompt only. Change "
                "the text or leave the row out.",
            )


def _ids_and_offsets(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), offsets


def _attempt(function: Callable, *arguments):
    """The result of a function, or the `RecordError` that it raises."""
    try:
        return function(*arguments)
    except RecordError as error:
        return error


def _digest(text: str | None) -> str:
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()
