"""A swarm on one machine: what it starts, what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from anyio.abc import TaskStatus

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.errors import UsageError
from swarmkit.events import PeerLost
from swarmkit.local.member import Place
from swarmkit.local.swarm import even_split
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.connect import joined
from swarmkit.net.registry.records import Announcement
from swarmkit.net.transport.identity import Identity

from .client.answers import answer, at, prompt
from .models.tiny import make_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


def children() -> set[str]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
            found.add(f"{child.pid} {child.name()}")
    return found


def threads() -> set[str]:
    """Ours, but for the fork server that is kept; others start threads that stay, such as progress bars."""
    names = {t.name for t in threading.enumerate() if t.name.startswith(("swarmkit", "AnyIO", "asyncio"))}
    return names - {"swarmkit-fork-server"}


@pytest.mark.parametrize(
    "options",
    [{"transport": "memory"}, {"transport": "hivemind"}, {"processes": True}],
    ids=["memory", "hivemind", "processes"],
)
@pytest.mark.usefixtures("kept_fork_server")
def test_nothing_stays_after_the_end(tiny: Checkpoint, options: dict[str, Any]) -> None:
    before = children()
    assert threads() == set()
    with LocalSwarm(tiny, num_stages=2, **options) as swarm:
        tokens = answer(swarm.model(), prompt(5)[0], new_tokens=4)
        assert threads() != set()
        assert options.get("transport") == "memory" or len(children()) > len(before)
    assert children() <= before
    assert threads() == set()
    assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0], new_tokens=4).tolist()


def test_a_swarm_may_be_closed_twice_and_never_started(tiny: Checkpoint) -> None:
    swarm = LocalSwarm(tiny, transport="memory").start()
    swarm.close()
    swarm.close()
    LocalSwarm(tiny).close()
    assert threads() == set()


def test_a_model_of_a_closed_swarm_says_so(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, transport="memory") as swarm:
        model = swarm.model()
    with pytest.raises(UsageError, match="closed"):
        answer(model, prompt(5)[0])


def test_a_start_that_fails_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    swarm = LocalSwarm(tiny, transport="memory", dtype="no-such-dtype")
    with pytest.raises(Exception, match="no-such-dtype"):
        swarm.start()
    assert threads() == set()


def test_a_killed_server_is_like_one_that_crashed(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, num_stages=2, replicas=2, transport="memory") as swarm:
        model = swarm.model()

        def kill() -> None:
            used = model.trace[-1].hops[1].peer_id
            next(server for server in swarm.servers if server.peer_id == used).kill()

        tokens = answer(model, prompt(5)[0], logits_processor=at({2: kill}))
        assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0]).tolist()
        assert [e.reason for e in model.events if isinstance(e, PeerLost)] == ["connection lost"]


@pytest.mark.usefixtures("kept_fork_server")
def test_servers_that_ended_hold_no_files_of_the_swarm(tiny: Checkpoint) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with LocalSwarm(tiny, num_stages=1, processes=True) as swarm:
        before = descriptors()
        for _ in range(2):
            server = swarm.add_server((0, 1))
            server.kill()
        assert descriptors() <= before


def test_a_server_can_be_added(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, num_stages=2, transport="memory") as swarm:
        for server in swarm.servers:
            server.kill()
        added = swarm.add_server()
        assert added is swarm.servers[-1]
        assert added.blocks == (0, 5)
        assert swarm.add_server((1, 3)).blocks == (1, 3)
        tokens = answer(swarm.model(), prompt(5)[0])
        assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0]).tolist()


def test_progress_is_told_server_by_server(tiny: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    with LocalSwarm(
        tiny, num_stages=3, transport="memory", on_progress=lambda *progress: told.append(progress)
    ):
        assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_others_join_with_its_initial_peers(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, num_stages=2) as swarm:
        assert swarm.initial_peers
        with SwarmModelForCausalLM.from_pretrained(tiny, initial_peers=swarm.initial_peers) as model:
            tokens = answer(model, prompt(5)[0], new_tokens=4)
    assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0], new_tokens=4).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_stages": 0}, "1 to 5 stages"),
        ({"num_stages": 6}, "1 to 5 stages"),
        ({"replicas": 0}, "at least one replica"),
        ({"processes": True, "transport": "memory"}, "one process"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Checkpoint, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LocalSwarm(tiny, **options)


def test_a_swarm_is_started_once(tiny: Checkpoint) -> None:
    swarm = LocalSwarm(tiny, transport="memory")
    with pytest.raises(UsageError, match="start the swarm first"):
        swarm.add_server()
    with swarm, pytest.raises(UsageError, match="started before"):
        swarm.start()


@pytest.mark.parametrize(
    ("num_blocks", "num_stages", "lengths"),
    [(8, 4, [2, 2, 2, 2]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 3, [1] * 3)],
)
def test_blocks_are_split_evenly(num_blocks: int, num_stages: int, lengths: list[int]) -> None:
    stages = even_split(num_blocks, num_stages)
    assert [stop - start for start, stop in stages] == lengths
    assert stages[0][0] == 0
    assert stages[-1][1] == num_blocks
    assert all(one[1] == following[0] for one, following in itertools.pairwise(stages))


# members of other kinds


class Liar:
    """A member that announces every block, as the fastest server of all, and serves none."""

    def __init__(self, place: Place, model: Checkpoint) -> None:
        self._place = place
        self._model = model
        self._identity = Identity()
        self._end = asyncio.Event()
        self.addresses: Sequence[str] = ()

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    def start(self) -> None:
        self._lease = portal.lease()
        self._running, _ = self._lease.start_task(self._live)

    def stop(self, drain_timeout: float | None = None) -> None:
        self.kill()

    def kill(self) -> None:
        self._lease.call_soon(self._end.set)
        self._running.result(60)
        self._lease.close()

    async def _live(self, *, task_status: TaskStatus[None]) -> None:
        async with joined(self._place.transport, self._identity) as (transport, registry):
            self.addresses = transport.addresses
            lie = Announcement(
                peer_id=self.peer_id,
                fingerprint=self._model.fingerprint,
                model="tiny",
                num_blocks=self._model.num_blocks,
                start=0,
                stop=self._model.num_blocks,
                state="online",
                throughput=1e9,
                free_cache_tokens=2**30,
                dtype="float32",
                addresses=tuple(transport.addresses),
                public_name=self._place.name,
                sequence=1,
                expires_at=time.time() + 60,
            )
            await registry.announce(lie)
            task_status.started()
            await self._end.wait()


def test_a_member_may_be_of_any_kind(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, transport="memory") as swarm:
        liar = swarm.add(lambda place: Liar(place, swarm.checkpoint))
        model = swarm.model()
        tokens = answer(model, prompt(5)[0], new_tokens=4)
        assert liar.peer_id in {event.peer_id for event in model.events if isinstance(event, PeerLost)}
    assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0], new_tokens=4).tolist()
    assert threads() == set()


def test_members_are_servers_and_others(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, transport="memory", num_stages=1) as swarm:
        liar = swarm.add(lambda place: Liar(place, swarm.checkpoint))
        assert swarm.members == [*swarm.servers, liar]
        assert all(member.addresses for member in swarm.members)


def test_a_member_comes_to_a_swarm_that_has_started(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="start the swarm first"):
        LocalSwarm(tiny, transport="memory").add(lambda place: Liar(place, tiny))
