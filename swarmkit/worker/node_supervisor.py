"""Keeps a node process while one is wanted, and ends it in time when none is.

::

    absent ──want──> starting ──serving_started──> serving
      ^                 │  │                          │
      │                 │  └────────ended by itself───┴──> failed ──a growing pause──> starting
      └──── stopping <──┴──── unwanted, or to be another ──┘
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import anyio
import msgspec
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from swarmkit.clock import Clock
from swarmkit.worker.node_messages import (
    FromNode,
    Leave,
    NodeFailed,
    NodeOrder,
    NodeReport,
    Replace,
    Runtime,
)
from swarmkit.worker.pause import Haste
from swarmkit.worker.process_tree import end_tree, set_cores
from swarmkit.worker.restarts import SETTLED_S, pause_before_restart

logger = logging.getLogger(__name__)

NodeState = Literal["absent", "starting", "serving", "stopping", "failed"]
NODE_COMMAND = (sys.executable, "-m", "swarmkit.worker.node_process")

_LONGEST_LINE = 1024 * 1024
_PROMPT_DRAIN_S = 0.5
_PROMPT_END_S = 0.9
"""From the moment that a prompt end is wanted until the processes are killed, if they have not ended."""
_ENDING_S = 5.0
"""What a polite end may take beyond the time for its sessions."""
_HASTES: tuple[Haste, ...] = ("polite", "prompt", "now")
_LAST_WORDS = 30


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The node process that shall exist."""

    order: NodeOrder
    runtime: Runtime
    cores: int | None


