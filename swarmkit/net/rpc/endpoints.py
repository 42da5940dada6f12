"""Opening and serving streams of a protocol, with a clear word for peers of another protocol version.

From version 2 on, endpoints have the same names in every version, and the head of each message tells the
version. A peer announces which versions it speaks; a client begins in the newest one that both speak, and a
server goes on in the one that its client has begun with. Version 1 had the version in the endpoints' names,
so that a peer of version 1 and one of a later version would only learn that the other "does not serve" what
is asked for. Here both are told what is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio
import msgspec

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import NotServedError, PeerError, ProtocolError
from swarmkit.net.protocol.protocol import OWN_VERSIONS, Protocol, version_mismatch
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.message_stream import MAGIC
from swarmkit.net.transport.seam import Handler, Stream, Transport, endpoint_of

_OLD_VERSION = 1
_OLD_HEAD = struct.Struct(">2sBIQ")
_OLD_LINGER_S = 1.0


async def listen(transport: Transport, protocol: Protocol, handler: Handler, service: int = 0) -> None:
    """Serve streams of a protocol, and tell peers of version 1 that they need an update.

    Args: service: the number of the service at this peer.
    """
    await transport.listen(endpoint_of(protocol.endpoint, service), handler)
    await transport.listen(_old_endpoint(protocol), _refuse_old)


async def unlisten(transport: Transport, protocol: Protocol, service: int = 0) -> None:
    """Serve no streams of a protocol any more; those that are open end."""
    await transport.unlisten(endpoint_of(protocol.endpoint, service))


async def connect(
    transport: Transport,
    protocol: Protocol,
    peer_id: str,
    addresses: Sequence[str] = (),
    timeout: float = 5.0,
    *,
    service: int = 0,
    versions: tuple[int, int] | None = None,
    max_payload_bytes: int = 0,
    clock: Callable[[], float] = SYSTEM_CLOCK.now,
) -> ClientStream:
    """Open a stream of a protocol to a peer.

    Args:
        addresses: where the peer said that it can be dialled; may be empty.
        timeout: seconds.
        service: the number of the service at the peer.
        versions: the oldest and the newest protocol version that the peer says it speaks. One that says
            nothing is spoken to in the oldest one.

    Raises:
        ProtocolError: the peer speaks no version that this one speaks.
        PeerUnreachableError: the peer cannot be reached or does not serve this protocol.
        PeerTimeoutError: the peer does not answer within `timeout`.
    """
    version = OWN_VERSIONS.oldest if versions is None else OWN_VERSIONS.shared_with(versions)
    if version is None:
        raise ProtocolError(version_mismatch(versions or OWN_VERSIONS), peer_id)
    try:
        stream = await transport.open(peer_id, endpoint_of(protocol.endpoint, service), addresses, timeout)
    except NotServedError as error:
        if await _is_old(transport, protocol, peer_id, addresses, timeout):
            raise ProtocolError(version_mismatch(_OLD_VERSION), peer_id) from None
        raise error from None
    client = ClientStream(stream, protocol, max_payload_bytes, clock=clock)
    client.version = version
    return client


def _old_endpoint(protocol: Protocol) -> str:
    return f"swarmkit/{_OLD_VERSION}/{protocol.name}"


async def _is_old(
    transport: Transport, protocol: Protocol, peer_id: str, addresses: Sequence[str], timeout: float
) -> bool:
    """Whether a peer that does not serve a protocol serves its version 1.

    A peer of a later version refuses at once; one of version 1 waits to be asked something.
    """
    try:
        stream = await transport.open(peer_id, _old_endpoint(protocol), addresses, timeout)
    except PeerError:
        return False
    try:
        with anyio.move_on_after(_OLD_LINGER_S):
            await stream.receive()
            return False
        return True
    except PeerError:
        return False
    finally:
        stream.close()


async def _refuse_old(stream: Stream) -> None:
    """Answer a peer of version 1, in the messages of that version."""
    text = version_mismatch(_OLD_VERSION)
    header = msgspec.msgpack.encode({"type": "Fault", "code": "bad_message", "message": text})
    await stream.send(_OLD_HEAD.pack(MAGIC, _OLD_VERSION, len(header), 0) + header)
    with anyio.move_on_after(_OLD_LINGER_S), suppress(PeerError):
        while True:
            await stream.receive()
