"""The tour: every cell runs in a fresh kernel, and its assertions hold."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  its first import may say on stderr that it lists fonts: not in the kernel
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "experiments/tour.ipynb"


@pytest.fixture
def tour() -> nbformat.NotebookNode:
    notebook = nbformat.read(TOUR, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def test_it_runs(tour: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, a warning or an empty figure; in an empty directory and without the user's start-up files."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "here").mkdir()
    NotebookClient(tour, resources={"metadata": {"path": tmp_path / "here"}}).execute()
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    outputs = [(cell, output) for cell in code for output in cell.outputs]
    assert [output.text for _, output in outputs if output.output_type == "stream" and output.name != "stdout"] == []
    drawn = [cell.id for cell, output in outputs if "image/png" in output.get("data", {})]
    assert drawn == [cell.id for cell in code if "plt.show()" in cell.source]
    assert list((tmp_path / "here").iterdir()) == []


def test_it_is_kept_without_outputs(tour: nbformat.NotebookNode) -> None:
    """Times and last digits are those of a machine: kept, they would differ at every commit, or be out of date."""
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count or cell.metadata] == []


def test_what_it_names_is_there(tour: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in tour.cells if cell.cell_type == "markdown")
    experiments = re.findall(r"experiment=(\w+)", text)
    modules = re.findall(r"python -m experiments\.(\w+)", text)
    files = re.findall(r"`([\w/]+\.(?:md|py))`", text)
    assert experiments and modules and files
    assert [name for name in experiments if not (ROOT / "conf/experiment" / f"{name}.yaml").is_file()] == []
    assert [name for name in modules if not (ROOT / "experiments" / f"{name}.py").is_file()] == []
    assert [name for name in files if not (ROOT / name).is_file()] == []
