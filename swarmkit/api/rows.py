"""One answer as it grows: tokens go in, and text, probabilities and the reason of its end come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from swarmkit.api.row_text import StopStrings
from swarmkit.client.growing_text import GrowingText
from swarmkit.client.token_chances import TokenRecord

EndReason = Literal["stop", "length"]


@dataclass(frozen=True)
class AnswerPiece:
    """More text of one of the answers; `tokens` only where probabilities were asked for."""

    row: int
    text: str
    tokens: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True)
class AnswerEnd:
    """One of the answers has ended.

    Attributes:
        stop: the stop string that ended it, if one did.
        generated: tokens that the model made, the one that ends the answer included.
    """

    row: int
    reason: EndReason
    stop: str | None
    generated: int


class AnswerRow:
    """Follows the tokens of one answer."""

    def __init__(
        self,
        row: int,
        decode: Callable[[Sequence[int]], str],
        ends: frozenset[int],
        stops: Sequence[str],
        emit: Callable[[AnswerPiece | AnswerEnd], None],
    ) -> None:
        """Begin an answer.

        Args:
            decode: turns token ids into text.
            ends: tokens that end an answer and are no part of its text.
            emit: called with each piece, and with the end.
        """
        self._row = row
        self._text = GrowingText(decode)
        self._stops = StopStrings(stops)
        self._ends = ends
        self._emit = emit
        self._records: deque[TokenRecord] = deque()
        self._decoded = 0
        self._released = 0
        self._generated = 0
        self.is_done = False

    def add(self, token: int, record: TokenRecord | None = None) -> None:
        """Take the next token; one after the end is ignored."""
        if self.is_done:
            return
        self._generated += 1
        if token in self._ends:
            self._finish("stop")
            return
        if record is not None:
            self._records.append(TokenRecord(record.chosen, record.likeliest, self._decoded))
        self._take(self._text.add(token))
        if self._stops.found is not None:
            self._end("stop")

    def finish(self) -> None:
        """The model made as many tokens as it may."""
        if not self.is_done:
            self._finish("length")

    def _take(self, text: str) -> None:
        self._decoded += len(text)
        self._release(self._stops.add(text), last=self._stops.found is not None)

    def _release(self, text: str, last: bool = False) -> None:
        self._released += len(text)
        held = self._decoded > self._released  # tokens from here on wait for their text
        tokens = []
        while self._records and (self._records[0].offset < self._released or not (held or last)):
            tokens.append(self._records.popleft())
        if text or tokens:
            self._emit(AnswerPiece(self._row, text, tuple(tokens)))

    def _finish(self, reason: EndReason) -> None:
        self._take(self._text.flush())
        if self._stops.found is None:
            self._release(self._stops.flush())
        self._end("stop" if self._stops.found is not None else reason)

    def _end(self, reason: EndReason) -> None:
        self.is_done = True
        self._emit(AnswerEnd(self._row, reason, self._stops.found, self._generated))
