"""Real server processes are killed, stopped and replaced, and the tokens stay what they would have been.

One swarm serves all these tests. Whoever ends a server has another one started in the background, and waits
only if a stage has fewer than two.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
from torch import Tensor

from swarmkit import LocalSwarm
from swarmkit.client.session.replica import StageReplica
from swarmkit.events import PeerLost, PeerReplaced, WaitStarted
from swarmkit.local.server_process import ServerProcess
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings, ServerSettings

from ..waiting import wait_until
from .answers import answer, at, prompt

pytestmark = pytest.mark.timeout(180)

STAGES = [(0, 2), (2, 5)]
PROMPT_TOKENS = 400
CHUNK_TOKENS = 16
"""So many tokens go to a server in one step: a prefill takes 25 of them on each stage."""
NEW_TOKENS = 24


class ProcessSwarm:
    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm = swarm
        self.model = swarm.model()
        self.client = self.model.connection.client
        self._starting: list[Future[Any]] = []
        self.pool = ThreadPoolExecutor(2)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def alive(self, blocks: tuple[int, int]) -> list[ServerProcess]:
        """Servers of a stage that serve now."""
        return [s for s in self.processes() if s.blocks == blocks and s.alive and s.peer_id]

    def processes(self) -> list[ServerProcess]:
        servers = list(self.swarm.servers)
        assert all(isinstance(server, ServerProcess) for server in servers)
        return servers  # type: ignore[return-value]

    def start_soon(self, blocks: tuple[int, int]) -> None:
        self._starting.append(self.pool.submit(self.swarm.add_server, blocks))

    def all_started(self) -> None:
        """Wait for every server that is starting, too."""
        while self._starting:
            self._starting.pop(0).result()
        self.two_of_each()

    def two_of_each(self) -> None:
        """Wait until the client knows two living servers of each stage."""
        for blocks in STAGES:
            wait_until(partial(self._has_two, blocks), f"two servers of blocks {blocks}", within=120)

        def known() -> bool:
            self.model.connection.call(self.client.known.refresh)
            seen = set(self.client.known.view.announcements)
            return all(server.peer_id in seen for blocks in STAGES for server in self.alive(blocks))

        wait_until(known, "the client knows the new servers")

    def _has_two(self, blocks: tuple[int, int]) -> bool:
        """Whether a stage has two living servers; else waits for one that is starting."""
        if len(self.alive(blocks)) < 2:
            if not self._starting:
                self.start_soon(blocks)
            self._starting.pop(0).result()
        return len(self.alive(blocks)) >= 2

    def in_use(self, stage: int) -> ServerProcess:
        """The server of a stage in the latest step."""
        route = list(dict.fromkeys(hop.peer_id for hop in self.client.trace[-1].hops))
        return self.server(route[stage])

    def server(self, peer_id: str) -> ServerProcess:
        return next(server for server in self.processes() if server.peer_id == peer_id)

    def kill(self, server: ServerProcess) -> None:
        """SIGKILL; another one starts in the background."""
        server.kill()
        self.start_soon(server.blocks)

    def lost(self) -> list[str]:
        return [event.peer_id for event in self.model.events if isinstance(event, PeerLost)]

    def answer(
        self, actions: dict[int, Callable[[], object]] | None = None, question: int = 3, **options: Any
    ) -> Tensor:
        """The answer to prompt number `question`; of one that was asked before, servers have kept pages."""
        options = {"new_tokens": NEW_TOKENS, **options}
        ids, _ = prompt(PROMPT_TOKENS, seed=question)
        tokens: Tensor = answer(self.model, ids, logits_processor=at(actions or {}), **options)
        return tokens


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(True, id="server-to-server"),
        pytest.param(False, id="through-the-client", marks=pytest.mark.slow),
    ],
)
def world(
    tiny_llama: Checkpoint, request: pytest.FixtureRequest, kept_fork_server: None
) -> Iterator[ProcessSwarm]:
    swarm = LocalSwarm(
        tiny_llama,
        num_stages=2,
        replicas=3,
        processes=True,
        server_settings=ServerSettings().replace(max_step_tokens=CHUNK_TOKENS),
        # longer than the records of the dead are believed
        client_settings=ClientSettings().replace(ban_s=60, push=request.param),
    )
    with swarm:
        assert sorted({server.blocks for server in swarm.servers}) == STAGES
        world = ProcessSwarm(swarm)
        yield world
        world.close()


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Checkpoint) -> Callable[..., list[list[int]]]:
    """What the local model answers."""
    local = load_local(tiny_llama)

    def tokens(question: int = 3, **options: Any) -> list[list[int]]:
        ids, _ = prompt(PROMPT_TOKENS, seed=question)
        found = answer(local, ids, **{"new_tokens": NEW_TOKENS, **options})
        return found.tolist()  # type: ignore[no-any-return]

    return tokens


def kill_at_answer(
    world: ProcessSwarm, monkeypatch: pytest.MonkeyPatch, start: int, number: int, delay_s: float
) -> list[str]:
    """Have the server of the stage that begins at block `start` killed while or after it is waited for its
    answer `number`.

    The signal comes from a thread, `delay_s` after the waiting began, wherever the step then is; three
    answers later at the latest it has come, so that the session is sure to meet a dead server.
    """
    take, seen = StageReplica.take, 0
    killed: list[str] = []
    killer: list[threading.Timer] = []

    async def counted(stage: StageReplica, *rest: Any, **more: Any) -> Any:
        nonlocal seen
        if stage.hop.start == start and stage.hop.stop == dict(STAGES)[start]:
            seen += 1
            if seen == number:
                victim = world.server(stage.hop.server.peer_id)
                killed.append(victim.peer_id)
                killer.append(threading.Timer(delay_s, world.kill, [victim]))
                killer[0].start()
            elif seen == number + 3:
                await anyio.to_thread.run_sync(killer[0].join)
        return await take(stage, *rest, **more)

    monkeypatch.setattr(StageReplica, "take", counted)
    return killed


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < 4 else pytest.mark.slow) for seed in range(20)]
)
def test_sigkill_at_a_random_moment(
    world: ProcessSwarm,
    undisturbed: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Even seeds kill in the prefill, odd ones in decoding."""
    world.two_of_each()
    chance = random.Random(seed)
    chunks = PROMPT_TOKENS // CHUNK_TOKENS
    in_prefill = seed % 2 == 0
    number = chance.randint(1, chunks // 2) if in_prefill else chunks + chance.randint(1, NEW_TOKENS - 6)
    start, delay_s = chance.choice([0, 2]), chance.uniform(0, 0.004)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3} if seed % 3 == 0 else {}
    options["question"] = 100 + seed  # a new one each time, so that all of it is computed
    before = len(world.lost())
    killed = kill_at_answer(world, monkeypatch, start, number, delay_s)

    tokens = world.answer(**options)

    assert tokens.tolist() == undisturbed(**options)
    assert killed[0] in world.lost()[before:]
    replaced = next(
        event
        for event in world.model.events
        if isinstance(event, PeerReplaced) and event.peer_id == killed[0]
    )
    # Killed late in the prefill, it may have answered all of it before.
    assert replaced.replayed_tokens in ((0, PROMPT_TOKENS) if in_prefill else range(PROMPT_TOKENS, 1000))


