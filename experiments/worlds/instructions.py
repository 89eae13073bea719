r"""A small instruction language in which every response can be graded exactly.

Why: fine-tuning and preference optimisation want a world where the true reward of every
response is known, whose skills a model of a million parameters learns in minutes on a
laptop, and where demonstrations are imperfect, so that the preference stage has
something true to gain. All of it is generated here, from a seed.

The language. An instruction is an operation and a list of distinct words of `LEXICON`.
A prompt writes it in one of three phrasings and ends in `MARKER`; the best response is
the words of the answer, a space before each, and a full stop:

    "reverse: red cow star\nAnswer:"                    " star cow red."
    "how many words are in red cow star\nAnswer:"       " three."

The operations are copy, first, last, drop (the first), repeat (the last), count, swap
(the ends), reverse and sort; for a small model the last three are the hard ones.

The grade of a response sees the prompt and the response, and never who wrote it:

    right    1 if the answer words in it are the answer, whatever stands between them,
             and else 0. Answer words are the lexicon and the numbers.
    format   1 if it is words in small letters, one space between them, and one full
             stop at the end, and else 0. At most one space leads.
    length   exp(-surplus / surplus_scale), where surplus is its words beyond those of
             the answer; 0 if it holds no answer word, so that silence earns nothing.
    reward   right_weight * right + format_weight * format + length_weight * length

The annotators. A demonstration is the best response with three faults, each drawn
independently at the rate that `World` states: wrong (half of them follow another
operation, half have one word replaced), sloppy (no full stop, commas and no full stop,
or an exclamation mark) and wordy (filler around the answer). A model that imitates the
mixture gives part of its mass to each fault, and the best response is still among what
it samples: what a preference asks for lies within its ability. Samples at temperature 1
show the mixture; greedy decoding hides a fault that is rarer than its absence.

The documents, for pre-training, work the operations out in other words and another
form: clauses about a list, with no phrase of the prompts, no `MARKER` and no full stop.
The base model learns the skills from them, but not to follow an instruction.

    "the list red cow star opens with red, read backwards is star cow red;"

The splits. A hash of operation and list (not of the phrasing) puts each instruction
into train, validation or test. Documents and demonstrations hold those of train alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORD_LIST = """
apple bell bird boat bread cake cat cloud cow door egg fish fox gold hat horse
key king lamp leaf milk moon nest owl pear queen rain red ship snow star tree
"""
LEXICON = tuple(_WORD_LIST.split())
NUMBERS = tuple("one two three four five six seven eight nine ten".split())
MARKER = "\nAnswer:"
END_TOKEN = "<|end|>"
SPLITS = ("train", "validation", "test")

ANSWERS = {
    "copy": lambda words: words,
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "drop": lambda words: words[1:],
    "repeat": lambda words: words + words[-1:],
    "count": lambda words: (NUMBERS[len(words) - 1],),
    "swap": lambda words: words[-1:] + words[1:-1] + words[:1],
    "reverse": lambda words: words[::-1],
    "sort": lambda words: tuple(sorted(words)),
}
"""What each operation makes of a list; both are tuples of words."""

PHRASES = {
    "copy": ("copy: {}", "say again: {}", "write {} once more"),
    "first": ("first word of: {}", "how does {} begin", "which word starts {}"),
    "last": ("last word of: {}", "how does {} end", "which word finishes {}"),
    "drop": ("drop the first word: {}", "all but the first of: {}", "behead {}"),
    "repeat": (
        "say the last word twice: {}",
        "repeat the end of: {}",
        "double end: {}",
    ),
    "count": ("count: {}", "how many words are in {}", "give the number of words: {}"),
    "swap": ("swap first and last: {}", "swap the ends of: {}", "trade ends: {}"),
    "reverse": ("reverse: {}", "turn around: {}", "write {} from end to start"),
    "sort": ("sort: {}", "from a to z: {}", "put {} in alphabetical order"),
}
"""How prompts ask for each operation; the braces stand for the list."""

CLAUSES = {
    "copy": ("echoes as {}", "stays {}"),
    "first": ("opens with {}", "is led by {}"),
    "last": ("closes with {}", "is rounded off by {}"),
    "drop": ("without its head is {}", "loses its head leaving {}"),
    "repeat": ("stutters at its tail as {}", "with its tail doubled is {}"),
    "count": ("makes {} altogether", "is {} long"),
    "swap": ("with its edges exchanged is {}", "trades edges becoming {}"),
    "reverse": ("read backwards is {}", "mirrored is {}"),
    "sort": ("as a dictionary has it is {}", "ordered by letter is {}"),
}
"""How documents tell what each operation makes; the braces stand for the answer."""

SUBJECTS = ("the list", "the row", "the line")
SLOPPY = ((" ", ""), (", ", ""), (" ", "!"))
"""What sloppy annotators write between the words of the answer, and at the end."""

WORDY = (
    ("the answer is", ""),
    ("i think that it must be", ""),
    ("", "as you asked"),
    ("here it is", "i hope that helps"),
)
"""What wordy annotators write before and after the answer: no answer words."""

_ANSWER_WORDS = frozenset(LEXICON + NUMBERS)
_WORD = re.compile(r"\w+")
_FORMAT = re.compile(r" ?[a-z]+( [a-z]+)*\.")
_LIST = "((?:{0})(?: (?:{0})){{1,{1}}})".format("|".join(LEXICON), len(NUMBERS) - 1)
_PROMPTS = tuple(
    (operation, re.compile(re.escape(phrase + MARKER).replace(r"\{\}", _LIST)))
    for operation, phrases in PHRASES.items()
    for phrase in phrases
)
_NUM_TOKENIZER_TEXTS = 4000  # of each kind; the rarest phrase is expected 150 times


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes, annotators and reward of the instruction language.

    Raises:
      ValueError: a field is out of its range, or two contradict each other.
    """

    min_words: int = 3  # words in the shortest list; ours
    max_words: int = 5  # words in the longest list; ours
    max_clauses: int = 5  # most operations told in one document; ours
    validation_rate: float = 0.1  # share of the instructions; ours
    test_rate: float = 0.1  # share of the instructions; ours
    wrong_rate: float = 0.2  # share of demonstrations with a wrong answer; ours
    sloppy_rate: float = 0.35  # share of demonstrations that break the format; ours
    wordy_rate: float = 0.35  # share of demonstrations with surplus words; ours
    right_weight: float = 0.6  # reward of the right answer; ours
    format_weight: float = 0.2  # reward of the format; ours
    length_weight: float = 0.2  # reward of a response without surplus words; ours
    surplus_scale: float = 4.0  # surplus words that divide `length` by e; ours

    def __post_init__(self):
        if not 2 <= self.min_words <= self.max_words <= len(NUMBERS):
            raise ValueError(
                f"`min_words` and `max_words` need 2 <= min_words <= max_words <= "
                f"{len(NUMBERS)}: one word cannot be swapped, and no number word goes "
                f"further; got {self.min_words} and {self.max_words}."
            )
        if not 1 <= self.max_clauses <= len(ANSWERS):
            raise ValueError(
                f"`max_clauses` must lie in [1, {len(ANSWERS)}], the number of "
                f"operations; got {self.max_clauses}."
            )
        ranges = {
            # Below 0.01, drawing until an instruction of the split comes takes long.
            **dict.fromkeys(("validation_rate", "test_rate"), (0.01, 0.4)),
            **dict.fromkeys(("wrong_rate", "sloppy_rate", "wordy_rate"), (0, 1)),
            **dict.fromkeys(
                ("right_weight", "format_weight", "length_weight"), (0, 1e6)
            ),
            "surplus_scale": (1e-6, 1e6),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"`{name}` must lie in [{low}, {high}]; got {getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class Grade:
    """The true reward of one response, and its parts."""

    right: float  # 0 or 1
    format: float  # 0 or 1
    length: float  # in [0, 1]
    reward: float  # their weighted sum


def documents(world: World, num: int, seed: int) -> Iterator[str]:
    """Text to pre-train on: lists, and what the operations make of them.

    Args:
      world: sizes and splits.
      num: number of documents. The first ones are the same for every `num`.
      seed: of all draws, non-negative.

    Yields:
      One line of text for each document.

    >>> all(text.endswith(";") for text in documents(World(), 5, seed=0))
    True
    """
    rng = _make_rng("documents", seed)
    for _ in range(num):
        clauses = []
        while not clauses:
            words = _draw_list(world, rng)
            num_clauses = rng.integers(1, world.max_clauses, endpoint=True)
            clauses = [
                _pick(CLAUSES[operation], rng).format(
                    " ".join(ANSWERS[operation](words))
                )
                for operation in rng.permutation(list(ANSWERS))[:num_clauses]
                if split_of(world, operation, words) == "train"
            ]
        yield f"{_pick(SUBJECTS, rng)} {' '.join(words)} {', '.join(clauses)};"


def demonstrations(world: World, num: int, seed: int) -> list[dict[str, str]]:
    """What the annotators wrote for instructions of the train split.

    Args:
      world: sizes, splits and the rates of the faults.
      num: number of rows. The first ones are the same for every `num`.
      seed: of all draws, non-negative.

    Returns:
      `num` rows `{"prompt": ..., "response": ...}`.

    >>> sorted(demonstrations(World(), 1, seed=0)[0])
    ['prompt', 'response']
    """
    rng = _make_rng("demonstrations", seed)
    rows = []
    for _ in range(num):
        operation, words = _draw_instruction(world, "train", rng)
        response = _write_response(world, operation, words, rng)
        prompt = _write_prompt(operation, words, rng)
        rows.append({"prompt": prompt, "response": response})
    return rows


def annotate(world: World, prompts: Iterable[str], seed: int) -> list[str]:
    """What the annotators write for given prompts, one response to each.

    Args:
      world: the rates of the faults.
      prompts: of the language, of any split.
      seed: of all draws, non-negative.

    Raises:
      ValueError: a prompt is not of the language.

    >>> careful = World(wrong_rate=0.0, sloppy_rate=0.0, wordy_rate=0.0)
    >>> annotate(careful, ["turn around: red cow star" + MARKER], seed=0)
    [' star cow red.']
    """
    rng = _make_rng("responses", seed)
    return [_write_response(world, *parse_prompt(text), rng) for text in prompts]


def prompts(world: World, split: str, num: int, seed: int) -> list[str]:
    """Prompts of one split, no instruction twice.

    Args:
      world: sizes and splits.
      split: one of `SPLITS`.
      num: number of prompts. The first ones are the same for every `num`.
      seed: of all draws, non-negative.

    Returns:
      `num` prompts.

    Raises:
      ValueError: there is no such split, or it is too small for `num`.

    >>> [text.endswith(MARKER) for text in prompts(World(), "test", 2, seed=0)]
    [True, True]
    """
    rates = {"validation": world.validation_rate, "test": world.test_rate}
    rates["train"] = 1 - sum(rates.values())
    if split not in rates:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    lengths = range(world.min_words, world.max_words + 1)
    num_lists = sum(math.perm(len(LEXICON), length) for length in lengths)
    most = int(len(ANSWERS) * num_lists * rates[split] / 2)
    if num > most:
        raise ValueError(
            f"`num` may be at most {most}, half of what the {split} split of this "
            f"world holds, since no instruction is drawn twice; got {num}. Ask for "
            f"fewer, or raise `max_words`."
        )
    rng = _make_rng(f"prompts {split}", seed)
    found: dict[tuple, str] = {}
    while len(found) < num:
        instruction = _draw_instruction(world, split, rng)
        found.setdefault(instruction, _write_prompt(*instruction, rng))
    return list(found.values())


def split_of(world: World, operation: str, words: tuple[str, ...]) -> str:
    """The split that an instruction belongs to, by its hash.

    Args:
      world: the shares of the splits.
      operation: a key of `ANSWERS`.
      words: the list.

    Returns:
      One of `SPLITS`.

    >>> split_of(World(), "sort", ("red", "cow", "star"))
    'train'
    """
    text = f"{operation} {' '.join(words)}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < world.test_rate:
        return "test"
    return "validation" if place < world.test_rate + world.validation_rate else "train"


def parse_prompt(prompt: str) -> tuple[str, tuple[str, ...]]:
    r"""The instruction in a prompt.

    Args:
      prompt: a text that `prompts` or `demonstrations` could have written.

    Returns:
      The operation, a key of `ANSWERS`, and the list of words.

    Raises:
      ValueError: the prompt is not of the language.

    >>> parse_prompt("turn around: red cow star\nAnswer:")
    ('reverse', ('red', 'cow', 'star'))
    """
    for operation, pattern in _PROMPTS:
        if match := pattern.fullmatch(prompt):
            return operation, tuple(match[1].split())
    raise ValueError(
        f"`prompt` must be a phrase of PHRASES about 2 to {len(NUMBERS)} words of "
        f"LEXICON and end in {MARKER!r}; got {prompt!r}."
    )


def best_response(prompt: str) -> str:
    r"""The response with the whole reward.

    Args:
      prompt: a prompt of the language.

    Returns:
      The response, with the space that leads it.

    Raises:
      ValueError: the prompt is not of the language.

    >>> best_response("turn around: red cow star\nAnswer:")
    ' star cow red.'
    """
    operation, words = parse_prompt(prompt)
    return f" {' '.join(ANSWERS[operation](words))}."


def grade(prompt: str, response: str, *, world: World = World()) -> Grade:
    r"""The true reward of any response, and its parts; the module says how.

    Args:
      prompt: a prompt of the language.
      response: any text, without special tokens; also an empty one.
      world: the weights, and the scale of the length.

    Returns:
      The grade.

    Raises:
      ValueError: the prompt is not of the language.

    >>> grade("turn around: red cow star\nAnswer:", " star, cow, red")
    Grade(right=1.0, format=0.0, length=1.0, reward=0.8)
    """
    operation, words = parse_prompt(prompt)
    answer = ANSWERS[operation](words)
    said = _WORD.findall(response.lower())
    content = tuple(word for word in said if word in _ANSWER_WORDS)
    surplus = max(0, len(said) - len(answer))
    right = float(content == answer)
    format_ = float(_FORMAT.fullmatch(response) is not None)
    length = math.exp(-surplus / world.surplus_scale) if content else 0.0
    reward = (
        world.right_weight * right
        + world.format_weight * format_
        + world.length_weight * length
    )
    return Grade(right=right, format=format_, length=length, reward=reward)


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    r"""A byte-level tokenizer that writes each word of the world as one token.

    Its vocabulary is the end token, the 256 bytes, and every word (with the space
    before it) of a fixed sample of the world's text. Other text becomes bytes, so that
    nothing is lost. No token crosses from the prompt into the response: `MARKER` ends
    in a colon, which is in no token but its own. The end token is BOS, EOS and padding,
    and the tokenizer puts it before plain text.

    Args:
      world: the world whose words count.

    Returns:
      A Hugging Face tokenizer, the same on every call; `save_pretrained` keeps it.

    >>> train_tokenizer(World()).tokenize("sort: red cow\nAnswer: cow red.")
    ['sort', ':', 'Ġred', 'Ġcow', 'Ċ', 'Answer', ':', 'Ġcow', 'Ġred', '.']
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = list(documents(world, _NUM_TOKENIZER_TEXTS, seed=0))
    for row in demonstrations(world, _NUM_TOKENIZER_TEXTS, seed=0):
        texts.append(row["prompt"] + row["response"])
    pieces = {piece for text in texts for piece, _ in byte_level.pre_tokenize_str(text)}
    # Marks stay bytes: a piece of several could end the prompt and open the response.
    words = sorted(p for p in pieces if p.lstrip("Ġ").isalpha() and len(p) > 1)
    tokens = [END_TOKEN, *sorted(byte_level.alphabet()), *words]
    # Without merges a piece is looked up whole, and spelt in bytes if it is not there.
    model = models.BPE(
        vocab={token: token_id for token_id, token in enumerate(tokens)},
        merges=[],
        ignore_merges=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_TOKEN} $A", special_tokens=[(END_TOKEN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
    )


def _make_rng(use: str, seed: int) -> np.random.Generator:
    """One stream for each use and seed: prompts are not the demonstrations' draws."""
    return np.random.default_rng([seed, *use.encode()])


def _pick(options, rng):
    return options[rng.integers(len(options))]


def _draw_list(world: World, rng: np.random.Generator) -> tuple[str, ...]:
    num_words = rng.integers(world.min_words, world.max_words, endpoint=True)
    word_ids = rng.choice(len(LEXICON), size=num_words, replace=False)
    return tuple(LEXICON[word_id] for word_id in word_ids)


def _draw_instruction(world: World, split: str, rng: np.random.Generator):
    while True:
        operation, words = _pick(tuple(ANSWERS), rng), _draw_list(world, rng)
        if split_of(world, operation, words) == split:
            return operation, words


def _write_response(world: World, operation: str, words, rng) -> str:
    rates = (world.wrong_rate, world.sloppy_rate, world.wordy_rate)
    wrong, sloppy, wordy = rng.random(3) < rates
    answer = ANSWERS[operation](words)
    if wrong:
        answer = _draw_wrong_answer(operation, words, rng)
    between, end = _pick(SLOPPY, rng) if sloppy else (" ", ".")
    before, after = _pick(WORDY, rng) if wordy else ("", "")
    parts = (before, between.join(answer), after)
    return " " + " ".join(part for part in parts if part) + end


def _write_prompt(operation: str, words, rng: np.random.Generator) -> str:
    return _pick(PHRASES[operation], rng).format(" ".join(words)) + MARKER


def _draw_wrong_answer(operation: str, words, rng: np.random.Generator):
    """Half: what another operation makes of the list. Half: one word replaced."""
    answer = ANSWERS[operation](words)
    if rng.random() < 0.5:
        others = {ANSWERS[other](words) for other in ANSWERS} - {answer}
        return _pick(sorted(others), rng)
    slot = rng.integers(len(answer))
    options = NUMBERS if operation == "count" else words
    word = _pick([word for word in options if word != answer[slot]], rng)
    return (*answer[:slot], word, *answer[slot + 1 :])
