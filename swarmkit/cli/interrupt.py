"""What Ctrl-C does before a command has begun with its work.

Python turns Ctrl-C into an exception wherever the program is. In the middle of an import that leaves a
traceback, or the exception is lost in a library that catches it, and the program goes on. While a command
only imports and starts, nothing needs an orderly end: child processes end with this one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 130
"""Of a program that Ctrl-C ended, by the shells' convention: 128 + SIGINT."""


def end_at_once(exit_code: int) -> None:
    """End the process without another word."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(exit_code)


def end_on_interrupt() -> None:
    """From now on, have Ctrl-C end the process at once."""
    signal.signal(signal.SIGINT, lambda *_: end_at_once(EXIT_CODE))


@contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in the block, which then ends what it has opened."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
