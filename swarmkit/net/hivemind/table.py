"""The table that all peers share, on hivemind's distributed hash table; and the late import of hivemind.

hivemind's table trusts what it is sent: any peer may store any expiry under any name, and hide other
peers' records behind a plain value or a cached copy. So a value travels in an envelope that is signed by
the peer it stands under and that binds value and expiry; everything else is dropped wherever it shows up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import logging
import math
import os
import random
import struct
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import anyio

from swarmkit.clock import SYSTEM_CLOCK, Clock, system_date
from swarmkit.errors import NoContactError, TransportError
from swarmkit.net.hivemind.contact import Contact
from swarmkit.net.hivemind.gate import TableGate
from swarmkit.net.hivemind.protocol import guarded_protocol, storing_peer
from swarmkit.net.hivemind.storage import bounded_storage
from swarmkit.net.hivemind.swarm_time import SwarmTime
from swarmkit.net.transport.identity import Identity, VerifiedSignatures
from swarmkit.net.transport.limits import MAX_LIFETIME_S, MAX_VALUE_BYTES, checked_records
from swarmkit.net.transport.peer_lists import TableLists
from swarmkit.net.transport.seam import RecordCheck, peer_of, service_id
from swarmkit.net.transport.swarm_key import SwarmKey

logger = logging.getLogger(__name__)

_SPAWNING_MODULES = (
    "hivemind.dht.node",
    "hivemind.dht.protocol",
    "hivemind.dht.traverse",
    "hivemind.p2p.p2p_daemon",
    "hivemind.p2p.p2p_daemon_bindings.control",
)
_DATING_MODULES = (
    "hivemind.utils.timed_storage",
    "hivemind.dht.node",
    "hivemind.dht.protocol",
    "hivemind.dht.routing",
)
_import_lock = threading.Lock()
_task_owner: ContextVar[set[asyncio.Task[Any]] | None] = ContextVar("swarmkit_task_owner", default=None)

_ENVELOPE = struct.Struct(">B64sdH")  # version, signature, expires_at, bytes of the key; then key and value
_ENVELOPE_VERSION = 1
_CONTEXT = b"swarmkit table record 1\n"
_PLACE = struct.Struct(">dII")  # expires_at, bytes of the key's hash and of the subkey
_VERIFIED_RECORDS = 16_384
_GOOD_RECORDS = 32_768
"""So many records are remembered as good where they stand, by 20 bytes each."""
_CLOCK_TOLERANCE_S = 5.0
"""hivemind lets peers' clocks differ by three seconds."""


def load_hivemind() -> None:
    """Import hivemind, and undo what that does to the rest of the program.

    It changes how torch shares tensors between processes, renames a log level and installs a log handler;
    and it starts tasks without an owner, which `owning` then collects. Takes seconds: call it in a thread.
    """
    with _import_lock:
        if "hivemind" not in sys.modules:
            import torch.multiprocessing

            strategy = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
            level_name = logging.getLevelName(logging.WARNING)
            try:
                importlib.import_module("hivemind")
            except ImportError as error:
                raise TransportError(f"hivemind cannot be imported: {error}; pip install hivemind") from error
            finally:
                torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
                logging.addLevelName(logging.WARNING, level_name)
            importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
            # it warns about every peer that went away, which in a swarm is no news
            logging.getLogger("hivemind").setLevel(os.environ.get("HIVEMIND_LOGLEVEL", "ERROR"))
        for name in _SPAWNING_MODULES:
            module = importlib.import_module(name)
            if not isinstance(module.asyncio, _TrackingAsyncio):
                module.asyncio = _TrackingAsyncio("asyncio")  # type: ignore[attr-defined]
        for name in _DATING_MODULES:
            importlib.import_module(name).get_dht_time = system_date  # type: ignore[attr-defined]
        importlib.import_module("hivemind.dht.node").DHTProtocol = guarded_protocol()  # type: ignore[attr-defined]


class _TrackingAsyncio(types.ModuleType):
    """What hivemind's modules see as `asyncio`: the same, but a task is entered with the current owner."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    def create_task(coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, **options)
        owner = _task_owner.get()
        if owner is not None:
            owner.add(task)
            task.add_done_callback(functools.partial(_forget, owner))
        return task


def _forget(owner: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    owner.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("a task of hivemind's failed: %r", error)


@contextlib.contextmanager
def owning(tasks: set[asyncio.Task[Any]]) -> Iterator[None]:
    """Enter every task that hivemind starts in this block, and those that these start, in `tasks`."""
    token = _task_owner.set(tasks)
    try:
        yield
    finally:
        _task_owner.reset(token)


def wake_sleepers(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that only let time pass: hivemind's bootstrap leaves one behind, for seconds."""
    for task in tasks:
        if getattr(task.get_coro(), "__qualname__", "") == "sleep":
            task.cancel()


