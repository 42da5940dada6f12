"""What every body of the transport checks alike before it does what its caller asks."""

from __future__ import annotations

import math
from collections.abc import Iterable

from swarmkit.errors import UsageError
from swarmkit.net.transport.seam import MAX_FRAME_BYTES

MAX_VALUE_BYTES = 64 * 1024
"""A record's value is no larger: every peer keeps other peers' records in memory."""

MAX_KEY_BYTES = 1024

MAX_LIFETIME_S = 3600.0
"""Records that would last longer are refused: a mistaken or lying peer shall not be immortal."""


def frame_too_large(size: int) -> UsageError:
    """The error of a frame that is larger than `MAX_FRAME_BYTES`."""
    return UsageError(f"a frame of {size} bytes is larger than {MAX_FRAME_BYTES}; send it as several frames")


def checked_records(records: Iterable[tuple[str, bytes]], expires_at: float) -> list[tuple[str, bytes]]:
    """`records` as a list, the last value of each key.

    Raises:
        UsageError: a value or key is too large, or the time is not a time.
    """
    if not math.isfinite(expires_at):
        raise UsageError(f"records cannot expire at {expires_at}; give a Unix time in seconds")
    unique = dict(records)
    for key, value in unique.items():
        if len(key.encode()) > MAX_KEY_BYTES:
            raise UsageError(f"a key of {len(key.encode())} bytes is longer than {MAX_KEY_BYTES}")
        if len(value) > MAX_VALUE_BYTES:
            raise UsageError(
                f"the value of {key!r} has {len(value)} bytes, more than {MAX_VALUE_BYTES}; "
                "the table is for small records, send the rest over a stream"
            )
    return list(unique.items())
