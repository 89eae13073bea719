"""A command given again continues its run; a finished or foreign one is not touched."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from pref_jax.train import run as run_lib
from pref_jax.train.run import (
    CONFIG_FILE,
    RECORD_FILE,
    RunFolderError,
    environment,
    open_run,
    parse_config,
    write_json,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = {"beta": 0.1, "train": {"steps": 10, "sizes": (4, 8)}}
OTHER = {"beta": 0.5, "train": {"steps": 10, "sizes": (4, 8)}}


def open_and_close(root, config=CONFIG, name=None):
    with open_run(str(root), config=config, name=name) as folder:
        return folder


def finish(folder):
    write_json(folder / RECORD_FILE, {})


# --- which folder ---------------------------------------------------------------------


def test_a_new_run_describes_itself(tmp_path):
    folder = open_and_close(tmp_path / "runs" / "tiny")
    assert folder == tmp_path / "runs" / "tiny" / "001"
    saved = json.loads((folder / CONFIG_FILE).read_text())
    assert saved["config"] == {"beta": 0.1, "train": {"steps": 10, "sizes": [4, 8]}}
    assert saved["environments"] == [environment()]


def test_the_unfinished_run_of_the_same_config_is_continued(tmp_path):
    first = open_and_close(tmp_path)
    before = json.loads((first / CONFIG_FILE).read_text())
    assert open_and_close(tmp_path) == first
    after = json.loads((first / CONFIG_FILE).read_text())
    assert (before.pop("starts"), after.pop("starts")) == (1, 2)
    assert after == before
    assert run_lib.count_starts(first) == 2


def test_every_environment_that_a_run_was_continued_in_is_kept(tmp_path, monkeypatch):
    folder = open_and_close(tmp_path)
    first = environment()
    other = first | {"commit": "another"}
    monkeypatch.setattr(run_lib, "environment", lambda: other)
    for _ in range(2):
        assert open_and_close(tmp_path) == folder
    saved = json.loads((folder / CONFIG_FILE).read_text())
    assert saved["environments"] == [first, other]


def test_a_finished_run_gets_a_successor(tmp_path):
    first = open_and_close(tmp_path)
    finish(first)
    second = open_and_close(tmp_path)
    assert (first.name, second.name) == ("001", "002")
    assert open_and_close(tmp_path) == second


def test_a_run_of_another_config_is_left_alone(tmp_path):
    first, second = open_and_close(tmp_path), open_and_close(tmp_path, OTHER)
    assert (first.name, second.name) == ("001", "002")
    assert open_and_close(tmp_path) == first
    assert open_and_close(tmp_path, OTHER) == second


def test_numbers_go_on_after_the_highest_and_names_are_no_numbers(tmp_path):
    finish(open_and_close(tmp_path, name="012"))
    open_and_close(tmp_path, name="best")
    assert open_and_close(tmp_path).name == "013"


def test_a_named_run_is_made_and_continued(tmp_path):
    first = open_and_close(tmp_path, name="mine")
    assert first == tmp_path / "mine" and (first / CONFIG_FILE).is_file()
    assert open_and_close(tmp_path, name="mine") == first


def test_a_named_run_with_another_config_is_refused_by_field(tmp_path):
    open_and_close(tmp_path, name="mine")
    other = {"beta": 0.5, "train": {"steps": 20, "sizes": (4, 8)}}
    with pytest.raises(RunFolderError) as raised:
        open_and_close(tmp_path, other, name="mine")
    message = str(raised.value)
    assert (
        "another config: beta: saved 0.1, now 0.5; train.steps: saved 10, now 20."
        in (message)
    )
    assert "sizes" not in message and "--name" in message


def test_what_is_put_aside_may_change_when_a_run_is_continued(tmp_path):
    def opened(config, **options):
        with open_run(str(tmp_path), config=config, aside=("shown",), **options) as at:
            return at.name

    assert opened({"a": 1, "shown": None}) == "001"
    assert opened({"a": 1, "shown": "here"}) == "001"
    assert opened({"a": 2, "shown": None}) == "002"
    assert opened({"a": 1}, name="mine") == opened({"a": 1, "shown": 3}, name="mine")
    with pytest.raises(RunFolderError, match="a: saved 1, now 2"):
        opened({"a": 2, "shown": None}, name="mine")


def test_a_field_that_the_saved_config_lacks_is_a_difference(tmp_path):
    open_and_close(tmp_path, name="mine")
    with pytest.raises(RunFolderError, match="new"):
        open_and_close(tmp_path, CONFIG | {"new": None}, name="mine")


def test_a_finished_named_run_is_refused(tmp_path):
    finish(open_and_close(tmp_path, name="mine"))
    with pytest.raises(RunFolderError, match="mine is finished; give another --name"):
        open_and_close(tmp_path, name="mine")


def test_a_run_in_use_is_left_alone(tmp_path):
    with open_run(str(tmp_path), config=CONFIG) as first:
        with open_run(str(tmp_path), config=CONFIG) as second:
            assert (first.name, second.name) == ("001", "002")
        with pytest.raises(RunFolderError, match="001 is in use by another process"):
            open_and_close(tmp_path, name="001")
    finish(second)
    assert open_and_close(tmp_path) == first


def test_of_two_unfinished_runs_the_later_is_continued(tmp_path):
    with open_run(str(tmp_path), config=CONFIG):
        later = open_and_close(tmp_path)
    assert later.name == "002"
    assert open_and_close(tmp_path) == later


def test_a_run_is_let_go_of_when_its_block_fails(tmp_path):
    with pytest.raises(KeyError), open_run(str(tmp_path), config=CONFIG) as first:
        raise KeyError
    assert open_and_close(tmp_path) == first


def test_a_killed_process_lets_go_of_its_run(tmp_path):
    program = (
        "import json, sys, time\n"
        "from pref_jax.train.run import open_run\n"
        "with open_run(sys.argv[1], config=json.loads(sys.argv[2])) as folder:\n"
        "    print(folder.name, flush=True)\n"
        "    time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(CONFIG)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "001\n"
            second = open_and_close(tmp_path)
            assert second.name == "002"
        finally:
            process.send_signal(signal.SIGKILL)
    finish(second)
    assert open_and_close(tmp_path).name == "001"


def test_a_kill_while_the_config_is_written_spoils_no_later_run(tmp_path, monkeypatch):
    write_text = pathlib.Path.write_text

    def killed(path, text):
        write_text(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "write_text", killed)
        open_and_close(tmp_path)
    folder = open_and_close(tmp_path)
    assert json.loads((folder / CONFIG_FILE).read_text())["config"]["beta"] == 0.1


# --- what ran -------------------------------------------------------------------------


def run_as(monkeypatch, *argv, module=None):
    spec = None if module is None else type("Spec", (), {"name": module})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", list(argv))


def test_the_environment_says_what_ran(monkeypatch):
    run_as(monkeypatch, "/opt/quickstart.py", "--beta", "0.1", "--note", "two words")
    found = environment()
    assert found["command"] == "python quickstart.py --beta 0.1 --note 'two words'"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "flax", "optax", "numpy"} <= found["versions"].keys()
    assert (found["device"], found["processes"]) == ("8 x cpu", 1)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_says_whether_the_code_is_committed(tmp_path, monkeypatch):
    module = tmp_path / "run.py"
    module.write_text("")
    monkeypatch.setattr(run_lib, "__file__", str(module))
    # A checkout above the folder of the tests would be found.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] == "unknown: not a git checkout"
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one")):
        subprocess.run(["git", *author, *command], cwd=tmp_path, check=True)
    commit = environment()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    module.write_text("changed = True\n")
    assert environment()["commit"] == f"{commit} with uncommitted changes"


def test_a_module_is_named_as_it_was_run(monkeypatch):
    run_as(monkeypatch, "quickstart.py", "--x", module="experiments.quickstart")
    assert environment()["command"] == "python -m experiments.quickstart --x"


def test_the_environment_has_no_path_and_no_host_name(monkeypatch):
    here = str(pathlib.Path.cwd())
    run_as(
        monkeypatch,
        f"{here}/quickstart.py",
        *("--data", f"{here}/pairs.jsonl", f"--root={here}/runs", "--model", "my/dir"),
    )
    text = json.dumps(environment())
    assert here not in text and str(pathlib.Path.home()) not in text
    assert socket.gethostname() not in text
    for word in ("quickstart.py", "pairs.jsonl", "--root=", "my/dir"):
        assert word in text


def test_a_path_below_the_home_folder_is_cut_to_its_name(monkeypatch):
    run_as(monkeypatch, "quickstart.py", "--data=~/secret/a.jsonl", "~/secret/b")
    assert environment()["command"] == "python quickstart.py --data=a.jsonl b"


def test_json_is_strict_and_replaced_in_one_move(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"loss": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": math.nan})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


# --- command line ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Train:
    """How to train."""

    num_steps: int = 10  # updates
    shift: float = 0.0  # of nothing


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    train: Train
    beta: float = 0.1  # reward per nat
    name: str | None = None  # of the run


SMOKE = Config(train=Train(num_steps=2))
PRESETS = {"smoke": SMOKE, "small": dataclasses.replace(SMOKE, beta=0.3)}


def parse(*args):
    return parse_config(PRESETS, default="small", description="A test.", args=args)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), PRESETS["small"]),
        (("--preset", "smoke"), SMOKE),
        (("--preset=smoke",), SMOKE),
        (("--beta", "2"), dataclasses.replace(PRESETS["small"], beta=2.0)),
        (
            ("--train.num-steps", "7", "--preset", "smoke", "--name", "mine"),
            Config(train=Train(num_steps=7), name="mine"),
        ),
        (
            ("--preset", "smoke", "--train.shift", "-0.5"),
            Config(train=Train(num_steps=2, shift=-0.5)),
        ),
    ],
)
def test_a_preset_is_read_first_and_every_field_can_be_given(args, expected):
    assert parse(*args) == expected


def test_the_programs_own_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--beta", "0.7"])
    config = parse_config(PRESETS, default="smoke", description="A test.")
    assert config == dataclasses.replace(SMOKE, beta=0.7)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--bta", "2"), ("--bta", "--beta")),
        (("--train.num-step", "2"), ("--train.num-step", "--train.num-steps")),
        (("--beta", "much"), ("--beta", "much")),
        (("--preset", "huge"), ("huge", "smoke", "small")),
        (("--pre", "smoke"), ("--pre",)),
        (("stray",), ("stray",)),
    ],
)
def test_what_is_not_known_ends_the_program_with_the_nearest_name(args, words, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(*args)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.out + printed.err


def test_help_shows_the_presets_and_the_chosen_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--preset", "smoke", "--help")
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    for word in ("A test.", "--preset {smoke,small}", "reward per nat", "0.1", "2"):
        assert word in printed
