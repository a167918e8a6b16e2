"""The notebook runs from top to bottom, and its two forms say the same."""

from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MAX_CODE_CELLS = 10


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_both_forms_agree(source):
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(stored) == cells(jupytext.read(source)), f"run: jupytext --sync {source.relative_to(ROOT)}"


def test_notebook_is_short_and_names_its_kernel(source):
    notebook = jupytext.read(source)
    assert sum(kind == "code" for kind, _ in cells(notebook)) <= MAX_CODE_CELLS
    assert notebook.metadata.kernelspec.name == "python3"


def test_stored_outputs_are_small_and_free_of_errors(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert source.with_suffix(".ipynb").stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Jupyter is migrating its paths:DeprecationWarning")  # jupyter_core before 5.9
def test_notebook_runs(source):
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the figure is missing"
