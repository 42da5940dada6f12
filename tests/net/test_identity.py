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


def test_an_empty_file_is_replaced_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "id").touch()
    made = Identity.load_or_create(tmp_path / "id")
    assert Identity.load_or_create(tmp_path / "id").peer_id == made.peer_id
    assert "is empty" in caplog.text


def test_a_file_that_others_could_read_is_told_and_closed_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Identity.load_or_create(tmp_path / "id")
    (tmp_path / "id").chmod(0o644)
    assert Identity.load_or_create(tmp_path / "id").peer_id == made.peer_id
    assert "could be read by other users" in caplog.text
    assert (tmp_path / "id").stat().st_mode & 0o777 == 0o600


def test_a_folder_is_no_identity_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        Identity.load_or_create(tmp_path)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/id cannot be"):
        Identity.load_or_create(tmp_path / "file" / "id")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: Path("/dev/full").write_bytes(bytes(1)))
    with pytest.raises(UsageError, match="No space left on device"):
        Identity.load_or_create(tmp_path / "id")
    assert list(tmp_path.iterdir()) == []


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
