"""The examples in docstrings run: all of them, in every module."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("pref_jax", "experiments")
    for path in (ROOT / package).rglob("*.py")
)


def written_examples(source: str) -> int:
    """Counts the examples in all docstrings of a module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented)
    )
    parser = doctest.DocTestParser()
    return sum(len(parser.get_examples(text)) for text in docstrings if text)


def run_examples(module) -> tuple[int, str]:
    """Runs a module's examples: how many ran, and a report of those that failed."""
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=report.append)
    results = runner.summarize(verbose=False)
    # Python 3.13 counts the skipped among the attempted and says how many they are.
    return results.attempted - getattr(results, "skipped", 0), "".join(report)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_examples_of_every_module_run(path):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    ran, failures = run_examples(importlib.import_module(name))
    assert not failures, failures
    # An example that is skipped, or hidden by a decorator, is one that nobody checks.
    written = written_examples((ROOT / path).read_text(encoding="utf-8"))
    assert ran == written, f"{path}: {written} examples are written, {ran} ran"


def test_a_wrong_example_is_reported(tmp_path, monkeypatch):
    source = 'def double(x):\n    """Twice x.\n\n    >>> double(2)\n    5\n    """\n'
    (tmp_path / "wrong_example.py").write_text(source + "    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    ran, failures = run_examples(importlib.import_module("wrong_example"))
    assert ran == written_examples(source + "    return 2 * x\n") == 1
    assert "Expected:\n    5\nGot:\n    4" in failures
