"""`LocalSwarm`: a whole swarm on this machine, for tests, notebooks, the demo and benchmarks."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from swarmkit.client.pictures import swarm_bundle
from swarmkit.drawing.values import ServerPicture
from swarmkit.errors import UsageError
from swarmkit.local import fork_server
from swarmkit.local.member import LocalServer, Member, Place
from swarmkit.local.server_process import ServerProcess
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory, as_member, over_hivemind, swarm_key_of
from swarmkit.net.emulation.link_emulator import LinkEmulator
from swarmkit.net.emulation.link_schedule import EmulatedLink
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings, ServerSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.swarm.connection import Connection


_HOST = "127.0.0.1"


M = TypeVar("M", bound=Member)


class LocalSwarm:
    """A swarm on this machine; use it in a `with` block.

    Example::

        with LocalSwarm("tiny-chat", num_stages=4, replicas=2) as swarm:
            model, tokenizer = swarm.model(), swarm.tokenizer()
            out = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
            swarm.servers[1].kill()                      # the next generate() gives the same tokens

    Args:
        model: `"tiny-chat"`, a local folder, or a Hub repo id.
        num_stages: the model's blocks are cut into this many runs of nearly equal length.
        replicas: servers of each stage. `servers[r * num_stages + s]` is replica r of stage s.
        processes: give each server an operating-system process of its own, which can be killed for real.
        transport: `"hivemind"`, as in the world, or `"memory"`, for tests within one process.
        threads: torch threads of each server process.
        device: where the servers compute; several may share an accelerator.
        link: what lies between each server and everybody else, in each direction, so that a client's round
            trip to a server, or one server's to another, takes `2 * link.delay_s` longer; nothing if not
            given. `link_of(server)` changes or cuts one of them while the swarm runs.
        swarm_key: makes the swarm private: the file with its key, or the key itself (not with `processes`).
        on_progress: called with (servers ready, servers in all) while the swarm starts.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint = "tiny-chat",
        num_stages: int = 2,
        replicas: int = 1,
        processes: bool = False,
        transport: Literal["hivemind", "memory"] = "hivemind",
        *,
        dtype: str | torch.dtype = "auto",
        threads: int = 1,
        device: str = "cpu",
        link: EmulatedLink | None = None,
        swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
        server_settings: ServerSettings | None = None,
        client_settings: ClientSettings | None = None,
        on_progress: Callable[[int, int], None] = lambda ready, total: None,
    ) -> None:
        self.checkpoint = Checkpoint.open(model)
        if not 1 <= num_stages <= self.checkpoint.num_blocks or replicas < 1:
            raise UsageError(
                f"a model of {self.checkpoint.num_blocks} blocks can be cut into 1 to "
                f"{self.checkpoint.num_blocks} stages with at least one replica each; "
                f"got {num_stages} stages, {replicas} replicas"
            )
        if processes and transport == "memory":
            raise UsageError("the memory transport lives in one process; use transport='hivemind'")
        if link is not None and transport == "memory":
            raise UsageError(
                "an emulated link stands between sockets; use transport='hivemind', or the memory network's "
                "own set_link()"
            )
        if processes and isinstance(swarm_key, SwarmKey):
            raise UsageError("processes read the swarm's key from a file; give the file's path as swarm_key")
        self._key_file = swarm_key if isinstance(swarm_key, str | os.PathLike) else None
        self._swarm_key = swarm_key_of(swarm_key)
        self.members: list[Member] = []
        """All that take part: servers, and what `add` was told to make."""
        self.servers: list[LocalServer] = []
        self.network = MemoryNetwork() if transport == "memory" else None
        self._stages = even_split(self.checkpoint.num_blocks, num_stages)
        self._replicas = replicas
        self._processes = processes
        self._dtype = dtype
        self._threads = threads
        self._device = device
        self._link = link
        self._links: dict[Member, LinkEmulator] = {}
        self._server_settings = server_settings or ServerSettings()
        self._client_settings = client_settings
        self._on_progress = on_progress
        self._owned = ExitStack()
        self._under_links = ExitStack()
        """What links need; ends after the members, which leave over their links."""
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._bootstrap: Transport | None = None
        self._fork_server: fork_server.ForkServer | None = None
        self._started = False
        self._closed = False

    # ------------------------------------------------------------------ life

    def start(self) -> LocalSwarm:
        """Start every server; returns when all of them serve."""
        if self._started:
            raise UsageError("this swarm was started before; make a new one")
        self._started = True
        try:
            if self.network is None:
                self._start_bootstrap()
            if self._processes:
                self._fork_server = self._owned.enter_context(fork_server.shared())
            self._owned.enter_context(self._under_links)
            self._owned.callback(self._stop_members)
            self._owned.callback(self._close_models)
            wanted = [blocks for _ in range(self._replicas) for blocks in self._stages]
            self._on_progress(0, len(wanted))
            launched = [self._launch(blocks) for blocks in wanted]
            for ready, server in enumerate(launched, start=1):
                server.start()
                self._on_progress(ready, len(wanted))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End every model, member and process of this swarm. May be called twice."""
        self._closed = True
        self._owned.close()

    @property
    def closed(self) -> bool:
        """Whether it has ended, or is ending."""
        return self._closed

    def __repr__(self) -> str:
        name = f"LocalSwarm of {self.checkpoint.name}, {self.checkpoint.num_blocks} blocks"
        ranges = [server.blocks for server in self.servers]
        held = (f"server-{number} [{low}:{high}]" for number, (low, high) in enumerate(ranges))
        return f"<{name}; {', '.join(held) or 'not started'}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: a picture of the servers and their blocks."""
        return swarm_bundle(repr(self), self.checkpoint.name, self.checkpoint.num_blocks, self.pictures())

    def pictures(self) -> list[ServerPicture]:
        """The servers in their order, to be drawn; those that have ended are lost."""
        return [
            ServerPicture(
                server.peer_id or f"server-{number}",
                f"server-{number}",
                *server.blocks,
                state="online" if server.alive else "lost",
            )
            for number, server in enumerate(self.servers)
        ]

    def __enter__(self) -> LocalSwarm:
        return self if self._started else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ use

    @property
    def initial_peers(self) -> list[str]:
        """Addresses with which other programs on this machine can join."""
        return list(self._bootstrap.addresses) if self._bootstrap is not None else []

    def model(self, **kwargs: Any) -> SwarmModelForCausalLM:
        """A client of this swarm; ends with the swarm at the latest."""
        from swarmkit.client.model import SwarmModelForCausalLM

        if not self._started:
            raise UsageError("start the swarm first, with start() or a `with` block")
        kwargs.setdefault("settings", self._client_settings)
        kwargs.setdefault("transport", self.client_transport())
        model = SwarmModelForCausalLM.from_pretrained(self.checkpoint, **kwargs)
        self._connections.add(model.connection)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.checkpoint.tokenizer()

    def add_server(self, blocks: tuple[int, int] | None = None, **kwargs: Any) -> LocalServer:
        """Start one more server and wait until it serves.

        Args:
            blocks: which blocks [a, b); all of them if not given.
            kwargs: for `Server`, such as `dtype`.
        """
        if not self._started:
            raise UsageError("start the swarm first, with start() or a `with` block")
        server = self._launch(blocks or (0, self.checkpoint.num_blocks), **kwargs)
        server.start()
        return server

    def add(self, make: Callable[[Place], M]) -> M:
        """Start one more member of any kind, such as a trainer, and wait until it takes part.

        Args: make: called with the member's `Place`; returns the member, which has not started yet.
        """
        if not self._started:
            raise UsageError("start the swarm first, with start() or a `with` block")
        member = self._admit(make, f"member-{len(self.members)}")
        member.start()
        return member

    def link_of(self, member: Member) -> LinkEmulator:
        """The emulated link in front of a member, to be changed or cut.

        Raises:
            UsageError: this swarm has no links.
        """
        try:
            return self._links[member]
        except KeyError:
            raise UsageError(
                "this swarm has no links; make it with LocalSwarm(…, link=EmulatedLink(…))"
            ) from None

    # ------------------------------------------------------------------ doing

    def _start_bootstrap(self) -> None:
        lease = portal.lease()
        self._owned.callback(lease.close)
        self._bootstrap = lease.call(over_hivemind(swarm_key=self._swarm_key), Identity(), acceptable_now)
        self._owned.callback(lease.call, self._bootstrap.close)

    def client_transport(self) -> TransportFactory:
        """Makes the transport of a client of this swarm."""
        if self.network is None:
            return over_hivemind(self.initial_peers, client_mode=True, swarm_key=self._swarm_key)
        return over_memory(self.network, self._swarm_key)

    def _launch(self, blocks: tuple[int, int], **kwargs: Any) -> LocalServer:
        """A server that may be started."""
        kwargs = {"dtype": self._dtype, "device": self._device, **kwargs}

        def make(place: Place) -> LocalServer:
            if not self._processes:
                options = {"settings": self._server_settings, **kwargs}
                return Server(
                    self.checkpoint,
                    blocks=blocks,
                    transport=place.transport,
                    public_name=place.name,
                    **options,
                )
            return ServerProcess(
                self.checkpoint.name,
                place.initial_peers,
                blocks,
                public_name=place.name,
                threads=self._threads,
                port=place.port,
                announce=place.announce,
                settings=self._server_settings,
                swarm_key_file=self._key_file,
                fork_server=self._fork_server,
                **kwargs,
            )

        server = self._admit(make, f"server-{len(self.servers)}")
        self.servers.append(server)
        return server

    def _admit(self, make: Callable[[Place], M], name: str) -> M:
        """A new member, which ends with the swarm, behind a link of its own if this swarm has links."""
        port, link = 0, None
        if self._link is not None:
            port = _reserve_port(self._under_links)
            link = self._lay_link(port, self._link)
        announce = () if link is None else (link.address,)
        if self.network is not None:
            transport = over_memory(self.network, self._swarm_key)
        else:
            transport = over_hivemind(
                self.initial_peers, port=port, announce=announce, swarm_key=self._swarm_key
            )
        member = make(Place(name, transport, tuple(self.initial_peers), port, announce))
        if link is not None:
            self._links[member] = link
        self.members.append(member)
        return member

    def _lay_link(self, port: int, link: EmulatedLink) -> LinkEmulator:
        """A link in front of a port, on the event loop until the swarm ends."""
        lease = portal.lease()
        self._under_links.callback(lease.close)
        emulator = lease.call(lambda: LinkEmulator.open((_HOST, port), link, seed=len(self.servers)))
        self._under_links.callback(lease.call, emulator.close)
        return emulator

    def _close_models(self) -> None:
        for connection in list(self._connections):
            connection.close()

    def _stop_members(self) -> None:
        with ThreadPoolExecutor(max(1, len(self.members)), "swarmkit-stop") as pool:
            stopping = [pool.submit(member.stop, 0.0) for member in self.members]
        for stopped in stopping:
            stopped.result()


def _reserve_port(owned: ExitStack) -> int:
    """A port for a server to listen at, where it must be known before the server is there."""
    held = socket.socket()
    owned.callback(held.close)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((_HOST, 0))
    port = int(held.getsockname()[1])
    if sys.platform != "linux":  # where a port that is bound, but not listened at, can be listened at by name
        held.close()
    return port


def over_memory(network: MemoryNetwork, swarm_key: SwarmKey | None = None) -> TransportFactory:
    """Transports of an in-memory network, in a private swarm if there is a key."""

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        return as_member(network.transport(identity, record_check, swarm_key), swarm_key)

    return create


def even_split(num_blocks: int, num_stages: int) -> Sequence[tuple[int, int]]:
    """Cut blocks 0..num_blocks into runs whose lengths differ by one at most."""
    cuts = [num_blocks * stage // num_stages for stage in range(num_stages + 1)]
    return list(itertools.pairwise(cuts))
