"""Sizes in bytes, as people read and write them.

Memory is counted in powers of two (GiB), as programs and devices count it. Disks and what goes over a line
are counted in powers of ten (GB), as they are sold.
"""

from __future__ import annotations

import re

from swarmkit.errors import UsageError

GIB = 2**30

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Read a size such as "24GiB", "24 GB" or "512MiB".

    Raises:
        UsageError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B?)\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write 24GiB, 24GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """Write memory in powers of two, such as "24.0 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_data(count: float) -> str:
    """Write data on a disk or a line in powers of ten, such as "24.0 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
