"""Why the p2p daemon could not start: one cause, found in what it wrote and what this machine allows.

`why_it_failed` is pure. `try_peers` looks at the initial peers from here, since the daemon says of them only
that it reached none.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from swarmkit.errors import DaemonStartError, StartCause

LOOK_AFTER_S = 2.0
"""A daemon that is not ready after so long is probably waiting for peers that do not answer."""
TRY_S = 2.0
"""For so long each initial peer is dialled when the cause is looked for."""
_FEWEST_FILES = 64
"""Open files without which the daemon has none left for connections, though it starts."""
_FORBIDDEN = (errno.EPERM, errno.EACCES)
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL)
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_REINSTALL = "Reinstall hivemind for this platform: pip install --force-reinstall hivemind"


@dataclass(frozen=True)
class Attempt:
    """What came of dialling an address: the error's number, 0 if it was reached, None if nothing came."""

    address: str
    error: int | None


async def try_peers(addresses: Sequence[str]) -> list[Attempt] | None:
    """Connect to each address by TCP; None if one of them is of a kind that cannot be tried here."""
    hosts = [_host_and_port(address) for address in addresses]
    found: list[Attempt] = []

    async def attempt(address: str, host: str, port: int) -> None:
        error: int | None = None
        with anyio.move_on_after(TRY_S):
            try:
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                error = 0
            except OSError as failure:
                error = failure.errno or errno.EHOSTUNREACH  # of a name that is not found
        found.append(Attempt(address, error))

    if not hosts or None in hosts:
        return None
    async with anyio.create_task_group() as tasks:
        for address, place in zip(addresses, hosts, strict=True):
            assert place is not None
            tasks.start_soon(attempt, address, *place)
    return found


def refuse_few_files(most_files: int | None) -> None:
    """Refuse to start a daemon that could open no connections.

    Args: most_files: how many files the daemon may have open; None = no limit.

    Raises:
        DaemonStartError: they are too few.
    """
    if most_files is not None and most_files < _FEWEST_FILES:
        raise _error("files", f"it may open only {most_files} files, and needs {_FEWEST_FILES} at least")


def most_files() -> int | None:
    """How many files a child of this process may open; it raises its own limit to the hard one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def why_not_run(binary: Path, error: OSError) -> DaemonStartError:
    """The cause where the operating system does not run the program."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _error("files", f"this process has no file descriptor left ({error.strerror})")
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return _error("limits", f"the system starts no more processes ({error.strerror})")
    if error.errno == errno.ENOSPC:
        return _error("limits", f"there is no room on the disk ({error.strerror})")
    return _error("program", f"{binary} cannot be run ({error.strerror})")


def why_it_failed(
    lines: Sequence[str],
    host_maddrs: Sequence[str],
    initial_peers: Sequence[str],
    attempts: Sequence[Attempt] | None,
    environment: Mapping[str, str] = os.environ,
) -> DaemonStartError:
    """The cause of a daemon's end or silence.

    Args:
        lines: what it wrote.
        attempts: what came of trying the initial peers; None if they were not tried.
    """
    text = "\n".join(lines)
    places = ", ".join(host_maddrs)
    if "too many open files" in text:
        return _error("files", "it has no file descriptor left", lines)
    if "failed to create new OS thread" in text or "pthread_create failed" in text:
        return _error("limits", "the system gives it no more threads", lines)
    if "failed to reserve" in text or "cannot allocate memory" in text or "out of memory" in text:
        return _error("limits", "the system gives it no more memory", lines)
    if "xec format error" in text or "error while loading shared libraries" in text:
        return _error("program", "its program is not for this system", lines)
    if "address already in use" in text:
        return _error("port", f"the port is in use by another program ({places})", lines)
    if "bind: permission denied" in text or "bind: operation not permitted" in text:
        return _error("forbidden", f"this user may not listen at {places}", lines)
    if "cannot assign requested address" in text:
        return _error("address", f"this machine does not have the address to listen at ({places})", lines)
    if initial_peers and ("bootstrap peers" in text or attempts is not None):
        return _of_peers(lines, initial_peers, attempts, environment)
    return _error("unknown", "it ended while starting", lines)


def _of_peers(
    lines: Sequence[str],
    initial_peers: Sequence[str],
    attempts: Sequence[Attempt] | None,
    environment: Mapping[str, str],
) -> DaemonStartError:
    names = ", ".join(initial_peers)
    errors = {attempt.error for attempt in attempts or ()}
    if 0 in errors:
        return _error("peers", f"something answers there, but not as these peers: {names}", lines)
    if errors & set(_FORBIDDEN):
        return _error("forbidden", f"this machine forbids connections to the initial peers: {names}", lines)
    proxies = [name for name in _PROXY_VARIABLES if environment.get(name)]
    if proxies and errors & {None, errno.ECONNREFUSED, *_NO_ROUTE}:
        return _error(
            "proxy",
            f"none of the initial peers could be reached: {names}. This machine uses a proxy ({proxies[0]}), "
            "and peers connect without one",
            lines,
        )
    if errors & set(_NO_ROUTE):
        return _error("network", f"this machine has no way to the initial peers: {names}", lines)
    if None in errors:
        return _error("firewall", f"none of the initial peers could be reached: {names}", lines)
    return _error("peers", f"none of the initial peers could be reached: {names}", lines)


_ADVICE: Mapping[StartCause, str] = {
    "port": "Choose another port, or 0 for any that is free.",
    "address": "Listen at 0.0.0.0 for all of its addresses, and say by --announce (announce_maddrs) what "
    "others shall see.",
    "forbidden": "Choose a port above 1023 to listen at; allow TCP connections to other peers in the "
    "firewall of this machine, or in the settings of its container.",
    "firewall": "Nothing comes back from there. Check that one of them is running and that its address is "
    "right, and allow outgoing TCP to it in the firewalls between.",
    "proxy": "Have outgoing TCP to these addresses allowed without the proxy.",
    "network": "Check this machine's network, and the addresses.",
    "peers": "Check that one of them is running, that its address and peer id are right, and that no "
    "firewall is between.",
    "files": "Raise the limit of open files: ulimit -n 4096 (in a container: --ulimit nofile=4096).",
    "limits": "Raise the limits of memory (ulimit -v), processes (ulimit -u) or disk of this process or its "
    "container.",
    "program": _REINSTALL + ".",
    "busy": "The machine may be very busy; try again with a longer startup_timeout.",
    "unknown": "Check the addresses and what it wrote.",
}


def _error(cause: StartCause, found: str, lines: Sequence[str] = ()) -> DaemonStartError:
    quoted = "\nThe daemon's last lines:\n  " + "\n  ".join(lines) if lines else ""
    return DaemonStartError(f"the p2p daemon could not start: {found}. {_ADVICE[cause]}{quoted}", cause)


def not_ready(timeout_s: float, lines: Sequence[str]) -> DaemonStartError:
    """The cause where a daemon has said nothing for as long as it may take."""
    return _error("busy", f"it was not ready after {timeout_s:g} s", lines)


def missing(what: str) -> DaemonStartError:
    """The cause where there is no program."""
    return _error("program", what)


def _host_and_port(address: str) -> tuple[str, int] | None:
    """The place of a multiaddress that is dialled over TCP without a relay."""
    parts = address.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6") or parts[3] != "tcp":
        return None
    if "p2p-circuit" in parts or not parts[4].isdecimal():
        return None
    return parts[2], int(parts[4])
