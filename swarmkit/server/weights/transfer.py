"""Receives a file that a peer offers: finds the offers, and takes bytes whose hash the caller checks."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from filelock import FileLock, Timeout

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import PeerTimeoutError, ProtocolError
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.net.protocol.weights_messages import WEIGHTS, FileChunk, FileFound, GetFile
from swarmkit.net.registry import offers
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.rpc.message_stream import CHUNK_BYTES
from swarmkit.net.transport.seam import Transport

logger = logging.getLogger(__name__)

_POLL_S = 0.1
SLOWEST_BYTES_PER_S = 100_000
"""A holder that sends less, on the whole, is left for another: a byte now and then shall not hold up a start.
"""

_What = TypeVar("_What", int, None)


class WrongBytesError(ProtocolError):
    """A peer sent other bytes than it offered."""


async def look_up(
    transport: Transport, fingerprint: str, wanted: Iterable[_What], now: float
) -> dict[_What, list[WeightsOffer]]:
    """What other peers offer of a model, by block (None: the manifest); what is badly signed is left out."""
    keys = {offers.claim_key(fingerprint, block): block for block in wanted}
    found: dict[_What, list[WeightsOffer]] = {}
    for key, entries in (await transport.fetch(keys)).items():
        for subkey, value in entries.items():
            try:
                offer = offers.read(key, subkey, value, now)
            except ProtocolError as error:  # noqa: PERF203
                logger.debug("ignored an offer at %s from %s: %s", key, subkey, error)
            else:
                if offer.peer_id != transport.peer_id:
                    found.setdefault(keys[key], []).append(offer)
    return found


async def receive_file(
    transport: Transport,
    offer: WeightsOffer,
    store: BlockStore,
    partial: Path,
    idle_timeout: float,
    count: Callable[[int], None],
) -> bool:
    """Fill `partial` from where an earlier transfer stopped; whether all of it is from this peer.

    Args:
        idle_timeout: seconds without a byte, until the peer is given up.
        count: told of every chunk's length as it comes.

    Raises:
        PeerError: it did not come; what did is kept.
        WrongBytesError: the peer says another size than it offered, or sends more.
        StoreWriteError: the disk is full.
    """
    marks = partial.with_suffix(".json")
    begun, earlier = _progress(marks)
    offset = begun if begun <= offer.size else 0
    senders = {*earlier, offer.peer_id} if offset else {offer.peer_id}
    stream = await connect(transport, WEIGHTS, offer.peer_id, offer.addresses, max_payload_bytes=CHUNK_BYTES)
    try:
        with stream.within(idle_timeout):
            found = await stream.ask(GetFile(offer.content, offset), FileFound)
        if found.size != offer.size:
            raise WrongBytesError(f"it offered {offer.size} bytes and has {found.size}")
        deadline = SYSTEM_CLOCK.now() + idle_timeout + offer.size / SLOWEST_BYTES_PER_S
        with store.writing("a file from a peer"), partial.open("r+b") as file:
            file.seek(offset)
            while offset < offer.size:
                with stream.within(idle_timeout):
                    incoming = await stream.answer(FileChunk)
                if SYSTEM_CLOCK.now() > deadline:
                    raise PeerTimeoutError(f"peer {offer.peer_id} sends too slowly", offer.peer_id)
                chunk = incoming.raw(incoming.message.data)
                if not chunk or len(chunk) > offer.size - offset:
                    raise WrongBytesError(f"a chunk of {len(chunk)} bytes does not fit")
                await anyio.to_thread.run_sync(file.write, chunk)
                offset += len(chunk)
                count(len(chunk))
    finally:
        stream.close()
        with store.writing("a note about a transfer"):
            marks.write_text(json.dumps({"offset": offset, "senders": sorted(senders)}))
    return senders == {offer.peer_id}


@asynccontextmanager
async def locked(lock: FileLock) -> AsyncIterator[None]:
    """Hold a lock that another process, or another task of this loop, may hold for long."""
    while True:
        try:
            lock.acquire(blocking=False)
            break
        except Timeout:
            await anyio.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()


def _progress(marks: Path) -> tuple[int, list[str]]:
    """How far an earlier transfer came, and from whom its bytes are."""
    try:
        content = json.loads(marks.read_text())
        offset, senders = int(content["offset"]), [str(sender) for sender in content["senders"]]
        return (offset, senders) if offset >= 0 else (0, [])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []
