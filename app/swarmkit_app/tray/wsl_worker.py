"""The worker in WSL2, for a tray on Windows. hivemind, which the node needs, has no native form there.

`python -m swarmkit_app.tray.wsl_worker` is what the tray starts in place of a worker. It starts the worker
in WSL2, which listens on a loopback that Windows shares, and puts its token where the tray looks for it.
Its logic is tested on Linux. It has not been tried on Windows.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec

from swarmkit.worker.control.handle import Handle
from swarmkit.worker.places import WorkerPlaces

WSL = ("wsl.exe", "-e", "sh", "-lc")
_WORKER = 'exec "$HOME/.local/bin/swarmkit" worker run --loopback'
_HANDLE = '"$HOME/.local/bin/swarmkit" worker handle'
_ASK_EVERY_S = 0.5
_STARTS_WITHIN_S = 120.0
"""Also where WSL2 itself has to start first."""


def run(places: WorkerPlaces | None = None, wsl: Sequence[str] = WSL) -> int:
    """Run the worker until it ends; returns its exit code.

    Args: wsl: runs a line of shell in WSL2.
    """
    places = places or WorkerPlaces.of_this_person()
    places.make()
    worker = subprocess.Popen([*wsl, _WORKER], stdin=subprocess.DEVNULL)
    ended = threading.Event()
    telling = threading.Thread(target=_tell, args=(places, wsl, ended), daemon=True)
    telling.start()
    try:
        return worker.wait()
    finally:
        ended.set()
        telling.join(_STARTS_WITHIN_S)
        places.handle.unlink(missing_ok=True)
        if worker.poll() is None:
            worker.terminate()
            worker.wait(60)


def _tell(places: WorkerPlaces, wsl: Sequence[str], ended: threading.Event) -> None:
    """Ask for the worker's handle until it has one, and write it where programs on Windows look."""
    for _ in range(round(_STARTS_WITHIN_S / _ASK_EVERY_S)):
        if ended.wait(_ASK_EVERY_S):
            return
        asked = subprocess.run([*wsl, _HANDLE], capture_output=True, stdin=subprocess.DEVNULL, check=False)
        with contextlib.suppress(msgspec.DecodeError):
            msgspec.json.decode(asked.stdout, type=Handle).write(places.handle)
            return


if __name__ == "__main__":
    sys.exit(run())
