"""A private swarm with an owner: every stream, request and record needs the right certificate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import NotAdmittedError, PeerUnreachableError, UsageError
from swarmkit.net.hivemind.gate import TableGate
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.registry import member_transport, revocations
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.member_transport import MemberTransport
from swarmkit.net.transport.certificates import (
    Chain,
    Revocations,
    Role,
    issue,
    sign_revocations,
)
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.members import Members
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Stream, Transport
from swarmkit.net.transport.swarm_key import SwarmKey

from ..clocks import SetTime
from ..waiting import eventually
from .worlds import WORLDS, HivemindWorld, echo

pytestmark = pytest.mark.timeout(120)

SECRET = bytes(range(32))
OWNER, SERVER, USER, INTRUDER, EVE = (Identity(bytes([number]) * 32) for number in range(1, 6))
OWNERS = SwarmKey(SECRET, owner=OWNER.peer_id)
LATER = time.time() + 1000.0


class Unchecked(SwarmKey):
    """The key of a peer that begins though all others would refuse it."""

    def check_own(self, peer_id: str) -> None: ...


def chain(
    subject: Identity,
    *roles: Role,
    by: Identity = OWNER,
    above: Chain = (),
    expires_at: float = LATER,
    serial: bytes | None = None,
) -> Chain:
    return issue(
        by,
        above,
        swarm=OWNERS.swarm,
        subject=subject.peer_id,
        roles=roles,
        expires_at=expires_at,
        serial=serial,
    )


def key(certificates: Chain = (), owner: Identity = OWNER, secret: bytes = SECRET) -> SwarmKey:
    return Unchecked(secret, owner=owner.peer_id, chain=certificates)


def taken_back(number: int, *peers: Identity, serials: tuple[bytes, ...] = ()) -> bytes:
    names = tuple(peer.peer_id for peer in peers)
    return sign_revocations(OWNER, Revocations(OWNERS.swarm, OWNER.peer_id, number, serials, names))


REVOKED = b"revoked!"
STRANGERS: dict[str, tuple[SwarmKey | None, str]] = {
    "without key": (None, "is private"),
    "with another key": (key(chain(INTRUDER, "use"), secret=bytes(32)), "key of its swarm is another one"),
    "with the key alone": (Unchecked(SECRET), "no certificate"),
    "without certificate": (key(), "no certificate"),
    "of another owner": (key(chain(INTRUDER, "use", by=EVE), owner=EVE), "not signed by who may"),
    "with a forged certificate": (key(chain(INTRUDER, "use", by=EVE)), "not signed by who may"),
    "with another's certificate": (key(chain(USER, "use")), "another peer"),
    "that has expired": (key(chain(INTRUDER, "use", "serve", expires_at=time.time() - 1)), "has expired"),
    "that was taken back": (key(chain(INTRUDER, "use", "serve", serial=REVOKED)), "taken back"),
}
"""Keys with which a peer is refused for whatever it tries, and what it is told."""

WRONG_ROLES = {"swarmkit/session": "serve", "swarmkit/grad": "serve", "swarmkit/adapters": "serve"} | {
    "swarmkit/push": "use",
    "swarmkit/weights": "invite",
}
"""The streams of a server, each with a role that does not open it."""


def servers_key(certificates: Chain | None = None) -> SwarmKey:
    found = key(certificates or chain(SERVER, "serve", "use"))
    assert found.members is not None
    found.members.learn(taken_back(1, serials=(REVOKED,)))
    return found


@dataclass
class Guarded:
    """A server and a user of a private swarm with an owner, and a way for others to come near."""

    world: Any
    server: Transport
    user: Transport

    @asynccontextmanager
    async def intruder(self, its_key: SwarmKey | None) -> AsyncIterator[Transport]:
        """A peer that knows the server's addresses."""
        if isinstance(self.world, HivemindWorld):
            peer: Transport = await HivemindTransport.create(identity=INTRUDER, swarm_key=its_key)
        else:
            peer = self.world.network.transport(INTRUDER, swarm_key=its_key)
        try:
            yield peer
        finally:
            await peer.close()


@pytest_asyncio.fixture(params=sorted(WORLDS), scope="module", loop_scope="module")
async def guarded(request: pytest.FixtureRequest) -> AsyncIterator[Guarded]:
    world = WORLDS[request.param]()
    server = await world.peer(identity=SERVER, swarm_key=servers_key())
    user = await world.peer(identity=USER, swarm_key=servers_key(chain(USER, "use")))
    for name in ("echo", *WRONG_ROLES):
        await server.listen(name, echo)
        await user.listen(name, echo)
    yield Guarded(world, server, user)
    await world.close()


async def said(stream: Stream) -> bytes:
    await stream.send(b"hello")
    return await stream.receive()


# streams


