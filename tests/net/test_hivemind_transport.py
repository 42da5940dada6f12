"""What only the libp2p body has: a daemon process, files, hivemind's habits, hostile bytes."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmkit.errors import PeerError, PeerUnreachableError, ProtocolError, TransportError, UsageError
from swarmkit.net.hivemind import daemon as p2p_daemon
from swarmkit.net.hivemind import framing
from swarmkit.net.hivemind import protocol as table_protocol
from swarmkit.net.hivemind.daemon import DaemonOptions, P2PDaemon
from swarmkit.net.hivemind.table import RecordGuard, sealed_record
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.peer_lists import PeerLists, TableLists
from swarmkit.net.transport.seam import MAX_FRAME_BYTES

from ..clocks import SetClock
from ..waiting import eventually
from .worlds import HivemindWorld, collector, echo, own_tasks

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


@pytest.fixture
async def world() -> AsyncIterator[HivemindWorld]:
    world = HivemindWorld()
    yield world
    await world.close()


@pytest.fixture
def temp_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temp folder of the test's own, with a short name: that of a socket may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


# the daemon's life


async def test_the_daemon_speaks_for_our_identity() -> None:
    identity = Identity()
    daemon = await P2PDaemon.start(identity)
    lines = daemon.last_lines
    await daemon.stop()
    assert f"Peer ID: {identity.peer_id}" in lines


async def test_closing_ends_the_daemon(world: HivemindWorld) -> None:
    peer: Any = await world.peer()
    await peer.close()
    assert not is_alive(peer.daemon_pid)


async def test_closing_leaves_no_files(world: HivemindWorld, temp_dir: Path) -> None:
    before = set(Path("/tmp").glob("hivemind-*"))
    one, two = await world.peer(), await world.peer()
    await one.listen("echo", echo)
    stream = await two.open(one.peer_id, "echo", one.addresses)
    await stream.send(b"x")
    await world.close()
    assert [*temp_dir.iterdir(), *(set(Path("/tmp").glob("hivemind-*")) - before)] == []


async def test_the_secret_key_is_gone_once_the_daemon_is_up() -> None:
    daemon = await P2PDaemon.start(Identity())
    names = {path.name for path in daemon.folder.iterdir()}
    await daemon.stop()
    assert "identity" not in names


async def test_the_private_folder_is_private() -> None:
    daemon = await P2PDaemon.start(Identity())
    mode = daemon.folder.stat().st_mode & 0o777
    await daemon.stop()
    assert mode == 0o700


async def test_stopping_twice_is_fine() -> None:
    daemon = await P2PDaemon.start(Identity())
    await daemon.stop()
    await daemon.stop()
    assert not daemon.is_running


async def test_a_killed_daemon_is_still_reaped_and_tidied_up() -> None:
    daemon = await P2PDaemon.start(Identity())
    daemon.kill()
    await daemon.stop()
    assert (is_alive(daemon.pid), daemon.folder.exists()) == (False, False)


async def test_cancelling_a_start_leaves_nothing(temp_dir: Path) -> None:
    starting = asyncio.create_task(P2PDaemon.start(Identity()))
    await asyncio.sleep(0.05)
    starting.cancel()
    await asyncio.wait([starting])
    assert list(temp_dir.iterdir()) == []


OWNER = """
import asyncio, sys
from swarmkit.net.transport.identity import Identity
from swarmkit.net.hivemind.daemon import P2PDaemon

async def main():
    daemon = await P2PDaemon.start(Identity())
    print(daemon.pid, daemon.folder, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the daemon ends by its idle timeout")
async def test_the_daemon_dies_with_its_python_process() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int((await asyncio.to_thread(owner.stdout.readline)).split()[0])
    assert is_alive(pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    await eventually(lambda: not is_alive(pid), "the daemon ends")


async def test_the_next_start_sweeps_a_killed_owners_folder() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path((await asyncio.to_thread(owner.stdout.readline)).split()[1])
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert folder.exists()
    p2p_daemon.sweep()
    assert not folder.exists()


async def test_a_sweep_spares_a_living_owners_folder(temp_dir: Path) -> None:
    folder = temp_dir / "swarmkit-p2p-alive"
    folder.mkdir()
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        p2p_daemon.sweep()
    assert folder.exists()


# starting troubles


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=rf"port is in use.*{port}"):
            await HivemindTransport.create(port=port)


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(TransportError, match="does not have the address"):
        await HivemindTransport.create(host="192.0.2.1")


async def test_initial_peers_that_do_not_answer_are_named() -> None:
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity().peer_id}"
    with pytest.raises(TransportError, match=address):
        await HivemindTransport.create(initial_peers=[address])


