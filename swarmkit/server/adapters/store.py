"""Adapters that a server keeps: its own, which it hosts, and those of clients, within quotas.

::

    bytes of a client's adapters  <= client_bytes
    bytes of all clients' ones    <= capacity_bytes        (what `audit` checks)

What is in use (a session has it, or a request for training) stays. Of the rest, the least recently used go
when there is no room: first the same client's, then those of the client that has most. A client that misses
one sends it again.
Hosted ones are the server's own choice; they count towards no quota and never go.

Used by the event loop's thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType

from swarmkit.errors import SwarmkitError
from swarmkit.models.adapters.adapter import Adapter


class NoRoomError(SwarmkitError):
    """There is no room for an adapter; `quota` tells whether it is the client's own quota that is full."""

    def __init__(self, message: str, quota: bool) -> None:
        super().__init__(message)
        self.quota = quota


@dataclass(eq=False)
class _StoredAdapter:
    adapter: Adapter
    owner: str
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
        return sum(kept.adapter.nbytes for kept in self._kept.values())

    @property
    def hosted(self) -> dict[str, str]:
        """What people call the hosted adapters, by name."""
        return {name: label for name, (label, _) in self._hosted.items()}

    def host(self, name: str, label: str, adapter: Adapter) -> None:
        """Keep one of the server's own for as long as it runs."""
        self._hosted[name] = label, _StoredAdapter(adapter, "")

    def hold(self, name: str) -> Hold | None:
        """Use an adapter; None if it is not here."""
        if name in self._hosted:
            return Hold(self._hosted[name][1])
        kept = self._kept.get(name)
        if kept is None:
            return None
        self._kept.move_to_end(name)
        return Hold(kept)

    def check_room(self, owner: str, nbytes: int) -> None:
        """Raise NoRoomError unless so many bytes of a client's can be taken, others' being let go."""
        if nbytes > self.client_bytes:
            raise NoRoomError(
                f"the adapter's {nbytes} bytes are more than the {self.client_bytes} that one client may "
                "have here; choose a lower rank or fewer modules",
                quota=True,
            )
        own = self._in_use(owner)
        if own + nbytes > self.client_bytes:
            raise NoRoomError(
                f"{nbytes} bytes more than the {own} of your adapters in use exceed the {self.client_bytes} "
                "that one client may have here; close sessions with other adapters",
                quota=True,
            )
        if self._in_use(None) + nbytes > self.capacity_bytes:
            raise NoRoomError("adapters in use fill this server; try another one", quota=False)

    def put(self, owner: str, name: str, adapter: Adapter) -> None:
        """Keep a client's adapter as the one used last.

        Raises:
            NoRoomError: see `check_room`; what is kept stays as it was.
        """
        if name in self:
            if name in self._kept:
                self._kept.move_to_end(name)
            return
        self.check_room(owner, adapter.nbytes)
        self._shrink(owner, self.client_bytes - adapter.nbytes)
        self._shrink(None, self.capacity_bytes - adapter.nbytes)
        self._kept[name] = _StoredAdapter(adapter, owner)

    def audit(self) -> None:
        """Raise AssertionError unless all quotas are kept."""
        owners = {kept.owner for kept in self._kept.values()}
        if self.nbytes > self.capacity_bytes or any(self._of(o) > self.client_bytes for o in owners):
            raise AssertionError(f"adapters of {self.nbytes} bytes exceed {self.capacity_bytes}")

    def _of(self, owner: str | None) -> int:
        return sum(kept.adapter.nbytes for kept in self._kept.values() if owner in (None, kept.owner))

    def _in_use(self, owner: str | None) -> int:
        used = (kept for kept in self._kept.values() if kept.users and owner in (None, kept.owner))
        return sum(kept.adapter.nbytes for kept in used)

    def _shrink(self, owner: str | None, nbytes: int) -> None:
        """Let go of a client's adapters; with None of any client's, of the one that has most at first."""
        while self._of(owner) > nbytes:
            unused = [
                name for name, kept in self._kept.items() if not kept.users and owner in (None, kept.owner)
            ]
            if not unused:
                return
            del self._kept[max(unused, key=lambda name: self._of(self._kept[name].owner))]
