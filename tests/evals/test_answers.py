"""Answers are written as the judges read them; no judgment is lost on the way back."""

import json

import numpy as np
import pytest

from pref_jax.evals.answers import (
    read_alpaca_annotations,
    read_arena_judgments,
    write_alpaca_answers,
    write_arena_answers,
    write_arena_v01_answers,
)

TEXTS = ["plain", 'quotes " and\nlines', "naïve 日本 \u2028 x"]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


# --- writing --------------------------------------------------------------------------


def test_alpaca_answers_are_a_list_of_four_fields(tmp_path):
    path = tmp_path / "answers.json"
    write_alpaca_answers(
        path,
        instructions=["a", "b", "c"],
        outputs=TEXTS,
        generator="ours",
        dataset="own",
    )
    assert json.loads(path.read_text("utf-8")) == [
        {"instruction": i, "output": o, "generator": "ours", "dataset": "own"}
        for i, o in zip("abc", TEXTS, strict=True)
    ]


def test_arena_answers_hold_the_conversation(tmp_path):
    path = tmp_path / "ours.jsonl"
    write_arena_answers(
        path,
        uids=["1", "2", "3"],
        prompts=["a", "b", "c"],
        outputs=TEXTS,
        model="ours",
        tstamp=5.0,
    )
    rows = lines(path)
    ids = [row.pop("ans_id") for row in rows]
    assert rows == [
        {
            "uid": uid,
            "model": "ours",
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": {"answer": output}},
            ],
            "tstamp": 5.0,
        }
        for uid, prompt, output in zip("123", "abc", TEXTS, strict=True)
    ]
    assert len(set(ids)) == 3


def test_arena_v01_answers_hold_one_turn(tmp_path):
    path = tmp_path / "ours.jsonl"
    write_arena_v01_answers(path, question_ids=list("123"), outputs=TEXTS, model="ours")
    rows = lines(path)
    ids = [row.pop("answer_id") for row in rows]
    assert rows == [
        {
            "question_id": question,
            "model_id": "ours",
            "choices": [{"index": 0, "turns": [{"content": output}]}],
            "tstamp": 0.0,
        }
        for question, output in zip("123", TEXTS, strict=True)
    ]
    assert len(set(ids)) == 3


def test_equal_answers_are_equal_files_and_models_have_ids_of_their_own(tmp_path):
    files = []
    for name, model in (("a", "ours"), ("b", "ours"), ("c", "other")):
        path = tmp_path / name
        write_arena_v01_answers(path, question_ids=["1"], outputs=["x"], model=model)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    ids = [json.loads(file)["answer_id"] for file in files]
    assert ids[0] != ids[2]


def write_alpaca(path, ids, texts):
    write_alpaca_answers(
        path, instructions=ids, outputs=texts, generator="ours", dataset="own"
    )


def write_arena(path, ids, texts):
    write_arena_answers(
        path, uids=ids, prompts=["p"] * len(ids), outputs=texts, model="ours"
    )


def write_arena_v01(path, ids, texts):
    write_arena_v01_answers(path, question_ids=ids, outputs=texts, model="ours")


@pytest.mark.parametrize(
    ("write", "of"),
    [
        (write_alpaca, "instructions"),
        (write_arena, "uids"),
        (write_arena_v01, "question_ids"),
    ],
)
@pytest.mark.parametrize(
    ("ids", "texts", "error", "message"),
    [
        (
            ["a", "b"],
            ["x"],
            ValueError,
            "`outputs` needs one for each of 2 `{}`; got 1",
        ),
        (["a", "b", "a"], ["x"] * 3, ValueError, r"`{}\[2\]` repeats `{}\[0\]`: 'a'"),
        (
            ["a", "b"],
            ["x", None],
            TypeError,
            r"`outputs\[1\]`, of 'b', must be a .* None",
        ),
        (["a", 3], ["x", "y"], TypeError, r"`{}\[1\]` must be a string; got 3"),
        ([], [], ValueError, "`{}` is empty"),
    ],
)
def test_answers_that_do_not_fit_are_not_written(
    tmp_path, write, of, ids, texts, error, message
):
    with pytest.raises(error, match=message.replace("{}", of)):
        write(tmp_path / "answers", ids, texts)
    assert not (tmp_path / "answers").exists()