async def end_tasks(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and what they start while they end, until none is left."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)


class RecordGuard:
    """Decides which records this peer keeps and believes. It has the form of hivemind's record validators."""

    priority = 0

    def __init__(
        self,
        check: RecordCheck | None,
        clock: Clock = SYSTEM_CLOCK,
        contact: Contact | None = None,
        swarm_key: SwarmKey | None = None,
        swarm_time: SwarmTime | None = None,
        lists: TableLists | None = None,
    ) -> None:
        """Args: lists: of the peers with which the table is shared; all of them if not given."""
        self.swarm_key = swarm_key
        self._lists = lists or TableLists("")
        self.gate = TableGate(swarm_key, self._lists)
        self._check = check
        self._clock = clock
        self.note_heard = (contact or Contact(clock, ())).note_heard
        self.note_time = (swarm_time or SwarmTime(clock, ())).note
        routing = importlib.import_module("hivemind.dht.routing")
        serializer = importlib.import_module("hivemind.utils.serializer")
        self._key_id = routing.DHTID.generate
        self._loads = serializer.MSGPackSerializer.loads
        self._dumps = serializer.MSGPackSerializer.dumps
        self._authentic = VerifiedSignatures(_VERIFIED_RECORDS).verify
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self.verifying = asyncio.Lock()
        """Held while the signatures of one request or answer are verified."""
        self._wanted: set[str] = set()
        self.storage = bounded_storage(
            storing_peer, lambda value: kind_of(self.key_of(value)) in self._wanted
        )
        self.cache = _no_cache()

    def open(self, key_id: bytes, subkey: Any, envelope: Any, expires_at: float) -> tuple[str, bytes] | None:
        """Key and value from an envelope, or None if anything about it is wrong."""
        if not isinstance(subkey, str) or not self._may_stand(subkey, expires_at):
            return None
        sealed = _Sealed.read(envelope)
        if sealed is None or sealed.expires_at != expires_at or self._key_id(sealed.key).to_bytes() != key_id:
            return None
        if not self._authentic(peer_of(subkey), _signed_part(expires_at, sealed.value), sealed.signature):
            return None
        value: bytes | None = sealed.value
        if self.swarm_key is not None:
            value = self.swarm_key.unseal(subkey, sealed.value, expires_at)
        if value is None or (
            self._check is not None and not self._check(sealed.key, subkey, value, expires_at)
        ):
            return None
        return sealed.key, value

    def _may_stand(self, subkey: str, expires_at: float) -> bool:
        """Whether a record may be kept and believed now, as far as its name and its date tell."""
        longest = self._clock.time() + MAX_LIFETIME_S + _CLOCK_TOLERANCE_S
        return expires_at <= longest and not self._lists.block(peer_of(subkey))

    def want(self, keys: Iterable[str]) -> None:
        """Note that this peer itself uses records of these keys' kinds, and keeps them before others."""
        self._wanted.update(kind_of(key) for key in keys)

    def is_good(
        self, key_id: bytes, subkey: Any, serialized: bytes, expires_at: Any, packed_subkey: bool
    ) -> bool:
        """Whether a record is right where it stands.

        A look-up meets each record at every peer that keeps it, and more than once there. What was found
        good is remembered, by hashes, and only its name and its date are looked at again.

        Args: packed_subkey: whether the subkey is serialized as well.
        """
        try:
            name = self._loads(subkey) if packed_subkey else subkey
            label = name.encode()
            head = _PLACE.pack(expires_at, len(key_id), len(label))
            place = hashlib.blake2b(b"".join((head, key_id, label, serialized)), digest_size=20).digest()
            if place in self._good and self._clock.time() < expires_at:
                return self._may_stand(name, expires_at)
            if self.open(key_id, name, self._loads(serialized), expires_at) is None:
                return False
        except Exception as error:  # noqa: BLE001 - foreign bytes may break a decoder in any way
            logger.debug("refused a record: %r", error)
            return False
        if self.swarm_key is None:  # else the peer that signed it may cease to be a member
            self._good[place] = None
            if len(self._good) > _GOOD_RECORDS:
                self._good.popitem(last=False)
        return True

    def opened(
        self, key_id: bytes, subkey: Any, envelope: Any, expires_at: float
    ) -> tuple[str, bytes] | None:
        """What `open` says, which is quick for a record that was found good before."""
        if self.swarm_key is None and isinstance(envelope, bytes):
            if not self.is_good(key_id, subkey, self._dumps(envelope), expires_at, False):
                return None
            sealed = _Sealed.read(envelope)
            return None if sealed is None else (sealed.key, sealed.value)
        return self.open(key_id, subkey, envelope, expires_at)

    def key_of(self, serialized: bytes) -> str:
        """The key under which a kept record stands; empty if it has none."""
        try:
            sealed = _Sealed.read(self._loads(serialized))
            return "" if sealed is None else sealed.key
        except Exception as error:  # noqa: BLE001 - foreign bytes may break a decoder in any way
            logger.debug("a record has no key: %r", error)
            return ""

    def validate(self, record: Any) -> bool:
        """Whether to keep or believe a record (hivemind calls this)."""
        return self.is_good(record.key, record.subkey, record.value, record.expiration_time, True)

    def sign_value(self, record: Any) -> bytes:
        """Our values are signed before hivemind sees them."""
        return bytes(record.value)

    def strip_value(self, record: Any) -> bytes:
        """Our values are opened after hivemind has handed them out."""
        return bytes(record.value)

    def purge(self, key_id: bytes, dictionary: Any) -> bool:
        """Drop the bad entries of what another peer holds under a key; the good ones must not suffer."""
        with dictionary.freeze():
            bad = [
                subkey
                for subkey, (value, expires_at) in dictionary.items()
                if not self.is_good(key_id, subkey, value, expires_at, False)
            ]
            for subkey in bad:
                del dictionary[subkey]
        return True


class HivemindTable:
    """This peer's part of the shared table.

    Attributes: node: of hivemind, which does the work.
    """

    def __init__(
        self,
        node: Any,
        guard: RecordGuard,
        contact: Contact,
        clock: Clock,
        identity: Identity,
        timeout: float,
    ) -> None:
        self.node = node
        self._contact = contact
        self._clock = clock
        self._guard = guard
        self._identity = identity
        self._timeout = timeout

    @classmethod
    async def join(
        cls,
        p2p: Any,
        identity: Identity,
        *,
        initial_peers: Sequence[str],
        client_mode: bool,
        guard: RecordGuard,
        contact: Contact,
        timeout: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> HivemindTable:
        """Take part in the table of `initial_peers`, or begin one.

        Args:
            guard: decides which records are kept, and holds them.
            contact: is told whenever another peer is heard.
            timeout: seconds for one store or fetch.

        Raises:
            TransportError: none of the initial peers answered, or one refused.
        """
        node_type = importlib.import_module("hivemind.dht.node").DHTNode
        try:
            # every cache is off: a fetch shall see what other peers hold now, not what they once held
            node = await node_type.create(
                p2p=p2p,
                initial_peers=list(initial_peers),
                client_mode=client_mode,
                record_validator=guard,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            )
        except Exception as error:
            if guard.gate.refusal:
                raise TransportError(
                    f"could not join the swarm at {', '.join(initial_peers)}: {guard.gate.refusal}"
                ) from error
            raise TransportError(
                f"could not join the swarm at {', '.join(initial_peers)}: {error}. Check that these peers "
                "are running"
            ) from error
        return cls(node, guard, contact, clock, identity, timeout)

    @property
    def storage(self) -> Any:
        """The records that this peer keeps for others; see `bounded_storage`."""
        return self._guard.storage

    @property
    def is_alone(self) -> bool:
        """Whether no other peer's part of the table is known, so that a look-up would ask none."""
        return not self.node.protocol.routing_table.uid_to_peer_id

    async def meet(self, peer_id: str) -> bool:
        """Enter a connected peer into the routing table. Returns whether it answered."""
        p2p_peer = importlib.import_module("hivemind.p2p").PeerID.from_base58(peer_id)
        return await self.node.protocol.call_ping(p2p_peer) is not None

    def some_peers(self, count: int) -> list[str]:
        """Return the ids of some peers whose part of the table is known."""
        known = list(self.node.protocol.routing_table.peer_id_to_uid)
        return [str(peer) for peer in random.sample(known, min(count, len(known)))]

    async def explore(self) -> None:
        """Fill the routing table with the peers around this one, after it has met some."""
        self.node.blacklist.clear()
        with anyio.move_on_after(self._timeout):
            await self.node.find_nearest_nodes([self.node.node_id])

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        """See `Transport.store`."""
        pairs = checked_records(records, expires_at)
        if not pairs:
            return 0
        self._guard.want(key for key, _ in pairs)
        subkey = service_id(self._identity.peer_id, service)
        if (swarm_key := self._guard.swarm_key) is not None:
            pairs = [(key, swarm_key.seal(subkey, bytes(value), expires_at)) for key, value in pairs]
        try:
            with anyio.fail_after(self._timeout):
                stored = await self.node.store_many(
                    keys=[key for key, _ in pairs],
                    values=[sealed_record(self._identity, key, value, expires_at) for key, value in pairs],
                    expiration_time=float(expires_at),
                    subkeys=[subkey] * len(pairs),
                    exclude_self=self.node.protocol.client_mode,  # no peer could ask a client for them
                )
        except TimeoutError:
            return 0
        return sum(map(bool, stored.values()))

    async def fetch(self, keys: Iterable[str]) -> dict[str, Mapping[str, bytes]]:
        """See `Transport.fetch`. What was not found within the deadline is left out.

        Raises:
            NoContactError: other peers are known, and none of them answered.
        """
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        self._guard.want(wanted)
        began = self._clock.now()
        futures = await self.node.get_many(wanted, sufficient_expiration_time=math.inf, return_futures=True)
        try:
            await asyncio.wait(futures.values(), timeout=self._timeout)
        finally:
            for future in futures.values():
                future.cancel()
        if self._contact.is_expected and not self._contact.heard_since(began):
            raise NoContactError(
                "no other peer of the swarm answers; "
                + (self._guard.gate.refusal or "check this machine's network")
                + ". This peer goes on trying to reach the swarm again",
                self._contact.heard_at,
            )
        found: dict[str, Mapping[str, bytes]] = {}
        for key, future in futures.items():
            if future.cancelled() or future.exception() is not None:
                continue
            if values := self._values(key, future.result()):
                found[key] = values
            await asyncio.sleep(0)  # a thousand records under a key take some milliseconds
        return found

    def close(self) -> None:
        """Stop; the tasks are ended by their owner (see `owning`)."""
        self.node.is_alive = False

    def _values(self, key: str, result: Any) -> dict[str, bytes]:
        if result is None or not isinstance(result.value, dict):
            return {}
        key_id = self._guard._key_id(key).to_bytes()
        values: dict[str, bytes] = {}
        for subkey, (envelope, expires_at) in result.value.items():
            if (opened := self._guard.opened(key_id, subkey, envelope, expires_at)) is not None:
                values[subkey] = opened[1]
        return values


def kind_of(key: str) -> str:
    """The part of a key that records of one model have in common: all up to the last slash."""
    return key.rpartition("/")[0] or key


class _Sealed(NamedTuple):
    """What stands in an envelope, of which nothing is believed yet."""

    signature: bytes
    expires_at: float
    key: str
    value: bytes

    @classmethod
    def read(cls, envelope: Any) -> _Sealed | None:
        """The parts of an envelope; None if it is not one of this version."""
        if not isinstance(envelope, bytes) or len(envelope) < _ENVELOPE.size:
            return None
        version, signature, expires_at, key_bytes = _ENVELOPE.unpack_from(envelope)
        end_of_key = _ENVELOPE.size + key_bytes
        if version != _ENVELOPE_VERSION or not 0 <= len(envelope) - end_of_key <= MAX_VALUE_BYTES:
            return None
        try:
            key = envelope[_ENVELOPE.size : end_of_key].decode()
        except UnicodeDecodeError:
            return None
        return cls(signature, expires_at, key, envelope[end_of_key:])


def sealed_record(identity: Identity, key: str, value: bytes, expires_at: float) -> bytes:
    """The envelope in which a record stands in the table, signed by the peer whose record it is."""
    name = key.encode()
    signature = identity.sign(_signed_part(expires_at, value))
    return _ENVELOPE.pack(_ENVELOPE_VERSION, signature, expires_at, len(name)) + name + bytes(value)


def _signed_part(expires_at: float, value: bytes) -> bytes:
    # without the key, so that one record under many keys is verified once
    return _CONTEXT + struct.pack(">d", expires_at) + value


def _no_cache() -> Any:
    """A cache that holds nothing: hivemind would hand out a cached copy in place of the stored records."""
    storage_type = importlib.import_module("hivemind.dht.storage").DHTLocalStorage

    class NoCache(storage_type):  # type: ignore[misc, valid-type]
        def store(self, *_: Any, **__: Any) -> bool:
            return False

        def store_subkey(self, *_: Any, **__: Any) -> bool:
            return False

        def get(self, _: Any) -> None:
            return None

    return NoCache()
