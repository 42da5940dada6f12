"""Offers of weights: who may say what about which file, and where it may stand."""

from __future__ import annotations

import msgspec
import pytest

from swarmkit.errors import ProtocolError
from swarmkit.net.registry import offers, records
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.offers import WeightsOffer, claim_key, content_key
from swarmkit.net.transport.identity import Identity

ME = Identity(b"m" * 32)
OTHER = Identity(b"o" * 32)
NOW = 1_000_000.0
CONTENT = "ab" * 32
MODEL = "cd" * 16


def an_offer(**changes: object) -> WeightsOffer:
    offer = WeightsOffer(
        peer_id=ME.peer_id,
        fingerprint=MODEL,
        block=3,
        content=CONTENT,
        size=10,
        addresses=("/memory/me",),
        expires_at=NOW + 60,
    )
    return msgspec.structs.replace(offer, **changes)


def test_an_offer_stands_under_its_content_and_its_block() -> None:
    offer = an_offer()
    value = offers.sign(offer, ME)
    for key in (content_key(CONTENT), claim_key(MODEL, 3)):
        assert offers.read(key, ME.peer_id, value, NOW) == offer
        assert is_acceptable(key, ME.peer_id, value, NOW, NOW)


def test_an_offer_without_a_block_is_one_of_the_manifest() -> None:
    offer = an_offer(block=None)
    value = offers.sign(offer, ME)
    assert offers.read(claim_key(MODEL, None), ME.peer_id, value, NOW) == offer
    assert not is_acceptable(claim_key(MODEL, 3), ME.peer_id, value, NOW, NOW)
    assert not is_acceptable(claim_key(MODEL, None), ME.peer_id, offers.sign(an_offer(), ME), NOW, NOW)


@pytest.mark.parametrize(
    ("offer", "signer", "subkey", "key", "message"),
    [
        (an_offer(), OTHER, ME.peer_id, claim_key(MODEL, 3), "signature"),
        (an_offer(), ME, OTHER.peer_id, claim_key(MODEL, 3), "did not sign"),
        (an_offer(), ME, ME.peer_id, claim_key(MODEL, 4), "not its own"),
        (an_offer(), ME, ME.peer_id, content_key("00" * 32), "not its own"),
        (an_offer(expires_at=NOW), ME, ME.peer_id, claim_key(MODEL, 3), "expired"),
        (an_offer(expires_at=NOW + 4000), ME, ME.peer_id, claim_key(MODEL, 3), "too far ahead"),
        (an_offer(expires_at=float("nan")), ME, ME.peer_id, claim_key(MODEL, 3), "expired"),
        (an_offer(content="../../etc"), ME, ME.peer_id, claim_key(MODEL, 3), "not an offer"),
        (an_offer(size=-1), ME, ME.peer_id, claim_key(MODEL, 3), "not an offer"),
        (an_offer(addresses=("x" * 250,) * 17), ME, ME.peer_id, claim_key(MODEL, 3), "larger than|not an"),
    ],
)
def test_what_is_wrong_with_an_offer_is_said(
    offer: WeightsOffer, signer: Identity, subkey: str, key: str, message: str
) -> None:
    value = offers.sign(offer, signer)
    with pytest.raises(ProtocolError, match=message):
        offers.read(key, subkey, value, NOW)
    assert not is_acceptable(key, subkey, value, NOW, NOW)


def test_bytes_that_are_no_offer_are_refused() -> None:
    for value in (b"", b"x", msgspec.msgpack.encode([b"", b""]), b"x" * 10_000):
        with pytest.raises(ProtocolError):
            offers.read(claim_key(MODEL, 3), ME.peer_id, value, NOW)


def test_an_announcement_is_no_offer_and_the_other_way_round() -> None:
    value = offers.sign(an_offer(), ME)
    assert not is_acceptable(records.block_key(MODEL, 3), ME.peer_id, value, NOW, NOW)
