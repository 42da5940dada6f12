"""Announcements to test with."""

from __future__ import annotations

from typing import Any

from swarmkit.net.registry.records import Announcement
from swarmkit.net.transport.identity import Identity

FINGERPRINT = "0123456789abcdef" * 2
NOW = 1_000_000.0


def identity(number: int = 0) -> Identity:
    """One of 255 key pairs, always the same."""
    return Identity(bytes([number + 1] * 32))


def announcement(number: int = 0, **changes: Any) -> Announcement:
    """What server `number` says: online with blocks 2:4 of 6, for another minute."""
    fields: dict[str, Any] = {
        "peer_id": identity(number).peer_id,
        "fingerprint": FINGERPRINT,
        "model": "tiny",
        "num_blocks": 6,
        "start": 2,
        "stop": 4,
        "state": "online",
        "throughput": 10.0,
        "free_cache_tokens": 1000,
        "dtype": "float32",
        "addresses": ("/ip4/127.0.0.1/tcp/1/p2p/" + identity(number).peer_id,),
        "sequence": 7,
        "expires_at": NOW + 60.0,
    }
    return Announcement(**{**fields, **changes})
