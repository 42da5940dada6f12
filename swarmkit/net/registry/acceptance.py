"""Which records a peer keeps for the swarm and hands out: those of a known kind that can be read where they
stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import ProtocolError
from swarmkit.net.registry import offers, records, revocations
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.revocations import RevocationRecord

READERS: Mapping[str, Callable[[str, str, bytes, float], Announcement | WeightsOffer | RevocationRecord]] = {
    records.MODELS_KEY: records.read,
    records.PREFIX: records.read,
    offers.PREFIX: offers.read,
    revocations.PREFIX: revocations.read,
}
"""What reads the records under the keys that begin so: `read(key, subkey, value, now)`, which raises
`ProtocolError` where a record does not belong there."""


def is_acceptable(key: str, subkey: str, value: bytes, expires_at: float, now: float) -> bool:
    """Whether a peer keeps a record at `now`, and hands it out until `expires_at` (Unix times in seconds).

    A record does not outlive the announcement or the offer inside it.
    """
    read = next((read for prefix, read in READERS.items() if key.startswith(prefix)), None)
    if read is None:
        return False
    try:
        return expires_at <= read(key, subkey, value, now).expires_at
    except ProtocolError:
        return False


def acceptable_now(key: str, subkey: str, value: bytes, expires_at: float) -> bool:
    """`is_acceptable` by this machine's clock."""
    return is_acceptable(key, subkey, value, expires_at, SYSTEM_CLOCK.time())
