"""Activations of forward passes, kept for the backward pass as long as there is room.

No request depends on them: a backward request brings all that it needs, and where the activations are not
kept (another server ran the forward pass, there was no room, it took too long) the blocks are run forward
again. Where they are kept, that half of the work is saved.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.execution.full_sequences import FullSequencePass
from swarmkit.net.protocol.gradient_messages import GradientRequest
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.shares import Holder, gives_way


@dataclass(frozen=True)
class PassKey:
    """A client, and a hash of all that its pass depends on."""

    peer_id: str
    digest: bytes

    @classmethod
    def of(cls, peer_id: str, request: GradientRequest, incoming: IncomingMessage) -> PassKey:
        """The same for a forward request and for the backward request that belongs to it."""
        specs = request.hidden, request.mask, request.positions
        header = request.start, request.stop, request.states, request.adapter, request.trains, specs
        digest = hashlib.blake2b(msgspec.msgpack.encode(header), digest_size=32)
        for spec in specs:
            if spec is not None:
                digest.update(incoming.raw(spec))
        return cls(peer_id, digest.digest())


@dataclass(frozen=True)
class _CachedPass:
    passes: Sequence[FullSequencePass]
    nbytes: int
    until: float


class ActivationCache:
    """Passes by key, within a number of bytes and of seconds. May be used by several threads.

    Where there is no room, the newcomer is not kept: a batch goes back in the order in which it came, so that
    each one that made room for the next would be wanted before it. Only a peer that has more than its share
    loses what came last of it to another peer.
    """

    def __init__(
        self, capacity_bytes: int, *, seconds: float = 120.0, clock: Callable[[], float] = SYSTEM_CLOCK.now
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[PassKey, _CachedPass] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    def keep(self, key: PassKey, passes: Sequence[FullSequencePass]) -> None:
        """Keep the passes of a request, one for each group of its rows, if there is room."""
        self.drop_old()
        nbytes = sum(one.kept_bytes for one in passes)
        with self._lock:
            self._kept.pop(key, None)
            if self._has_room(key.peer_id, nbytes):
                self._kept[key] = _CachedPass(passes, nbytes, self._clock() + self._seconds)

    def _has_room(self, peer_id: str, nbytes: int) -> bool:
        """Whether so many bytes fit, at the cost of peers that have more than their share."""
        held: dict[Holder, float] = {}
        for key, kept in self._kept.items():
            holder = Holder("", key.peer_id)
            held[holder] = held.get(holder, 0.0) + kept.nbytes
        while sum(held.values()) + nbytes > self.capacity_bytes:
            victim = gives_way(held, Holder("", peer_id), nbytes, self.capacity_bytes)
            if victim is None:
                return False
            last = next(key for key in reversed(self._kept) if key.peer_id == victim.peer)
            held[victim] -= self._kept.pop(last).nbytes
        return True

    def set_capacity(self, capacity_bytes: int) -> None:
        """Keep within another number of bytes from now on; the passes that came last are dropped first."""
        with self._lock:
            self.capacity_bytes = capacity_bytes
            kept_bytes = sum(kept.nbytes for kept in self._kept.values())
            while kept_bytes > capacity_bytes:
                kept_bytes -= self._kept.popitem()[1].nbytes

    def take(self, key: PassKey) -> Sequence[FullSequencePass] | None:
        """The passes of a request, which are not kept any longer; None if they are not there."""
        with self._lock:
            kept = self._kept.pop(key, None)
        return None if kept is None else kept.passes

    def drop_old(self) -> None:
        """Forget what has waited for its way back for too long. To be called now and then."""
        now = self._clock()
        with self._lock:
            for key in [key for key, kept in self._kept.items() if kept.until <= now]:
                del self._kept[key]
