"""A server in the place of another: what the stages behind it hold stays only if both compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarmkit.client.checks.agreement import Comparison
from swarmkit.client.session.history import History
from swarmkit.client.session.replica import StageReplica, StepInputs, off_loop
from swarmkit.client.session.session_route import RouteChanges
from swarmkit.client.swarm.client import SwarmClient


async def succeed(
    swarm: SwarmClient,
    stages: Sequence[StageReplica],
    index: int,
    output: torch.Tensor,
    outputs: History,
    inputs: StepInputs,
    changes: RouteChanges,
) -> tuple[torch.Tensor, int]:
    """Keep what the stages behind a new server hold only if it computes what its predecessor computed.

    Args:
        output: of the new server, from position 0 on; from the step's if nothing is known to compare with.
        outputs: the history of the last stage's outputs.

    Returns: the outputs that the next stage lacks, and the position of the first of them.
    """
    stage, position = stages[index], inputs.position
    is_last = index + 1 == len(stages)
    following = outputs if is_last else stages[index + 1].history
    before, stage.predecessor = stage.predecessor, None
    if before is None or (is_last and outputs.tokens < position):
        stage.standing.own_from = position
        changes.mixed = changes.mixed or position > 0
        return output, position
    known = min(position, following.tokens)
    if known:
        pair = following.read(0, known), output[:, :known]
        part = Comparison(before.hop, stage.hop, pair, before.inputs.read(0, known))
        mask = None if inputs.mask is None else inputs.mask[:, :known]
        apart = await off_loop(output.nbytes, lambda: part.excess(following.codec, mask))
        if apart > 1:
            if before.hop.server.peer_id != stage.hop.server.peer_id:
                swarm.note_difference(part, apart, changes.owner)
            if is_last:
                outputs.write(0, output[:, :known])
                return output[:, known:], known
            known, changes.mixed = 0, True
            for behind in stages[index + 1 :]:
                behind.crop(0)
    stage.standing.own_from = known
    return output[:, known:], known
