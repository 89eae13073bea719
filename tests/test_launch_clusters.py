"""The launchers for Slurm and TPU slices: their commands, the rest stood in for."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
LIMIT = 120  # seconds for anything here, on a busy machine


class Machine:
    """A clone of the scripts in git, and programs that stand in for the real ones."""

    def __init__(self, folder):
        self.root, self.host = folder / "a clone", folder / "host"
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        self.host.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "setup.py", self.root)
        self.git("init", "--quiet")
        self.git("add", ".")
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        self.git(*who, "commit", "--quiet", "-m", "all")
        self.commit = self.git("rev-parse", "HEAD").strip()

    def git(self, *arguments):
        command = ["git", *arguments]
        return subprocess.check_output(command, cwd=self.root, text=True)

    def program(self, name, text):
        path = self.bin / name
        path.write_text(f"#!{BASH}\n{text}")
        path.chmod(0o755)
        return path

    def run(self, script, *arguments, **variables):
        """Exit code, standard output, standard error."""
        process = subprocess.run(
            [BASH, str(self.root / "scripts" / script), *arguments],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "HOME": str(self.host),
                "LOG": str(self.log),
                "HOST": str(self.host),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return process.returncode, process.stdout, process.stderr

    def logged(self):
        """The lines that the programs wrote since the last call."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.splitlines()


@pytest.fixture
def machine(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git: the launchers copy a commit")
    return Machine(tmp_path)


PROGRAM = ("python", "-m", "experiments.quickstart", "--name", "a b")


def test_slurm_dry_run_prints_the_commands(machine):
    options = ("--nodes=4", "--gpus-per-node=h100:8", "--time=12:00:00")
    arguments = (*options, "--requeues", "7", "--dry-run", "--", *PROGRAM)
    script = str(machine.root / "scripts/launch_slurm.sh").replace(" ", "\\ ")
    root = str(machine.root).replace(" ", "\\ ")
    program = "python -m experiments.quickstart --name a\\ b"
    first = "sbatch --requeue --open-mode=append --signal=TERM@120 --ntasks-per-node"
    last = "srun --kill-on-bad-exit=0 --wait=60 env PREF_JAX_MULTIHOST=1"
    status, output, errors = machine.run("launch_slurm.sh", *arguments)
    assert (status, errors) == (0, "")
    assert output.splitlines() == [
        f"{first}=8 {' '.join(options)} {script} --job {root} gpu 8 7 {program}",
        f"{last} {program}",
    ]
    _, output, _ = machine.run("launch_slurm.sh", "--per=node", *arguments)
    assert output.splitlines() == [
        f"{first}=1 {' '.join(options)} {script} --job {root} node 8 7 {program}",
        f"{last} JAX_LOCAL_DEVICE_IDS=0\\,1\\,2\\,3\\,4\\,5\\,6\\,7 {program}",
    ]
    _, output, _ = machine.run("launch_slurm.sh", "--nodes=2", "--dry-run", "--", "x")
    assert output.splitlines() == [
        f"{first}=1 --nodes=2 {script} --job {root} node 0 100 x",
        f"{last} x",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Needs a command after `--`"),
        (("--nodes=2", "--"), "Needs a command after `--`"),
        (("--per=gpu", "--", "x"), "--per gpu needs --gpus-per-node=NUMBER"),
        (("--per", "host", "--", "x"), "--per needs gpu or node; got `host`"),
        (("--gpus-per-node=all", "--", "x"), "needs NUMBER or TYPE:NUMBER; got `all`"),
        (("--requeues=x", "--", "x"), "--requeues needs a number; got `x`"),
        (("--ntasks=3", "--", "x"), "--ntasks=3: the number of processes follows"),
        (("--", "x"), "There is no sbatch here"),
    ],
)
def test_slurm_arguments_that_make_no_sense_are_errors(machine, arguments, message):
    status, output, errors = machine.run("launch_slurm.sh", *arguments)
    assert (status, output) == (1, "")
    assert message in errors


