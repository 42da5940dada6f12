"""Admission control: which sessions and steps a server takes, and which it refuses at once as busy."""

from __future__ import annotations

import math

from swarmkit.errors import SwarmkitError
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.server.cache.kv_budget import CacheFullError
from swarmkit.server.engine.admission_policy import Holding, Tenures, retry_after_s, to_evict
from swarmkit.server.engine.engine import Engine
from swarmkit.server.sessions.session import ServedSession
from swarmkit.settings import ServerSettings


class AdmissionControl:
    """Refuses what a server has no room for, and says when it expects to have some."""

    def __init__(self, settings: ServerSettings, engine: Engine, receive_budget: ReceiveBudget) -> None:
        self._settings = settings
        self._engine = engine
        self._receive_budget = receive_budget
        self._tenures = Tenures()

    def left(self, session: ServedSession) -> None:
        """A session ends."""
        if session.lease.nbytes:
            self._tenures.ended(self._engine.clock.now() - session.opened_at)

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

    async def room_for(self, incoming: IncomingMessage) -> ReceiveReservation:
        """Have memory for a large step to arrive in.

        It waits a little for those that are arriving: most are through in no time. A client that would wait
        longer had better know, and go elsewhere.
        """
        step: Step = incoming.message
        room = ReceiveReservation(self._receive_budget)
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
        self, sessions: dict[str, ServedSession], needed: int, *, of_bytes: bool, at_once: bool
    ) -> list[str]:
        """Return the sessions that end to make room for `needed` bytes, or sessions.

        A session that runs a step stays. One that was idle only for a short time goes if `at_once` is set.
        """
        now = self._engine.clock.now()
        holdings = [
            Holding(key, session.lease.nbytes if of_bytes else 1, now - session.used_at)
            for key, session in sessions.items()
            if not session.turn.locked()
        ]
        least_idle_s = 0.0 if at_once else self._settings.sessions.evict_after_s
        return to_evict(holdings, needed, least_idle_s, partly=at_once)


def evicted(idle_s: float) -> Refusal:
    """What the client of a session is told that had to go."""
    text = f"the session did nothing for {idle_s:.0f} s, and its room was needed; open it anew"
    return Refusal("busy", text, retry_after_s(0))
