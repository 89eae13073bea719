"""scripts/launch_local.sh: several processes that are joined, watched and ended.

Whatever a test starts ends by itself, at the latest by an alarm of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pref_jax import processes
from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE
from scripts import launch_local

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
LIMIT = 120  # seconds for anything here, on a busy machine

ALARM = f"import signal; signal.alarm({LIMIT})\n"
PLAIN = f"{ALARM}import os, sys, time; number = os.environ['JAX_PROCESS_ID']\n"
JOINED = f"""{ALARM}
import os, sys, time
from pref_jax import processes
processes.initialize()
import jax
number = jax.process_index()
"""
# What a run does when it is told to stop, without a run.
SAVES = """
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""


class Launcher:
    """launch_local.sh, and what it says while it runs."""

    def __init__(self, number, program, *options, **variables):
        command = [BASH, str(ROOT / "scripts/launch_local.sh"), *options, str(number)]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", program],
            env=environment | {"PYTHONPATH": str(ROOT)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )
        self.lines = []

    def wait_for(self, *expected):
        """Read until these lines came, in any order."""
        missing = set(expected)
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            missing.discard(self.lines[-1])
            if not missing:
                return
        raise AssertionError(f"ended without {missing}: {self.lines}")

    def finish(self):
        """Its exit code, once it has ended."""
        output, _ = self.process.communicate(timeout=LIMIT)
        self.lines += output.splitlines()
        return self.process.returncode

    def pids(self):
        """Process ids that the processes printed."""
        found = (re.fullmatch(r"\[\d\] pid (\d+)", line) for line in self.lines)
        return [int(match[1]) for match in found if match]


def _heed_signals():
    # A process in the background ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def launch():
    started = []

    def start(*arguments, **variables):
        started.append(Launcher(*arguments, **variables))
        return started[-1]

    yield start
    for launcher in started:
        if launcher.process.poll() is None:
            launcher.process.terminate()
            try:
                launcher.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass
        launcher.process.kill()
        launcher.process.wait()
        launcher.process.stdout.close()


def is_running(pid):
    """Whether there is such a process that is not just waiting to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_process_knows_its_number_and_has_one_cpu_device(launch):
    program = f"""{PLAIN}