def test_an_empty_text_is_an_answer_and_prompts_are_checked(tmp_path):
    write_arena(tmp_path / "a", ["1"], [""])
    assert lines(tmp_path / "a")[0]["messages"][1]["content"] == {"answer": ""}
    with pytest.raises(
        ValueError, match="`prompts` needs one for each of 1 `uids`; got 2"
    ):
        write_arena_answers(
            tmp_path / "b", uids=["1"], prompts=["p", "q"], outputs=["x"], model="ours"
        )


# --- AlpacaEval's annotations ---------------------------------------------------------


def annotation(instruction, preference, **fields):
    return {
        "instruction": instruction,
        "output_1": "four",
        "generator_1": "gpt4",
        "dataset": "own",
        "output_2": "sixsix",
        "generator_2": "ours",
        "annotator": "judge",
        "preference": preference,
    } | fields


def read_alpaca(tmp_path, rows, instructions):
    path = tmp_path / "annotations.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), "utf-8")
    return read_alpaca_annotations(path, instructions=instructions, generator="ours")


def test_a_preference_of_two_is_a_win_of_the_second_generator(tmp_path):
    rows = [
        annotation(name, preference)
        for name, preference in zip("abcdef", [1, 2, 1.5, 0, 1.9, 2.0], strict=True)
    ]
    found = read_alpaca(tmp_path, rows, list("abcdef"))
    np.testing.assert_allclose(found.outcomes, [0, 1, 0.5, 0.5, 0.9, 1], rtol=1e-12)


