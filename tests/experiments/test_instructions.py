"""The instruction language: true answers, grades by hand, splits that share nothing."""

import dataclasses
import hashlib
import itertools
import math
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.worlds import instructions
from experiments.worlds.instructions import Grade, World, grade

ROOT = Path(__file__).resolve().parents[2]
WORLD = World()
# So few instructions that a held-out one would be drawn by chance if it could be.
NARROW = World(min_words=2, max_words=2)
REVERSE = "reverse: red cow star\nAnswer:"  # the answer: star cow red
FIRST = "how does red cow star begin\nAnswer:"  # the answer: red

# What documents call each operation, and what it makes of a list: written by hand.
TOLD = (
    (r"(?:echoes as|stays) (.*)", "copy", lambda x: x),
    (r"(?:opens with|is led by) (.*)", "first", lambda x: [x[0]]),
    (r"(?:closes with|is rounded off by) (.*)", "last", lambda x: [x[len(x) - 1]]),
    (r"(?:without its head is|loses its head leaving) (.*)", "drop", lambda x: x[1:]),
    (
        r"(?:stutters at its tail as|with its tail doubled is) (.*)",
        "repeat",
        lambda x: [*x, x[len(x) - 1]],
    ),
    (
        r"(?:makes (\w+) altogether|is (\w+) long)",
        "count",
        lambda x: [["two", "three", "four", "five", "six"][len(x) - 2]],
    ),
    (
        r"(?:with its edges exchanged is|trades edges becoming) (.*)",
        "swap",
        lambda x: [x[len(x) - 1], *x[1 : len(x) - 1], x[0]],
    ),
    (r"(?:read backwards is|mirrored is) (.*)", "reverse", lambda x: [*reversed(x)]),
    (r"(?:as a dictionary has it is|ordered by letter is) (.*)", "sort", sorted),
)


def read_document(text):
    """Each told (operation, list, answer, the true answer) of one document."""
    subject, clauses = re.fullmatch(r"the (?:list|row|line) (.*?);", text)[1], []
    head, *rest = subject.split(", ")
    for size in range(len(head.split()), 1, -1):
        words = head.split()[:size]
        if set(words) <= set(instructions.LEXICON) and len(words) == len(set(words)):
            clauses = [" ".join(head.split()[size:]), *rest]
            break
    for clause in clauses:
        (match, name, make), *others = [
            (match, name, make)
            for pattern, name, make in TOLD
            if (match := re.fullmatch(pattern, clause))
        ]
        assert not others, clause
        told = next(group for group in match.groups() if group)
        yield name, tuple(words), told.split(), make(words)


def in_documents(world, num, seed):
    texts = instructions.documents(world, num, seed)
    return {told[:2] for text in texts for told in read_document(text)}


def in_prompts(texts):
    return {instructions.parse_prompt(text) for text in texts}


@pytest.fixture(scope="module")
def rows():
    return instructions.demonstrations(WORLD, 6000, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return instructions.train_tokenizer(WORLD)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("copy: cow red star\nAnswer:", " cow red star."),
        ("how does cow red star begin\nAnswer:", " cow."),
        ("how does cow red star end\nAnswer:", " star."),
        ("behead cow red star\nAnswer:", " red star."),
        ("double end: cow red star\nAnswer:", " cow red star star."),
        ("how many words are in cow red star egg\nAnswer:", " four."),
        ("swap the ends of: cow red star egg\nAnswer:", " egg red star cow."),
        ("turn around: cow red star egg\nAnswer:", " egg star red cow."),
        ("from a to z: star cow red egg\nAnswer:", " cow egg red star."),
    ],
)
def test_each_operation_has_its_answer(prompt, response):
    assert instructions.best_response(prompt) == response


