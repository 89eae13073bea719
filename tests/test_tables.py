"""scripts/tables.py: every figure of README and docs is that of the records."""

import json

import pytest

import experiment_tables
import measured_tables
import table_parts
import tables


def quickstart_record(seed, right):
    models = {
        name: {"right": [value, value - 0.1, value + 0.1], "kl": [0.1, 0.0, 0.2]}
        for name, value in (("SFT", 0.4), ("DPO", 0.4 + right), ("control", 0.4))
    }
    difference = {
        "right": [right, right - 0.1, right + 0.1],
        "reward": [right, right, right],
    }
    return {
        "experiment": "quickstart",
        "results": {
            "models": models,
            "differences": {"SFT": difference, "control": difference},
        },
        "config": {"seed": seed},
        "environment": {
            "commit": "abcdef0123456789",
            "versions": {"jax": "0.10.2"},
            "device": "1 x cpu",
        },
        "seconds": 300.0,
        "report": {"large": "part"},
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs/records").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "before\n<!-- table: quickstart-differences -->\nold\n<!-- end of table -->\n"
    )
    return tmp_path


def test_tables_of_the_repository_are_up_to_date():
    assert tables.main(["--check"]) == 0


def test_a_stale_table_fails_the_check_and_is_rewritten(root, capsys):
    assert tables.main(["--check"], root) == 1
    assert "README.md" in capsys.readouterr().out
    assert tables.main([], root) == 0
    assert tables.main(["--check"], root) == 0
    assert "not run" in (root / "README.md").read_text()


def test_a_kept_run_stands_in_the_table_without_its_report(root, tmp_path):
    for seed, right in ((0, 0.2), (1, 0.05)):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        (run / "record.json").write_text(json.dumps(quickstart_record(seed, right)))
        tables.main(["--add", str(run), "--name", f"quickstart_seed{seed}"], root)
    text = (root / "README.md").read_text()
    assert "| 0 | 0.400 | 0.400 | 0.600 | 0.200 [0.100, 0.300] |" in text
    assert "excluding zero, in 1 of 2 seeds" in text
    kept = json.loads((root / "docs/records/quickstart_seed0.json").read_text())
    assert "report" not in kept


