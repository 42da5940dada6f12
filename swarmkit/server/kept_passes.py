"""Forward passes of training whose graphs are kept until their way back, as long as there is room.

Nobody depends on it: a request for the way back brings all that it needs, and where the pass is not kept
(another server ran it, it had to make room, its client went away) the blocks are run forward again. Where it
is, that half of the work is saved.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from swarmkit.models.whole import WholePass
from swarmkit.net.conversation import Received
from swarmkit.net.gradient_messages import GradientRequest


@dataclass(frozen=True)
class PassKey:
    """A client, and a hash of all that its pass depends on."""

    peer_id: str
    digest: bytes

    @classmethod
    def of(cls, peer_id: str, request: GradientRequest, received: Received) -> PassKey:
        """The same for a forward request and for the backward request that belongs to it."""
        specs = request.hidden, request.mask, request.positions
        header = request.start, request.stop, request.states, request.adapter, request.trains, specs
        digest = hashlib.blake2b(msgspec.msgpack.encode(header), digest_size=32)
        for spec in specs:
            if spec is not None:
                digest.update(received.raw(spec))
        return cls(peer_id, digest.digest())


class KeptPasses:
    """Passes by key, within a number of bytes; the oldest make room. May be used by several threads."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._kept: OrderedDict[PassKey, tuple[Sequence[WholePass], int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        with self._lock:
            return sum(nbytes for _, nbytes in self._kept.values())

    def keep(self, key: PassKey, passes: Sequence[WholePass]) -> None:
        """Keep the passes of a request, one for each group of its rows, if they fit."""
        nbytes = sum(one.kept_bytes for one in passes)
        with self._lock:
            self._kept.pop(key, None)
            if nbytes > self.capacity_bytes:
                return
            held = sum(nbytes for _, nbytes in self._kept.values())
            while held + nbytes > self.capacity_bytes:
                held -= self._kept.popitem(last=False)[1][1]
            self._kept[key] = passes, nbytes

    def take(self, key: PassKey) -> Sequence[WholePass] | None:
        """The passes of a request, which are not kept any longer; None if they are not there."""
        with self._lock:
            found = self._kept.pop(key, None)
        return None if found is None else found[0]

    def drop(self, peer_id: str) -> None:
        """Forget what is kept for a client."""
        with self._lock:
            for key in [key for key in self._kept if key.peer_id == peer_id]:
                del self._kept[key]
