"""Stop strings across the borders of tokens, and the answers that they end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmkit.api.row_text import StopStrings
from swarmkit.api.rows import AnswerEnd, AnswerPiece, AnswerRow
from swarmkit.client.token_chances import TokenChance, TokenRecord

PIECES = st.lists(st.text("abc", min_size=1, max_size=3), max_size=12)


def through(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stops = StopStrings(strings)
    text = "".join(stops.add(piece) for piece in pieces)
    return text + stops.flush(), stops.found


def of_bytes(tokens: object) -> str:
    return bytes(tokens).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


@given(PIECES)
def test_text_without_a_stop_string_comes_through_whole(pieces: list[str]) -> None:
    assert through(["abcd", "cad"], pieces) == ("".join(pieces), None)


@given(PIECES, st.text("abc", min_size=1, max_size=4))
def test_text_ends_before_the_stop_string_wherever_pieces_cut_it(pieces: list[str], stop: str) -> None:
    whole = "".join(pieces)
    before, found, _ = whole.partition(stop)
    assert through([stop], pieces) == (before, found or None)


@given(PIECES)
def test_nothing_is_told_that_might_belong_to_a_stop_string(pieces: list[str]) -> None:
    stops = StopStrings(["abca"])
    told = seen = ""
    for piece in pieces:
        told += stops.add(piece)
        seen += piece
        for rest in ("abca", "bca", "ca", "a"):
            assert (seen + rest).partition("abca")[0].startswith(told)


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert through(["end", "the"], ["say the", " end"]) == ("say ", "the")


def row_of(text: str, stops: list[str], end: bytes = b"") -> list[AnswerPiece | AnswerEnd]:
    told: list[AnswerPiece | AnswerEnd] = []
    row = AnswerRow(0, of_bytes, frozenset([0]), stops, told.append)
    for byte in text.encode() + end:
        row.add(byte, TokenRecord(TokenChance(byte, chr(byte), -1.0), ()))
    row.finish()
    return told


def test_probabilities_are_told_with_the_text_of_their_tokens() -> None:
    for event in row_of("say the end", ["then"]):
        if isinstance(event, AnswerPiece):
            assert event.text == "".join(each.chosen.text for each in event.tokens)


def test_tokens_of_a_stop_string_are_not_told() -> None:
    told = row_of("say the end", ["the"])
    tokens = [each.chosen.text for event in told if isinstance(event, AnswerPiece) for each in event.tokens]
    assert tokens == list("say ")
    assert told[-1] == AnswerEnd(0, "stop", "the", len("say the"))


def test_an_end_token_counts_as_generated_and_is_no_text() -> None:
    assert row_of("hi", [], b"\x00")[-1] == AnswerEnd(0, "stop", None, 3)


def test_an_answer_that_is_cut_off_ends_by_its_length_with_what_was_held_back() -> None:
    told = row_of("say th", ["the"])
    assert "".join(event.text for event in told if isinstance(event, AnswerPiece)) == "say th"
    assert told[-1] == AnswerEnd(0, "length", None, 6)