async def test_initial_peers_that_are_no_addresses_are_the_callers_mistake() -> None:
    with pytest.raises(UsageError, match="somewhere:31330"):
        await HivemindTransport.create(initial_peers=["somewhere:31330"])


async def test_a_slow_start_says_what_to_do() -> None:
    with pytest.raises(TransportError, match="longer startup_timeout"):
        await P2PDaemon.start(Identity(), startup_timeout=0.0)


async def test_a_missing_program_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TransportError, match="pip install hivemind"):
        await P2PDaemon.start(Identity())


async def test_a_failed_start_quotes_the_daemon() -> None:
    options = DaemonOptions(host_maddrs=("/ip4/192.0.2.1/tcp/0",))
    with pytest.raises(TransportError, match="failed to listen"):
        await P2PDaemon.start(Identity(), options)


async def test_a_failed_start_leaves_nothing(temp_dir: Path) -> None:
    before = own_tasks()
    with pytest.raises(TransportError):
        await HivemindTransport.create(host="192.0.2.1")
    assert (list(temp_dir.iterdir()), own_tasks() - before) == ([], set())


async def test_a_stream_is_opened_as_soon_as_a_daemon_that_died_was_started_again(
    world: HivemindWorld,
) -> None:
    server, peer = await world.peer(), await world.peer()
    await server.listen("echo", echo)
    os.kill(peer.daemon_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    stream = await peer.open(server.peer_id, "echo", server.addresses, timeout=30.0)
    await stream.send(b"again")
    assert await stream.receive() == b"again"


async def test_a_stream_that_waits_in_vain_for_a_daemon_says_so(
    world: HivemindWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*_: Any, **__: Any) -> P2PDaemon:
        raise TransportError("no daemon today")

    peer: Any = await world.peer()
    monkeypatch.setattr(P2PDaemon, "start", start)
    os.kill(peer.daemon_pid, signal.SIGKILL)
    with pytest.raises(PeerUnreachableError, match="daemon has ended"):
        await peer.open(Identity().peer_id, "echo", timeout=2.0)


async def test_a_stream_is_opened_although_its_daemon_is_replaced_meanwhile(world: HivemindWorld) -> None:
    server, peer = await world.peer(), await world.peer()
    await server.listen("echo", echo)
    replacing = asyncio.ensure_future(peer.replace_daemon())  # type: ignore[attr-defined]
    for _ in range(5):
        stream = await peer.open(server.peer_id, "echo", server.addresses, timeout=30.0)
        await stream.send(b"still")
        assert await stream.receive() == b"still"
    await replacing


# hivemind's habits


SIDE_EFFECTS = """
import logging, torch.multiprocessing as mp
before = mp.get_sharing_strategy(), logging.getLevelName(logging.WARNING), list(logging.getLogger().handlers)
from swarmkit.net.hivemind.table import load_hivemind
load_hivemind()
after = mp.get_sharing_strategy(), logging.getLevelName(logging.WARNING), list(logging.getLogger().handlers)
assert before == after, (before, after)
assert logging.getLogger("hivemind").handlers == []
"""


async def test_importing_hivemind_leaves_torch_and_logging_alone() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_importing_the_transport_does_not_import_hivemind() -> None:
    code = "import sys, swarmkit.net.hivemind.transport as _; assert 'hivemind' not in sys.modules"
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=False)
    assert done.returncode == 0


async def test_a_client_is_not_dialled_and_keeps_no_records(world: HivemindWorld) -> None:
    server, client = await world.peer(), await world.peer(client_mode=True)
    assert await client.store([("k", b"v")], time.time() + 60) == 1
    assert (client.addresses, await server.fetch(["k"])) == ((), {"k": {client.peer_id: b"v"}})


