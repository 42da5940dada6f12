"""Machines of a swarm in Linux network namespaces, whose cables can be pulled and addresses changed.

::

    machine "a" ── veth ──┐
    machine "b" ── veth ──┼── bridge, in a namespace of its own
    machine "c" ── veth ──┘

Nothing outside these namespaces is touched. `Lan.close` ends every process in them and removes them; what a
test run that was killed left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from swarmkit.local.fork_server import ForkedProcess, ForkServer
from swarmkit.local.server_process import ServerProcess
from swarmkit.settings import ClientSettings, ServerSettings

PROGRAM = "tests.machine_program"
_PREFIX = "swarmkit-test-"
_IP_TIMEOUT_S = 30.0
WITHIN_S = 120.0
"""Seconds after which what a client was asked for fails the test: far more than any of it needs."""


def why_not() -> str:
    """Why there can be no network namespaces here; empty if there can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command"
    name = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"this system allows no network namespaces: {error.stderr.strip()}"
    return ""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_IP_TIMEOUT_S)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout


def _run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=_IP_TIMEOUT_S, check=False
    )


def _remove(namespace: str) -> None:
    """End all processes of a namespace, and remove it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", namespace)


def _remove_leftovers() -> None:
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(_PREFIX).split("-")[0]
        if name.startswith(_PREFIX) and not Path(f"/proc/{owner}").exists():
            _remove(name)


_numbers = itertools.count(1)


class Lan:
    """A bridge, and machines that are connected by it."""

    def __init__(self, *, ipv6: bool = False, mtu: int = 1500, prefix: str = "10.90.0") -> None:
        """Args: prefix: of the IPv4 addresses; one of the Internet's for what peers do only there."""
        reason = why_not()
        if reason:
            pytest.skip(reason)
        _remove_leftovers()
        self._name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self._hub = f"{self._name}-hub"
        self.ipv6, self.mtu, self.prefix = ipv6, mtu, prefix
        self.machines: list[Machine] = []
        self.folder = Path(tempfile.mkdtemp(prefix="swarmkit-lan-"))
        self.fork_server = ForkServer(PROGRAM)
        try:
            _ip("netns", "add", self._hub)
            _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._hub, "link", "set", "bridge", "mtu", str(mtu), "up")
        except BaseException:
            self.close()
            raise

    def machine(self) -> Machine:
        """One more machine, connected and with an address."""
        number = len(self.machines) + 1
        machine = Machine(self, f"{self._name}-{number}", self._hub, f"port{number}", number)
        self.machines.append(machine)
        machine.plug_in()
        return machine

    def machine_behind(self, router: Machine) -> Machine:
        """One more machine, in a home of its own from which only `router` can be reached."""
        number = len(self.machines) + 1
        machine = HomeMachine(self, f"{self._name}-{number}", router.namespace, "home0", number)
        self.machines.append(machine)
        machine.plug_in()
        return machine

    def close(self) -> None:
        """End all processes and remove all namespaces."""
        for machine in self.machines:
            machine.end()
        self.fork_server.close()
        for namespace in (*(machine.namespace for machine in self.machines), self._hub):
            _remove(namespace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Lan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class Machine:
    """A computer with a network of its own."""

    lan: Lan
    namespace: str
    hub: str
    port: str
    number: int
    address: str = ""
    programs: list[Any] = field(default_factory=list)

    def plug_in(self) -> None:
        """Lay its cable."""
        _ip("netns", "add", self.namespace)
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        cable = ("link", "add", "eth0", "netns", self.namespace, "mtu", str(self.lan.mtu), "type", "veth")
        _ip(*cable, "peer", "name", self.port, "netns", self.hub)
        _ip("-n", self.hub, "link", "set", self.port, "mtu", str(self.lan.mtu), "master", "bridge", "up")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        self.set_address(self.number)
        self.clock_file.write_bytes(struct.pack("d", 0.0))

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command begins with that shall run on this machine."""
        return ("ip", "netns", "exec", self.namespace)

    def run_ip(self, *arguments: str) -> str:
        """Run the `ip` command on this machine, such as to change its routes."""
        return _ip("-n", self.namespace, *arguments)

    def set_address(self, number: int) -> None:
        """Have another address from now on, as in another network or after a lease has ended."""
        if self.lan.ipv6:
            address, options = f"fd00:5a::{number:x}", ("nodad",)
            _ip("-n", self.namespace, "-6", "addr", "flush", "dev", "eth0", "scope", "global")
        else:
            address, options = f"{self.lan.prefix}.{number}", ()
            _ip("-n", self.namespace, "-4", "addr", "flush", "dev", "eth0")
        _ip(
            "-n", self.namespace, "addr", "add", f"{address}/{64 if self.lan.ipv6 else 24}", "dev", "eth0",
            *options,
        )  # fmt: skip
        self.address = address

    def cut(self) -> None:
        """Pull its cable."""
        _ip("-n", self.hub, "link", "set", self.port, "down")

    def heal(self) -> None:
        """Put its cable in again."""
        _ip("-n", self.hub, "link", "set", self.port, "up")

    def stop_reaching(self, other: Machine) -> None:
        """Lose all packets to another machine from now on, silently. Those from there arrive."""
        nobody = ("lladdr", "02:00:00:00:00:ff", "nud", "permanent")
        self.run_ip("neigh", "replace", other.address, *nobody, "dev", "eth0")

    def reach_again(self, other: Machine) -> None:
        """Undo `stop_reaching`."""
        self.run_ip("neigh", "del", other.address, "dev", "eth0")

    def pids(self, name: str = "") -> list[int]:
        """Its processes, or those whose command has that name."""
        pids = [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]
        return [pid for pid in pids if not name or name in _command(pid)]

    def signal(self, number: int, name: str = "") -> None:
        """Send a signal to all its processes, or to those of a name."""
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def clock_file(self) -> Path:
        """Holds by how many seconds its clock is wrong."""
        return self.lan.folder / f"clock-{self.number}"

    def set_clock(self, seconds: float) -> None:
        """Have its clock be wrong by so many seconds; negative = it is late."""
        with self.clock_file.open("r+b") as file:
            file.write(struct.pack("d", seconds))

    # programs

    def translate(self) -> None:
        """Be the router of a home: what comes from there goes on under this machine's own address (NAT)."""
        _run(*self.inside, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        if shutil.which("nft"):
            rules = "table ip nat {\nchain out {\ntype nat hook postrouting priority 100;\n"
            rules += 'oifname "eth0" masquerade;\n}\n}\n'
            done = _run(*self.inside, "nft", "-f", "-", text=rules)
        elif shutil.which("iptables"):
            rule = ("-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
            done = _run(*self.inside, "iptables", *rule)
        else:
            pytest.skip("NAT between network namespaces needs the `nft` or the `iptables` command")
        if done.returncode:
            pytest.skip(f"this kernel allows no NAT: {done.stderr.strip()}")

    def serve(
        self,
        model: str,
        blocks: tuple[int, int],
        join: Sequence[str] = (),
        settings: ServerSettings | None = None,
        *,
        listen: str = "",
        relay: bool = False,
    ) -> ServerProcess:
        """Start `swarmkit serve` and wait until it serves; its identity is the machine's.

        Args:
            listen: the address to listen at; the machine's own if not given.
            relay: have it be reachable through the peers that it joins.
        """
        relays = ("--relay",) if relay else ()
        host = (
            *relays,
            "--host",
            listen or self.address,
            "--identity",
            str(self.lan.folder / f"id-{self.number}"),
        )
        server = ServerProcess(
            model,
            join,
            blocks,
            public_name=f"machine {self.number}",
            settings=settings,
            fork_server=_InNamespace(self, host),
        )
        self.programs.append(server)
        server.start()
        return server

    def client(
        self, model: str, join: Sequence[str], settings: ClientSettings | None = None
    ) -> ClientProcess:
        """Start a client and wait until it has joined the swarm."""
        environment = dict(os.environ) | (settings or ClientSettings()).environment()
        client = ClientProcess(self, ["client", model, *join], environment)
        self.programs.append(client)
        client.wait_for("joined")
        return client

    def end(self) -> None:
        """End its processes."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
        for program in self.programs:
            program.kill()
        self.programs.clear()

    def spawn(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
    ) -> ForkedProcess:
        """Start `tests.machine_program` on this machine."""
        where = [self.namespace, str(self.clock_file)]
        return self.lan.fork_server.spawn([*where, *arguments], environment, log)


class HomeMachine(Machine):
    """A computer behind a router, which is another machine; nobody else can reach it."""

    def plug_in(self) -> None:
        _ip("netns", "add", self.namespace)
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        cable = ("link", "add", "eth0", "type", "veth", "peer", "name", self.port, "netns", self.hub)
        _ip("-n", self.namespace, *cable)
        for namespace, device, address in (
            (self.namespace, "eth0", "192.168.7.2"),
            (self.hub, self.port, "192.168.7.1"),
        ):
            _ip("-n", namespace, "link", "set", device, "up")
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", device)
        _ip("-n", self.namespace, "route", "add", "default", "via", "192.168.7.1")
        self.address = "192.168.7.2"
        self.clock_file.write_bytes(struct.pack("d", 0.0))


class _InNamespace(ForkServer):
    """The fork server as a `ServerProcess` uses it, for one machine."""

    def __init__(self, machine: Machine, options: Sequence[str]) -> None:
        self._machine = machine
        self._options = options

    def fits(self, environment: Mapping[str, str]) -> bool:
        return True

    def spawn(
        self, arguments: Sequence[str], environment: Mapping[str, str], stderr: IO[bytes]
    ) -> ForkedProcess:
        return self._machine.spawn([*arguments, *self._options], environment, stderr)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class ClientError(Exception):
    """What a client was asked for raised an error."""


class ClientProcess:
    """A client on a machine: a `SwarmModelForCausalLM` that does what it is told, one thing at a time."""

    def __init__(self, machine: Machine, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = machine.spawn(arguments, environment, self._log)
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="client", daemon=True)
        self._reader.start()

    def ask(self, new_tokens: int, *, pause_s: float = 0.0, prompt: Sequence[int] = (5, 9, 12, 7)) -> None:
        """Have it generate in its session, with a pause after each token.

        The session begins anew unless the prompt goes on where it ended.
        """
        request = {"prompt": list(prompt), "new_tokens": new_tokens, "pause_s": pause_s}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def wait_for(self, kind: str, within: float = WITHIN_S) -> dict[str, Any]:
        """The next thing of a kind that it says: `joined`, `token`, `tokens` or `error`."""
        limit = time.monotonic() + within
        while True:
            try:
                said = self._said.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind} within {within:g} s:\n{self.last_words()}") from None
            assert said is not None, f"the client ended:\n{self.last_words()}"
            if kind in said:
                return said
            if "error" in said:
                raise ClientError(f"{said['error']}: {said['message']}")

    def answer(self, new_tokens: int, within: float = WITHIN_S, **options: Any) -> list[int]:
        """The tokens that it generates."""
        self.ask(new_tokens, **options)
        return self.tokens(within)

    def answer_at_last(self, new_tokens: int, within: float = WITHIN_S, **options: Any) -> list[int]:
        """The tokens that it generates once it can; it is asked again whenever it cannot."""
        limit = time.monotonic() + within
        while True:
            self.ask(new_tokens, **options)
            try:
                return self.tokens(max(0.0, limit - time.monotonic()))
            except ClientError as error:
                if time.monotonic() > limit:
                    raise AssertionError(f"no answer within {within:g} s: {error}") from error

    def tokens(self, within: float = WITHIN_S) -> list[int]:
        """The result of what it was asked for."""
        tokens: list[int] = self.wait_for("tokens", within)["tokens"]
        return tokens

    def last_words(self) -> str:
        """What it has written to standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]

    def kill(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(WITHIN_S)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._said.put(json.loads(line))
        self._said.put(None)
