"""Where a session can begin if an earlier one began alike: what is known here, what servers have kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import anyio.to_thread
import torch

from swarmkit.client.session.remote_stage import RemoteStage, at_once
from swarmkit.client.swarm.prefix_cache import ClientPrefixCache, Remembered, begin_at


async def restore_prefix(
    memory: ClientPrefixCache, hidden: torch.Tensor, stages: Sequence[RemoteStage], stop: int, max_length: int
) -> tuple[Remembered, int, Mapping[RemoteStage, int]] | None:
    """Have each server begin with what it has kept of an earlier session that had the same first tokens.

    At least one token is left to be sent, because its output is needed.

    Args: hidden: [tokens, hidden], what the first step of a session brings.

    Returns: that session, from which token on the step is to be sent, and how many tokens each server holds;
        None if all of it is to be sent.
    """
    if not memory:
        return None
    boundaries = [*(stage.hop.start for stage in stages), stop]
    found = await anyio.to_thread.run_sync(memory.find, hidden[:-1], boundaries)
    if found is None:
        return None
    entry, known = found
    held = dict.fromkeys(stages, 0)

    async def ask(stage: RemoteStage) -> None:
        if stage.conversation is None:
            await stage.open(max_length)
        held[stage] = await stage.recall(entry.states[stage.hop.start][:known])

    for stage in await at_once({stage: partial(ask, stage) for stage in stages}):
        stage.drop()  # what became of it is seen, and told, when it is needed
    begin = begin_at(list(held.values()), known, len(hidden))
    return (entry, begin, held) if begin else None
