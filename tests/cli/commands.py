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
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any
from unittest import mock

import psutil

import swarmkit.cli
from swarmkit.cli import console
from swarmkit.local.fork_server import ForkedProcess, ForkServer

SWARMKIT = [sys.executable, "-m", "swarmkit.cli"]
TIMEOUT_S = 120
kept: list[ForkServer] = []
"""The fork server that the fixture `kept_fork_server` keeps, while it does. `start` begins with a copy of it,
which has imported everything, and else with a fresh interpreter.
"""


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


class Copy:
    """As much of `subprocess.Popen` as tests use, of a command that began as a copy of the fork server."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process: ForkedProcess = kept[0].spawn(arguments, environment, self._errors)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self.pid = self._process.pid
        self.stdout = io.TextIOWrapper(self._process.stdout)
        self._said: tuple[str, str] | None = None

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self._process.wait(timeout)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what it has written, without what was read before, and its errors."""
        self.wait(timeout)
        if self._said is None:
            with self.stdout, self._errors:
                self._errors.seek(0)
                self._said = self.stdout.read(), self._errors.read().decode()
        return self._said


@dataclass
class Running:
    """The process of a command that runs until told to stop, with its first events read."""

    process: subprocess.Popen[str] | Copy
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
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process: subprocess.Popen[str] | Copy
    if kept and kept[0].fits(environment):
        process = Copy([*arguments, "--json"], environment)
    else:
        process = subprocess.Popen(
            [*SWARMKIT, *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=own_group,
        )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == until:
            return Running(process, event)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    raise AssertionError(f"ended before '{until}': {errors}")
