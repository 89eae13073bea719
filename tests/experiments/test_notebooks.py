"""The notebooks run from top to bottom, and print what they printed when stored."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def printed(notebook) -> list[str]:
    """What each cell prints."""
    return [
        "".join(
            output.text for output in cell.outputs if output.output_type == "stream"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def run(notebook):
    """A copy of the notebook, executed in a fresh kernel."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(copy, timeout=300, resources=resources).execute()
    return copy


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_stored(path):
    stored = nbformat.read(path, as_version=4)
    executed = run(stored)
    assert printed(executed) == printed(stored)
    drawn = [
        "image/png" in output.get("data", {})
        for notebook in (stored, executed)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert sum(drawn) >= 2


def test_a_cell_that_fails_is_seen():
    cells = [nbformat.v4.new_code_cell("print(1)"), nbformat.v4.new_code_cell("1 / 0")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivision"):
        run(nbformat.v4.new_notebook(cells=cells))