@pytest.mark.asyncio(loop_scope="module")
async def test_members_do_what_their_certificates_allow(guarded: Guarded) -> None:
    stream = await guarded.user.open(guarded.server.peer_id, "swarmkit/session", guarded.server.addresses)
    assert await said(stream) == b"hello"
    stream.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_opens_no_stream(guarded: Guarded, kind: str) -> None:
    its_key, words = STRANGERS[kind]
    async with guarded.intruder(its_key) as intruder:
        for name in WRONG_ROLES:
            with pytest.raises(NotAdmittedError, match=words):
                await intruder.open(guarded.server.peer_id, name, guarded.server.addresses)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_member_opens_no_stream_that_takes_another_role(guarded: Guarded) -> None:
    for role in ("serve", "use", "invite"):
        async with guarded.intruder(key(chain(INTRUDER, role))) as intruder:
            for name in (name for name, wrong in WRONG_ROLES.items() if wrong == role):
                with pytest.raises(NotAdmittedError, match="does not allow it to"):
                    await intruder.open(guarded.server.peer_id, name, guarded.server.addresses)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_member_uses_no_server_that_may_not_serve(guarded: Guarded) -> None:
    with pytest.raises(NotAdmittedError, match="does not allow it to serve"):
        await guarded.server.open(guarded.user.peer_id, "echo", guarded.user.addresses)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_member_uses_no_stranger(guarded: Guarded, kind: str) -> None:
    async with guarded.intruder(STRANGERS[kind][0]) as intruder:
        await intruder.listen("echo", echo)
        with pytest.raises(NotAdmittedError):
            await guarded.server.open(intruder.peer_id, "echo", intruder.addresses)


# requests to the table


def _message() -> Any:
    token = SimpleNamespace(signature=b"")
    auth = SimpleNamespace(
        nonce=b"",
        signature=b"",
        client_access_token=token,
        service_access_token=SimpleNamespace(**vars(token)),
    )
    return SimpleNamespace(auth=auth)


async def asked(own: SwarmKey | None, theirs: SwarmKey, name: str = "rpc_find") -> Any:
    """Have the intruder ask the server."""
    context = SimpleNamespace(remote_id=INTRUDER.peer_id, local_id=SERVER.peer_id)

    async def answer(request: Any, _: Any) -> Any:
        return _message()

    keeper = TableGate(theirs).answering(name, answer)
    ask = TableGate(own).asking(name, lambda request: keeper(request, context), *_ends())
    return await ask(_message())


def _ends() -> tuple[str, str]:
    return INTRUDER.peer_id, SERVER.peer_id


