"""The two ways of a benchmark do the same work, and its lines say what was measured."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

import loop_variants
import loss_variants
import step_variants
import torch_generate
from pref_jax import losses
from pref_jax.models import flops
from scripts import benchmark

SMALL = benchmark.Config(
    vocab_size=50, width=32, num_layers=1, groups_per_step=3, num_batches=2
)


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch):
    lengths = [(5, (4, 7)), (9, (2, 3)), (3, (6, 1)), (8, (1, 2)), (4, (9, 9))]
    monkeypatch.setattr(
        benchmark, "_pair_lengths", lambda config: [*lengths, (6, (2, 2))]
    )


@pytest.mark.slow  # two steps of the size of a measurement
@pytest.mark.parametrize("case", ["dpo_pairs", "dpo_lists"])
def test_a_step_on_rows_is_the_step_on_the_padded_layout(case):
    rows, padded = benchmark.CASES[case](SMALL)
    assert rows.count == padded.count
    for on_rows, on_pairs in zip(rows.arguments, padded.arguments, strict=True):
        state, outputs = jax.jit(rows.function)(*on_rows)
        params, loss = jax.jit(padded.function)(*on_pairs)
        np.testing.assert_allclose(outputs["metrics"]["loss"], loss, rtol=1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
            state.params,
            params,
        )


def test_rows_are_full_while_one_size_grows():
    for name, cases in step_variants.growth_cases().items():
        works = list(cases.values())
        sizes = []
        for work in works:
            assert len(work.batches) == 1
            batch = work.batches[0]
            num_rows, row_length = batch.tokens.shape
            assert row_length == step_variants._ROW
            assert num_rows * row_length - sum(g.num_tokens for g in work.groups) < 32
            sizes.append((num_rows, batch.start.shape, work.sizes))
        assert len(set(sizes)) == len(sizes), name


@pytest.mark.slow
def test_the_share_of_the_peak_is_that_of_useful_flops(monkeypatch):
    small = benchmark._sizes(SMALL)
    monkeypatch.setattr(step_variants, "DEEP", small)
    monkeypatch.setattr(step_variants, "SMALL", small)
    monkeypatch.setattr(step_variants, "matmul_peak", lambda: 1e9)
    line = step_variants.share_of_peak(calls=20, dtype="float32", groups_per_step=1)
    assert line["peak_flops_per_second"] == 1e9
    for way in line["variants"].values():
        expected = way["useful_flops"] / way["median_seconds"] / 1e9
        assert way["share_of_peak"] == pytest.approx(expected, rel=0.01, abs=1e-3)
        assert way["useful_flops"] == 3 * flops.forward_flops(
            small, [(256, (128,) * 2)]
        )
        shares = {(p["part"], p["kind"]): p["share"] for p in way["profile"]}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-2)
        found = {part for part, _ in shares}
        assert {"unembedding", "attention over keys", "MLP and norm"} <= found
        products = sum(
            share for (_, kind), share in shares.items() if kind == "products"
        )
        assert 0.05 < products < 1


@pytest.mark.slow
def test_the_loop_takes_the_steps_that_are_timed_alone():
    sizes = dataclasses.replace(benchmark._sizes(SMALL), vocab_size=150)
    line = loop_variants.measure(calls=20, dtype="float32", sizes=sizes)
    assert line["calls"] == 30
    assert list(line["variants"]) == ["steps alone", "fit"]
    assert len(line["time_ratios"]) == 5
    rates = [way["steps_rate"] for way in line["variants"].values()]
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("name", ["scoring", "attention"])
def test_both_ways_have_one_value_and_gradient(name):
    values = [
        jax.jit(variant.function)(*variant.arguments[0])
        for variant in benchmark.CASES[name](SMALL)
    ]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *values
    )


def test_a_line_says_what_was_measured(tmp_path, monkeypatch, capsys):
    arguments = ["--cases", "dpo_pairs", "--write", str(tmp_path)]
    for name in ("vocab_size", "width", "num_layers", "groups_per_step", "num_batches"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(SMALL, name))]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    line = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmark_dpo_pairs.json").read_text()) == line
    rows, padded = line["variants"].values()
    assert list(line["variants"]) == ["rows", "padded"]
    assert line["ratio_is"] == "padded / rows"
    for result in (rows, padded):
        low, high = result["iqr_seconds"]
        assert 0 < low <= result["median_seconds"] <= high
        assert result["temp_bytes"] > 0
        # 3 pairs a call, of 16 + 14 + 10 and of 11 + 22 + 10 tokens in turn.
        assert result["real_tokens_rate"] / result["pairs_rate"] == pytest.approx(
            (40 + 43) / 6, rel=1e-3
        )
    ratio = padded["median_seconds"] / rows["median_seconds"]
    assert line["time_ratio"] == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cases": ("scoring", "speed")}, "`cases` may name scoring, .*; got speed"),
        ({"calls": 3}, "`calls` must be at least 20"),
        ({"pairs": "x.jsonl"}, "`pairs` and `tokenizer` belong together"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize("case", ["growth", "peak"])
def test_a_case_with_sizes_of_its_own_takes_no_others(case):
    with pytest.raises(ValueError, match=f"case {case} .* leave out `vocab_size`"):
        benchmark.CASES[case](SMALL)


def test_the_input_case_makes_the_batch_that_its_step_takes():
    batch, step = benchmark.input_pipeline(SMALL)
    for numbered, (_, placed) in zip(batch.arguments, step.arguments, strict=True):
        made = batch.function(*numbered)
        jax.tree.map(np.testing.assert_array_equal, made, jax.device_get(placed))
        assert made.extras["anchor_logps"][made.loss_mask].max() < 0


def test_tokenising_many_records_gives_what_one_by_one_gives():
    many, one_by_one = benchmark.tokenise(SMALL)
    assert many.function() == one_by_one.function() == many.count[0]["pairs"]


def test_every_loss_is_measured():
    arrays = {name: case.array.shape for name, case in loss_variants.cases(0).items()}
    names = {name for name in losses.__all__ if name.endswith("_loss")}
    # Its arrays are pictures.
    assert set(arrays) == (names | {"listwise_cross_entropy"}) - {"dspo_loss"}
    assert set(arrays.values()) == {(4096, 2), (512, 32)}


def test_a_loss_is_measured_with_its_metrics_and_gradient():
    case = loss_variants.cases(0)["logistic_loss"]
    (loss, metrics), gradient = loss_variants.value_and_gradient(case)(case.array)
    expected, _ = case.call(case.array)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    assert "rewards/margin" in metrics
    assert gradient.shape == case.array.shape and np.asarray(gradient).any()


def test_a_case_of_many_parts_has_a_line_for_each(monkeypatch):
    cases = {name: loss_variants.cases(0)[name] for name in ("dpo_loss", "sdpo_loss")}
    monkeypatch.setattr(loss_variants, "cases", lambda seed: cases)
    monkeypatch.setattr(loss_variants, "trl_losses", lambda: None)
    line = benchmark.measure_case("losses", SMALL)
    assert [part["name"] for part in line["parts"]] == ["dpo_loss", "sdpo_loss"]
    for part in line["parts"]:
        assert part["variants"]["pref_jax"]["median_seconds"] > 0
        assert "time_ratio" not in part
    assert line["environment"]["versions"]["jax"] == jax.__version__


def test_without_torch_the_sampler_is_measured_alone(monkeypatch):
    monkeypatch.setattr(torch_generate.importlib.util, "find_spec", lambda name: None)
    (ours,) = benchmark.generate(SMALL)
    assert ours.name == "pref_jax" and ours.count == [{"tokens": 32 * 4 * 64}]


def test_the_import_is_that_of_a_fresh_process():
    ours, alone = benchmark.CASES["import"](SMALL)
    assert ours.host and alone.host
    with pytest.raises(subprocess.CalledProcessError):
        ours.function("import sys; assert 'jax' in sys.modules")
