"""A server in an operating-system process of its own, started and ended by this one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch

from swarmkit.errors import SwarmkitError
from swarmkit.local.fork_server import ForkedProcess, ForkServer
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 10.0
_KEPT_WORDS = 16_384
"""Bytes of its standard error that are kept when a process has ended."""


class ServerStartError(SwarmkitError):
    """A server process ended, or stayed silent, before it served."""


class ServerProcess:
    """`swarmkit serve` as a child process.

    It leads a process group of its own. Its p2p daemon ends with it, as at the end of a machine. And it ends
    when this process does, because its standard input closes then.

    Args:
        blocks: to serve; None = as many as `num_blocks` says, where the swarm is weakest. It moves then.
        port: where it listens; 0 = any free port.
        announce: addresses that others shall dial instead.
        adapters: to be hosted.
        swarm_key_file: holds the key of the private swarm that it joins.
        fork_server: starts it sooner than anew, if it can.
    """

    def __init__(
        self,
        model: str,
        initial_peers: Sequence[str],
        blocks: tuple[int, int] | None,
        *,
        num_blocks: int | None = None,
        public_name: str = "",
        dtype: str | torch.dtype = "auto",
        threads: int = 1,
        device: str = "cpu",
        port: int = 0,
        announce: Sequence[str] = (),
        adapters: Sequence[str | os.PathLike[str]] = (),
        settings: ServerSettings | None = None,
        swarm_key_file: str | os.PathLike[str] | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        command = ["serve", model]
        if blocks is not None:
            command += ["--blocks", f"{blocks[0]}:{blocks[1]}"]
        elif num_blocks is not None:
            command += ["--num-blocks", str(num_blocks)]
        command += ["--dtype", str(dtype).removeprefix("torch.")]
        command += ["--device", device]
        command += ["--threads", str(threads), "--name", public_name, "--json", "--until-stdin-closes"]
        command += ["--port", str(port)]
        for address in initial_peers:
            command += ["--join", address]
        for address in announce:
            command += ["--announce", address]
        if swarm_key_file is not None:
            command += ["--swarm-key", os.fspath(swarm_key_file)]
        for adapter in adapters:
            command += ["--adapter", os.fspath(adapter)]
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
        environment |= (settings or ServerSettings()).environment()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._last_words = b""
        self._process = _started(command, environment, self._log, fork_server)
        self.blocks = blocks or (0, 0)
        """That it serves; (0, 0) before it has chosen."""
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_events, name=f"swarmkit-{public_name}", daemon=True)
        self._reader.start()
        self.public_name = public_name
        self.peer_id = ""
        self.addresses: list[str] = []
        self.event_dates: dict[str, float] = {}
        """When the first event of each kind was, in Unix time, up to the last one that was waited for."""

    @property
    def pid(self) -> int:
        """Of the server process, which is also its process group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended: 0 = cleanly, below 0 = by that signal; None while it runs."""
        return self._process.poll()

    def start(self, timeout: float = 120.0) -> None:
        """Wait until it serves. The process began with this object, so that several can begin at once.

        Raises:
            ServerStartError: it ended or said nothing for `timeout` seconds; with its last words.
        """
        started = self.wait_for("serving_started", timeout=timeout)
        self.peer_id = started["owner"]["peer_id"]
        self.addresses = started["addresses"]

    def wait_for(self, *names: str, timeout: float) -> dict[str, Any]:
        """Wait until it tells an event with one of these names; earlier ones are passed over for good.

        Raises:
            ServerStartError: it ended first, or said nothing for `timeout` seconds; with its last words.
        """
        while True:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                self.kill()
                raise ServerStartError(f"{self.public_name} said nothing for {timeout:.0f} s") from None
            if event is None:
                self.kill()
                raise ServerStartError(f"{self.public_name} ended too early:\n{self.last_words()}")
            self.event_dates.setdefault(event["event"], event["time"])
            if event["event"] in names:
                return event

    def last_words(self, size: int = 2000) -> str:
        """The end of what it wrote to standard error, at most `size` bytes."""
        if not self._log.closed:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - _KEPT_WORDS))
            self._last_words = self._log.read()
        return self._last_words[-size:].decode(errors="replace").strip()

    def stop(self, drain_timeout: float | None = None) -> None:
        """Ask it to leave (SIGTERM) and wait; kill it if it does not.

        Args:
            drain_timeout: longest time for its sessions to move, in seconds; 0 = do not wait for them.
        """
        if self.alive:
            self._signal(signal.SIGCONT)
            grace = _STOP_GRACE_S + (drain_timeout if drain_timeout is not None else 30.0)
            if drain_timeout == 0.0 and self._process.stdin is not None:
                self._process.stdin.close()  # it leaves without waiting for its sessions
            else:
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group: the end of a machine."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self.last_words()
        self._log.close()

    def suspend(self) -> None:
        """SIGSTOP to the whole group: a server that hangs, its connections and its p2p daemon still there."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `suspend`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"event", "time"} <= event.keys():
                if event["event"] == "serving_started":
                    self.blocks = event["start"], event["stop"]
                self._events.put(event)
        self._events.put(None)


def _started(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: IO[bytes],
    fork_server: ForkServer | None,
) -> subprocess.Popen[bytes] | ForkedProcess:
    """`swarmkit <arguments>` in a session of its own, with pipes to it and from it."""
    if fork_server is not None and fork_server.fits(environment):
        try:
            return fork_server.spawn(arguments, environment, log)
        except OSError as error:
            logger.info("a server is started anew, not as a copy: %s", error)
    return subprocess.Popen(
        [sys.executable, "-m", "swarmkit.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
