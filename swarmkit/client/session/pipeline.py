"""A long step in pieces, so that all linked stages of a chain work at once.

With n pieces over k stages the last one is done after n + k - 1 turns instead of n * k::

    stage 1   1 2 3 4
    stage 2     1 2 3 4
    stage 3       1 2 3 4
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import anyio

from swarmkit.client.session.replica import Failed, InFlight, Request, StageReplica, StepInputs
from swarmkit.errors import SwarmkitError
from swarmkit.models.kv.cache import PAGE_TOKENS

_PIECES_PER_STAGE = 8
_SMALLEST_PIECE = 32
_LARGEST_PIECE = 512
_AHEAD = 2
"""Pieces that are sent before the first one is answered: one to work on and one to find next."""


def pieces(low: int, high: int, stages: int, most: int) -> list[tuple[int, int]]:
    """How positions [low, high) are cut for a chain of `stages`; no piece has more than `most` tokens.

    Small pieces leave stages idle for less of the time, and cost each stage a pass over its weights; eight
    for each stage after the first lose at most an eighth to idleness. Pieces end where pages do, if they can:
    of a page that a server has kept it cannot use a part.
    """
    tokens = high - low
    span = most
    if stages > 1:
        wanted = tokens // (_PIECES_PER_STAGE * (stages - 1))
        span = min(most, max(_SMALLEST_PIECE, min(wanted, _LARGEST_PIECE)))
    if span < PAGE_TOKENS:
        return [(start, min(start + span, high)) for start in range(low, high, span)]
    span -= span % PAGE_TOKENS
    cuts = [low, *range(low - low % PAGE_TOKENS + span, high, span), high]
    return list(pairwise(cuts))


async def run_pipeline(
    stages: Sequence[StageReplica], requests: Sequence[Request], inputs: StepInputs
) -> None:
    """Send requests to the first stage, each before the last is answered, and take all stages' answers.

    Afterwards each stage's `progress` says what became of them: all are answered; or it failed; or it was cut
    off by a failure of a stage before it, has nothing in flight any more, and is to be sent what it lacks.
    """
    await _Pipeline(stages, requests, inputs).run()


class _Pipeline:
    def __init__(
        self, stages: Sequence[StageReplica], requests: Sequence[Request], inputs: StepInputs
    ) -> None:
        self._stages = stages
        self._requests = requests
        self._inputs = inputs
        self._takers = [anyio.CancelScope() for _ in stages]
        self._room = anyio.Semaphore(_AHEAD)

    async def run(self) -> None:
        for stage in self._stages:
            stage.progress = InFlight(deque(self._requests))
        async with anyio.create_task_group() as tasks:
            for index in range(len(self._stages)):
                tasks.start_soon(self._take_all, index)
            await self._send_all()
        for stage in self._stages:
            if isinstance(stage.progress, InFlight) and stage.progress.requests:
                stage.give_up_step()

    async def _send_all(self) -> None:
        first, forward = self._stages[0], len(self._stages) - 1
        for request in self._requests:
            await self._room.acquire()
            if isinstance(first.progress, Failed):
                return
            try:
                await first.send(request, self._inputs, forward)
            except SwarmkitError as error:
                self._fail(0, error)
                self._takers[0].cancel()
                return

    async def _take_all(self, index: int) -> None:
        stage = self._stages[index]
        with self._takers[index]:
            try:
                for request in self._requests:
                    # A piece may have to wait for its turn at every server before this one.
                    timeout_s = sum(each.timeout_s(request) for each in self._stages[: index + 1])
                    result = await stage.take(request, timeout_s, is_pushed=index > 0)
                    if isinstance(stage.progress, InFlight):  # else the session was closed meanwhile
                        stage.progress.results.append(result)
                        stage.progress.requests.popleft()
                    if index == 0:
                        self._room.release()
                    if index + 1 < len(self._stages) and not result.done.forwarded:
                        stage.unlink()
                        self._cut(index + 1)
            except SwarmkitError as error:
                self._fail(index, error)
            except anyio.get_cancelled_exc_class():
                # Half an answer must not be taken for the beginning of the next one.
                if stage.connection is not None and stage.connection.in_message:
                    failed = stage.progress if isinstance(stage.progress, Failed) else None
                    stage.drop()
                    stage.progress = failed
                raise

    def _fail(self, index: int, error: SwarmkitError) -> None:
        stage = self._stages[index]
        if not isinstance(stage.progress, Failed):
            stage.progress = Failed(error, stage.progress.requests if stage.progress else deque())
        self._room.release()
        self._cut(index + 1)

    def _cut(self, index: int) -> None:
        """Nothing more will come to the stages from `index` on."""
        for taker in self._takers[index:]:
            taker.cancel()
