"""Compiles one decode step: `python -m swarmkit.models.compiled.build`, started by a server.

A process of its own, because a compiler takes memory and processor time, and may fail in ways of its own. It
leads a session of its own, which has the lowest priority. It reads what to do as one line of JSON, and ends
when whoever started it does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TextIO

from swarmkit.models.compiled.kinds import BlockKind, NotCompiledError
from swarmkit.models.foreign_errors import reason_of
from swarmkit.session_nice import set_session_nice

ANSWER = "answer.json"
"""Name of the file that says how it went, in the folder of the package."""
_NICENESS = 19


def main() -> None:
    """Compile what the first line of standard input asks for."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    set_session_nice(_NICENESS)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_owner, args=(sys.stdin,), daemon=True).start()
    package = Path(order["package"])
    logging.captureWarnings(True)
    try:
        from swarmkit.models.compiled.trace import compile_step

        kind, with_products = BlockKind.parse(order["kind"]), order["with_products"]
        compile_step(kind, order["rows"], order["length"], package, with_products)
        reason = ""
    except NotCompiledError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        # Some errors of other libraries are assertions without a word.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{reason_of(error)} (in {Path(frame.filename).name}, line {frame.lineno})"
    (package.parent / ANSWER).write_text(json.dumps({"reason": reason}))


def _end_with_owner(owner: TextIO) -> None:
    """When the owner's end of the pipe is closed, end, and with this the compiler that was started."""
    owner.read()
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
