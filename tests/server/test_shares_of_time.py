"""A client beside a stranger that takes all of a server's time that it can get, in virtual time.

Passes over steps of several sessions take longer than the scheduler can know, by chance: in the world the
stranger's messages come and go meanwhile, and other programs run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest

from swarmkit.models.execution.stage import StepPart
from swarmkit.net.transport.seam import Transport
from swarmkit.server.engine.engine import Engine
from swarmkit.server.training.work import GradientWork
from swarmkit.simulation.virtual_time import VirtualClock, VirtualTimeLoop

from ..takers import MAX_LENGTH, Taking, a_gradient, a_prompt, a_session
from ..virtual_time import VirtualWorker
from .test_fair_shares import taking, target_of
from .test_gradients import TrainingServer
from .worlds import MAX_STEP_TOKENS, World, hidden_states

TOKEN = hidden_states(1, 1)
ONE_S, EACH_MORE_S = 0.006, 0.0013
"""A pass over the step of one session, and over one more."""
MOST_NOISE = 2.5
"""So many times as long may a pass take if several sessions have a part in it, and not less."""
PROMPT_S, PROMPT_TOKEN_S = 0.004, 0.0002
"""What a pass takes longer with a prompt in it, which has it take another way through a processor, and with
each token of that."""
PROMPT_TOKENS = 512
JOB_S = 0.05
AWAY_S = 0.0025
SESSIONS = 40
ANSWER_TOKENS = 60
WINDOW_S = 4.0


@pytest.fixture
def timed(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which passes and slices of training take virtual time."""
    chance = random.Random(0)
    forward_many, advance = world.stage.forward_many, GradientWork.advance

    def spend(seconds: float) -> None:
        assert VirtualWorker.running is not None
        VirtualWorker.running.spend(seconds)

    def timed_forward(parts: Sequence[StepPart]) -> Any:
        noise = 1 + MOST_NOISE * chance.random() if len(parts) > 1 else 1.0
        tokens = sum(part.hidden.shape[1] - 1 for part in parts)
        prompt_s = PROMPT_S + PROMPT_TOKEN_S * tokens if tokens else 0.0
        spend((ONE_S + EACH_MORE_S * (len(parts) - 1)) * noise + prompt_s)
        return forward_many(parts)

    def timed_advance(work: GradientWork) -> None:
        spend(JOB_S)
        advance(work)

    monkeypatch.setattr(world.stage, "forward_many", timed_forward)
    monkeypatch.setattr(GradientWork, "advance", timed_advance)
    return world


async def tokens_in_window(server: TrainingServer, transport: Transport) -> int:
    """How many tokens a client gets in some seconds, in one session after the other."""
    loop = asyncio.get_running_loop()
    began, tokens = loop.time(), 0
    for _ in range(round(WINDOW_S / (ANSWER_TOKENS * AWAY_S))):
        if loop.time() >= began + WINDOW_S:
            break
        client = await server.session(transport)
        for _ in range(ANSWER_TOKENS):
            await client.step(TOKEN)
            tokens += loop.time() < began + WINDOW_S
            await anyio.sleep(AWAY_S)
        client.conversation.close()
    return tokens


async def client_beside(world: World, one: Taking, number: int) -> tuple[int, int, int]:
    """The tokens of a client alone and beside a stranger, and what the stranger has had meanwhile."""
    clock = VirtualClock(asyncio.get_running_loop())
    engine = Engine("test", clock=clock, worker=VirtualWorker("test", clock))
    limits = {"max_session_length": MAX_LENGTH, "max_step_tokens": PROMPT_TOKENS}
    server = TrainingServer(world, engine, max_sessions=SESSIONS + 8, **limits)
    await server.start()
    client = await server.join()
    alone = await tokens_in_window(server, client)
    target = replace(target_of(server), step_tokens=PROMPT_TOKENS if one is a_prompt else MAX_STEP_TOKENS)
    async with taking(target, one, number):
        await anyio.sleep(1.0)
        before = server.service.steps + server.gradients.requests
        beside = await tokens_in_window(server, client)
        strangers = server.service.steps + server.gradients.requests - before - beside
    for transport in server.transports:
        await transport.close()
    engine.close()
    return alone, beside, strangers


def in_virtual_time(world: World, one: Taking, number: int) -> tuple[int, int, int]:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(client_beside(world, one, number))


@pytest.mark.parametrize(("one", "number"), [(a_session, SESSIONS), (a_prompt, 16), (a_gradient, 8)])
def test_a_client_beside_a_stranger_keeps_half_of_its_tokens(timed: World, one: Taking, number: int) -> None:
    alone, beside, strangers = in_virtual_time(timed, one, number)
    assert beside >= alone / 2
    assert strangers > 0