@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.slow), 9])
def test_two_stages_are_killed_at_once(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]], tokens: int
) -> None:
    world.two_of_each()
    before = len(world.lost())

    def kill() -> None:
        for server in [world.in_use(0), world.in_use(1)]:
            world.kill(server)

    assert world.answer({tokens: kill}).tolist() == undisturbed()
    assert len(world.lost()) >= before + 2


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_process_is_left_after_the_deadline(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]], stage: int
) -> None:
    world.two_of_each()
    stopped: list[ServerProcess] = []

    def stop() -> None:
        stopped.append(world.in_use(stage))
        stopped[0].suspend()

    try:
        assert world.answer({5: stop}).tolist() == undisturbed()
    finally:
        stopped[0].resume()
    assert stopped[0].peer_id in world.lost()
    assert stopped[0].alive


def test_a_process_that_goes_on_after_it_was_stopped_serves_again(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]]
) -> None:
    world.two_of_each()
    assert world.answer().tolist() == undisturbed()


def test_all_replicas_are_killed_and_one_comes_back(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]]
) -> None:
    world.all_started()
    events = len(world.model.events)

    def kill_all() -> None:
        for server in world.alive(STAGES[1]):
            server.kill()
        world.start_soon(STAGES[1])

    assert world.answer({5: kill_all}).tolist() == undisturbed()
    waiting = [event.missing for event in world.model.events[events:] if isinstance(event, WaitStarted)]
    assert waiting == [(STAGES[1],)]
    world.start_soon(STAGES[1])