async def test_a_client_opens_streams(world: HivemindWorld) -> None:
    server, client = await world.peer(), await world.peer(client_mode=True)
    await server.listen("echo", echo)
    stream = await client.open(server.peer_id, "echo")
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"


async def test_a_peer_is_found_without_addresses(world: HivemindWorld) -> None:
    _, server, client = await world.peer(), await world.peer(), await world.peer()
    await server.listen("echo", echo)
    stream = await client.open(server.peer_id, "echo")
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"


# hostile bytes


@pytest.mark.parametrize("direct", [True, False])
async def test_a_frame_announced_above_the_limit_ends_the_stream(
    world: HivemindWorld, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = await world.peer(direct=direct), await world.peer()
    handler, streams = collector()
    await server.listen("talk", handler)
    hostile = await client.open(server.peer_id, "talk", server.addresses)
    victim = await streams.get()
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 2 * MAX_FRAME_BYTES)  # as the hostile peer has it
    sending = asyncio.ensure_future(hostile.send(bytes(MAX_FRAME_BYTES + 1)))
    with pytest.raises(ProtocolError, match="announced a frame"):
        await victim.receive()
    sending.cancel()
    await asyncio.wait([sending])


async def test_a_frame_that_breaks_off_is_not_delivered(world: HivemindWorld) -> None:
    server, client = await world.peer(), await world.peer()
    handler, streams = collector()
    await server.listen("talk", handler)
    hostile: Any = await client.open(server.peer_id, "talk", server.addresses)
    victim = await streams.get()
    sending = asyncio.ensure_future(hostile.send(bytes(MAX_FRAME_BYTES)))
    await asyncio.sleep(0)  # the first part of it leaves
    hostile.abort(TransportError("given up"))
    with pytest.raises(PeerUnreachableError):
        await victim.receive()
    with pytest.raises(TransportError):
        await sending


async def test_a_peer_that_does_not_answer_is_given_up(world: HivemindWorld) -> None:
    server, client = await world.peer(), await world.peer()
    os.kill(server.daemon_pid, signal.SIGSTOP)  # type: ignore[attr-defined]
    try:
        with pytest.raises(PeerError):
            await client.open(server.peer_id, "echo", server.addresses, timeout=0.5)
    finally:
        os.kill(server.daemon_pid, signal.SIGCONT)  # type: ignore[attr-defined]


async def dht_store(
    peer: Any, at: Any, key: str, value: Any, expires_at: float, subkey: Any, **options: Any
) -> Any:
    """Store by hivemind's own means at one peer, as somebody might who does not use swarmkit."""
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID
    from hivemind.utils import MSGPackSerializer

    packed = MSGPackSerializer.dumps(value)
    return await peer.table.node.protocol.call_store(
        PeerID.from_base58(at.peer_id), [DHTID.generate(key)], [packed], expires_at, [subkey], **options
    )


async def test_a_plain_value_cannot_hide_the_records_under_a_key(world: HivemindWorld) -> None:
    honest, hostile = await world.peer(), await world.peer()
    now = time.time()
    taken = await dht_store(hostile, honest, "k", b"plain", now + 1000, None)
    await honest.store([("k", b"v")], now + 60)
    assert (taken, await honest.fetch(["k"])) == ([False], {"k": {honest.peer_id: b"v"}})


async def test_a_cached_copy_cannot_hide_the_records_under_a_key(world: HivemindWorld) -> None:
    honest, hostile = await world.peer(), await world.peer()
    now = time.time()
    await honest.store([("k", b"v")], now + 60)
    sealed = sealed_record(hostile.identity, "k", b"mine", now + 1000)
    await dht_store(hostile, honest, "k", sealed, now + 1000, hostile.peer_id, in_cache=True)
    assert (await honest.fetch(["k"]))["k"][honest.peer_id] == b"v"


