"""The Q analysis: its numbers by hand, its findings on planted facts, its command."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import own_files
from experiments.q_analysis import __main__ as command
from experiments.q_analysis import findings, readings
from experiments.q_analysis.findings import Read
from experiments.q_analysis.readings import CORRUPTED, GIVEN, Response
from experiments.worlds.token_numbers import read_model
from pref_jax.data import templates
from pref_jax.models import pretrained
from pref_jax.models.decoder import make_decoder
from pref_jax.train import sharding
from pref_jax.types import TokenGroup

BETA = 0.5


def make_group(*responses, record=0, prompt=(5, 6), labels=None):
    return TokenGroup(
        prompt=np.array(prompt, np.int32),
        responses=tuple(np.array(r, np.int32) for r in responses),
        loss_masks=tuple(np.ones(len(r), bool) for r in responses),
        labels=labels or tuple(1.0 - i for i in range(len(responses))),
        record=record,
    )


# --- corrupted copies -----------------------------------------------------------------


def test_a_copy_differs_in_one_token_that_is_not_its_last():
    pool = np.array([1, 2, 3])
    seen = set()
    for record in range(60):
        group = make_group([1, 2, 3, 9], [7, 1, 9], record=record)
        twice, places = readings.corrupted(group, pool, seed=0)
        assert len(twice.responses) == 4 and twice.labels == group.labels * 2
        for k in range(2):
            original, copy = twice.responses[k], twice.responses[2 + k]
            np.testing.assert_array_equal(original, group.responses[k])
            assert np.flatnonzero(original != copy).tolist() == [places[k]]
            assert copy[places[k]] in pool
            seen.add((k, places[k]))
    assert seen == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}


def test_copies_are_drawn_by_seed_and_record():
    pool = np.arange(50)
    group = make_group(list(range(30)))

    def drawn(seed, record):
        made = make_group(*group.responses, record=record)
        return readings.corrupted(made, pool, seed)[0].responses[1].tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0) and drawn(0, 0) != drawn(0, 1)


@pytest.mark.parametrize(
    ("response", "pool"), [([9], [1, 2]), ([1, 9], [1]), ([1, 9], [])]
)
def test_where_nothing_can_be_replaced_the_copy_is_no_other(response, pool):
    twice, places = readings.corrupted(make_group(response), np.array(pool, int), 0)
    assert places == [None]
    np.testing.assert_array_equal(twice.responses[1], response)


def test_only_tokens_that_count_are_replaced():
    group = make_group([1, 2, 3, 4, 9])
    mask = np.array([False, True, False, False, True])
    masked = TokenGroup(**(vars(group) | {"loss_masks": (mask,)}))
    _, places = readings.corrupted(masked, np.array([7, 8]), 0)
    assert places == [1]


# --- numbers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_and_data(tmp_path_factory):
    """Two checkpoints, one a little apart from the other, and forty pairs."""
    folder = tmp_path_factory.mktemp("q")
    own_files.write(folder)
    params = own_files.save_model(folder / "policy", folder / "tokenizer")
    config, _ = pretrained.load(folder / "policy")
    tokenizer = templates.load_tokenizer(folder / "tokenizer")
    keys = iter(jax.random.split(jax.random.key(7), 100))
    moved = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params
    )
    pretrained.save(folder / "reference", config, moved, tokenizer=tokenizer)
    return folder


def logits_alone(folder, group, k):
    """f64[n, V] before each token of a response, its text alone in a row."""
    config, params = pretrained.load(folder)
    model = make_decoder(config)
    ids = np.concatenate([group.prompt, group.responses[k]])[None]
    position = jnp.arange(ids.shape[1])[None]
    hidden = model.hidden(params, ids, position, jnp.full(ids.shape, ids.shape[1]))
    logits = np.float64(hidden[0]) @ np.float64(model.unembedding(params)).T
    first = len(group.prompt) - 1
    return logits[first : first + len(group.responses[k])]


def log_sum_exp(x):
    return np.log(np.exp(x).sum(-1))


def read_both(folder, groups):
    mesh = sharding.make_mesh()
    found = []
    for name in ("policy", "reference"):
        config, params = pretrained.load(folder / name)
        found.append(
            read_model(
                name,
                make_decoder(config),
                params,
                groups,
                beta=BETA,
                groups_per_step=2,
                mesh=mesh,
            )
        )
    return found


def test_numbers_of_tokens_are_those_of_each_response_alone(models_and_data):
    groups = [
        make_group([40, 41, 42, 0], [43, 0], prompt=(30, 31, 32), record=0),
        make_group([50, 0], [51, 52, 53, 54, 55, 0], prompt=(33,), record=1),
        make_group([60, 61, 0], [62, 63, 0], prompt=(34, 35), record=2),
    ]
    own, reference = read_both(models_and_data, groups)
    for i, group in enumerate(groups):
        for k, ids in enumerate(group.responses):
            policy, other = (
                logits_alone(models_and_data / name, group, k)
                for name in ("policy", "reference")
            )
            at = np.arange(len(ids)), ids
            value, logps = log_sum_exp(policy), policy[at] - log_sum_exp(policy)
            probability = np.exp(policy - value[:, None])
            entropy = -(probability * np.log(probability)).sum(-1)
            log_ratio = BETA * (logps - (other[at] - log_sum_exp(other)))
            following = np.append(BETA * value[1:], 0.0)
            token_reward = log_ratio + BETA * value - following
            outcome = np.append(np.zeros(len(ids) - 1), group.labels[k])
            residual = BETA * policy[at] - (
                outcome + BETA * (other[at] - log_sum_exp(other)) + following
            )
            response = Response(
                i, k, GIVEN, "", ids, group.loss_masks[k], group.labels[k]
            )
            found = readings.derived(response, own[i][k], reference[i][k], beta=BETA)
            for name, expected in {
                "q": BETA * policy[at],
                "value": BETA * value,
                "advantage": BETA * logps,
                "entropy": entropy,
                "log_ratio": log_ratio,
                "token_reward": token_reward,
                "residual": residual,
            }.items():
                np.testing.assert_allclose(
                    found[name], expected, atol=2e-5, err_msg=name
                )
            # Rewards of tokens add up to that of the response and V of the prompt.
            np.testing.assert_allclose(
                found["token_reward"].sum(),
                log_ratio.sum() + BETA * value[0],
                atol=1e-4,
            )


def test_without_a_label_the_residual_of_the_last_token_is_not_known():
    ids = np.array([1, 2, 3])
    numbers = {name: np.ones(3) for name in ("q", "value", "logp", "entropy")}
    response = Response(0, 0, CORRUPTED, "", ids, np.ones(3, bool), np.nan)
    found = readings.derived(response, numbers, numbers, beta=1.0)
    assert np.isnan(found["residual"]).tolist() == [False, False, True]
    assert np.isfinite(found["token_reward"]).all()
    masked = Response(0, 0, GIVEN, "", ids, np.array([True, False, True]), label=1.0)
    found = readings.derived(masked, numbers, numbers, beta=1.0)
    for name in ("residual", "token_reward"):
        assert np.isnan(found[name]).tolist() == [False, True, False]


# --- findings -------------------------------------------------------------------------


def make_read(label, *, record=0, slot=0, kind=GIVEN, changed=None, value=0.0, n=4):
    """A response whose V is `value` everywhere, and whose other numbers are 0."""
    numbers = {name: np.zeros(n) for name in ("q", "advantage", "entropy")}
    numbers |= {"value": np.full(n, float(value))}
    response = Response(
        record, slot, kind, "p", np.arange(n), np.ones(n, bool), label, changed
    )
    return Read(response, numbers, None)


def signal(reads, name):
    (found,) = (s for s in findings.find_signals(reads) if s.name == name)
    return found


def test_a_value_that_tells_the_label_is_found_and_one_that_does_not_is_not():
    reads = [
        make_read(float(slot), record=record, slot=slot, value=slot + 10 * record)
        for record in range(12)
        for slot in range(2)
    ]
    found = signal(reads, "mean V")
    assert found.accuracy == (1.0, 1.0, 1.0) and not found.control
    # Over all responses V says more of the prompt than of the label.
    assert 0.5 < found.auc.mean < 0.6 and found.correlation.mean < 0.2
    flat = signal(reads, "mean entropy")
    assert flat.accuracy == (0.5, 0.5, 0.5) and flat.control
    assert flat.correlation is None and flat.auc.mean == 0.5


def test_worse_than_chance_is_shown_as_that():
    reads = [
        make_read(float(slot), record=record, slot=slot, value=-slot)
        for record in range(6)
        for slot in range(2)
    ]
    found = signal(reads, "V before the last token")
    assert (found.accuracy.mean, found.auc.mean) == (0.0, 0.0)
    assert found.correlation.mean == pytest.approx(-1.0)


def test_grades_have_a_correlation_and_no_auc():
    reads = [make_read(g, record=i, value=g**3) for i, g in enumerate((0.1, 0.5, 0.9))]
    found = signal(reads, "mean V")
    assert found.correlation.mean == pytest.approx(1.0)
    assert found.auc is None and found.accuracy is None  # one response a prompt


def test_without_labels_nothing_is_held_against_them():
    assert findings.find_signals([make_read(np.nan), make_read(np.nan, record=1)]) == []
    copies = [make_read(np.nan, kind=CORRUPTED, changed=1, value=9.0)]
    found = findings.find_signals([make_read(1.0), make_read(0.0, slot=1), *copies])
    assert {s.name: s.accuracy for s in found}["mean V"] == (0.5, 0.5, 0.5)


def test_a_replaced_token_is_compared_at_its_place_and_right_after():
    reads = []
    for record in range(5):
        original = make_read(1.0, record=record)
        copy = make_read(np.nan, record=record, kind=CORRUPTED, changed=2)
        original.own["advantage"][:] = [9.0, 9.0, -1.0, 9.0]
        copy.own["advantage"][:] = [0.0, 0.0, -4.0, 0.0]
        original.own["value"][3], copy.own["value"][3] = 2.0, 5.0
        reads += [original, copy]
    unchanged = make_read(np.nan, record=0, slot=1, kind=CORRUPTED)
    drops = {d.name: d for d in findings.find_drops([*reads, unchanged])}
    assert drops["advantage"].difference == (3.0, 3.0, 3.0)
    assert drops["advantage"].share.mean == 1.0 and drops["advantage"].number == 5
    assert drops["value after it"].difference.mean == -3.0
    assert drops["value after it"].share.mean == 0.0
    assert drops["q"].difference.mean == 0.0


def test_a_value_along_the_response_is_less_that_of_its_first_token():
    read = make_read(1.0, n=20)
    read.own["value"][:] = np.arange(20.0) + 100
    (line,) = findings.along([read], "value")
    np.testing.assert_allclose(line, 0.5 + 2 * np.arange(10))
    (short,) = findings.along([make_read(1.0, n=2, value=3.0)], "value")
    assert np.isfinite(short).sum() == 2 and np.nansum(short) == 0


def test_better_and_worse_are_about_the_mean_of_the_prompt():
    reads = [
        make_read(0.2),
        make_read(0.6, slot=1),
        make_read(0.9, record=1),
        make_read(0.9, record=1, slot=1),
        make_read(np.nan, kind=CORRUPTED, changed=1),
        make_read(np.nan, slot=1, kind=CORRUPTED),
    ]
    found = {name: len(those) for name, those in findings.kinds(reads).items()}
    assert found == {"worse": 1, "better": 1, "responses": 2, "one token replaced": 1}


# --- the command ----------------------------------------------------------------------


def config(folder, out, **changes):
    settings = {
        "model": str(folder / "policy"),
        "data": str(folder / "pairs.jsonl"),
        "reference": str(folder / "reference"),
        "out": str(out),
        "max_prompts": 6,
        "num_shown": 2,
    }
    return command.Config(**settings | changes)


@pytest.mark.slow
def test_the_page_and_the_numbers_are_of_both_models(models_and_data, tmp_path):
    path = command.run(config(models_and_data, tmp_path / "out", beta=BETA))
    text = path.read_text()
    with pytest.raises(ValueError, match=r"saved 0.5, now 0.7\); give"):
        command.run(config(models_and_data, tmp_path / "out", beta=0.7))
    assert path.read_text() == text
    for part in (
        "policy beside reference",
        "The first 6 of 40 rows were read (--max-prompts).",
        "row 1, response 2, corrupted",
        "mean V of the reference",
    ):
        assert part in text
    assert "row 2," not in text
    table = pyarrow.parquet.read_table(path.parent / "tokens.parquet").to_pylist()
    assert {row["record"] for row in table} == set(range(6))
    assert {row["kind"] for row in table} == {GIVEN, CORRUPTED}
    chosen = [r for r in table if (r["record"], r["response"]) == (3, 0)]
    given = [r for r in chosen if r["kind"] == GIVEN]
    copy = [r for r in chosen if r["kind"] == CORRUPTED]
    assert "".join(r["token"] for r in given) == " It is 6.<end>"
    assert {r["label"] for r in given} == {1.0}
    different = [
        i
        for i, (a, b) in enumerate(zip(given, copy, strict=True))
        if a["token_id"] != b["token_id"]
    ]
    assert different == [copy[0]["changed"]]
    total = sum(row["token_reward"] for row in given)
    expected = sum(row["log_ratio"] for row in given) + given[0]["value"]
    assert total == pytest.approx(expected, abs=1e-4)
    assert given[0]["reference_value"] != given[0]["value"]
    record = json.loads((path.parent / "record.json").read_text())
    assert {d["name"] for d in record["results"]["drops"]} >= {"q", "token_reward"}


@pytest.mark.slow
def test_a_model_alone_has_no_rewards(models_and_data, tmp_path):
    path = command.run(config(models_and_data, tmp_path, reference=None))
    names = pyarrow.parquet.read_schema(path.parent / "tokens.parquet").names
    assert "advantage" in names and "token_reward" not in names
    assert "of the reference" not in path.read_text()


@pytest.mark.slow
def test_sampled_responses_are_graded_by_the_users_function(
    models_and_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(models_and_data)
    path = command.run(
        config(
            models_and_data,
            tmp_path,
            num_samples=3,
            max_new_tokens=6,
            grade="mygrade:short",
        )
    )
    table = pyarrow.parquet.read_table(path.parent / "tokens.parquet").to_pylist()
    assert {row["response"] for row in table} == {0, 1, 2}
    assert {row["kind"] for row in table} == {"sampled", CORRUPTED}
    sampled = [r for r in table if (r["record"], r["response"]) == (2, 1)]
    text = [r for r in sampled if r["kind"] == "sampled"]
    shown = "".join(r["token"] for r in text if r["token"] != "<end>")
    if "\ufffd" not in shown and all(r["token"].isprintable() for r in text):
        assert text[0]["label"] == -len(shown)
    without = command.run(
        config(models_and_data, tmp_path / "b", num_samples=2, max_new_tokens=4)
    )
    assert "What tells good responses from bad" not in without.read_text()


@pytest.mark.slow
def test_rows_that_are_left_out_are_counted(models_and_data, tmp_path):
    rows = [json.loads(x) for x in (models_and_data / "pairs.jsonl").open()][:4]
    rows[1] = rows[1] | {"chosen": " It is " + "very " * 300}
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = command.run(config(models_and_data, tmp_path / "out", data=str(data)))
    note = "1 rows are longer than the model&#39;s 256 positions and were left out."
    assert note in path.read_text()
    table = pyarrow.parquet.read_table(path.parent / "tokens.parquet").to_pylist()
    assert {row["record"] for row in table} == {0, 2, 3}


@pytest.mark.slow
def test_prompts_without_room_for_a_response_are_counted(models_and_data, tmp_path):
    rows = [json.loads(x) for x in (models_and_data / "pairs.jsonl").open()][:4]
    rows[1] = rows[1] | {"prompt": "Is it " + "very " * 60 + "late?"}
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": str(data), "num_samples": 1, "max_new_tokens": 4}
    reads, _, notes, _ = command.read_all(config(models_and_data, tmp_path, **changes))
    assert any(
        note.startswith("of 4 prompts 1 were left out: with 4") for note in notes
    )
    assert {read.response.record for read in reads} == {0, 2, 3}
    data.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="of 1 prompts 1 were left out.*Use shorter"):
        command.read_all(config(models_and_data, tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_prompts": 0}, "`max_prompts` must be 1 or more; got 0"),
        ({"beta": 0.0}, "`beta` must be positive; got 0.0"),
        ({"grade": "mygrade:short"}, "`grade` belongs to sampled responses"),
    ],
)
def test_bad_settings_are_refused(models_and_data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(models_and_data, tmp_path, **change)


def test_a_reference_of_other_tokens_is_refused(models_and_data, tmp_path):
    shutil.copytree(models_and_data / "reference", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer of the reference, in .*other"):
        command.read_all(
            config(models_and_data, tmp_path, reference=str(tmp_path / "other"))
        )


@pytest.mark.slow
def test_rows_that_cannot_be_encoded_are_counted(models_and_data, tmp_path):
    rows = [json.loads(x) for x in (models_and_data / "pairs.jsonl").open()][:3]
    turns = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "yes"}]
    rows[1] = {"prompt": turns, "chosen": answer, "rejected": answer[:1]}
    rows[1]["rejected"] = [{"role": "assistant", "content": "no"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": str(data), "on_error": "skip", "reference": None}
    _, _, notes, _ = command.read_all(config(models_and_data, tmp_path, **changes))
    assert any(n.startswith("1 rows could not be encoded") for n in notes)


@pytest.mark.slow
def test_the_command_says_where_the_page_is_or_what_was_wrong(
    models_and_data, tmp_path, pytestconfig
):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "experiments.q_analysis", *arguments],
            cwd=pytestconfig.rootpath,
            capture_output=True,
            text=True,
        )

    model = ["--model", str(models_and_data / "policy")]
    data = ["--data", str(models_and_data / "pairs.jsonl")]
    short = ["--max-prompts", "2", "--out", str(tmp_path)]
    done = run(*model, *data, *short)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"report: {tmp_path}/report.html")
    failed = run(*model, "--data", str(tmp_path / "none.jsonl"), *short)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith(
        "error:"
    )


def test_tokens_are_texts_that_join_to_the_response():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast.encode("a é\nb", add_special_tokens=False)
    found = command.token_texts(fast, ids)
    assert len(ids) == len(found) == 6
    # The first byte of é has no text of its own; the letter stands at the second.
    assert [*found[:2], *found[3:]] == ["a", " ", "é", "\n", "b"]


def test_a_tokenizer_that_drops_leading_spaces_shows_them():
    vocab = {"\u2581the": 0, "\u2581cat": 1, "s": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert command.token_texts(fast, [0, 1, 2, 1]) == ["the", " cat", "s", " cat"]
