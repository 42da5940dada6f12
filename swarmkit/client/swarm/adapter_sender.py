"""Bringing this client's adapters to servers, each to each server once for as long as it is kept there."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import anyio
import anyio.to_thread

from swarmkit.errors import AdapterError, PeerTimeoutError, PeerUnreachableError, ProtocolError, RemoteError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import (
    ADAPTER_ENDPOINT,
    MAX_PARTS,
    AdapterKept,
    AdapterMessage,
    PutAdapter,
    decoder,
)
from swarmkit.net.protocol.messages import Fault
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.conversation import Conversation

if TYPE_CHECKING:
    from swarmkit.client.swarm.client import SwarmClient

_SLOWEST_BYTES_PER_S = 100_000
_REMEMBERED = 256


class AdapterSender:
    """Remembers what was sent where. Runs on the event loop's thread."""

    def __init__(self, swarm: SwarmClient) -> None:
        self._swarm = swarm
        self._sent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._locks: dict[tuple[str, str], anyio.Lock] = {}
        self.sent_bytes = 0
        """Of values, in all."""

    def forget(self, server: Announcement, name: str) -> None:
        """The server has not kept it."""
        self._sent.pop((server.peer_id, name), None)

    async def ensure(self, server: Announcement, adapter: Adapter) -> None:
        """Send an adapter to a server, unless it was sent there before. Who comes meanwhile waits for it.

        Raises:
            PeerError: the server failed, or refuses it.
            AdapterError: it has too many parts to be sent.
        """
        name = await anyio.to_thread.run_sync(lambda: adapter.digest)
        key = server.peer_id, name
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
        swarm, spec = self._swarm, adapter.spec
        if len(spec.lora) > MAX_PARTS:
            raise AdapterError(
                f"the adapter changes {len(spec.lora)} linear layers of blocks {spec.start}:{spec.stop}, "
                f"more than the {MAX_PARTS} that can be sent to one server; choose fewer target_modules"
            )
        values, data = await anyio.to_thread.run_sync(codec.encode, adapter.values)
        message = PutAdapter(
            swarm.model.fingerprint,
            spec.start,
            spec.stop,
            tuple((one.block, one.module, one.rank, one.scale) for one in spec.lora),
            spec.prompt_tokens,
            values,
            adapter.digest,
        )
        patience_s = swarm.policy.first_s + values.nbytes / _SLOWEST_BYTES_PER_S
        conversation = Conversation(await swarm.dial(server, ADAPTER_ENDPOINT), 0, decoder=decoder)
        try:
            with anyio.fail_after(patience_s):
                await conversation.send(message, [data])
                reply = cast(AdapterMessage, (await conversation.receive()).message)
        except TimeoutError:
            raise PeerTimeoutError(
                f"did not take an adapter of {values.nbytes} bytes within {patience_s:.0f} s", server.peer_id
            ) from None
        except PeerUnreachableError:
            raise PeerUnreachableError("the stream ended while an adapter was sent", server.peer_id) from None
        finally:
            conversation.close()
        self.sent_bytes += values.nbytes
        if isinstance(reply, Fault):
            raise RemoteError(reply.message, server.peer_id, reply.code)
        if not isinstance(reply, AdapterKept) or reply.name != adapter.digest:
            raise ProtocolError("an adapter was not kept as asked", server.peer_id)
