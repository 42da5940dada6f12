"""Admission control: which sessions and steps a server takes, and which it refuses at once as busy."""

from __future__ import annotations

import math
from collections.abc import Iterable

from swarmkit.errors import SwarmkitError
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.shares import HeldPlaces, Holder
from swarmkit.server.cache.kv_budget import CacheFullError
from swarmkit.server.engine.admission_policy import (
    Holding,
    Tenures,
    beyond_share,
    retry_after_s,
    to_evict,
)
from swarmkit.server.engine.engine import Engine
from swarmkit.server.sessions.session import ServedSession
from swarmkit.settings import ServerSettings

_SHARE_RETRY_S = 1.0


class AdmissionControl:
    """Refuses what a server has no room for, and says when it expects to have some."""

    def __init__(self, settings: ServerSettings, engine: Engine, receive_budget: ReceiveBudget) -> None:
        self._settings = settings
        self._engine = engine
        self._receive_budget = receive_budget
        self._tenures = Tenures()
        self._places: HeldPlaces[ServedSession] = HeldPlaces()

    def entered(self, session: ServedSession) -> None:
        """A session was opened."""
        self._places.add(session, session.holder)

    def left(self, session: ServedSession) -> None:
        """A session ends."""
        self._places.remove(session)
        if session.lease.nbytes:
            self._tenures.ended(self._engine.clock.now() - session.opened_at)

    def next_end_s(self, sessions: int) -> float:
        """Seconds until one of so many sessions is expected to end."""
        return self._tenures.next_end_s(sessions)

    def too_many(self, what: str, sessions: int) -> Refusal:
        """The refusal of a stream or session beyond the allowed number."""
        return Refusal("busy", f"{what}; try another server", self._tenures.next_end_s(sessions))

    def cache_full(self, error: CacheFullError, sessions: int) -> Refusal:
        """The refusal of a step for which a session's cache cannot grow."""
        return Refusal("busy", f"{error}; try another server", self._tenures.next_end_s(sessions))

    def check_queue(self, step: Step, wait_s: float) -> None:
        """Refuse a step that would wait for longer than its client, or this server, wants it to.

        Args: wait_s: seconds for which it would wait for others.
        """
        allowed_s = min(self._settings.requests.max_queue_s, step.patience_s or math.inf)
        if wait_s > allowed_s:
            raise Refusal(
                "busy",
                f"the step would wait {wait_s:.1f} s for others, and may wait {allowed_s:.1f} s; "
                "try another server",
                retry_after_s(wait_s - allowed_s),
            )

    async def room_for(self, incoming: IncomingMessage, client: ServerStream) -> ReceiveReservation:
        """Have memory for a large step of a client to arrive in, whoever sends it.

        It waits a little for those that are arriving: most are through in no time. A client that would wait
        longer had better know, and go elsewhere.
        """
        step: Step = incoming.message
        room = ReceiveReservation(self._receive_budget, client.holder, client.dismiss)
        try:
            await room.take(
                incoming.nbytes,
                min(self._settings.requests.max_admission_wait_s, step.patience_s or math.inf),
            )
            return room
        except TimeoutError:
            rows, tokens, _ = step.hidden.shape
            wait_s = self._engine.ahead(rows, tokens).wait_s
            raise Refusal(
                "busy", "too many large steps are under way; try another server", retry_after_s(wait_s)
            ) from None

    def expired(self, step: Step, why: SwarmkitError) -> Refusal:
        """The refusal of a step that was not begun in time."""
        rows, tokens, _ = step.hidden.shape
        return Refusal("busy", str(why), retry_after_s(self._engine.ahead(rows, tokens).wait_s))

    def to_evict(
        self, sessions: Iterable[ServedSession], needed: int, *, of_bytes: bool, at_once: bool
    ) -> dict[str, Refusal]:
        """Return the sessions, by inlet, that end to make room for `needed` bytes, or sessions, and what
        their clients are told.

        A session that runs a step stays. One that was idle only for a short time goes if `at_once` is set.
        """
        least_idle_s = 0.0 if at_once else self._settings.sessions.evict_after_s
        latest = self._engine.clock.now() - least_idle_s
        idle = (one for one in sessions if one.used_at <= latest and not one.turn.locked())
        holdings = {one.key: one for one in self._holdings(idle, of_bytes)}
        chosen = to_evict(list(holdings.values()), needed, least_idle_s, partly=at_once)
        return {key: _evicted(holdings[key].idle_s) for key in chosen}

    def beyond_share(
        self, sessions: Iterable[ServedSession], asking: Holder, needed: int, capacity: int, *, of_bytes: bool
    ) -> dict[str, Refusal]:
        """Return the sessions, by inlet, of peers beyond their share that end, so that another peer has its
        own, and what their clients are told.
        """
        if not of_bytes and self._places.gives_way(asking, capacity) is None:
            return {}
        chosen = beyond_share(self._holdings(sessions, of_bytes), asking, needed, capacity)
        text = "this peer has more sessions, or more memory for them, than its share, which others need"
        return dict.fromkeys(chosen, Refusal("busy", text, _SHARE_RETRY_S))

    def _holdings(self, sessions: Iterable[ServedSession], of_bytes: bool) -> list[Holding]:
        now = self._engine.clock.now()
        return [
            Holding(
                session.inlet,
                session.lease.nbytes if of_bytes else 1,
                now - session.used_at,
                session.holder,
                session.turn.locked(),
            )
            for session in sessions
        ]


def _evicted(idle_s: float) -> Refusal:
    """What the client of a session is told that had to go."""
    text = f"the session did nothing for {idle_s:.0f} s, and its room was needed; open it anew"
    return Refusal("busy", text, retry_after_s(0))
