"""hivemind's table protocol with bounds: bounded storage, and signatures that are verified a few at a time.

hivemind checks every record of a request, or of an answer, in one go. A peer could thus hold up the event
loop of another one for as long as it takes to verify what fits into 4 MiB. Here the signatures are verified
beforehand, in slices between which the loop runs other tasks; hivemind's own check then finds the results.
What is to be stored is handed to hivemind a few records at a time, too.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import random
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import chain
from typing import Any, Protocol, TypeAlias

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.net.hivemind.gate import TableGate
from swarmkit.net.hivemind.storage import MAX_KEY_RECORDS

logger = logging.getLogger(__name__)

MAX_STORED_AT_ONCE = 1024
"""Records of one request; a server with 1,000 blocks stores no more at a time."""
SLICE = 16
"""Signatures that are verified before other tasks get their turn: about two milliseconds."""

SignedRecord: TypeAlias = tuple[bytes, Any, bytes, float, bool]
"""The key's hash, subkey, serialized value, expiry, and whether the subkey is serialized as well."""

_storing_peer: ContextVar[str] = ContextVar("swarmkit_storing_peer", default="")


class Guard(Protocol):
    """What the protocol asks of the guard that hivemind knows as its record validator."""

    gate: TableGate
    storage: Any
    cache: Any
    verifying: asyncio.Lock

    def note_heard(self) -> None: ...

    def note_time(self, peer_id: str, date: float, asked_at: float, answered_at: float) -> None: ...

    def purge(self, key_id: bytes, dictionary: Any) -> bool: ...

    def is_good(
        self, key_id: bytes, subkey: Any, serialized: bytes, expires_at: Any, packed_subkey: bool
    ) -> bool: ...


def storing_peer() -> str:
    """The peer whose request to store records is being served; empty outside of such a request."""
    return _storing_peer.get()


async def in_slices(verify: Callable[..., object], signed: Iterable[SignedRecord]) -> None:
    """Verify signatures, and let other tasks run after every few of them."""
    for number, record in enumerate(signed, 1):
        verify(*record)
        if number % SLICE == 0:
            await asyncio.sleep(0)


class _GatedServicer:
    """What answers requests of other peers, as far as the gate lets them pass."""

    def __init__(self, servicer: Any, gate: TableGate) -> None:
        self._servicer = servicer
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._servicer, name)
        return self._gate.answering(name, answer) if name.startswith("rpc_") else answer


