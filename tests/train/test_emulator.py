"""Runs on `gs://` against an emulator of Google Cloud Storage, over HTTP.

Needs `pip install gcsfs gcp-storage-emulator`. The emulator knows no preconditions, on
which the lock rests, so they are added to it here; everything else is its own.
"""

import functools
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from http import HTTPStatus

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISSING = [
    name
    for name in ("gcsfs", "gcp_storage_emulator")
    if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]


def add_preconditions(routes):
    """`ifGenerationMatch`, and the generation of what is read, as the service has."""
    from gcp_storage_emulator.exceptions import NotFound

    one_at_a_time = threading.RLock()

    def conditional(handler):
        @functools.wraps(handler)
        def handle(request, response, storage, *rest):
            with one_at_a_time:
                bucket = request.params.get("bucket_name")
                names = [
                    request.params.get("object_id"),
                    *request.query.get("name", ()),
                ]
                name = next(filter(None, names), None)
                try:
                    found = storage.get_file_obj(bucket, name)["generation"]
                except NotFound:
                    found = "0"
                wanted = request.query.get("ifGenerationMatch", [found])[0]
                if wanted != found:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
                if request.method == "GET" and name:
                    response["x-goog-generation"] = found
                handler(request, response, storage, *rest)

        return handle

    for _, handlers in routes:
        for method in handlers:
            handlers[method] = conditional(handlers[method])


def serve(port):
    """What the emulator's process does."""
    from gcp_storage_emulator import server

    add_preconditions(server.HANDLERS)
    server.create_server("127.0.0.1", port, True, default_bucket="bucket").run()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(**more):
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/train"))
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | more


@pytest.fixture(scope="module")
def emulated():
    """The environment of a process whose `gs://bucket` is the emulator's."""
    port = free_port()
    program = f"import test_emulator; test_emulator.serve({port})"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as emulator:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert emulator.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
            address = f"http://127.0.0.1:{port}"
            yield environment(
                STORAGE_EMULATOR_HOST=address,  # gcsfs
                TENSORSTORE_GCS_HTTP_URL=address,
                GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
                EPATH_USE_TF="false",
            )
        finally:
            emulator.kill()


PREPARE = """
import functools, json, os, pathlib, sys, time
from etils import epath
from pref_jax import processes
from pref_jax.train import lease
from pref_jax.train import run as run_lib
lease.take = functools.partial(lease.take, renew_seconds=0.3, stale_seconds=2.0)
root = sys.argv[1]
def show(*values):
    print("answer", json.dumps(values), flush=True)
"""


def start(emulated, program, root, **more):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE + program, root],
        env=emulated | more,
        stdout=subprocess.PIPE,
        text=True,
    )


def answers(process):
    try:
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    return [read(line) for line in output.splitlines() if line.startswith("answer ")]


def read(line):
    return json.loads(line.removeprefix("answer "))


OPEN = """
with run_lib.open_run(root, config={"beta": 0.1}) as folder:
    show(str(folder), run_lib.count_starts(folder))
    if os.environ.get("STAY"):
        time.sleep(100)
    if os.environ.get("FINISH"):
        run_lib.write_json(folder / run_lib.RECORD_FILE, {})
"""


def test_a_run_is_made_left_alone_taken_over_and_followed(emulated):
    root = "gs://bucket/claims"
    with start(emulated, OPEN, root, STAY="1") as holder:
        try:
            assert read(holder.stdout.readline()) == [f"{root}/001", 1]
            assert answers(start(emulated, OPEN, root)) == [[f"{root}/002", 1]]
            started = [start(emulated, OPEN, root, FINISH="1") for _ in range(2)]
            (first,), (second,) = sorted(answers(process) for process in started)
            # Of two at once one continues the second run, the other makes a third.
            assert (first, second) == ([f"{root}/002", 2], [f"{root}/003", 1])
        finally:
            holder.send_signal(signal.SIGKILL)
    assert answers(start(emulated, OPEN, root, FINISH="1")) == [[f"{root}/001", 2]]
    assert answers(start(emulated, OPEN, root)) == [[f"{root}/004", 1]]


LOG = """
from pref_jax import report
from pref_jax.train.logging import MetricsLog
folder = epath.Path(root)
log = MetricsLog(folder, copy_seconds=1000)
for step in range(1, 5):
    log.write(step, {"loss": 1.0 / step})
log.flush()
log.write(5, {"loss": 0.0})
with MetricsLog(folder, resume_step=3) as resumed:
    show(report.read_metrics(folder / "metrics.jsonl")["loss"][0].tolist())
    resumed.write(4, {"loss": 7.0})
steps, values = report.read_metrics(folder / "metrics.jsonl")["loss"]
show(steps.tolist(), values.tolist()[3])
page = report.Report("a run", sections=(report.Text("t", ("p",)),))
run_lib.write_json(folder / "record.json", {"report": report.to_json(page)})
sys.argv = ["report", root]
from pref_jax.report.__main__ import main
main()
show("a run" in (folder / "report.html").read_text())
show(sorted(path.name for path in folder.iterdir()))
"""


