"""The libp2p daemon as a child process that never outlives its owner and leaves no files behind.

hivemind ships the daemon (a Go program) and can start it, but what it starts has no owner: when the Python
process is killed, the daemon and its sockets stay. Here the daemon lives in a private folder and

* on Linux dies with its Python process, even if that is killed with SIGKILL (`PR_SET_PDEATHSIG`);
* elsewhere ends by its own idle timeout once no process is connected to it;
* folders of owners that were killed are swept by the next start.

**The parent, to Linux, is the thread that started the child.** Start a daemon from a thread that lives as
long as the daemon shall: the event loop's thread, which owns everything else of a transport, too.

Nothing here imports hivemind: that takes seconds and has side effects.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import anyio

from swarmkit.errors import DaemonStartError
from swarmkit.net.hivemind.startup import (
    LOOK_AFTER_S,
    missing,
    most_files,
    not_ready,
    refuse_few_files,
    try_peers,
    why_it_failed,
    why_not_run,
)
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

_STARTS = 3
_START_PAUSE_S = 1.5
_FOLDER_PREFIX = "swarmkit-p2p-"
_LOCK_NAME = "lock"
_LONGEST_FOLDER = 80  # a Unix socket's path may have 104 bytes (macOS) and stands inside the folder
_SWEEP_AFTER_S = 60.0  # a younger folder without a lock may be one that is being made
_KEPT_LINES = 20
_FIRST_LINES = 3
_FIRST = asyncio.FIRST_COMPLETED
_LONGEST_LINE = 2000
_STOP_GRACE_S = 3.0
_IDLE_TIMEOUT_S = 30

# Started in place of the daemon, becomes the daemon. `preexec_fn` would do the same between fork and exec,
# where a process with threads may deadlock. The check catches a parent that died before prctl was called.
_SHIM = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("its owner is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

Reachability = Literal["auto", "private", "public"]
"""Whether a peer can be reached from outside: as other peers find it, or as its owner says."""


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """How the daemon meets the network; see `HivemindTransport.create` for the meaning."""

    host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: Sequence[str] = ()
    initial_peers: Sequence[str] = ()
    listen: bool = True
    serve_routing: bool = True
    nat: bool = False
    use_relay: bool = True
    use_auto_relay: bool = False
    reachability: Reachability = "auto"


class P2PDaemon:
    """A running daemon. Made by `start`, ended by `stop`."""

    def __init__(self, process: asyncio.subprocess.Process, folder: _Folder) -> None:
        self._process = process
        self._folder = folder
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._first_lines: list[str] = []
        """Those that the last ones have pushed out: the Go runtime says first why it ends, then where."""
        self._ready = asyncio.Event()
        self._output = asyncio.create_task(self._read_output(), name="swarmkit-p2pd-output")

    @classmethod
    async def start(
        cls, identity: Identity, options: DaemonOptions | None = None, *, startup_timeout: float = 30.0
    ) -> P2PDaemon:
        """Start a daemon that speaks for `identity`, and wait until it is ready.

        Raises:
            DaemonStartError: it could not be started; the message names the cause and says what to do.
        """
        options = options or DaemonOptions()
        refuse_few_files(most_files())
        binary = find_binary()
        try:
            folder = _Folder()
        except OSError as error:
            raise why_not_run(binary, error) from error
        try:
            key_file = folder.path / "identity"
            _write_secret(key_file, identity.to_bytes())
            arguments = _arguments(binary, folder, key_file, options)
            try:
                process = await asyncio.create_subprocess_exec(
                    *_with_shim(arguments),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    # A Ctrl-C in the terminal is meant for the program, which still needs the daemon to
                    # announce that it leaves.
                    start_new_session=True,
                    env=_environment(options),
                )
            except OSError as error:
                raise why_not_run(binary, error) from error
        except BaseException:
            folder.remove()
            raise
        daemon = cls(process, folder)
        try:
            await daemon._wait_until_ready(startup_timeout, options)
            key_file.unlink()  # the daemon has read it: no need for a secret to lie on the disk
        except BaseException:
            await daemon.stop(grace=0.0)
            raise
        return daemon

    @classmethod
    async def start_to_join(
        cls, identity: Identity, options: DaemonOptions, *, startup_timeout: float = 30.0
    ) -> P2PDaemon:
        """Do the same, up to `_STARTS` times while no initial peer is there: theirs may be starting again."""
        for _ in range(_STARTS - 1):
            try:
                return await cls.start(identity, options, startup_timeout=startup_timeout)
            except DaemonStartError as error:
                if error.cause != "peers":
                    raise
                logger.debug("trying the initial peers again: %s", error)
            await anyio.sleep(_START_PAUSE_S)
        return await cls.start(identity, options, startup_timeout=startup_timeout)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._process.pid

    @property
    def folder(self) -> Path:
        """The private folder, which holds the sockets and is removed by `stop`."""
        return self._folder.path

    @property
    def control_socket(self) -> Path:
        """Where the daemon takes commands."""
        return self.folder / "control.sock"

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.returncode is None

    @property
    def last_lines(self) -> list[str]:
        """The last lines that the daemon wrote."""
        return list(self._lines)

    def kill(self) -> None:
        """End the process abruptly, as a crash or a power cut would. `stop` is still due."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace: float = _STOP_GRACE_S) -> None:
        """End the process, wait for it and remove the folder. May be called twice."""
        stopping = asyncio.ensure_future(self._stop(grace))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            self.kill()  # the caller has no time; the process must be reaped all the same
            await stopping
            raise

    async def _stop(self, grace: float) -> None:
        if self.is_running and grace > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with anyio.move_on_after(grace):
                await self._process.wait()
        if self.is_running:
            self.kill()
        await self._process.wait()
        self._output.cancel()
        await asyncio.wait([self._output])
        self._folder.remove()

    async def _wait_until_ready(self, timeout: float, options: DaemonOptions) -> None:
        ready = asyncio.create_task(self._ready.wait())
        try:
            for patience_s in (min(LOOK_AFTER_S, timeout), max(0.0, timeout - LOOK_AFTER_S)):
                await asyncio.wait([ready, self._output], timeout=patience_s, return_when=_FIRST)
                if self._ready.is_set():
                    return
                attempts = await try_peers(options.initial_peers)
                nobody = attempts is not None and all(each.error != 0 for each in attempts)
                if not self._ready.is_set() and (self._output.done() or nobody):
                    lines = [*self._first_lines, *self.last_lines]
                    raise why_it_failed(lines, options.host_maddrs, options.initial_peers, attempts)
        finally:
            ready.cancel()
        if not self._ready.is_set():
            raise not_ready(timeout, self.last_lines)

    async def _read_output(self) -> None:
        """Read until the daemon ends, so that it never blocks on a full pipe; keep the last lines."""
        assert self._process.stdout is not None
        rest = ""
        while chunk := await self._process.stdout.read(65536):
            *lines, rest = (rest + chunk.decode(errors="replace")).split("\n")
            rest = rest[:_LONGEST_LINE]
            for line in lines:
                self._take_line(line[:_LONGEST_LINE])
        if rest:
            self._take_line(rest)

    def _take_line(self, line: str) -> None:
        if len(self._lines) == _KEPT_LINES and len(self._first_lines) < _FIRST_LINES:
            self._first_lines.append(self._lines[0])
        self._lines.append(line)
        logger.debug("p2pd[%d]: %s", self.pid, line)
        if line.startswith("Peer ID:"):
            self._ready.set()


