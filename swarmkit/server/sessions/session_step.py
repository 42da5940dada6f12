"""One step of a session, as the engine runs it: from a peer's bytes to tensors, and back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.execution.transfer import to_device
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.conversation import Received
from swarmkit.server.cache.prefix_tracker import PrefixTracker
from swarmkit.server.sessions.session import Refusal, ServedSession

logger = logging.getLogger(__name__)

_MAX_POSITION = 2**24


@dataclass(eq=False)
class SessionStep:
    """What a step brought, and the cache that it is for; see `engine.StepTask`."""

    stage: Stage
    client: str
    of: ServedSession
    step: Step
    received: Received
    known: Tensor | None = field(default=None, init=False)

    @property
    def session(self) -> str:
        return self.of.inlet

    @property
    def shape(self) -> tuple[int, int]:
        rows, tokens, _ = self.step.hidden.shape
        return rows, tokens

    def begin(self) -> StepPart:
        """Decode, check values, and only then edit the cache."""
        step, received, stage, cache = self.step, self.received, self.stage, self.of.cache
        hidden = received.tensor(step.hidden)
        if not codec.is_finite(hidden):
            raise Refusal("not_finite", "the hidden states contain NaN or infinity")
        mask = received.tensor(step.mask) if step.mask is not None else None
        if mask is not None and bool((mask > 1).any()):
            raise Refusal("bad_value", "a mask may contain 0 and 1 only")
        positions = received.tensor(step.positions) if step.positions is not None else None
        if positions is not None and bool(((positions < 0) | (positions >= _MAX_POSITION)).any()):
            raise Refusal("bad_value", f"position ids must be in 0..{_MAX_POSITION - 1}")
        if step.position == 0:
            cache.clear()
        else:
            cache.edit(step.position, step.order)
        hidden = hidden.to(stage.dtype)
        if self.of.trail is not None:
            self._find_known(self.of.trail, hidden)
        return StepPart(
            to_device(hidden, stage.device),
            cache,
            None if mask is None else to_device(mask, stage.device),
            None if positions is None else to_device(positions, stage.device),
        )

    def finish(self, output: Tensor) -> tuple[TensorSpec, memoryview]:
        """The outputs that were asked for, as they go over the wire."""
        answers = self.step.answers
        return codec.encode(output[:, output.shape[1] - self.step.keep :], answers[0] if answers else "none")

    def afterwards(self, output: Tensor) -> None:
        """Keep what later sessions may begin with."""
        trail = self.of.trail
        if trail is None or trail.lost:
            return
        try:
            trail.follow(output[0], self.of.cache)
        except Exception:
            logger.exception("pages of a session could not be kept")
            trail.lose()

    def _find_known(self, trail: PrefixTracker, hidden: Tensor) -> None:
        """Look for pages that hold the beginning of the step."""
        step = self.step
        trail.cut(step.position)
        if hidden.shape[0] > 1 or step.mask is not None or step.positions is not None:
            trail.lose()
        elif trail.tokens == step.position:
            found = trail.find(hidden[0], self.of.cache)
            self.known = None if found is None else found[None]
        else:
            trail.lose()
