"""Text out of tokens: whole characters only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmkit.client.growing_text import GrowingText


def of_bytes(tokens: object) -> str:
    return bytes(tokens).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


@given(st.text(max_size=20))
def test_characters_are_told_when_their_last_byte_is_there(text: str) -> None:
    growing = GrowingText(of_bytes)
    told = [growing.add(byte) for byte in text.encode()]
    assert "".join(told) + growing.flush() == text
    assert (
        all("\N{REPLACEMENT CHARACTER}" not in piece for piece in told) or "\N{REPLACEMENT CHARACTER}" in text
    )


def test_a_character_that_stays_unfinished_is_told_at_the_end() -> None:
    growing = GrowingText(of_bytes)
    assert growing.add("ö".encode()[0]) == ""
    assert growing.flush() == "\N{REPLACEMENT CHARACTER}"
