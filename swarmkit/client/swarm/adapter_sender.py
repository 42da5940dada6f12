"""Bringing this client's adapters to servers, each to each server once for as long as it is kept there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import anyio.to_thread

from swarmkit.errors import AdapterError, ProtocolError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import (
    ADAPTER,
    MAX_PARTS,
    AdapterKept,
    PutAdapter,
)
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.client_stream import ClientStream

Connect: TypeAlias = Callable[[Announcement, Protocol], Awaitable[ClientStream]]
"""`connect(server, protocol)`: a stream to that server."""

_SLOWEST_BYTES_PER_S = 100_000
_REMEMBERED = 256


class AdapterSender:
    """Remembers what was sent where. Runs on the event loop's thread."""

    def __init__(self, fingerprint: str, timeout: float, connect: Connect) -> None:
        """Args:
        fingerprint: of the model that the adapters are for.
        timeout: seconds that a server may take for an adapter, apart from what its bytes take.
        """
        self._fingerprint = fingerprint
        self._timeout = timeout
        self._connect = connect
        self._sent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._locks: dict[tuple[str, str], anyio.Lock] = {}
        self.sent_bytes = 0
        """Of values, in all."""

    def forget(self, server: Announcement, name: str) -> None:
        """The server has not kept it."""
        self._sent.pop((server.service_id, name), None)

    async def ensure(self, server: Announcement, adapter: Adapter) -> None:
        """Send an adapter to a server, unless it was sent there before. Other calls for it wait meanwhile.

        Raises:
            PeerError: the server failed, or refuses it.
            AdapterError: it has too many parts to be sent.
        """
        name = await anyio.to_thread.run_sync(lambda: adapter.digest)
        key = server.service_id, name
        lock = self._locks.setdefault(key, anyio.Lock())
        try:
            async with lock:
                if key in self._sent:
                    return
                await self._send(server, adapter)
                self._sent[key] = None
                while len(self._sent) > _REMEMBERED:
                    self._sent.popitem(last=False)
        finally:
            if not lock.statistics().tasks_waiting:
                self._locks.pop(key, None)

    async def _send(self, server: Announcement, adapter: Adapter) -> None:
        spec = adapter.spec
        if len(spec.lora) > MAX_PARTS:
            raise AdapterError(
                f"the adapter changes {len(spec.lora)} linear layers of blocks {spec.start}:{spec.stop}, "
                f"more than the {MAX_PARTS} that can be sent to one server; choose fewer target_modules"
            )
        values, data = await anyio.to_thread.run_sync(codec.encode, adapter.values)
        message = PutAdapter(
            self._fingerprint,
            spec.start,
            spec.stop,
            tuple((one.block, one.module, one.rank, one.scale) for one in spec.lora),
            spec.prompt_tokens,
            values,
            adapter.digest,
            spec.prompt_rows,
        )
        timeout = self._timeout + values.nbytes / _SLOWEST_BYTES_PER_S
        stream = await self._connect(server, ADAPTER)
        try:
            with stream.within(timeout):
                kept = await stream.ask(message, AdapterKept, [data])
        finally:
            stream.close()
        self.sent_bytes += values.nbytes
        if kept.name != adapter.digest:
            raise ProtocolError("an adapter was not kept as asked", server.peer_id)
