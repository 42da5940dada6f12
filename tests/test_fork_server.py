"""Servers that begin as copies of a process that has imported everything are processes like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

import psutil
import pytest

import swarmkit
from swarmkit.local import fork_server
from swarmkit.local.fork_server import ForkedProcess, ForkServer
from swarmkit.local.server_process import ServerProcess, ServerStartError

from .waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no fork servers")

SERVE = ("serve", "tiny-chat", "--blocks", "0:1", "--json", "--until-stdin-closes")
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server(kept_fork_server: None) -> Iterator[ForkServer]:
    with fork_server.shared() as found:
        assert found is not None
        yield found


@pytest.fixture
def log() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


def run(server: ForkServer, log: IO[bytes], *arguments: str, **variables: str) -> ForkedProcess:
    return server.spawn(arguments, {**os.environ, **variables}, log)


def said(process: ForkedProcess) -> str:
    assert process.stdout is not None
    return process.stdout.read().decode()


def written(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_copy_is_the_command_that_was_asked_for(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, "--version")
    assert said(process).strip().endswith(swarmkit.__version__)


def test_how_it_ended_is_told(server: ForkServer, log: IO[bytes]) -> None:
    assert run(server, log, "--version").wait(PATIENCE_S) == 0


def test_what_went_wrong_is_told_as_well(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, "serve", "tiny-chat", "--blocks", "7:3")
    assert process.wait(PATIENCE_S) != 0
    assert "7:3" in written(log)


def test_a_signal_ends_it(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, *SERVE)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL


def test_it_leads_a_session_of_its_own(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, *SERVE)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    assert os.getsid(process.pid) == process.pid
    process.send_signal(signal.SIGKILL)


def test_it_ends_when_its_owner_lets_go_of_its_input(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, *SERVE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0


def test_waiting_has_an_end(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, *SERVE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGKILL)


def test_it_has_the_environment_that_it_was_given(server: ForkServer, log: IO[bytes]) -> None:
    process = run(server, log, *SERVE, SWARMKIT_SERVER_MAX_SESSIONS="many")
    assert process.wait(PATIENCE_S) != 0
    assert "max_sessions" in written(log).lower()


def test_what_libraries_read_when_they_are_imported_must_be_the_same(server: ForkServer) -> None:
    assert server.fits({**os.environ, "SWARMKIT_SERVER_MAX_SESSIONS": "3", "OMP_NUM_THREADS": "2"})
    assert not server.fits({**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"})


def test_an_owner_that_has_asked_for_huge_pages_since_then_gets_copies_too(server: ForkServer) -> None:
    assert server.fits({**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    assert not server.fits({**os.environ, "THP_MEM_ALLOC_ENABLE": "0"})


def test_those_who_need_one_at_a_time_share_it(server: ForkServer) -> None:
    with fork_server.shared() as other:
        assert other is server


@pytest.mark.slow
def test_without_it_servers_start_anew() -> None:
    dead = ForkServer()
    dead.close()
    process = ServerProcess("tiny-chat", [], (0, 1), fork_server=dead)
    process.start(PATIENCE_S)
    process.stop(0.0)
    assert process.exit_code == 0


def test_the_last_words_of_a_copy_are_kept(server: ForkServer) -> None:
    process = ServerProcess("tiny-chat", [], (3, 99), fork_server=server)
    with pytest.raises(ServerStartError, match="99"):
        process.start(PATIENCE_S)


OWNER = """
import os, psutil, sys, time
from swarmkit.local.fork_server import ForkServer
server = ForkServer()
process = server.spawn(["serve", "tiny-chat", "--blocks", "0:1", "--json", "--until-stdin-closes"],
                       os.environ, open(os.devnull, "wb"))
process.stdout.readline()  # it has a p2p daemon
daemon, = psutil.Process(process.pid).children()
print(server._process.pid, process.pid, daemon.pid, flush=True)
time.sleep(600)
"""


def test_all_end_with_an_owner_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        owner.kill()
    assert len(pids) == 3
    wait_until(lambda: all(map(gone, pids)), "all processes end")
