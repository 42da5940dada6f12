"""What a server does with requests for training, good ones and others."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from swarmkit.models.execution.full_sequences import FullSequencePass, FullSequences
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.gradient_messages import (
    GRADIENT,
    Backward,
    BackwardDone,
    Forward,
    ForwardDone,
    GetCodecs,
    TakenCodecs,
    Working,
)
from swarmkit.net.protocol.messages import Fault, Open, Step
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.seam import Transport
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    PassLimits,
    PassTimes,
    ServedBefore,
    WaitingJob,
    WaitingStep,
    next_schedule,
)
from swarmkit.server.engine.work import BULK
from swarmkit.server.sessions.session_step import SessionStep
from swarmkit.server.training.activation_cache import ActivationCache, PassKey
from swarmkit.server.training.service import GradientService
from swarmkit.server.training.work import GradientWork, SliceTimes, row_groups

from ..models.tiny import gradient_of
from ..waiting import eventually
from .worlds import HIDDEN, START, STOP, TinyServer, World, frame, hidden_states, small_settings


class TrainingServer(TinyServer):
    """A tiny server with both halves of the protocol."""

    def __init__(self, world: World, engine: Engine | None = None, **settings: Any) -> None:
        super().__init__(world, small_settings(**settings), engine)
        service = self.service
        self.gradients = GradientService(
            world.stage,
            world.checkpoint.fingerprint,
            self.engine,
            small_settings(**settings),
            service.receive_budget,
            lambda: service.leaving,
            quota=self.quota,
        )

    async def start(self, *args: Any, **kwargs: Any) -> TrainingServer:
        await super().start(*args, **kwargs)
        await self.transport.listen(GRADIENT.endpoint, self.gradients.serve)
        return self

    async def line(self, transport: Transport | None = None) -> Line:
        transport = transport or await self.connect()
        stream = await transport.open(self.transport.peer_id, GRADIENT.endpoint, self.transport.addresses)
        return Line(MessageStream(stream, GRADIENT, 2**24), self.world.checkpoint.fingerprint)


class Line:
    """The client's half, with nothing between a test and the wire."""

    def __init__(self, conversation: MessageStream, fingerprint: str) -> None:
        self.conversation = conversation
        self.fingerprint = fingerprint

    async def answer(self) -> Any:
        while True:
            received = await self.conversation.receive()
            message: Any = received.message
            if isinstance(message, ForwardDone | BackwardDone):
                return received.tensor(message.hidden)
            if not isinstance(message, Working):
                return message

    async def ask(self, hidden: torch.Tensor, gradient: torch.Tensor | None = None, **fields: Any) -> Any:
        """A request, and its answer's tensor, or whatever else came."""
        tensors = [hidden, fields.pop("mask", None), fields.pop("positions", None)]
        encoded = [None if tensor is None else codec.encode(tensor) for tensor in tensors]
        specs = dict(zip(("hidden", "mask", "positions"), (one and one[0] for one in encoded), strict=True))
        payload = [one[1] for one in encoded if one is not None]
        fields = {"fingerprint": self.fingerprint, "start": START, "stop": STOP, **specs, **fields}
        if gradient is not None:
            spec, data = codec.encode(gradient)
            await self.conversation.send(Backward(**fields, gradient=spec), [*payload, data])
        else:
            await self.conversation.send(Forward(**fields), payload)
        return await self.answer()


@pytest.fixture
async def server(world: World) -> AsyncIterator[TrainingServer]:
    server = await TrainingServer(world).start()
    yield server
    await server.close()


@pytest.fixture
async def line(server: TrainingServer) -> Line:
    return await server.line()


# what it computes


async def test_forward_is_the_stages_own(world: World, line: Line) -> None:
    hidden = hidden_states(2, 5)
    found = await line.ask(hidden)
    assert torch.equal(found, world.stage.forward(hidden, world.stage.new_cache(START, STOP)))


async def test_backward_is_the_stages_own(world: World, line: Line) -> None:
    hidden, gradient = hidden_states(2, 5), hidden_states(2, 5, 1)
    mask = torch.ones(2, 5, dtype=torch.uint8)
    mask[0, :2] = 0
    wanted = gradient_of(world.stage, hidden, gradient, START, STOP, attention_mask=mask)
    assert torch.equal(await line.ask(hidden, gradient, mask=mask), wanted)


