"""In which codec hidden states cross each boundary of a chain, so that a lost server can still be replaced.

A boundary is where a stage begins, or where the last one ends. All that crosses it in one step does so in one
codec, whichever links it takes: from the client to a stage, from a server to the next one, and from a server
back to the client, which decides. From there on the values count as the codec changed them:

* a server encodes its outputs once, and the next server and the client get the same bytes;
* what the client sends goes into the history as its receiver decodes it;
* what was sent before goes unchanged: in the boundary's codec where that changes nothing, else as it is.

So a stage's history is bit by bit what its server computed on, and a replay gives the same keys and values. A
boundary keeps its codec when a server is replaced, whose links are not measured yet.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from swarmkit.client.session.history import History
from swarmkit.client.session.replica import StageReplica
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.net.protocol.codec import CodecName, dtype_name
from swarmkit.net.protocol.codec_choice import Transfer, choose, smallest

_ASSUMED_STEP_S = 0.02
CLIENT = ""
"""This client's name among the ends of links."""


def agree(swarm: SwarmClient, stages: Sequence[StageReplica], outputs: History, hidden: torch.Tensor) -> None:
    """Choose the codecs of a step that brings `hidden`, into the histories of the boundaries.

    Args: outputs: the history behind the last stage.
    """
    first = dtype_name(hidden.dtype)
    for number, boundary in enumerate([*(stage.history for stage in stages), outputs]):
        before = stages[number - 1] if number else None
        after = stages[number] if number < len(stages) else None
        dtype = first if before is None else before.dtype
        allowed = [
            codec
            for codec in swarm.settings.transfer.codecs
            if (before is None or before.permits(codec)) and (after is None or after.permits(codec))
        ]
        boundary.codec = _of_boundary(swarm, before, after, boundary.codec, allowed, dtype, hidden)


def _of_boundary(
    swarm: SwarmClient,
    before: StageReplica | None,
    after: StageReplica | None,
    current: CodecName,
    allowed: Collection[CodecName],
    dtype: str,
    hidden: torch.Tensor,
) -> CodecName:
    rows, tokens, width = hidden.shape
    times_of = swarm.routes.times_of
    usual_s = [times_of(stage.hop.server).usual_s(rows * tokens) for stage in (after, before) if stage]

    def transfer(bytes_per_s: float | None) -> Transfer:
        as_it_is_s = hidden.numel() * 4 / bytes_per_s if bytes_per_s else 0.0
        step_s = next((seconds for seconds in usual_s if seconds), _ASSUMED_STEP_S + as_it_is_s)
        return Transfer(hidden.numel(), width, dtype, step_s, bytes_per_s)

    if swarm.settings.transfer.compress == "always":
        return smallest(allowed, transfer(None))
    chosen = {choose(allowed, current, transfer(swarm.rates.get(way))) for way in _ways(before, after)}
    return min(chosen, key=transfer(None).nbytes)


def _ways(before: StageReplica | None, after: StageReplica | None) -> list[tuple[str, str]]:
    """The links that a boundary's values go over, by both ends' names."""
    ways = []
    if before is not None:
        ways.append((before.hop.server.peer_id, CLIENT))
    if after is not None:
        pushed = before is not None and before.is_linked_to(after)
        ways.append((before.hop.server.peer_id if before and pushed else CLIENT, after.hop.server.peer_id))
    return ways


def answer_codecs(
    run: Sequence[StageReplica], stages: Sequence[StageReplica], outputs: History
) -> tuple[CodecName, ...]:
    """In what some stages of a chain, each of which pushes to the next one, are to give their outputs.

    Args: outputs: the history behind the last stage of the chain.
    """
    wanted = []
    for stage in run:
        behind = stages[stages.index(stage) + 1 :]
        codec = behind[0].history.codec if behind else outputs.codec
        ends = [stage, behind[0]] if behind and behind[0] in run else [stage]
        wanted.append(codec if all(end.permits(codec) for end in ends) else "none")
    return tuple(wanted)
