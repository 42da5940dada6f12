"""Which records a peer keeps for the swarm and hands out: those of a known kind that can be read where they
stand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from swarmkit.errors import ProtocolError
from swarmkit.net.registry import offers, records

READERS: Mapping[str, Callable[[str, str, bytes, float], object]] = {
    records.MODELS_KEY: records.read,
    records.PREFIX: records.read,
    offers.PREFIX: offers.read,
}
"""What reads the records under the keys that begin so: `read(key, subkey, value, now)`, which raises
`ProtocolError` where a record does not belong there."""


def is_acceptable(key: str, subkey: str, value: bytes, now: float) -> bool:
    """Whether a peer keeps and hands out a record at `now` (Unix time, seconds)."""
    read = next((read for prefix, read in READERS.items() if key.startswith(prefix)), None)
    if read is None:
        return False
    try:
        read(key, subkey, value, now)
    except ProtocolError:
        return False
    return True


def acceptable_now(key: str, subkey: str, value: bytes) -> bool:
    """`is_acceptable` by this machine's clock."""
    return is_acceptable(key, subkey, value, time.time())