def test_a_slurm_job_that_was_preempted_goes_back_to_the_queue(machine):
    """sbatch copies the script elsewhere, and runs the copy on the first node."""
    machine.program(
        "sbatch",
        f"""
while [ "${{1#--}}" != "$1" ]; do shift; done
cp "$1" "$HOST/slurm_script"
shift
SLURM_JOB_ID=17 {BASH} "$HOST/slurm_script" "$@"
""",
    )
    machine.program(
        "srun",
        """
while [ "${1#--}" != "$1" ]; do shift; done
echo "srun $* cpus=${SRUN_CPUS_PER_TASK:-} path=$PYTHONPATH" >>"$LOG"
exit "$CODE"
""",
    )
    machine.program("scontrol", 'echo "scontrol $*" >>"$LOG"\n')
    arguments = ("launch_slurm.sh", "--nodes=2", "--requeues=2", "--", *PROGRAM)
    step = (
        f"srun env PREF_JAX_MULTIHOST=1 {' '.join(PROGRAM)} cpus={{}} "
        f"path={machine.root}"
    )

    status, _, _ = machine.run(*arguments, CODE="0", SLURM_CPUS_PER_TASK="9")
    assert status == 0
    assert machine.logged() == [step.format(9)]

    status, _, errors = machine.run(*arguments, CODE=str(PREEMPTED_EXIT_CODE))
    assert status == 0
    assert "back to the queue" in errors
    assert machine.logged() == [step.format(""), "scontrol requeue 17"]

    status, _, errors = machine.run(
        *arguments, CODE=str(PREEMPTED_EXIT_CODE), SLURM_RESTART_COUNT="2"
    )
    assert status == PREEMPTED_EXIT_CODE
    assert "was requeued 2 times" in errors
    assert machine.logged() == [step.format("")]

    assert machine.run(*arguments, CODE="137")[0] == 137
    assert machine.logged() == [step.format("")]


def test_a_slurm_job_outlives_the_signal_that_its_run_gets(machine):
    machine.program("srun", 'echo srun >>"$LOG"; sleep 0.5; exit 75\n')
    machine.program("scontrol", 'echo "scontrol $*" >>"$LOG"\n')
    script = str(machine.root / "scripts/launch_slurm.sh")
    process = subprocess.Popen(
        [BASH, script, "--job", str(machine.root), "node", "0", "9", *PROGRAM],
        env={
            "PATH": f"{machine.bin}:{os.environ['PATH']}",
            "LOG": str(machine.log),
            "SLURM_JOB_ID": "17",
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + LIMIT
        while not machine.log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=LIMIT) == 0
    finally:
        process.kill()
        process.wait()
    assert machine.logged() == ["srun", "scontrol requeue 17"]


ASKED = ("--name=dpo", "--project=lab", "--zone", "us-east5-a")
SLICE = ("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot")
QUEUED = "gcloud compute tpus queued-resources"
PLACE = "--project=lab --zone=us-east5-a"
NODE = "gcloud compute tpus tpu-vm"
HOSTS = "--worker=all"


def test_tpu_dry_run_prints_every_command(machine):
    arguments = (*ASKED, *SLICE, "--network=n", "--dry-run", "--", *PROGRAM)
    status, output, errors = machine.run("launch_tpu.sh", *arguments)
    assert (status, errors) == (0, "")
    git_dir = str(machine.root / ".git").replace(" ", "\\ ")

    def quoted(command):
        return re.sub(r"([ &\\])", r"\\\1", command)

    def install(source):
        return quoted(
            "mkdir -p pref_jax && cd pref_jax && git init --quiet && "
            f"git fetch --quiet {source} {machine.commit} && "
            f"git checkout --quiet --detach {machine.commit} && "
            "bash scripts/launch_tpu.sh --on-host install"
        )

    run = quoted(
        "bash pref_jax/scripts/launch_tpu.sh --on-host run "
        "python -m experiments.quickstart --name a\\ b"
    )
    assert output.splitlines() == [
        f"{QUEUED} create dpo --accelerator-type=v6e-16 --node-id=dpo "
        f"--runtime-version=v2-alpha-tpuv6e --spot --network=n {PLACE}",
        f"{QUEUED} describe dpo --format=value\\(state.state\\) {PLACE}",
        f"git --git-dir={git_dir} bundle create --quiet pref_jax.bundle HEAD",
        f"{NODE} scp pref_jax.bundle dpo: {HOSTS} {PLACE}",
        f"{NODE} ssh dpo --command={install('../pref_jax.bundle')} {HOSTS} {PLACE}",
        f"{NODE} ssh dpo --command={run} {HOSTS} {PLACE}",
    ]

    several = ("--type", "v5p", "--topology=2x2x4", "--runtime-version", "r")
    several += ("--num-slices=2", "--git=https://example.org/r.git", "--dry-run")
    status, output, _ = machine.run("launch_tpu.sh", *ASKED, *several, "--", *PROGRAM)
    source = "https://example.org/r.git"
    assert output.splitlines() == [
        f"{QUEUED} create dpo --type=v5p --topology=2x2x4 --node-count=2 "
        f"--node-prefix=dpo --runtime-version=r {PLACE}",
        f"{QUEUED} describe dpo --format=value\\(state.state\\) {PLACE}",
        f"{NODE} ssh dpo-0 --command={install(source)} {HOSTS} {PLACE}",
        f"{NODE} ssh dpo-1 --command={install(source)} {HOSTS} {PLACE}",
        f"{NODE} ssh dpo-0 --command={run} {HOSTS} {PLACE}",
        f"{NODE} ssh dpo-1 --command={run} {HOSTS} {PLACE}",
    ]

    status, output, _ = machine.run("launch_tpu.sh", *ASKED, "--delete", "--dry-run")
    assert output.splitlines() == [f"{QUEUED} delete dpo --force --quiet {PLACE}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Needs --name"),
        (ASKED[:1], "Needs --project"),
        (ASKED[:2], "Needs --zone"),
        (ASKED, "Needs a command after `--`"),
        ((*ASKED, "--", "x"), "Needs --runtime-version"),
        ((*ASKED, SLICE[1], "--", "x"), "Needs either --accelerator-type"),
        ((*ASKED, *SLICE, "--type=v5p", "--", "x"), "Needs either --accelerator-type"),
        ((*ASKED, SLICE[1], "--type=v5p", "--", "x"), "--type and --topology"),
        ((*ASKED, *SLICE, "--num-slices=0", "--", "x"), "1 or more; got `0`"),
        ((*ASKED, *SLICE, "--restarts=x", "--", "x"), "--restarts needs a number"),
        ((*ASKED, "--num-slices"), "--num-slices needs a value"),
        ((*ASKED, "python"), "`python` is no option; the program goes after `--`"),
    ],
)
def test_tpu_arguments_that_make_no_sense_are_errors(machine, arguments, message):
    status, output, errors = machine.run("launch_tpu.sh", *arguments)
    assert (status, output) == (1, "")
    assert message in errors


