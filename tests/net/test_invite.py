"""An invite link: what it holds, and what is said of one that cannot be used."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import UsageError
from swarmkit.net.connect import identity_for, over_hivemind
from swarmkit.net.transport.certificates import issue
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.invite import InviteLink, is_link, joined_links, read_link, write_link
from swarmkit.net.transport.swarm_key import SwarmKey

OWNER, GUEST = Identity(bytes(32)), Identity(bytes(range(32)))
ADDRESS = f"/ip4/192.0.2.7/tcp/31337/p2p/{OWNER.peer_id}"
NOW = 1_800_000_000.0
KEY = SwarmKey(bytes(range(32)))
LINK = write_link(InviteLink((ADDRESS,), NOW + 60, KEY.to_bytes(), "tiny-chat"))


def reason(text: str, now: float = NOW) -> str:
    """Why a link is refused."""
    with pytest.raises(UsageError) as caught:
        read_link(text, now)
    return str(caught.value)


def test_a_link_is_one_line_without_letters_that_a_shell_or_a_mail_changes() -> None:
    assert set(LINK.removeprefix("swarmkit:")) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    )


def test_a_link_is_read_as_it_was_written() -> None:
    found = read_link(LINK, NOW)
    assert (found.addresses, found.model, found.expires_at) == ((ADDRESS,), "tiny-chat", NOW + 60)


def test_a_link_that_a_mail_has_wrapped_is_read() -> None:
    assert read_link(f"  {LINK[:30]}\r\n {LINK[30:]}\n", NOW).addresses == (ADDRESS,)


def test_a_link_that_has_expired_is_told_so() -> None:
    assert "has expired, on 2027-01-15 at 08:01 UTC" in reason(LINK, NOW + 60)


@pytest.mark.parametrize("length", [10, 12, 40, len(LINK) - 12, len(LINK) - 2, len(LINK) - 1])
def test_a_link_that_was_cut_off_is_told_so(length: int) -> None:
    assert "is cut off" in reason(LINK[:length])


@given(st.integers(14, len(LINK) - 1), st.sampled_from("Aa0_-"))
def test_a_link_with_a_changed_letter_is_refused(place: int, letter: str) -> None:
    changed = LINK[:place] + letter + LINK[place + 1 :]
    if base64.urlsafe_b64decode(changed[9:] + "===") != base64.urlsafe_b64decode(LINK[9:] + "==="):
        assert "damaged" in reason(changed) or "version" in reason(changed)


def test_a_link_with_letters_that_no_link_has_is_damaged() -> None:
    assert "is damaged" in reason(LINK[:20] + "%" + LINK[21:])


def test_a_link_of_a_later_version_asks_for_an_update() -> None:
    data = bytearray(base64.urlsafe_b64decode(LINK[9:] + "==="))[:-8]
    data[0] = 2
    data += hashlib.sha256(data).digest()[:8]
    assert "update swarmkit" in reason("swarmkit:" + base64.urlsafe_b64encode(data).decode())


@given(st.text(max_size=200))
def test_whatever_follows_the_prefix_is_refused_with_a_reason(text: str) -> None:
    assert reason("swarmkit:" + text)


@pytest.mark.parametrize("addresses", [(), ("no address",), (ADDRESS,) * 17])
def test_no_link_is_made_of_what_is_no_list_of_addresses(addresses: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="no link can be made"):
        write_link(InviteLink(addresses, NOW))


# in the place of addresses


def test_an_address_is_no_link() -> None:
    assert (is_link(ADDRESS), is_link(f" {LINK}")) == (False, True)


def test_links_and_addresses_are_taken_together() -> None:
    other = ADDRESS.replace("192.0.2.7", "192.0.2.8")
    addresses, key = joined_links([other, LINK, other], NOW)
    assert (addresses, key is not None and key.swarm == KEY.swarm) == ([other, ADDRESS], True)


def test_links_of_different_private_swarms_are_refused() -> None:
    other = write_link(InviteLink((ADDRESS,), NOW + 60, SwarmKey(bytes(32)).to_bytes()))
    with pytest.raises(UsageError, match="different private swarms"):
        joined_links([LINK, other], NOW)


def lasting(key: SwarmKey) -> str:
    return write_link(InviteLink((ADDRESS,), 1e11, key.to_bytes()))


def test_a_key_of_another_swarm_beside_a_link_is_refused() -> None:
    with pytest.raises(UsageError, match="not of the swarm"):
        over_hivemind([lasting(KEY)], swarm_key=SwarmKey(bytes(32)))


def test_the_identity_that_a_link_brings_is_the_peers() -> None:
    chain = issue(
        OWNER, (), swarm=KEY.swarm, subject=GUEST.peer_id, roles=["use"], expires_at=1e11, serial=bytes(8)
    )
    key = SwarmKey(bytes(range(32)), owner=OWNER.peer_id).for_member(chain, GUEST)
    assert identity_for(over_hivemind([lasting(key)])).peer_id == GUEST.peer_id


def test_without_a_link_each_peer_has_a_new_identity() -> None:
    factory = over_hivemind([ADDRESS])
    assert identity_for(factory).peer_id != identity_for(factory).peer_id
