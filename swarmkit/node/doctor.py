"""Whether this machine is fit to take part in a swarm: what was found, and what to do about it.

What is found is plain data (`Facts`), and what is said of it follows from the data alone (`examine`). The
network is tried for real: a p2p daemon is started as a server would start it, the swarm is joined, and its
peers are asked to dial back.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import anyio
import platformdirs
import psutil

from swarmkit._version import __version__
from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import DaemonStartError, PeerError, SwarmkitError
from swarmkit.net.connect import TransportFactory, identity_for
from swarmkit.net.protocol.protocol import OWN_VERSIONS
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.rpc.dial_back import ask_to_dial_back
from swarmkit.net.transport.seam import Transport
from swarmkit.sizes import GIB

State = Literal["ok", "warning", "failure", "unknown"]

_LIBRARIES = ("torch", "transformers", "hivemind", "cryptography")
_FEWEST_FILES = 1024
_LITTLE_MEMORY = 2 * GIB
_LITTLE_DISK = 10 * GIB
_NO_DISK = 1 * GIB
_ASK_TIMEOUT_S = 8.0
_MOST_ASKED = 3
_RELAY_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: one word for it.
        state: a failure keeps this machine from taking part; a warning makes it of less use.
        found: a sentence.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    state: State
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Reach:
    """What came of asking peers to dial this one back, and of looking for a relay.

    Attributes:
        ports: at which this peer listens by TCP.
        asked: how many peers answered.
        reached: the ports at which one of them reached this peer.
        seen_at: the hosts that this peer is seen to come from.
        relays: addresses by which this peer can be reached through others.
    """

    ports: tuple[int, ...] = ()
    asked: int = 0
    reached: tuple[int, ...] = ()
    seen_at: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What was found on this machine.

    Attributes:
        python: its version.
        libraries: their versions; None = not installed.
        files: how many files a process may have open; None = any number.
        memory_bytes, total_memory_bytes: what is free, and all.
        disk_bytes: what is free where models are kept; None = there is no such folder.
        gpus: their names.
        has_driver: whether a driver for NVIDIA's GPUs is there.
        start_error: why the p2p daemon did not start, or the swarm could not be joined; None = it did.
        joined: whether there was a swarm to join.
        clock_error_s: by how much the computer's clock is wrong, as the swarm has it.
        reach: None = nobody was there to ask.
    """

    python: tuple[int, int]
    libraries: Mapping[str, str | None]
    files: int | None
    memory_bytes: int
    total_memory_bytes: int
    disk_bytes: int | None
    disk_folder: str
    gpus: Sequence[str] = ()
    has_driver: bool = False
    start_error: SwarmkitError | None = None
    joined: bool = False
    clock_error_s: float = 0.0
    addresses: Sequence[str] = ()
    reach: Reach | None = field(default=None)


# judging


def examine(facts: Facts) -> list[Finding]:
    """What is to be said of a machine."""
    return [
        _of_versions(facts),
        _of_files(facts),
        _of_memory(facts),
        _of_disk(facts),
        _of_gpu(facts),
        _of_port(facts),
        _of_swarm(facts),
        _of_clock(facts),
        _of_reach(facts),
        _of_relay(facts),
    ]


def _of_versions(facts: Facts) -> Finding:
    have = {name: version for name, version in facts.libraries.items() if version is not None}
    python = ".".join(map(str, facts.python))
    text = f"swarmkit {__version__} (protocol {OWN_VERSIONS}), Python {python}, " + ", ".join(
        f"{name} {version}" for name, version in have.items()
    )
    if missing := sorted(set(facts.libraries) - set(have)):
        return Finding(
            "versions", "failure", text, f"Install what is missing: pip install {' '.join(missing)}"
        )
    if facts.python < (3, 10):
        return Finding("versions", "failure", text, "Use Python 3.10 or a later one.")
    return Finding("versions", "ok", text)


def _of_files(facts: Facts) -> Finding:
    if facts.files is None or facts.files >= _FEWEST_FILES:
        many = "any number of" if facts.files is None else f"{facts.files}"
        return Finding("files", "ok", f"a process may have {many} files open")
    return Finding(
        "files",
        "warning",
        f"a process may have only {facts.files} files open; each connection is one",
        "Raise the limit: ulimit -n 4096 (in a container: --ulimit nofile=4096).",
    )


