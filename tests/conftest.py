"""What holds for every test."""

from __future__ import annotations

import os
import signal

THROUGHPUT = "SWARMKIT_SERVER_THROUGHPUT"


def pytest_configure() -> None:
    """Hear Ctrl-C, which some tests press, even if the tests run in the background, where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Servers announce this rather than measure themselves, but for a test that takes the variable away.
    os.environ.setdefault(THROUGHPUT, "100")
