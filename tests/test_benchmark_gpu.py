"""The benchmark for one GPU, on a machine that may have none."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import measured_tables
from pref_jax.models import published
from scripts import benchmark_gpu

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
SMOKE = dataclasses.replace(benchmark_gpu.Config(), smoke=True, **benchmark_gpu.SMOKE)
NOT_RUN = {"name": "gpu_dpo", "status": "not run"}

# A Python for which everything works but what the environment makes fail.
PYTHON = """
echo "$*" >>"$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *torch==*) exit ${TORCH:-0} ;;
  *is_available*) exit ${GPU:-0} ;;
esac
"""


def run_script(folder, *arguments, nvidia_smi=0, **variables):
    """benchmark_gpu.sh of a copy of the scripts: (exit code, output, lines logged)."""
    root, programs, log = folder / "a clone", folder / "bin", folder / "log"
    if not root.exists():
        shutil.copytree(ROOT / "scripts", root / "scripts")
        shutil.copy(ROOT / "setup.py", root)
        programs.mkdir()
    texts = {"nvidia-smi": f"exit {nvidia_smi}", "python3.12": PYTHON}
    for name, text in texts.items():
        (programs / name).write_text(f"#!{BASH}\n{text}\n")
        (programs / name).chmod(0o755)
    log.write_text("")
    process = subprocess.run(
        [BASH, str(root / "scripts/benchmark_gpu.sh"), *arguments],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python3.12"),
            "LOG": str(log),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stdout, log.read_text().splitlines()


def test_without_a_gpu_the_script_says_so_and_installs_nothing(tmp_path):
    status, output, logged = run_script(tmp_path, nvidia_smi=1)
    assert status == 0
    reason = {"reason": "nvidia-smi finds no NVIDIA GPU"}
    assert json.loads(output) == NOT_RUN | reason
    assert logged == []
    assert sorted(path.name for path in (tmp_path / "a clone").iterdir()) == [
        *("scripts", "setup.py")
    ]


def test_with_a_gpu_both_environments_are_made_once(tmp_path):
    torch = tmp_path / "a clone/.venv_torch"
    for first in (True, False):
        status, _, logged = run_script(tmp_path, "--calls", "5")
        assert status == 0
        assert logged[-1].endswith(
            f"scripts/benchmark_gpu.py --torch-python={torch}/bin/python --calls 5"
        )
        installs = [line for line in logged if "pip install" in line]
        assert len(installs) == (2 if first else 0)
        if first:
            assert installs[0].endswith("-e .[cuda]")
            assert installs[1].endswith("torch==2.13.0 trl==1.16.0")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ({"TORCH": "1"}, "pip could not install torch and TRL"),
        ({"GPU": "1"}, "the torch that pip installed sees no GPU"),
    ],
)
def test_without_torch_ours_is_run_and_the_reason_is_handed_on(tmp_path, fails, reason):
    status, _, logged = run_script(tmp_path, **fails)
    assert status == 0
    assert logged[-1].endswith(f"scripts/benchmark_gpu.py --torch-missing={reason}")
    assert not (tmp_path / "a clone/.venv_torch/installed").exists()
    _, _, logged = run_script(tmp_path)  # another time it may work
    assert "--torch-python=" in logged[-1]


def test_the_smoke_run_needs_no_gpu_and_no_torch(tmp_path):
    status, _, logged = run_script(tmp_path, "--smoke", nvidia_smi=1)
    assert status == 0
    assert logged[-1].endswith("--torch-missing=not part of the smoke run --smoke")
    assert not any("torch==" in line for line in logged)


def test_where_jax_sees_no_gpu_the_line_says_so_and_no_record_is_kept(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark_gpu, "has_gpu", lambda: False)
    arguments = ["--way", "pref_jax", "--write", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmark_gpu.py", *arguments])
    benchmark_gpu.main()
    reason = {"reason": "jax sees no NVIDIA GPU; it has cpu"}
    assert json.loads(capsys.readouterr().out) == NOT_RUN | reason
    assert list(tmp_path.iterdir()) == []


def test_ours_that_was_not_run_is_the_whole_line(monkeypatch):
    said = NOT_RUN | {"reason": "no GPU"}
    monkeypatch.setattr(benchmark_gpu, "_child", lambda command: (said, ""))
    monkeypatch.setattr(benchmark_gpu, "run_trl", None)  # would fail
    assert benchmark_gpu.run_both(benchmark_gpu.Config()) == said
    monkeypatch.setattr(benchmark_gpu, "_child", lambda command: (None, "out of it"))
    line = benchmark_gpu.run_both(benchmark_gpu.Config())
    assert line == NOT_RUN | {"reason": "out of it"}


def test_a_child_that_fails_or_hangs_is_a_reason(monkeypatch):
    failing = [sys.executable, "-c", "raise ValueError('the last line')"]
    found, why = benchmark_gpu._child(failing)
    assert (found, why) == (None, "exit code 1: ValueError: the last line")
    monkeypatch.setattr(benchmark_gpu, "LIMIT_SECONDS", 0.2)
    found, why = benchmark_gpu._child(
        [sys.executable, "-c", "import time; time.sleep(9)"]
    )
    assert found is None and "timed out after 0.2 seconds" in why
    assert benchmark_gpu._child(["/nowhere/python"])[0] is None


def test_useful_flops_are_those_of_the_formula():
    """By hand: the shape of Llama 3.2 1B has 973 million parameters in its layers."""
    sizes = published.LLAMA_3_2_1B
    attention = 2048 * (32 + 8 + 8) * 64 + 32 * 64 * 2048
    layer = attention + 3 * 2048 * 8192 + 2 * 2048
    layers = 16 * layer + 2048
    assert layers == 973_146_112
    prompt, responses = 3, (2, 4)
    # Three of the prompt see 1, 2, 3; those of a branch 4, 5 and 4, 5, 6, 7.
    seen = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)
    needed = 2 * layers * (3 + 2 + 4) + 2 * 128256 * 2048 * (2 + 4)
    needed += 4 * 16 * 32 * 64 * seen
    found = benchmark_gpu.useful_flops(sizes, [(prompt, responses)])
    assert found == pytest.approx(3 * needed, rel=1e-12)
    two = benchmark_gpu.useful_flops(sizes, 2 * [(prompt, responses)])
    assert two == pytest.approx(2 * found, rel=1e-12)


def test_rates_are_sums_over_sums_and_mfu_needs_a_known_gpu():
    sizes, lengths = benchmark_gpu.TINY, [(5, (2, 3)), (4, (1, 1))]
    line = benchmark_gpu.summarise(sizes, lengths, [0.5, 1.5], "NVIDIA H200")
    assert line["median_seconds"] == 1.0
    assert line["iqr_seconds"] == [0.75, 1.25]
    assert line["pairs_rate"] == 1.0
    assert line["real_tokens_rate"] == 8.0
    flops = benchmark_gpu.useful_flops(sizes, lengths)
    assert line["useful_teraflops_rate"] == pytest.approx(flops / 2e12, abs=1e-6)
    large = benchmark_gpu.summarise(
        published.LLAMA_3_2_1B, [(4000, (20, 20))], [0.1], "NVIDIA H200"
    )
    flops = benchmark_gpu.useful_flops(published.LLAMA_3_2_1B, [(4000, (20, 20))])
    assert large["mfu"] == pytest.approx(flops / 0.1 / 989.5e12, abs=1e-4)
    assert benchmark_gpu.summarise(sizes, lengths, [1.0], "cpu")["mfu"] is None


def test_every_drawn_pair_fits_a_row():
    config = benchmark_gpu.Config()
    lengths = benchmark_gpu.draw_lengths(config)
    assert len(lengths) == 12 * 48
    for prompt, responses in lengths:
        assert 1 < prompt and 1 < min(responses)
        assert prompt + sum(responses) + 1 <= config.row_length


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"way": "TRL"}, "`way` must be both or"), ({"calls": 0}, "`calls` must be at")],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark_gpu.Config(**fields)


def record():
    rates = {"pairs_rate": 20.5, "real_tokens_rate": 24001.4, "device_kind": "NVIDIA X"}
    times = {"median_seconds": 2.0, "iqr_seconds": [1.9, 2.25]}
    return {
        "pairs_per_step": 48,
        "environment": {"versions": {"jax": "0.10.2"}, "commit": "0123456789abcdef"},
        "variants": {
            "pref_jax": {"shape": "a", "mfu": 0.4567, "peak_bytes": 34e9}
            | rates
            | times,
            "TRL": {"shape": "b", "mfu": None, "peak_bytes": None}
            | {"versions": {"trl": "1.16.0", "torch": "2.13.0"}}
            | rates
            | times,
        },
    }


def test_the_table_is_made_of_the_record():
    assert measured_tables.gpu_benchmark({}) == "not run\n"
    line = record()
    text = measured_tables.gpu_benchmark({"benchmark_gpu": line})
    assert "| pref_jax | a | 2.00 [1.90, 2.25] | 20.5 | 24001 | 45.7 % | 34.0 |" in text
    assert "| TRL | b | 2.00 [1.90, 2.25] | 20.5 | 24001 | - | - |" in text
    assert "48 pairs a step on NVIDIA X, jax 0.10.2; TRL 1.16.0 with torch" in text
    line["variants"]["TRL"] = {"status": "not run", "reason": "no torch"}
    text = measured_tables.gpu_benchmark({"benchmark_gpu": line})
    assert "| TRL | not run: no torch | - | - | - | - | - |" in text
    assert "commit 0123456789ab." in text
    # The table of all cases is of another kind of record.
    assert measured_tables.benchmarks({"benchmark_gpu": line}) == "not run\n"


@pytest.mark.slow  # jax starts and compiles; with torch, TRL trains
def test_the_whole_path_runs_on_a_tiny_shape(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/benchmark_gpu.py"), "--smoke"]
    there = importlib.util.find_spec("trl") is not None
    if there:
        command += ["--torch-python", sys.executable]
    process = subprocess.run(
        [*command, "--write", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "benchmark_gpu.json").read_text()) == line
    assert line["status"] == "smoke"
    ours, trl = line["variants"]["pref_jax"], line["variants"]["TRL"]
    lengths = benchmark_gpu.draw_lengths(SMOKE)[2 * 4 :]
    tokens = sum(prompt + sum(responses) for prompt, responses in lengths)
    ways = [ours, trl] if there else [ours]
    for way in ways:
        per_pair = way["real_tokens_rate"] / way["pairs_rate"]
        assert per_pair == pytest.approx(tokens / len(lengths), rel=1e-2)
        assert way["mfu"] is None  # a CPU has no published peak
        assert way["median_seconds"] > 0
    assert re.fullmatch(r"\d+ x \[2, 128\], \d+% filled, remat full", ours["shape"])
    if there:
        ratio = ours["pairs_rate"] / trl["pairs_rate"]
        assert line["time_ratio"] == pytest.approx(ratio, rel=1e-2)
        assert trl["versions"]["trl"]
    else:
        assert trl == {
            "status": "not run",
            "reason": "no Python with torch was given",
        }
    assert measured_tables.gpu_benchmark({"benchmark_gpu": line}).count("\n") == 6
