"""Asks servers for logits, and believes no more of an answer than can be checked. Runs on the event loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmkit.client.routing.bans import Bans
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import PeerError, PeerUnreachableError, ProtocolError
from swarmkit.events import LogitsServed, Owner
from swarmkit.ewma import Ewma
from swarmkit.models.head.output_layer import TopLogits
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.logits_messages import LOGITS, GetLogits, Logits
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.message_stream import IncomingMessage

logger = logging.getLogger(__name__)

_GAIN = 0.3
_SLOWEST_BYTES_PER_S = 100_000


@dataclass(frozen=True)
class Answer:
    """What a server told, and how many seconds that took, without the time to reach it."""

    logits: TopLogits
    server: Announcement
    seconds: float


class LogitsAsker:
    """The servers that compute a model's output layer, as one client knows them."""

    def __init__(self, swarm: SwarmClient, vocabulary: int) -> None:
        """Args: vocabulary: logits of a complete row."""
        self._swarm = swarm
        self._vocabulary = vocabulary
        routing = swarm.settings.routing
        self.bans = Bans(routing.ban_s, routing.max_ban_s, swarm.clock.now)
        """Of servers that did not answer a request for logits as they should."""
        self._idle: dict[str, list[ClientStream]] = {}
        """Streams that nobody uses, by server."""
        self._seconds: dict[str, Ewma] = {}
        """How long a server took for the largest logits, as seen."""

    def offers(self) -> list[Announcement]:
        """The servers that compute the output layer, the quickest first, as they say or as was seen."""
        found = [
            server
            for server in self._swarm.known.servers()
            if server.head_ms
            and not self.bans.is_banned(server.service_id)
            and not self._swarm.bans.is_banned(server.service_id)
        ]
        return sorted(found, key=self.expected_s)

    def expected_s(self, server: Announcement) -> float:
        """Seconds that a server will take for the largest logits of a token."""
        claimed_s = server.head_ms / 1e3 + self._swarm.routes.way_s(server.service_id)
        seen = self._seconds.get(server.service_id)
        return claimed_s if seen is None else seen.mean

    async def ask(self, hidden: Tensor, top: int, temperature: float) -> Answer:
        """Have the quickest server compute logits; the next one if it fails.

        Args:
            hidden: `[rows, hidden]`, float32, on the CPU.
            top: how many logits of each row; 0 = all.

        Raises:
            PeerError: none of the servers that offer it did.
        """
        while offers := self.offers():
            server = offers[0]
            try:
                return await self._ask(server, hidden, top, temperature)
            except PeerError as error:
                self.bans.failed(server.service_id)  # and with that it is no longer among the offers
                logger.info("%s did not compute the output layer: %s", server.label, error)
        raise PeerError("no server computes the output layer now")

    def convict(self, server: Announcement) -> None:
        """Leave a peer aside whose logits were found wrong, with all that it serves. On the event loop."""
        self._swarm.convict(server)

    async def _ask(self, server: Announcement, hidden: Tensor, top: int, temperature: float) -> Answer:
        swarm, rows = self._swarm, len(hidden)
        top = min(top, self._vocabulary)
        width = top or self._vocabulary
        largest = rows * (width * (12 if top else 4) + 4)
        spec, data = codec.encode(hidden)
        message = GetLogits(swarm.model.fingerprint, spec, top, temperature)
        free = self._idle.setdefault(server.service_id, [])
        while free:
            try:
                incoming, seconds = await self._exchange(server, free.pop(), message, data, largest)
                break
            except PeerUnreachableError:
                continue  # the server ended a stream that had been idle for long
        else:
            stream = await swarm.connect(server, LOGITS)
            incoming, seconds = await self._exchange(server, stream, message, data, largest)
        logits = self._checked(incoming, rows, top, temperature, server)
        self.bans.worked(server.service_id)
        if top:
            self._seconds.setdefault(server.service_id, Ewma(seconds, 0.0, _GAIN)).observe(seconds)
        reply: Logits = incoming.message
        swarm.events.emit(
            LogitsServed(
                server.peer_id,
                server.label,
                rows,
                top,
                seconds * 1e3,
                min(reply.compute_ms, seconds * 1e3),
                time=swarm.clock.time(),
                owner=Owner("client", swarm.peer_id),
            )
        )
        return Answer(logits, server, seconds)

    async def _exchange(
        self,
        server: Announcement,
        stream: ClientStream,
        message: GetLogits,
        data: memoryview,
        largest: int,
    ) -> tuple[IncomingMessage, float]:
        """Send a request over a stream, which is kept if it is answered; returns the seconds, too."""
        now = self._swarm.clock.now
        stream.max_payload_bytes = largest
        try:
            began_at = now()
            with stream.within(self._patience_s(server, largest)):
                await stream.send(message, [data])
                incoming = await stream.answer(Logits)
            seconds = now() - began_at
        except BaseException:
            stream.close()  # an answer that still comes must not be taken for the next one
            raise
        self._idle[server.service_id].append(stream)
        return incoming, seconds

    def _patience_s(self, server: Announcement, nbytes: int) -> float:
        deadlines = self._swarm.settings.deadlines
        usual = self._seconds.get(server.service_id)
        if usual is None:
            return deadlines.first_step_timeout_s
        return max(deadlines.min_step_timeout_s, deadlines.deadline_factor * usual.mean) + (
            nbytes / _SLOWEST_BYTES_PER_S
        )

    def _checked(
        self, incoming: IncomingMessage, rows: int, top: int, temperature: float, server: Announcement
    ) -> TopLogits:
        """An answer, as far as its form can be seen to be right.

        Raises:
            ProtocolError: it is none.
        """
        reply: Logits = incoming.message
        width = top or self._vocabulary

        def check(is_right: bool, what: str) -> None:
            if not is_right:
                raise ProtocolError(f"the logits cannot be used: {what}", server.peer_id)

        floats = (reply.values, (rows, width)), (reply.log_sum_exp, (rows,))
        for spec, shape in floats:
            check(spec.shape == shape, f"they must be {list(shape)}, got {list(spec.shape)}")
            check(spec.dtype == "float32" and spec.codec == "none", "they must be float32")
        check((reply.tokens is None) == (not top), "tokens stand beside the largest logits, and only there")
        values, total = incoming.tensor(reply.values), incoming.tensor(reply.log_sum_exp)
        check(codec.is_finite(values) and codec.is_finite(total), "they contain NaN or infinity")
        largest = values.amax(dim=1) / temperature
        # A sum over so many tokens is at least its largest part, and at most as large for each of them.
        room = torch.log(torch.tensor(float(self._vocabulary))) + 1e-2
        check(bool((total >= largest - 1e-2 - 1e-5 * largest.abs()).all()), "their sum is too small")
        check(bool((total <= largest + room + 1e-5 * largest.abs()).all()), "their sum is too large")
        if reply.tokens is None:
            return TopLogits(values, None, total)
        spec = reply.tokens
        check(spec.shape == (rows, top) and spec.dtype == "int64" and spec.codec == "none", "which tokens?")
        tokens = incoming.tensor(spec)
        check(bool(((tokens >= 0) & (tokens < self._vocabulary)).all()), "a token is none of the vocabulary")
        ordered = tokens.sort(dim=1).values
        check(bool((ordered[:, 1:] != ordered[:, :-1]).all()), "a token occurs twice")
        check(bool((values[:, 1:] <= values[:, :-1]).all()), "they do not begin with the largest")
        return TopLogits(values, tokens, total)