def test_without_gcloud_the_message_says_what_to_install(machine):
    for tool in ("bash", "dirname", "git"):
        (machine.bin / tool).symlink_to(shutil.which(tool))
    arguments = (*ASKED, *SLICE, "--", "x")
    path = str(machine.bin)
    status, _, errors = machine.run("launch_tpu.sh", *arguments, PATH=path)
    assert status == 1
    assert "There is no gcloud here: install the Google Cloud" in errors


# Answers `describe` with the next line of a file, and is one host by itself.
GCLOUD = """
verb=$4
echo "$verb" >>"$LOG"
case $verb in
  describe)
    state=$(head -n 1 "$HOST/states")
    sed -i 1d "$HOST/states"
    if [ "$state" = none ]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: no such resource" >&2
      exit 1
    elif [ "$state" = denied ]; then
      echo "ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: no" >&2
      exit 1
    fi
    echo "$state" ;;
  scp) cp "$5" "$HOST/$$" && mv "$HOST/$$" "$HOST/${5##*/}" ;;  # two hosts, one folder
  ssh)
    for word in "$@"; do
      case $word in
        --command=*) cd "$HOST" && exec bash -c "${word#--command=}" ;;
      esac
    done ;;
esac
"""
# A Python that makes copies of itself and writes down what pip is asked for.
PYTHON = """
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python" ;;
  "-m pip install"*) echo "pip ${*: -1}" >>"$LOG" ;;
  "-m experiments."*)
    printf 'run %s\\n' "$*" "in $PWD" "multihost=$PREF_JAX_MULTIHOST" >>"$LOG"
    code=$(head -n 1 "$HOST/codes")
    sed -i 1d "$HOST/codes"
    exit "$code" ;;
esac
"""


@pytest.fixture
def cloud(machine):
    """A run of launch_tpu.sh: (states, exit codes of the program) -> (code, errors)."""
    machine.program("gcloud", GCLOUD)
    python = machine.program("python3.12", PYTHON)

    def launch(states, codes, *options):
        (machine.host / "states").write_text("".join(f"{x}\n" for x in states))
        (machine.host / "codes").write_text("".join(f"{x}\n" for x in codes))
        status, _, errors = machine.run(
            "launch_tpu.sh",
            *(*ASKED, *SLICE, *options, "--", *PROGRAM),
            LAUNCH_TPU_POLL="0",
            LAUNCH_TPU_SETTLE="0",
            PYTHON=str(python),
        )
        assert (machine.host / "states").read_text() == "", errors
        return status, errors

    return launch


