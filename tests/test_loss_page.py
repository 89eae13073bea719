"""docs/losses.md says what the docstrings say, and each says what was checked."""

import inspect
import re

import pytest

from pref_jax import losses
from scripts import loss_page

LOSSES = [
    value
    for value in (getattr(losses, name) for name in losses.__all__)
    if inspect.isfunction(value)
]


def test_the_page_is_what_the_docstrings_say(monkeypatch):
    monkeypatch.setattr("sys.argv", ["loss_page.py", "--check"])
    loss_page.main()


def test_a_page_that_is_behind_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(loss_page, "PAGE", tmp_path / "losses.md")
    monkeypatch.setattr("sys.argv", ["loss_page.py", "--check"])
    with pytest.raises(SystemExit, match=r"run `python scripts/loss_page.py`"):
        loss_page.main()
    monkeypatch.setattr("sys.argv", ["loss_page.py"])
    loss_page.main()
    page = (tmp_path / "losses.md").read_text()
    (tmp_path / "losses.md").write_text(page.replace("log s(", "log (", 1))
    monkeypatch.setattr("sys.argv", ["loss_page.py", "--check"])
    with pytest.raises(SystemExit, match="not up to date"):
        loss_page.main()


def test_the_page_holds_every_loss():
    page = loss_page.page()
    headings = re.findall(r"^### `(\w+)`$", page, re.MULTILINE)
    names = {function.__name__ for function in LOSSES}
    assert names <= set(headings)
    assert len(headings) == len(set(headings))
    assert all(f"](#{name})" in page for name in names)
    # The table of what methods are made of, as it stands in the module.
    assert "\nGRPO         of tokens " in page


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_every_loss_says_where_it_is_from_and_what_was_checked(function):
    entry = loss_page.read_entry(function)
    assert any(paragraph.startswith("```") for paragraph in entry.body)
    assert {"Source", "Checked"} <= set(entry.labels)


@pytest.mark.parametrize(
    ("library", "files", "least"),
    [("TRL 1.16.0", "*trl*.py", 20), ("rlax 0.1.9", "test_rlax.py", 7)],
)
def test_what_is_said_to_agree_is_compared(pytestconfig, library, files, least):
    folder = pytestconfig.rootpath / "tests" / "parity"
    compared = "".join(path.read_text() for path in folder.glob(files))
    named = [
        function.__name__
        for function in LOSSES
        if library in loss_page.read_entry(function).labels["Checked"]
    ]
    assert len(named) >= least
    assert [name for name in named if not re.search(rf"\b{name}\b", compared)] == []


def test_a_docstring_is_taken_apart():
    def loss(rewards, *, beta, where=None):
        """Line.

            loss = beta *
                   rewards

        More
        text.

        Source: A,
        B.
        Reduces to: c.

        Args:
          rewards: x.
        """

    entry = loss_page.read_entry(loss)
    assert entry.summary == "Line."
    assert entry.signature == "loss(rewards, *, beta, where=None)"
    assert entry.body == ("```\nloss = beta *\n       rewards\n```", "More text.")
    assert entry.labels == {"Source": "A, B.", "Reduces to": "C."}


def test_a_label_in_the_middle_of_a_paragraph_is_an_error():
    def loss():
        """Line.

        Text.
        Source: A.
        """

    with pytest.raises(ValueError, match="loss: labels begin a paragraph of their own"):
        loss_page.read_entry(loss)
    loss.__doc__ = None
    with pytest.raises(ValueError, match="loss has no docstring"):
        loss_page.read_entry(loss)
