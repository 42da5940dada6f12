"""Who breaks off a step, or vanishes in it, has nothing more computed for him, and leaves nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from swarmkit.client.session import step as step_module
from swarmkit.client.session.session import Session
from swarmkit.errors import DeadlineError, SessionError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.protocol.messages import Resources
from swarmkit.node.server import Server
from swarmkit.server.serving import Serving
from swarmkit.settings import ServerSettings

from ..waiting import wait_until
from .answers import answer, prompt
from .recovery import STAGES, World, a_world

CHUNK = 16
PROMPT = torch.randn(1, 1200, 32, generator=torch.Generator().manual_seed(0))
"""Goes through the chain in pieces of 64, each of which takes a server four passes."""
PASSES_A_PIECE, PASSES = 4, 75


class Brake:
    """Stops every engine at its next pass, once a stage has begun its pass number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: int, at: int) -> None:
        self.passes: Counter[int] = Counter()
        self.reached = threading.Event()
        self.stopped: set[int] = set()  # the first blocks of the stages that stand still
        self._go = threading.Event()
        self._stage, self._at = stage, at
        self._forward = Stage.forward_many
        monkeypatch.setattr(Stage, "forward_many", lambda stage, parts: self._run(stage, parts))

    def release(self) -> None:
        self._go.set()

    def _run(self, stage: Stage, parts: Any) -> Any:
        self.passes[stage.start] += 1
        if stage.start == self._stage and self.passes[stage.start] == self._at:
            self.reached.set()
        if self.reached.is_set() and not self._go.is_set():
            self.stopped.add(stage.start)
            self._go.wait(60)
            self._go.set()  # a test that failed holds nobody up for longer
            self.stopped.discard(stage.start)
        return self._forward(stage, parts)


BOTH_WAYS = [
    pytest.param(True, id="server-to-server"),
    pytest.param(False, id="through-the-client", marks=pytest.mark.slow),
]


@pytest.fixture(params=BOTH_WAYS)
def world(tiny_llama: Checkpoint, request: pytest.FixtureRequest) -> Iterator[World]:
    settings = ServerSettings().replace(prefill_chunk_tokens=CHUNK, prefix_cache="off")
    with a_world(tiny_llama, replicas=1, push=request.param, server_settings=settings) as world:
        yield world


def servings(world: World) -> list[Serving]:
    found = [server.serving for server in world.swarm.servers if isinstance(server, Server)]
    return [serving for serving in found if serving is not None]


def holds_nothing(serving: Serving) -> bool:
    """Whether a server holds nothing for a session, a stream or a request."""

    async def resources() -> Resources:
        return serving.sessions.resources()

    with portal.lease() as lease:
        held = lease.call(resources)
    assert held.accounted
    return not any(
        (held.sessions, held.streams, held.pushers, held.works, held.leased_bytes, held.receive_budget_bytes)
    )


def idle(world: World) -> bool:
    """Whether no server holds anything."""
    return all(map(holds_nothing, servings(world)))


def all_is_withdrawn(world: World) -> bool:
    """Whether the callers of all that servers still have to do have given it up."""
    return all(serving.engine.is_withdrawn for serving in servings(world))


def stands_still(world: World, brake: Brake) -> bool:
    """Whether every server has stopped, or waits and has done all that the one before it handed on.

    So nothing of the prompt is on its way between them, which would begin another pass when it comes.
    """
    for serving in servings(world):
        start, _ = serving.blocks
        if start in brake.stopped:
            continue
        if serving.engine.holds or (world.client.settings.transfer.push and not has_caught_up(start, brake)):
            return False
    return True


def has_caught_up(start: int, brake: Brake) -> bool:
    """Whether a stage has done as many pieces as the one before it; a pass that is stopped is none yet."""
    if start == 0:
        return brake.passes[0] == PASSES
    before = STAGES[[first for first, _ in STAGES].index(start) - 1][0]
    done = brake.passes[before] - (before in brake.stopped)
    return brake.passes[start] >= done - done % PASSES_A_PIECE


