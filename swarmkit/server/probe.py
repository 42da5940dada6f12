"""A server asks itself for one token before it says that it is ready, by the way that clients' sessions go.

What loads need not work: weights may be damaged, a device may have no room left for a first step, an engine
may be stuck. A client would find that out with a user's prompt. The probe goes through everything but the
network: a stream, the messages of a session, the checks, the engine, the blocks.
"""

from __future__ import annotations

import anyio
import torch

from swarmkit.clock import Clock
from swarmkit.errors import PeerError, RemoteError, SwarmkitError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.messages import SESSION, Open, Opened, Step, StepDone
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.transport.memory import MemoryNetwork, MemoryStream
from swarmkit.server.serving import Serving

PROBE_S = 60.0
"""How long a server may take for its own token; a machine that is slower serves nobody well."""
_OWN_NAME = "probe"


class ProbeError(SwarmkitError):
    """Blocks are loaded, and yet do not answer a token as they should."""


async def probe(serving: Serving, fingerprint: str, clock: Clock) -> None:
    """Have a run of blocks answer a step of one token.

    A server that answers that it has no room works.

    Raises:
        ProbeError: it does not answer, or what it answers is not hidden states of the right form.
    """
    near, far = MemoryStream.pair(MemoryNetwork(), _OWN_NAME, _OWN_NAME)
    stream = ClientStream(near, SESSION, clock=clock.now)
    failure: PeerError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serving.sessions.serve, far)
        try:
            await _ask(stream, serving, fingerprint)
        except PeerError as error:
            failure = error
        finally:
            stream.close()
    if failure is not None and not (isinstance(failure, RemoteError) and failure.is_busy):
        low, high = serving.blocks
        raise ProbeError(
            f"blocks {low}:{high} are loaded but do not answer a token ({failure}); "
            "check their weights and the memory of the device"
        ) from failure


async def _ask(stream: ClientStream, serving: Serving, fingerprint: str) -> None:
    low, high = serving.blocks
    generator = torch.Generator().manual_seed(0)
    spec, data = codec.encode(torch.randn(1, 1, serving.stage.hidden_size, generator=generator))
    stream.max_payload_bytes = spec.nbytes
    with stream.within(PROBE_S):
        await stream.ask(Open(fingerprint, low, high, 1), Opened)
        await stream.send(Step(0, spec, 1, number=1), [data])
        incoming = await stream.answer(StepDone)
        output = incoming.tensor(incoming.message.hidden)
    if output.shape != spec.shape or not codec.is_finite(output):
        raise PeerError("the output has another form, or contains NaN or infinity")
