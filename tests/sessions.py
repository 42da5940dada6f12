"""What Linux says of the place of a process's session among others."""

from __future__ import annotations

from pathlib import Path

import pytest

grouped_by_sessions = pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this kernel does not group processes by sessions"
)


def session_nice(process: int | str) -> str:
    """What the kernel says of it: "nice 15" at the end, or nothing of a session that is in no group."""
    return Path(f"/proc/{process}/autogroup").read_text().strip()
