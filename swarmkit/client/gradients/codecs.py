"""In which codecs a request for training travels: decided as for sessions, from what was measured.

What a server is given counts as the codec changed it, and `Span.codec` notes which codec that was. The way
back brings the same bytes again: gradients are those of the pass that was computed, and its activations are
found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from swarmkit.client.gradients.flows import PassRequest, Span, WireCodecs
from swarmkit.client.session.codecs import CLIENT
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.net.protocol.codec import CodecName, dtype_name
from swarmkit.net.protocol.codec_choice import Transfer, choose, smallest
from swarmkit.net.protocol.messages import HIDDEN_DTYPES
from swarmkit.net.registry.records import Announcement

_ASSUMED_REQUEST_S = 0.1
Way = tuple[str, str]
"""Both ends of a link by their peer ids, in the direction of the transfer; "" is this client."""


@dataclass
class CodecChoice:
    """The codecs for one server's requests.

    Attributes:
        permitted: those that the server takes and gives.
        current: by way, what was chosen last; read and written.
        usual_s: seconds that the request is expected to take; None if that is not known.
    """

    swarm: SwarmClient
    server: Announcement
    permitted: Collection[CodecName]
    current: dict[Way, CodecName]
    usual_s: float | None

    def apply(self, question: PassRequest) -> PassRequest:
        """The request with its codecs, and with that of its inputs noted in its span."""
        span, gradient = question.span, question.gradient
        there, back = (CLIENT, self.server.peer_id), (self.server.peer_id, CLIENT)
        if question.is_repeated:
            return replace(question, codecs=WireCodecs(self._again(span)))
        dtype = self.server.dtype if self.server.dtype in HIDDEN_DTYPES else HIDDEN_DTYPES[0]
        answer = self._choose(back, question.answer_shape, dtype)
        if gradient is None:
            span = replace(span, codec=self._choose(there, span.given.shape, dtype_name(span.given.dtype)))
            return replace(question, span=span, codecs=WireCodecs(span.codec, answer=answer))
        of_gradient = self._choose(there, gradient.shape, dtype_name(gradient.dtype))
        return replace(question, codecs=WireCodecs(self._again(span), of_gradient, answer))

    def _again(self, span: Span) -> CodecName:
        """The codec for what was sent before, perhaps to a server that takes others."""
        return span.codec if span.codec in self.permitted else "none"

    def _choose(self, way: Way, shape: Sequence[int], dtype: str) -> CodecName:
        settings, rate = self.swarm.settings.transfer, self.swarm.rates.get(way)
        allowed = [name for name in settings.codecs if name in self.permitted]
        values = math.prod(shape)
        # What is not known yet is as if the transfer took all the time.
        seconds = self.usual_s or _ASSUMED_REQUEST_S + (values * 4 / rate if rate else 0.0)
        transfer = Transfer(values, shape[-1], dtype, seconds, rate)
        if settings.compress == "always":
            return smallest(allowed, transfer)
        self.current[way] = choose(allowed, self.current.get(way, "none"), transfer)
        return self.current[way]
