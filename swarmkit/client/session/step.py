"""One step of a session through all its stages, with the replay of what a replaced server lacks.

The client keeps, for every stage of its route, the inputs that it sent there. When a server fails, its blocks
are routed anew, possibly over several servers with other boundaries; the first of them is sent the kept
inputs, the next one the outputs of the first, and so on, until all caches stand where the lost one stood
(Borzunov et al., NeurIPS 2023, Algorithm 1).

For stage i of the chain, at a step that extends the session from `position` n to `end`::

    0 ──────────── held ────────────── n ───────────── end
    │ server has it │ replay (history) │  new inputs    │      sent:   [start, end), start = min(held, want)
                    │ want ─ what stage i + 1 lacks ────│      wanted: [want, end),  want <= n

In the usual step held = want = n on every stage. A replacement has held = 0; one that has no history of its
own makes the want of the one before it 0 too. So replay, split and the step itself are one and the same
operation.

What the stages behind a replacement hold comes from the lost server. So the outputs of the whole replay are
wanted, and compared with it: stages behind that hold something else begin anew, with these outputs.

Where successive stages are equal (held = want = n) and their servers are linked, only the first of them is
sent its inputs: each server pushes its outputs to the next one and sends them to the client, which keeps them
in case the next server is lost. What remains without an answer is done again by the operation above.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from swarmkit.client.session.codecs import answer_codecs
from swarmkit.client.session.history import History
from swarmkit.client.session.pipeline import pieces, run_pipeline
from swarmkit.client.session.replica import (
    Failed,
    InFlight,
    Request,
    StageReplica,
    StepInputs,
    StepResult,
    off_loop,
)
from swarmkit.client.session.session_route import RouteChanges, SessionRoute
from swarmkit.client.session.stage_connection import NotPushedError
from swarmkit.client.session.succession import succeed
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import PeerError
from swarmkit.events import HopTrace


class StepExecution:
    """The work of one step.

    Args:
        outputs: the history of what comes out of the last stage.
        numbers: of the session's requests.
    """

    def __init__(
        self,
        swarm: SwarmClient,
        route: SessionRoute,
        outputs: History,
        inputs: StepInputs,
        changes: RouteChanges,
        numbers: Iterator[int],
    ) -> None:
        self._swarm = swarm
        self._route = route
        self._outputs = outputs
        self._inputs = inputs
        self._position = inputs.position
        self._end = inputs.end
        self._rows = inputs.rows
        self._changes = changes
        self._numbers = numbers
        self._arrived_at = swarm.clock.now()
        """When the outputs of the previous stage were here, on the client's clock."""
        self.hops: list[HopTrace] = []

    async def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Bring all stages to the step's end.

        Args: hidden: inputs `[batch, tokens, hidden]` of positions [position, end).

        Returns: the outputs of the last stage, of the same shape.
        """
        route, stages = self._route, self._route.stages
        arrived, arrived_from = hidden, self._position
        index = 0
        while index < len(stages):
            stage = stages[index]
            await off_loop(arrived.nbytes, lambda: stage.note_inputs(arrived_from, arrived, self._end))  # noqa: B023
            want = self._wanted_from(index)
            try:
                output = await self._run_stage(index, want)
            except PeerError as error:
                cost_s = self._swarm.clock.now() - self._arrived_at
                route.check_open()
                route.give_up_step(index)
                if isinstance(error, NotPushedError):
                    route.stop_pushing_to(index)
                else:
                    index = await route.replace(index, error, self._changes, cost_s)
                if not index:
                    arrived, arrived_from = hidden, self._position
                    self.hops.clear()
                self._arrived_at = self._swarm.clock.now()
                continue
            self._changes.progressed(stage.hop.stop)
            if stage.predecessor is not None:
                output, want = await succeed(
                    self._swarm, stages, index, output, self._outputs, self._inputs, self._changes
                )
            arrived, arrived_from = output, want
            index += 1
        return arrived

    def _wanted_from(self, index: int) -> int:
        """The position from which on the next stage needs this stage's outputs."""
        stages = self._route.stages
        is_last = index + 1 == len(stages)
        if stages[index].predecessor is not None and not (is_last and self._outputs.tokens < self._position):
            return 0
        return self._position if is_last else min(self._position, stages[index + 1].history.tokens)

    async def _run_stage(self, index: int, want: int) -> torch.Tensor:
        """Bring a stage to the step's end; returns its outputs of positions [want, end)."""
        stage = self._route.stages[index]
        try:
            self._route.check_open()
            progress = stage.progress
            if isinstance(progress, Failed):
                raise progress.error
            if isinstance(progress, InFlight):
                results = await self._take(index, progress)
            else:
                results = await self._send(index, want)
            stage.held = self._end
        except NotPushedError:
            raise  # the server holds what it held
        except BaseException as error:
            # Also when cancelled: an answer that is not awaited must not be taken for the next one.
            if not stage.survives(error):
                stage.drop()
            raise
        bans = self._swarm.bans
        if bans.failures:
            bans.worked(stage.hop.server.service_id)
        if len(results) == 1:
            return results[0].output
        return torch.cat([result.output for result in results], dim=1)

    # ------------------------------------------------------------------ a stage that is sent its inputs

    async def _send(self, index: int, want: int) -> list[StepResult]:
        """Send a stage its inputs and take its answers; linked stages behind it are pushed theirs."""
        stage = self._route.stages[index]
        self._route.give_up_step(index)
        if stage.connection is None:
            await stage.open(self._route.max_length)
            self._route.check_open()
        self._arrived_at = self._swarm.clock.now()
        followers = self._followers(index, want)
        if followers:
            return await self._run_linked(index, [stage, *followers])
        return await self._run_alone(stage, want)

    def _followers(self, index: int, want: int) -> list[StageReplica]:
        """The stages behind one that will be pushed what they need if that one is sent its inputs."""
        stages, position = self._route.stages, self._position
        stage, found = stages[index], list[StageReplica]()
        if not stage.held == want == position:
            return found
        for number in range(index + 1, len(stages)):
            before, following = stages[number - 1], stages[number]
            equal = following.held == following.history.tokens == position
            if not (before.is_linked_to(following) and equal and following.order == stage.order):
                break
            found.append(following)
        # The last of them must not be asked for more than the step's own outputs either.
        while found and self._wanted_from(index + len(found)) != position:
            found.pop()
        return found

    async def _run_alone(self, stage: StageReplica, want: int) -> list[StepResult]:
        """Exchange messages with one server until it stands at the step's end."""
        results = []
        for low, high in self._cut(min(stage.held, want), [stage]):
            # Outputs that are wanted for a replay are wanted as they are.
            request = self._request(low, high, want, [stage] if want == self._position else [])
            results.append(await self._exchange(stage, request))
        return results

    async def _run_linked(self, index: int, run: list[StageReplica]) -> list[StepResult]:
        """Send the first of some linked servers its inputs; returns its answers.

        A short step is then taken from each of the others in its turn, a long one has come from all of them.
        """
        first, followers = run[0], run[1:]
        requests = [
            self._request(low, high, self._position, run) for low, high in self._cut(self._position, run)
        ]
        if len(requests) > 1:
            await run_pipeline(run, requests, self._inputs)
            self._route.check_open()  # to close a session takes the answers away, too
            if isinstance(first.progress, InFlight):
                return await self._take(index, first.progress)
            assert isinstance(first.progress, Failed)
            raise first.progress.error
        for follower in followers:
            follower.progress = InFlight(deque(requests))
        result = await self._exchange(first, requests[0], len(followers))
        self._note_push(index, result)
        return [result]

    async def _exchange(self, stage: StageReplica, request: Request, forward: int = 0) -> StepResult:
        """Send a request and take the answer to it."""
        await stage.send(request, self._inputs, forward)
        self._route.check_open()
        result = await stage.take(request, stage.timeout_s(request))
        self._account(stage, [result], request.size)
        return result

    def _cut(self, low: int, run: list[StageReplica]) -> list[tuple[int, int]]:
        """The positions [low, end) in as many requests as some linked stages are sent."""
        if self._end - low == 1:
            return [(low, self._end)]
        most = min(stage.max_step_tokens for stage in run) // self._rows
        return pieces(low, self._end, len(run), max(1, most))

    def _request(self, low: int, high: int, want: int, coded: list[StageReplica]) -> Request:
        """Args: coded: the stages whose answers come in the codecs of their boundaries."""
        keep = high - min(max(low, want), high)
        request = Request(next(self._numbers), low, high, keep, self._rows, self._swarm.clock.now())
        if coded and self._swarm.settings.transfer.codecs:
            request.answers = answer_codecs(coded, self._route.stages, self._outputs)
        return request

    # ------------------------------------------------------------------ a stage that has its inputs

    async def _take(self, index: int, progress: InFlight) -> list[StepResult]:
        """The answers of a stage to requests that it has got already; those of a long step are here."""
        stage = self._route.stages[index]
        for request in progress.requests:
            result = await stage.take(request, stage.timeout_s(request), is_pushed=True)
            progress.results.append(result)
            self._note_push(index, result)
        stage.progress = None
        self._account(stage, progress.results, self._rows * (self._end - self._position))
        return progress.results

    def _note_push(self, index: int, result: StepResult) -> None:
        """If a server has not pushed its output on, the stages behind it are to be sent theirs."""
        following = self._route.stages[index + 1 : index + 2]
        if following and following[0].progress is not None and not result.done.forwarded:
            self._route.stages[index].unlink()
            self._route.give_up_step(index + 1)

    # ------------------------------------------------------------------ account

    def _account(self, stage: StageReplica, results: list[StepResult], size: int) -> None:
        """Note how long a stage took: since the outputs of the previous one were here."""
        last, at_work = results[-1].arrived_at, 0.0
        for result in results:
            at_work += (result.done.compute_ms + result.done.queue_ms) / 1e3
        seconds = max(last - self._arrived_at, 0.0)
        # While stages worked at once, each of them was at work for longer than it was waited for.
        stage.observe(size, max(seconds, min(at_work, last - results[0].asked_at)))
        self.hops.append(stage.trace(results, seconds))
        self._arrived_at = max(last, self._arrived_at)
