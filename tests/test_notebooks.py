"""The notebooks run from top to bottom, on the real SmolLM2-135M and the adapter in `examples/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SECONDS = 300  # for one cell; the whole takes less than a minute on a core of its own


def outputs(name: str) -> list[Any]:
    """Of all cells, in order, of a run in the repository's folder."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def of_kind(found: list[Any], kind: str) -> list[str]:
    return [output.data[kind] for output in found if kind in output.get("data", {})]


def printed(found: list[Any]) -> str:
    return "".join(output.text for output in found if output.get("name") == "stdout")


def test_they_are_kept_without_outputs() -> None:
    """CI makes them; in git every run would be a change of megabytes."""
    files = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [file.name for file in files] == ["quickstart.ipynb", "what_did_my_adapter_learn.ipynb"]
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


def test_quickstart() -> None:
    found = outputs("quickstart.ipynb")
    assert "The capital of France is Paris." in printed(found) and "dial at 0.65: loss" in printed(found)
    assert len(of_kind(found, "image/png")) == 1
    config, report = of_kind(found, "text/html")
    assert "Density dial" in config and "<td>29</td>" in report


def test_what_did_my_adapter_learn() -> None:
    found = outputs("what_did_my_adapter_learn.ipynb")
    assert len(of_kind(found, "image/png")) == 4
    links, page = of_kind(found, "text/html")
    assert "kept by the tree" in links and page.startswith("<iframe sandbox")
    median = float(printed(found).split("median lift ")[1].split(",")[0])
    assert median > 1.5, "heads sort tokens by what they are"
    assert "the tree shows “Harvest”" in printed(found)