def test_a_tpu_is_asked_for_filled_and_run(machine, cloud):
    states = ("none", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    status, errors = cloud(states, (0,))
    assert status == 0, errors
    clone = machine.host / "pref_jax"
    assert machine.logged() == [
        *("describe", "create", "describe", "describe", "describe", "scp", "ssh"),
        "pip .[tpu]",
        "ssh",
        f"run {' '.join(PROGRAM[1:])}",
        f"run in {clone}",
        "run multihost=1",
    ]
    head = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    assert subprocess.check_output(head, text=True).strip() == machine.commit
    # The same command again: the TPU and what is installed are there.
    status, errors = cloud(("ACTIVE",), (0,))
    assert status == 0, errors
    assert [line for line in machine.logged() if not line.startswith("run")] == [
        *("describe", "scp", "ssh", "ssh")
    ]


def test_a_preempted_run_is_started_again_on_the_tpu_that_there_is(machine, cloud):
    states = (
        *("ACTIVE", "ACTIVE"),  # preempted by itself, the TPU is still there
        *("SUSPENDING", "SUSPENDED", "none", "ACTIVE"),  # taken away with the run
    )
    status, errors = cloud(states, (PREEMPTED_EXIT_CODE, 255, 0))
    assert status == 0, errors
    verbs = [line for line in machine.logged() if line.split()[0] not in ("run", "pip")]
    assert verbs == [
        *("describe", "scp", "ssh", "ssh"),
        *("describe", "scp", "ssh", "ssh", "describe"),
        *("describe", "delete", "describe", "create", "describe", "scp", "ssh", "ssh"),
    ]
    assert "The run was preempted and saved itself. Starting again; 20" in errors
    assert "The TPU is gone (state SUSPENDING). Starting again; 19" in errors


def test_a_tpu_run_that_fails_or_uses_up_its_restarts_ends(machine, cloud):
    status, errors = cloud(("ACTIVE", "ACTIVE"), (3,))
    assert status == 3
    assert "failed with exit code 3, and the TPU is still there" in errors
    status, errors = cloud(("ACTIVE",), (PREEMPTED_EXIT_CODE,), "--restarts=0")
    assert status == PREEMPTED_EXIT_CODE
    assert "All restarts are used up; the same command continues." in errors
    status, errors = cloud(("denied",), ())
    assert status == 1
    assert "PERMISSION_DENIED" in errors
    status, errors = cloud(("FAILED", "none", "FAILED"), (), "--restarts=1")
    assert status == 1
    machine.logged()


def test_a_copy_that_fails_starts_no_program(machine, cloud):
    machine.program("gcloud", GCLOUD.replace('cp "$5" "$HOST/$$"', "exit 9"))
    status, errors = cloud(("ACTIVE", "ACTIVE"), ())
    assert status == 9
    assert machine.logged() == ["describe", "scp", "describe"]


def test_the_first_slice_that_failed_says_how_the_run_ended(machine, cloud):
    by_slice = 'case "$5" in dpo-0*) exit 0 ;; dpo-1*) exit 4 ;; *) exit 5 ;; esac'
    machine.program("gcloud", GCLOUD.replace("  ssh)", f"  ssh)\n{by_slice}"))
    status, errors = cloud(("ACTIVE", "ACTIVE"), (), "--num-slices=3")
    assert status == 4, errors
    assert sorted(machine.logged()) == [*2 * ["describe"], *3 * ["scp"], *3 * ["ssh"]]


def test_changes_that_are_not_committed_are_named(machine):
    (machine.root / "setup.py").write_text("changed")
    arguments = (*ASKED, *SLICE, "--dry-run", "--", "x")
    status, _, errors = machine.run("launch_tpu.sh", *arguments)
    assert status == 0
    assert f"hosts get commit {machine.commit[:12]}." in errors


def test_a_host_without_a_new_python_gets_one(machine):
    """The images of TPU hosts have Python 3.10."""
    old = 'case "$*" in *"version_info >= (3, 11)"*) exit 1 ;; esac\n'
    managed = machine.program("managed", PYTHON)
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python"):
        machine.program(name, old)
    machine.program(
        "python3",
        f"""{old}
echo "$*" >>"$LOG"
case "$*" in *"uv python find"*) echo "{managed}" ;; esac
""",
    )
    tools = "bash awk cat cksum cp df dirname du head mkdir rm sed tail tee touch uname"
    for tool in tools.split():
        (machine.bin / tool).symlink_to(shutil.which(tool))
    status, _, errors = machine.run(
        *("launch_tpu.sh", "--on-host", "install"), PATH=str(machine.bin)
    )
    assert status == 0, errors
    assert machine.logged() == [
        "-m pip install --quiet --user uv",
        "-m uv python install --quiet 3.12",
        "-m uv python find --managed-python 3.12",
        "pip .[tpu]",
    ]
