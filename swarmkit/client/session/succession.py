"""A server in the place of another: what the stages behind it hold stays only if both compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarmkit.client.checks.agreement import Comparison
from swarmkit.client.session.replica import StageReplica, StepInputs, off_loop
from swarmkit.client.session.session_route import RouteChanges
from swarmkit.client.swarm.client import SwarmClient


async def succeed(
    swarm: SwarmClient,
    stages: Sequence[StageReplica],
    index: int,
    output: torch.Tensor,
    inputs: StepInputs,
    changes: RouteChanges,
) -> tuple[torch.Tensor, int]:
    """Keep what the stages behind a new server hold only if it computes what its predecessor computed.

    Args: output: of the new server, from position 0 on, or from the step's if it is the last.

    Returns: the outputs that the next stage lacks, and the position of the first of them.
    """
    stage, position = stages[index], inputs.position
    before, stage.predecessor = stage.predecessor, None
    if before is None or index + 1 == len(stages):
        changes.mixed = changes.mixed or position > 0
        return output, position
    following = stages[index + 1].history
    known = min(position, following.tokens)
    if known:
        outputs = following.read(0, known), output[:, :known]
        part = Comparison(before.hop, stage.hop, outputs, before.inputs.read(0, known))
        mask = None if inputs.mask is None else inputs.mask[:, :known]
        apart = await off_loop(output.nbytes, lambda: part.excess(following.codec, mask))
        if apart > 1:
            known, changes.mixed = 0, True
            for behind in stages[index + 1 :]:
                behind.crop(0)
            swarm.note_difference(part, apart, changes.owner)
    return output[:, known:], known