def test_the_best_response_earns_the_whole_reward():
    for split in instructions.SPLITS:
        for prompt in instructions.prompts(WORLD, split, 300, seed=0):
            graded = grade(prompt, instructions.best_response(prompt))
            assert graded == Grade(1.0, 1.0, 1.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("response", "right", "format_", "surplus"),
    [
        (" star cow red.", 1, 1, 0),
        ("star cow red.", 1, 1, 0),  # a caller that strips
        (" the answer is star cow red.", 1, 1, 3),
        (" Star, cow and red!", 1, 0, 1),
        (" star cow red", 1, 0, 0),
        (" star cow red..", 1, 0, 0),
        (" star  cow red.", 1, 0, 0),
        ("  star cow red.", 1, 0, 0),
        (" star cow red .", 1, 0, 0),
        (" star cow red.\n", 1, 0, 0),
        (" star cow\tred.", 1, 0, 0),
        (" star cow red. yes.", 1, 0, 1),
        (" red cow star.", 0, 1, 0),
        (" star cow.", 0, 1, 0),
        (" star cow red red.", 0, 1, 1),
        (" star three cow red.", 0, 1, 1),
        (" starcow red.", 0, 1, 0),
        (" three.", 0, 1, 0),
        (" i do not know.", 0, 1, None),
        ("", 0, 0, None),
        (".", 0, 0, None),
        ("\ufffd\x00 7?", 0, 0, None),
    ],
)
def test_the_parts_of_the_grade_are_as_by_hand(response, right, format_, surplus):
    length = 0 if surplus is None else math.exp(-surplus / 4)
    reward = 0.6 * right + 0.2 * format_ + 0.2 * length
    expected = pytest.approx((right, format_, length, reward))
    assert dataclasses.astuple(grade(REVERSE, response)) == expected


def test_surplus_is_counted_from_the_length_of_the_answer():
    assert grade(FIRST, " red.").length == 1
    assert grade(FIRST, " red cow star.") == Grade(
        right=0.0,
        format=1.0,
        length=pytest.approx(math.exp(-2 / 4)),
        reward=pytest.approx(0.2 + 0.2 * math.exp(-2 / 4)),
    )


def test_the_world_sets_weights_and_scale():
    world = World(
        right_weight=3, format_weight=0.5, length_weight=2, surplus_scale=10.0
    )
    graded = grade(REVERSE, " it is star cow red.", world=world)
    assert graded.reward == pytest.approx(3 + 0.5 + 2 * math.exp(-2 / 10))


@given(st.text() | st.lists(st.sampled_from([" red", " cow", ",", ".", " the"])))
def test_every_response_has_a_grade(response):
    graded = grade(REVERSE, "".join(response))
    assert graded.right in (0, 1) and graded.format in (0, 1)
    assert 0 <= graded.length <= 1
    assert graded.reward == pytest.approx(
        0.6 * graded.right + 0.2 * graded.format + 0.2 * graded.length
    )


def test_a_phrase_belongs_to_one_operation_and_shares_no_word_with_the_lists():
    for operation, phrases in instructions.PHRASES.items():
        for phrase in phrases:
            prompt = phrase.format("red cow star") + instructions.MARKER
            assert instructions.parse_prompt(prompt) == (
                operation,
                ("red", "cow", "star"),
            )
    fillers = (*itertools.chain(*instructions.WORDY), *instructions.SUBJECTS)
    told = itertools.chain(
        *instructions.PHRASES.values(), *instructions.CLAUSES.values()
    )
    words = {word for text in (*fillers, *told) for word in re.findall(r"\w+", text)}
    assert not words & {*instructions.LEXICON, *instructions.NUMBERS}
    assert len(set(instructions.LEXICON)) == len(instructions.LEXICON)


def test_documents_tell_the_truth_about_every_operation():
    seen = set()
    for text in instructions.documents(WORLD, 2000, seed=3):
        told = list(read_document(text))
        assert 1 <= len(told) <= WORLD.max_clauses
        for operation, words, answer, truth in told:
            assert answer == truth, text
            seen.add((operation, len(words)))
    assert seen == set(itertools.product(instructions.ANSWERS, (3, 4, 5)))


def test_documents_do_not_show_how_to_respond():
    text = "\n".join(instructions.documents(WORLD, 2000, seed=3))
    assert "." not in text and ":" not in text and "answer" not in text.lower()
    for phrase in itertools.chain(*instructions.PHRASES.values()):
        for part in phrase.split("{}"):
            assert not part.strip(" :") or part.strip(" :") not in text, phrase


@pytest.mark.parametrize(("world", "num"), [(WORLD, 10000), (NARROW, 400)])
def test_splits_share_no_instruction(world, num):
    split = {
        name: in_prompts(instructions.prompts(world, name, num, seed=0))
        for name in instructions.SPLITS
    }
    rows = instructions.demonstrations(world, num, seed=1)
    trained = split["train"] | in_prompts(row["prompt"] for row in rows)
    trained |= in_documents(world, num, seed=2)
    assert not trained & split["validation"]
    assert not trained & split["test"]
    assert not split["validation"] & split["test"]
    assert [len(found) for found in split.values()] == [len(split["train"])] * 3


