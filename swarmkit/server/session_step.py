"""One step of a session, as the engine runs it: from a peer's bytes to tensors, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swarmkit.models.stage import Stage, StepPart
from swarmkit.net import codec
from swarmkit.net.codec import TensorSpec
from swarmkit.net.conversation import Received
from swarmkit.net.messages import Step
from swarmkit.server.sessions import Refusal, Session

_MAX_POSITION = 2**24


@dataclass(frozen=True, eq=False)
class SessionStep:
    """What a step brought, and the cache that it is for; see `engine.StepTask`."""

    stage: Stage
    client: str
    of: Session
    step: Step
    received: Received

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
        return StepPart(
            hidden.to(device=stage.device, dtype=stage.dtype),
            cache,
            None if mask is None else mask.to(stage.device),
            None if positions is None else positions.to(stage.device),
        )

    def finish(self, output: Tensor) -> tuple[TensorSpec, memoryview]:
        """The outputs that were asked for, as they go over the wire."""
        return codec.encode(output[:, output.shape[1] - self.step.keep :])