REQUESTS = ["rpc_ping", "rpc_find", "rpc_store"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_is_answered_no_request(kind: str, name: str) -> None:
    with pytest.raises(NotAdmittedError):
        await asked(STRANGERS[kind][0], servers_key(), name)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("role", ["use", "serve", "invite"])
async def test_only_servers_store(role: Role, name: str) -> None:
    own = key(chain(INTRUDER, role))
    if name == "rpc_store" and role != "serve":
        with pytest.raises(NotAdmittedError, match="does not allow it to serve"):
            await asked(own, servers_key(), name)
    else:
        assert (await asked(own, servers_key(), name)).auth.signature


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_no_answer_of_a_stranger_is_taken(kind: str) -> None:
    async def answer(request: Any, _: Any) -> Any:
        return _message()

    context = SimpleNamespace(remote_id=SERVER.peer_id, local_id=INTRUDER.peer_id)
    keeper = TableGate(STRANGERS[kind][0]).answering("rpc_find", answer)
    ask = TableGate(servers_key()).asking(
        "rpc_find", lambda request: keeper(request, context), SERVER.peer_id, INTRUDER.peer_id
    )
    with pytest.raises(NotAdmittedError):
        await ask(_message())


# records


@pytest.mark.asyncio(loop_scope="module")
async def test_members_find_what_servers_store(guarded: Guarded) -> None:
    await guarded.server.store([("shared", b"blue")], time.time() + 60)
    assert await guarded.user.fetch(["shared"]) == {"shared": {SERVER.peer_id: b"blue"}}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_finds_nothing(guarded: Guarded, kind: str) -> None:
    await guarded.server.store([("hidden", b"plain text")], time.time() + 60)
    found: Any = {}
    async with guarded.intruder(STRANGERS[kind][0]) as intruder:
        try:
            found = await intruder.fetch(["hidden"])
        except Exception as error:  # noqa: BLE001 - which is nothing, too
            found = str(error)
    assert "plain text" not in str(found)


@pytest.mark.parametrize("kind", [kind for kind, (its_key, _) in STRANGERS.items() if its_key])
def test_a_record_of_a_stranger_is_not_believed(kind: str) -> None:
    its_key = STRANGERS[kind][0]
    assert its_key is not None
    sealed = its_key.seal(INTRUDER.peer_id, b"mine", LATER)
    assert servers_key().unseal(INTRUDER.peer_id, sealed, LATER) is None


@pytest.mark.parametrize("role", ["use", "invite"])
def test_a_record_of_a_member_that_may_not_serve_is_not_believed(role: Role) -> None:
    sealed = key(chain(INTRUDER, role)).seal(INTRUDER.peer_id, b"mine", LATER)
    assert servers_key().unseal(INTRUDER.peer_id, sealed, LATER) is None


def test_a_record_is_not_believed_under_another_name_or_at_another_time() -> None:
    sealed = servers_key().seal(SERVER.peer_id, b"mine", LATER)
    found = [
        servers_key().unseal(*about)
        for about in (
            (SERVER.peer_id, sealed, LATER),
            (f"{SERVER.peer_id}/1", sealed, LATER),
            (USER.peer_id, sealed, LATER),
            (SERVER.peer_id, sealed, LATER + 1),
        )
    ]
    assert found == [b"mine", None, None, None]


# what the owner takes back


@asynccontextmanager
async def swarm_of_three(
    now: Callable[[], float] = time.time,
) -> AsyncIterator[tuple[MemberTransport, MemberTransport, MemoryNetwork]]:
    """A server, a user that learns from it, and their network; in memory.

    Args: now: the Unix time by which the server judges certificates.
    """
    network = MemoryNetwork()
    keys = [key(chain(SERVER, "serve", "use")), key(chain(USER, "use"))]
    peers = []
    for identity, its_key in zip((SERVER, USER), keys, strict=True):
        assert its_key.members is not None
        if identity is SERVER:
            its_key.members = Members(OWNERS.swarm, OWNER.peer_id, its_key.members.chain, now)
        peers.append(MemberTransport(network.transport(identity, acceptable_now, its_key), its_key.members))
    try:
        yield peers[0], peers[1], network
    finally:
        for peer in peers:
            await peer.close()


@pytest.mark.asyncio
async def test_what_one_server_knows_to_be_taken_back_all_members_learn() -> None:
    async with swarm_of_three() as (server, user, _):
        server.members.learn(taken_back(7, EVE))
        await server.look()
        await user.look()
        assert user.members.signed_revocations == taken_back(7, EVE)


@pytest.mark.asyncio
async def test_a_list_outlives_the_peer_that_brought_it() -> None:
    async with swarm_of_three() as (server, user, network):
        owners = SwarmKey(SECRET, owner=OWNER.peer_id)
        assert owners.members is not None
        owners.members.learn(taken_back(3, EVE))
        owner = MemberTransport(network.transport(OWNER, acceptable_now, owners), owners.members)
        assert await owner.hand_on() == 1
        await owner.close()
        await server.look()
        network.lose(revocations.key_of(OWNERS.swarm), OWNER.peer_id)
        await user.look()
        assert user.members.revocations is not None


@pytest.mark.asyncio
async def test_a_list_that_is_put_into_the_table_again_later_changes_nothing() -> None:
    async with swarm_of_three() as (server, user, _):
        server.members.learn(taken_back(2, EVE))
        user.members.learn(taken_back(4, EVE, INTRUDER))
        await server.look()
        await user.look()
        assert user.members.signed_revocations == taken_back(4, EVE, INTRUDER)


@pytest.mark.asyncio
@pytest.mark.parametrize("gone", ["revoked", "expired"])
async def test_open_streams_of_a_former_member_end(gone: str) -> None:
    now = SetTime(time.time())
    async with swarm_of_three(now) as (server, user, _):
        await server.listen("echo", echo)
        stream = await user.open(SERVER.peer_id, "echo")
        assert await said(stream) == b"hello"
        if gone == "revoked":
            server.members.learn(taken_back(1, USER))
        else:
            now.now = LATER + 1
        await server.look()
        with pytest.raises(PeerUnreachableError):
            await stream.receive()


@pytest.mark.asyncio
async def test_a_peer_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_transport, "PERIOD_S", 0.01)
    async with swarm_of_three() as (server, user, _):
        server.members.learn(taken_back(1, EVE))
        await eventually(lambda: user.members.revocations is not None, "the user learns of it")


@pytest.mark.asyncio
async def test_closing_ends_the_look() -> None:
    before = asyncio.all_tasks()
    async with swarm_of_three():
        pass
    assert asyncio.all_tasks() == before


def test_what_is_taken_back_is_remembered_beside_the_key(tmp_path: Path) -> None:
    file = tmp_path / "member.key"
    key(chain(USER, "use")).save(file)
    first = SwarmKey.load(file)
    assert first.members is not None
    first.members.learn(taken_back(5, EVE))
    again = SwarmKey.load(file)
    assert again.members is not None
    assert again.members.signed_revocations == taken_back(5, EVE)


def test_a_key_file_with_certificates_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "member.key"
    SwarmKey(SECRET, owner=OWNER.peer_id, chain=chain(USER, "use"), identity=USER).save(file)
    found = SwarmKey.load(file)
    assert found.members is not None
    assert found.identity is not None
    assert (found.members.chain[-1].certificate.subject, found.identity.peer_id) == (USER.peer_id,) * 2


def test_a_peer_with_anothers_certificate_does_not_begin() -> None:
    with pytest.raises(UsageError, match="--identity FILE"):
        MemoryNetwork().transport(
            EVE, swarm_key=SwarmKey(SECRET, owner=OWNER.peer_id, chain=chain(USER, "use"))
        )