def test_outcomes_come_in_the_order_asked_for(tmp_path):
    rows = [annotation("a", 1), annotation("b", 2, output_2="")]
    found = read_alpaca(tmp_path, rows, ["b", "a"])
    assert found.outcomes.tolist() == [1.0, 0.0]
    assert found.length_differences.tolist() == [-4, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [annotation("a", 1), annotation("b", None)],
            r"annotations.json, row 1: `preference` must be in \[1, 2\], .* got None",
        ),
        ([annotation("a", 1), annotation("b", 3)], "row 1: `preference` .* got 3"),
        ([annotation("a", 1), annotation("b", 0.5)], "row 1: `preference` .* got 0.5"),
        ([annotation("a", True)], "row 0: `preference` .* got True"),
        ([annotation("a", False)], "row 0: `preference` .* got False"),
        ([annotation("a", "1")], "row 0: `preference` .* got '1'"),
        ([annotation("a", float("nan"))], "row 0: `preference` .* got nan"),
        (
            [annotation("a", 1), annotation("b", 2), annotation("a", 2)],
            "row 2: 'a' was judged before, in annotations.json, row 0",
        ),
        ([annotation("a", 1)], r"no judgment of `instructions\[1\]`, 'b'; 1 of 2"),
        (
            [annotation(name, 1) for name in "abc"],
            "row 2: 'c' is not one of 2 `instructions`",
        ),
        (
            [annotation("a", 1, generator_1="ours", generator_2="gpt4")],
            "row 0: `generator_2` must be 'ours', .* got 'gpt4' against 'ours'",
        ),
        ([annotation("a", 1, output_1=None)], "row 0: `output_1` must be a str; got N"),
        ([{"instruction": "a"}], "row 0: field `generator_1` is missing"),
        ([annotation("a", 1), 7], "row 1: needs an object; got int"),
        ({"a": 1}, "annotations.json: needs a JSON list of annotations; got dict"),
        ("[", "annotations.json: not JSON: "),
    ],
)
def test_annotations_that_give_no_outcome_are_an_error(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_alpaca(tmp_path, rows, ["a", "b"])


# --- Arena-Hard's judgments -----------------------------------------------------------


def judgment(uid, first, second, key="uid", **fields):
    games = [{"score": score, "judgment": "so \u2028 so"} for score in (first, second)]
    return {key: uid, "judge": "judge", "model": "ours", "games": games} | fields


def read_arena(tmp_path, rows, uids, **options):
    path = tmp_path / "ours.jsonl"
    text = "".join(
        f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n"
        for row in rows
    )
    path.write_text(text, "utf-8")
    return read_arena_judgments(path, uids=uids, model="ours", **options)


# The model is B in the first game and A in the second.
@pytest.mark.parametrize("key", ["uid", "question_id"])
@pytest.mark.parametrize(
    ("first", "second", "outcome", "weight"),
    [
        ("B>A", "A>B", 1.0, 2),
        ("A>B", "B>A", 0.0, 2),
        ("A>B", "A>B", 0.5, 2),  # the judge prefers a place
        ("A=B", "B=A", 0.5, 2),
        ("A=B", "A>B", 0.75, 2),
        ("B>>A", "B>A", 3 / 4, 4),
        ("A>>B", "A>B", 1 / 4, 4),
        ("B>A", "B>>A", 1 / 4, 4),
        ("B>>A", "A>>B", 1.0, 6),
        ("A<B", "B<A", 1.0, 2),
        ("A<<B", "A=B", 3.5 / 4, 4),
        ("B<<A", "A>B", 1 / 4, 4),
    ],
)
def test_verdicts_are_weighed_wins_of_the_model(
    tmp_path, key, first, second, outcome, weight
):
    found = read_arena(tmp_path, [judgment("q", first, second, key)], ["q"])
    assert found.outcomes.tolist() == [outcome]
    assert found.weights.tolist() == [weight]
    plain = read_arena(
        tmp_path, [judgment("q", first, second, key)], ["q"], strong_weight=1
    )
    assert plain.weights.tolist() == [2]


def test_judgments_come_in_the_order_asked_for_and_average_to_the_score(tmp_path):
    rows = [judgment("1", "B>>A", "A>B"), judgment("2", "A>B", "A=B")]
    found = read_arena(tmp_path, [rows[0], "", rows[1]], ["2", "1"])
    assert found.outcomes.tolist() == [0.25, 1.0]
    # All verdicts in one list: 1, 1, 1, 1 and 0, 1/2.
    score = found.weights @ found.outcomes / found.weights.sum()
    assert score == pytest.approx(4.5 / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [judgment("1", "A>B", None)],
            "ours.jsonl:1: game 1 needs a score such as 'A>B'; got None. Judge '1'",
        ),
        ([judgment("1", "A>C", "A>B")], "jsonl:1: game 0 needs .* got 'A>C'"),
        ([judgment("1", ["A>B"], "A>B")], "jsonl:1: game 0 needs .* got "),
        ([judgment("1", "A>B", "A>B", games=[None, {}])], "game 0 needs .* got None"),
        ([judgment("1", "A>B", "A>B", games=[{}])], "`games` needs two, .* got 1"),
        ([judgment("1", "A=B", "A=B", model="gpt")], "must be 'ours'; got 'gpt'"),
        (
            [judgment("1", "A=B", "A=B")] * 2,
            "jsonl:2: '1' was judged before, in ours.jsonl:1",
        ),
        ([judgment("1", "A=B", "A=B")], r"no judgment of `uids\[1\]`, '2'; 1 of 2"),
        ([judgment("3", "A=B", "A=B")], "jsonl:1: '3' is not one of 2 `uids`"),
        ([{"model": "ours"}], r"field `uid` \(v0.1: `question_id`\) is missing"),
        (["", "{"], "jsonl:2: not JSON: "),
        (["[]"], "jsonl:1: needs an object; got list"),
    ],
)
def test_judgments_that_give_no_outcome_are_an_error(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_arena(tmp_path, rows, ["1", "2"])


def test_ids_that_repeat_and_weights_of_nothing_are_an_error(tmp_path):
    rows = [judgment("1", "A=B", "A=B")]
    with pytest.raises(ValueError, match=r"`uids\[1\]` repeats `uids\[0\]`: '1'"):
        read_arena(tmp_path, rows, ["1", "1"])
    with pytest.raises(ValueError, match="`strong_weight` must be positive; got 0"):
        read_arena(tmp_path, rows, ["1"], strong_weight=0)
    with pytest.raises(ValueError, match="`uids` is empty: there is nothing to read"):
        read_arena(tmp_path, [], [])
