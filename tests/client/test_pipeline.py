"""Long prompts go through linked servers in pieces, and what fails half-way is done again from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from swarmkit.client.session.pipeline import pieces
from swarmkit.client.session.replica import StageReplica
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.protocol.messages import Step
from swarmkit.server.sessions.push import Downstream
from swarmkit.server.sessions.service import BlockService

from .answers import answer, prompt
from .recovery import World, a_world

PROMPT = 130

# how a step is cut


@pytest.mark.parametrize(
    ("low", "high", "stages", "most", "wanted"),
    [
        (0, 1, 4, 4096, [(0, 1)]),
        (0, 30, 4, 4096, [(0, 30)]),
        (7, 70, 2, 4096, [(7, 32), (32, 64), (64, 70)]),
        (0, 1024, 2, 4096, [(start, start + 128) for start in range(0, 1024, 128)]),
        (0, 8192, 2, 4096, [(start, start + 512) for start in range(0, 8192, 512)]),
        (0, 100, 1, 4096, [(0, 100)]),
        (0, 100, 1, 60, [(0, 32), (32, 64), (64, 96), (96, 100)]),
        (0, 50, 3, 16, [(0, 16), (16, 32), (32, 48), (48, 50)]),
    ],
)
def test_how_a_step_is_cut(
    low: int, high: int, stages: int, most: int, wanted: list[tuple[int, int]]
) -> None:
    assert pieces(low, high, stages, most) == wanted


# over servers


@pytest.fixture(scope="module")
def wanted(tiny_llama: Checkpoint) -> Tensor:
    return answer(load_local(tiny_llama), prompt(PROMPT)[0], new_tokens=4)


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama) as world:
        yield world


def generated(world: World) -> Tensor:
    tokens: Tensor = answer(world.model, prompt(PROMPT)[0], new_tokens=4)
    return tokens


def test_all_stages_get_a_long_prompt_in_pieces(world: World, wanted: Tensor) -> None:
    assert torch.equal(generated(world), wanted)
    steps = [world.server(hop.peer_id).serving.sessions.steps for hop in world.model.trace[0].hops]  # type: ignore[union-attr]
    assert steps == [5 + 3] * 3  # 130 tokens in pieces of 32, then three tokens


def test_only_the_first_server_is_sent_anything(
    world: World, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = StageReplica.send

    async def noted(stage: StageReplica, *rest: Any) -> None:
        sent.append(stage.hop.start)
        await send(stage, *rest)

    monkeypatch.setattr(StageReplica, "send", noted)
    assert torch.equal(generated(world), wanted)
    assert set(sent) == {0}


def slowly(value: int) -> Any:
    """A cell between others of its kind."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("piece", [0, slowly(1), 2, slowly(3), 4])
def test_a_server_dies_in_the_midst_of_the_pieces(
    world: World, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, stage: int, piece: int
) -> None:
    start, run, seen = (0, 1, 3)[stage], BlockService.take_step, 0

    async def dying(
        service: BlockService, client: Any, session: Any, incoming: Any, *rest: Any, **more: Any
    ) -> None:
        nonlocal seen
        if session.start == start:
            seen += 1
            if seen == piece + 1:
                node = next(s.node for s in world.swarm.servers if s.serving.sessions is service)  # type: ignore[union-attr]
                node.crash()
        await run(service, client, session, incoming, *rest, **more)

    monkeypatch.setattr(BlockService, "take_step", dying)
    assert torch.equal(generated(world), wanted)
    assert len(world.lost()) == 1, [str(event) for event in world.model.events]


# over servers that do not do what they say


def pushing(monkeypatch: pytest.MonkeyPatch, at: int, push: Any) -> None:
    """Have each server's push number `at` done by `push(downstream, step, received, spec, output)`."""
    honest, seen = Downstream.push, {}

    async def maybe(self: Downstream, step: Step, received: Any, spec: Any, output: Any) -> bool:
        seen[self] = seen.get(self, 0) + 1
        if seen[self] == at:
            result: bool = await push(honest, self, step, received, spec, output)
            return result
        return await honest(self, step, received, spec, output)

    monkeypatch.setattr(Downstream, "push", maybe)


async def admits_it(honest: Any, self: Downstream, *rest: Any) -> bool:
    return False


async def spoils_it(
    honest: Any, self: Downstream, step: Step, received: Any, spec: Any, output: memoryview
) -> bool:
    result: bool = await honest(self, step, received, spec, b"\xff" * output.nbytes)  # NaN
    return result


async def says_it_twice(honest: Any, self: Downstream, *rest: Any) -> bool:
    await honest(self, *rest)
    result: bool = await honest(self, *rest)
    return result


async def says_it_wrongly(
    honest: Any, self: Downstream, step: Step, received: Any, spec: Any, output: memoryview
) -> bool:
    wrong = msgspec.structs.replace(step, position=step.position + 1)
    result: bool = await honest(self, wrong, received, spec, output)
    return result


@pytest.mark.parametrize("at", [1, slowly(3), 6, slowly(7)])
@pytest.mark.parametrize("push", [admits_it, spoils_it, says_it_twice, says_it_wrongly])
def test_what_was_not_pushed_as_it_should_is_sent_by_the_client(
    world: World, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, push: Any, at: int
) -> None:
    pushing(monkeypatch, at, push)
    assert torch.equal(generated(world), wanted)
    assert world.lost() == [], [str(event) for event in world.model.events]


async def keeps_it(honest: Any, self: Downstream, *rest: Any) -> bool:
    return True


@pytest.mark.parametrize("at", [1, 4])
def test_a_piece_that_was_not_pushed_is_missed_at_the_next(
    world: World, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    pushing(monkeypatch, at, keeps_it)
    assert torch.equal(generated(world), wanted)
    assert world.lost() == [], [str(event) for event in world.model.events]


@pytest.mark.parametrize("at", [5, 7], ids=["last piece", "second token"])
def test_a_server_that_keeps_what_it_says_it_pushed_is_not_relied_on_again(
    tiny_llama: Checkpoint, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with a_world(tiny_llama, min_step_timeout_s=0.5, first_step_timeout_s=0.5, stages=2) as world:
        pushing(monkeypatch, at, keeps_it)
        assert torch.equal(generated(world), wanted)
        first, second = (world.server(hop.peer_id) for hop in world.model.trace[-1].hops)
        silent = next(s for s in world.swarm.servers if s.peer_id == world.lost()[0])
        assert silent.blocks == second.blocks
        served = {server.peer_id: server for server in world.client.known.servers()}
        assert not world.client.routes.may_link(served[first.peer_id], served[silent.peer_id])
