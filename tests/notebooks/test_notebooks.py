"""The notebooks are what people run first: they are clean, and they work from a clean kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

MOST_SECONDS_A_CELL = 540
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PLACES = re.compile(r"(?<![\w.])/(home|root|tmp|work|mnt|var|opt|usr|Users|content)/|[A-Z]:\\")


def read(path: Path) -> Any:
    nbformat = pytest.importorskip("nbformat")  # here, for its import takes seconds of every worker's time
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "hidden_states",
        "live_pipeline",
        "lora_style",
        "prompt_tuning",
        "quickstart",
    ]


@each_notebook
def test_it_is_valid_and_begins_with_a_title(path: Path) -> None:
    notebook = read(path)
    pytest.importorskip("nbformat").validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


@each_notebook
def test_nothing_of_a_run_is_kept(path: Path) -> None:
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@each_notebook
def test_no_machines_paths_are_in_it(path: Path) -> None:
    # /content is Colab's own: a notebook that names it runs nowhere else.
    assert not _PLACES.search("\n".join(cell.source for cell in read(path).cells))


@each_notebook
def test_the_first_cell_installs_what_the_project_offers(path: Path) -> None:
    first = code_of(read(path))[0]
    assert 'if importlib.util.find_spec("swarmkit") is None:\n    assert WHEEL' in first
    found = re.search(r'%pip install -q "([\w-]+)\[([\w,]+)\] @ \{place\}"', first)
    assert found is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found[1] == project["name"]
    assert all(project["optional-dependencies"].get(extra) for extra in found[2].split(","))


@each_notebook
def test_the_second_cell_joins_a_swarm_or_starts_one(path: Path) -> None:
    second = code_of(read(path))[1]
    assert "LocalSwarm(" in second
    if path.stem != "live_pipeline":  # which needs servers that it may end
        assert "\nINITIAL_PEERS = []" in second
        assert '.from_pretrained("tiny-chat", initial_peers=INITIAL_PEERS)' in second


@pytest.mark.notebook
@pytest.mark.timeout(900)
@each_notebook
def test_it_runs_from_a_clean_kernel(path: Path, tmp_path: Path) -> None:
    """Its own checks are `assert`s in its cells; where one fails, this fails with what that cell said."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = read(path)
    # This interpreter's kernel, whatever kernels somebody has installed under the same name.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    # Nothing of this user's IPython, and no network but this machine's own.
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "HF_HUB_OFFLINE": "1"}
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    client = NotebookClient(
        notebook, km=kernel, timeout=MOST_SECONDS_A_CELL, resources={"metadata": {"path": str(cwd)}}
    )
    failure = ""
    try:
        client.execute(env=environment, cleanup_kc=True)
    except CellExecutionError as error:
        failure = _COLOURS.sub("", str(error))
    if failure:  # told here, where Python adds no tale of nbclient's own
        pytest.fail(failure, pytrace=False)
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    drawn = {"image/png", "image/svg+xml"}
    assert any(drawn & set(out.get("data", {})) for out in outputs), "it has drawn nothing"
    assert not list(cwd.iterdir()), "it has left files behind"