def test_the_splits_have_their_shares():
    world = dataclasses.replace(WORLD, validation_rate=0.2)
    pairs = itertools.permutations(instructions.LEXICON[:40], 2)
    found = [
        instructions.split_of(world, operation, words)
        for words in pairs
        for operation in instructions.ANSWERS
    ]
    for name, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        deviation = math.sqrt(share * (1 - share) / len(found))
        assert found.count(name) / len(found) == pytest.approx(share, abs=4 * deviation)


@pytest.mark.parametrize(
    ("faults", "right", "format_", "concise"),
    [
        ({}, 1, 1, True),
        ({"wrong_rate": 1}, 0, 1, None),
        ({"sloppy_rate": 1}, 1, 0, True),
        ({"wordy_rate": 1}, 1, 1, False),
    ],
)
def test_each_fault_is_what_it_says(faults, right, format_, concise):
    rates = {"wrong_rate": 0, "sloppy_rate": 0, "wordy_rate": 0} | faults
    world = dataclasses.replace(WORLD, **rates)
    for row in instructions.demonstrations(world, 1000, seed=4):
        graded = grade(**row)
        assert (graded.right, graded.format) == (right, format_), row
        assert concise is None or (graded.length == 1) == concise, row


def test_faults_come_at_their_rates_and_independently(rows):
    graded = [grade(**row) for row in rows]
    fillers = {word for pair in instructions.WORDY for word in " ".join(pair).split()}
    wrong = np.array([g.right == 0 for g in graded])
    sloppy = np.array([g.format == 0 for g in graded])
    wordy = np.array([bool(fillers & set(row["response"].split())) for row in rows])
    for share, rate in (
        (wrong.mean(), WORLD.wrong_rate),
        (sloppy.mean(), WORLD.sloppy_rate),
        (wordy.mean(), WORLD.wordy_rate),
        ((wrong & sloppy).mean(), WORLD.wrong_rate * WORLD.sloppy_rate),
        ((wrong & wordy).mean(), WORLD.wrong_rate * WORLD.wordy_rate),
        ((sloppy & wordy).mean(), WORLD.sloppy_rate * WORLD.wordy_rate),
    ):
        assert share == pytest.approx(
            rate, abs=4 * math.sqrt(rate * (1 - rate) / len(rows))
        )


def test_a_seed_fixes_the_draws_and_num_only_cuts_them(rows):
    assert instructions.demonstrations(WORLD, 50, seed=1) == rows[:50]
    assert instructions.demonstrations(WORLD, 50, seed=2) != rows[:50]
    for draw in (
        lambda num, seed: list(instructions.documents(WORLD, num, seed)),
        lambda num, seed: instructions.prompts(WORLD, "test", num, seed),
    ):
        assert draw(20, 1) == draw(40, 1)[:20] != draw(20, 2)
    # One seed for all uses must not put the same instructions into all of them.
    again = in_prompts(instructions.prompts(WORLD, "train", 50, seed=1))
    assert not again & in_prompts(row["prompt"] for row in rows[:50])