@functools.cache
def guarded_protocol() -> type:
    """hivemind's `DHTProtocol`, whose record validator is a `Guard`."""
    base: Any = importlib.import_module("hivemind.dht.protocol").DHTProtocol
    pb: Any = importlib.import_module("hivemind.proto.dht_pb2")
    dictionary_type: Any = importlib.import_module("hivemind.dht.storage").DictionaryDHTValue
    date = SYSTEM_CLOCK.uncorrected

    class DHTProtocol(base):  # type: ignore[misc]
        """Keeps hivemind's name, which is part of the names of its remote procedures."""

        record_validator: Guard

        @classmethod
        async def create(cls, *args: Any, **kwargs: Any) -> Any:
            self = await super().create(*args, **kwargs)
            self.storage, self.cache = self.record_validator.storage, self.record_validator.cache
            self._validate_dictionary = self.record_validator.purge
            return self

        async def add_p2p_handlers(self, p2p: Any, wrapper: Any = None, **options: Any) -> None:
            gated = _GatedServicer(wrapper or self, self.record_validator.gate)
            await super().add_p2p_handlers(p2p, gated, **options)

        def get_stub(self, peer: Any) -> Any:
            return _Stub(self, super().get_stub(peer), str(peer))

        async def update_routing_table(self, node_id: Any, peer_id: Any, responded: bool = True) -> None:
            if responded:
                self.record_validator.note_heard()
            await super().update_routing_table(node_id, peer_id, responded)

        async def _verify(self, signed: Iterable[SignedRecord]) -> None:
            # One request at a time: many of them would otherwise take a slice each in every turn of the loop.
            async with self.record_validator.verifying:
                await in_slices(self.record_validator.is_good, signed)

        def _signed_in(
            self, key_id: bytes, tag: bytes, value: bytes, expires_at: float
        ) -> Iterable[SignedRecord]:
            if tag != self.IS_DICTIONARY:
                return [(key_id, tag, value, expires_at, True)]
            return _signed(key_id, self._dictionary_in(value))

        def _dictionary_in(self, value: bytes) -> Any:
            """The records of all subkeys in a serialized value; an empty dictionary if it is none."""
            dictionary = self.serializer.loads(value)
            return dictionary if isinstance(dictionary, dictionary_type) else dictionary_type()

    def _signed(key_id: bytes, dictionary: Any) -> Iterable[SignedRecord]:
        return [
            (key_id, subkey, item.value, item.expiration_time, False) for subkey, item in dictionary.items()
        ]

    def _some_of(dictionary: Any) -> Any:
        """So many records as an honest peer keeps under one key at most, drawn from those that one sent."""
        some = dictionary_type()
        for subkey, item in random.sample(list(dictionary.items()), MAX_KEY_RECORDS):
            some.store(subkey, *item)
        return some

    async def rpc_store(self: Any, request: Any, context: Any) -> Any:
        """Keep records for another peer, as far as they are signed and there is room."""
        if len(request.keys) > MAX_STORED_AT_ONCE:
            logger.debug("refused to store %d records at once", len(request.keys))
            return pb.StoreResponse(store_ok=[False] * len(request.keys), peer=self.node_info)
        stored = zip(request.keys, request.subkeys, request.values, request.expiration_time, strict=False)
        await self._verify(chain.from_iterable(self._signed_in(*record) for record in stored))
        token = _storing_peer.set(str(context.remote_id))
        response = pb.StoreResponse(store_ok=[], peer=self.node_info)
        try:
            for piece in _pieces(request):
                response.store_ok.extend((await base.rpc_store(self, piece, context)).store_ok)
                await asyncio.sleep(0)
        finally:
            _storing_peer.reset(token)
        return response

    def _pieces(request: Any) -> Iterable[Any]:
        """Requests with a few records each, for the same as a request with many."""
        columns = ("keys", "subkeys", "values", "expiration_time", "in_cache")
        for start in range(0, max(1, len(request.keys)), SLICE):
            piece = pb.StoreRequest(**{one: getattr(request, one)[start : start + SLICE] for one in columns})
            if not start and request.HasField("peer"):  # which the routing table shall know, once
                piece.peer.CopyFrom(request.peer)
            yield piece

    rpc_store.__annotations__ = dict(base.rpc_store.__annotations__)
    rpc_store.__wrapped__ = base.rpc_store  # type: ignore[attr-defined] # hivemind reads the types from it
    DHTProtocol.rpc_store = rpc_store  # type: ignore[attr-defined]

    class _Stub:
        """A stub to another peer whose answers are verified before hivemind looks at them."""

        def __init__(self, protocol: Any, stub: Any, peer_id: str) -> None:
            self._protocol = protocol
            self._stub = stub
            self._peer_id = peer_id

        def __getattr__(self, name: str) -> Any:
            call = getattr(self._stub, name)
            gate, own_id = self._protocol.record_validator.gate, str(self._protocol.p2p.peer_id)
            return gate.asking(name, call, own_id, self._peer_id) if name.startswith("rpc_") else call

        async def rpc_ping(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            asked_at = date()
            response = await self.__getattr__("rpc_ping")(request, *args, **kwargs)
            if response.dht_time:
                guard = self._protocol.record_validator
                guard.note_time(self._peer_id, response.dht_time, asked_at, date())
                response.dht_time = 0.0  # hivemind refuses to join peers whose clocks differ from this one's
            return response

        async def rpc_find(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            response = await self.__getattr__("rpc_find")(request, *args, **kwargs)
            for key_id, result in zip(request.keys, response.results, strict=False):
                if result.type == pb.FOUND_DICTIONARY:
                    dictionary = self._protocol._dictionary_in(result.value)
                    if len(dictionary) > MAX_KEY_RECORDS:
                        dictionary = _some_of(dictionary)
                        result.value = self._protocol.serializer.dumps(dictionary)
                    await self._protocol._verify(_signed(key_id, dictionary))
            return response

    return DHTProtocol
