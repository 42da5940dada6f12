"""Commands, run in this process where that shows all that a user sees, else as processes of their own."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import psutil

import swarmkit.cli
from swarmkit.cli import console

SWARMKIT = [sys.executable, "-m", "swarmkit.cli"]
TIMEOUT_S = 120


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    def last_json(self) -> dict[str, Any]:
        """The object on the last line of standard output."""
        return json.loads(self.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Take back what a command changes in its process, and would leave so until it ends."""
    thresholds = gc.get_threshold()
    on_interrupt = signal.getsignal(signal.SIGINT)
    with mock.patch.dict(os.environ), mock.patch.object(console, "out", console.out):
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            signal.signal(signal.SIGINT, on_interrupt)


def run_here(*arguments: str, stdin: str = "") -> Ended:
    """Run a command to its end in this process, from the entry point of `swarmkit` on."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _undone(),
        mock.patch.object(sys, "argv", ["swarmkit", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            swarmkit.cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def run(*arguments: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> Ended:
    """Run a command to its end in a process of its own."""
    result = subprocess.run(
        [*SWARMKIT, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=dict(os.environ, HF_HUB_OFFLINE="1"),
    )
    return Ended(result.returncode, result.stdout, result.stderr)


@dataclass
class Running:
    """The process of a command that runs until told to stop, with its first events read."""

    process: subprocess.Popen[str]
    event: dict[str, Any]

    @property
    def address(self) -> str:
        return self.event["addresses"][0]  # type: ignore[no-any-return]

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end_with(self, number: int) -> Ended:
        """Send a signal and wait for the end; the result has what it wrote since."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return Ended(self.process.returncode, out, err)


def start(*arguments: str, until: str, own_group: bool = False) -> Running:
    """Start a command with --json and read its events up to the one called `until`.

    Args: own_group: give it a process group of its own, to which signals can be sent.
    """
    process = subprocess.Popen(
        [*SWARMKIT, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        start_new_session=own_group,
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == until:
            return Running(process, event)
    raise AssertionError(f"ended before '{until}': {process.stderr.read() if process.stderr else ''}")