def test_given_prompts_are_annotated_with_the_rates_of_the_world():
    world = World(wrong_rate=0.2, sloppy_rate=0.1, wordy_rate=0.9)
    prompts = instructions.prompts(world, "test", 3000, seed=0)
    texts = instructions.annotate(world, prompts, seed=0)
    assert texts == instructions.annotate(world, iter(prompts), seed=0)
    assert texts != instructions.annotate(world, prompts, seed=1)
    grades = [grade(p, text) for p, text in zip(prompts, texts, strict=True)]
    assert np.mean([g.right for g in grades]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([g.format for g in grades]) == pytest.approx(0.9, abs=0.03)
    assert np.mean([g.length < 1 for g in grades]) == pytest.approx(0.9, abs=0.03)
    with pytest.raises(ValueError, match="must be a phrase of PHRASES"):
        instructions.annotate(world, ["say hello"], seed=0)


def digest_of_everything():
    tokenizer = instructions.train_tokenizer(WORLD)
    everything = (
        tokenizer.backend_tokenizer.to_str(),
        *instructions.documents(WORLD, 200, seed=5),
        *map(repr, instructions.demonstrations(WORLD, 200, seed=5)),
        *instructions.prompts(WORLD, "test", 200, seed=5),
    )
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()


def test_another_process_makes_the_same_world_and_vocabulary():
    program = (
        "import runpy, sys;print(runpy.run_path(sys.argv[1])['digest_of_everything']())"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == digest_of_everything()


def test_words_are_single_tokens_and_texts_short(tokenizer, rows):
    for word in instructions.LEXICON + instructions.NUMBERS[2:6]:
        assert tokenizer.tokenize(f" {word}") == [f"Ġ{word}"]
    for phrase in itertools.chain(*instructions.PHRASES.values()):
        text = phrase.format("red cow star") + instructions.MARKER
        pieces = re.findall(r" ?[a-zA-Z]+|:|\n", text)
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == [
            i for piece in pieces for i in tokenizer(piece)["input_ids"][1:]
        ]
        assert len(tokenizer.tokenize(text)) == len(pieces)
    assert 256 < len(tokenizer) <= 512
    prompt_ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    response_ids = tokenizer([row["response"] for row in rows])["input_ids"]
    assert max(map(len, prompt_ids)) <= 20
    assert np.percentile([len(ids) for ids in response_ids], 75) <= 12
    texts = list(instructions.documents(WORLD, 2000, seed=3))
    assert max(map(len, tokenizer(texts)["input_ids"])) <= 72


@given(st.text())
@example("double")  # after an apostrophe its first letter is a contraction, or is not
def test_no_token_crosses_from_prompt_to_response(tokenizer, response):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(REVERSE)
    openings = (instructions.best_response(REVERSE), *string.printable, "")
    for text in (opening + response for opening in openings):
        together = ids(REVERSE + text)
        assert together[: len(prompt)] == prompt
        answer = tokenizer.decode(
            together[len(prompt) :], clean_up_tokenization_spaces=False
        )
        assert answer == text


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_is_saved_whole(tokenizer, rows, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    end_id = loaded.convert_tokens_to_ids(instructions.END_TOKEN)
    assert loaded.bos_token_id == loaded.eos_token_id == loaded.pad_token_id == end_id
    texts = [row["prompt"] + row["response"] for row in rows[:200]] + ["Grüße\t🙂 42"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded("red")["input_ids"][0] == end_id
    assert loaded("red")["input_ids"].count(end_id) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "reverse: red cow star",  # no marker
        "reverse: red cow star\nAnswer: ",
        "reverse: red cow stars\nAnswer:",
        "reverse: red\nAnswer:",  # too short a list
        "reverse: " + " ".join(["red"] * 11) + "\nAnswer:",
        "Reverse: red cow star\nAnswer:",
    ],
)
def test_a_prompt_outside_the_language_is_refused(prompt):
    with pytest.raises(ValueError, match=r"`prompt` must be a phrase of PHRASES"):
        grade(prompt, " red.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_words": 1}, "need 2 <= min_words"),
        ({"min_words": 5, "max_words": 4}, "got 5 and 4"),
        ({"max_words": 11}, "no number word goes further"),
        ({"max_clauses": 10}, r"`max_clauses` must lie in \[1, 9\]"),
        ({"test_rate": 0}, r"`test_rate` must lie in \[0.01, 0.4\]; got 0"),
        ({"validation_rate": 0.5}, "`validation_rate` must lie in"),
        ({"wrong_rate": 1.5}, r"`wrong_rate` must lie in \[0, 1\]; got 1.5"),
        ({"wordy_rate": math.nan}, "`wordy_rate` must lie in"),
        ({"format_weight": -1}, "`format_weight` must lie in"),
        ({"surplus_scale": 0}, "`surplus_scale` must lie in"),
    ],
)
def test_a_world_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        World(**fields)


def test_prompts_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="one of train, validation, test; got 'dev'"):
        instructions.prompts(WORLD, "dev", 1, seed=0)
    # 9 operations on 32 * 31 ordered pairs, a tenth of them held out.
    with pytest.raises(ValueError, match=f"at most {9 * 32 * 31 // 20}, half"):
        instructions.prompts(NARROW, "test", 2000, seed=0)