def _of_memory(facts: Facts) -> Finding:
    text = f"{facts.memory_bytes / GIB:.1f} of {facts.total_memory_bytes / GIB:.1f} GiB of memory are free"
    if facts.memory_bytes >= _LITTLE_MEMORY:
        return Finding("memory", "ok", text)
    return Finding("memory", "warning", text, "Close other programs, or serve fewer blocks.")


def _of_disk(facts: Facts) -> Finding:
    if facts.disk_bytes is None:
        return Finding(
            "disk",
            "failure",
            f"{facts.disk_folder} cannot be used to keep models",
            "Name another folder in SWARMKIT_STORE_DIR.",
        )
    text = f"{facts.disk_bytes / GIB:.1f} GiB are free in {facts.disk_folder}"
    if facts.disk_bytes >= _LITTLE_DISK:
        return Finding("disk", "ok", text)
    state: State = "warning" if facts.disk_bytes >= _NO_DISK else "failure"
    return Finding("disk", state, text, "Make room, or name another folder in SWARMKIT_STORE_DIR.")


def _of_gpu(facts: Facts) -> Finding:
    if facts.gpus:
        return Finding("gpu", "ok", f"there is {', '.join(facts.gpus)}", "Use it with --device.")
    if facts.has_driver:
        return Finding(
            "gpu",
            "warning",
            "there is a driver for a GPU, but PyTorch sees none",
            "Install the PyTorch that fits the driver (pytorch.org), and in a container pass the GPU on.",
        )
    return Finding("gpu", "ok", "there is no GPU; the processor computes")


def _of_port(facts: Facts) -> Finding:
    error = facts.start_error
    if error is None:
        return Finding("ports", "ok", f"listening at {', '.join(facts.addresses) or 'no address'}")
    text, _, _ = str(error).partition("\n")
    if isinstance(error, DaemonStartError) and error.cause in ("peers", "firewall", "network", "proxy"):
        return Finding("ports", "unknown", "not tried, since no peer of the swarm was reached")
    return Finding("ports", "failure", text, "Nothing else that needs the network was tried.")


def _of_swarm(facts: Facts) -> Finding:
    error = facts.start_error
    if isinstance(error, DaemonStartError) and error.cause in ("peers", "firewall", "network", "proxy"):
        text, _, _ = str(error).partition("\n")
        return Finding("swarm", "failure", text, "Ask the owner of the swarm for an address that works.")
    if error is not None:
        return Finding("swarm", "unknown", "not tried")
    if not facts.joined:
        return Finding("swarm", "unknown", "none was joined", "Give --join ADDRESS to try one.")
    return Finding("swarm", "ok", "the swarm was joined")


def _of_clock(facts: Facts) -> Finding:
    if not facts.joined or facts.start_error is not None:
        return Finding("clock", "unknown", "not compared, since no swarm was joined")
    if abs(facts.clock_error_s) < 1.0:
        return Finding("clock", "ok", "the clock agrees with that of the swarm")
    late = "late" if facts.clock_error_s > 0 else "early"
    return Finding(
        "clock",
        "warning",
        f"the clock is {abs(facts.clock_error_s):.0f} s {late}, as the swarm has it",
        "Set it right, best by NTP (timedatectl set-ntp true). Until then swarmkit corrects it.",
    )


def _of_reach(facts: Facts) -> Finding:
    reach = facts.reach
    if reach is None or not reach.asked:
        why = "there is nobody to ask" if reach is None else "no peer could be asked to dial back"
        return Finding(
            "reachability", "unknown", f"not tried: {why}", "Give --join ADDRESS of a public peer."
        )
    seen = f", seen as {', '.join(reach.seen_at)}" if reach.seen_at else ""
    if reach.reached:
        ports = ", ".join(map(str, reach.reached))
        return Finding(
            "reachability", "ok", f"{reach.asked} peers dialled back; reached at port {ports}{seen}"
        )
    ports = ", ".join(map(str, reach.ports)) or "none"
    return Finding(
        "reachability",
        "warning",
        f"{reach.asked} peers dialled back, and none reached this machine (port {ports}){seen}",
        "Listen at 0.0.0.0 at a fixed --port, open it in the firewall, and forward it in the router; or be "
        "reachable through other peers, with --relay.",
    )


