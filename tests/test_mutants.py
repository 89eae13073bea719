"""scripts/mutants.py: which changes are made, what tests say, and what is recorded."""

import dataclasses
import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tyro

import mutants
import mutations
from mutants import Config

# --- which changes are made -----------------------------------------------------------


def changed(source, mutation=None):
    """Sources of the mutants of one kind, or of all."""
    found = mutations.mutants_of(textwrap.dedent(source), "pref_jax/x.py")
    return [m.source for m in found if mutation in (None, m.mutation)]


@pytest.mark.parametrize(
    ("mutation", "source", "expected"),
    [
        ("sign", "-x - 1", ["x - 1"]),
        ("not", "(not a, ~b)", ["(a, ~b)", "(not a, b)"]),
        ("operator", "a + b", ["a - b"]),
        ("operator", "a - b", ["a + b"]),
        ("operator", "a * b", ["a / b"]),
        ("operator", "a / b", ["a * b"]),
        ("operator", "a ** b", ["a * b"]),
        ("operator", "a & b", ["a | b"]),
        ("operator", "a += b", ["a -= b"]),
        ("update", "a += b", ["pass"]),
        ("comparison", "a < b", ["a <= b", "a >= b"]),
        ("comparison", "a <= b", ["a < b", "a > b"]),
        ("comparison", "a > b", ["a >= b", "a <= b"]),
        ("comparison", "a >= b", ["a > b", "a < b"]),
        ("comparison", "a == b", ["a >= b", "a != b"]),
        ("comparison", "a != b", ["a < b", "a == b"]),
        ("comparison", "a is None", ["a is not None"]),
        ("comparison", "a not in b", ["a in b"]),
        (
            "comparison",
            "0 < a < b",
            ["0 <= a < b", "0 >= a < b", "0 < a <= b", "0 < a >= b"],
        ),
        ("boolean", "a and b", ["a or b"]),
        ("boolean", "a or b", ["a and b"]),
        ("constant", "f(0)", ["f(1)"]),
        ("constant", "f(0.5)", ["f(1.5)", "f(-0.5)"]),
        ("constant", "f(-1)", ["f(-2)"]),  # f(1) is made by `sign`
        ("constant", "f(True)", ["f(False)"]),
        ("constant", "f(None, 'text', ...)", []),
        ("where", "f(x, where=w)", ["f(x)", "f(x, where=~w)"]),
        ("branches", "jnp.where(c, x, y)", ["jnp.where(c, y, x)"]),
        ("branches", "x if c else y", ["y if c else x"]),
        ("arguments", "f(x, y)", ["f(y, x)"]),
        ("arguments", "jnp.maximum(x, y)", []),  # the same
        ("arguments", "f(x, anchor_logps=y)", ["f(y, anchor_logps=x)"]),
        (
            "arguments",
            "f(logps=x, beta=b, anchor_logps=y)",
            ["f(logps=y, beta=b, anchor_logps=x)"],
        ),
        ("arguments", "f(low=x, high=y)", ["f(low=y, high=x)"]),
        ("extreme", "max(x)", ["min(x)"]),
        ("extreme", "jnp.minimum(x, y)", ["jnp.maximum(x, y)"]),
        ("extreme", "x.any(-1)", ["x.all(-1)"]),
        ("log_sigmoid", "jax.nn.log_sigmoid(x)", ["jax.nn.log_sigmoid(-x)"]),
        ("axis", "x.sum(-1)", ["x.sum(0)"]),
        ("axis", "f(x, axis=1)", ["f(x, axis=0)"]),
        ("axis", "f(x, axis=0)", ["f(x, axis=-1)"]),
        ("axis", "x.reshape(-1)", []),
        ("stop_gradient", "jax.lax.stop_gradient(x)", ["x"]),
        (
            "stop_gradient",
            "jax.tree.map(jax.lax.stop_gradient, x)",
            ["jax.tree.map(lambda x: x, x)"],
        ),
        ("slot", "x[..., CHOSEN]", ["x[..., REJECTED]"]),
        ("slot", "x[..., REJECTED]", ["x[..., CHOSEN]"]),
        ("check", "checks.check_bool('where', where)", ["pass"]),
        ("check", "_check_flips(x)", ["pass"]),
        ("check", "x = checks.at_least_float32(x)", ["x = x"]),
        ("error", "if a:\n    raise ValueError(f'{a + 1}')", ["if a:\n    pass"]),
    ],
)
def test_a_mutation_makes_these_sources(mutation, source, expected):
    assert changed(source, mutation) == expected


