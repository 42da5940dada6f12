"""Inputs of a forked session that its servers have not been given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarmkit.errors import SessionError


@dataclass(frozen=True)
class Unsent:
    """What a forked session holds before its first step: inputs that its servers have not been given.

    Attributes:
        hidden: `[batch, tokens, hidden]`, on the CPU.
        positions: `[batch, tokens]`; None = 0, 1, …
    """

    hidden: torch.Tensor
    positions: torch.Tensor | None

    def followed_by(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One step with all of it and new tokens behind."""
        rows, held, _ = self.hidden.shape
        if hidden.shape[0] != rows:
            raise SessionError(f"the session holds {rows} rows, the step has {hidden.shape[0]}")
        whole = torch.cat([self.hidden.to(hidden.dtype), hidden], dim=1)
        if positions is None and self.positions is None:
            return whole, mask, None
        default = torch.arange(whole.shape[1]).expand(rows, -1)
        before = default[:, :held] if self.positions is None else self.positions
        after = default[:, held:] if positions is None else positions
        return whole, mask, torch.cat([before, after], dim=1)

    def cropped(self, tokens: int) -> Unsent | None:
        """The first `tokens` positions; None if `tokens` is 0."""
        held = self.hidden.shape[1]
        if not 0 <= tokens <= held:
            raise SessionError(f"cannot keep {tokens} of {held} tokens")
        positions = None if self.positions is None else self.positions[:, :tokens]
        return Unsent(self.hidden[:, :tokens], positions) if tokens else None

    def reordered(self, order: Sequence[int]) -> Unsent:
        """Row i becomes what row order[i] was."""
        rows = list(order)
        return Unsent(self.hidden[rows], None if self.positions is None else self.positions[rows])
