"""The tree is formatted and linted, and speaks of no one machine."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The brackets keep these lines from matching themselves.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.\-])/(?:[w]ork|[r]oot|[h]ome|[U]sers)/"  # absolute paths
    r"|\b[C]:\\"
    r"|://[^/\s]*(?:[a]rtifactory|[n]exus|[r]egistry|[m]irror|[l]ocalhost)"  # indexes
    r"|://[^/\s]*\.(?:internal|local|lan|corp)\b"  # names that resolve inside alone
)


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="needs ruff")
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_the_tree_passes_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    process = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_no_file_speaks_of_one_machine(tracked_files):
    found = []
    for path in tracked_files:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture, or a file that is about to be removed
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{path}:{i}: {s}" for i, s in lines if OF_ONE_MACHINE.search(s)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("cd " + "/" + "home/someone/pref_jax", True),
        ("--data=" + "/" + "work/pairs.jsonl", True),
        ("https://pypi" + ".internal/simple", True),
        ("http://" + "mirror.example.org/simple", True),
        ("https://example.org/home/page", False),
        ("runs/work/metrics.jsonl", False),
        ("class Slot(threading.local):", False),
    ],
)
def test_words_of_one_machine_are_found(text, matches):
    assert bool(OF_ONE_MACHINE.search(text)) == matches
