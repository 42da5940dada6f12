"""What the p2p daemon is asked over its control socket: one request on each connection.

The requests and answers are those of libp2p's daemon. Where a stream is asked for, the connection is that
stream from then on.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import base58

from swarmkit.errors import (
    NoContactError,
    PeerUnreachableError,
    ProtocolError,
    SwarmkitError,
    TransportError,
)
from swarmkit.net.hivemind.addresses import dialable, host_in, multiaddr, multiaddr_type
from swarmkit.net.hivemind.framing import FrameStream

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 10.0


class DaemonRefusal(SwarmkitError):
    """The daemon says that what it was asked for cannot be done."""


class DaemonControl:
    """Asks the daemon that runs at present.

    What it is asked for raises `DaemonRefusal` where it refuses, and NoContactError where it does not answer,
    unless it says otherwise.
    """

    def __init__(
        self,
        socket: Callable[[], Path],
        check_running: Callable[[], None],
        heard_at: Callable[[], float | None],
    ) -> None:
        """Ask nothing yet.

        Args:
            socket: where the present daemon is asked.
            check_running: raises a TransportError if there is no daemon now.
            heard_at: when another peer was heard last, for errors.
        """
        self._socket = socket
        self._check_running = check_running
        self._heard_at = heard_at

    async def accept_streams(self, name: str, at: str) -> None:
        """Have it hand over the streams of a name at a socket.

        Raises:
            TransportError: it does not.
        """
        pb = _messages()
        address = multiaddr(f"/unix{at}").to_bytes()
        request = pb.StreamHandlerRequest(addr=address, proto=[name], balanced=False)
        try:
            with anyio.fail_after(_REQUEST_TIMEOUT_S):
                await self._ask(pb.Request(type=pb.Request.STREAM_HANDLER, streamHandler=request))
        except (TimeoutError, DaemonRefusal) as error:
            raise TransportError(
                f"the p2p daemon does not accept streams called {name!r}: {error}"
            ) from error

    async def refuse_streams(self, name: str, at: str) -> None:
        """Have it hand over no more of them, as far as it answers."""
        pb = _messages()
        address = multiaddr(f"/unix{at}").to_bytes()
        request = pb.RemoveStreamHandlerRequest(addr=address, proto=[name])
        try:
            with anyio.fail_after(_REQUEST_TIMEOUT_S):
                await self._ask(
                    pb.Request(type=pb.Request.REMOVE_STREAM_HANDLER, removeStreamHandler=request)
                )
        except (TimeoutError, TransportError, DaemonRefusal) as error:
            logger.debug("the p2p daemon goes on accepting streams called %r: %r", name, error)

    async def connect(self, peer_id: str, addresses: Sequence[str], timeout: float) -> None:
        """Have it connect to a peer, if it can be dialled at any of these addresses."""
        if known := dialable(peer_id, addresses):
            pb = _messages()
            connect = pb.ConnectRequest(
                peer=base58.b58decode(peer_id), addrs=known, timeout=_whole_seconds(timeout)
            )
            await self._ask(pb.Request(type=pb.Request.CONNECT, connect=connect))

    async def disconnect(self, peer_id: str) -> None:
        """Have it give up its connection to a peer, as far as it answers."""
        pb = _messages()
        request = pb.DisconnectRequest(peer=base58.b58decode(peer_id))
        with anyio.move_on_after(_REQUEST_TIMEOUT_S):
            try:
                await self._ask(pb.Request(type=pb.Request.DISCONNECT, disconnect=request))
            except SwarmkitError as error:
                logger.debug("the p2p daemon does not give up peer %s: %r", peer_id, error)

    async def open_stream(self, peer_id: str, name: str, timeout: float) -> FrameStream:
        """Have it open a stream to a peer.

        Raises:
            ValueError: the id is none.
        """
        pb = _messages()
        request = pb.StreamOpenRequest(
            peer=base58.b58decode(peer_id), proto=[name], timeout=_whole_seconds(timeout)
        )
        stream, _ = await self._exchange(pb.Request(type=pb.Request.STREAM_OPEN, streamOpen=request))
        stream.peer_id = peer_id
        return stream

    async def peers(self) -> list[str]:
        """The ids of the peers to which it has a connection; none if it does not answer."""
        pb = _messages()
        try:
            with anyio.fail_after(_REQUEST_TIMEOUT_S):
                response = await self._ask(pb.Request(type=pb.Request.LIST_PEERS))
        except (TimeoutError, SwarmkitError) as error:
            logger.debug("the p2p daemon does not tell its peers: %r", error)
            return []
        return [base58.b58encode(peer.id).decode() for peer in response.peers]

    async def own_addresses(self) -> list[str]:
        """Where it can be dialled, without its peer's id.

        Raises:
            NoContactError: it does not answer.
        """
        pb = _messages()
        try:
            with anyio.fail_after(_REQUEST_TIMEOUT_S):
                response = await self._ask(pb.Request(type=pb.Request.IDENTIFY))
        except (TimeoutError, DaemonRefusal) as error:
            raise NoContactError(
                f"the p2p daemon does not answer ({str(error) or 'in time'}); this machine may be very busy",
                self._heard_at(),
            ) from error
        parse = multiaddr_type()
        return [str(parse(raw)) for raw in response.identify.addrs]

    async def _ask(self, request: Any) -> Any:
        """Have it do one thing; its answer."""
        connection, response = await self._exchange(request)
        connection.close()
        return response

    async def _exchange(self, request: Any) -> tuple[FrameStream, Any]:
        connection = FrameStream(greeting=True)
        try:
            await asyncio.get_running_loop().create_unix_connection(
                lambda: connection, path=str(self._socket())
            )
            connection.write_greeting(request.SerializeToString())
            response = _messages().Response.FromString(await connection.greeting())
            if response.type == _messages().Response.ERROR:
                raise DaemonRefusal(response.error.msg)
            self._check_running()
        except BaseException as error:
            connection.abort(PeerUnreachableError("the request was given up"))
            if isinstance(error, OSError | PeerUnreachableError | ProtocolError) and not isinstance(
                error, TimeoutError
            ):
                self._check_running()
                raise NoContactError(  # it may have ended just now
                    f"the p2p daemon does not answer: {error}; restart this peer if that lasts",
                    self._heard_at(),
                ) from error
            raise
        return connection, response


async def announced_opener(stream: FrameStream) -> str:
    """Note on a stream, which the daemon hands over, who opened it and from where; returns its name."""
    info = _messages().StreamInfo.FromString(await stream.greeting())
    stream.peer_id = base58.b58encode(info.peer).decode()
    stream.host = host_in(info.addr)
    name: str = info.proto
    return name


def _whole_seconds(timeout: float) -> int:
    """A timeout as the daemon takes it."""
    return max(1, math.ceil(timeout))


def _messages() -> Any:
    return importlib.import_module("hivemind.proto.p2pd_pb2")
