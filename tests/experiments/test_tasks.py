"""The user's files become a task: what is read, counted, refused and held out."""

import json

import pytest

from experiments.worlds import instructions, tasks

OPTIONS = {
    "weights": (),
    "rename": {},
    "split": None,
    "heldout": None,
    "model": None,
    "grade": None,
    "on_error": "raise",
    "num_eval_prompts": 5,
    "row_length": None,
    "long_groups": "drop",
    "cache": "cache",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    instructions.train_tokenizer(instructions.World()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_task(tokenizer, tmp_path, monkeypatch):
    """`own_task(rows, **options)`: the task of a file of these rows."""
    monkeypatch.chdir(tmp_path)

    def make(rows, **options):
        path = write(tmp_path / "data.jsonl", rows)
        return tasks.own_task([path], **OPTIONS | {"tokenizer": tokenizer} | options)

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(numbers):
    return [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {i}"}
        for i in numbers
    ]


def demonstrations(numbers):
    return [{"prompt": f"{i} + {i} =", "response": f" {2 * i}"} for i in numbers]


def test_pairs_are_split_by_prompt_and_their_chosen_half_demonstrates(own_task):
    rows = pairs(range(200)) * 2  # each prompt twice
    task = own_task(rows)
    train, heldout = task.pairs
    assert len(train) + len(heldout) == 400
    assert 20 <= len(heldout) <= 60  # a tenth, by a hash of the prompt
    texts = [{tuple(g.prompt.tolist()) for g in part} for part in task.pairs]
    assert not texts[0] & texts[1]
    for part, demonstrated in zip(task.pairs, task.demonstrations, strict=True):
        for pair, one in zip(part, demonstrated, strict=True):
            assert len(one.responses) == 1
            assert one.responses[0].tolist() == pair.responses[0].tolist()
    assert len(task.eval_prompts) == 5
    assert task.documents is None and task.grade is None
    assert "400 records" in task.notes[0]


def test_another_file_is_held_out_whole_and_what_it_shares_is_counted(
    own_task, tmp_path
):
    path = write(tmp_path / "heldout.jsonl", pairs(range(18, 22)))
    task = own_task(pairs(range(20)), heldout=path)
    assert [len(part) for part in task.pairs] == [20, 4]
    assert [note.split(":")[0] for note in task.notes[:2]] == [
        "data.jsonl",
        "heldout.jsonl",
    ]
    assert "2 of 4 held-out rows have a prompt that is in" in task.notes[2]


@pytest.mark.parametrize(
    ("rows", "heldout", "message"),
    [
        (pairs(range(3)), None, "2 responses a row, 3 training and 0 held-out rows"),
        (pairs(range(9)), demonstrations(range(9)), "1 and 2 responses a row"),
        (
            [{"prompt": "a", "responses": [" b"] * 3, "labels": [1, 2, 3]}] * 40,
            None,
            "3 responses a row",
        ),
        (demonstrations(range(200)), None, "holds demonstrations, so pairs have to be"),
    ],
)
def test_what_is_neither_is_an_error(own_task, tmp_path, rows, heldout, message):
    if heldout is not None:
        heldout = write(tmp_path / "heldout.jsonl", heldout)
    with pytest.raises(ValueError, match=message):
        own_task(rows, heldout=heldout)


def test_lists_are_taken_by_who_compares_them(own_task):
    rows = [
        {"prompt": f"{i} + {i} =", "responses": [" 1", " 2", " 3"], "labels": [2, 0, 1]}
        for i in range(200)
    ]
    train, heldout = own_task(rows, takes_lists=True).pairs
    assert len(train) + len(heldout) == 200
    assert {len(group.responses) for group in (*train, *heldout)} == {3}
    assert tuple(train[0].labels) == (2.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="lists of one size. or demonstrations, not"):
        own_task(rows[:1], takes_lists=True)


def test_a_grade_is_a_number_of_prompt_and_response(own_task, tmp_path):
    (tmp_path / "mine_ok.py").write_text("def f(prompt, response):\n    return 3\n")
    task = own_task(demonstrations(range(200)), grade="mine_ok:f")
    assert task.grade("1 + 1 =", " 2") == {"reward": 3.0}
    assert task.pairs is None
    assert sum(map(len, task.pair_prompts)) == 200


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("mine_none", "return None", "must return a finite number; it returned None"),
        ("mine_nan", "return float('nan')", "it returned nan for the prompt '"),
        ("mine_text", "return 'good'", "it returned 'good'"),
    ],
)
def test_a_grade_that_is_no_number_is_known_before_training(
    own_task, tmp_path, name, body, message
):
    (tmp_path / f"{name}.py").write_text(f"def f(prompt, response):\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        own_task(pairs(range(200)), grade=f"{name}:f")


def test_a_tokenizer_that_the_model_cannot_hold_is_an_error(own_task, tmp_path):
    config = {"model_type": "llama", "vocab_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="but the model's vocab_size is 4"):
        own_task(pairs(range(200)), model=str(tmp_path))


@pytest.mark.parametrize("grade", ["nowhere:f", "json:nothing", "json", ":f"])
def test_a_grade_that_is_not_there_is_an_error(own_task, grade):
    with pytest.raises(ValueError, match=f"--grade {grade} must name module:function"):
        own_task(pairs(range(200)), grade=grade)


def test_the_world_says_what_it_is_made_of():
    task = tasks.world_task(
        instructions.World(),
        seed=0,
        num_documents=40,
        num_demonstrations=60,
        num_pair_prompts=20,
        num_eval_prompts=7,
    )
    assert [len(part) for part in task.documents] == [38, 2]
    assert [len(part) for part in task.demonstrations] == [57, 3]
    assert [len(part) for part in task.pair_prompts] == [20, 16]
    assert len(task.eval_prompts) == 7
    splits = [
        {instructions.split_of(instructions.World(), *instructions.parse_prompt(p))}
        for p in (*task.pair_prompts[0], *task.pair_prompts[1], *task.eval_prompts)
    ]
    assert set().union(*splits[:20]) == {"train"}
    assert set().union(*splits[20:36]) == {"validation"}
    assert set().union(*splits[36:]) == {"test"}
    graded = task.grade(
        task.eval_prompts[0], instructions.best_response(task.eval_prompts[0])
    )
    assert graded == {"reward": 1.0, "right": 1.0, "format": 1.0, "length": 1.0}


def test_several_sources_are_mixed_by_size_or_by_weight(own_task, tmp_path):
    path = write(tmp_path / "more.jsonl", pairs(range(500, 540)))

    def make(**options):
        return tasks.own_task(
            [write(tmp_path / "data.jsonl", pairs(range(200))), path],
            **OPTIONS | {"tokenizer": str(tmp_path / "tokenizer")} | options,
        )

    instructions.train_tokenizer(instructions.World()).save_pretrained(
        tmp_path / "tokenizer"
    )
    train, heldout = make().pairs
    assert list(train.weights) == [len(part) for part in train.parts]
    assert len(train) + len(heldout) == 240
    weighted, _ = make(weights=(1.0, 3.0)).pairs
    assert weighted.weights == (1.0, 3.0)
    demonstrated = make(weights=(1.0, 3.0)).demonstrations[0]
    assert demonstrated.weights == (1.0, 3.0)
    assert [len(g.responses) for g in demonstrated[:3]] == [1, 1, 1]


def test_text_is_tokenised_once(own_task, tmp_path, monkeypatch):
    first = own_task(pairs(range(200)))

    def never(*args, **options):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tasks.templates.TextEncoder, "encode_all", never)
    again = own_task(pairs(range(200)))
    for a, b in zip(first.pairs, again.pairs, strict=True):
        assert [g.prompt.tolist() for g in a] == [g.prompt.tolist() for g in b]
    with pytest.raises(AssertionError, match="tokenised again"):
        own_task(pairs(range(201)))
    with pytest.raises(AssertionError, match="tokenised again"):
        own_task(pairs(range(200)), long_groups="keep_start")


def test_what_a_policy_leaves_out_is_said(own_task):
    long = {"prompt": "word " * 60, "chosen": " a", "rejected": " b"}
    notes = own_task([*pairs(range(200)), long], row_length=40).notes
    dropped = [note for note in notes if note.startswith("tokens: records")]
    assert len(dropped) == 2
    assert any("dropped 1" in note for note in dropped)


def test_fields_of_held_out_rows_make_groups(own_task, tmp_path):
    rows = [
        row | {"topic": "sums" if i % 2 else "doubles", "id": f"row {i}", "hard": i / 7}
        for i, row in enumerate(pairs(range(30)))
    ]
    rows[3]["chosen"] = "b " * 90
    path = write(tmp_path / "heldout.jsonl", rows)
    task = own_task(pairs(range(100, 130)), heldout=path, row_length=60)
    assert set(task.heldout_fields) == {"topic", "hard"}  # each id would be a group
    numbers = [group.record for group in task.pairs[1]]
    assert 3 not in numbers and len(numbers) == 29
    for number in numbers:
        assert task.heldout_fields["hard"][number] == rows[number]["hard"]
