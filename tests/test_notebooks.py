"""Every notebook of the examples runs, is committed without outputs, and shows pictures."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def identify(path):
    return path.stem


def cells(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identify)
def test_a_notebook_is_committed_without_outputs(path):
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identify)
def test_the_cells_of_a_notebook_run_in_order(path, tmp_path, monkeypatch):
    """In one namespace, which needs no Jupyter."""
    pytest.importorskip("sklearn", reason="the notebooks' data is of it")
    pytest.importorskip("matplotlib", reason="the notebooks draw with it")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells(path), 1):
        code = compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec")
        exec(code, namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=identify)
def test_a_notebook_runs_in_jupyter_and_shows_its_pictures(path, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="it runs the notebook")
    pytest.importorskip("ipykernel", reason="the notebook runs in it")
    nbformat = pytest.importorskip("nbformat", reason="it reads the notebook")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code"
        and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert len(shown) >= 2
