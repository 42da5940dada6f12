"""The live views in Notebook 7, in marimo, with ipywidgets 7, and on pages without widgets.

`make front-ends` installs these below build/, as no environment could hold all of them; without it, the tests
say what they lack. docs/views.md has the table of what works where.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..waiting import wait_until
from .conftest import free_port

pytest.importorskip("nbformat")
pytest.importorskip("anywidget")

import nbformat

from .lab import START, Lab, run, run_all, view

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"

TWO_VIEWS = [
    START,
    "model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)[0].tolist()",
    "PipelineView(model, swarm)",
    "SwarmView(swarm)",
]


def installed(name: str) -> Path:
    """The folder with a front end of its own; the test is skipped where it is not installed."""
    folder = BUILD / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder.relative_to(ROOT)}; `make front-ends` installs it")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with which Python takes packages of a folder first."""
    paths = [str(folder), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    shared = str(folder / "share" / "jupyter")
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JUPYTER_PATH": shared}


def executed(cells: list[str], kernel: str) -> Any:
    """A notebook that was run, with the state of its widgets."""
    nbclient = pytest.importorskip("nbclient")
    code = [nbformat.v4.new_code_cell(cell) for cell in (*cells, "swarm.close()")]
    notebook = nbformat.v4.new_notebook(cells=code)
    return nbclient.NotebookClient(
        notebook, kernel_name=kernel, timeout=300, store_widget_state=True
    ).execute()


# Notebook 7


@pytest.fixture
def notebook_7(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, "notebook", "notebooks", environment(installed("notebook-7")))
    yield lab
    lab.close()


@pytest.mark.timeout(600)
def test_notebook_7_shows_a_view_and_its_buttons_work(
    notebook_7: Lab, page: Any, screenshot: Callable[..., None]
) -> None:
    notebook_7.open(page, TWO_VIEWS)
    run_all(page)
    shown = view(page)
    shown.get_by_role("button", name="Kill server-0").click()
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('✕')")
    run(page, "assert not swarm.servers[0].alive; swarm.close()")
    screenshot(page)


# marimo

MARIMO_APP = """
import marimo

app = marimo.App()


@app.cell
def _():
    import torch

    torch.set_num_threads(1)
    from swarmkit import LocalSwarm
    from swarmkit.notebook import PipelineView

    swarm = LocalSwarm("tiny-chat", num_stages=2, replicas=2, transport="memory").start()
    model, tokenizer = swarm.model(), swarm.tokenizer()
    view = PipelineView(model, swarm)
    model.generate(**tokenizer("Tell me", return_tensors="pt"), max_new_tokens=6, min_new_tokens=6)
    view
    return


if __name__ == "__main__":
    app.run()
"""


@pytest.fixture
def marimo(tmp_path: Path) -> Iterator[str]:
    """The address of a marimo app that shows a view."""
    folder = installed("marimo")
    app = tmp_path / "app.py"
    app.write_text(MARIMO_APP)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "marimo.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "marimo", "-y", "run", str(app)),
                *("--headless", "--no-token", "--host", "127.0.0.1", "--port", str(port)),
            ],
            env={
                **os.environ,
                **environment(folder),
                "HF_HUB_OFFLINE": "1",
                "HOME": str(tmp_path),
                "MARIMO_SKIP_UPDATE_CHECK": "1",
            },
            stdout=log,
            stderr=log,
        )
        try:

            def answers() -> bool:
                assert process.poll() is None, (tmp_path / "marimo.log").read_text()[-2000:]
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=5):
                        return True
                except OSError:
                    return False

            wait_until(answers, "marimo answers", within=120, every=0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.timeout(600)
def test_marimo_shows_a_view_and_its_buttons_work(
    marimo: str, page: Any, screenshot: Callable[..., None]
) -> None:
    page.goto(marimo)
    shown = page.locator(
        ".swarmkit-live"
    )  # a locator looks into the shadow roots in which marimo puts widgets
    shown.wait_for()
    shown.get_by_role("button", name="Kill server-0").click()
    shown.get_by_text("✕").first.wait_for()
    screenshot(page)


# ipywidgets 7, as Colab has it

COLAB_OUTPUT = """
calls = []


def enable_custom_widget_manager():
    calls.append("enable_custom_widget_manager")


class _widgets:
    _installed_url = "https://ssl.gstatic.com/colaboratory-static/widgets/manager.js"
"""


@pytest.fixture
def colab_like(tmp_path: Path) -> Path:
    """A kernel with Colab's versions of ipykernel, IPython and ipywidgets, and a `google.colab`."""
    folder = installed("colab-like")
    colab = tmp_path / "packages" / "google" / "colab"
    (colab / "output").mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "output" / "__init__.py").write_text(COLAB_OUTPUT)
    paths = f"{tmp_path / 'packages'}{os.pathsep}{environment(folder)['PYTHONPATH']}"
    kernel = tmp_path / "jupyter" / "kernels" / "colab-like"
    kernel.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Like Colab",
        "language": "python",
        "env": {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return tmp_path / "jupyter"


@pytest.mark.timeout(600)
def test_with_ipywidgets_7_a_view_has_its_widget_and_its_static_forms(
    colab_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(colab_like))
    begin = "import google.colab.output"  # as Colab's kernel does before anything else
    checks = "import ipywidgets; (ipywidgets.__version__, google.colab.output.calls)"
    notebook = executed([begin, *TWO_VIEWS, checks], "colab-like")
    told = notebook.cells[5].outputs[0]["data"]["text/plain"]
    assert "'7.7.1'" in told
    assert "enable_custom_widget_manager" in told
    for cell in notebook.cells[3:5]:
        forms = cell.outputs[0]["data"]
        assert {"text/plain", "text/html", "image/svg+xml"} <= set(forms)
        live = forms["application/vnd.jupyter.widget-view+json"]["model_id"]
        states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
        assert states[live]["state"]["_view_module"] == "anywidget"
        assert "<svg" in states[live]["state"]["svg"]


# pages without widgets


@pytest.mark.timeout(600)
def test_an_exported_notebook_shows_the_picture_without_javascript(
    new_page: Callable[..., Any], screenshot: Callable[..., None], tmp_path: Path
) -> None:
    nbconvert = pytest.importorskip("nbconvert")
    notebook = executed(TWO_VIEWS, "python3")
    del notebook.metadata["widgets"]
    for cell in notebook.cells:
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    page_html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    exported = tmp_path / "exported.html"
    exported.write_text(page_html)
    page = new_page(java_script_enabled=False)
    page.route("http*://**", lambda route: route.abort())
    page.goto(exported.as_uri())
    assert page.locator(".jp-OutputArea svg, .jp-OutputArea img").count() == 2
    assert page.get_by_text("server-0").count() > 0
    screenshot(page)