def test_a_process_that_is_asked_to_leave_lets_its_session_move(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]]
) -> None:
    world.two_of_each()
    left: list[tuple[ServerProcess, list[psutil.Process]]] = []

    def leave() -> None:
        server = world.in_use(1)
        left.append((server, psutil.Process(server.pid).children(recursive=True)))
        world.pool.submit(server.stop, 600.0)  # SIGTERM

    with world.model.session() as session:
        tokens = world.answer({3: leave})
        server, children = left[0]

        def is_leaving() -> bool:
            nonlocal tokens
            if server.peer_id not in world.lost():  # it may take a few more tokens until it says so
                tokens = world.answer()
            return server.peer_id in world.lost()

        wait_until(is_leaving, "the server says that it is leaving")
        assert tokens.tolist() == undisturbed()
        assert server.peer_id not in [hop.server.peer_id for hop in session.chain.route]
        wait_until(lambda: server.exit_code is not None, "the server ends while the session is open")
    assert server.exit_code == 0
    assert psutil.wait_procs(children, timeout=30)[1] == []
    reasons = [
        e.reason for e in world.model.events if isinstance(e, PeerLost) and e.peer_id == server.peer_id
    ]
    assert reasons == ["is leaving"]


def test_replacements_with_other_boundaries(
    world: ProcessSwarm, undisturbed: Callable[..., list[list[int]]]
) -> None:
    world.all_started()
    others = [world.pool.submit(world.swarm.add_server, blocks) for blocks in [(0, 1), (1, 4), (3, 5)]]
    for other in others:
        other.result()
    new = {other.result().peer_id for other in others}

    def exchange() -> None:
        for blocks in STAGES:
            for server in world.alive(blocks):
                server.kill()
        world.model.connection.call(world.client.known.refresh)

    assert world.answer({7: exchange}).tolist() == undisturbed()
    hops = world.client.trace[-1].hops
    assert {hop.peer_id for hop in hops} == new
    # Each lost stage is replaced on its own, so that one of the new servers is in the route twice.
    assert [(hop.start, hop.stop) for hop in hops][:2] == [(0, 1), (1, 2)]
    assert hops[-1].stop == 5


# nothing stays


HOLDER = """
import sys
from swarmkit import LocalSwarm

with LocalSwarm(sys.argv[1], num_stages=1, processes=True) as swarm:
    model = swarm.model()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow  # tests/test_fork_server.py kills an owner of a fork server, a server and its daemon
def test_a_killed_parent_leaves_no_process(tiny_llama: Checkpoint) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tiny_llama.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert any("serve" in child.name() or "serve" in child.cmdline() for child in children)
    assert sum("p2pd" in child.name() for child in children) == 3  # of the first peer, the server, the client
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_asked_to_end_ends_cleanly(tiny_llama: Checkpoint, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "swarmkit.cli", "serve", tiny_llama.name, "--threads", "1", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdout is not None
    for line in server.stdout:
        if json.loads(line)["event"] == "serving_started":
            break
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    server.send_signal(number)
    rest, errors = server.communicate(timeout=60)
    assert server.returncode == 0
    assert [json.loads(line)["event"] for line in rest.splitlines()] == ["drain_started", "server_left"]
    assert b"Traceback" not in errors
    assert psutil.wait_procs(children, timeout=30)[1] == []
