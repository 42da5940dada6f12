"""A swarm on one machine: what it starts, what it leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.errors import UsageError
from swarmkit.events import PeerLost
from swarmkit.local.swarm import even_split
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

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
    """Ours; others start threads that stay, such as progress bars."""
    return {t.name for t in threading.enumerate() if t.name.startswith(("swarmkit", "AnyIO", "asyncio"))}


@pytest.mark.parametrize(
    "options",
    [{"transport": "memory"}, {"transport": "hivemind"}, {"processes": True}],
    ids=["memory", "hivemind", "processes"],
)
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