names = ("JAX_NUM_PROCESSES", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
print(*(os.environ[name] for name in names), "PREF_JAX_MULTIHOST" in os.environ)
print("no newline at the end of the error", end="", file=sys.stderr)
"""
    flags = "--xla_force_host_platform_device_count=8 --xla_dump_to="
    launcher = launch(3, program, XLA_FLAGS=flags, PREF_JAX_MULTIHOST="1")
    assert launcher.finish() == 0
    expected = [f"[{i}] 3 cpu 1 --xla_dump_to= False" for i in range(3)]
    expected += [f"[{i}] no newline at the end of the error" for i in range(3)]
    assert sorted(launcher.lines) == sorted(expected)


def test_addresses_are_of_this_machine_and_of_this_start(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = launch_local.Config(2, ("true",))
    ports = {launch_local.free_port() for _ in range(8)}
    assert len(ports) > 1
    for i, found in enumerate(launch_local.environments(config, 1234)):
        assert found["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"
        assert found["JAX_PROCESS_ID"] == str(i)


@pytest.mark.parametrize(
    ("number", "given", "seen"),
    [
        (2, None, ["0", "1"]),
        (4, None, ["0", "1", "2", "3"]),
        (5, None, None),
        (2, "3,GPU-5ac", ["3", "GPU-5ac"]),
        (3, "3,GPU-5ac", None),
        (1, "", None),
    ],
)
def test_each_process_has_a_gpu_where_there_are_enough(
    number, given, seen, monkeypatch, tmp_path, capsys
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!{BASH}\nprintf '%s\\n' 0 1 2 3\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    config = launch_local.Config(number, ("true",))
    found = launch_local.environments(config, 1)
    said = capsys.readouterr().err
    if seen is None:
        assert {process["JAX_PLATFORMS"] for process in found} == {"cpu"}
        assert ("on CPU devices. For GPUs start at most" in said) == bool(given != "")
    else:
        assert [process["CUDA_VISIBLE_DEVICES"] for process in found] == seen
        assert not any("JAX_PLATFORMS" in process for process in found)
        assert said == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch_local.gpus() == []


def test_a_machine_without_nvidia_smi_has_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch_local.gpus() == []


JOINING = {
    "JAX_COORDINATOR_ADDRESS": "host:1",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
    "PREF_JAX_MULTIHOST": "1",
}
ADDRESS, NUMBER, ID, DETECT = JOINING
BY_HAND = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ((), None),
        ((ADDRESS, NUMBER, ID), BY_HAND),
        ((ADDRESS, NUMBER, ID, DETECT), BY_HAND),
        ((DETECT,), {}),
        ((DETECT, ADDRESS), {}),  # jax reads the address itself
        ((ADDRESS,), "has only JAX_COORDINATOR_ADDRESS. Start them"),
        ((NUMBER, ID), "has only JAX_NUM_PROCESSES, JAX_PROCESS_ID. Start them"),
        ((DETECT, NUMBER), "has only JAX_NUM_PROCESSES. Start them"),
    ],
)
def test_the_environment_says_how_a_process_joins_the_others(
    given, joined, monkeypatch
):
    calls = []
    initialize = "pref_jax.processes.jax.distributed.initialize"
    monkeypatch.setattr(initialize, lambda **options: calls.append(options))
    for name, value in JOINING.items():
        monkeypatch.delenv(name, raising=False)
        if name in given:
            monkeypatch.setenv(name, value)
    if isinstance(joined, str):
        with pytest.raises(ValueError, match=joined):
            processes.initialize()
        assert calls == []
        return
    processes.initialize()
    seconds = processes.HEARTBEAT_SECONDS
    limits = {
        "heartbeat_timeout_seconds": seconds,
        "shutdown_timeout_seconds": seconds,
    }
    assert calls == ([] if joined is None else [limits | joined])


def test_the_launchers_know_the_code_of_a_preempted_run():
    assert launch_local.PREEMPTED_EXIT_CODE == PREEMPTED_EXIT_CODE
    for script in ("launch_slurm.sh", "launch_tpu.sh"):
        text = (ROOT / "scripts" / script).read_text()
        assert f"\npreempted={PREEMPTED_EXIT_CODE} " in text


def test_a_process_that_fails_ends_the_others_and_is_named(launch):
    program = f"""{PLAIN}
print("pid", os.getpid(), flush=True)
time.sleep(0.5 if number == "1" else {LIMIT})
sys.exit(7)
"""
    began = time.monotonic()
    launcher = launch(3, program, "--failure-grace", "0.3")
    assert launcher.finish() == 7
    assert time.monotonic() - began < LIMIT / 2
    first, *rest = [line for line in launcher.lines if line.startswith("[launch]")]
    assert first == (
        "[launch] process 1 ended with exit code 7; the others cannot go on without it "
        "and are ended."
    )
    assert "[launch] process 0 was ended by SIGTERM." in rest
    assert len(launcher.pids()) == 3
    assert not any(map(is_running, launcher.pids()))


def test_what_does_not_heed_sigterm_is_killed_and_what_it_started_with_it(launch):
    program = f"""{PLAIN}
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({LIMIT})"])
print("pid", inner.pid, flush=True)
if number == "0":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep({LIMIT})
"""
    launcher = launch(2, program, "--failure-grace", "0.3")
    assert launcher.finish() == 128 + signal.SIGKILL
    text = "\n".join(launcher.lines)
    assert "process 0 was ended by SIGKILL; the others cannot go on" in text
    assert "process 1 did not end: SIGKILL." in text
    assert len(launcher.pids()) == 2
    assert not any(map(is_running, launcher.pids()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_all_are_preempted(launch, number):
    program = f"""{PLAIN}
def count(number, frame):
    print("got", number, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0.5)  # a second signal would come sooner
signal.signal(signal.SIGTERM, count)
signal.signal(signal.SIGINT, count)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep({LIMIT})
"""
    launcher = launch(2, program, "--restart", "3")
    launcher.wait_for("[0] ready", "[1] ready")
    launcher.process.send_signal(number)
    assert launcher.finish() == PREEMPTED_EXIT_CODE
    assert launcher.lines.count(f"[0] got {int(signal.SIGTERM)}") == 1
    assert launcher.lines.count(f"[1] got {int(signal.SIGTERM)}") == 1
    assert "[launch] process 1 was preempted (exit code 75)." in launcher.lines
    assert launcher.lines.count("[0] ready") == 1  # it was told to stop: no restart


def test_a_second_ctrl_c_kills_at_once(launch):
    program = f"""{PLAIN}
signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
print("ready", flush=True)
while True:
    time.sleep(1)
"""
    launcher = launch(2, program)
    launcher.wait_for("[0] ready", "[1] ready")
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for("[0] saving", "[1] saving")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.finish() == 128 + signal.SIGKILL


def test_a_process_that_never_ends_its_saving_is_killed_after_the_grace(launch):
    program = f"""{PLAIN}
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", flush=True)
while True:
    time.sleep(1)
"""
    launcher = launch(1, program, "--grace", "0.3")
    launcher.wait_for("[0] ready")
    launcher.process.terminate()
    assert launcher.finish() == 128 + signal.SIGKILL
    assert "[launch] stopping: SIGTERM to all, SIGKILL in 0.3 s." in launcher.lines


def test_preempted_processes_are_started_again(launch, tmp_path):
    program = f"""{PLAIN}
path = "{tmp_path}/" + number
starts = len(open(path).read()) if os.path.exists(path) else 0
open(path, "a").write("x")
print("start", starts, os.environ["JAX_COORDINATOR_ADDRESS"], flush=True)
sys.exit((75, 3, 0)[starts])
"""
    launcher = launch(2, program, "--restart", "2")
    assert launcher.finish() == 0
    text = "\n".join(launcher.lines)
    assert "[launch] starting again (2 of 2 restarts left)." in text
    assert "[launch] starting again (1 of 2 restarts left)." in text
    addresses = re.findall(r"^\[0\] start \d (\S+)$", text, re.MULTILINE)
    assert len(addresses) == 3
    for path in tmp_path.iterdir():
        path.unlink()
    launcher = launch(2, program, "--restart", "1")
    assert launcher.finish() == 3


def test_one_that_was_preempted_does_not_hide_one_that_failed(launch):
    program = f"{PLAIN}\nsys.exit(75 if number == '0' else time.sleep(0.3) or 4)"
    assert launch(2, program).finish() == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0", "true"], "needs the number of processes, 1 or more, and a command"),
        (["2"], "needs the number of processes, 1 or more, and a command"),
        (["--restart", "-1", "2", "true"], "`restart` must not be negative; got -1"),
        (["--grace", "-1", "2", "true"], "`grace` must not be negative; got -1.0"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch_local.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_command_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch_local.py", "2", "/nowhere/python"])
    before = {n: signal.getsignal(n) for n in (1, signal.SIGINT, signal.SIGTERM)}
    try:
        assert launch_local.main() == 127
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "/nowhere/python cannot be run: No such file" in capsys.readouterr().err


@pytest.mark.slow  # jax starts twice
def test_processes_agree_on_what_the_first_one_says(launch):
    program = f"""{JOINED}
print(processes.agree({{"from": number}}), jax.device_count(), processes.is_first())
processes.check_same("the number of devices", jax.device_count())
processes.wait("the end")
try:
    processes.check_same("the process", number)
except ValueError as error:
    print(error)
"""
    launcher = launch(2, program)
    assert launcher.finish() == 0, launcher.lines
    assert "[0] {'from': 0} 2 True" in launcher.lines
    assert "[1] {'from': 0} 2 False" in launcher.lines
    disagreement = "the processes disagree on the process; process 1 has 1."
    assert any(disagreement in line for line in launcher.lines)


@pytest.mark.slow  # jax starts twice, and one waits for a process that is dead
def test_a_killed_worker_ends_the_one_that_waits_for_it(launch):
    program = f"""{JOINED}
processes.wait("the start")
print("pid", os.getpid(), flush=True)
if number == 1:
    os.kill(os.getpid(), signal.SIGKILL)
processes.wait("never")
"""
    began = time.monotonic()
    launcher = launch(2, program)
    assert launcher.finish() == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    text = "\n".join(launcher.lines)
    assert "process 1 was ended by SIGKILL; the others cannot go on" in text
    assert len(launcher.pids()) == 2
    assert not any(map(is_running, launcher.pids()))


@pytest.mark.slow  # jax starts four times
def test_a_preempted_run_stops_at_one_step_and_goes_on_when_restarted(launch, tmp_path):
    program = f"""{JOINED}
from pref_jax import processes
from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE, PreemptionGuard
path = "{tmp_path}/step"
first = int(open(path).read()) if processes.is_first() and os.path.exists(path) else 0
first = processes.agree(first)
with PreemptionGuard() as guard:
    for step in range(first + 1, 2000):
        processes.wait(f"step {{step}}")  # as the collectives of a train step do
        if first == 0 and step == 3 and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # only one of the hosts is told
        if guard.agreed():
            if processes.is_first():
                open(path, "w").write(str(step))
            processes.wait("saved")
            print("stopped at", step, flush=True)
            sys.exit(PREEMPTED_EXIT_CODE)
        if first and step == first + 2:
            print("done at", step - first, flush=True)
            break
"""
    launcher = launch(2, program, "--restart", "1")
    assert launcher.finish() == 0, launcher.lines
    stopped = [line for line in launcher.lines if "stopped at" in line]
    assert len(stopped) == 2 and len({line[4:] for line in stopped}) == 1
    assert {"[0] done at 2", "[1] done at 2"} <= set(launcher.lines)
