"""Who may do what in a private swarm with an owner, as a pure judgement over what peers show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import NotAdmittedError, ProtocolError, UsageError
from swarmkit.net.transport.certificates import (
    MAX_CHAIN,
    MAX_CHAIN_BYTES,
    Chain,
    Revocations,
    Role,
    fault_in_chain,
    fault_now,
    issue,
    read_chain,
    read_revocations,
    sign_revocations,
    write_chain,
)
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.members import Members, roles_of_opener, roles_of_request, roles_of_server

SWARM = bytes(range(16))
OWNER, ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in range(1, 5))
NOW = 1_000_000.0
USE: tuple[Role, ...] = ("use",)


def signed(
    subject: Identity = ALICE,
    roles: tuple[Role, ...] = USE,
    *,
    by: Identity = OWNER,
    above: Chain = (),
    expires_at: float = NOW + 100,
    swarm: bytes = SWARM,
) -> Chain:
    return issue(by, above, swarm=swarm, subject=subject.peer_id, roles=roles, expires_at=expires_at)


def members(chain: Chain = (), now: Callable[[], float] = lambda: NOW, **bounds: int) -> Members:
    return Members(SWARM, OWNER.peer_id, chain, now, **bounds)


def fault(chain: Chain, of: Identity = ALICE) -> str:
    return fault_in_chain(chain, SWARM, OWNER.peer_id, of.peer_id)


INVITER = signed(ALICE, ("use", "invite"))


@pytest.mark.parametrize(
    ("chain", "of", "why"),
    [
        (signed(), ALICE, ""),
        ((), OWNER, ""),
        (signed(BOB, by=ALICE, above=INVITER), BOB, ""),
        ((), ALICE, "no certificate"),
        (signed(), BOB, "another peer"),
        (signed(by=EVE), ALICE, "not signed by who may"),
        (signed(swarm=bytes(16)), ALICE, "another swarm"),
        (signed(BOB, by=ALICE, above=signed()), BOB, "may not invite"),
        (signed(BOB, ("serve",), by=ALICE, above=INVITER), BOB, "allows more"),
        (signed(BOB, by=ALICE, above=INVITER, expires_at=NOW + 101), BOB, "lasts longer"),
        (signed(BOB, by=EVE, above=INVITER), BOB, "not signed by who may"),
        (INVITER[:1] + signed(BOB, by=ALICE)[:1] + signed(EVE, by=BOB), EVE, "may not invite"),
    ],
)
def test_what_is_wrong_with_a_chain_for_ever(chain: Chain, of: Identity, why: str) -> None:
    found = fault(chain, of)
    assert (why in found) if why else found == ""


def test_a_member_that_may_invite_may_let_others_invite() -> None:
    second = signed(BOB, ("use", "invite"), by=ALICE, above=INVITER)
    assert fault(signed(EVE, by=BOB, above=second), EVE) == ""


def test_a_chain_has_a_longest_length() -> None:
    chain = signed(ALICE, ("invite",))
    for _ in range(MAX_CHAIN - 1):
        chain = signed(ALICE, ("invite",), by=ALICE, above=chain)
    with pytest.raises(UsageError, match="ask them"):
        signed(ALICE, ("invite",), by=ALICE, above=chain)


@pytest.mark.parametrize("field", ["subject", "roles", "expires_at", "serial"])
def test_a_certificate_whose_body_was_changed_is_forged(field: str) -> None:
    (mine,) = signed()
    other: dict[str, Any] = {
        "subject": BOB.peer_id,
        "roles": ("serve", "use"),
        "expires_at": NOW + 9e9,
        "serial": bytes(8),
    }
    changed = msgspec.structs.replace(mine.certificate, **{field: other[field]})
    forged = msgspec.structs.replace(mine, certificate=changed, body=msgspec.msgpack.encode(changed))
    assert "not signed by who may" in fault((forged,), BOB if field == "subject" else ALICE)


@given(data=st.data())
def test_no_changed_byte_of_a_chain_is_believed(data: st.DataObject) -> None:
    shown = bytearray(write_chain(signed(BOB, by=ALICE, above=INVITER)))
    place = data.draw(st.integers(0, len(shown) - 1))
    shown[place] ^= data.draw(st.integers(1, 255))
    assert members().fault_of(BOB.peer_id, bytes(shown))


@given(st.binary(max_size=300))
def test_bytes_of_a_stranger_are_no_chain(data: bytes) -> None:
    assert members().fault_of(EVE.peer_id, data)


def test_a_chain_that_is_too_long_is_not_read() -> None:
    with pytest.raises(ProtocolError, match="larger"):
        read_chain(bytes(MAX_CHAIN_BYTES + 1))


def test_a_chain_is_read_as_it_was_written() -> None:
    assert read_chain(write_chain(INVITER)) == INVITER


# what changes with time


@pytest.mark.parametrize("now", [NOW + 100, NOW + 1e9])
def test_a_certificate_expires_with_the_first_of_its_chain(now: float) -> None:
    chain = signed(BOB, by=ALICE, above=INVITER, expires_at=NOW + 50)
    assert (fault_now(chain, NOW, None, BOB.peer_id), "has expired" in fault_now(chain, now, None, "")) == (
        "",
        True,
    )


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("by", ["serials", "peers"])
def test_what_hangs_below_a_revoked_certificate_is_void(by: str, place: int) -> None:
    chain = signed(BOB, by=ALICE, above=INVITER)
    certificate = chain[place].certificate
    named = certificate.serial if by == "serials" else certificate.subject
    revoked = Revocations(SWARM, OWNER.peer_id, 1, **{by: (named,)})
    assert "taken back" in fault_now(chain, NOW, revoked, BOB.peer_id)


def taken_back(number: int, *peers: Identity, by: Identity = OWNER, swarm: bytes = SWARM) -> bytes:
    names = tuple(peer.peer_id for peer in peers)
    return sign_revocations(by, Revocations(swarm, by.peer_id, number, peers=names))


def test_a_member_is_refused_from_the_list_on_that_names_it() -> None:
    here, shown = members(), write_chain(signed())
    before = here.fault_of(ALICE.peer_id, shown)
    here.learn(taken_back(1, ALICE))
    assert (before, "taken back" in here.fault_of(ALICE.peer_id, shown)) == ("", True)


def test_an_older_list_changes_nothing() -> None:
    here = members()
    here.learn(taken_back(2, ALICE))
    assert not here.learn(taken_back(1))
    assert not here.learn(taken_back(2))
    assert here.revocations is not None
    assert here.revocations.peers == (ALICE.peer_id,)


@pytest.mark.parametrize(
    "forged", [taken_back(9, by=EVE), taken_back(9, swarm=bytes(16)), b"", b"\x92\xc0\xc0"]
)
def test_a_list_that_is_not_the_owners_changes_nothing(forged: bytes) -> None:
    here = members()
    with pytest.raises(ProtocolError):
        here.learn(forged)
    assert here.revocations is None


def test_a_list_in_anothers_name_is_not_believed() -> None:
    mine = msgspec.msgpack.decode(taken_back(9, by=EVE))
    body = msgspec.msgpack.encode(Revocations(SWARM, OWNER.peer_id, 9))
    with pytest.raises(ProtocolError, match="not signed"):
        read_revocations(msgspec.msgpack.encode([body, mine[1]]))


def test_a_list_has_a_largest_size() -> None:
    many = tuple(bytes([number % 256, number // 256]) + bytes(6) for number in range(6000))
    with pytest.raises(UsageError, match="full"):
        sign_revocations(OWNER, Revocations(SWARM, OWNER.peer_id, 1, serials=many))


def test_who_keeps_lists_is_told_of_a_newer_one_once() -> None:
    here, told = members(), []
    here.on_news = told.append
    for _ in range(2):
        here.learn(taken_back(1, ALICE))
    assert told == [taken_back(1, ALICE)]


# roles


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("swarmkit/session", {"use"}),
        ("swarmkit/session/3", {"use"}),
        ("swarmkit/gradient", {"use"}),
        ("swarmkit/adapters", {"use"}),
        ("swarmkit/push", {"serve"}),
        ("swarmkit/push/1", {"serve"}),
        ("swarmkit/weights", {"serve", "use"}),
        ("swarmkit/reach", set()),
        ("anything", {"use"}),
    ],
)
def test_what_opens_a_stream(name: str, roles: set[Role]) -> None:
    assert roles_of_opener(name) == roles


def test_who_serves_streams_and_keeps_records_has_the_role_serve() -> None:
    found = [roles_of_server("swarmkit/session"), roles_of_request("rpc_store"), roles_of_request("rpc_find")]
    assert found == [{"serve"}, {"serve"}, set()]


@pytest.mark.parametrize("roles", [("use",), ("serve",), ("invite",), ("serve", "use")])
def test_a_member_may_do_what_its_roles_say(roles: tuple[Role, ...]) -> None:
    shown = write_chain(signed(roles=roles))
    refused = members().fault_of(ALICE.peer_id, shown, frozenset({"use"}))
    assert ("does not allow it to use" in refused) == ("use" not in roles)


def test_a_peer_is_told_at_its_start_that_its_certificate_is_another_ones() -> None:
    with pytest.raises(UsageError, match="--identity FILE"):
        members(signed()).check_own(BOB.peer_id)


def test_a_member_whose_time_is_over_is_no_member_any_more() -> None:
    now = [NOW]
    here = members(now=lambda: now[0])
    here.admit(ALICE.peer_id, write_chain(signed()))
    before = here.is_member(ALICE.peer_id)
    now[0] += 100
    assert (before, here.is_member(ALICE.peer_id)) == (True, False)


def test_who_was_refused_is_no_member() -> None:
    here = members()
    with pytest.raises(NotAdmittedError):
        here.admit(EVE.peer_id, write_chain(signed()))
    assert not here.is_member(EVE.peer_id)


def test_peers_that_show_much_cost_a_bounded_amount_of_memory() -> None:
    here = members(most_remembered=10)
    for number in range(30):
        here.fault_of(EVE.peer_id, bytes([number]))
    assert here.remembered == 10


def test_the_roles_of_a_certificate_are_those_that_exist() -> None:
    with pytest.raises(UsageError):
        signed(roles=("rule",))  # type: ignore[arg-type]


def test_a_body_with_more_than_it_should_have_is_not_read() -> None:
    (mine,) = signed()
    longer = replace_body(mine.body)
    with pytest.raises(ProtocolError):
        read_chain(msgspec.msgpack.encode([[longer, OWNER.sign(b"x")]]))


def replace_body(body: bytes) -> bytes:
    """A body with one more field."""
    return msgspec.msgpack.encode([*msgspec.msgpack.decode(body), 1])