def test_docstrings_messages_and_annotations_are_not_changed():
    source = '''
        """Module: 1 - 2."""

        def f(x: Literal[1] = 3) -> Literal[2]:
            """Returns -x + 1."""
            name: Literal[4] = f"{x + 1}"
            if x is None:
                raise ValueError(f"{x - 1}" + "a" * 2)
    '''
    before = mutations.printed(textwrap.dedent(source))
    assert changed(source) == [
        before.replace("=3", "=4"),
        before.replace("=3", "=-3"),
        before.replace("is None", "is not None"),
        before.replace("raise ValueError(f'{x - 1}' + 'a' * 2)", "pass"),
    ]


def test_one_source_is_made_once_and_the_original_never():
    assert changed("x.sum(0)") == ["x.sum(-1)", "x.sum(1)"]  # `axis`, `constant`
    assert changed("f(x, x)") == []
    assert changed("f(-1, axis=-1)").count("f(-1, axis=0)") == 1


def test_a_mutant_says_where_it_is():
    source = """
        LIMIT = 1

        def outer(x):
            def inner(y):
                return y[0] + y[0]  # twice
            return inner(x)
    """
    found = mutations.mutants_of(textwrap.dedent(source), "pref_jax/x.py")
    told = [tuple(mutant.place.values())[1:] for mutant in found]
    assert told == [
        ("module", "LIMIT = 1", "constant", "1 -> 2"),
        ("module", "LIMIT = 1", "constant", "1 -> -1"),
        *(
            ("outer.inner", "return y[0] + y[0]  # twice", *rest)
            for rest in (
                ("operator", "y[0] + y[0] -> y[0] - y[0]"),
                ("constant", "y[0] + y[0] -> y[1] + y[0]"),
                ("constant", "y[0] + y[0] -> y[0] + y[1]"),
            )
        ),
    ]
    assert {mutant.file for mutant in found} == {"pref_jax/x.py"}
    x, y = "x" * 40, "y" * 40
    long = mutations.mutants_of(f"{x}[0] * {y}[0] + {x}[0]", "pref_jax/x.py")
    assert [mutant.change for mutant in long if mutant.mutation == "constant"] == [
        f"{x}[0] -> {x}[1]",
        f"{y}[0] -> {y}[1]",
        f"{x}[0] -> {x}[1] (2)",
    ]


# --- what tests say -------------------------------------------------------------------

MATHS = '''
"""Two functions; the tests know one of them better."""

from pref_jax import types


def strong(x):
    return x + types.ONE


def weak(x):
    return x - 0
'''
TESTS = """
from hypothesis import given
from hypothesis import strategies as st

import helper
from pref_jax import rewards


@given(st.integers(5, 9))
def test_strong(x):
    assert rewards.strong(x) == x + helper.ONE


def test_weak():
    rewards.weak(1)
"""
FILE = "pref_jax/rewards.py"
STRONG = {"function": "strong", "line": "return x + types.ONE", "mutation": "operator"}
WEAK = {"function": "weak", "line": "return x - 0"}
STRONG |= {"file": FILE, "change": "x + types.ONE -> x - types.ONE"}
MINUS = WEAK | {"file": FILE, "mutation": "operator", "change": "x - 0 -> x + 0"}
ONE = WEAK | {"file": FILE, "mutation": "constant", "change": "x - 0 -> x - 1"}


@pytest.fixture
def root(tmp_path):
    """A repository with one file of maths and its tests."""
    for path, text in {
        ".pytest.ini": "[pytest]\npythonpath = tests\naddopts=--import-mode=importlib",
        "pref_jax/__init__.py": "",
        "pref_jax/types.py": "ONE = 1\n",
        FILE: MATHS,
        "tests/helper.py": "from pref_jax.types import ONE\n",
        "tests/test_rewards.py": TESTS,
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def lines(root):
    return (root / "runs/mutants.jsonl").read_text().splitlines()


def write_reasons(root, *entries):
    path = root / mutants.EQUIVALENT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True)
    return not state.stdout.startswith(b"Z")  # nobody may have taken note of its end


