"""Strangers by script: peers that announce any blocks at any speed, and treat sessions in a chosen manner.

Manners, by what a client meets at a stranger that has them:

=====================  ==================================================================================
`WORKING`              works as an honest server does
`SILENT`               takes the stream, and answers nothing
`MUTE`                 opens the session, and answers no step
`slow(seconds)`        answers everything, and each answer comes `seconds` late
`refusing(code, at)`   refuses the opening or each step with a fault of that code
`RESETTING`            ends the stream at the first message
`ABSENT`               announces, and is not there
`LYING`                answers steps with numbers of the right form that are not the blocks' output
`FLOODING`             sends answers without end that were not asked for
`REPLAYING`            answers each step with the output of the session's first one, as far as it goes
`after(steps, other)`  works for so many steps of a session, then has another manner
=====================  ==================================================================================

`STRANGE` has one of each that does harm. A stranger is a member of a `LocalSwarm`, over either transport, and
can be begun and ended on a running event loop too, as tests in virtual time need it::

    stranger = swarm.add(lambda place: Stranger(place.transport, swarm.checkpoint, SILENT))
    ...
    await Stranger(over_memory(network), checkpoint, MUTE, clock=clock).begin()

With `services=50` one peer announces 50 servers, which need one daemon only. `false_announcements` makes any
number of announcements, and `plant` puts them into an in-memory network without any peer behind them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import anyio.lowlevel
import msgspec
import torch

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import PeerError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kv.cache import StageCache
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.gradient_messages import GRADIENT, GetCodecs, TakenCodecs
from swarmkit.net.protocol.messages import (
    SESSION,
    Fault,
    FaultCode,
    GetInfo,
    Link,
    Open,
    Opened,
    PrefixRestored,
    RestorePrefix,
    ServerInfo,
    Step,
    StepDone,
)
from swarmkit.net.registry import records
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.records import Announcement, ServerState
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.message_stream import IncomingMessage, MessageStream
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Stream, Transport, endpoint_of

BOAST = 1e12
"""Tokens per second: the largest claim that a record can make."""
LIFETIME_S = 3000.0
MAX_STEP_TOKENS = 4096


class Talk:
    """A session of a client with a stranger, which works as it should unless a manner says otherwise."""

    def __init__(self, stranger: Stranger, stream: Stream) -> None:
        self.stranger = stranger
        self.conversation = MessageStream(stream, SESSION, 2**26)
        self.steps = 0
        """Steps that came, the present one included."""
        self.first: torch.Tensor | None = None
        """The output of the first step."""
        self._cache: StageCache | None = None
        self._blocks = stranger.blocks

    async def serve(self) -> None:
        """Answer until the stream ends."""
        with suppress(PeerError):
            while True:
                received = await self.conversation.receive()
                await self._answer(received)

    async def _answer(self, received: IncomingMessage) -> None:
        message, stranger = received.message, self.stranger
        stranger.met[type(message).__name__] += 1
        if isinstance(message, Open):
            self._blocks = (message.start, message.stop)
            await stranger.manner.at_open(self, message)
        elif isinstance(message, Step):
            self.steps += 1
            await stranger.manner.at_step(self, received, message)
        elif isinstance(message, RestorePrefix):
            await self.conversation.send(PrefixRestored(0))
        elif isinstance(message, Link):
            await self.refuse("not_linked")
        elif isinstance(message, GetInfo):
            await stranger.manner.at_info(self)

    def output(self, received: IncomingMessage, step: Step) -> torch.Tensor:
        """What the blocks make of a step `[batch, keep, hidden]`; noise if the stranger has no blocks."""
        hidden = received.tensor(step.hidden).float()
        stage = self.stranger.stage
        if stage is None:
            return noise(hidden)[:, hidden.shape[1] - step.keep :]
        if self._cache is None:
            self._cache = stage.new_cache(*self._blocks)
        self._cache.edit(step.position, step.order)
        output = stage.forward(
            hidden,
            self._cache,
            attention_mask=None if step.mask is None else received.tensor(step.mask),
            position_ids=None if step.positions is None else received.tensor(step.positions),
        )
        if self.first is None:
            self.first = output
        return output[:, output.shape[1] - step.keep :]

    async def accept(self) -> None:
        """Open the session."""
        await self.conversation.send(Opened(MAX_STEP_TOKENS))

    async def answer(self, step: Step, output: torch.Tensor) -> None:
        """Answer a step with an output."""
        spec, data = codec.encode(output.contiguous())
        await self.conversation.send(StepDone(spec, 0.0, 0.0, number=step.number), [data])

    async def refuse(self, code: FaultCode, number: int = 0) -> None:
        """Answer with a fault."""
        await self.conversation.send(Fault(code, f"a stranger says {code}", number))


class TrainingTalk:
    """Requests of a client that trains. A stranger computes none of them; its manner says what it does."""

    def __init__(self, stranger: Stranger, stream: Stream) -> None:
        self.conversation = MessageStream(stream, GRADIENT, 2**26)
        self._stranger = stranger

    async def serve(self) -> None:
        """Answer until the stream ends."""
        with suppress(PeerError):
            while True:
                message = (await self.conversation.receive()).message
                self._stranger.met[type(message).__name__] += 1
                if isinstance(message, GetCodecs):
                    await self.conversation.send(TakenCodecs())
                else:
                    await self._stranger.manner.at_training(self)

    async def refuse(self, code: FaultCode) -> None:
        """Answer with a fault."""
        await self.conversation.send(Fault(code, f"a stranger says {code}"))


class Manner:
    """How a stranger treats a session; this one works as it should."""

    exists = True
    """Whether there is a peer behind the announcement."""

    async def at_open(self, talk: Talk, message: Open) -> None:
        await talk.accept()

    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await talk.answer(step, talk.output(received, step))

    async def at_info(self, talk: Talk) -> None:
        start, stop = talk.stranger.blocks
        await talk.conversation.send(ServerInfo(start, stop, 0, 2**20, 2**20, 0, False))

    async def at_training(self, talk: TrainingTalk) -> None:
        await talk.refuse("internal")


class _Silent(Manner):
    async def at_open(self, talk: Talk, message: Open) -> None:
        await asyncio.Event().wait()

    async def at_info(self, talk: Talk) -> None:
        await asyncio.Event().wait()

    async def at_training(self, talk: TrainingTalk) -> None:
        await asyncio.Event().wait()


class _Mute(Manner):
    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await asyncio.Event().wait()


class _Slow(Manner):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def at_open(self, talk: Talk, message: Open) -> None:
        await asyncio.sleep(self._seconds)
        await talk.accept()

    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await asyncio.sleep(self._seconds)
        await talk.answer(step, talk.output(received, step))


class _Refusing(Manner):
    def __init__(self, code: FaultCode, at: str) -> None:
        self._code: FaultCode = code
        self._at = at

    async def at_open(self, talk: Talk, message: Open) -> None:
        await (talk.refuse(self._code) if self._at == "open" else talk.accept())

    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await talk.refuse(self._code, step.number)

    async def at_training(self, talk: TrainingTalk) -> None:
        await talk.refuse(self._code)


class _Resetting(Manner):
    async def at_open(self, talk: Talk, message: Open) -> None:
        talk.conversation.close()


class _Absent(Manner):
    exists = False


class _Lying(Manner):
    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await talk.answer(step, -talk.output(received, step).roll(1, dims=-1))


class _Flooding(Manner):
    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        output = talk.output(received, step)
        while True:
            await talk.answer(msgspec.structs.replace(step, number=step.number + 1000), output)
            await anyio.lowlevel.checkpoint()  # else a loop that the client shares would never hear its end


class _Replaying(Manner):
    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        output = talk.output(received, step)
        if talk.first is None:
            talk.first = output
        replayed = talk.first[: output.shape[0], -output.shape[1] :]
        await talk.answer(step, replayed if replayed.shape == output.shape else output)


class _After(Manner):
    def __init__(self, steps: int, other: Manner) -> None:
        self._steps = steps
        self._other = other

    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        manner = self._other if talk.steps > self._steps else WORKING
        await manner.at_step(talk, received, step)


WORKING = Manner()
SILENT = _Silent()
MUTE = _Mute()
RESETTING = _Resetting()
ABSENT = _Absent()
LYING = _Lying()
FLOODING = _Flooding()
REPLAYING = _Replaying()
slow = _Slow
refusing = _Refusing
after = _After

STRANGE: dict[str, Manner] = {
    "silent": SILENT,
    "mute": MUTE,
    "slow just under the deadline": slow(4.5),
    "refusing the opening": refusing("bad_shape", "open"),
    "refusing steps as malformed": refusing("bad_shape", "step"),
    "refusing steps as not finite": refusing("not_finite", "step"),
    "resetting": RESETTING,
    "absent": ABSENT,
    "lying": LYING,
    "flooding": FLOODING,
    "replaying": REPLAYING,
}
"""One manner of each kind that does harm, by what it is called."""


class Stranger:
    """A peer that announces blocks; `swarmkit.local.member.Member` for threads, `begin` and `end` for a loop.

    Args:
        join: how to reach the swarm.
        manner: how it treats its clients; may be changed at any time.
        blocks: that it announces, [a, b); all if not given.
        claims: the tokens per second that it announces.
        stage: computes for those manners that work at least in part; without it outputs are noise.
        services: so many servers of this one peer, all alike.
    """

    def __init__(
        self,
        join: TransportFactory,
        checkpoint: Checkpoint,
        manner: Manner,
        *,
        blocks: tuple[int, int] | None = None,
        claims: float = BOAST,
        stage: Stage | None = None,
        services: int = 1,
        name: str = "stranger",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.manner = manner
        self.blocks = blocks or (0, checkpoint.num_blocks)
        self.stage = stage
        self.identity = Identity()
        self.met: Counter[str] = Counter()
        """How many messages of each kind came."""
        self._join = join
        self._checkpoint = checkpoint
        self._claims = claims
        self._services = services
        self._name = name
        self._clock = clock
        self._transport: Transport | None = None
        self._lease: portal.PortalLease | None = None

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return () if self._transport is None else self._transport.addresses

    # on a running loop

    async def begin(self) -> Stranger:
        """Join, serve and announce."""
        transport = self._transport = await self._reach()
        for service in range(self._services):
            await transport.listen(endpoint_of(SESSION.endpoint, service), self._serve)
            await transport.listen(endpoint_of(GRADIENT.endpoint, service), self._serve_training)
        await self.announce("online")
        if not self.manner.exists:
            await transport.close()
        return self

    async def announce(self, state: ServerState) -> None:
        """Say again that the blocks are here, or that they leave."""
        assert self._transport is not None
        registry = Registry(self._transport, self._clock.time)
        words = [
            false_announcement(
                self._checkpoint,
                self.identity,
                self._clock,
                blocks=self.blocks,
                claims=self._claims,
                state=state,
                name=f"{self._name}-{service}" if service else self._name,
                addresses=tuple(self._transport.addresses),
                service=service,
            )
            for service in range(self._services)
        ]
        await asyncio.gather(*map(registry.announce, words))

    async def end(self) -> None:
        """Take the announcements back, and leave."""
        if self._transport is None:
            return
        if not self.manner.exists:
            self._transport = await self._reach()
        with suppress(Exception):
            await self.announce("leaving")
        await self._transport.close()

    async def _reach(self) -> Transport:
        clock = self._clock
        return await self._join(
            self.identity,
            lambda key, subkey, value, expires_at: is_acceptable(
                key, subkey, value, expires_at, clock.time()
            ),
        )

    async def _serve(self, stream: Stream) -> None:
        await Talk(self, stream).serve()

    async def _serve_training(self, stream: Stream) -> None:
        await TrainingTalk(self, stream).serve()

    # in a thread

    def start(self) -> None:
        """Join, serve and announce, on the background event loop."""
        self._lease = portal.lease()
        self._lease.call(self.begin)

    def stop(self, drain_timeout: float | None = None) -> None:
        """Take the announcements back, and leave."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with lease:
                lease.call(self.end)

    def kill(self) -> None:
        """Vanish; the announcements stay."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with lease:
                assert self._transport is not None
                lease.call(self._transport.close)


def noise(hidden: torch.Tensor) -> torch.Tensor:
    """Finite numbers in the form of hidden states, always the same."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))


