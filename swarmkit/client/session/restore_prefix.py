"""How a session begins where an earlier one with the same first tokens was, and is kept for later ones."""

from __future__ import annotations

from functools import partial

import anyio.to_thread
import torch

from swarmkit.client.session.history import History
from swarmkit.client.session.replica import StageReplica
from swarmkit.client.session.session_route import SessionRoute, at_once
from swarmkit.client.swarm.prefix_cache import ClientPrefixCache, best_start


async def restore_prefix(
    cache: ClientPrefixCache, hidden: torch.Tensor, route: SessionRoute, outputs: History
) -> torch.Tensor | None:
    """Have each server begin with what it has kept of an earlier session that had the same first tokens.

    At least one token is left to be sent, because its output is needed. All histories of the session then
    hold what need not be sent.

    Args:
        hidden: `[tokens, hidden]`, what the first step of a session brings.
        outputs: the history of what comes out of the last stage.

    Returns: the outputs `[1, tokens, hidden]` of all that need not be sent; None if all must be.

    Raises:
        SessionError: the session was closed meanwhile.
    """
    if not cache:
        return None
    found = await anyio.to_thread.run_sync(cache.find, route.chain, hidden[:-1])
    if found is None:
        return None
    entry, known = found
    held = dict.fromkeys(route.stages, 0)

    async def ask(stage: StageReplica) -> None:
        if stage.connection is None:
            await stage.open(route.max_length)
        held[stage] = await stage.restore_prefix(entry.states[stage.hop.start][:known])

    for stage in await at_once({stage: partial(ask, stage) for stage in route.stages}):
        stage.drop()  # the step finds the server lost when it needs it, and tells so
    route.check_open()
    start = best_start(list(held.values()), known, len(hidden))
    if not start:
        return None
    for stage in route.stages:
        stage.history.write(0, entry.states[stage.hop.start][None, :start])
        stage.held = min(held[stage], start)
    restored = entry.states[route.stop][None, :start]
    outputs.write(0, restored)
    return restored


def keep_prefix(
    cache: ClientPrefixCache,
    route: SessionRoute,
    outputs: History,
    inputs: History | None,
    tokens: int,
    copy: bool = False,
) -> None:
    """Keep a session's hidden states for later ones that begin with the same tokens.

    Args:
        outputs, inputs: what comes out of the last stage, and what the user gave where codecs may have
            changed it.
        tokens: that the session holds.
        copy: the session goes on in the same buffers.
    """
    histories = {stage.hop.start: stage.history for stage in route.stages}
    histories[route.stop] = outputs
    states = {boundary: history.row(tokens) for boundary, history in histories.items()}
    found = {boundary: part for boundary, part in states.items() if part is not None}
    if tokens and len(found) == len(states):
        if copy:
            found = {boundary: part.clone() for boundary, part in found.items()}
        cache.keep(route.chain, found, None if inputs is None else inputs.row(tokens))
