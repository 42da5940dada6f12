"""Handing out block files to other servers, after everything else that a server does.

A server that needs a block asks for its file by content hash, on a stream of its own::

    asks     Ask(content, offset)
    answers  Sending(size), and then the file from `offset` on, in frames of at most CHUNK_BYTES; or Refused

Only what was offered is handed out, never anything else that lies in the store (such as weights that their
owner gates). All transfers together share one rate; no chunk is sent while a step of a session waits for the
engine, except one every `MAX_PAUSE_S`, so that a transfer from a busy server is slow but not dead.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
import msgspec
from pydantic import Field

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import ProtocolError
from swarmkit.net.protocol.messages import Text, Total
from swarmkit.net.registry.offers import ContentHash
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import Stream
from swarmkit.settings import SettingsGroup, read_from

logger = logging.getLogger(__name__)

WEIGHTS_ENDPOINT = "swarmkit/1/weights"
CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 4096
MAX_PAUSE_S = 5.0

_POLL_S = 0.02

WeightsSource = Literal["any", "hub", "peers"]


class WeightsSettings(SettingsGroup):
    """Where a server gets its weights, and how it shares them."""

    model_config = read_from("SWARMKIT_WEIGHTS_")

    source: WeightsSource = Field(
        default="any",
        description="Where weights come from: from peers that offer them and otherwise from the Hub "
        "(`any`), or from only one of the two.",
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
    samples: int = Field(
        default=8,
        ge=0,
        description="How many ranges of each block that a peer sent are compared with the Hub.",
    )
    idle_timeout_s: float = Field(
        default=30.0, gt=0, description="How long a transfer may stand still before it ends."
    )
    attempts: int = Field(default=4, ge=1, description="How many peers are tried for one block.")


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Ask for a file from a byte on."""

    content: ContentHash
    offset: Total = 0


class Sending(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The file has `size` bytes; those from the asked offset on follow."""

    size: Total


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Why nothing follows."""

    code: Literal["not_held", "busy", "bad_message"]
    message: Text


_encoder = msgspec.msgpack.Encoder()
_question = msgspec.msgpack.Decoder(Ask)
_answer: msgspec.msgpack.Decoder[Sending | Refused] = msgspec.msgpack.Decoder(Sending | Refused)  # type: ignore[arg-type]


def encode(message: Ask | Sending | Refused) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def read_answer(frame: bytes, peer_id: str) -> Sending | Refused:
    """What a holder answers.

    Raises:
        ProtocolError: it is no answer.
    """
    try:
        if len(frame) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"an answer of {len(frame)} bytes is too long", peer_id)
        return _answer.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not an answer about weights: {error}", peer_id) from None


def _read_question(frame: bytes) -> Ask | Refused:
    if len(frame) > MAX_MESSAGE_BYTES:
        return Refused("bad_message", f"a question of {len(frame)} bytes is too long")
    try:
        return _question.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        return Refused("bad_message", f"not a question about weights: {error}"[:2000])


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
        self._files: dict[str, Path] = {}
        self._bucket = TokenBucket(settings.upload_bytes_per_s, 2 * CHUNK_BYTES, clock)
        self._transfers = 0

    def offer(self, content: str, path: Path) -> None:
        """From now on, hand out this file. Its content has been verified."""
        self._files[content] = path

    def withdraw(self, content: str) -> None:
        """From now on, hand it out no longer."""
        self._files.pop(content, None)

    async def serve(self, stream: Stream) -> None:
        """Answer one question."""
        frame = b""
        with anyio.move_on_after(self._settings.idle_timeout_s):
            frame = await stream.receive()
        ask = _read_question(frame)
        if isinstance(ask, Refused):
            await self._deliver(stream, encode(ask))
            return
        if self._transfers >= self._settings.max_transfers:
            await self._deliver(stream, encode(Refused("busy", "as many transfers as allowed are under way")))
            return
        path = self._files.get(ask.content)
        size = path.stat().st_size if path is not None and path.is_file() else -1
        if path is None or ask.offset > size:
            await self._deliver(stream, encode(Refused("not_held", "no such file is handed out here")))
            return
        self._transfers += 1
        try:
            await self._send(stream, path, size, ask.offset)
        finally:
            self._transfers -= 1

    async def _send(self, stream: Stream, path: Path, size: int, offset: int) -> None:
        await self._deliver(stream, encode(Sending(size)))
        with path.open("rb") as file:
            file.seek(offset)
            while offset < size:
                await self._wait_for_turn()
                chunk = await anyio.to_thread.run_sync(file.read, min(CHUNK_BYTES, size - offset))
                if not chunk:
                    logger.warning("%s became shorter while it was handed out; was it replaced?", path)
                    return
                if (wait := self._bucket.take(len(chunk))) > 0:
                    await self._sleep(wait)
                await self._deliver(stream, chunk)
                offset += len(chunk)
                self.sent_bytes += len(chunk)

    async def _deliver(self, stream: Stream, frame: bytes) -> None:
        """Send a frame to somebody who may have stopped reading."""
        with anyio.fail_after(self._settings.idle_timeout_s):
            await stream.send(frame)

    async def _wait_for_turn(self) -> None:
        began = self._clock()
        while self.busy() and self._clock() - began < MAX_PAUSE_S:
            await self._sleep(_POLL_S)
