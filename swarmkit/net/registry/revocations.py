"""What the owner of a private swarm has taken back, in the table: each server keeps the newest list there.

The list stands under one key of its swarm, under the name of each peer that hands it on. Whose list it is,
and which is the newest, is seen from the list itself (`swarmkit.net.transport.certificates`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmkit.errors import ProtocolError
from swarmkit.net.transport.certificates import Revocations, read_revocations

PREFIX = "swarmkit/1/revocations/"


@dataclass(frozen=True)
class RevocationRecord:
    """A list that was found in the table; it is good until a newer one is known."""

    revocations: Revocations
    expires_at: float = math.inf


def key_of(swarm: bytes) -> str:
    """The table's key for the lists of a swarm."""
    return f"{PREFIX}{swarm.hex()}"


def read(key: str, subkey: str, value: bytes, now: float) -> RevocationRecord:
    """The list in a record that was found at `key`, `subkey`.

    Raises:
        ProtocolError: too large, malformed, not signed by the owner that it names, or of another swarm.
    """
    found = read_revocations(value)
    if key != key_of(found.swarm):
        raise ProtocolError("a list of revocations stands under another swarm", subkey)
    return RevocationRecord(found)
