"""The shell scripts, with stand-ins for Python and pip: nothing is installed."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
BASH = shutil.which("bash")
TOOLS = "awk cat cksum cp df dirname du mkdir rm sed sleep tail tee touch uname".split()

# Answers as a Python would. `venv` makes a copy of it; the rest goes into a log.
PYTHON = f"""#!{BASH}
case "$*" in
  -c*"version_info[:2]"*) echo {{version}} ;;
  -c*) case "$2" in *ensurepip*) exit {{venv}} ;; *jax*) exit {{xla}} ;; esac ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python" ;;
  "-m pip install"*)
    echo "pip $*" >>"$LOG"
    echo "  Downloading large-1.0.whl (80.1 MB)"
    echo "  Downloading small-1.0.whl (8.1 MB)"
    {{pip}} ;;
  *)
    echo "cwd=$PWD path=$PYTHONPATH" >>"$LOG"
    echo "flags=$XLA_FLAGS quick=$JAX_DISABLE_MOST_OPTIMIZATIONS" >>"$LOG"
    printf 'run %s\\n' "$@" >>"$LOG" ;;
esac
"""
BROKEN_SHIM = f"#!{BASH}\necho 'python: command not found' >&2\nexit 127\n"
OLD_PYTHON = f'#!{BASH}\ncase "$2" in *"version_info >= (3, 11)"*) exit 1 ;; esac\n'


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python(*, version="3.12", venv=0, xla=0, pip=":") -> str:
    return PYTHON.format(version=version, venv=venv, xla=xla, pip=pip)


class Machine:
    """A clone of the scripts and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.log = folder / "log"
        self.venv = self.root / ".venv"
        for path in (self.bin, self.home):
            path.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "setup.py", self.root)
        self.dev = folder / "dev"
        environment = self.root / "scripts" / "environment.sh"
        text = environment.read_text()
        for device in ("/dev/accel", "/dev/vfio"):
            assert device in text
            text = text.replace(device, f"{folder}{device}")
        environment.write_text(text)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        environment = {"PATH": str(self.bin), "LOG": str(self.log), **variables}
        return subprocess.Popen(
            [BASH, *command],
            cwd=self.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Whoever runs the tests in the background makes them ignore Ctrl-C, and
            # bash cannot trap a signal that was ignored when it began.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit status and output of one of the scripts."""
        path = str(self.root / "scripts" / script)
        process = self.start(path, *arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def installs(self) -> list[str]:
        """What pip was asked for since the last call, and forgets it."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return re.findall(r"^pip .* -e (.*)$", text, re.MULTILINE)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_parse(script):
    process = subprocess.run([BASH, "-n", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_a_python_is_found_behind_shims_that_do_not_run(machine, tmp_path):
    shims = tmp_path / "shims"
    write_program(shims / "python3.14", BROKEN_SHIM)
    write_program(shims / "python3.12", BROKEN_SHIM)
    write_program(machine.bin / "python3", OLD_PYTHON)
    found = write_program(machine.bin / "python3.12", python())
    search = f'source "{machine.root}/scripts/environment.sh"; find_python pass'
    process = machine.start("-c", search, PATH=f"{shims}:{machine.bin}")
    assert process.communicate(timeout=60)[0] == f"{found}\n"


def test_without_a_python_the_message_says_how_to_get_one(machine):
    write_program(machine.bin / "python3", OLD_PYTHON)
    status, output = machine.run("quickstart.sh")
    assert status == 1
    assert "No Python 3.11 or newer was found" in output
    assert "sudo apt install python3 python3-venv" in output
    assert not machine.venv.exists()


def test_a_python_with_its_venv_module_is_preferred_and_asked_for(machine):
    write_program(machine.bin / "python3.13", python(version="3.13", venv=1))
    status, output = machine.run("quickstart.sh")
    assert status == 1
    assert "sudo apt install python3.13-venv" in output
    write_program(machine.bin / "python3.11", python(version="3.11"))
    assert machine.run("quickstart.sh")[0] == 0


def test_a_python_that_is_named_and_does_not_work_is_an_error(machine):
    write_program(machine.bin / "python3", python())
    status, output = machine.run("quickstart.sh", PYTHON="/nowhere/python3")
    assert status == 1
    assert "PYTHON=/nowhere/python3 is not a working Python" in output


def test_quickstart_installs_once_and_runs_where_the_caller_stands(machine):
    write_program(machine.bin / "python3", python())
    arguments = ("--data", "my pairs.jsonl")
    status, output = machine.run("quickstart.sh", *arguments, PYTHONPATH="/theirs")
    assert status == 0, output
    assert re.search(r"14\d\d MB in all \(\d+ MB are free\), 1 to 5 minutes", output)
    assert "large-1.0.whl (80.1 MB)" in output
    assert "small-1.0.whl" not in output
    log = machine.log.read_text()
    assert f"cwd={machine.home} path={machine.root}:/theirs\n" in log
    program = ["-P", "-m", "experiments.quickstart", *arguments]
    assert log.endswith("".join(f"run {argument}\n" for argument in program))
    assert machine.installs() == ["."]

    assert machine.run("quickstart.sh") == (0, "")
    assert machine.installs() == []


def test_extras_are_added_to_those_that_are_there(machine):
    write_program(machine.bin / "python3", python())
    assert machine.run("quickstart.sh", EXTRAS="cuda,tpu")[0] == 0
    assert machine.run("test.sh")[0] == 0
    assert machine.run("test.sh", EXTRAS="tpu,test")[0] == 0
    assert machine.installs() == [".[cuda,tpu]", ".[cuda,tpu,test]"]
    with open(machine.root / "setup.py", "a") as file:
        file.write("# changed\n")
    assert machine.run("quickstart.sh")[0] == 0
    assert machine.installs() == [".[cuda,tpu,test]"]


@pytest.mark.parametrize(
    ("xla", "arguments", "expected"),
    [
        (0, [], "flags=--theirs --xla_cpu_use_fusion_emitters=false quick=1"),
        (1, [], "flags=--theirs quick=1"),  # this XLA does not know the flag
        (0, ["--all"], "flags=--theirs quick="),
    ],
)
def test_the_default_suite_compiles_quickly(machine, xla, arguments, expected):
    write_program(machine.bin / "python3", python(xla=xla))
    assert machine.run("test.sh", *arguments, XLA_FLAGS="--theirs")[0] == 0
    assert f"{expected}\n" in machine.log.read_text()


def test_an_unknown_extra_is_an_error(machine):
    write_program(machine.bin / "python3", python())
    status, output = machine.run("quickstart.sh", EXTRAS="gpu")
    assert status == 1
    assert "`gpu` is unknown; there are cuda, envs, tpu, test and parity" in output


@pytest.mark.parametrize("damage", ["python gone", "half made", "no python"])
def test_a_broken_venv_is_made_again(machine, damage):
    write_program(machine.bin / "python3", python())
    assert machine.run("quickstart.sh")[0] == 0
    inside = machine.venv / "bin" / "python"
    if damage == "half made":
        (machine.venv / "unfinished").touch()
    else:
        inside.unlink()
    if damage == "python gone":
        inside.symlink_to("/nowhere/python3")
    (machine.venv / "old").touch()
    machine.installs()

    status, output = machine.run("quickstart.sh")
    assert status == 0, output
    assert "is broken or was not finished: making it again" in output
    assert machine.installs() == ["."]
    assert not (machine.venv / "old").exists()
    assert machine.run("quickstart.sh") == (0, "")


def test_a_failed_install_shows_the_end_of_the_log_and_is_tried_again(machine):
    write_program(machine.bin / "python3", python(pip="echo 'no route'; exit 1"))
    for _ in range(2):
        status, output = machine.run("quickstart.sh")
        assert status == 1
        assert "no route\nThe install failed. All that pip said is in" in output
        assert "making it again" not in output
    assert machine.installs() == [".", "."]


def test_an_interrupted_install_is_taken_up_again(machine):
    write_program(machine.bin / "python3", python(pip='trap "exit 1" INT; sleep 30'))
    process = machine.start(str(machine.root / "scripts" / "quickstart.sh"))
    while not machine.log.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. The same command continues." in output

    write_program(machine.bin / "python3", python())
    status, output = machine.run("quickstart.sh")
    assert status == 0
    assert "making it again" in output


def test_a_full_disk_is_seen_before_anything_is_made(machine):
    write_program(machine.bin / "python3", python())
    (machine.bin / "df").unlink()
    full = "echo head; echo disk 1 1 102400 1 /"
    write_program(machine.bin / "df", f"#!{BASH}\n{full}\n")
    status, output = machine.run("quickstart.sh")
    assert status == 1
    assert re.search(r"needs 1400 MB more on this disk, and 100 MB\nare free", output)
    assert not machine.venv.exists()


def test_a_gpu_is_named_until_jax_is_installed_for_it(machine):
    write_program(machine.bin / "python3", python())
    write_program(machine.bin / "nvidia-smi", f"#!{BASH}\n[ $1 = -L ]\n")
    advice = "an NVIDIA GPU. To use it: EXTRAS=cuda bash scripts/quickstart.sh"
    assert advice in machine.run("quickstart.sh")[1]
    assert machine.run("quickstart.sh", EXTRAS="cuda")[0] == 0
    assert machine.run("quickstart.sh") == (0, "")


def test_a_tpu_is_known_by_its_device_or_by_name(machine):
    write_program(machine.bin / "python3", python())
    assert machine.run("quickstart.sh")[0] == 0
    for other in ("accel/accel0", "vfio/vfio"):
        write_program(machine.dev / other, "")
        assert machine.run("quickstart.sh") == (0, "")
    advice = "a TPU. To use it: EXTRAS=tpu bash scripts/quickstart.sh"
    assert advice in machine.run("quickstart.sh", TPU_NAME="local")[1]
    for device in ("accel0", "vfio/0"):
        write_program(machine.dev / device, "")
        assert advice in machine.run("quickstart.sh")[1]
        (machine.dev / device).unlink()


def test_the_tests_run_from_the_root_and_all_adds_the_slow_ones(machine):
    write_program(machine.bin / "python3", python())
    assert machine.run("test.sh", "tests/data", "-k", "a b")[0] == 0
    log = machine.log.read_text()
    assert f"cwd={machine.root} " in log
    assert "run -m\nrun pytest\nrun -m\nrun not slow\n" in log
    assert log.endswith("run tests/data\nrun -k\nrun a b\n")
    assert machine.installs() == [".[test]"]

    assert machine.run("test.sh", "-x", "--all")[0] == 0
    log = machine.log.read_text()
    assert "run slow or not slow\n" in log
    assert log.endswith("run --durations=15\nrun -x\n")
    assert machine.installs() == [".[test,parity,envs]"]
