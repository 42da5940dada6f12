"""A text whose tokens are coloured by their probability."""

from __future__ import annotations

from math import log

import pytest

from swarmkit.drawing import svg
from swarmkit.drawing.tokens import TokenPicture, tokens_html
from swarmkit.drawing.values import HopPicture, StepPicture

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


def stepped(text: str, ms: float, tokens: int = 1, recovered: bool = False) -> TokenPicture:
    hop = HopPicture("a", "cedar", 0, 4, compute_ms=ms)
    return TokenPicture(text, step=StepPicture(1, 7, tokens, ms, (hop,), recovered))


@pytest.mark.parametrize(
    ("ms", "colour"), [(15.0, None), (30.0, svg.FILLS[svg.AMBER]), (90.0, svg.FILLS[svg.RED])]
)
def test_without_probabilities_the_slower_a_token_the_stronger_its_colour(
    ms: float, colour: str | None
) -> None:
    shown = tokens_html("", [*(stepped("a", 10.0) for _ in range(5)), stepped("fox", ms)])
    assert [fill for fill in svg.FILLS.values() if fill in shown] == ([colour] if colour else [])
    assert "<details>" not in shown


def test_a_token_tells_its_way_through_the_swarm() -> None:
    shown = tokens_html("", [stepped("fox", 12.0, tokens=3, recovered=True)])
    assert 'title="12.0 ms for 3 tokens: cedar 12.0 ms; a server was replaced on the way"' in shown
