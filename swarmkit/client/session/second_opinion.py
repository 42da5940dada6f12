"""What one server of a session computed is computed by a second one as well, beside the answer.

The client has the inputs of each stage and the outputs that came back. It sends the inputs to another server
that holds the same blocks, in a session of its own, and compares all outputs that the first one gave in this
session: one check covers all steps so far. Where they differ by more than rounding explains, a third server
decides, and the one that is alone is left aside.

A stage that was pushed its inputs by the server before it may have got others than that server showed to the
client. So such a stage is not blamed: it gets its inputs from the client from then on, which makes the next
check decide. The same holds for a stage whose keys and values another server has brought: they are computed
anew.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field

import anyio.to_thread
import torch

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.checks.agreement import Comparison
from swarmkit.client.checks.verdict import loser, witnesses
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.history import History, NoHistory
from swarmkit.client.session.replica import Request, StageReplica, StepInputs, off_loop
from swarmkit.client.session.session_route import SessionRoute
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import PeerError
from swarmkit.events import Owner
from swarmkit.net.protocol.codec import CodecName

logger = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Rows x tokens of the longest session that is checked: a second server computes all of them."""


@dataclass
class _Kept:
    """A part of a history, which goes on meanwhile."""

    history: History
    start: int
    stop: int
    edits: int = field(init=False)
    view: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.edits = self.history.edits
        self.view = self.history.view(self.start, self.stop)

    async def copy(self) -> torch.Tensor | None:
        """The part as it was, `[batch, tokens, hidden]`; None if it was changed meanwhile."""
        copied = await off_loop(self.view.numel() * 4, self.view.clone)
        return copied if self.history.edits == self.edits else None


@dataclass
class _Sample:
    """Outputs of positions [low, end) by a stage of a session, and all that they were computed from."""

    stage: StageReplica
    before: Hop | None
    """The server that pushed the stage its inputs, if one did."""
    may_be_misled: bool
    """Whether another server may be the cause of what the stage computed."""
    inputs: _Kept
    outputs: _Kept
    codec: CodecName
    low: int
    step: StepInputs
    adapter: ClientAdapter | ServerAdapter | None
    owner: Owner


def offer_check(
    swarm: SwarmClient,
    route: SessionRoute,
    outputs: History | torch.Tensor,
    step: StepInputs,
    owner: Owner,
) -> None:
    """Have one stage of a session checked later, as far as there is room for more checks. Is quick.

    Args:
        outputs: of the last stage: all of them, or those of the step.
        step: the step that is done.
    """
    if not swarm.checks.has_room or step.rows * step.end > MOST_TOKENS:
        return
    stages = route.stages
    index = secrets.randbelow(len(stages))
    stage, low, behind = stages[index], stages[index].standing.own_from, outputs
    if index + 1 < len(stages):
        behind = stages[index + 1].history
    elif isinstance(outputs, torch.Tensor):
        low, behind = max(low, step.position), History()
        behind.write(0, outputs)
    assert isinstance(behind, History)
    if low >= step.end or isinstance(stage.history, NoHistory):
        return
    offset = step.end - behind.tokens  # where only the step's outputs are known
    pushed_by = stages[index - 1].hop if index and stage.standing.pushed_by else None
    sample = _Sample(
        stage,
        pushed_by,
        pushed_by is not None or bool(stage.standing.keys_from),
        _Kept(stage.history, 0, step.end),
        _Kept(behind, low - offset, step.end - offset),
        behind.codec,
        low,
        step,
        route.adapter,
        owner,
    )

    async def check() -> None:
        await _check(swarm, sample)

    swarm.checks.offer(check)


async def _check(swarm: SwarmClient, sample: _Sample) -> None:
    inputs, given = await sample.inputs.copy(), await sample.outputs.copy()
    if inputs is None or given is None:
        return
    first = sample.stage.hop
    second, output = await _another(swarm, sample, inputs, {first.server.peer_id})
    if second is None or output is None:
        return
    apart = await _apart(sample, first, second, given, output, inputs)
    if apart <= 1:
        return
    wrong = None
    third, judge = await _another(swarm, sample, inputs, {first.server.peer_id, second.server.peer_id})
    if third is not None and judge is not None:
        firsts = await _apart(sample, first, third, given, judge, inputs)
        seconds = await _apart(sample, second, third, output, judge, inputs)
        wrong = {"first": first, "second": second, None: None}[loser(firsts, seconds)]
    if sample.may_be_misled and wrong in (None, first):
        # Perhaps it was pushed other inputs than the client was shown, or was brought other keys and values.
        wrong = None
        if sample.before is not None:
            swarm.routes.cannot_link(sample.before.server, first.server)
        sample.stage.standing.is_doubted = True
    found = Comparison(first, second, (given, output), inputs)
    if wrong is not None:
        swarm.convict(wrong.server)
    swarm.note_difference(found, apart, sample.owner, wrong.server.peer_id if wrong else "")


async def _apart(
    sample: _Sample,
    one: Hop,
    other: Hop,
    output: torch.Tensor,
    others: torch.Tensor,
    inputs: torch.Tensor,
) -> float:
    mask = None if sample.step.mask is None else sample.step.mask[:, sample.low :]
    found = Comparison(one, other, (output, others), inputs[:, sample.low :])
    return await anyio.to_thread.run_sync(lambda: found.excess(sample.codec, mask))


async def _another(
    swarm: SwarmClient, sample: _Sample, inputs: torch.Tensor, without: set[str]
) -> tuple[Hop, torch.Tensor] | tuple[None, None]:
    """A server of another peer, and what it computes from the sample's inputs; None if there is none."""
    hosted = "" if sample.adapter is None else sample.adapter.hosted_name
    found = witnesses(
        sample.stage.hop,
        swarm.known.servers(hosted),
        without,
        lambda server: swarm.routes.may_use(Hop(server, server.start, server.stop)),
    )
    while found:
        hop = found.pop(secrets.randbelow(len(found)))
        try:
            return hop, await _computed_by(swarm, hop, sample, inputs)
        except PeerError as error:
            logger.info("%s gave no second opinion: %s", hop, error)
    return None, None


async def _computed_by(swarm: SwarmClient, hop: Hop, sample: _Sample, inputs: torch.Tensor) -> torch.Tensor:
    """Outputs of positions [low, end) by another server, in a session that ends with it."""
    step, history = sample.step, History()
    history.write(0, inputs)
    stage = StageReplica(swarm, hop, history, sample.adapter)
    given = StepInputs(0, step.end, step.rows, step.mask, step.positions)
    outputs = []
    try:
        await stage.open(step.end)
        most = max(1, stage.max_step_tokens // step.rows)
        for number, start in enumerate(range(0, step.end, most), start=1):
            stop = min(start + most, step.end)
            keep = stop - min(max(start, sample.low), stop)
            request = Request(number, start, stop, keep, step.rows, swarm.clock.now())
            await stage.send(request, given)
            outputs.append((await stage.take(request, stage.timeout_s(request))).output)
    finally:
        stage.drop()
    return torch.cat(outputs, dim=1)
