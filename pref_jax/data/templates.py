"""Text to token ids: one BOS, one trained end token, masks from lengths.

A record is rendered to one text per response (string prompt + string response, or the
chat template), each rendering is tokenised **whole**, and only then cut into prompt and
response:

    rendering k:   [BOS] Which| colour| ?| Blue| .| [END]
    prompt:        the longest run of leading tokens that all K renderings share and
                   that ends at or before the character where the response begins
    response k:    the other tokens of rendering k, up to and with its end token

So prompt ids + response ids are the ids of the whole rendering, always. A token that
straddles the cut opens the response, is trained, counted and shown.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pref_jax.data.records import Message, Record, RecordError
from pref_jax.types import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message]

_QUESTION = Message("user", "Which colour is the sky?")  # the probe conversation
_ANSWER = Message("assistant", "Blue-7Q")
_NUM_EXAMPLES = 3


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


class TextEncoder:
    """Records to token groups, by one tokenizer and its chat template.

    Strings: prompt + response, then one EOS. Chats: the template's own text, up to and
    with the token that ends an assistant's turn; what the template writes after it (a
    newline, say) is no part of the response. In a response of several messages only the
    assistant's tokens are trained.

    The ids begin with what the tokenizer puts before plain text (a BOS, or nothing),
    unless the text begins with it already. A prompt without any token gets a stand-in,
    the BOS or else the EOS, since r_1 needs a token to be predicted from.

    Attributes:
      end_ids: the ids that end a response, without repetition: of a chat the
        template's end of turn (first), of a string the EOS.
      pad_id: a legal id for padding. It may be an end id: masks come from lengths.
      counts: what `encode` has met so far: `records`, `straddling_tokens`,
        `records_with_straddling`, `stand_in_bos` (prompts), `extra_bos_in_prompt`,
        `special_tokens_in_response` (trained tokens other than the end, from special
        text in the data), and text that the tokenizer cannot spell: `unknown_tokens`,
        `dropped_characters` (other than blanks).
      examples: up to three straddling tokens, for showing.

    Args:
      tokenizer: a fast Hugging Face tokenizer. It is not changed.
      chat_template: a Jinja template that replaces the tokenizer's own.
      add_bos: None does as the tokenizer does to plain text; True puts its BOS first in
        any case; False adds nothing.

    Raises:
      ValueError: the tokenizer gives no offsets, has no BOS to add, or ends plain text
        with something else than its EOS; or the chat template cannot be rendered, is
        not prefix-preserving, or writes no token that ends a turn.

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
        self._tokenizer = tokenizer
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
        self._turn_id, self._opening = None, ""
        if self._template is not None:
            self._probe_template()
        ends = (self._turn_id, self._eos_id)
        self.end_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        pads = (tokenizer.pad_token_id, self._eos_id, 0)
        self.pad_id = next(pad for pad in pads if pad is not None)
        unknown = {tokenizer.unk_token_id} - {None, self._bos_id, *self.end_ids}
        added = tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special}
        self._unknown = list(unknown)
        self._special = list(special.union(self.end_ids) - unknown)
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def encode(self, record: Record) -> TokenGroup:
        """The ids of a record's prompt and responses, cut as the module says.

        A chat's responses end with `end_ids[0]`, a string's with the EOS. A string
        that ends with the text of the EOS gets no second one.

        Args:
          record: from a reader of `pref_jax.data.records`.

        Returns:
          The group. Loss masks are all True, but for tokens of tool messages and the
          template's text around them in a response of several messages.

        Raises:
          RecordError: the record cannot be rendered or encoded so; says why.
        """
        head = self._render_prompt(record.prompt, record.where)
        if isinstance(record.prompt, str):
            end_id = self._eos_id
            renderings = [
                (head + response, [(len(head), len(head + response))])
                for response in record.responses
            ]
        else:
            end_id = self._turn_id
            renderings = [
                self._render_response(record.prompt, head, response, record.where)
                for response in record.responses
            ]
        if end_id is None:
            raise RecordError(
                record.where,
                "holds strings, and the tokenizer has no eos_token to end a response "
                'with. Set one: `tokenizer.eos_token = "..."`.',
            )
        encodings = [self._encode_text(text, record.where) for text, _ in renderings]
        cut = _common_prefix(encodings, len(head))
        counts = Counter(records=1)
        prompt = self._complete_prompt(encodings[0][0][:cut], counts, record.where)
        counts["unknown_tokens"] += int(np.isin(prompt, self._unknown).sum())
        responses, loss_masks, examples = [], [], []
        for k, (text, spans) in enumerate(renderings):
            ids, offsets = (array[cut:] for array in encodings[k])
            mask, ends, straddling = _trained_tokens(offsets, spans)
            special = np.isin(ids, self._special) & mask
            special[ends] &= ids[ends] != end_id
            if not len(ids) or ids[-1] != end_id:
                ids, mask = np.append(ids, np.int32(end_id)), np.append(mask, True)
            self._check_response(ids, k, record.where)
            responses.append(ids)
            loss_masks.append(mask)
            counts["special_tokens_in_response"] += int(special.sum())
            counts["unknown_tokens"] += int(np.isin(ids, self._unknown).sum())
            # The characters of the prompt are counted once, with the first response.
            counts["dropped_characters"] += _num_dropped(
                text, encodings[k][1], begin=len(head) if k else 0
            )
            counts["straddling_tokens"] += len(straddling)
            for start, stop, begin in straddling:
                before, after = text[max(begin - 20, 0) : begin], text[begin:][:20]
                examples.append(
                    f"{record.where}: {text[start:stop]!r} in {before!r} | {after!r}"
                )
        counts["records_with_straddling"] = int(counts["straddling_tokens"] > 0)
        self.counts.update(counts)
        self.examples += examples[: _NUM_EXAMPLES - len(self.examples)]
        return TokenGroup(
            prompt=prompt,
            responses=tuple(responses),
            loss_masks=tuple(loss_masks),
            labels=record.labels,
            record=record.row,
        )

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """The ids that a sampler continues: a chat with the opening of a response.

        Args:
          prompt: a string, or the messages of a chat.

        Returns:
          i32[P], P >= 1. Equal to the prompt ids of `encode`, unless the text of a
          response changes how the end of the prompt is cut into tokens.

        Raises:
          RecordError: the prompt cannot be rendered or has no token.
        """
        ids, _ = self._encode_text(self._render_prompt(prompt, "prompt"), "prompt")
        return self._complete_prompt(ids, Counter(), "prompt")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(
            np.asarray(ids).tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def summary(self) -> str:
        """A few lines for the start of a run: the special ids, and what was met."""
        ids = {"begin": self._prefix, "end": self.end_ids, "pad": (self.pad_id,)}
        named = (
            f"{name} {self._tokenizer.convert_ids_to_tokens(list(value))} {list(value)}"
            for name, value in ids.items()
        )
        lines = [f"{self.counts['records']} records encoded; {', '.join(named)}"]
        lines += [
            f"  {name}: {count}"
            for name, count in self.counts.items()
            if count and name != "records"
        ]
        if self._opening:
            lines.append(f"  the template opens a response with {self._opening!r}")
        lines += [f"  straddling token, {example}" for example in self.examples]
        return "\n".join(lines)

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

    def _probe_template(self) -> None:
        """Finds what the template writes around an answer, and the id that ends it."""
        where = "chat template"
        head = self._render([_QUESTION], where, generation=True)
        full = self._render([_QUESTION, _ANSWER], where)
        self._check_prefix(head, full, where)
        begin = full.find(_ANSWER.content, len(head))
        if begin < 0:
            raise ValueError(
                f"{self._template_name} does not write the assistant's message: "
                f"{_ANSWER.content!r} is not in {full[len(head) :]!r}."
            )
        self._opening = full[len(head) : begin]
        self._tail = full[begin + len(_ANSWER.content) :]
        ending = {*self._tokenizer.added_tokens_decoder, self._eos_id}
        ids, offsets = self._encode_text(self._tail, where)
        found = np.flatnonzero([token_id in ending for token_id in ids.tolist()])
        if len(found):
            # What the template writes after the end of turn is no part of a response.
            self._turn_id = int(ids[found[0]])
            self._num_kept = int(offsets[found[0], 1])
        elif self._tail.strip() or self._eos_id is None:
            raise ValueError(
                f"{self._template_name} ends an assistant's turn with {self._tail!r}, "
                "which holds no special token of the tokenizer, so that a response has "
                "no end. Pass a `chat_template=` that writes the eos_token there."
            )
        else:
            self._turn_id, self._num_kept = self._eos_id, 0

    def _render(
        self, messages: Sequence[Message], where: str, *, generation: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except TemplateError as error:
            raise RecordError(
                where,
                f"{self._template_name} refuses the roles "
                f"{', '.join(turn.role for turn in messages)}: {error}",
            ) from error

    def _render_prompt(self, prompt: Prompt, where: str) -> str:
        if isinstance(prompt, str):
            return prompt
        if self._template is None:
            raise RecordError(
                where,
                "is a chat, and the tokenizer has no chat template. Pass "
                "`chat_template=`, or give prompt and responses as strings.",
            )
        return self._render(prompt, where, generation=True)

    def _render_response(
        self,
        prompt: Sequence[Message],
        head: str,
        response: Sequence[Message],
        where: str,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text up to the last end of turn, and the assistant's spans in it."""
        turns = [*prompt, *response]
        text = self._render_turns(turns, where)
        spans = []
        for index in range(len(prompt), len(turns)):
            if turns[index].role != "assistant":
                continue
            first, last = index == len(prompt), index == len(turns) - 1
            before = (
                head if first else self._render(turns[:index], where, generation=True)
            )
            after = text if last else self._render_turns(turns[: index + 1], where)
            self._check_prefix(before, text, where)
            self._check_prefix(after, text, where)
            spans.append((len(before), len(after)))
        return text, spans

    def _render_turns(self, turns: Sequence[Message], where: str) -> str:
        """The rendering up to and with the token that ends the last turn."""
        text = self._render(turns, where)
        if not text.endswith(self._tail):
            raise RecordError(
                where,
                f"{self._template_name} ends turns with {self._tail!r}, but this one "
                f"with {text[-40:]!r}.",
            )
        return text[: len(text) - len(self._tail) + self._num_kept]

    def _check_prefix(self, part: str, text: str, where: str) -> None:
        if text.startswith(part):
            return
        same = len(os.path.commonprefix([part, text]))
        raise RecordError(
            where,
            f"{self._template_name} is not prefix-preserving: it writes the "
            "beginning of the conversation otherwise once the response follows. After "
            f"{text[max(same - 30, 0) : same]!r} it wrote {part[same:][:40]!r} alone "
            f"and {text[same:][:40]!r} with the response. Pass a `chat_template=` that "
            "writes each turn whatever follows it.",
        )

    def _encode_text(self, text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises no narrower class
            raise RecordError(
                where, f"the tokenizer cannot encode {text[:60]!r}: {error}"
            ) from error
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets

    def _complete_prompt(
        self, ids: np.ndarray, counts: Counter[str], where: str
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
            counts["stand_in_bos"] += 1
        if self._bos_id not in (None, *self.end_ids):
            extra = int((ids == self._bos_id).sum()) - 1
            counts["extra_bos_in_prompt"] += max(extra, 0)
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


def _common_prefix(
    encodings: Sequence[tuple[np.ndarray, np.ndarray]], boundary: int
) -> int:
    """Number of leading tokens that all share and that end at or before `boundary`."""
    first = encodings[0][0]
    cut = len(first)
    for ids, offsets in encodings:
        beyond = np.flatnonzero(offsets[:cut, 1] > boundary)
        cut = min([cut, len(ids), *beyond[:1].tolist()])
        differing = np.flatnonzero(ids[:cut] != first[:cut])
        cut = min([cut, *differing[:1].tolist()])
    return cut


def _num_dropped(text: str, offsets: np.ndarray, *, begin: int) -> int:
    """Number of characters from `begin` on, blanks left out, that no token covers."""
    depth = np.zeros(len(text) + 1, np.int64)
    np.add.at(depth, offsets[:, 0], 1)
    np.add.at(depth, offsets[:, 1], -1)
    bare = np.flatnonzero(np.cumsum(depth)[begin:-1] == 0) + begin
    return sum(not text[index].isspace() for index in bare)


def _trained_tokens(
    offsets: np.ndarray, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, list[int], list[tuple[int, int, int]]]:
    """Which tokens after the cut overlap a span of the assistant's text.

    Args:
      offsets: i64[n, 2]. First character of each token, and one past its last.
      spans: first character of each of the assistant's texts, and one past its last.

    Returns:
      mask, bool[n]; the index of the last token of each span; and (start, stop, begin)
      of each token that starts before the begin of the span that it belongs to.
    """
    starts, stops = offsets.T
    mask, ends, straddling = np.zeros(len(offsets), bool), [], []
    for index, (begin, end) in enumerate(spans):
        # After the cut all tokens open the first span, whatever text they cover; and
        # no text follows the last.
        inside = np.full(len(offsets), True) if index == 0 else stops > begin
        if index < len(spans) - 1:
            inside &= starts < end
        mask |= inside
        ends += np.flatnonzero(inside)[-1:].tolist()
        for token in np.flatnonzero(inside & (starts < begin)):
            straddling.append((int(starts[token]), int(stops[token]), begin))
    return mask, ends, straddling
