"""The numbers of a run in a bucket keep the promises that those on a disk keep."""

import json
import logging
import threading
import time

import pytest
from etils import epath

import object_store
from pref_jax.train.logging import MetricsLog

RUN = "gs://bucket/runs/001"
METRICS = f"{RUN}/metrics.jsonl"


@pytest.fixture
def bucket(monkeypatch):
    return object_store.install(monkeypatch)


def steps():
    lines = epath.Path(METRICS).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def put(text):
    epath.Path(METRICS).write_bytes(text)


def test_lines_and_events_are_in_the_bucket_at_the_end(bucket):
    with MetricsLog(RUN, copy_seconds=1000) as log:
        local = log._local_folder
        log.write(1, {"loss": 0.5}, {"step": 0.25})
        log.write(2, {"loss": float("nan")})
        assert not epath.Path(RUN).exists()
    assert epath.Path(METRICS).read_bytes() == (
        b'{"step": 1, "loss": 0.5, "time/step": 0.25}\n{"step": 2, "loss": "NaN"}\n'
    )
    assert len(list(epath.Path(f"{RUN}/tensorboard").iterdir())) == 1
    assert not local.exists()


def test_what_was_flushed_outlives_a_kill(bucket):
    log = MetricsLog(RUN, copy_seconds=1000)
    log.write(1, {"loss": 1.0})
    log.flush()
    log.write(2, {"loss": 1.0})
    assert steps() == [1]  # a process killed now leaves this
    log.write(3, {"loss": 1.0})
    log.flush()
    assert steps() == [1, 2, 3]
    log.close()


def test_lines_are_copied_now_and_then(bucket):
    with MetricsLog(RUN, copy_seconds=0.02) as log:
        for step in range(1, 4):
            log.write(step, {"loss": 1.0})
            deadline = time.monotonic() + 10
            while not epath.Path(METRICS).exists() or steps()[-1:] != [step]:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_a_line_waits_while_the_file_is_read_for_a_copy(bucket):
    with MetricsLog(RUN, copy_seconds=1000) as log:
        local = log._local_folder / "metrics.jsonl"
        with log._mirror.lock:
            writer = threading.Thread(target=log.write, args=(1, {"loss": 1.0}))
            writer.start()
            time.sleep(0.1)
            assert local.read_bytes() == b""
        writer.join()
        assert local.read_bytes() == b'{"step": 1, "loss": 1.0}\n'


KEPT = b'{"step": 1,   "loss": 1e0}\n{"step": 2}\r\n'


@pytest.mark.parametrize("undone", [b"", b'{"step": 3}\n{"step": 4, "lo'])
def test_resume_takes_back_what_was_undone_at_once(bucket, undone, caplog):
    put(KEPT + undone)
    with (
        caplog.at_level(logging.INFO, "pref_jax"),
        MetricsLog(RUN, resume_step=2, copy_seconds=1000) as log,
    ):
        assert epath.Path(METRICS).read_bytes() == KEPT
        log.write(3, {"loss": 4.0})
    assert epath.Path(METRICS).read_bytes() == KEPT + b'{"step": 3, "loss": 4.0}\n'
    assert ("removed 2 of 4 lines of gs://" in caplog.text) == bool(undone)


def test_events_of_each_start_stay_beside_each_other(bucket):
    for start in range(2):
        with MetricsLog(RUN, resume_step=start) as log:
            log.write(start + 1, {"loss": 1.0})
        time.sleep(1.1)  # the name of an event file has whole seconds
    assert len(list(epath.Path(f"{RUN}/tensorboard").iterdir())) == 2


def test_a_foreign_line_or_an_old_run_is_refused_and_nothing_is_touched(bucket):
    put(KEPT + b"{}\n")
    with pytest.raises(ValueError, match=f"{METRICS}, line 3: needs a JSON object"):
        MetricsLog(RUN, resume_step=2)
    with pytest.raises(FileExistsError, match="already holds metrics. Give `resume_"):
        MetricsLog(RUN)
    assert epath.Path(METRICS).read_bytes() == KEPT + b"{}\n"
    assert bucket.puts == ["/bucket/runs/001/metrics.jsonl"]
