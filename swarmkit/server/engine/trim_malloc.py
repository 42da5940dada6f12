"""Memory that is free, and still this process's."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def trim_malloc() -> None:
    """Return to the system what loading took for a while; where the C library cannot, do nothing.

    glibc keeps freed pieces for later ones of their size. After eight blocks of M had been loaded and tried
    out, these were 135 MB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