async def test_states_of_a_part_of_the_blocks(world: World, line: Line) -> None:
    hidden = hidden_states(2, 5)
    states = await line.ask(hidden, start=2, states=True)
    assert torch.equal(states[0], await line.ask(hidden, start=2, stop=3))
    assert torch.equal(states[1], await line.ask(hidden, start=2))


async def test_rows_in_groups_are_the_rows_together(world: World) -> None:
    server = await TrainingServer(world, prefill_chunk_tokens=5).start()
    line = await server.line()
    hidden, gradient = hidden_states(3, 4), hidden_states(3, 4, 1)
    wanted = gradient_of(world.stage, hidden, gradient, START, STOP)
    torch.testing.assert_close(await line.ask(hidden, gradient), wanted, rtol=1e-5, atol=1e-5)
    await server.close()


# what it keeps for the way back


@pytest.fixture
def forward_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each piece had that was run forward."""
    pieces: list[int] = []
    run = FullSequencePass.advance

    def counted(one: FullSequencePass, blocks: int) -> int:
        goes_forward = bool(one.blocks_left)
        done = run(one, blocks)
        if goes_forward:
            pieces.append(done)
        return done

    monkeypatch.setattr(FullSequencePass, "advance", counted)
    return pieces


@pytest.mark.parametrize("states", [False, True], ids=["output", "states"])
async def test_the_way_back_of_what_is_kept_is_the_same_and_half_as_long(
    server: TrainingServer, line: Line, forward_blocks: list[int], states: bool
) -> None:
    hidden = hidden_states(2, 5)
    gradient = hidden_states(2, 5, 1)
    if states:
        gradient = gradient.expand(STOP - START, -1, -1, -1).contiguous()
    mask = torch.ones(2, 5, dtype=torch.uint8)
    mask[0, :2] = 0
    wanted = await line.ask(hidden, gradient, mask=mask, states=states)
    forward_blocks.clear()
    output = await line.ask(hidden, mask=mask, states=states, returns=True)
    assert server.gradients.kept.nbytes
    found = await line.ask(hidden, gradient, mask=mask, states=states)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # pieces may be larger by now
    assert torch.equal(output, await line.ask(hidden, mask=mask, states=states))
    assert sum(forward_blocks) == 2 * (STOP - START)  # there, and there again without a way back
    assert not server.gradients.kept.nbytes


async def test_rows_in_groups_are_kept_too(world: World, forward_blocks: list[int]) -> None:
    server = await TrainingServer(world, prefill_chunk_tokens=5).start()
    line = await server.line()
    hidden, gradient = hidden_states(3, 4), hidden_states(3, 4, 1)
    wanted = await line.ask(hidden, gradient)
    forward_blocks.clear()
    await line.ask(hidden, returns=True)
    assert torch.equal(await line.ask(hidden, gradient), wanted)
    assert sum(forward_blocks) == 3 * (STOP - START)
    await server.close()


async def test_the_way_back_is_gone_once(line: Line, forward_blocks: list[int]) -> None:
    hidden, gradient = hidden_states(2, 5), hidden_states(2, 5, 1)
    await line.ask(hidden, returns=True)
    first = await line.ask(hidden, gradient)
    assert torch.equal(await line.ask(hidden, gradient), first)
    assert sum(forward_blocks) == 2 * (STOP - START)


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": hidden_states(2, 5, 7)},
        {"mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.uint8)},
        {"start": START + 1},
    ],
    ids=["hidden states", "mask", "blocks"],
)
async def test_another_request_does_not_get_it(
    server: TrainingServer, line: Line, other: dict[str, Any], forward_blocks: list[int]
) -> None:
    hidden, gradient = hidden_states(2, 5), hidden_states(2, 5, 1)
    await line.ask(hidden, returns=True)
    forward_blocks.clear()
    await line.ask(**{"hidden": hidden, **other}, gradient=gradient)
    assert sum(forward_blocks) == STOP - other.get("start", START)
    assert server.gradients.kept.nbytes


async def test_another_client_does_not_get_it(
    server: TrainingServer, line: Line, forward_blocks: list[int]
) -> None:
    hidden, gradient = hidden_states(2, 5), hidden_states(2, 5, 1)
    await line.ask(hidden, returns=True)
    await (await server.line()).ask(hidden, gradient)
    assert sum(forward_blocks) == 2 * (STOP - START)


async def test_a_forward_pass_without_a_way_back_keeps_nothing(server: TrainingServer, line: Line) -> None:
    await line.ask(hidden_states(2, 5))
    assert not server.gradients.kept.nbytes


async def test_where_there_is_no_room_the_newcomer_is_not_kept(
    world: World, forward_blocks: list[int]
) -> None:
    probe = await TrainingServer(world).start()
    await (await probe.line()).ask(hidden_states(2, 5), returns=True)
    one = probe.gradients.kept.nbytes
    await probe.close()
    server = await TrainingServer(world, activation_cache_bytes=int(2.5 * one)).start()
    line = await server.line()
    for seed in range(3):
        await line.ask(hidden_states(2, 5, seed), returns=True)
    assert server.gradients.kept.nbytes == 2 * one
    forward_blocks.clear()
    for seed in range(3):
        await line.ask(hidden_states(2, 5, seed), hidden_states(2, 5))
    assert sum(forward_blocks) == STOP - START
    await server.close()


async def test_what_does_not_fit_is_not_kept(world: World) -> None:
    server = await TrainingServer(world, activation_cache_bytes=100).start()
    line = await server.line()
    hidden, gradient = hidden_states(2, 5), hidden_states(2, 5, 1)
    output = await line.ask(hidden, returns=True)
    assert torch.equal(output, await line.ask(hidden))
    assert not server.gradients.kept.nbytes
    assert torch.equal(
        await line.ask(hidden, gradient), gradient_of(world.stage, hidden, gradient, START, STOP)
    )
    await server.close()


def test_what_waits_for_too_long_is_forgotten(world: World) -> None:
    now = [0.0]
    kept = ActivationCache(2**30, seconds=60.0, clock=lambda: now[0])
    one = FullSequencePass(world.stage, FullSequences(hidden_states(2, 5), START, STOP), keeps=True)
    while one.left:
        one.advance(1)
    old, new = PassKey("client", b"old"), PassKey("client", b"new")
    kept.keep(old, [one])
    now[0] = 59.0
    kept.keep(new, [one])
    now[0] = 60.0
    kept.drop_old()
    assert kept.take(old) is None
    assert kept.take(new) == [one]


def test_row_groups_are_as_equal_as_can_be() -> None:
    assert row_groups(7, 10, 30) == [(0, 2), (2, 4), (4, 7)]
    assert row_groups(2, 100, 30) == [(0, 1), (1, 2)]


def test_a_slice_has_as_many_blocks_as_its_time_allows() -> None:
    times = SliceTimes(0.1)
    assert times.blocks(100, goes_back=True) == 1  # nothing is known yet
    times.learn("forward", 1000, 0.1)
    assert times.blocks(100, goes_back=False) == 10
    assert times.blocks(100, goes_back=True) == 1
    times.learn("backward", 1000, 0.2)
    assert times.blocks(100, goes_back=True) == 5
    assert times.blocks(10**6, goes_back=True) == 1


# who has priority


def test_a_slice_waits_for_decode_steps_but_not_for_ever() -> None:
    step = WaitingStep(0, ServedBefore(), 1, 1, True, 0.0, 0)
    limits, times = PassLimits(512, 1.9), PassTimes()

    def turn(passed_over: int, steps: list[WaitingStep]) -> Any:
        return next_schedule(steps, [WaitingJob(0, True, passed_over)], ExpectedArrivals(), times, limits)

    assert turn(0, []).job == 0
    assert turn(15, [step]).job is None
    assert turn(16, [step]).job == 0


async def test_a_decode_step_runs_between_two_slices(
    server: TrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, line = await server.session(), await server.line()
    await session.step(hidden_states(1, 1))
    order: list[str] = []
    begun, may_go_on = threading.Event(), threading.Event()
    original = GradientWork.advance

    def advance(work: GradientWork) -> None:
        order.append("slice")
        original(work)
        if len(order) == 1:
            begun.set()
            may_go_on.wait(60)

    prepare = SessionStep.prepare

    def prepare_step(step: SessionStep) -> Any:
        order.append("step")
        return prepare(step)

    monkeypatch.setattr(GradientWork, "advance", advance)
    monkeypatch.setattr(SessionStep, "prepare", prepare_step)
    training = asyncio.create_task(line.ask(hidden_states(2, 4), hidden_states(2, 4, 1)))
    await asyncio.to_thread(begun.wait, 60)
    step = asyncio.create_task(session.step(hidden_states(1, 1)))
    await eventually(lambda: server.engine.waiting, "the step waits in the engine")
    may_go_on.set()
    await step
    assert order[:2] == ["slice", "step"]
    assert (await training).shape == (2, 4, HIDDEN)
    assert order.count("slice") >= 2


async def test_requests_of_one_client_are_done_one_after_the_other(
    server: TrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    original = GradientWork.advance

    def advance(work: GradientWork) -> None:
        order.append(work.request.hidden.shape[1])
        original(work)

    monkeypatch.setattr(GradientWork, "advance", advance)
    first = await server.line()
    transport = server.transports[-1]
    stream = await transport.open(server.transport.peer_id, GRADIENT.endpoint, server.transport.addresses)
    second = Line(MessageStream(stream, GRADIENT, 2**24), first.fingerprint)
    await asyncio.gather(first.ask(hidden_states(1, 3)), second.ask(hidden_states(1, 4)))
    assert order == sorted(order)


# what it refuses


def poisoned(value: float) -> torch.Tensor:
    tensor = hidden_states(2, 3)
    tensor[1, 2, 3] = value
    return tensor


GOOD = hidden_states(2, 3)
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "another model": ("wrong_model", "0123", {"fingerprint": "0123456789abcdef" * 2}),
    "blocks before": ("blocks_not_held", "0:4 are not inside the served 1:4", {"start": 0}),
    "blocks behind": ("blocks_not_held", "1:5", {"stop": 5}),
    "no blocks": ("blocks_not_held", "2:2", {"start": 2, "stop": 2}),
    "two dimensions": ("bad_shape", r"got \[2, 32\]", {"hidden": torch.zeros(2, HIDDEN)}),
    "too narrow": ("bad_shape", r"got \[2, 3, 31\]", {"hidden": torch.zeros(2, 3, 31)}),
    "no rows": ("bad_shape", r"\[0, 3, 32\]", {"hidden": torch.zeros(0, 3, HIDDEN)}),
    "integers": ("bad_dtype", "int64", {"hidden": torch.zeros(2, 3, HIDDEN, dtype=torch.int64)}),
    "too many tokens": ("too_large", "2 x 9 tokens.*16 of one request", {"hidden": hidden_states(2, 9)}),
    "NaN": ("not_finite", "hidden states contain NaN", {"hidden": poisoned(float("nan"))}),
    "infinity": ("not_finite", "hidden states contain NaN", {"hidden": poisoned(float("-inf"))}),
    "a gradient of NaN": ("not_finite", "the gradient contains NaN", {"gradient": poisoned(float("nan"))}),
    "an infinite gradient": ("not_finite", "the gradient contains", {"gradient": poisoned(float("inf"))}),
    "a gradient of another shape": (
        "bad_shape",
        r"gradient must be \[2, 3, 32\], got \[2, 2, 32\]",
        {"gradient": hidden_states(2, 2)},
    ),
    "a gradient of one block for all": (
        "bad_shape",
        r"gradient must be \[3, 2, 3, 32\]",
        {"gradient": GOOD, "states": True},
    ),
    "a gradient of integers": (
        "bad_dtype",
        "gradient.*int64",
        {"gradient": torch.zeros(2, 3, HIDDEN, dtype=torch.int64)},
    ),
    "a mask too long": ("bad_shape", r"mask must be \[2, 3\]", {"mask": torch.ones(2, 4, dtype=torch.uint8)}),
    "a mask of floats": ("bad_dtype", "mask.*float32", {"mask": torch.ones(2, 3)}),
    "a mask of 2": ("bad_value", "0 and 1", {"mask": torch.full((2, 3), 2, dtype=torch.uint8)}),
    "positions of one row": (
        "bad_shape",
        r"positions must be \[2, 3\]",
        {"positions": torch.zeros(1, 3).long()},
    ),
    "negative positions": ("bad_value", "position ids", {"positions": torch.full((2, 3), -1)}),
    "huge positions": ("bad_value", "position ids", {"positions": torch.full((2, 3), 2**24)}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_wrong_is_named_and_the_next_request_is_served(line: Line, name: str) -> None:
    code, says, fields = REFUSED[name]
    hidden = fields.get("hidden", GOOD)
    rest = {key: value for key, value in fields.items() if key not in ("hidden", "gradient")}
    fault = await line.ask(hidden, fields.get("gradient"), **rest)
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert re.search(says, fault.message), fault.message
    assert (await line.ask(GOOD)).shape == GOOD.shape


async def test_only_the_codecs_that_the_owner_permits_are_said_and_taken(world: World) -> None:
    server = await TrainingServer(world, codecs=("bfloat16",)).start()
    try:
        line = await server.line()
        await line.conversation.send(GetCodecs())
        assert await line.answer() == TakenCodecs(("bfloat16",))
        fault = await line.ask(GOOD, answer="int8")
        assert (fault.code, "none, bfloat16 here, not as int8" in fault.message) == ("bad_dtype", True)
        exact = await line.ask(GOOD)
        assert torch.equal(await line.ask(GOOD, answer="bfloat16"), codec.passed(exact, "bfloat16"))
    finally:
        await server.close()


SPEC = TensorSpec((1, 1, HIDDEN), "float32")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Open("0123456789abcdef" * 2, START, STOP, 8), "bad_message"),  # of another endpoint
        (Step(0, SPEC, 1), "bad_message"),
        (Working(1, 2), "illegal_message"),
        (ForwardDone(SPEC, 0.0, 0.0), "illegal_message"),
        (Fault("internal", "you are broken"), "illegal_message"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_client_may_not_say_ends_the_stream(line: Line, message: Any, code: str) -> None:
    nbytes = sum(spec.nbytes for spec in (getattr(message, "hidden", None),) if spec)
    await line.conversation.stream.send(frame(message, bytes(nbytes)))
    fault = await line.answer()
    assert (type(fault), fault.code) == (Fault, code)


async def test_a_failure_of_its_own_disturbs_nobody_else(
    server: TrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, line = await server.session(), await server.line()
    original = GradientWork.advance
    monkeypatch.setattr(GradientWork, "advance", lambda work: 1 / 0)
    fault = await line.ask(GOOD)
    assert (type(fault), fault.code) == (Fault, "internal")
    monkeypatch.setattr(GradientWork, "advance", original)
    assert (await session.step(hidden_states(1, 1))).shape == (1, 1, HIDDEN)
    assert (await (await server.line()).ask(GOOD)).shape == GOOD.shape


async def test_a_server_that_leaves_takes_no_more(server: TrainingServer, line: Line) -> None:
    server.service.leaving = True
    fault = await line.ask(GOOD)
    assert (type(fault), fault.code) == (Fault, "leaving")


async def test_a_client_that_goes_away_leaves_nothing(server: TrainingServer) -> None:
    line = await server.line()
    gate = threading.Event()
    blocking = asyncio.create_task(server.engine.run(lambda: gate.wait(60), BULK))
    asking = asyncio.create_task(line.ask(GOOD))
    await eventually(lambda: server.gradients.waiting, "the request waits")
    asking.cancel()
    line.conversation.close()
    gate.set()
    await blocking
    await eventually(lambda: not (server.gradients.streams or server.gradients.waiting), "the stream ends")
    assert server.used() == (0, 0, 0)


async def test_of_one_clients_requests_few_are_received_at_a_time(world: World) -> None:
    large = hidden_states(160, 64)  # of more than a megabyte, which takes room
    server = await TrainingServer(world, max_step_tokens=160 * 64).start()
    gate = threading.Event()
    blocking = asyncio.create_task(server.engine.run(lambda: gate.wait(60), BULK))
    greedy = await server.join()
    lines = [await server.line(greedy) for _ in range(8)]
    asking = [asyncio.create_task(line.ask(large)) for line in lines]
    await eventually(lambda: server.gradients.waiting == 8, "all requests have come")
    held = server.service.receive_budget
    await eventually(lambda: held.held_bytes == 4 * large.nbytes, "four are received")
    asking.append(asyncio.create_task((await server.line()).ask(large)))
    await eventually(lambda: held.held_bytes == 5 * large.nbytes, "another client's is, too")
    gate.set()
    await blocking
    assert all(isinstance(answer, torch.Tensor) for answer in await asyncio.gather(*asking))
    await server.close()
