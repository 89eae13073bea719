"""Commands and examples of README and docs run; its links lead somewhere."""

import contextlib
import io
import json
import re
import shlex

import pytest
import tyro

from experiments import quickstart
from pref_jax.train.run import parse_config
from scripts import convert_checkpoint, score_responses

PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/your_data.md",
    "docs/evaluation.md",
    "docs/benchmarks.md",
    "docs/checkpoints.md",
    "docs/losses.md",
    "docs/testing.md",
    "docs/adpo.md",
)


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_examples_run(pytestconfig):
    ran = 0
    for page in PAGES:
        for code in blocks((pytestconfig.rootpath / page).read_text(), "python"):
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(compile(code, page, "exec"), {})
            assert shown.getvalue()
            ran += 1
    assert ran >= 2


def commands_of_pages(root):
    commands = []
    for page in PAGES:
        for code in blocks((root / page).read_text(), "bash"):
            joined = code.replace("\\\n", " ")
            commands += [shlex.split(x, comments=True) for x in joined.splitlines()]
    return commands


@pytest.mark.parametrize("script", [convert_checkpoint, score_responses])
def test_commands_of_scripts_name_real_fields(pytestconfig, script):
    name = f"scripts/{script.__name__.rpartition('.')[2]}.py"
    found = [c for c in commands_of_pages(pytestconfig.rootpath) if name in c]
    assert found
    for command in found:
        assert command[:2] == ["python", name]
        tyro.cli(script.Config, args=command[2:])


def test_quickstart_commands_name_real_fields(pytestconfig):
    commands = commands_of_pages(pytestconfig.rootpath)
    prefixes = (
        ["bash", "scripts/quickstart.sh"],
        ["python", "-m", "experiments.quickstart"],
    )
    checked = 0
    for command in commands:
        for prefix in prefixes:
            if command[: len(prefix)] == prefix:
                parse_config(
                    quickstart.PRESETS,
                    default="small",
                    description="",
                    args=command[len(prefix) :],
                )
                checked += 1
    assert checked >= 4


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_exist(pytestconfig, page):
    path = pytestconfig.rootpath / page
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    local = [target for target in targets if not target.startswith("https://")]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert not missing


def test_json_examples_are_rows(pytestconfig):
    from pref_jax.data import records

    text = (pytestconfig.rootpath / "docs/your_data.md").read_text()
    rows = [
        json.loads(line) for code in blocks(text, "json") for line in code.splitlines()
    ]
    assert len(records.from_objects(rows[:1])) == 1
    assert len(rows) >= 2
