"""Memory for large messages: all peers together may not fill this machine with them, and none all of it.

::

    capacity >= bytes of large payloads that are arriving, waiting for the engine, or in it

A message that comes when there is no room waits for its turn. The peer that holds least is next, and of one
peer what came first. A peer that holds more than its share gives way: what it sent last is given up. Small
messages, such as the steps of single tokens, need no turn.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import TracebackType

import anyio

from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import CHUNK_BYTES
from swarmkit.net.transport.shares import NOBODY, Holder, gives_way

_RETRY_S = 1.0


class ReceiveReservation:
    """What one message holds of the budget, from its header until it is done with; `with` gives it back."""

    def __init__(
        self,
        budget: ReceiveBudget,
        holder: Holder = NOBODY,
        dismiss: Callable[[Refusal], None] | None = None,
    ) -> None:
        """Args: dismiss: gives the message up, when others need the room; None: it cannot be given up."""
        self._budget = budget
        self.holder = holder
        self.dismiss = dismiss
        self.nbytes = 0
        self.turn: asyncio.Future[None] | None = None

    async def take(self, nbytes: int, seconds: float) -> None:
        """Wait for room for so many bytes; a small message needs none.

        Raises:
            TimeoutError: there was none for so many seconds.
        """
        if nbytes <= CHUNK_BYTES:
            return
        with anyio.fail_after(seconds):
            await self._budget.take(nbytes, self)

    def __enter__(self) -> ReceiveReservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._budget.give_back(self)


class ReceiveBudget:
    """A number of bytes that messages share while they are handled. Used by the event loop's thread only."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.held_bytes = 0
        self._holding: dict[ReceiveReservation, None] = {}
        self._waiting: dict[ReceiveReservation, int] = {}
        self._given_up: set[ReceiveReservation] = set()
        """Of those that hold something, the ones that will give it back before long."""

    async def take(self, nbytes: int, of: ReceiveReservation) -> None:
        """Wait until there is room for `nbytes`, and hold it. What is larger than all of it has it alone."""
        of.turn = asyncio.get_running_loop().create_future()
        self._waiting[of] = nbytes
        self._let_in()
        try:
            await of.turn
        except asyncio.CancelledError:
            if self._waiting.pop(of, None) is None:
                self.give_back(of)
            else:
                self._let_in()  # those behind it may fit
            raise

    def give_back(self, of: ReceiveReservation) -> None:
        """End a hold. May be called twice."""
        self.held_bytes -= of.nbytes
        of.nbytes = 0
        self._holding.pop(of, None)
        self._given_up.discard(of)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            held = self._held()
            first = self._next(held)
            nbytes = self._waiting[first]
            if self.held_bytes and self.held_bytes + nbytes > self.capacity_bytes:
                self._have_others_give_way(held, first.holder, nbytes)
                return
            del self._waiting[first]
            self.held_bytes += nbytes
            first.nbytes += nbytes
            self._holding[first] = None
            assert first.turn is not None
            first.turn.set_result(None)

    def _next(self, held: dict[Holder, float]) -> ReceiveReservation:
        """What is let in first: of the host that holds least, or waits with least, and of its peers alike."""
        hosts, waiting = Counter[str](), Counter[str | Holder]()
        for holder, nbytes in held.items():
            hosts[holder.host] += int(nbytes)
        for one in self._waiting:
            waiting.update((one.holder.host, one.holder))

        def rank(one: ReceiveReservation) -> tuple[float, ...]:
            holder = one.holder
            return hosts[holder.host], waiting[holder.host], held.get(holder, 0.0), waiting[holder]

        return min(self._waiting, key=rank)

    def _held(self) -> dict[Holder, float]:
        held: dict[Holder, float] = {}
        for one in self._holding:
            if one not in self._given_up:
                held[one.holder] = held.get(one.holder, 0.0) + one.nbytes
        return held

    def _have_others_give_way(self, held: dict[Holder, float], asking: Holder, nbytes: int) -> None:
        """Have what others sent last beyond their share given up, until `nbytes` will be free."""
        while sum(held.values()) + nbytes > self.capacity_bytes:
            victim = gives_way(held, asking, nbytes, self.capacity_bytes)
            chosen = next(
                (
                    one
                    for one in reversed(self._holding)
                    if one.holder == victim and one.dismiss is not None and one not in self._given_up
                ),
                None,
            )
            if victim is None or chosen is None or chosen.dismiss is None:
                return
            held[victim] -= chosen.nbytes
            self._given_up.add(chosen)
            chosen.dismiss(
                Refusal("busy", "this peer sends more than its share, which others need", _RETRY_S)
            )
