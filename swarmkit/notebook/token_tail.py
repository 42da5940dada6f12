"""The last tokens of an answer under way, for the text below a pipeline."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.generation import BaseStreamer

from swarmkit.client.growing_text import GrowingText
from swarmkit.client.token_chances import ChanceRecorder, TokenRecord
from swarmkit.drawing.tokens import TokenPicture
from swarmkit.drawing.values import StepPicture

if TYPE_CHECKING:
    import torch

KEPT = 200
"""Tokens that are shown."""


class TokenTail(BaseStreamer):
    """A streamer for transformers that remembers the last tokens, and hands all on to another streamer."""

    takes_several = True

    def __init__(
        self, decode: Callable[[Sequence[int]], str], then: Any = None, recorder: ChanceRecorder | None = None
    ) -> None:
        """Begin.

        Args:
            then: the streamer that the caller of `generate()` gave.
            recorder: one of the logits processors of the same call, for probabilities.
        """
        self._text = GrowingText(decode)
        self._then = then
        self._recorder = recorder
        self._lock = threading.Lock()
        self._position: int | None = None
        self._tokens: deque[tuple[int, TokenPicture]] = deque(maxlen=KEPT)
        if then is not None:
            self.takes_several = getattr(then, "takes_several", False)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, and then tokens of one answer."""
        if self._position is None:
            self._position = value.shape[-1]
        else:
            for token in value.reshape(-1).tolist():
                self._add(token)
        if self._then is not None:
            self._then.put(value)

    def end(self) -> None:
        """The answer is complete."""
        if self._then is not None:
            self._then.end()

    def pictures(self, steps: Sequence[StepPicture]) -> list[TokenPicture]:
        """The tokens, each with the step that made it.

        Args: steps: those that are known, oldest first.
        """
        with self._lock:
            tokens = list(self._tokens)
        if not tokens:
            return []
        first = tokens[0][0]
        # A token comes out of the step that took in the one before it.
        made = {
            position + 1: step
            for step in steps
            for position in range(max(step.position, first - 1), step.position + step.tokens)
        }
        return [replace(token, step=made.get(position)) for position, token in tokens]

    def _add(self, token: int) -> None:
        assert self._position is not None
        record = None if self._recorder is None else self._recorder.take(self._position, [token])[0]
        text = self._text.add(token)
        with self._lock:
            self._tokens.append((self._position, _picture(text, record)))
        self._position += 1


def _picture(text: str, record: TokenRecord | None) -> TokenPicture:
    if record is None:
        return TokenPicture(text)
    others = [(each.text, each.logprob) for each in record.likeliest]
    return TokenPicture(text, record.chosen.logprob, others)
