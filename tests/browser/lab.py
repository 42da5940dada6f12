"""A JupyterLab or Notebook 7 for tests, and what they do on its pages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from ..waiting import wait_until
from .conftest import free_port

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
    """A JupyterLab, or a Notebook 7, of this test's own, and the notebooks in its folder."""

    def __init__(
        self,
        folder: Path,
        module: str = "jupyterlab",
        path: str = "lab/tree",
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Start a server.

        Args:
            module: what Python runs.
            path: below which it shows notebooks.
            more: environment variables.
        """
        self._path = path
        self.folder = folder / "notebooks"
        self.folder.mkdir()
        self.port = free_port()
        own = {"IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1", **(more or {})}
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
                module,
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
            env={**os.environ, **homes, **own},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        wait_until(self._answers, f"{module} answers", within=120, every=0.2)

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
        page.goto(f"http://127.0.0.1:{self.port}/{self._path}/{name}.ipynb?reset")
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
