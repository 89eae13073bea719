"""No number of a run is lost, rounded or left over from a life that was undone."""

import json
import logging
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pref_jax.train import logging as run_logging
from pref_jax.train.logging import (
    MetricsLog,
    Progress,
    Rates,
    Throughput,
    configure_logging,
    peak_flops,
)

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def library_logger():
    """Puts the library's logger and console back."""
    logger = logging.getLogger("pref_jax")
    before = logger.handlers[:], logger.level, logger.propagate
    run_logging._console.cache_clear()
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    run_logging._console.cache_clear()


def refuse_constant(name):
    raise AssertionError(f"{name} is not strict JSON")


def read_events(folder):
    """(tag or None, step, value) of every TensorBoard event, and the purge steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    scalars, purges = [], []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # a record: u64 length, u32 checksum, bytes, u32 checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [
                (v.tag, event.step, v.simple_value) for v in event.summary.value
            ]
            if event.session_log.status == SessionLog.START:
                purges.append(event.step)
    return scalars, purges


def test_lines_are_exact(tmp_path):
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write(
            np.int64(7),
            {
                "loss": np.float32(0.1),
                "rewards/margin": jnp.float32(-2.5),
                "count": 3,
                "a": float("nan"),
                "b": jnp.inf,
                "c": np.float32("-inf"),
                "tiny": 1e-45,
            },
            {"step": 0.1},
        )
        log.write(8, {})
    # 0.1 in float32 is 13421773 / 2**27, and this is its shortest exact decimal.
    assert 13421773 / 2**27 == 0.10000000149011612
    assert (tmp_path / "new" / "run" / "metrics.jsonl").read_bytes() == (
        b'{"step": 7, "loss": 0.10000000149011612, "rewards/margin": -2.5, '
        b'"count": 3.0, "a": "NaN", "b": "Infinity", "c": "-Infinity", '
        b'"tiny": 1e-45, "time/step": 0.1}\n'
        b'{"step": 8}\n'
    )


def test_lines_are_strict_json_and_numbers_read_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    values = np.append(bits.view(np.float32), np.float32([np.nan, np.inf, -np.inf]))
    with MetricsLog(tmp_path) as log:
        for step, value in enumerate(values):
            log.write(step, {"x": value})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse_constant)["x"] for line in lines]
    np.testing.assert_array_equal(np.float32([float(x) for x in read]), values)


def test_tensorboard_has_the_same_names(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"rewards/margin": 0.5, "loss": np.inf}, {"step": 0.25})
    scalars, purges = read_events(tmp_path / "tensorboard")
    assert scalars == [
        ("rewards/margin", 1, 0.5),
        ("loss", 1, float("inf")),
        ("time/step", 1, 0.25),
    ]
    assert purges == []


KEPT = b'{"step": 1,   "loss": 1e0}\n{"step": 2}\r\n{"loss": 2, "step": 2}\n'


@pytest.mark.parametrize(
    "undone",
    [
        b"",
        b'{"step": 3, "loss": 3.0}\n{"step": 10}\n',
        b'{"step": 3, "loss": 3.0}\n{"step": 4, "lo',
        b'{"step": 2, "half": 1.0',
        b'{"step": 2, "half": 1.0}',
    ],
)
def test_resume_removes_what_was_undone_and_keeps_the_rest(
    tmp_path, undone, caplog, library_logger
):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(KEPT + undone)
    library_logger.propagate = True
    with (
        caplog.at_level("INFO", "pref_jax"),
        MetricsLog(tmp_path, resume_step=2) as log,
    ):
        assert path.read_bytes() == KEPT
        log.write(3, {"loss": 4.0})
    assert path.read_bytes() == KEPT + b'{"step": 3, "loss": 4.0}\n'
    assert [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"]
    removed = len(undone.splitlines())
    messages = [f"removed {removed} of {3 + removed} lines"] if removed else []
    assert [
        re.search("removed .* lines", m).group() for m in caplog.messages
    ] == messages
    assert read_events(tmp_path / "tensorboard")[1] == [3]


def test_lines_need_not_be_in_the_order_of_their_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 5}\n{"step": 2}\n{"step": 4}\n')
    MetricsLog(tmp_path, resume_step=4).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_resume_before_the_first_line(tmp_path):
    with MetricsLog(tmp_path, resume_step=0) as log:
        log.write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"step": 1, "l\n', b"\n", b'{"step": "1"}\n']
)
def test_a_line_that_is_not_ours_is_named_and_nothing_is_touched(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(KEPT + line + b'{"step": 9}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 4: needs a JSON object"):
        MetricsLog(tmp_path, resume_step=2)
    assert path.read_bytes() == KEPT + line + b'{"step": 9}\n'


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with pytest.raises(
        FileExistsError, match="already holds metrics. Give `resume_step`"
    ):
        MetricsLog(tmp_path)


def test_two_numbers_of_one_name_are_refused(tmp_path):
    with MetricsLog(tmp_path) as log:
        for metrics in ({"step": 1.0}, {"time/data": 1.0}):
            with pytest.raises(ValueError, match="Step 3 has two numbers named"):
                log.write(3, metrics, {"data": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_no_line_is_lost_when_the_process_is_killed(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pref_jax.train.logging import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 101):\n"
        "    log.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))


def test_other_processes_write_and_show_nothing(
    tmp_path, monkeypatch, capfd, caplog, library_logger
):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    configure_logging()
    library_logger.propagate = True  # to caplog
    with MetricsLog(tmp_path / "run") as log, Progress("DPO", 2) as progress:
        log.write(1, {"loss": 1.0})
        progress.update(2, {"loss": 1.0})
    assert not caplog.records
    library_logger.propagate = False
    logging.getLogger("pref_jax.x").error("of process 1")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def devices(*kinds):
    return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


def test_rates_leave_the_compiling_step_out_and_forget_old_steps():
    throughput = Throughput(window=2, model_flops_per_token=1e9, devices=devices("cpu"))
    assert throughput.add(seconds=100.0, tokens=10, examples=1) is None
    assert throughput.add(seconds=1.0, tokens=100, examples=4) == Rates(1, 100, 4, None)
    # 400 tokens and 12 examples in 4 seconds.
    assert throughput.add(seconds=3.0, tokens=300, examples=8) == Rates(2, 100, 3, None)
    # The step of 1 second has left the window: 900 tokens, 16 examples in 4 seconds.
    assert throughput.add(seconds=1.0, tokens=600, examples=8) == Rates(2, 225, 4, None)


def test_utilisation_is_of_all_devices_together():
    h200 = devices("NVIDIA H200", "NVIDIA H200")
    throughput = Throughput(model_flops_per_token=6e9, devices=h200)
    throughput.add(seconds=9.0, tokens=1, examples=1)
    rates = throughput.add(seconds=2.0, tokens=100_000, examples=1)
    assert rates.mfu == pytest.approx(50_000 * 6e9 / (2 * 989.5e12), rel=1e-12)
    unknown = Throughput(devices=h200)
    unknown.add(seconds=9.0, tokens=1, examples=1)
    assert unknown.add(seconds=1.0, tokens=1, examples=1).mfu is None


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peak_of_known_devices(kind, tera):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA L40", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_peak_of_other_devices_is_unknown(kind):
    assert peak_flops(kind) is None


RATES = Rates(step_seconds=2.0, tokens_rate=12_345.6, examples_rate=7.25, mfu=0.4123)
METRICS = {"loss": 0.693147, "rewards/accuracy": 0.5, "rewards/margin": -1.25e-5}


def test_progress_without_a_terminal_is_a_log_line_now_and_then(
    monkeypatch, capfd, library_logger
):
    monkeypatch.setenv("COLUMNS", "40")  # must not break lines
    clock = [100.0, 101.0, 131.0, 132.0]
    clock = types.SimpleNamespace(monotonic=iter(clock).__next__)
    monkeypatch.setattr(run_logging, "time", clock)
    configure_logging()
    with Progress("DPO", 50, log_seconds=30.0) as progress:
        progress.update(1, METRICS)
        progress.update(2, METRICS, RATES)
        progress.update(20, METRICS, RATES)
        progress.update(50, {"loss": float("nan")}, RATES)
    lines = [line.split(" INFO ")[1] for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        "DPO 1/50  loss 0.6931  accuracy 0.5  margin -1.25e-05  "
        "- tokens/s  - pairs/s  MFU -  ETA -",
        "DPO 20/50  loss 0.6931  accuracy 0.5  margin -1.25e-05  "
        "12.3k tokens/s  7.2 pairs/s  MFU 41.2%  ETA 0:01:00",
        "DPO 50/50  loss nan  accuracy -  margin -  "
        "12.3k tokens/s  7.2 pairs/s  MFU 41.2%  ETA 0:00:00",
    ]


def test_work_without_metrics_is_counted_when_it_takes_long(
    monkeypatch, capfd, library_logger
):
    # The first step compiles until 100; the other nine take 10 seconds each.
    clock = types.SimpleNamespace(monotonic=iter(range(100, 200, 10)).__next__)
    monkeypatch.setattr(run_logging, "time", clock)
    configure_logging()
    with Progress("scoring", 10, log_seconds=30.0) as progress:
        for step in range(1, 11):
            progress.count(step)
    lines = [line.split(" INFO ")[1] for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        "scoring 4/10  ETA 0:01:00",
        "scoring 7/10  ETA 0:00:30",
        "scoring 10/10  ETA 0:00:00",
    ]
    clock.monotonic = iter(range(10)).__next__
    with Progress("scoring", 10, log_seconds=30.0) as progress:
        for step in range(1, 11):
            progress.count(step)
    assert capfd.readouterr().err == ""


def test_progress_in_a_terminal_is_a_live_line(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run_logging._console.cache_clear()
    configure_logging()
    with Progress("SFT", 50, unit="demonstrations") as progress:
        progress.update(20, METRICS, RATES)
        logging.getLogger("pref_jax.train").info("a line between")
        progress.update(49, METRICS, RATES)
    with Progress("scoring", 9) as progress:
        progress.count(1)
        progress.count(5)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capfd.readouterr().err)
    assert "a line between" in shown
    assert (
        "loss 0.6931  accuracy 0.5  margin -1.25e-05  12.3k tokens/s  "
        "7.2 demonstrations/s  MFU 41.2%  ETA 0:00:02"
    ) in shown
    assert re.search(r"scoring ━+\S* +5/9\nETA 0:00:00\s*$", shown)
    assert re.search(r"SFT ━+\S* +49/50", shown)


def test_configure_logging_again_replaces_its_handler_only(
    capfd, caplog, library_logger
):
    other = logging.NullHandler()
    library_logger.addHandler(other)
    configure_logging()
    configure_logging("WARNING")
    logging.getLogger("pref_jax.data").info("not shown")
    logging.getLogger("pref_jax.data").warning("shown once")
    assert [line[-18:] for line in capfd.readouterr().err.splitlines()] == [
        "WARNING shown once"
    ]
    assert other in library_logger.handlers
    assert not caplog.records  # nor a second time by a handler of the root
