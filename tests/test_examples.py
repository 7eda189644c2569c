"""The notebooks of examples/: as they are committed, and run anew (`make test-docs`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_house import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_clean(path: Path) -> None:
    notebook = json.loads(path.read_text())
    kinds = set()
    for output in outputs(notebook):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        kinds.update(output.get("data", ()))
        assert str(ROOT) not in json.dumps(output) and "/tmp/" not in json.dumps(output)
    assert kinds > {"image/png", "text/html"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of their own, so that all that they need they make."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # tqdm would like a package for its bars
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    committed = [output["output_type"] for output in outputs(notebook)]
    (tmp_path / "examples").mkdir()
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    again = [output["output_type"] for output in outputs(notebook)]
    # The demo's run is made here, and was there when the notebook was committed.
    assert [kind for kind in again if kind != "stream"] == [k for k in committed if k != "stream"]
