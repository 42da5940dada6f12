"""Handing out block files to other servers, after everything else that a server does.

The protocol is in `swarmkit/net/protocol/weights_messages.py`. Only what was offered is handed out, never
anything else that lies in the store (such as weights that their owner gates). All transfers together share
one rate; no chunk is sent while a step of a session waits for the engine, except one every `MAX_PAUSE_S`, so
that a transfer from a busy server is slow but not dead. Peers that ask share the number of transfers fairly.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
from pydantic import Field

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.checkpoint.store import state_of
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.weights_messages import WEIGHTS, FileChunk, FileFound, GetFile
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import CHUNK_BYTES
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import Stream
from swarmkit.settings import SettingsGroup, read_from

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 5.0

_POLL_S = 0.02
_MAX_STREAMS = 64

WeightsSource = Literal["any", "hub", "peers"]


class WeightsSettings(SettingsGroup):
    """Where a server gets its weights, and how it shares them."""

    model_config = read_from("SWARMKIT_WEIGHTS_")

    source: WeightsSource = Field(
        default="any",
        description="Where weights come from: from peers that offer them and otherwise from the Hub "
        "(`any`), or from only one of the two. Only blocks whose hash is known come from peers; see "
        "`swarmkit fingerprint`.",
    )
    share: bool = Field(
        default=True,
        description="Whether the server sends its blocks to other servers, for public models only.",
    )
    upload_bytes_per_s: float = Field(
        default=32e6, gt=0, description="How fast all transfers of weights together send."
    )
    max_transfers: int = Field(
        default=2, ge=1, description="How many transfers to other servers may run at a time."
    )
    offer_lifetime_s: float = Field(
        default=900.0,
        gt=0,
        le=3600,
        description="How long other servers believe an offer that is not renewed.",
    )
    idle_timeout_s: float = Field(
        default=30.0, gt=0, description="How long a transfer may stand still before it ends."
    )
    attempts: int = Field(default=4, ge=1, description="How many peers are tried for one block.")


class WeightsService:
    """Hands out the files that were offered. Its owner lets the transport call `serve`."""

    def __init__(
        self,
        settings: WeightsSettings,
        *,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        """Args: busy: whether a step of a session waits for the engine now."""
        self.busy = busy
        self.sent_bytes = 0
        self._settings = settings
        self._clock = clock
        self._sleep = sleep
        self._files: dict[str, tuple[Path, tuple[int, ...]]] = {}
        """By content: the file, and the state in which its content was verified."""
        self._bucket = TokenBucket(settings.upload_bytes_per_s, 2 * CHUNK_BYTES, clock)
        self._streams = StreamShares(_MAX_STREAMS)
        self._transfers = StreamShares(settings.max_transfers)

    def offer(self, content: str, path: Path) -> None:
        """From now on, hand out this file, until it changes. Its content has been verified."""
        self._files[content] = path, state_of(path)

    def withdraw(self, content: str) -> None:
        """From now on, hand it out no longer."""
        self._files.pop(content, None)

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends. Never raises on account of the peer."""
        asker = ServerStream(
            stream,
            WEIGHTS,
            max_payload_bytes=0,
            message_timeout=self._settings.idle_timeout_s,
            clock=self._clock,
        )
        with self._streams.counted(asker) as refusal:
            await asker.serve(lambda incoming: self._answer(asker, incoming.message), refusal)

    async def _answer(self, asker: ServerStream, message: GetFile) -> None:
        path, size = await anyio.to_thread.run_sync(self._held, message.content)
        if message.offset > size:
            raise Refusal("not_held", "no such file is handed out here")
        with self._transfers.counted(asker) as refusal:
            if refusal is not None:
                raise Refusal("busy", "as many transfers as allowed are under way", refusal.retry_after_s)
            await self._send(asker, path, size, message.offset)

    def _held(self, content: str) -> tuple[Path, int]:
        """A file that is handed out, and its size.

        Raises:
            Refusal: there is none, or it is not what it was when it was offered.
        """
        path, state = self._files.get(content, (None, ()))
        if path is None:
            raise Refusal("not_held", "no such file is handed out here")
        try:
            now = state_of(path)
        except OSError:
            now = ()
        if now != state:
            logger.warning("%s has changed since it was verified; it is handed out no longer", path)
            self.withdraw(content)
            raise Refusal("not_held", "no such file is handed out here")
        return path, now[0]

    async def _send(self, asker: ServerStream, path: Path, size: int, offset: int) -> None:
        await asker.send(FileFound(size))
        with path.open("rb") as file:
            file.seek(offset)
            while offset < size:
                await self._wait_for_turn()
                chunk = await anyio.to_thread.run_sync(file.read, min(CHUNK_BYTES, size - offset))
                if not chunk:
                    logger.warning("%s became shorter while it was handed out; was it replaced?", path)
                    raise Refusal("not_held", "the file became shorter while it was handed out")
                if (wait := self._bucket.take(len(chunk))) > 0:
                    await self._sleep(wait)
                await asker.send(FileChunk(TensorSpec((len(chunk),), "uint8")), [chunk])
                offset += len(chunk)
                self.sent_bytes += len(chunk)

    async def _wait_for_turn(self) -> None:
        began = self._clock()
        while self.busy() and self._clock() - began < MAX_PAUSE_S:
            await self._sleep(_POLL_S)