def false_announcement(
    checkpoint: Checkpoint,
    identity: Identity,
    clock: Clock = SYSTEM_CLOCK,
    *,
    blocks: tuple[int, int] | None = None,
    claims: float = BOAST,
    state: ServerState = "online",
    name: str = "",
    addresses: tuple[str, ...] = (),
    service: int = 0,
) -> Announcement:
    """What a stranger says of itself; it can be signed with `identity`."""
    start, stop = blocks or (0, checkpoint.num_blocks)
    return Announcement(
        peer_id=identity.peer_id,
        fingerprint=checkpoint.fingerprint,
        model="a stranger's",
        num_blocks=checkpoint.num_blocks,
        start=start,
        stop=stop,
        state=state,
        throughput=claims,
        free_cache_tokens=2**40,
        dtype="float32",
        addresses=addresses,
        public_name=name,
        service=service,
        sequence=int(clock.time() * 1e9),
        expires_at=clock.time() + LIFETIME_S,
    )


def false_announcements(
    number: int,
    checkpoint: Checkpoint,
    clock: Clock = SYSTEM_CLOCK,
    blocks: Callable[[int], tuple[int, int]] | None = None,
) -> list[tuple[Identity, Announcement]]:
    """So many announcements of different peers, and what they are signed with.

    Args: blocks: those that each of them announces; all if not given.
    """
    made = []
    for index in range(number):
        identity = Identity()
        span = None if blocks is None else blocks(index)
        made.append((identity, false_announcement(checkpoint, identity, clock, blocks=span)))
    return made


async def plant(network: MemoryNetwork, made: Iterable[tuple[Identity, Announcement]]) -> None:
    """Put announcements into a network's table; the peers that they name are not there."""
    for identity, word in made:
        value = records.sign(word, identity)
        transport = network.transport(identity)
        try:
            await transport.store([(key, value) for key in records.keys_of(word)], word.expires_at)
        finally:
            await transport.close()