def cancelled(world: World, session: Session, step: Any) -> None:
    step.cancel()


def closed(world: World, session: Session, step: Any) -> None:
    session.close()


def killed(world: World, session: Session, step: Any) -> None:
    world.on_loop(lambda: world.network.kill(world.client.peer_id))


@pytest.mark.parametrize(
    ("stage", "way"), [(0, cancelled), (1, cancelled), (3, cancelled), (1, closed), (1, killed)]
)
def test_a_prefill_that_is_broken_off_is_computed_no_further(
    world: World, monkeypatch: pytest.MonkeyPatch, way: Callable[..., None], stage: int
) -> None:
    other = world.swarm.model()
    brake = Brake(monkeypatch, stage, 7)
    session = world.model.session()
    with portal.lease() as lease:
        step = lease.start_task_soon(session.chain.step, PROMPT)
        assert brake.reached.wait(60)
        wait_until(lambda: stands_still(world, brake), "servers stand still")
        way(world, session, step)
        wait_until(lambda: all_is_withdrawn(world), "servers hear of it")
        passes = brake.passes.copy()
        brake.release()
        if way is closed:
            with pytest.raises(SessionError):
                step.result(60)
        session.close()
        wait_until(lambda: idle(world), "servers are idle")
    assert brake.passes == passes
    tokens = answer(other, *prompt(7), new_tokens=3)
    assert tokens.tolist() == answer(load_local(world.swarm.checkpoint), *prompt(7), new_tokens=3).tolist()


@pytest.mark.parametrize("world", [True], indirect=True, ids=["server-to-server"])
def test_a_session_that_is_closed_when_its_answers_have_come_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = step_module.run_pipeline
    session = world.model.session()

    async def run_and_close(*args: Any) -> None:
        await run(*args)
        session.chain.close()

    monkeypatch.setattr(step_module, "run_pipeline", run_and_close)
    with pytest.raises(SessionError, match="closed"):
        session.step(PROMPT)


def test_a_session_whose_step_was_cancelled_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch, 1, 7)
    with world.model.session() as session, portal.lease() as lease:
        step = lease.start_task_soon(session.chain.step, PROMPT)
        assert brake.reached.wait(60)
        step.cancel()
        brake.release()
        output = session.step(PROMPT[:, :40])
    with world.model.session() as session:
        assert torch.allclose(session.step(PROMPT[:, :40]), output, rtol=0, atol=1e-5)


def test_a_step_ends_at_the_deadline_that_its_user_set(
    tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_world(tiny_llama, replicas=1, step_deadline_s=0.3) as world:
        brake = Brake(monkeypatch, 1, 1)  # now that servers have measured themselves
        with (
            world.model.session() as session,
            pytest.raises(DeadlineError, match=r"step_deadline_s of 0.3 s"),
        ):
            session.step(PROMPT[:, :40])
        brake.release()
        wait_until(lambda: idle(world), "servers are idle")


def test_a_client_that_falls_silent_is_forgotten_after_a_while(tiny_llama: Checkpoint) -> None:
    """Its host is gone, and no connection ends by itself."""
    settings = ServerSettings().replace(idle_timeout_s=0.3, message_timeout_s=0.3)
    with a_world(tiny_llama, replicas=1, server_settings=settings) as world:
        session = world.model.session()
        session.step(PROMPT[:, :40])
        world.on_loop(lambda: world.network.hang(world.client.peer_id))
        wait_until(lambda: idle(world), "servers are idle")


def test_a_server_that_falls_silent_leaves_nothing_with_those_it_hands_on_to(tiny_llama: Checkpoint) -> None:
    """The stream between the two servers stays half open; the session it belongs to ends."""
    settings = ServerSettings().replace(idle_timeout_s=0.3, message_timeout_s=0.3)
    with a_world(tiny_llama, replicas=1, server_settings=settings) as world:
        session = world.model.session()
        session.step(PROMPT[:, :40])
        world.hang(world.in_use(0))
        others = servings(world)[1:]
        wait_until(lambda: all(map(holds_nothing, others)), "all is freed")