async def test_nobody_stores_under_anothers_name(world: HivemindWorld) -> None:
    honest, hostile = await world.peer(), await world.peer()
    now = time.time()
    sealed = sealed_record(hostile.identity, "k", b"forged", now + 60)
    assert await dht_store(hostile, honest, "k", sealed, now + 60, honest.peer_id) == [False]


async def test_nobody_prolongs_anothers_record(world: HivemindWorld) -> None:
    honest, hostile = await world.peer(), await world.peer()
    now = time.time()
    sealed = sealed_record(honest.identity, "k", b"v", now + 60)
    assert await dht_store(hostile, honest, "k", sealed, now + 1000, honest.peer_id) == [False]


async def test_of_more_records_than_a_peer_keeps_under_a_key_some_are_taken(
    world: HivemindWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage
    from hivemind.utils import MSGPackSerializer

    hostile: Any = await world.peer()
    honest = await world.peer()
    without_bounds, expires_at = DHTLocalStorage(), time.time() + 60
    for one in [Identity() for _ in range(20)]:
        value = MSGPackSerializer.dumps(sealed_record(one, "k", b"v", expires_at))
        without_bounds.store(DHTID.generate("k"), value, expires_at, subkey=one.peer_id)
    hostile.table.node.protocol.storage = without_bounds
    monkeypatch.setattr(table_protocol, "MAX_KEY_RECORDS", 5)
    assert len((await honest.fetch(["k"]))["k"]) == 5


class LookedAt:
    """A record that is good for a minute, and how often a guard has had it checked."""

    def __init__(self) -> None:
        from hivemind.dht.routing import DHTID
        from hivemind.utils import MSGPackSerializer

        self.checks = 0
        self.clock = SetClock()
        self.lists = TableLists("own")
        self.guard = RecordGuard(self._check, self.clock, lists=self.lists)
        self.signer = Identity()
        self.expires_at = self.clock.time() + 60
        self.key_id = DHTID.generate("k").to_bytes()
        self.value = MSGPackSerializer.dumps(sealed_record(self.signer, "k", b"v", self.expires_at))

    def _check(self, *_: object) -> bool:
        self.checks += 1
        return True

    def is_good(self, key_id: bytes = b"", subkey: str = "") -> bool:
        return self.guard.is_good(
            key_id or self.key_id, subkey or self.signer.peer_id, self.value, self.expires_at, False
        )


async def test_a_record_that_was_found_good_is_not_checked_again() -> None:
    record = LookedAt()
    assert (record.is_good(), record.is_good(), record.checks) == (True, True, 1)


async def test_a_record_that_was_found_good_is_not_so_elsewhere() -> None:
    record = LookedAt()
    assert record.is_good()
    assert not record.is_good(key_id=bytes(20))
    assert not record.is_good(subkey=Identity().peer_id)


async def test_a_record_that_was_found_good_is_checked_again_when_it_has_expired() -> None:
    record = LookedAt()
    record.is_good()
    record.clock.correct(61)
    record.is_good()
    assert record.checks == 2


async def test_a_record_that_was_found_good_is_not_so_when_its_peer_is_blocked() -> None:
    record = LookedAt()
    assert record.is_good()
    with record.lists.of_part(PeerLists(blocked=[record.signer.peer_id])):
        assert not record.is_good()


async def test_bad_entries_do_not_take_good_ones_with_them() -> None:
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils import MSGPackSerializer

    one, expires_at = Identity(), time.time() + 60
    entries = DictionaryDHTValue()
    good = MSGPackSerializer.dumps(sealed_record(one, "k", b"v", expires_at))
    entries.store(one.peer_id, good, expires_at)
    entries.store(Identity().peer_id, good, expires_at)
    entries.store(7, b"\xff\xff", expires_at + 1)
    RecordGuard(None).purge(DHTID.generate("k").to_bytes(), entries)
    assert [subkey for subkey, _ in entries.items()] == [one.peer_id]


@pytest.mark.parametrize("envelope", [b"", b"\x01" * 20, b"\x01" * 200, "text", None, 7, [b"x"]])
async def test_an_envelope_that_makes_no_sense_is_refused(envelope: Any) -> None:
    assert RecordGuard(None).open(b"key id", Identity().peer_id, envelope, time.time() + 60) is None
