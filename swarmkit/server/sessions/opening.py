"""How a session begins on a server: what its client asks for is checked, and gets a cache and a lease."""

from __future__ import annotations

from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol.messages import Open
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.transport.shares import Holder
from swarmkit.server.adapters.service import held
from swarmkit.server.adapters.store import AdapterStore
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.cache.prefix_cache import root_of
from swarmkit.server.cache.prefix_tracker import PrefixTracker, tail_bytes
from swarmkit.server.sessions.session import ServedSession
from swarmkit.settings import ServerSettings


class SessionOpening:
    """Opens sessions over blocks of one stage."""

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        kv_bytes_per_token_per_block: int,
        settings: ServerSettings,
        budget: KVBudget,
        adapters: AdapterStore,
    ) -> None:
        self._stage = stage
        self._fingerprint = fingerprint
        self._kv_bytes = kv_bytes_per_token_per_block
        self._settings = settings
        self._budget = budget
        self._adapters = adapters

    def bytes_per_token(self, start: int, stop: int) -> int:
        """Bytes of keys and values of one token of one row in blocks [start, stop)."""
        return max(1, (stop - start) * self._kv_bytes)

    def check(self, message: Open) -> None:
        """Refuse a session that this server cannot have, however much room there is."""
        if message.fingerprint != self._fingerprint:
            raise Refusal(
                "wrong_model",
                f"this server serves the model {self._fingerprint}, not {message.fingerprint}; "
                "load the same checkpoint, or ask servers of yours",
            )
        stage = self._stage
        if not stage.start <= message.start < message.stop <= stage.stop:
            raise Refusal(
                "blocks_not_held",
                f"blocks {message.start}:{message.stop} are not inside the served {stage.start}:{stage.stop}",
            )
        if not 1 <= message.max_length <= self._settings.sessions.max_session_length:
            raise Refusal(
                "too_long",
                f"a session may hold 1 to {self._settings.sessions.max_session_length} tokens a row",
            )

    def open(self, message: Open, client: Holder, now: float) -> ServedSession:
        """Make the session that a checked message of a client asks for.

        Raises:
            Refusal: its adapter is not here.
        """
        stage = self._stage
        hold = held(self._adapters, message.adapter, message.start, message.stop)
        cache = stage.new_cache(message.start, message.stop, None if hold is None else hold.adapter)
        bytes_per_token = self.bytes_per_token(message.start, message.stop)
        scope = self._settings.sessions.prefix_cache
        if scope == "off" or not (cache.has_pages and stage.keys_are_final):
            lease, trail = self._budget.lease(bytes_per_token), None
        else:
            owner = client.peer if scope == "client" else ""
            if message.adapter:  # other keys and values come of the same inputs
                owner = f"{owner}\n{message.adapter}"
            trail = PrefixTracker(self._budget.pages, root_of(owner, message.start, message.stop))
            lease = self._budget.lease(bytes_per_token, tail_bytes(stage.hidden_size, stage.dtype.itemsize))
        return ServedSession(
            message.start, message.stop, message.max_length, cache, lease, now, trail, hold, client
        )
