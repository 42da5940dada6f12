"""Text out of the tokens of one answer, as it grows: whole characters only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """Decodes the tokens of one answer; each token costs the decoding of a few."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown_from = 0
        self._shown_to = 0

    def add(self, token: int) -> str:
        """Take a token; returns the text that it completes, which is empty inside a character."""
        self._tokens.append(token)
        text = self._unseen()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left at the end, whole or not."""
        text = self._unseen()
        self._shown_from = self._shown_to = len(self._tokens)
        return text

    def _unseen(self) -> str:
        # Tokenizers join tokens differently at the start of a text: decode the last ones with those before.
        before = self._decode(self._tokens[self._shown_from : self._shown_to])
        return self._decode(self._tokens[self._shown_from :])[len(before) :]
