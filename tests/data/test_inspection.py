"""What is said of a data set before training: counted here by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from pref_jax.data import inspection
from pref_jax.data.__main__ import main
from pref_jax.types import TokenGroup


def pair(record, prompt, chosen, rejected, *, masked=0):
    masks = tuple(np.ones(n, bool) for n in (chosen, rejected))
    masks[0][:masked] = False
    return TokenGroup(
        prompt=np.arange(prompt, dtype=np.int32),
        responses=tuple(np.arange(n, dtype=np.int32) for n in (chosen, rejected)),
        loss_masks=masks,
        labels=(1.0, 0.0),
        record=record,
    )


GROUPS = [
    pair(0, 4, 5, 2, masked=2),  # 3 + 6 + 3 = 12 positions
    pair(1, 2, 3, 3),  # 1 + 4 + 4 = 9; equal ids
    pair(2, 3, 1, 9),  # 2 + 2 + 10 = 14
    pair(3, 1, 4, 2),  # 0 + 5 + 3 = 8
]


def test_the_figures_are_those_by_hand():
    found = inspection.inspect_groups(GROUPS, row_length=12)
    assert (found.num_groups, found.num_responses) == (4, 2)
    assert {name: values.tolist() for name, values in found.lengths.items()} == {
        "prompt": [4, 2, 3, 1],
        "response": [5, 2, 3, 3, 1, 9, 4, 2],
        "longest": [5, 3, 9, 4],
        "group": [12, 9, 14, 8],
    }
    assert found.longer == (0.5, 0.25, 0.25)
    assert found.equal_ids == 1
    assert (found.targets, found.untrained) == (29, 2)
    assert found.labels == [(1.0, 4), (0.0, 4)]
    drop, keep_start, keep_end = found.fits
    assert (drop.policy, drop.used, drop.cut, drop.dropped) == ("drop", 3, 0, 1)
    assert drop.fill == pytest.approx((12 + 9 + 8) / (3 * 12))
    assert (keep_start.used, keep_start.cut, keep_start.dropped) == (4, 1, 0)
    assert keep_start.fill == pytest.approx((12 + 9 + 12 + 8) / (4 * 12))
    assert (keep_end.used, keep_end.cut, keep_end.dropped) == (3, 0, 1)


def test_without_a_length_rows_hold_the_longest_group():
    found = inspection.inspect_groups(GROUPS)
    assert found.row_length == 14
    assert [fit.dropped for fit in found.fits] == [0, 0, 0]
    short = inspection.inspect_groups(GROUPS, max_positions=8)
    assert short.fits[0].dropped == 2  # 4 + 5 and 3 + 9 tokens of text


def test_what_no_policy_can_fit_is_shown_and_no_groups_are_an_error():
    found = inspection.inspect_groups(GROUPS, row_length=1)
    assert [(fit.used, fit.dropped, fit.fill) for fit in found.fits] == [(0, 4, 0)] * 3
    with pytest.raises(ValueError, match="no groups to inspect"):
        inspection.inspect_groups([])


def test_the_text_says_it():
    text = inspection.inspect_groups(GROUPS, row_length=12).text()
    assert "4 groups of 2 response(s)" in text
    assert "chosen is longer in 50 % of the pairs, equally long in 25 %" in text
    assert "groups with two responses of equal ids: 1" in text
    assert "targets: 29, of which 2 not trained" in text
    assert "labels (how often): 1 (4), 0 (4)" in text
    assert "drop        3 used, 0 of them cut, 1 dropped; rows 81 % full" in text


def test_bars_are_as_long_as_their_counts():
    values = np.repeat([10, 20, 30], [40, 20, 1])
    lines = inspection.histogram(values, num_bins=3)
    assert [line.count("#") for line in lines] == [40, 20, 1]
    assert [line.split()[-1] for line in lines] == ["40", "20", "1"]
    assert inspection.histogram([7, 7])[0].endswith(" 2")


@pytest.fixture
def file(tmp_path):
    rows = [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {i}", "k": i}
        for i in range(1, 6)
    ]
    rows[2] = {"prompt": "3 + 3 =", "chosen": " 6"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_inspect_shows_rows_tokens_and_masks(file, tokenizer):
    command = [sys.executable, "-m", "pref_jax.data", "inspect", str(file)]
    process = subprocess.run(
        [*command, "--tokenizer", str(tokenizer), "--show", "1"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "4 records, 2 response(s) each; 5 rows read, 1 skipped" in process.stdout
    assert "skipped pairs.jsonl:3" in process.stdout
    assert "end ['<end>'] [0]" in process.stdout
    assert "4 groups of 2 response(s)" in process.stdout
    assert "row 0: records 0" in process.stdout
    assert "records 1" not in process.stdout
    assert "'2' -> * '<end>'" in process.stdout or "* ''" in process.stdout


def test_without_a_tokenizer_it_shows_the_rows(file, capsys):
    main(["inspect", str(file)])
    shown = capsys.readouterr().out
    assert "4 records" in shown and "give --tokenizer DIR" in shown


def test_what_cannot_be_read_ends_with_the_reason(file):
    with pytest.raises(SystemExit, match="error: pairs.jsonl:3: needs `prompt`|must"):
        main(["inspect", str(file), "--on-error", "raise"])
    with pytest.raises(SystemExit, match="error: .*no such file|nothing"):
        main(["inspect", "nowhere.jsonl"])


def test_a_survey_accounts_for_every_row(tmp_path, file, tokenizer, capsys):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["prompt"] = "x" * 80
    rows.append(rows[4])
    renamed = [
        {("answer" if k == "chosen" else k): v for k, v in r.items()} for r in rows
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    written = tmp_path / "figures.json"
    main(
        ["survey", str(file), f"{other}?answer=chosen", "--row-length", "40"]
        + ["--tokenizer", str(tokenizer), "--write", str(written)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("     5 ->      4 (")
    assert "longer than a row: 1" in lines[2]
    first, second = json.loads(written.read_text())["sources"]
    assert (first["rows"], first["used"]) == (5, 4)
    assert sorted(second["left_out"].values()) == [1, 1]
    (problem,) = second["left_out"].keys() - {"longer than a row"}
    assert problem.startswith("needs `prompt` and exactly one of: `response`")
    assert (second["rows"], second["used"], second["duplicates"]) == (6, 4, 1)
    # "1 + 1 =" is 7 bytes: 6 + (2 + 2) + (2 + 2) = 14 positions, three times, and " 10"
    # makes one more of the last; two groups fit 40 positions, so there are two rows.
    assert first["fill"] == pytest.approx((3 * 14 + 15) / (2 * 40))
