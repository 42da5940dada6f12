"""A peer's name is its public key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import UsageError
from swarmkit.net.transport.identity import Identity, verify

SEED = bytes(range(32))


def test_a_seed_makes_the_same_peer_everywhere() -> None:
    # the id that libp2p's own daemon reports for the file of this key
    assert Identity(b"\1" * 32).peer_id == "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


def test_identities_are_random_by_default() -> None:
    assert Identity().peer_id != Identity().peer_id


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(UsageError):
        Identity(bytes(size))


def test_an_identity_survives_its_file_format() -> None:
    identity = Identity()
    assert Identity.from_bytes(identity.to_bytes()).peer_id == identity.peer_id


@pytest.mark.parametrize("data", [b"", b"\x08\x01\x12\x40", b"\x08\x00\x12\x40" + bytes(64), bytes(68)])
def test_other_bytes_are_no_identity(data: bytes) -> None:
    with pytest.raises(UsageError, match="identity file"):
        Identity.from_bytes(data)


def test_a_file_is_made_once_and_read_again(tmp_path: Path) -> None:
    first = Identity.load_or_create(tmp_path / "keys" / "id")
    assert Identity.load_or_create(tmp_path / "keys" / "id").peer_id == first.peer_id


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path / "id")
    assert (tmp_path / "id").stat().st_mode & 0o777 == 0o600


def test_a_signature_is_its_signers() -> None:
    identity = Identity(SEED)
    assert verify(identity.peer_id, b"data", identity.sign(b"data"))


def test_a_signature_is_nobody_elses() -> None:
    assert not verify(Identity().peer_id, b"data", Identity(SEED).sign(b"data"))


def test_a_signature_is_of_its_data_only() -> None:
    identity = Identity(SEED)
    assert not verify(identity.peer_id, b"other", identity.sign(b"data"))


@given(st.text(max_size=80), st.binary(max_size=80))
def test_nonsense_is_not_verified(peer_id: str, signature: bytes) -> None:
    assert not verify(peer_id, b"data", signature)
