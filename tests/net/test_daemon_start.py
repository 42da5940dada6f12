"""A p2p daemon that cannot start says why by one word: each cause is staged as the real thing.

A child process stages what would trouble that of the test: limits, another network, fewer rights.
"""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarmkit.errors import DaemonStartError
from swarmkit.net.hivemind import daemon as p2p_daemon
from swarmkit.net.hivemind import startup
from swarmkit.net.hivemind.daemon import DaemonOptions, P2PDaemon
from swarmkit.net.hivemind.startup import Attempt, why_it_failed
from swarmkit.net.transport.identity import Identity

from ..namespaces import Lan
from ..waiting import eventually

pytestmark = pytest.mark.timeout(60)

STRANGER = Identity(bytes(range(32))).peer_id

START = """
import asyncio, json, sys
from swarmkit.errors import DaemonStartError
from swarmkit.net.hivemind.daemon import DaemonOptions, P2PDaemon
from swarmkit.net.transport.identity import Identity

async def main(limit, most, host, *peers):
    if limit:
        import resource
        resource.setrlimit(getattr(resource, limit), (int(most), int(most)))
    try:
        daemon = await P2PDaemon.start(Identity(), DaemonOptions(host_maddrs=(host,), initial_peers=peers))
        await daemon.stop()
        print(json.dumps({"cause": "none", "message": ""}))
    except DaemonStartError as error:
        print(json.dumps({"cause": error.cause, "message": str(error)}))

asyncio.run(main(*sys.argv[1:]))
"""
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def start_in_child(
    *peers: str, host: str = LOOPBACK, limit: str = "", most: int = 0, within: Sequence[str] = ()
) -> dict[str, str]:
    """What comes of starting a daemon in a process that `within` sets up, with a limit on its resources."""
    command = [*within, sys.executable, "-c", START, limit, str(most), host, *peers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


async def start_here(*peers: str, host: str = LOOPBACK) -> DaemonStartError:
    """The error of a daemon that is started in this process."""
    with pytest.raises(DaemonStartError) as caught:
        await P2PDaemon.start(Identity(), DaemonOptions(host_maddrs=(host,), initial_peers=peers))
    return caught.value


async def test_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = await start_here(host=f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")
    assert error.cause == "port"


async def test_this_machine_does_not_have_the_address() -> None:
    assert (await start_here(host="/ip4/192.0.2.7/tcp/0")).cause == "address"


async def test_nobody_listens_at_the_initial_peer() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        error = await start_here(f"/ip4/127.0.0.1/tcp/{held.getsockname()[1]}/p2p/{STRANGER}")
    assert error.cause == "peers"


async def test_another_peer_is_at_the_address() -> None:
    daemon = await P2PDaemon.start(Identity())
    try:
        await eventually(lambda: any(line.startswith("/ip4/") for line in daemon.last_lines), "its address")
        address = next(line for line in daemon.last_lines if line.startswith("/ip4/"))
        error = await start_here(f"{address}/p2p/{STRANGER}")
    finally:
        await daemon.stop()
    assert (error.cause, "not as these peers" in str(error)) == ("peers", True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize(
    ("limit", "most", "cause"), [("RLIMIT_NOFILE", 30, "files"), ("RLIMIT_AS", 400 * 2**20, "limits")]
)
def test_a_limit_of_the_process_is_reached(limit: str, most: int, cause: str) -> None:
    assert start_in_child(limit=limit, most=most)["cause"] == cause


@pytest.mark.parametrize("broken", ["missing", "not executable", "of another system"])
async def test_the_program_cannot_be_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hivemind" / "hivemind_cli"
    folder.mkdir(parents=True)
    (tmp_path / "hivemind" / "__init__.py").touch()
    program = folder / "p2pd"
    if broken != "missing":
        with p2p_daemon.find_binary().open("rb") as file:
            head = bytearray(file.read(4096))
        head[18:20] = b"\xff\xff"  # the machine that an ELF file is for
        program.write_bytes(head)
        program.chmod(0o755 if broken == "of another system" else 0o644)
    spec = p2p_daemon.importlib.util.spec_from_file_location(  # type: ignore[attr-defined]
        "hivemind",
        tmp_path / "hivemind" / "__init__.py",
        submodule_search_locations=[str(tmp_path / "hivemind")],
    )
    monkeypatch.setattr(p2p_daemon.importlib.util, "find_spec", lambda _: spec)  # type: ignore[attr-defined]
    error = await start_here()
    assert (error.cause, "pip install --force-reinstall hivemind" in str(error)) == ("program", True)


def test_this_user_may_not_listen_at_the_port() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("to give up rights takes the `setpriv` command")
    unprivileged = ("setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-all")
    with Lan() as lan:
        inside = lan.machine().inside
        found = start_in_child(host="/ip4/0.0.0.0/tcp/80", within=(*inside, *unprivileged))
    assert found["cause"] == "forbidden"


@pytest.mark.parametrize(
    ("route", "cause"), [("prohibit", "forbidden"), ("unreachable", "network"), ("silent", "firewall")]
)
def test_the_network_lets_nothing_through(route: str, cause: str) -> None:
    with Lan() as lan:
        machine = lan.machine()
        target = "10.91.0.1"
        if route == "silent":  # a gateway that forwards to nobody, and says nothing
            machine.run_ip("neigh", "add", "10.90.0.99", "lladdr", "02:00:00:00:00:99", "dev", "eth0")
            machine.run_ip("route", "add", f"{target}/32", "via", "10.90.0.99")
        else:
            machine.run_ip("route", "add", route, f"{target}/32")
        found = start_in_child(f"/ip4/{target}/tcp/31337/p2p/{STRANGER}", within=machine.inside)
    assert found["cause"] == cause


def test_the_cause_is_named_within_five_seconds() -> None:
    """A daemon that waits for peers is looked after once it has had its time; the look has a limit, too."""
    assert startup.LOOK_AFTER_S + startup.TRY_S < 5.0


@pytest.mark.parametrize("error", [None, errno.ECONNREFUSED, errno.ENETUNREACH])
def test_a_machine_behind_a_proxy_is_told_that_peers_connect_without_one(error: int | None) -> None:
    address = f"/ip4/198.51.100.1/tcp/31337/p2p/{STRANGER}"
    failed = why_it_failed(
        ["failed to connect to bootstrap peers"],
        [LOOPBACK],
        [address],
        [Attempt(address, error)],
        {"HTTPS_PROXY": "http://proxy.example:3128"},
    )
    assert (failed.cause, "HTTPS_PROXY" in str(failed)) == ("proxy", True)


async def test_a_relayed_address_is_not_tried() -> None:
    assert (
        await startup.try_peers([f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}/p2p-circuit/p2p/{STRANGER}"]) is None
    )


async def test_trying_peers_leaves_no_task() -> None:
    await startup.try_peers(["/ip4/127.0.0.1/tcp/9"])
    assert asyncio.all_tasks() == {asyncio.current_task()}
