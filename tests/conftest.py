"""What holds for every test."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Hear Ctrl-C, which some tests press: whoever runs us in the background may have made us deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
