"""A process that runs tests on one mutant after another; `mutants.py` starts it.

    python scripts/mutant_worker.py ROOT FILE_DESCRIPTOR

jax is loaded once and keeps what it compiled. For every mutant, pref_jax and the tests
are loaded anew: the mutated module from a string, all else from its file. A request is
a dictionary of

    file      the mutated file, relative to ROOT
    source    its text
    tests     the test files
    first     names of tests to begin with
    mention   begin, after those, with tests that have this in their names

and so is the answer:

    code      pytest's exit code, 0 if all tests passed
    by        the first test that failed, or "collection"
    loaded    whether the tests imported the file
    output    what pytest printed
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import pathlib
import sys
import threading
import time
from multiprocessing.connection import Connection

import hypothesis
import pytest

_OPTIONS = ("-x", "-q", "--tb=no", "--assert=plain", "-m", "not slow")
_WITHOUT = (
    "cacheprovider",
    "xdist",
    "unraisableexception",
)  # the last collects garbage


class _Mutated(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Finds and loads one module: a file with another text."""

    def __init__(self, root: pathlib.Path, file: str, source: str):
        name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        super().__init__(name, str(root / file))
        self.source, self.loaded = source, False

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return importlib.util.spec_from_file_location(
                fullname, self.path, loader=self
            )
        return None

    def get_code(self, fullname):
        self.loaded = True
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Run:
    """A pytest plugin: which tests come first, and which failed."""

    def __init__(self, first: list[str], mention: str):
        self.first, self.mention, self.by = first, mention, None

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        # As in any run of the tests, but a failure is enough: it is not made small.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        settings = hypothesis.settings(phases=phases, database=None)
        hypothesis.settings.register_profile("mutants", settings)
        hypothesis.settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items):
        rank = {name: i for i, name in enumerate(self.first)}
        last = len(rank)
        items.sort(
            key=lambda x: rank.get(x.nodeid, last + (self.mention not in x.nodeid))
        )

    def pytest_collectreport(self, report):
        if report.failed:
            self.by = self.by or "collection"

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.by = self.by or report.nodeid


def _forget(root: pathlib.Path) -> None:
    """Unload pref_jax and the tests; conftest.py stays, for jax is set up only once."""
    for name, module in list(sys.modules.items()):
        path = pathlib.Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(root) and path.name != "conftest.py":
            if path.relative_to(root).parts[0] in ("pref_jax", "tests"):
                del sys.modules[name]


def answer(root: pathlib.Path, request: dict) -> dict:
    """Run the tests of one request."""
    _forget(root)
    mutated = _Mutated(root, request["file"], request["source"])
    run = _Run(request["first"], request["mention"])
    output = io.StringIO()
    options = [*_OPTIONS, *(f"-pno:{name}" for name in _WITHOUT)]
    sys.meta_path.insert(0, mutated)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = pytest.main([*request["tests"], *options], plugins=[run])
    finally:
        sys.meta_path.remove(mutated)
    return {
        "code": int(code),
        "by": run.by,
        "loaded": mutated.loaded,
        "output": output.getvalue(),
    }


def _end_with(parent: int) -> None:
    """End this process when that one is gone, even in the middle of an endless loop."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer until the other side is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    root, connection = pathlib.Path(sys.argv[1]), Connection(int(sys.argv[2]))
    os.chdir(root)
    sys.path.insert(0, str(root))
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send("ready")
        while True:
            connection.send(answer(root, connection.recv()))


if __name__ == "__main__":
    main()
