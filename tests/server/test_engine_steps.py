"""Steps on the engine: run together, in chunks, and each to its own end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.models.execution.stage import StepPart
from swarmkit.net.transport.shares import NOBODY, Holder
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import EngineClosedError, ExpiredError

from ..waiting import eventually

CHUNK = 32
LONG = 5 * CHUNK


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine("test", prefill_chunk_tokens=CHUNK)
    yield engine
    await asyncio.to_thread(engine.close)


class FakeCache:
    """Holds a number of tokens."""

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens

    def rewind(self, tokens: int) -> None:
        self.tokens = tokens


class FakeStage:
    """Adds one to everything, and tells what it was given; each pass may be held up."""

    device = torch.device("cpu")
    attention_cost = AttentionCost()

    def __init__(self) -> None:
        self.passes: list[list[StepPart]] = []
        self.bad: Callable[[StepPart], BaseException | None] = lambda part: None
        self._let_through = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._held = False

    def hold(self) -> None:
        """From now on each pass waits until it is let through."""
        self._held = True

    async def entered(self) -> None:
        """Wait for the next pass to begin."""
        await asyncio.to_thread(self._entered.acquire)

    def let_through(self, passes: int = 1000) -> None:
        self._let_through.release(passes)

    def forward_many(self, parts: Sequence[StepPart]) -> list[Any]:
        self.passes.append(list(parts))
        if self._held:
            self._entered.release()
            self._let_through.acquire()
        return [self._forward(part) for part in parts]

    def _forward(self, part: StepPart) -> Any:
        error = self.bad(part)
        if isinstance(error, Exception):
            return error
        if error is not None:
            raise error
        part.cache.tokens += part.hidden.shape[1]
        return part.hidden + 1

    @property
    def tokens(self) -> list[list[int]]:
        """Of each part of each pass."""
        return [[part.hidden.shape[1] for part in parts] for parts in self.passes]


class FakeStep:
    """A step of one session."""

    def __init__(self, stage: FakeStage, tokens: int = 1, *, rows: int = 1, client: Holder = NOBODY) -> None:
        self.stage: Any = stage
        self.client = client
        self.session = object()
        self.shape = (rows, tokens)
        self.past = 7
        self.cache: Any = FakeCache(self.past)
        self.hidden = torch.randn(rows, tokens, 2)
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.begun = 0
        self.refusal: BaseException | None = None
        self.last_words: BaseException | None = None
        self.cached_output: Tensor | None = None
        self.seen_afterwards: Tensor | None = None

    def prepare(self) -> StepPart:
        self.begun += 1
        if self.refusal is not None:
            raise self.refusal
        return StepPart(self.hidden, self.cache, self.mask, self.positions)

    def result(self, output: Tensor) -> Tensor:
        if self.last_words is not None:
            raise self.last_words
        return output

    def after_result(self, output: Tensor) -> None:
        self.seen_afterwards = output


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()


async def while_held(engine: Engine, stage: FakeStage, *steps: FakeStep) -> list[asyncio.Task[Any]]:
    """Let all of these wait while something else is under way."""
    stage.hold()
    first = asyncio.create_task(engine.step(FakeStep(stage)))
    await stage.entered()
    tasks = [asyncio.create_task(engine.step(step)) for step in steps]
    await eventually(lambda: engine.waiting >= len(steps), "all steps wait")
    stage.let_through(1)
    await first
    return tasks


# together and in chunks


async def test_a_step_gives_its_result(engine: Engine, stage: FakeStage) -> None:
    step = FakeStep(stage, tokens=3, rows=2)
    assert torch.equal((await engine.step(step)).value, step.hidden + 1)


async def test_waiting_and_running_are_timed_apart(engine: Engine, stage: FakeStage) -> None:
    timed = await engine.step(FakeStep(stage))
    assert timed.queue_s >= 0
    assert timed.compute_s >= 0


async def test_steps_that_wait_together_run_in_one_pass(engine: Engine, stage: FakeStage) -> None:
    steps = [FakeStep(stage, tokens) for tokens in (1, 4, 2)]
    tasks = await while_held(engine, stage, *steps)
    stage.let_through()
    results = [timed.value for timed in await asyncio.gather(*tasks)]
    assert stage.tokens == [[1], [1, 4, 2]]
    assert all(torch.equal(result, step.hidden + 1) for result, step in zip(results, steps, strict=True))


async def test_steps_of_different_stages_do_not_share_a_pass(engine: Engine, stage: FakeStage) -> None:
    other = FakeStage()
    tasks = await while_held(engine, stage, FakeStep(stage), FakeStep(other))
    stage.let_through()
    await asyncio.gather(*tasks)
    assert (stage.tokens, other.tokens) == ([[1], [1]], [[1]])


async def test_what_one_stage_takes_is_not_taken_for_anothers(engine: Engine, stage: FakeStage) -> None:
    other = FakeStage()
    await engine.step(FakeStep(stage))
    await eventually(lambda: engine.learned_of(stage).times.of(1) > 0, "the time of the pass is learned")
    assert engine.learned_of(other).times.of(1) == 0


async def test_the_times_of_a_stage_are_forgotten_with_it(engine: Engine) -> None:
    stage = FakeStage()
    await engine.step(FakeStep(stage))
    times = weakref.ref(engine.learned_of(stage).times)
    del stage
    gc.collect()
    assert times() is None


async def test_a_long_step_runs_in_chunks(engine: Engine, stage: FakeStage) -> None:
    step = FakeStep(stage, 2 * CHUNK + 5)
    timed = await engine.step(step)
    assert stage.tokens == [[CHUNK], [CHUNK], [5]]
    assert torch.equal(timed.value, step.hidden + 1)


async def test_each_chunk_has_the_mask_and_positions_up_to_its_end(engine: Engine, stage: FakeStage) -> None:
    step = FakeStep(stage, 2 * CHUNK)
    step.mask = torch.arange(7 + 2 * CHUNK)[None]
    step.positions = torch.arange(2 * CHUNK)[None]
    await engine.step(step)
    _, (second,) = stage.passes
    assert second.attention_mask is not None
    assert second.position_ids is not None
    assert second.attention_mask.tolist() == [list(range(7 + 2 * CHUNK))]
    assert second.position_ids.tolist() == [list(range(CHUNK, 2 * CHUNK))]


async def test_what_decoding_took_is_counted_and_prompts_are_not(engine: Engine, stage: FakeStage) -> None:
    learned = engine.learned_of(stage)
    await engine.step(FakeStep(stage, 64))
    before = learned.decode_s
    await engine.step(FakeStep(stage))
    await eventually(lambda: learned.decode_s > 0, "the time of the step is counted")
    assert before == 0.0


async def test_a_decode_step_is_done_before_a_long_one_that_began_earlier(
    engine: Engine, stage: FakeStage
) -> None:
    stage.hold()
    long = asyncio.create_task(engine.step(FakeStep(stage, LONG)))
    await stage.entered()
    decode = asyncio.create_task(engine.step(FakeStep(stage)))
    await eventually(lambda: engine.waiting, "the step waits")
    stage.let_through(2)
    await decode
    assert not long.done()
    stage.let_through()
    await long


# a step that fails


async def test_a_step_that_is_refused_fails_alone(engine: Engine, stage: FakeStage) -> None:
    good, bad = FakeStep(stage), FakeStep(stage)
    bad.refusal = ValueError("not finite")
    tasks = await while_held(engine, stage, bad, good)
    stage.let_through()
    failed, timed = await asyncio.gather(*tasks, return_exceptions=True)
    assert failed is bad.refusal
    assert torch.equal(timed.value, good.hidden + 1)


async def test_a_step_that_fails_in_the_pass_fails_alone(engine: Engine, stage: FakeStage) -> None:
    good, bad = FakeStep(stage), FakeStep(stage)
    error = ValueError("does not fit")
    stage.bad = lambda part: error if part.cache is bad.cache else None
    tasks = await while_held(engine, stage, bad, good)
    stage.let_through()
    failed, timed = await asyncio.gather(*tasks, return_exceptions=True)
    assert failed is error
    assert torch.equal(timed.value, good.hidden + 1)


@pytest.mark.parametrize("error", [MemoryError("out of memory"), SystemExit(1)], ids=["error", "exit"])
async def test_a_long_step_that_fails_leaves_the_cache_as_it_began(
    engine: Engine, stage: FakeStage, error: BaseException
) -> None:
    step = FakeStep(stage, LONG)
    stage.bad = lambda part: error if part.cache.tokens > 2 * CHUNK else None
    with pytest.raises(type(error)):
        await engine.step(step)
    assert (len(stage.passes), step.cache.tokens) == (3, 7)


async def test_an_output_that_cannot_be_sent_leaves_the_cache_as_it_began(
    engine: Engine, stage: FakeStage
) -> None:
    step = FakeStep(stage, LONG)
    step.last_words = ValueError("cannot be encoded")
    with pytest.raises(ValueError, match="encoded"):
        await engine.step(step)
    assert step.cache.tokens == 7


async def test_the_engine_goes_on_after_a_pass_that_broke(engine: Engine, stage: FakeStage) -> None:
    stage.bad = lambda part: SystemExit(1)
    with pytest.raises(SystemExit):
        await engine.step(FakeStep(stage))
    stage.bad = lambda part: None
    assert (await engine.step(FakeStep(stage))).value is not None


# cancelling


async def test_a_step_that_is_cancelled_before_its_turn_never_begins(
    engine: Engine, stage: FakeStage
) -> None:
    step, other = FakeStep(stage), FakeStep(stage)
    stage.hold()
    first = asyncio.create_task(engine.step(FakeStep(stage)))
    await stage.entered()
    cancelled, kept = (asyncio.create_task(engine.step(one)) for one in (step, other))
    await eventually(lambda: engine.waiting >= 2, "both steps wait")
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    stage.let_through()
    await asyncio.gather(first, kept)
    assert step.begun == 0


async def test_a_long_step_that_is_cancelled_stops_after_its_present_chunk(
    engine: Engine, stage: FakeStage
) -> None:
    step = FakeStep(stage, LONG)
    stage.hold()
    task = asyncio.create_task(engine.step(step))
    await stage.entered()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done  # held, for the cache is in use
    stage.let_through()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (len(stage.passes), step.cache.tokens) == (1, 7)


async def test_others_in_the_pass_of_a_step_that_is_cancelled_go_on(engine: Engine, stage: FakeStage) -> None:
    long, other = FakeStep(stage, LONG), FakeStep(stage)
    cancelled, kept = await while_held(engine, stage, long, other)
    await stage.entered()
    cancelled.cancel()
    await asyncio.sleep(0)
    stage.let_through()
    assert torch.equal((await kept).value, other.hidden + 1)
    await asyncio.gather(cancelled, return_exceptions=True)


async def test_a_step_whose_time_is_over_before_its_turn_never_begins(
    engine: Engine, stage: FakeStage
) -> None:
    late, other = FakeStep(stage), FakeStep(stage)
    stage.hold()
    first = asyncio.create_task(engine.step(FakeStep(stage)))
    await stage.entered()
    dropped, kept = asyncio.create_task(engine.step(late, 0.001)), asyncio.create_task(engine.step(other, 60))
    await eventually(lambda: engine.waiting >= 2, "both steps wait")
    await asyncio.sleep(0.01)
    stage.let_through()
    await asyncio.gather(first, kept)
    with pytest.raises(ExpiredError):
        await dropped
    assert (late.begun, engine.holds) == (0, 0)


# several stages


async def test_a_decode_step_of_one_stage_does_not_wait_for_all_of_a_long_step_of_another(
    engine: Engine, stage: FakeStage
) -> None:
    other = FakeStage()
    stage.hold()
    long = asyncio.create_task(engine.step(FakeStep(stage, LONG)))
    await stage.entered()
    decode = asyncio.create_task(engine.step(FakeStep(other)))
    await eventually(lambda: engine.waiting, "the step waits")
    stage.let_through(1)
    await decode
    assert not long.done()
    stage.let_through()
    await long


# the end


async def test_close_lets_the_present_chunk_finish_and_refuses_the_rest(
    engine: Engine, stage: FakeStage
) -> None:
    step = FakeStep(stage, LONG)
    stage.hold()
    task = asyncio.create_task(engine.step(step))
    await stage.entered()
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await eventually(lambda: engine.closed, "the engine closes")
    stage.let_through()
    await closing
    with pytest.raises(EngineClosedError):
        await task
    assert (len(stage.passes), step.cache.tokens) == (1, 7)


async def test_close_refuses_the_steps_that_wait(engine: Engine, stage: FakeStage) -> None:
    stage.hold()
    first = asyncio.create_task(engine.step(FakeStep(stage)))
    await stage.entered()
    waiting = asyncio.create_task(engine.step(FakeStep(stage)))
    await eventually(lambda: engine.waiting, "the step waits")
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    with pytest.raises(EngineClosedError):
        await waiting
    stage.let_through()
    await asyncio.gather(first, closing)


async def test_nothing_of_a_step_is_kept_once_it_is_over(engine: Engine, stage: FakeStage) -> None:
    step = FakeStep(stage, LONG)
    watched = weakref.ref(step)
    await engine.step(step)
    stage.passes.clear()
    del step
    await eventually(lambda: gc.collect() >= 0 and watched() is None, "the step is freed")
