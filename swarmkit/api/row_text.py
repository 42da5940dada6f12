"""Stop strings, wherever tokens cut them, in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of some strings occurs, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found: str | None = None
        """The string that ended the text, which is not part of it."""

    def add(self, text: str) -> str:
        """Take more text; returns what surely comes before any of the strings."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, s) for s in self._strings if (at := self._held.find(s)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: place[0])
            released, self._held = self._held[:at], ""
            return released
        keep = max((_overlap(self._held, string) for string in self._strings), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """What was held back, which is text after all."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` with which `string` begins, short of all of it."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
