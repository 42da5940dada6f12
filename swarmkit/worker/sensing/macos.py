"""A Mac. Written from the documentation, and not tested on one yet."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import subprocess

from swarmkit.worker.sensing.probes import LIMIT_S, UnknownError

_HID_STATE = 1
_ANY_INPUT = 0xFFFFFFFF


def idle_s() -> float:
    """Seconds since the last input (`CGEventSourceSecondsSinceLastEventType`)."""
    library = ctypes.util.find_library("ApplicationServices")
    if library is None:
        raise UnknownError("the system's library for events was not found")
    ask = ctypes.cdll.LoadLibrary(library).CGEventSourceSecondsSinceLastEventType
    ask.restype, ask.argtypes = ctypes.c_double, [ctypes.c_int32, ctypes.c_uint32]
    return float(ask(_HID_STATE, _ANY_INPUT))


def locked() -> bool:
    """Whether the screen is locked."""
    found = _output("ioreg", "-n", "Root", "-d1")
    return re.search(r'"CGSSessionScreenIsLocked"\s*=\s*Yes', found) is not None


def full_screen() -> str:
    """Not known: a program that may look at others' windows needs the person's leave for screen recording."""
    raise UnknownError("macOS does not tell which program fills the screen; list your games by name")


def film() -> str:
    """The first program that keeps the display awake, as players do."""
    for line in _output("pmset", "-g", "assertions").splitlines():
        found = re.search(r"pid \d+\((.+?)\).*(?:PreventUserIdleDisplaySleep|NoDisplaySleepAssertion)", line)
        if found:
            return found[1]
    return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UnknownError(f"{command[0]} gave no answer: {error}") from error
