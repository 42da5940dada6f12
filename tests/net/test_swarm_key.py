"""A swarm with a key is private: peers without the key open no stream, and read and keep no record."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import NotAdmittedError, TransportError, UsageError
from swarmkit.net.hivemind.gate import TableGate
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.transport.memory import MemoryNetwork, MemoryStream
from swarmkit.net.transport.seam import Transport
from swarmkit.net.transport.swarm_key import SwarmKey, admit_opener, prove_to_server

from .worlds import WORLDS, HivemindWorld, echo

pytestmark = pytest.mark.timeout(120)

KEY = SwarmKey(bytes(range(32)))
OTHER = SwarmKey(bytes(32))
STRANGERS = ["keyless", "other"]


@dataclass
class Private:
    """Two members of a private swarm, one peer without its key and one with another key; all of them echo."""

    server: Transport
    member: Transport
    keyless: Transport
    other: Transport

    def stranger(self, kind: str) -> Transport:
        found: Transport = getattr(self, kind)
        return found


@pytest_asyncio.fixture(params=sorted(WORLDS), scope="module", loop_scope="module")
async def private(request: pytest.FixtureRequest) -> AsyncIterator[Private]:
    world = WORLDS[request.param]()
    peers = [await world.peer(swarm_key=KEY), await world.peer(swarm_key=KEY)]
    for key in (None, OTHER):
        if isinstance(world, HivemindWorld):  # they know the address, and cannot join
            peers.append(await HivemindTransport.create(swarm_key=key))
            world.peers.append(peers[-1])
        else:
            peers.append(await world.peer(swarm_key=key))
    for peer in peers:
        await peer.listen("echo", echo)
    yield Private(*peers)
    await world.close()


# streams


@pytest.mark.asyncio(loop_scope="module")
async def test_members_talk_as_in_any_swarm(private: Private) -> None:
    stream = await private.member.open(private.server.peer_id, "echo", private.server.addresses)
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    stream.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_member_may_be_its_own_server(private: Private) -> None:
    stream = await private.server.open(private.server.peer_id, "echo")
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    stream.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("kind", "words"), [("keyless", "is private"), ("other", "key of its swarm is another one")]
)
async def test_a_stranger_opens_no_stream_to_a_member(private: Private, kind: str, words: str) -> None:
    with pytest.raises(NotAdmittedError, match=words):
        await private.stranger(kind).open(private.server.peer_id, "echo", private.server.addresses)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_member_opens_no_stream_to_a_stranger(private: Private, kind: str) -> None:
    stranger = private.stranger(kind)
    with pytest.raises(NotAdmittedError):
        await private.server.open(stranger.peer_id, "echo", stranger.addresses)


class Conversation:
    """A stream to a member whose other end a test plays by hand."""

    def __init__(self) -> None:
        self.opener, server = MemoryStream.pair(MemoryNetwork(), "opener", "server")
        self.admitting = asyncio.create_task(admit_opener(KEY, server, "talk", "server"))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_proof_that_was_seen_once_is_of_no_use_again() -> None:
    seen = Conversation()
    challenge = await seen.opener.receive()
    nonce = bytes(16)
    proof = KEY.proof("opener", "talk", "opener", "server", challenge[-16:] + nonce)
    await seen.opener.send(nonce, proof)
    await seen.admitting
    again = Conversation()
    await again.opener.receive()
    await again.opener.send(nonce, proof)
    with pytest.raises(NotAdmittedError):
        await again.admitting


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("answer", [b"", bytes(16), bytes(48), bytes(1000)], ids=len)
async def test_what_is_no_proof_is_refused(answer: bytes) -> None:
    talk = Conversation()
    await talk.opener.receive()
    await talk.opener.send(answer)
    with pytest.raises(NotAdmittedError):
        await talk.admitting


@pytest.mark.asyncio(loop_scope="module")
async def test_a_server_that_returns_the_openers_own_proof_proves_nothing() -> None:
    opener, server = MemoryStream.pair(MemoryNetwork(), "opener", "server")
    proving = asyncio.create_task(
        prove_to_server(KEY, b"swarm key 1\n" + bytes(16), opener, "talk", "opener")
    )
    await server.send((await server.receive())[16:])
    with pytest.raises(NotAdmittedError):
        await proving


# the table


@pytest.mark.asyncio(loop_scope="module")
async def test_members_share_records(private: Private) -> None:
    for value in (b"blue", b""):
        await private.server.store([("shared", value)], time.time() + 60 + len(value))
    found = await private.member.fetch(["shared"])
    assert found == {"shared": {private.server.peer_id: b"blue"}}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_cannot_read_what_members_store(private: Private, kind: str) -> None:
    await private.server.store([("secret", b"plain text of a record")], time.time() + 60)
    found = await private.stranger(kind).fetch(["secret"])
    assert not any(b"plain text" in value for values in found.values() for value in values.values())


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_members_read_nothing_that_a_stranger_stores(private: Private, kind: str) -> None:
    await private.stranger(kind).store([("foreign", b"1")], time.time() + 60)
    assert await private.member.fetch(["foreign"]) == {}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("key", "kept"), [(KEY, 1), (None, 0), (OTHER, 0)])
async def test_members_keep_records_of_members_only(key: SwarmKey | None, kept: int) -> None:
    network = MemoryNetwork()
    network.transport(swarm_key=KEY)
    storing = network.transport(swarm_key=key, record_check=lambda *_: False)  # which keeps none itself
    assert await storing.store([("key", b"1")], time.time() + 60) == kept


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("own", "theirs", "words"),
    [(None, KEY, "is private"), (OTHER, KEY, "another one"), (KEY, None, "does not have the key")],
)
async def test_a_table_is_joined_with_its_key_only(
    own: SwarmKey | None, theirs: SwarmKey | None, words: str
) -> None:
    peer = await HivemindTransport.create(swarm_key=theirs)
    try:
        with pytest.raises(TransportError, match=words):
            await HivemindTransport.create(initial_peers=peer.addresses, swarm_key=own)
    finally:
        await peer.close()


def _message() -> Any:
    tokens = {
        name: SimpleNamespace(signature=b"") for name in ("client_access_token", "service_access_token")
    }
    return SimpleNamespace(auth=SimpleNamespace(nonce=b"", signature=b"", **tokens))


async def _asked(own: SwarmKey | None, theirs: SwarmKey | None, name: str = "rpc_find") -> Any:
    """Have one peer ask another, each with its key."""
    context = SimpleNamespace(remote_id="asker", local_id="keeper")

    async def answer(request: Any, _: Any) -> Any:
        return _message()

    keeper = TableGate(theirs).answering("rpc_find", answer)
    return await TableGate(own).asking(name, lambda request: keeper(request, context), "asker", "keeper")(
        _message()
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_with_the_key_is_answered() -> None:
    assert (await _asked(KEY, KEY)).auth.signature


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("own", "theirs"), [(None, KEY), (OTHER, KEY), (KEY, None), (KEY, OTHER)])
async def test_a_request_without_the_key_is_not(own: SwarmKey | None, theirs: SwarmKey | None) -> None:
    with pytest.raises(NotAdmittedError):
        await _asked(own, theirs)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_proof_is_of_one_kind_of_request() -> None:
    with pytest.raises(NotAdmittedError):
        await _asked(KEY, KEY, "rpc_store")


# the key itself


def test_a_key_is_read_as_it_was_written(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    assert SwarmKey.load(tmp_path / "key").unseal("a", KEY.seal("a", b"value", 1.0), 1.0) == b"value"


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    SwarmKey().save(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    with pytest.raises(UsageError, match="is there already"):
        SwarmKey().save(tmp_path / "key")


@pytest.mark.parametrize(
    "content", ["", "swarmkit swarm key 1\n", "swarmkit swarm key 1\nab\n", "0" * 64, "é"]
)
def test_another_file_is_no_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(UsageError, match="swarm-key"):
        SwarmKey.load(tmp_path / "key")


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no swarm key in .*/key"):
        SwarmKey.load(tmp_path / "key")


def test_a_key_is_not_shown_or_pickled() -> None:
    assert str(KEY) == repr(KEY) == "<a swarm key>"
    with pytest.raises(UsageError):
        pickle.dumps(KEY)


@pytest.mark.parametrize(
    ("key", "subkey", "expires_at"), [(OTHER, "a", 1.0), (KEY, "b", 1.0), (KEY, "a", 2.0)]
)
def test_a_seal_is_of_one_key_service_and_expiry(key: SwarmKey, subkey: str, expires_at: float) -> None:
    assert key.unseal(subkey, KEY.seal("a", b"value", 1.0), expires_at) is None


@pytest.mark.parametrize("size", [0, 11, 12, 27, 100])
def test_other_bytes_have_no_seal(size: int) -> None:
    assert KEY.unseal("a", bytes(size), 1.0) is None


def test_equal_records_have_equal_seals_and_others_have_not() -> None:
    assert KEY.seal("a", b"value", 1.0) == KEY.seal("a", b"value", 1.0)
    assert KEY.seal("a", b"value", 1.0)[:12] != KEY.seal("a", b"valuf", 1.0)[:12]
