"""The notebooks: stored without outputs, like their text twins, and each runs from top to bottom."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 600

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_each_source_has_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in sorted((ROOT / "notebooks").glob("*.py"))]


@each
def test_is_stored_without_outputs_and_says_what_its_source_says(path):
    notebook, source = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, source)]
    assert cells[0] == cells[1], f"run: jupytext --to ipynb --update notebooks/{path.stem}.py"


def test_badges_open_their_notebooks_once_the_owner_is_known(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("runs"))
    (command,) = re.findall(r"(?m)^sed .*$", (ROOT / "notebooks/README.md").read_text())
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    table = (tmp_path / "notebooks/README.md").read_text()
    for path in NOTEBOOKS:
        badge = f"https://colab.research.google.com/github/YOU/YOURS/blob/main/notebooks/{path.name}"
        source = (tmp_path / f"notebooks/{path.stem}.py").read_text()
        first, install, *_ = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4).cells
        assert badge in first.source and badge in table and badge in source
        assert 'REPO = "https://github.com/YOU/YOURS"' in install.source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, as on one's own machine: what one notebook has made the next one finds."""
    return tmp_path_factory.mktemp("notebooks")


@each
def test_runs_from_top_to_bottom(path, folder, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a CPU has; the notebook on sharding asks for more itself
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
        monkeypatch.setenv(name.upper(), str(getattr(jax.config, name)))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources=resources).execute()
    if looked_at := os.environ.get("NANOCHAT_EXECUTED"):  # a folder, for those who want to see what the cells show
        nbformat.write(notebook, Path(looked_at) / path.name)
