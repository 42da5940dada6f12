"""Which way a stream takes: through both daemons, or directly. Its first frames, at both ends.

The peer that serves a stream accepts it, and may offer a direct connection (`direct`) with that. The opener
then says which way it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from swarmkit.clock import Clock
from swarmkit.errors import PeerUnreachableError
from swarmkit.net.hivemind.addresses import ip_of
from swarmkit.net.hivemind.direct import DirectListener, Offer, SealedStream, connect_directly
from swarmkit.net.hivemind.direct_tries import DirectTries
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.swarm_key import SwarmKey, prove_to_server

_ACCEPTED = b""
"""The first frame of every stream, sent by the peer that serves it. A daemon may open a stream towards a
peer that has just died or that is no longer able to answer; only this frame tells that the peer is there.
With an offer (`direct`) in its place, the opener's first frame is one of the next two.
"""
_STAY = b"stay"
_DIRECT = b"direct"
_LONGEST_DIRECT_S = 1.0


# the peer that serves


async def accept(stream: FrameStream, direct: DirectListener | None, within_s: float) -> FrameStream:
    """Accept a stream, and offer the direct connection if there is one. Returns the stream to go on with."""
    if direct is None:
        await stream.send(_ACCEPTED)
        return stream
    with direct.offer(stream.peer_id) as expected:
        await stream.send(expected.offer.to_bytes())
        with anyio.fail_after(within_s):
            if await stream.receive() != _DIRECT:
                return stream
        taken = expected.take()
    stream.close()
    taken.host = stream.host
    return taken


# the peer that opens


async def accepted(stream: FrameStream, key: SwarmKey | None, name: str, own_id: str) -> Offer | None:
    """Wait until the peer accepts a stream. Returns the direct connection that it offers.

    Raises:
        PeerError: it does not; then the stream is closed.
    """
    try:
        answer = await stream.receive()
        if await prove_to_server(key, answer, stream, name, own_id):
            answer = await stream.receive()
        if answer == _ACCEPTED:
            return None
        if (offer := Offer.from_bytes(answer)) is None:
            raise PeerUnreachableError(f"peer {stream.peer_id} speaks another protocol", stream.peer_id)
        return offer
    except BaseException:
        stream.close()
        raise


async def stay(stream: FrameStream) -> None:
    """Go on with the stream that is there, although a direct one was offered."""
    await stream.send(_STAY)


class WayChooser:
    """Takes direct connections that are offered, and leaves alone for a while whom it cannot have so."""

    def __init__(self, adopt: Callable[[FrameStream], None], keep_alive_s: float, clock: Clock) -> None:
        """Have tried none yet.

        Args:
            adopt: is told of each direct stream as it begins.
            keep_alive_s: how long the machine of a peer may be silent before a direct stream to it ends.
        """
        self._adopt = adopt
        self._keep_alive_s = keep_alive_s
        self._clock = clock
        self._tries = DirectTries()

    async def choose(
        self, stream: FrameStream, offer: Offer, addresses: Sequence[str], open_s: float
    ) -> FrameStream:
        """The direct stream if it comes about, else the one that is there.

        Args: open_s: what it took to open that one, which is longer than a connection takes.
        """
        peer_id, now = stream.peer_id, self._clock.now()
        direct: SealedStream | None = None
        hosts = list(dict.fromkeys(ip for address in addresses if (ip := ip_of(address))))
        try:
            if hosts and self._tries.may_try(peer_id, now):
                patience_s = min(max(open_s, 0.1), _LONGEST_DIRECT_S)
                direct, outcome = await connect_directly(
                    peer_id, offer, hosts, self._adopt, patience_s, self._keep_alive_s
                )
                self._tries.note(peer_id, outcome, now)
            await stream.send(_STAY if direct is None else _DIRECT)
        except BaseException:
            stream.close()
            if direct is not None:
                direct.close()
            raise
        return stream if direct is None else direct
