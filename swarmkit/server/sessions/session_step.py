"""One step of a session, as the engine runs it: from a peer's bytes to tensors, and back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.execution.view import to_device
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.shares import Holder
from swarmkit.server.cache.prefix_tracker import PrefixTracker
from swarmkit.server.sessions.session import ServedSession

logger = logging.getLogger(__name__)

_MAX_POSITION = 2**24


@dataclass(eq=False)
class SessionStep:
    """A step that was received, and the session that it is for; see `work.StepTask`."""

    stage: Stage
    client: Holder
    of: ServedSession
    step: Step
    incoming: IncomingMessage
    cached_output: Tensor | None = field(default=None, init=False)

    @property
    def session(self) -> str:
        return self.of.inlet

    @property
    def shape(self) -> tuple[int, int]:
        rows, tokens, _ = self.step.hidden.shape
        return rows, tokens

    @property
    def past(self) -> int:
        return self.step.position

    def prepare(self) -> StepPart:
        """Decode the tensors, check their values, and only then edit the cache.

        Raises:
            Refusal: a value is not finite or out of range; the cache is unchanged.
        """
        step, incoming, stage, cache = self.step, self.incoming, self.stage, self.of.cache
        hidden = incoming.tensor(step.hidden)
        if not codec.is_finite(hidden):
            raise Refusal("not_finite", "the hidden states contain NaN or infinity")
        mask = incoming.tensor(step.mask) if step.mask is not None else None
        if mask is not None and bool((mask > 1).any()):
            raise Refusal("bad_value", "a mask may contain 0 and 1 only")
        positions = incoming.tensor(step.positions) if step.positions is not None else None
        if positions is not None and bool(((positions < 0) | (positions >= _MAX_POSITION)).any()):
            raise Refusal("bad_value", f"position ids must be in 0..{_MAX_POSITION - 1}")
        if step.position == 0:
            cache.clear()
        else:
            cache.edit(step.position, step.order)
        hidden = hidden.to(stage.dtype)
        if self.of.trail is not None:
            self._find_cached(self.of.trail, hidden)
        return StepPart(
            to_device(hidden, stage.device),
            cache,
            None if mask is None else to_device(mask, stage.device),
            None if positions is None else to_device(positions, stage.device),
        )

    def result(self, output: Tensor) -> tuple[TensorSpec, memoryview]:
        """Encode the outputs that the client asked for."""
        answers = self.step.answers
        return codec.encode(output[:, output.shape[1] - self.step.keep :], answers[0] if answers else "none")

    def after_result(self, output: Tensor) -> None:
        """Count the step's tokens, and keep full pages for later sessions that begin alike."""
        rows, tokens = self.shape
        self.of.served.count += rows * tokens
        tracker = self.of.trail
        if tracker is None or tracker.lost:
            return
        try:
            tracker.follow(output[0], self.of.cache)
        except Exception:
            logger.exception("pages of a session could not be kept")
            tracker.lose()

    def _find_cached(self, tracker: PrefixTracker, hidden: Tensor) -> None:
        """Put kept pages that hold the beginning of the step into the cache."""
        step = self.step
        tracker.cut(step.position)
        if hidden.shape[0] > 1 or step.mask is not None or step.positions is not None:
            tracker.lose()
        elif tracker.tokens == step.position:
            found = tracker.find(hidden[0], self.of.cache)
            self.cached_output = None if found is None else found[None]
        else:
            tracker.lose()
