"""A long step in pieces, so that all stages of a chain that hand on to each other work at once.

With n pieces over k stages the last one is done after n + k - 1 turns instead of n * k::

    stage 1   1 2 3 4
    stage 2     1 2 3 4
    stage 3       1 2 3 4
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import anyio

from swarmkit.client.session.remote_stage import RemoteStage, Request, StepInputs
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
    stages: Sequence[RemoteStage], requests: Sequence[Request], inputs: StepInputs
) -> None:
    """Send requests to the first stage, each before the last is answered, and take all stages' answers.

    Every stage must have the requests in `pending`. Afterwards its `answers` are those that came, and
    `failure` says why the rest did not; what the stages behind a failure would have got, they wait for no
    longer.
    """
    await _Pipeline(stages, inputs).run(requests)


class _Pipeline:
    def __init__(self, stages: Sequence[RemoteStage], inputs: StepInputs) -> None:
        self._stages = stages
        self._inputs = inputs
        self._takers = [anyio.CancelScope() for _ in stages]
        self._room = anyio.Semaphore(_AHEAD)

    async def run(self, requests: Sequence[Request]) -> None:
        async with anyio.create_task_group() as tasks:
            for index in range(len(self._stages)):
                tasks.start_soon(partial(self._take_all, index, list(requests)))
            await self._send_all(requests)

    async def _send_all(self, requests: Sequence[Request]) -> None:
        first, forward = self._stages[0], len(self._stages) - 1
        for request in requests:
            await self._room.acquire()
            if first.failure is not None:
                return
            try:
                await first.send(request, self._inputs, forward)
            except SwarmkitError as error:
                self._fail(0, error)
                self._takers[0].cancel()
                return

    async def _take_all(self, index: int, requests: Sequence[Request]) -> None:
        stage = self._stages[index]
        with self._takers[index]:
            try:
                for request in requests:
                    # A piece may have to wait for its turn at every server before this one.
                    patience = sum(each.deadline_s(request) for each in self._stages[: index + 1])
                    answer = await stage.take(request, patience, pushed=index > 0)
                    stage.answers.append(answer)
                    stage.pending.popleft()
                    if index == 0:
                        self._room.release()
                    if index + 1 < len(self._stages) and not answer.done.forwarded:
                        stage.unlink()
                        self._cut(index + 1)
            except SwarmkitError as error:
                self._fail(index, error)
            except anyio.get_cancelled_exc_class():
                # Half an answer must not be taken for the beginning of the next one.
                if stage.conversation is not None and stage.conversation.in_message:
                    failure = stage.failure
                    stage.drop()
                    stage.failure = failure
                raise

    def _fail(self, index: int, error: SwarmkitError) -> None:
        if self._stages[index].failure is None:
            self._stages[index].failure = error
        self._room.release()
        self._cut(index + 1)

    def _cut(self, index: int) -> None:
        """Nothing more will come to the stages from `index` on."""
        for taker in self._takers[index:]:
            taker.cancel()