def _environment(options: DaemonOptions) -> dict[str, str]:
    # A step's way through the daemon is a chain of wake-ups, not of work: with one processor to itself the
    # daemon hands over less, which saved about a fifth of a hop where it was measured.
    defaults = {"GOLOG_LOG_LEVEL": "error", "GOMAXPROCS": "1"}
    if options.announce_maddrs:
        # Else it dials from the port that it listens at, and the peer that is dialled sees, keeps and tells
        # others the very address that shall not be used.
        defaults["LIBP2P_TCP_REUSEPORT"] = "false"
    return defaults | dict(os.environ)


def find_binary() -> Path:
    """The daemon's program.

    Raises:
        DaemonStartError: hivemind or its daemon is not installed.
    """
    spec = importlib.util.find_spec("hivemind")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / "hivemind_cli" / "p2pd"
        if os.access(path, os.X_OK):
            return path
        raise missing(f"{path} is missing or not executable")
    raise missing("hivemind, which carries it, is not installed (pip install hivemind)")


def sweep() -> None:
    """Remove folders whose owner was killed before it could."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for path in Path(base).glob(_FOLDER_PREFIX + "*"):
            with contextlib.suppress(OSError):
                _sweep_one(path)


def _sweep_one(path: Path) -> None:
    status = path.lstat()
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
        return
    try:
        lock = (path / _LOCK_NAME).open("rb")
    except FileNotFoundError:
        if time.time() - status.st_mtime > _SWEEP_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)
        return
    with lock:
        # held by a living owner: then this raises. Process ids would not do: they are used again, and
        # containers that share a temp folder do not share them
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)


class _Folder:
    """A private folder, locked while its owner lives."""

    def __init__(self) -> None:
        sweep()
        base = tempfile.gettempdir()
        self.path = Path(
            tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=base if len(base) < _LONGEST_FOLDER else "/tmp")
        )
        # under a name that `sweep` does not look for until it is locked
        fresh = self.path / "lock.new"
        self._lock: IO[bytes] | None = fresh.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK_NAME)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _write_secret(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _arguments(binary: Path, folder: _Folder, key_file: Path, options: DaemonOptions) -> list[str]:
    flags: dict[str, object] = {
        "listen": f"/unix{folder.path}/control.sock",
        "id": key_file,
        "b": int(bool(options.initial_peers)),
        "dhtServer" if options.serve_routing else "dhtClient": 1,
        "autonat": int(options.nat),
        "natPortMap": int(options.nat),
        "relay": int(options.use_relay),
        "autoRelay": int(options.use_auto_relay),
        "connManager": 1,
        "tls": 1,
        "idleTimeout": f"{_IDLE_TIMEOUT_S}s",
        "persistentConnMaxMsgSize": MAX_FRAME_BYTES,
    }
    if options.reachability == "private":
        flags["forceReachabilityPrivate"] = 1
    elif options.reachability == "public":
        flags["forceReachabilityPublic"] = 1
    if options.use_auto_relay and options.initial_peers:
        flags["trustedRelays"] = ",".join(options.initial_peers)
        flags["relayDiscovery"] = 0
    if options.initial_peers:
        flags["bootstrapPeers"] = ",".join(options.initial_peers)
    if options.listen:
        flags["hostAddrs"] = ",".join(options.host_maddrs)
    else:
        flags["noListenAddrs"] = 1
    if options.announce_maddrs:
        flags["announceAddrs"] = ",".join(options.announce_maddrs)
    return [str(binary), *(f"-{name}={value}" for name, value in flags.items())]


def _with_shim(arguments: list[str]) -> list[str]:
    # in a frozen application `sys.executable` is the application and would not run the shim
    if sys.platform != "linux" or getattr(sys, "frozen", False) or not sys.executable:
        return arguments
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *arguments]
