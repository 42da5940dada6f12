"""The live views in JupyterLab: they paint, follow, react, survive a restart, and do not slow down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..waiting import wait_until
from .conftest import free_port

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupyterlab")
pytest.importorskip("anywidget")

ROOT = Path(__file__).parents[2]

START = """
import torch
torch.set_num_threads(1)
from swarmkit import LocalSwarm
from swarmkit.notebook import PipelineView, SessionTimeline, SwarmView, TrainingView, generate_in_background
swarm = LocalSwarm("tiny-chat", num_stages=2, replicas=2, transport="memory").start()
model, tokenizer = swarm.model(), swarm.tokenizer()
inputs = tokenizer("Tell me", return_tensors="pt")
"""
KERNEL_IDLE = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"


class Lab:
    """A JupyterLab of this test's own, and the notebooks in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "notebooks"
        self.folder.mkdir()
        self.port = free_port()
        homes = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
        settings = folder / "settings"
        settings.mkdir()
        quiet = {
            "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}
        }
        (settings / "overrides.json").write_text(json.dumps(quiet))
        self._log = (folder / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                f"--port={self.port}",
                "--IdentityProvider.token=",
                "--ServerApp.password=",
                f"--ServerApp.root_dir={self.folder}",
                f"--LabServerApp.app_settings_dir={settings}",
                "--expose-app-in-browser",
            ],
            env={**os.environ, **homes, "IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1"},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        wait_until(self._answers, "JupyterLab answers", within=120, every=0.2)

    def _answers(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=5):
                return True
        except OSError:
            return False

    def open(self, page: Any, cells: list[str], name: str = "test") -> None:
        """Write a notebook with these cells, open it, and wait for its kernel."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        self.show(page, name)

    def show(self, page: Any, name: str) -> None:
        """Open a notebook of the folder, and wait for its kernel."""
        page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{name}.ipynb?reset")
        page.wait_for_selector(".jp-Notebook")
        page.wait_for_function(f"window.jupyterapp && {KERNEL_IDLE}")

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def run_all(page: Any) -> None:
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")


def run(page: Any, code: str) -> None:
    """Run code in the notebook's kernel, and wait until it has run."""
    page.evaluate(
        """async code => {
            const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const reply = await kernel.requestExecute({code}).done;
            if (reply.content.status !== 'ok') throw new Error(reply.content.evalue);
        }""",
        code,
    )


def view(page: Any, number: int = 0) -> Any:
    shown = page.locator(".swarmkit-live").nth(number)
    shown.wait_for()
    return shown


@pytest.mark.timeout(600)
def test_a_view_follows_an_answer_and_a_button_kills_a_server(
    lab: Lab, page: Any, screenshot: Callable[..., None]
) -> None:
    lab.open(page, [START, "view = PipelineView(model, swarm)\nview"])
    run_all(page)
    shown = view(page)
    run(page, "answer = generate_in_background(model, **inputs, max_new_tokens=1500, min_new_tokens=1500)")
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('tokens/s')")
    screenshot(shown, "running")
    assert shown.locator("button", has_text="Kill").count() == 4
    shown.get_by_role("button", name="Kill server-0").click()
    shown.get_by_role("button", name="Kill server-1").click()
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('✕')")
    page.wait_for_function("document.querySelectorAll('.swarmkit-live button').length === 5")
    screenshot(shown, "killed")
    run(page, "answer.stop(); assert answer.result(60).shape[1] > 5; view.stop(); swarm.close()")
    assert "ended" in shown.locator(".sk-status").inner_text()


@pytest.mark.timeout(600)
def test_after_a_restart_and_a_reload_the_last_picture_is_there(
    lab: Lab, page: Any, screenshot: Callable[..., None]
) -> None:
    shutil.copy(ROOT / "notebooks" / "quickstart.ipynb", lab.folder / "quickstart.ipynb")
    lab.show(page, "quickstart")
    run_all(page)
    page.wait_for_function("document.querySelectorAll('.swarmkit-live').length === 2", timeout=120_000)
    page.wait_for_function(KERNEL_IDLE, timeout=120_000)
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.reload()
    page.wait_for_selector(".jp-Notebook")
    page.wait_for_function("document.querySelectorAll('.swarmkit-live svg').length === 2")
    assert "Error displaying widget" not in page.locator(".jp-Notebook").inner_text()
    screenshot(page)


@pytest.mark.timeout(600)
def test_updates_do_not_slow_down_or_fill_the_page(lab: Lab, page: Any) -> None:
    lab.open(
        page,
        [
            START,
            "view = SessionTimeline(model, last=60)\nview",
            "model.generate(**inputs, max_new_tokens=80)",
        ],
    )
    run_all(page)
    view(page)
    page.wait_for_function("document.querySelectorAll('.swarmkit-live rect').length > 20")
    page.evaluate(
        """() => {
            const drawing = document.querySelector('.swarmkit-live .sk-drawing');
            window.painted = [];
            new MutationObserver(() => window.painted.push(performance.now()))
                .observe(drawing, {childList: true});
        }"""
    )
    client = page.context.new_cdp_session(page)

    def heap() -> float:
        client.send("HeapProfiler.collectGarbage")
        return float(client.send("Runtime.getHeapUsage")["usedSize"]) / 2**20

    # No more updates are under way than a kernel's socket queues for a slow reader; it drops what is beyond.
    burst = """
for number in range({start}, {start} + 250):
    view.svg = drawn.replace("steps:", f"steps {{number}}:")
"""
    run(page, "view.stop(); drawn = view.svg")  # so that nothing but the bursts draws
    before, seconds = heap(), []
    for start in range(0, 10_000, 250):
        page.evaluate("() => { window.painted = []; }")
        run(page, burst.format(start=start))
        page.wait_for_function(
            f"document.querySelector('.swarmkit-live').textContent.includes('steps {start + 249}:')"
        )
        painted = page.evaluate("() => window.painted")
        seconds.append((painted[-1] - painted[0]) / max(1, len(painted) - 1))
    grown = heap() - before
    print(
        f"ms an update: {seconds[0]:.2f} at first, {seconds[-1]:.2f} at last; the heap grew by {grown:.1f} MB"
    )
    assert grown < 20
    run(page, "swarm.close()")
