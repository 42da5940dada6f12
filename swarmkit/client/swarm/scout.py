"""Finds servers that work by trying some at once, where those that are asked do not answer or fail."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import anyio
import torch

from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.routing.claims import Shown, best_per_block, is_promising
from swarmkit.client.routing.deadline import StepTimes
from swarmkit.client.routing.route import Hop
from swarmkit.client.routing.trials import (
    MOST_TRIALS,
    MOST_TRIALS_FOR_BETTER,
    ROUND_S,
    TRIAL_S,
    order_of_trials,
    patience_s,
    rounds,
)
from swarmkit.clock import Clock
from swarmkit.errors import (
    PeerError,
    PeerTimeoutError,
    ProtocolError,
    RemoteError,
    SwarmkitError,
    unwrapped,
)
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.messages import HIDDEN_DTYPES, SESSION, Open, Opened, Step, StepDone
from swarmkit.net.protocol.protocol import Protocol as MessageProtocol
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.placement.ranges import uncovered

T = TypeVar("T")

logger = logging.getLogger(__name__)


class AdapterOfBlocks(Protocol):
    """The adapter of a step, as far as it matters here."""

    @property
    def hosted_name(self) -> str:
        """Its hash where servers host it; empty if it is the client's own."""


class Scout:
    """Tries servers for a client. One search at a time: its finds are for all sessions.

    Args:
        fingerprint, hidden_size: of the model.
        connect: opens a stream to a server.
        servers: those that may be used, by the hash of an adapter that they host.
        shown: what a server has shown, by its service id; None = it has never worked.
        times_of: where the time of a step at a server is noted.
        untried_wait_s: `DeadlineSettings.untried_wait_s`.
        salt: the client's own, for the order.
    """

    def __init__(
        self,
        *,
        fingerprint: str,
        hidden_size: int,
        connect: Callable[[Announcement, MessageProtocol], Awaitable[ClientStream]],
        servers: Callable[[str], Sequence[Announcement]],
        shown: Callable[[str], Shown | None],
        times_of: Callable[[Announcement], StepTimes],
        bans: Bans,
        busy: BusyPeers,
        clock: Clock,
        untried_wait_s: float,
        salt: str,
    ) -> None:
        self._fingerprint = fingerprint
        self._connect = connect
        self._servers = servers
        self._shown = shown
        self._times_of = times_of
        self._bans = bans
        self._busy = busy
        self._clock = clock
        self._untried_wait_s = untried_wait_s
        self._salt = salt
        self._searching = anyio.Lock()
        # Nothing of the user's: it may go to many strangers.
        self._noise = torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0))

    async def unless_outrun(
        self,
        hop: Hop,
        size: int,
        act: Callable[[], Awaitable[T]],
        adapter: AdapterOfBlocks | None = None,
    ) -> T:
        """Wait for what a server is asked for; if it has never worked, until others are found that do.

        Args:
            size: rows x tokens of the step; 0 = to open a session.
            adapter: of the step. The client's own may have to be sent first, which may take long.

        Raises:
            PeerTimeoutError: others have its blocks, and work.
            PeerError: it failed.
        """
        server = hop.server
        name = "" if adapter is None else adapter.hosted_name
        may_be_sent = adapter is not None and not name and not size
        if self._shown(server.service_id) is not None or may_be_sent:
            return await act()
        wait_s = patience_s(self._untried_wait_s, size, server.throughput)
        results: list[T] = []
        error: PeerError = PeerTimeoutError("others answered before it did", server.peer_id)
        searched: anyio.Event | None = None

        async def outrun() -> None:
            nonlocal searched
            await anyio.sleep(wait_s)
            searched = anyio.Event()
            if await self.find(hop.start, hop.stop, name, without=server.service_id):
                tasks.cancel_scope.cancel()
            searched.set()

        with unwrapped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(outrun)
                try:
                    results.append(await act())
                except PeerError as failure:
                    error = failure
                    if searched is not None:  # what follows would begin the same search anew
                        await searched.wait()
                tasks.cancel_scope.cancel()
        if not results:
            raise error
        return results[0]

    async def find(self, start: int, stop: int, hosted_adapter: str = "", without: str = "") -> bool:
        """Try servers until some that work hold all blocks [start, stop); returns whether they do.

        Args: without: a server that is asked already.
        """
        async with self._searching:
            if self.is_covered(start, stop, hosted_adapter):
                return True
            waiting = deque(
                islice(
                    (
                        server
                        for server in order_of_trials(self._untried(hosted_adapter), self._salt)
                        if server.start < stop and server.stop > start and server.service_id != without
                    ),
                    MOST_TRIALS,
                )
            )
            return await self._try_all(
                waiting, start, stop, lambda: self.is_covered(start, stop, hosted_adapter)
            )

    async def find_better(self, present_s: float, claimed_s: Callable[[Announcement], float]) -> None:
        """Try some servers that promise much more than those in use, until one keeps it.

        Args:
            present_s: seconds per block of what is in use.
            claimed_s: seconds per block that a server claims.
        """
        promising = [server for server in self._untried("") if is_promising(claimed_s(server), present_s)]
        tried = order_of_trials(promising, self._salt)[:MOST_TRIALS_FOR_BETTER]

        def is_found() -> bool:
            shown = filter(None, (self._shown(server.service_id) for server in tried))
            return is_promising(best_per_block(shown) or present_s, present_s)

        if tried:
            await self._try_all(deque(tried), 0, sys.maxsize, is_found)

    def is_covered(self, start: int, stop: int, hosted_adapter: str = "") -> bool:
        """Whether servers that have worked, and neither failed since nor are busy, hold all these blocks."""
        good = [
            (server.start, server.stop)
            for server in self._servers(hosted_adapter)
            if self._shown(server.service_id) is not None and self._is_free(server)
        ]
        return not uncovered(start, stop, good)

    def _untried(self, hosted_adapter: str) -> list[Announcement]:
        return [
            server
            for server in self._servers(hosted_adapter)
            if self._shown(server.service_id) is None and self._is_free(server)
        ]

    def _is_free(self, server: Announcement) -> bool:
        return not self._bans.is_doubtful(server.service_id) and not self._busy.wait_s(server.service_id)

    async def _try_all(
        self, waiting: deque[Announcement], start: int, stop: int, is_enough: Callable[[], bool]
    ) -> bool:
        """Try servers, with what they have of blocks [start, stop), until `is_enough` or none is left.

        Returns: what `is_enough` said last.
        """
        running = 0
        ended = anyio.Event()

        async def run(server: Announcement) -> None:
            nonlocal running, ended
            try:
                await self._try_one(server, max(start, server.start), min(stop, server.stop))
            finally:
                running -= 1
                ended.set()

        enough = False
        async with anyio.create_task_group() as tasks:
            for number in rounds():
                for _ in range(min(number, len(waiting))):
                    running += 1
                    tasks.start_soon(run, waiting.popleft())
                with anyio.move_on_after(ROUND_S if waiting else None):
                    while running and not enough:
                        ended = anyio.Event()
                        await ended.wait()
                        enough = is_enough()
                if enough or not (waiting or running):
                    break
            tasks.cancel_scope.cancel()
        return enough

    async def _try_one(self, server: Announcement, start: int, stop: int) -> None:
        """See whether a server computes a step of one token, and how fast."""
        began_at = self._clock.now()
        try:
            await self._step(server, start, stop)
        except PeerError as error:
            if isinstance(error, RemoteError) and error.is_busy:
                self._busy.note(server.service_id, error.retry_after_s)
                return
            logger.info("%s failed when it was tried: %s", server.label, error)
            self._bans.failed(server.service_id, self._clock.now() - began_at, error)
        except SwarmkitError as error:
            logger.debug("could not try %s: %s", server.label, error)

    async def _step(self, server: Announcement, start: int, stop: int) -> None:
        times, now = self._times_of(server), self._clock.now
        stream = await self._connect(server, SESSION)
        try:
            spec, data = codec.encode(self._noise)
            stream.max_payload_bytes = spec.nbytes
            with stream.within(TRIAL_S):
                asked_at = now()
                await stream.ask(Open(self._fingerprint, start, stop, 1), Opened)
                opened_at = now()
                await stream.send(Step(0, spec, 1, number=1, patience_s=TRIAL_S), [data])
                incoming = await stream.answer(StepDone)
            done = incoming.message
            if done.number != 1 or done.hidden.shape != spec.shape or done.hidden.dtype not in HIDDEN_DTYPES:
                raise ProtocolError("the answer to a trial is not what was asked for", server.peer_id)
            if not codec.is_finite(incoming.tensor(done.hidden)):
                raise ProtocolError("outputs of a trial contain NaN or infinity", server.peer_id)
            times.observe(1, now() - opened_at)
            times.blocks, times.way_s = stop - start, opened_at - asked_at
        finally:
            stream.close()