def _of_relay(facts: Facts) -> Finding:
    reach = facts.reach
    if reach is None or not reach.asked or reach.reached:
        why = "this machine is reachable" if reach and reach.reached else "there is nobody to ask"
        return Finding("relay", "unknown", f"not tried: {why}")
    if reach.relays:
        return Finding(
            "relay", "ok", f"reachable through another peer: {reach.relays[0]}", "Serve with --relay."
        )
    return Finding(
        "relay",
        "warning",
        "no peer offered to pass connections on",
        "Run `swarmkit bootstrap` on a machine that can be reached, and join that.",
    )


# looking


async def look(
    factory: TransportFactory,
    initial_peers: Sequence[str],
    identity_path: str | None = None,
    relay_patience_s: float = _RELAY_PATIENCE_S,
) -> Facts:
    """Look at this machine, and try its network.

    Args:
        factory: of a transport that may use relays, as a server would have it.
        initial_peers: addresses of the swarm's peers that the factory joins; none = no swarm.
        relay_patience_s: how long to wait for a relay, where no peer reaches this one.
    """
    folder = os.environ.get("SWARMKIT_STORE_DIR") or platformdirs.user_cache_dir("swarmkit")
    memory = psutil.virtual_memory()
    error: SwarmkitError | None = None
    addresses: Sequence[str] = ()
    reach: Reach | None = None
    try:
        transport = await factory(identity_for(factory, identity_path), acceptable_now)
        try:
            addresses = transport.addresses
            reach = await _reach(transport, initial_peers, relay_patience_s) if initial_peers else None
        finally:
            with anyio.CancelScope(shield=True):
                await transport.close()
    except SwarmkitError as failure:
        error = failure
    gpus, has_driver = await anyio.to_thread.run_sync(_gpus)
    return Facts(
        python=sys.version_info[:2],
        libraries={name: _version_of(name) for name in _LIBRARIES},
        files=_most_files(),
        memory_bytes=memory.available,
        total_memory_bytes=memory.total,
        disk_bytes=_free_at(Path(folder)),
        disk_folder=folder,
        gpus=gpus,
        has_driver=has_driver,
        start_error=error,
        joined=bool(initial_peers),
        clock_error_s=SYSTEM_CLOCK.correction_s,
        addresses=tuple(addresses),
        reach=reach,
    )


async def _reach(transport: Transport, initial_peers: Sequence[str], patience_s: float) -> Reach:
    ports = tuple(dict.fromkeys(_ports_in(transport.addresses)))
    peers: dict[str, list[str]] = {}
    for address in initial_peers:
        peers.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    asked, reached, seen = 0, set(), set()
    for peer_id, addresses in list(peers.items())[:_MOST_ASKED]:
        answers = []
        for port in ports:
            try:
                answer = await ask_to_dial_back(transport, peer_id, addresses, port, _ASK_TIMEOUT_S)
            except PeerError:
                continue
            answers.append(answer)
            if answer.reached:
                reached.add(port)
            if answer.host:
                seen.add(answer.host)
        asked += bool(answers)
    relays: tuple[str, ...] = ()
    if asked and not reached:
        with anyio.move_on_after(patience_s):
            while not relays:
                await transport.fetch([])  # addresses are looked at again with every store
                await transport.store([], SYSTEM_CLOCK.time() + 60)
                relays = tuple(each for each in transport.addresses if "/p2p-circuit" in each)
                await anyio.sleep(0.5)
    return Reach(ports, asked, tuple(sorted(reached)), tuple(sorted(seen)), relays)


def _ports_in(addresses: Sequence[str]) -> list[int]:
    found = []
    for address in addresses:
        parts = address.split("/")
        if len(parts) > 4 and parts[3] == "tcp" and parts[4].isdecimal() and "p2p-circuit" not in parts:
            found.append(int(parts[4]))
    return found


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _most_files() -> int | None:
    if platform.system() == "Windows":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _free_at(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else None


def _gpus() -> tuple[tuple[str, ...], bool]:
    import torch

    names = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            names.append(f"{about.name} with {about.total_memory / GIB:.0f} GiB")
    elif torch.backends.mps.is_available():
        names.append("a GPU of Apple's (mps)")
    return tuple(names), Path("/proc/driver/nvidia/version").exists() or shutil.which(
        "nvidia-smi"
    ) is not None