def sweep_of(folder, *statuses):
    """A sweep over two rates and two seeds, and the record of each run."""
    rows = []
    for i, status in enumerate(statuses):
        name = f"rate={i // 2},seed={i % 2}"
        (folder / name).mkdir()
        record = quickstart_record(i, 0.1) | {"config": {"model": "/a/b/base"}}
        (folder / name / "record.json").write_text(json.dumps(record))
        row = {"sft.rate": str(i // 2), "seed": str(i % 2), "status": status}
        row["run"] = name
        metrics = {"results.loss": 1.0 + i, "results.accuracy": [0.5 + 0.1 * i, 0, 1]}
        rows.append(row | {"seconds": 60.0} | metrics)
    (folder / "sweep.json").write_text(json.dumps(rows))


def test_a_sweep_is_kept_as_one_record_and_averaged_over_its_seeds(root, tmp_path):
    (tmp_path / "runs").mkdir()
    sweep_of(tmp_path / "runs", *["finished"] * 4)
    tables.main(["--add", str(tmp_path / "runs"), "--name", "rates"], root)
    kept = json.loads((root / "docs/records/rates.json").read_text())
    assert kept["seconds"] == 240 and kept["config"] == {"model": "base"}
    assert kept["results"]["fields"] == ["sft.rate", "seed"]
    titles = {"results.loss": "loss", "results.accuracy": "accuracy"}
    text = experiment_tables.sweep_means(kept, "seed", titles)
    assert "| rate | seeds | loss | accuracy |" in text
    # Of two values t(1) at 97.5 % is 12.706, times half their difference.
    assert "| 0 | 2 | 1.500 [-4.853, 7.853] | 0.550 [-0.085, 1.185] |" in text
    assert "| 1 | 2 | 3.500 [-2.853, 9.853] |" in text
    assert "| 1 less 0 | 2 | 2.000 [2.000, 2.000] | 0.200 [0.200, 0.200] |" in text


def test_a_sweep_without_what_its_table_shows_is_refused_and_nothing_changes(
    root, tmp_path
):
    (tmp_path / "runs").mkdir()
    sweep_of(tmp_path / "runs", *["finished"] * 4)
    page = root / "README.md"
    page.write_text("<!-- table: sft-bridge-text -->\n<!-- end of table -->\n")
    with pytest.raises(
        ValueError, match=r"over seed, with --metrics results\.SFT\.loss"
    ):
        tables.main(
            ["--add", str(tmp_path / "runs"), "--name", "sft_bridge_text"], root
        )
    assert list((root / "docs/records").iterdir()) == []
    assert tables.main([], root) == 0 and "not run" in page.read_text()


def change_commit(path, commit="f" * 16):
    record = json.loads(path.read_text())
    record["environment"]["commit"] = commit
    path.write_text(json.dumps(record))


def test_runs_of_several_commits_are_no_record(root, tmp_path):
    (tmp_path / "runs").mkdir()
    sweep_of(tmp_path / "runs", *["finished"] * 4)
    stray = tmp_path / "runs" / "a=1"  # of an earlier grid, in no row
    stray.mkdir()
    first = tmp_path / "runs" / "rate=0,seed=0"
    (stray / "record.json").write_text((first / "record.json").read_text())
    change_commit(stray / "record.json")
    add = ["--add", str(tmp_path / "runs"), "--name", "rates"]
    assert tables.main(add, root) == 0
    (first / "config.json").write_text(
        json.dumps({"environments": [{"commit": "0" * 16}]})
    )
    with pytest.raises(
        ValueError, match="seed=0 was computed at several commits, 0000"
    ):
        tables.main(add, root)
    (first / "config.json").unlink()
    change_commit(tmp_path / "runs" / "rate=1,seed=1" / "record.json")
    with pytest.raises(ValueError, match="runs was computed at several commits, abcd"):
        tables.main(add, root)


def test_a_sweep_that_is_not_finished_is_refused(root, tmp_path):
    (tmp_path / "runs").mkdir()
    sweep_of(tmp_path / "runs", "finished", "failed")
    with pytest.raises(ValueError, match="1 of 2 runs are not finished"):
        tables.main(["--add", str(tmp_path / "runs"), "--name", "rates"], root)


def test_what_rounds_to_zero_has_no_sign():
    assert table_parts.interval([-1e-9, -0.25, 0.5], 2) == "0.00 [-0.25, 0.50]"


def bridge():
    """A record of the bridge without the part on V."""
    arm = {
        "arm": "decay",
        "at_ends": ["lowest beta"],
        "setting": {"knob": 10.0, "dpo_beta": 0.01, "dpo_rate": 4e-4},
    }
    plain = {"arm": "whole", "setting": arm["setting"] | {"knob": None}, "at_ends": []}
    judged = {"verdict": "holds", "effect": [0.2, 0.1, 0.3], "unit": "reward"}
    judged |= {"needed": "above zero", "note": ""}
    return {
        "results": {
            "stages": {"rate": 6e-4, "arms": [plain, arm]},
            "verdicts": [
                judged | {"claim": "A smaller rate is better."},
                judged | {"claim": "V of the SFT model knows."},
            ],
        },
        "config": {
            "stages": {
                **{"num_seeds": 5, "dpo_betas": [0.01, 0.1], "dpo_rates": [2e-4]},
                "joint_rates": [0.5],
            }
        },
        "environment": {"commit": "abcdef0123456789", "device": "1 x cpu"},
        "seconds": 600.0,
    }


def test_the_bridge_tells_verdicts_choices_and_what_was_not_run():
    records = {"sft_bridge": bridge()}
    claims = experiment_tables.bridge_claims(records)
    assert "| A smaller rate is better. | **holds** | 0.200 [0.100, 0.300] |" in claims
    assert "V of the SFT model" not in claims
    assert "5 paired seeds; the whole rate is 0.0006" in claims
    choices = experiment_tables.bridge_choices(records)
    assert choices.splitlines()[2:4] == [
        "| whole | - | 0.01 | 0.0004 |  |",
        "| decay | 10 | 0.01 | 0.0004 | lowest beta |",
    ]
    tried = "Tried: beta 0.01, 0.1; learning rates 0.0002, of joint training 0.0003."
    assert tried in choices
    assert experiment_tables.bridge_values(records) == "not run\n"
    assert experiment_tables.bridge_choices({}) == "not run\n"


def test_an_unfinished_run_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="finish the run first"):
        tables.main(["--add", str(tmp_path), "--name", "x"], root)


def test_an_unknown_table_is_named():
    page = "<!-- table: nonsense -->\n<!-- end of table -->"
    with pytest.raises(ValueError, match="page.md: table 'nonsense'"):
        tables.rewrite(page, {}, "page.md")


def test_a_case_of_one_way_says_that_the_other_was_not_run():
    way = {"shape": "[8]", "tokens_rate": 12.4}
    record = {
        "name": "generate",
        "variants": {"ours": way},
        "environment": {"device": "1 x cpu"},
    }
    table = measured_tables.benchmarks({"benchmark_generate": record})
    assert "| generate | ours ([8]) | not run | - | - | 12 tokens/s | 1 x" in table
    record["variants"]["torch"] = {"shape": "[9]"}
    both = record | {"time_ratio": 3.456, "temp_bytes_ratio": None}
    table = measured_tables.benchmarks({"benchmark_generate": both})
    assert "| ours ([8]) | torch ([9]) | 3.46 | - | 12 tokens/s |" in table


def test_the_table_of_data_sets_accounts_for_every_row():
    source = {
        **{"source": "pairs/train", "responses": 2, "rows": 10, "used": 7},
        **{"left_out": {"longer than a row": 3}, "duplicates": 1, "fill": 0.914},
    }
    survey = {"row_length": 512, "sources": [source, source | {"left_out": {}}]}
    lines = measured_tables.data_sets({"data_sets": survey}).splitlines()
    assert lines[0].endswith("| repeated rows | rows of 512 filled |")
    assert lines[2] == "| pairs/train | 2 | 10 | 7 | longer than a row: 3 | 1 | 91 % |"
    assert lines[3] == "| pairs/train | 2 | 10 | 7 | - | 1 | 91 % |"
    assert measured_tables.data_sets({}) == "not run\n"


def test_mutants_are_counted_by_file_and_survivors_have_a_reason():
    place = {"file": "a.py", "function": "f", "line": "return x | y", "mutation": "m"}
    counts = {"mutants": 12, "caught": 9, "equivalent": 2, "gaps": 1}
    record = {
        "files": {
            "a.py": counts | {"commit": "abcdef0123456789"},
            "b.py": dict.fromkeys(counts, 0),
        },
        "survivors": [
            place | {"change": "x | y -> x & y", "reason": "x or y is 0"},
            place | {"change": "x -> y", "reason": None},
        ],
        **{"stale": [place], "confirmed": 5, "seconds_per_mutant": 0.52},
        "environment": {"device": "1 x cpu", "commit": "abcdef0123456789"},
    }
    lines = measured_tables.mutants({"mutants": record}).splitlines()
    assert lines[2:5] == [
        "| `a.py` | 12 | 9 | 2 | 1 | 90.0 % | abcdef012345 |",
        "| `b.py` | 0 | 0 | 0 | 0 | - |  |",
        "| all | 12 | 9 | 2 | 1 | 90.0 % |  |",
    ]
    assert "0.5 s a mutant on 1 x cpu." in lines[6]
    assert "confirmed 5 that were drawn" in lines[6]
    assert lines[6].endswith("Equivalents that are no more: 1.")
    lines = measured_tables.surviving_mutants({"mutants": record}).splitlines()
    assert lines[2:] == [
        r"| `a.py` | `f` | `return x \| y` | `x \| y -> x & y` | x or y is 0 |",
        r"| `a.py` | `f` | `return x \| y` | `x -> y` | **gap** |",
    ]
    for table in (measured_tables.mutants, measured_tables.surviving_mutants):
        assert table({}) == "not run\n"
    record["survivors"] = []
    assert measured_tables.surviving_mutants({"mutants": record}) == "none\n"


def test_programs_for_tpus_are_estimates_and_say_what_does_not_fit():
    program = {
        **{"name": "step", "fits": True, "memory": {"total": 10 * 2**30}},
        **{"flops": 4e15, "useful_flops": 3e15},
        "sent": [{"bytes": 2e9}, {"bytes": 1e9}],
        "seconds": {"with_overlap": 0.5, "without_overlap": 0.75, "limit": "compute"},
        "mfu": {"with_overlap": 0.6, "without_overlap": 0.4},
    }
    record = {
        **{"experiment": "finetune", "preset": "8b", "topology": "v5e:4x4"},
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "chip": {"hbm_bytes": 15.75 * 2**30},
        "programs": [program, program | {"name": "loss", "fits": False}],
    }
    lines = measured_tables.tpu({"tpu_8b_v5e_4x4": record, "mutants": {}}).splitlines()
    assert lines[2] == (
        "| finetune 8b, step | v5e:4x4 (1 data x 16 fsdp x 1 tensor) | 10.0 of 15.8 | "
        "1.33 | 3 | 0.5 to 0.75 | 40 to 60 % | compute |"
    )
    assert "| finetune 8b, loss |" in lines[3]
    assert "10.0 of 15.8, **does not fit** |" in lines[3]
    assert lines[-1] == "Seconds and MFU: estimate, not run."
    assert measured_tables.tpu({"mutants": {}}) == "not run\n"


ENVIRONMENT = {
    "commit": "abcdef0123456789",
    "versions": {"jax": "0.10.2"},
    "device": "1 x cpu",
}


def test_growth_is_the_time_of_a_token_over_that_of_the_smallest_size():
    def way(rate, temp_bytes):
        return {"shape": "[1, 8]", "real_tokens_rate": rate, "temp_bytes": temp_bytes}

    part = {"name": "layers", "variants": {"2": way(2e3, 5e6), "4": way(1e3, 9e6)}}
    records = {"benchmark_growth": {"parts": [part], "environment": ENVIRONMENT}}
    text = measured_tables.growth(records)
    assert "| layers | 2 | [1, 8] | 500 | 1.00 | 5 |" in text
    assert "| layers | 4 | [1, 8] | 1000 | 2.00 | 9 |" in text
    assert "On 1 x cpu, jax 0.10.2; commit abcdef012345." in text
    assert measured_tables.growth({}) == "not run\n"


def test_the_share_of_the_peak_stands_with_its_peak_and_formula():
    way = {"shape": "[1, 8]", "median_seconds": 2.0, "useful_flops": 3e11}
    record = {
        "variants": {"small": way | {"share_of_peak": 0.5}},
        "peak_flops_per_second": 3e11,
        "formula": "passes * N",
        "environment": ENVIRONMENT,
    }
    text = measured_tables.share_of_peak({"benchmark_peak": record})
    assert "| small | [1, 8] | 2.00 | 300 | 50 % |" in text
    assert "The peak is 300 Gflop/s. Useful flops: `passes * N`." in text
    assert measured_tables.share_of_peak({}) == "not run\n"


def test_of_a_step_the_parts_that_take_most_are_listed():
    parts = [
        {"part": f"part {i}", "kind": "products", "share": (20 - i) / 100}
        for i in range(9)
    ]
    record = {"variants": {"small": {"profile": parts}}, "environment": ENVIRONMENT}
    text = measured_tables.step_profile({"benchmark_peak": record})
    assert "| small | part 0 | products | 20 % |" in text
    assert "part 5" in text and "part 6" not in text
    assert measured_tables.step_profile({}) == "not run\n"
