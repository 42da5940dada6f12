"""A process that has imported all that a server needs, and forks one server after the other.

torch and transformers take seconds to import. Where one machine starts several servers, this is done once,
and each server begins as a copy of the process that did it::

    owner ──(arguments, environment, 3 files)──> fork server ──fork──> server: a session of its own
      │ <──────────────(pid)──────────────────────┘   └──(pid, exit code)──> owner

The copy behaves like `python -m swarmkit.cli`, with a pid, signals and an end of its own. The fork server
computes nothing, so that no library has threads yet when it forks. It ends with its owner, whose end of the
socket closes then.

`multiprocessing`'s fork server cannot replace this one, for three reasons. It runs the owner's main module
again in every child, so that `LocalSwarm(processes=True)` in a plain script without a `__main__` guard would
fail. It has no public way to end: it and its resource tracker stay until the owner exits, while nothing may
be left when a swarm is closed. And what it preloads is set for the whole process, which belongs to the user's
program.

It works on Linux only: elsewhere libraries do not survive a fork, or there is no fork. There, and where the
environment has changed since the fork server read it, servers are started the usual way.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from swarmkit.huge_pages import ask_for_huge_pages

_PROGRAM = "swarmkit.cli"
_PRELOADED = (
    "swarmkit.cli.serve",
    "swarmkit.node.server",
    "swarmkit.net.hivemind.transport",
    "hivemind.p2p",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
)
_NOT_AT_IMPORT = ("SWARMKIT_SERVER_", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTEST_")
"""How environment variables begin that no library reads when it is imported."""
_MOST_BYTES = 2**20
_FILES = 3


class ForkedProcess:
    """As much of `subprocess.Popen` as a server's owner uses."""

    def __init__(self, fork_server: ForkServer, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self.stdout: IO[bytes] | None = stdout
        self._fork_server = fork_server

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """How it ended, as `Popen.poll` has it; None while it runs."""
        return self._fork_server.exit_code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Raises: subprocess.TimeoutExpired: it did not end in time."""
        code = self._fork_server.wait(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired("swarmkit", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """The owner's side. Any thread may use it."""

    def __init__(self, program: str = _PROGRAM) -> None:
        """Args: program: the module that the copies run as their main program."""
        self._environment = _at_import(os.environ)
        own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "swarmkit.local.fork_server", str(its.fileno()), program],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries have things to say when they are imported
                env=dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
                start_new_session=True,
            )
        self._socket = own
        self._changed = threading.Condition()
        self._pids: list[int] = []
        self._exits: dict[int, int] = {}
        self._gone = False
        self._spawning = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="swarmkit-fork-server", daemon=True)
        self._reader.start()

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment can be a copy of it."""
        return not self._gone and _at_import(environment) == self._environment

    def spawn(
        self, arguments: Sequence[str], environment: Mapping[str, str], stderr: IO[bytes]
    ) -> ForkedProcess:
        """Start `<program> <arguments>` in a session of its own; its standard input and output are pipes.

        Raises: OSError: the fork server has ended.
        """
        read_in, write_in = os.pipe()
        read_out, write_out = os.pipe()
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        try:
            with self._spawning:
                socket.send_fds(self._socket, [request], [read_in, write_out, stderr.fileno()])
                with self._changed:
                    self._changed.wait_for(lambda: self._pids or self._gone)
                    if not self._pids:
                        raise OSError("the fork server has ended")
                    pid = self._pids.pop()
        except BaseException:
            os.close(write_in)
            os.close(read_out)
            raise
        finally:
            os.close(read_in)
            os.close(write_out)
        return ForkedProcess(self, pid, os.fdopen(write_in, "wb", 0), os.fdopen(read_out, "rb"))

    def exit_code(self, pid: int) -> int | None:
        with self._changed:
            return self._code(pid)

    def wait(self, pid: int, timeout: float | None) -> int | None:
        """The exit code; None if it still runs after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._code(pid) is not None, timeout)
            return self._code(pid)

    def close(self) -> None:
        """End the fork server; what it has started goes on. May be called twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.kill()  # it may still be importing, and has nothing to put in order
        self._process.wait()
        self._reader.join()
        self._socket.close()

    def _code(self, pid: int) -> int | None:
        if pid in self._exits:
            return self._exits[pid]
        # Without the fork server nothing tells how its children end.
        return -signal.SIGKILL if self._gone and not _exists(pid) else None

    def _read(self) -> None:
        while data := _received(self._socket):
            word, *values = json.loads(data)
            with self._changed:
                if word == "started":
                    self._pids.append(values[0])
                else:
                    self._exits[values[0]] = values[1]
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()


_lock = threading.Lock()
_shared: list[ForkServer] = []
_leases = 0


@contextlib.contextmanager
def shared() -> Iterator[ForkServer | None]:
    """The process's fork server; there is one as long as a caller is in such a block; None where it does not
    work.
    """
    global _leases
    if sys.platform != "linux":
        yield None
        return
    with _lock:
        if not _shared:
            _shared.append(ForkServer())
        _leases += 1
        found = _shared[0]
    try:
        yield found
    finally:
        with _lock:
            _leases -= 1
            if not _leases:
                _shared.pop().close()


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    read = {name: value for name, value in environment.items() if not name.startswith(_NOT_AT_IMPORT)}
    ask_for_huge_pages(read)  # the fork server does, whether its owner has done so or not
    return read


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_MOST_BYTES)
    except OSError:
        return b""


# ---------------------------------------------------------------------- the fork server's own process


def _main(connection: socket.socket, program: str) -> None:
    ask_for_huge_pages()
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # lest a collection in a server copy the pages that all of them share
    tells, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _run(connection, tells, program)


def _run(connection: socket.socket, tells: int, program: str) -> None:
    incoming = connection.fileno()
    while True:
        ready, _, _ = select.select([incoming, tells], [], [])
        if tells in ready:
            os.read(tells, 4096)
            for pid, code in _ended():
                _tell(connection, "ended", pid, code)
        if incoming in ready:
            data, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, _FILES)
            if not data:
                return
            pid = os.fork()
            if not pid:
                connection.close()
                _become(program, json.loads(data), files)
            for file in files:
                os.close(file)
            _tell(connection, "started", pid)


def _ended() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


def _tell(connection: socket.socket, *word: Any) -> None:
    with contextlib.suppress(OSError):
        connection.send(json.dumps(word).encode())


def _become(program: str, request: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """In the copy: be the program that was asked for."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        sys.argv = [program, *request["arguments"]]
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(" ".join(("swarmkit", *request["arguments"][:1])))
        code = _run_program(program)
    finally:
        os._exit(code)


def _run_program(program: str) -> int:
    code = 0
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter itself would end
        traceback.print_exc()
        code = 1
    # What the interpreter does at its end before it frees its objects. `multiprocessing` ends its children
    # with the same call.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    os._exit(0)  # its owner has gone, and there is nothing to put in order