class NodeSupervisor:
    """Owns the node process. All of it is one task, `run`.

    Attributes:
        state: see the drawing above.
        pid: of the node process; 0 without one.
        failures: how often in a row it has ended by itself.
        retry_at: by the clock's `time`, when it is started again; None if that is not awaited.
        why: the reason for which it failed, where people can do something about it; else empty.
        last_words: what it wrote last to its standard error before it failed.
        report: what it said last of its work.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        on_word: Callable[[FromNode], None],
        on_state: Callable[[], None],
        command: Sequence[str] = NODE_COMMAND,
    ) -> None:
        """Args:
        on_word: takes what the node process says.
        on_state: is called after each change of `state`.
        command: starts a node process.
        """
        self.state: NodeState = "absent"
        self.pid = 0
        self.failures = 0
        self.retry_at: float | None = None
        self.why = self._said = ""
        self.last_words = ""
        self.report: NodeReport | None = None
        self.served_event: dict[str, Any] = {}
        """The node's own `serving_started`."""
        self.progress = ""
        self._clock = clock
        self._on_word, self._on_state = on_word, on_state
        self._command = list(command)
        self._wanted: Wanted | None = None
        self._haste: Haste = "polite"
        self._drain_s = 30.0
        self._renewed = False
        self._changed = anyio.Event()
        self._retry_from = 0.0
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)

    def want(self, wanted: Wanted | None, haste: Haste = "polite", drain_s: float = 30.0) -> None:
        """Have this node process exist; None: have none.

        Args:
            haste: how soon one that exists has gone, where it is not wanted any more.
            drain_s: how long sessions may take to move away, where that is polite.
        """
        if wanted is None:
            if self._wanted is not None or _HASTES.index(haste) > _HASTES.index(self._haste):
                self._haste = haste
            self.retry_at, self.failures = None, 0
        else:
            if self._wanted is not None and wanted.order != self._wanted.order:
                self.retry_at, self.failures = None, 0  # what has failed is not what is wanted now
            if not self._renewed:
                self._haste = "polite"
        self._wanted, self._drain_s = wanted, drain_s
        self._ring()

    def renew(self) -> None:
        """Have another node process in the place of the one that exists, which is ended at once."""
        if self.pid:
            self._renewed, self._haste = True, "now"
            self._ring()

    def fail(self, why: str) -> None:
        """End the node process at once, and count that as its failure."""
        if self.pid:
            self._said = why
            end_tree(self.pid)

    async def run(self) -> None:
        """Do what is wanted until cancelled; then no node process is left."""
        while True:
            if self._wanted is None:
                self._set_state("absent")
                await self._news()
            elif (left_s := self._until_retry()) > 0:
                with anyio.move_on_after(left_s):
                    await self._news()
            else:
                await self._live(self._wanted)

    # ------------------------------------------------------------------ one node process

    async def _live(self, wanted: Wanted) -> None:
        self.report, self.served_event, self.progress, self.retry_at = None, {}, "", None
        self._renewed = False
        self._said = ""
        self._words.clear()
        try:
            process = await anyio.open_process(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=sys.platform != "win32",
                env=_environment(wanted.runtime.threads),
            )
        except OSError as error:
            self._words.append(f"it could not be started: {error}")
            self._failed(0.0)
            return
        began = self._clock.now()
        self.pid = process.pid
        self._set_state("starting")
        ended_by_itself = False
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._ring_at_end, process)
                tasks.start_soon(self._hear, process.stdout)
                tasks.start_soon(self._write_log, process.stderr)
                ended_by_itself = await self._guide(process, wanted)
        finally:
            with anyio.CancelScope(shield=True):
                end_tree(process.pid)
                await process.wait()
                await process.aclose()
            self.pid = 0
        if ended_by_itself and self._wanted is not None:
            self._failed(self._clock.now() - began)

    async def _guide(self, process: Process, wanted: Wanted) -> bool:
        """Tell the process what is wanted until it has ended; returns whether it did so by itself."""
        order = wanted.order
        await _tell(process, order)
        told: Wanted | None = None
        while process.returncode is None:
            latest = self._wanted
            if latest is None or latest.order != order or self._renewed:
                await self._end(process)
                return False
            if told is None or told.runtime != latest.runtime:
                await _tell(process, Replace(runtime=latest.runtime))
            if told is None or told.cores != latest.cores:
                set_cores(process.pid, latest.cores)
            told = latest
            if process.returncode is None:
                await self._news()
        return True

    async def _end(self, process: Process) -> None:
        """Have the process end as soon as is wanted. Haste may grow meanwhile."""
        self._set_state("stopping")
        haste, deadline = None, 0.0
        while process.returncode is None:
            if haste != self._haste:
                haste = self._haste
                if haste == "now":
                    end_tree(process.pid)
                    deadline = self._clock.now() + _ENDING_S
                else:
                    drain_s = self._drain_s if haste == "polite" else _PROMPT_DRAIN_S
                    after_s = drain_s + _ENDING_S if haste == "polite" else _PROMPT_END_S
                    deadline = self._clock.now() + after_s
                    await _tell(process, Leave(drain_s=drain_s))
            left_s = deadline - self._clock.now()
            if left_s <= 0:
                end_tree(process.pid)
                await process.wait()
                return
            with anyio.move_on_after(left_s):
                await self._news()

    async def _ring_at_end(self, process: Process) -> None:
        await process.wait()
        self._ring()

    async def _hear(self, stream: ByteReceiveStream | None) -> None:
        async for line in _lines(stream):
            try:
                word = msgspec.json.decode(line, type=FromNode)
            except msgspec.DecodeError:
                logger.warning("the node process said what cannot be understood: %r", line[:200])
                continue
            self._note(word)
            self._on_word(word)

    def _note(self, word: FromNode) -> None:
        if isinstance(word, NodeReport):
            self.report = word
        elif isinstance(word, NodeFailed):
            self._said = word.why
        elif word.event.get("event") == "serving_started":
            self.served_event = word.event
            if self.state == "starting":
                self._set_state("serving")
        elif self.state == "starting":
            self.progress = str(word.event.get("message", ""))

    async def _write_log(self, stream: ByteReceiveStream | None) -> None:
        async for line in _lines(stream):
            text = line.decode(errors="replace").rstrip()
            if text:
                self._words.append(text)
                logger.info("node: %s", text)

    def _failed(self, lived_s: float) -> None:
        self.failures = 1 if lived_s > SETTLED_S else self.failures + 1
        self.retry_at = self._clock.time() + pause_before_restart(self.failures)
        self._retry_from = self._clock.now()
        self.why, self.last_words = self._said, "\n".join(self._words)
        self._set_state("failed")

    def _until_retry(self) -> float:
        """Seconds until a failed node process may be started again, whatever is done to the date."""
        if self.retry_at is None:
            return 0.0
        return pause_before_restart(self.failures) - (self._clock.now() - self._retry_from)

    # ------------------------------------------------------------------ news

    def _set_state(self, state: NodeState) -> None:
        if state != self.state:
            self.state = state
            self._on_state()

    def _ring(self) -> None:
        self._changed.set()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed = anyio.Event()


async def _tell(process: Process, word: NodeOrder | Replace | Leave) -> None:
    assert process.stdin is not None
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # it has ended
        await process.stdin.send(msgspec.json.encode(word) + b"\n")


async def _lines(stream: ByteReceiveStream | None) -> AsyncIterator[bytes]:
    assert stream is not None
    buffered = BufferedByteReceiveStream(stream)
    with contextlib.suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.ClosedResourceError):
        while True:
            try:
                yield await buffered.receive_until(b"\n", _LONGEST_LINE)
            except anyio.DelimiterNotFound:  # noqa: PERF203
                yield await buffered.receive(_LONGEST_LINE)


def _environment(threads: int | None) -> dict[str, str]:
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
