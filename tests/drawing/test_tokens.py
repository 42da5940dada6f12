"""A text whose tokens are coloured by their probability."""

from __future__ import annotations

from math import log

import pytest

from swarmkit.drawing import svg
from swarmkit.drawing.tokens import TokenPicture, tokens_html

LIKELY = TokenPicture(" fox", log(0.9), [(" fox", log(0.9)), (" cat", log(0.05))])


@pytest.mark.parametrize(
    ("chance", "colour"), [(0.9, None), (0.3, svg.FILLS[svg.AMBER]), (0.01, svg.FILLS[svg.RED])]
)
def test_the_less_likely_a_token_the_stronger_its_colour(chance: float, colour: str | None) -> None:
    shown = tokens_html("", [TokenPicture("fox", log(chance))])
    assert [fill for fill in svg.FILLS.values() if fill in shown] == ([colour] if colour else [])


def test_an_unlikely_token_is_told_without_colour() -> None:
    assert "underline" in tokens_html("", [TokenPicture("fox", log(0.01))])


def test_a_token_names_what_was_likely_in_its_place() -> None:
    assert "90.0%; &#x27; cat&#x27; 5.0%" in tokens_html("A", [LIKELY])


def test_text_of_a_model_is_never_markup() -> None:
    shown = tokens_html("<b>", [TokenPicture("<script>", -9.0, [("'><i>", -1.0)])])
    assert not {"<b>", "<script>", "<i>"} & {part for part in ("<b>", "<script>", "<i>") if part in shown}


def test_a_text_without_a_token_has_no_list() -> None:
    assert tokens_html("A text", []) == "<span>A text</span>"
