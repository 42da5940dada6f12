"""Adapters that a server keeps: its own, which it hosts, and those of clients, within quotas.

::

    bytes of a client's adapters  <= client_bytes
    bytes of all clients' ones    <= capacity_bytes        (what `audit` checks)

What is in use (a session has it, or a request for training) stays. Of the rest, the least recently used go
when there is no room: first the same client's, then those of the host whose clients have most, and there of
the client that has most. A client that misses one sends it again. As what is in use cannot go, one host may
not have more than half of the room in use, or one client's quota if that is more.
Hosted ones are the server's own choice; they count towards no quota and never go.

Used by the event loop's thread only.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from swarmkit.errors import SwarmkitError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.transport.shares import NOBODY, Holder


class NoRoomError(SwarmkitError):
    """There is no room for an adapter; `quota` tells whether it is the client's own quota that is full."""

    def __init__(self, message: str, quota: bool) -> None:
        super().__init__(message)
        self.quota = quota


@dataclass(eq=False)
class _StoredAdapter:
    adapter: Adapter
    owner: Holder
    users: int = 0


class Hold:
    """An adapter in use, until `release` or the end of a `with` block."""

    def __init__(self, kept: _StoredAdapter) -> None:
        self._kept: _StoredAdapter | None = kept
        self.adapter = kept.adapter
        kept.users += 1

    def release(self) -> None:
        """Use it no longer. May be called twice."""
        if self._kept is not None:
            self._kept.users -= 1
            self._kept = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class AdapterStore:
    """Adapters by name."""

    def __init__(self, capacity_bytes: int, client_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.client_bytes = min(client_bytes, capacity_bytes)
        self._kept: OrderedDict[str, _StoredAdapter] = OrderedDict()
        self._hosted: dict[str, tuple[str, _StoredAdapter]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._hosted

    @property
    def nbytes(self) -> int:
        """Of clients' adapters."""
        return self._of(None)

    @property
    def hosted(self) -> dict[str, str]:
        """What people call the hosted adapters, by name."""
        return {name: label for name, (label, _) in self._hosted.items()}

    def host(self, name: str, label: str, adapter: Adapter) -> None:
        """Keep one of the server's own for as long as it runs."""
        self._hosted[name] = label, _StoredAdapter(adapter, NOBODY)

    def hold(self, name: str) -> Hold | None:
        """Use an adapter; None if it is not here."""
        if name in self._hosted:
            return Hold(self._hosted[name][1])
        kept = self._kept.get(name)
        if kept is None:
            return None
        self._kept.move_to_end(name)
        return Hold(kept)

    def check_room(self, owner: Holder, nbytes: int) -> None:
        """Raise NoRoomError unless so many bytes of a client's can be taken, others' being let go."""
        if nbytes > self.client_bytes:
            raise NoRoomError(
                f"the adapter's {nbytes} bytes are more than the {self.client_bytes} that one client may "
                "have here; choose a lower rank or fewer modules",
                quota=True,
            )
        used = [kept for kept in self._kept.values() if kept.users]
        own = _nbytes(kept for kept in used if kept.owner.peer == owner.peer)
        if own + nbytes > self.client_bytes:
            raise NoRoomError(
                f"{nbytes} bytes more than the {own} of your adapters in use exceed the {self.client_bytes} "
                "that one client may have here; close sessions with other adapters",
                quota=True,
            )
        of_host = _nbytes(kept for kept in used if owner.host and kept.owner.host == owner.host)
        if of_host + nbytes > max(self.client_bytes, self.capacity_bytes // 2):
            raise NoRoomError(
                f"{nbytes} bytes more than the {of_host} of adapters in use by clients at your address are "
                "more than may come from one address; try another server",
                quota=False,
            )
        if _nbytes(used) + nbytes > self.capacity_bytes:
            raise NoRoomError("adapters in use fill this server; try another one", quota=False)

    def put(self, owner: Holder, name: str, adapter: Adapter) -> None:
        """Keep a client's adapter as the one used last.

        Raises:
            NoRoomError: see `check_room`; what is kept stays as it was.
        """
        if name in self:
            if name in self._kept:
                self._kept.move_to_end(name)
            return
        self.check_room(owner, adapter.nbytes)
        self.shrink(owner.peer, self.client_bytes - adapter.nbytes)
        self.shrink(None, self.capacity_bytes - adapter.nbytes)
        self._kept[name] = _StoredAdapter(adapter, owner)

    def audit(self) -> None:
        """Raise AssertionError unless all quotas are kept."""
        peers = {kept.owner.peer for kept in self._kept.values()}
        if self.nbytes > self.capacity_bytes or any(self._of(peer) > self.client_bytes for peer in peers):
            raise AssertionError(f"adapters of {self.nbytes} bytes exceed {self.capacity_bytes}")

    def _of(self, peer: str | None) -> int:
        return _nbytes(kept for kept in self._kept.values() if peer in (None, kept.owner.peer))

    def shrink(self, peer: str | None, nbytes: int) -> None:
        """Let go of a client's adapters; with None of any client's, of those that have most at first."""
        while self._of(peer) > nbytes:
            unused = {
                name: kept.owner
                for name, kept in self._kept.items()
                if not kept.users and peer in (None, kept.owner.peer)
            }
            if not unused:
                return
            hosts = Counter[str]()
            for kept in self._kept.values():
                hosts[kept.owner.host] += kept.adapter.nbytes
            del self._kept[
                max(unused, key=lambda name: (hosts[unused[name].host], self._of(unused[name].peer)))
            ]


def _nbytes(kept: Iterable[_StoredAdapter]) -> int:
    return sum(one.adapter.nbytes for one in kept)