def test_metrics_and_the_report_live_in_the_bucket(emulated):
    assert answers(start(emulated, LOG, "gs://bucket/metrics/001")) == [
        [[1, 2, 3]],
        [[1, 2, 3, 4], 7.0],
        [True],
        [["metrics.jsonl", "record.json", "report.html", "tensorboard"]],
    ]


CHECKPOINTS = """
import jax, jax.numpy as jnp
from pref_jax.train.checkpoint import Checkpoints
def make(step):
    return {"w": jnp.full((300, 300), step, jnp.float32), "rng": jax.random.key(step)}
options = {"keep_last": 2, "keep_best": 1, "metric": "a"}
with Checkpoints(root, **options) as checkpoints:
    for step in (1, 2, 3, 4):
        metrics = {"a": 1.0 if step == 1 else 0.0}
        checkpoints.save(step, make(step), metrics=metrics, meta={"step": step})
    show(checkpoints.latest_step(), checkpoints.best_step())
with Checkpoints(root, read_only=True) as checkpoints:
    restored = checkpoints.restore(make(0))
    field = checkpoints.restore(make(0)["w"], 1, field="w")
    show(float(restored["w"].min()), float(field.max()), checkpoints.restore_meta(1))
    show(bool((restored["rng"] == make(4)["rng"]).all()))
show(sorted(path.name for path in epath.Path(root).iterdir()))
"""


def test_checkpoints_are_saved_kept_and_restored(emulated):
    assert answers(start(emulated, CHECKPOINTS, "gs://bucket/run/checkpoints")) == [
        [4, 1],
        [4.0, 1.0, {"step": 1}],
        [True],
        [["1", "3", "4"]],
    ]


TOGETHER = """
processes.initialize()
import jax
from pref_jax.train.logging import MetricsLog
number = jax.process_index()
try:
    name = os.environ.get("NAME")
    with run_lib.open_run(root, config={"beta": 0.1}, name=name) as folder:
        with MetricsLog(folder) as log:
            log.write(number + 1, {"loss": 1.0})
            log.flush()
        done = folder / "done.json"
        processes.on_first(lambda: run_lib.write_json(done, {"by": number}))
        lines = (folder / "metrics.jsonl").read_text()
        show(str(folder), lines, run_lib.read_json(done))
        processes.wait("read")
except ValueError as error:
    show(type(error).__name__, str(error))
"""


def start_two(emulated, root, **more):
    address = f"localhost:{free_port()}"
    return [
        start(
            emulated,
            TOGETHER,
            root,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
            **more,
        )
        for number in (0, 1)
    ]


def test_two_processes_share_a_bucket(emulated):
    root = "gs://bucket/together"
    found = [answers(process) for process in start_two(emulated, root)]
    line = '{"step": 1, "loss": 1.0}\n'
    assert found[0] == found[1] == [[f"{root}/001", line, {"by": 0}]]
    with start(emulated, OPEN, root, STAY="1") as holder:
        try:
            assert read(holder.stdout.readline()) == [f"{root}/001", 2]
            pair = start_two(emulated, root, NAME="001")
            found = [answers(process) for process in pair]
        finally:
            holder.send_signal(signal.SIGKILL)
    message = f"run {root}/001 is in use by another process."
    assert found[0] == found[1] == [["RunFolderError", message]]


MODELS = """
import dataclasses, tempfile
import jax, numpy as np
import tiny_stage
from pref_jax import model_folders
from pref_jax.models import decoder, pretrained
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PreemptionGuard
config = decoder.from_description(json.loads(tiny_stage.MODEL.description)["decoder"])
params = jax.device_get(tiny_stage.make_params())
folder = pathlib.Path(tempfile.mkdtemp()) / "base"
pretrained.save(folder, config, params)
for file in folder.iterdir():
    (epath.Path(root) / "base" / file.name).write_bytes(file.read_bytes())
loop = dataclasses.replace(tiny_stage.CONFIG.loop, num_steps=3, checkpoint_every=3)
with PreemptionGuard() as guard:
    trained, _ = tiny_stage.train(
        epath.Path(root) / "run" / "full",
        mesh=sharding.make_mesh(),
        guard=guard,
        config=dataclasses.replace(tiny_stage.CONFIG, loop=loop),
    )
def same(path, expected):
    loaded = model_folders.load(path)[1]
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)
show(same(f"{root}/base", params), same(f"{root}/run/full", trained))
show(model_folders.base_identity(f"{root}/run/full")["path"])
def copied():
    cache = pathlib.Path(os.environ["PREF_JAX_CACHE"])
    return [path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")]
before = copied()
model_folders.load(f"{root}/base")
show(len(before), copied() == before)
"""


def test_models_are_read_from_the_bucket(emulated, tmp_path):
    root = "gs://bucket/models"
    process = start(emulated, MODELS, root, PREF_JAX_CACHE=str(tmp_path))
    assert answers(process) == [[True, True], [f"{root}/run/full"], [1, True]]
