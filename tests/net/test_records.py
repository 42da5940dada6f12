"""A server's word about itself, and every way in which it is not believed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmkit.errors import ProtocolError
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.envelope import MAX_LIFETIME_S, MAX_RECORD_BYTES
from swarmkit.net.registry.records import (
    MODELS_KEY,
    Announcement,
    block_key,
    keys_of,
    read,
    sign,
)

from .announcements import FINGERPRINT, NOW, announcement, identity

MINE = announcement()
RECORD = sign(MINE, identity())
KEY = block_key(FINGERPRINT, 2)


def reading(value: bytes, key: str = KEY, subkey: str = MINE.peer_id, now: float = NOW) -> Announcement:
    return read(key, subkey, value, now)


def signed(**changes: Any) -> bytes:
    return sign(announcement(**changes), identity())


@pytest.mark.parametrize("key", [block_key(FINGERPRINT, 2), block_key(FINGERPRINT, 3), MODELS_KEY])
def test_a_record_is_believed_where_it_belongs(key: str) -> None:
    assert reading(RECORD, key) == MINE


def test_a_record_belongs_under_its_blocks_and_in_the_index() -> None:
    assert keys_of(MINE) == [block_key(FINGERPRINT, 2), block_key(FINGERPRINT, 3), MODELS_KEY]


@pytest.mark.parametrize("key", [*keys_of(MINE)])
def test_a_peer_keeps_what_it_would_believe(key: str) -> None:
    assert is_acceptable(key, MINE.peer_id, RECORD, NOW, NOW)


def test_a_services_record_is_believed_under_its_own_name() -> None:
    value = signed(service=3)
    assert reading(value, subkey=f"{MINE.peer_id}/3").service == 3


# not its own


@pytest.mark.parametrize("subkey", [MINE.peer_id, f"{MINE.peer_id}/2", f"{MINE.peer_id}/03"])
def test_a_services_record_is_not_believed_under_another_name(subkey: str) -> None:
    with pytest.raises(ProtocolError, match="service"):
        reading(signed(service=3), subkey=subkey)


def test_a_record_that_another_key_signed_is_not_believed() -> None:
    with pytest.raises(ProtocolError, match="signature"):
        reading(sign(MINE, identity(1)))


def test_a_record_under_another_peer_is_not_believed() -> None:
    with pytest.raises(ProtocolError, match="did not sign"):
        reading(RECORD, subkey=identity(1).peer_id)


def test_a_record_without_a_signature_is_not_believed() -> None:
    body, _ = msgspec.msgpack.decode(RECORD)
    with pytest.raises(ProtocolError, match="signature"):
        reading(msgspec.msgpack.encode([body, b""]))


def test_a_signature_for_something_else_does_not_count() -> None:
    body = msgspec.msgpack.encode(MINE)
    with pytest.raises(ProtocolError, match="signature"):
        reading(msgspec.msgpack.encode([body, identity().sign(body)]))


def test_a_peer_that_is_no_key_is_not_believed() -> None:
    with pytest.raises(ProtocolError, match="signature"):
        reading(signed(peer_id="somebody"), subkey="somebody")


# not where it belongs


@pytest.mark.parametrize(
    "key",
    [
        block_key(FINGERPRINT, 1),
        block_key(FINGERPRINT, 4),
        block_key("f" * 32, 2),
        KEY + "/2",
        KEY.replace("/2", "/02"),
        KEY.replace("/2", "/+2"),
        KEY.replace("/2", "/٢"),  # an Arabic two
        KEY.replace("/2", "/" + "2" * 5000),
        KEY.replace("/2", "/"),
        MODELS_KEY + "/2",
        "2",
        "",
    ],
)
def test_a_record_under_a_key_that_is_not_its_own_is_not_believed(key: str) -> None:
    with pytest.raises(ProtocolError, match="stands under"):
        reading(RECORD, key)


# not now


@pytest.mark.parametrize(("age", "believed"), [(59.9, True), (60.0, False), (61.0, False)])
def test_a_record_is_believed_until_it_expires(age: float, believed: bool) -> None:
    assert is_acceptable(KEY, MINE.peer_id, RECORD, NOW, NOW + age) is believed


@pytest.mark.parametrize(("ahead", "believed"), [(MAX_LIFETIME_S, True), (MAX_LIFETIME_S + 1, False)])
def test_a_record_that_would_live_too_long_is_not_believed(ahead: float, believed: bool) -> None:
    assert is_acceptable(KEY, MINE.peer_id, signed(expires_at=NOW + ahead), NOW, NOW) is believed


@pytest.mark.parametrize("expires_at", [float("inf"), float("nan"), float("-inf")])
def test_a_time_that_is_none_is_not_believed(expires_at: float) -> None:
    assert not is_acceptable(KEY, MINE.peer_id, signed(expires_at=expires_at), NOW, NOW)


# not well made


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 4, "stop": 4},
        {"start": 5, "stop": 4},
        {"start": -1},
        {"stop": 7},
        {"num_blocks": 0},
        {"num_blocks": 10**6},
        {"throughput": float("nan")},
        {"throughput": float("inf")},
        {"throughput": -1.0},
        {"free_cache_tokens": -1},
        {"sequence": -1},
        {"state": "immortal"},
        {"fingerprint": "short"},
        {"model": "x" * 257},
        {"public_name": "x" * 65},
        {"public_name": "two\nlines"},
        {"model": "\x1b[2J"},
        {"addresses": ("x",) * 17},
        {"addresses": ("x" * 257,)},
        {"dtype": 32},
        {"moving_to": (3, 3)},
        {"moving_to": (4, 3)},
        {"moving_to": (-1, 3)},
        {"moving_to": (3, 7)},
        {"moving_to": (1, 2, 3)},
    ],
    ids=str,
)
def test_a_record_whose_contents_make_no_sense_is_not_believed(changes: dict[str, Any]) -> None:
    assert not is_acceptable(MODELS_KEY, MINE.peer_id, signed(**changes), NOW, NOW)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"garbage",
        b"\xc1",
        b"\x91" * 4000,
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode([b"", b""]),
        msgspec.msgpack.encode(["text", "text"]),
        msgspec.msgpack.encode({"body": b"", "signature": b""}),
        msgspec.msgpack.encode([*msgspec.msgpack.decode(RECORD), b"more"]),
        RECORD + b"\x00",
        RECORD[:-1],
    ],
    ids=range(11),
)
def test_bytes_that_are_no_record_are_not_believed(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        reading(value)


def test_what_a_later_version_adds_to_a_record_is_left_out_of_account() -> None:
    body = msgspec.msgpack.encode({**msgspec.to_builtins(MINE), "admin": True})
    signature = identity().sign(b"swarmkit announcement 1\n" + body)
    assert reading(msgspec.msgpack.encode([body, signature])) == MINE


def test_a_record_that_is_too_large_is_not_even_read() -> None:
    with pytest.raises(ProtocolError, match="larger than 4096"):
        reading(bytes(MAX_RECORD_BYTES + 1))


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 255))
@settings(max_examples=300)
def test_a_record_with_one_byte_changed_anywhere_is_not_believed(place: int, change: int) -> None:
    tampered = bytearray(RECORD)
    tampered[place] ^= change
    assert not any(is_acceptable(key, MINE.peer_id, bytes(tampered), NOW, NOW) for key in keys_of(MINE))


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_a_reader_fail_otherwise(value: bytes) -> None:
    assert not is_acceptable(KEY, MINE.peer_id, value, NOW, NOW)


# what was checked before


def test_a_signature_is_checked_once() -> None:
    known: dict[bytes, Announcement] = {}
    first = read(KEY, MINE.peer_id, RECORD, NOW, known)
    assert read(MODELS_KEY, MINE.peer_id, RECORD, NOW, known) is first


def test_what_is_known_still_expires() -> None:
    known: dict[bytes, Announcement] = {}
    read(KEY, MINE.peer_id, RECORD, NOW, known)
    with pytest.raises(ProtocolError, match="expired"):
        read(KEY, MINE.peer_id, RECORD, NOW + 61, known)


# for people


@pytest.mark.parametrize(("name", "label"), [("mine", "mine"), ("", MINE.peer_id[-6:])])
def test_a_server_is_called_by_its_name_or_the_end_of_its_id(name: str, label: str) -> None:
    assert announcement(public_name=name).label == label


def test_a_record_is_not_kept_longer_than_the_announcement_inside_is_good() -> None:
    assert not is_acceptable(KEY, MINE.peer_id, RECORD, MINE.expires_at + 1, NOW)
