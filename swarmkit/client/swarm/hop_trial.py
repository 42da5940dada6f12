"""Measures one server of a route with a few steps of noise: how far away it is, and how fast."""

from __future__ import annotations

import statistics

import torch

from swarmkit.client.routing.forecast import HopFacts
from swarmkit.client.routing.route import Hop
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import ProtocolError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.messages import SESSION, Open, Opened, Step, StepDone
from swarmkit.net.rpc.client_stream import ClientStream

_TOKENS = 4
_PROMPT = 16
_ANSWER_S = 30.0


async def try_hop(swarm: SwarmClient, hop: Hop) -> HopFacts:
    """Open a session at a server, and have it compute a short prompt and a few tokens of noise.

    A server's own times are claims; they cannot be more than what passes here.

    Raises:
        PeerError: it cannot be reached, refuses, or does not answer as it should.
    """
    now = swarm.clock.now
    began_at = now()
    stream = await swarm.connect(hop.server, SESSION)
    try:
        with stream.within(_ANSWER_S):
            length = _PROMPT + _TOKENS
            await stream.ask(Open(swarm.model.fingerprint, hop.start, hop.stop, length), Opened)
            open_s = now() - began_at
            prompt = await _step(swarm, stream, 0, _PROMPT, 1)
            steps = [await _step(swarm, stream, _PROMPT + at, 1, 2 + at) for at in range(_TOKENS)]
    finally:
        stream.close()
    compute_s = statistics.median(compute for _, compute, _ in steps)
    return HopFacts(
        peer_id=hop.server.peer_id,
        label=hop.server.label,
        start=hop.start,
        stop=hop.stop,
        round_trip_s=statistics.median(total - compute - queue for total, compute, queue in steps),
        compute_s=compute_s,
        queue_s=statistics.median(queue for _, _, queue in steps),
        prompt_token_s=min(prompt[1] / _PROMPT, compute_s),
        open_s=open_s,
        measured=True,
    )


async def _step(
    swarm: SwarmClient, stream: ClientStream, position: int, tokens: int, number: int
) -> tuple[float, float, float]:
    """Seconds of a step: in all, and of these for computing and in the queue, as the server says."""
    generator = torch.Generator().manual_seed(number)
    spec, data = codec.encode(torch.randn(1, tokens, swarm.model.hidden_size, generator=generator))
    stream.max_payload_bytes = spec.nbytes
    asked_at = swarm.clock.now()
    await stream.send(Step(position, spec, 1, number=number, patience_s=_ANSWER_S), [data])
    incoming = await stream.answer(StepDone)
    total_s = swarm.clock.now() - asked_at
    done = incoming.message
    if done.number != number or done.hidden.shape != (1, 1, swarm.model.hidden_size):
        raise ProtocolError("the answer to a trial is not what was asked for", stream.peer_id)
    await incoming.payload()
    compute_s = min(done.compute_ms / 1e3, total_s)
    return total_s, compute_s, min(done.queue_ms / 1e3, total_s - compute_s)
