"""The one seam to the network: what every body of it must offer.

A transport moves *frames* (byte strings of at most `MAX_FRAME_BYTES`) between peers that are known by
the name of their public key, and keeps small signed values in a table that all peers share. It knows
nothing of models, messages or tensors. There are two bodies: `hivemind_transport` for the world and
`memory` for tests.

Contract of every body, which `tests/net/test_transport_contract.py` holds against each of them:

* the remote peer id of a stream is authenticated;
* frames arrive whole, in order, and at most once;
* foreign exceptions never leave a transport: a peer's end is `PeerUnreachableError`, an overlong or
  malformed frame is `ProtocolError`, a transport that has been closed is `TransportError`;
* `close()` ends everything the transport started: streams, tasks, threads, processes, files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.rates import Rates

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""No frame is larger: hivemind's daemon refuses messages above 4 MiB, and a reader's memory is bounded."""

Buffer: TypeAlias = bytes | bytearray | memoryview


@runtime_checkable
class Stream(Protocol):
    """A two-way conversation with one peer, in frames.

    Attributes:
        rates: what it keeps to, from the next frame on; None sets no limits.
        host: the address that the peer comes from; empty where that is not known.
    """

    rates: Rates | None
    host: str

    @property
    def peer_id(self) -> str:
        """The authenticated peer at the other end."""

    async def send(self, *parts: Buffer) -> None:
        """Send one frame, made of `parts` in order (so that a header and a tensor need no copy to join).

        Raises:
            UsageError: the frame is larger than `MAX_FRAME_BYTES`.
            PeerUnreachableError: the conversation has ended.
        """

    async def receive(self) -> bytes:
        """The next frame.

        Raises:
            PeerUnreachableError: the peer ended the conversation or went away.
            ProtocolError: the peer sent a frame that is too large.
        """

    def on_end(self, call: Callable[[], object]) -> None:
        """Have `call` called once the conversation has ended, at whichever end, even while no `receive` is
        waiting.

        A peer that has sent more than was read may have gone without the end being noticed.
        """

    def close(self) -> None:
        """End the conversation from this side; the peer's `receive` raises. May be called twice."""


Handler: TypeAlias = Callable[[Stream], Awaitable[None]]
"""Serves one incoming stream; the transport closes the stream when it returns or raises."""

RecordCheck: TypeAlias = Callable[[str, str, bytes, float], bool]
"""`check(key, subkey, value, expires_at)`: whether this peer is willing to keep the record and hand it out
until `expires_at` (Unix time, seconds)."""


def service_id(peer_id: str, service: int) -> str:
    """The name of one of a peer's services: the subkey of its records. Service 0 has the peer's own name."""
    return f"{peer_id}/{service}" if service else peer_id


def peer_of(subkey: str) -> str:
    """The peer that a record's subkey belongs to, whichever of its services that is."""
    return subkey.partition("/")[0]


def endpoint_of(name: str, service: int) -> str:
    """The endpoint called `name` of one of a peer's services. Service 0 has the plain name."""
    return f"{name}/{service}" if service else name


@runtime_checkable
class Transport(Protocol):
    """One peer's connection to the swarm."""

    @property
    def identity(self) -> Identity:
        """The key pair whose public half is this peer's name."""

    @property
    def peer_id(self) -> str:
        """This peer's name: `identity.peer_id`."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where other peers can dial this one, each ending in `/p2p/<peer id>`."""

    async def listen(self, name: str, handler: Handler) -> None:
        """Serve every incoming stream called `name` in a task of its own."""

    async def unlisten(self, name: str) -> None:
        """Serve no stream called `name` any more. Those that are open end, and so do their tasks."""

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """Open a stream called `name` to a peer.

        Args:
            addresses: where the peer said it can be dialled; a hint, may be empty.
            timeout: seconds.

        Raises:
            NotServedError: the peer does not serve `name`.
            PeerUnreachableError: the peer cannot be reached.
            PeerTimeoutError: nothing answered within `timeout`.
        """

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        """Put `(key, value)` pairs into the shared table, each until `expires_at` (Unix time, seconds). A
        later `expires_at` replaces an earlier one.

        Args:
            service: the number of the service at this peer that the records are of; their subkey is
                `service_id(peer_id, service)`.

        Returns: how many of them at least one peer accepted.
        """

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        """What the shared table holds now: `{key: {subkey: value}}`. Keys with nothing are left out.

        Raises:
            NoContactError: there are other peers, as far as is known, and none of them answered.
        """

    def deal_with(self, lists: PeerLists) -> AbstractContextManager[None]:
        """Inside the `with` block, the shared table keeps to the lists of one more part of this peer; see
        `TableLists`.
        """

    def admits(self, peer_id: str) -> bool:
        """Whether the lists of any part of this peer admit another one; `deal_with` has told of them."""

    def kill(self) -> None:
        """Vanish without a word, as a machine does that loses power. `close` is still due, to clean up."""

    async def close(self) -> None:
        """End everything this transport started. May be called twice."""