@pytest.fixture
def no_process(monkeypatch):
    def start(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(mutants, "_Worker", start)


@pytest.mark.slow
def test_a_good_test_catches_a_weak_one_lets_pass(root, capsys, monkeypatch):
    record = mutants.run(Config(jobs=1, confirm=1, write="docs/records"), root)
    assert record["files"] == {
        FILE: {
            "tests": ["tests/test_rewards.py"],
            **{"mutants": 3, "caught": 1, "of_them_stopped": 0},
            **{"equivalent": 0, "gaps": 2},
            "commit": record["environment"]["commit"],
        }
    }
    gaps = [MINUS | {"reason": None}, ONE | {"reason": None}]
    assert record["survivors"] == gaps
    assert record["stale"] == [] and record["confirmed"] == 2
    written = json.loads((root / "docs/records/mutants.json").read_text())
    assert written == record
    assert written["environment"]["versions"]["jax"]
    by = [json.loads(line)["by"] for line in lines(root)]
    assert by == ["tests/test_rewards.py::test_strong", None, None]
    mutants.report(record)
    printed = capsys.readouterr().out
    assert printed.count("gap: {") == 2
    assert f"{FILE}: 1 of 3 caught, 0 equivalent, 2 gaps" in printed

    # Nothing is tested again until the tests or the library change.
    monkeypatch.setattr(mutants.Pool, "run", None)
    write_reasons(
        root,
        MINUS | {"reason": "0 has no sign"},
        STRONG | {"reason": "wrong"},
        ONE | {"line": "return x - 0.0", "reason": "older"},
    )
    record = mutants.run(Config(), root)
    assert record["files"][FILE]["equivalent"] == record["files"][FILE]["gaps"] == 1
    assert [found["reason"] for found in record["survivors"]] == ["0 has no sign", None]
    stale = [(entry["function"], entry["now"]) for entry in record["stale"]]
    assert stale == [("strong", "caught"), ("weak", "gone")]
    assert mutants.run(Config(sample=3), root)["stale"] == []
    for file in ("tests/helper.py", "tests/test_rewards.py", "pref_jax/types.py"):
        text = (root / file).read_text()
        (root / file).write_text(text + "\n")
        with pytest.raises(TypeError, match="not callable"):
            mutants.run(Config(), root)
        (root / file).write_text(text)


def test_an_interrupted_command_goes_on(root, monkeypatch):
    add = mutants.Results.add

    def add_and_interrupt(results, mutant, answer):
        add(results, mutant, answer)
        if len(lines(root)) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(mutants.Results, "add", add_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        mutants.run(Config(jobs=1), root)
    first = lines(root)
    with (root / "runs/mutants.jsonl").open("a") as file:
        file.write(first[0][:20])  # as a kill leaves it
    record = mutants.run(Config(jobs=1), root)
    assert lines(root)[:2] == first and len(lines(root)) == 3
    assert record["files"][FILE]["caught"] == 1


@pytest.mark.slow
def test_one_that_hangs_or_dies_is_caught(root):
    (root / FILE).write_text(
        "import os\n\n\ndef count(n):\n"
        "    while n:\n        n = n - n\n"
        "    if n > 0:\n        os._exit(n)\n"
        "    return n\n"
    )
    (root / "tests/test_rewards.py").write_text(
        "from pref_jax.rewards import count\n\n\n"
        "def test_count():\n    assert count(7) == 0\n"
    )
    record = mutants.run(Config(jobs=1, time_limit=3), root)
    found = [json.loads(line) for line in lines(root)]
    verdicts = {line["place"]["change"]: line["verdict"] for line in found}
    assert verdicts == {
        "n - n -> n + n": "timeout",
        "n > 0 -> n >= 0": "crash",
        "n > 0 -> n <= 0": "crash",
        "n > 0 -> n > 1": "survived",
    }
    assert record["files"][FILE]["caught"] == 3
    assert record["files"][FILE]["of_them_stopped"] == 3


def test_a_process_does_not_outlive_the_command(root):
    code = (
        "import pathlib, sys, mutants\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "worker = mutants._Worker(root, str(root))\n"
        "print(worker._process.pid, flush=True)\n"
        "names = ['file', 'source', 'tests', 'first', 'mention']\n"
        "values = sys.argv[2], 'while 1: pass', [sys.argv[3]], [], ''\n"
        "worker.connection.send(dict(zip(names, values)))\n"
        "worker.connection.poll(1)\n"
        "os = mutants.os\n"
        "os.kill(os.getpid(), mutants.signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(root), FILE, "tests/test_rewards.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    deadline = time.monotonic() + 20
    while is_alive(int(killed.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_tests_that_fail_anyway_are_an_error(root):
    (root / "tests/test_rewards.py").write_text(TESTS + "    assert False\n")
    with pytest.raises(
        ValueError, match="(?s)must pass on .*rewards.py as it is; got 1"
    ):
        mutants.run(Config(jobs=1), root)
    (root / "tests/test_rewards.py").write_text("def test_nothing():\n    pass\n")
    with pytest.raises(ValueError, match="never import pref_jax/rewards.py"):
        mutants.run(Config(jobs=1), root)
    assert lines(root) == [] if (root / "runs/mutants.jsonl").exists() else True


def test_a_file_without_tests_is_an_error(root, no_process):
    (root / "tests/test_rewards.py").unlink()
    with pytest.raises(
        ValueError, match="no tests: there is none of tests/test_rewards"
    ):
        mutants.run(Config(), root)
    with pytest.raises(ValueError, match="names pref_jax/x.py, and there is no such"):
        mutants.run(Config(files=("pref_jax/x.py",)), root)


@pytest.mark.slow
def test_a_result_that_a_fresh_process_does_not_find_is_told(root):
    found = mutants.find_mutants(root)
    before = (root / FILE).read_text()
    (root / "tests/test_types.py").write_text(TESTS)
    other = mutants.find_mutants(root, ["pref_jax/types.py"])[0]
    right = [(found[0], True), (other, False), (found[1], False)]
    assert mutants.confirm(root, right) == []
    others = mutants.confirm(root, [(found[0], False), (found[1], True)])
    assert [re.search(r"exit code \d", line)[0] for line in others] == [
        "exit code 1",
        "exit code 0",
    ]
    assert (root / FILE).read_text() == before


def test_tests_that_failed_before_come_first(root):
    found = mutants.find_mutants(root)
    results = mutants.Results(root / "runs/x.jsonl", {FILE: "now"})
    same = [dataclasses.replace(found[0], change=str(i)) for i in range(4)]
    for mutant, by in zip(same, ("a", "b", "b", None), strict=True):
        results.add(mutant, {"code": int(by is not None), "by": by, "seconds": 1})
    assert results.first_tests(same[0])[:2] == ["a", "b"]
    assert results.first_tests(same[3])[0] == "b"
    assert results.first_tests(found[1]) == []
    # Of another state of the library, they are still the best guess.
    older = mutants.Results(root / "runs/x.jsonl", {FILE: "then"})
    assert older.get(same[0]) is None and older.first_tests(same[0])[0] == "a"


def test_an_equivalent_needs_a_reason(root):
    write_reasons(root, MINUS | {"reason": ""})
    with pytest.raises(ValueError, match="needs file, .*, change and a reason"):
        mutants.read_reasons(root)


def test_a_file_has_the_tests_of_its_place_and_shared_ones():
    assert mutants.tests_of("pref_jax/targets.py") == ("tests/test_targets.py",)
    every = ("losses/test_all_losses.py", "losses/test_outside_values.py")
    every = tuple(f"tests/{name}" for name in every)
    own = ("tests/losses/test_listwise.py", *every)
    assert mutants.tests_of("pref_jax/losses/listwise.py") == own
    others = ("tests/losses/test_entries.py", *every, "tests/losses/test_pairwise.py")
    assert mutants.tests_of("pref_jax/losses/entries.py") == others


def test_files_that_were_looked_at_again_take_the_place_of_their_old_figures():
    def record(commit, files, survivors):
        return {
            "files": {file: {"mutants": n, "commit": commit} for file, n in files},
            "survivors": [{"file": file, "line": commit} for file in survivors],
            "stale": [{"file": file, "now": commit} for file in survivors],
            "environment": {"commit": commit},
        }

    old = record("old", [("a", 1), ("b", 2), ("c", 3)], ["a", "b", "b", "c"])
    new = record("new", [("b", 5), ("d", 4)], ["b"])
    found = mutants._joined(old, new)
    assert list(found["files"]) == ["a", "b", "c", "d"]
    assert [counts["commit"] for counts in found["files"].values()] == [
        *("old", "new", "old", "new")
    ]
    assert found["files"]["b"]["mutants"] == 5
    expected = [("a", "old"), ("c", "old"), ("b", "new")]
    assert [(x["file"], x["line"]) for x in found["survivors"]] == expected
    assert [(x["file"], x["now"]) for x in found["stale"]] == expected
    assert found["environment"] == {"commit": "new"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"write": "x", "sample": 3}, "mutants of a file; leave out `sample`"),
        ({"sample": 0}, "`sample` must be at least 1; got 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_commands_of_the_page_and_the_docstring_are_understood(pytestconfig):
    page = (pytestconfig.rootpath / "docs/testing.md").read_text()
    commands = re.findall(r"(?m)^ +python scripts/mutants.py( .*?)(?:   .*)?$", page)
    commands += re.findall(
        r"(?m)^ +python scripts/mutants.py( .*?)(?:   .*)?$", mutants.__doc__
    )
    assert len(commands) == 6
    for command in commands:
        tyro.cli(Config, args=shlex.split(command))


@pytest.mark.parametrize("module", [mutants, mutations])
def test_examples_run(module):
    failed, ran = doctest.testmod(module)
    assert ran and not failed
