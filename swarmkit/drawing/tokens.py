"""A text whose tokens are coloured by how likely the model found them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import exp

from swarmkit.drawing import svg
from swarmkit.drawing.bundle import table

_LIKELY, _UNLIKELY = 0.5, 0.1
_MOST_LISTED = 12


@dataclass(frozen=True)
class TokenPicture:
    """A token of a text.

    Attributes:
        logprob: the logarithm of its probability.
        others: the likeliest tokens in its place, with the logarithms of their probabilities.
    """

    text: str
    logprob: float
    others: Sequence[tuple[str, float]] = ()


def tokens_html(before: str, tokens: Sequence[TokenPicture]) -> str:
    """The text as HTML: tokens below 50 % stand on amber, those below 10 % on red and underlined.

    A table below lists the tokens that were least likely, with what the model found likelier.

    Args:
        before: the text that was given, which has no colours.
    """
    colours = "".join(_coloured(token) for token in tokens)
    rows = sorted(enumerate(tokens, start=1), key=lambda each: each[1].logprob)[:_MOST_LISTED]
    head = ("place", "token", "probability", "likelier or next")
    lines = [
        (str(number), repr(token.text), _percent(token.logprob), _others(token)) for number, token in rows
    ]
    listed = f"<details><summary>The least likely tokens</summary>{table([head, *lines])}</details>"
    return f"<span>{escape(before)}</span>{colours}{listed if tokens else ''}"


def _coloured(token: TokenPicture) -> str:
    chance = exp(token.logprob)
    title = escape(f"{_percent(token.logprob)}; {_others(token)}", quote=True)
    if chance >= _LIKELY:
        return f'<span title="{title}">{escape(token.text)}</span>'
    colour = svg.AMBER if chance >= _UNLIKELY else svg.RED
    line = ";text-decoration:underline dotted" if chance < _UNLIKELY else ""
    style = f"background:{svg.FILLS[colour]};color:{svg.INK};border-radius:3px{line}"
    return f'<span title="{title}" style="{style}">{escape(token.text)}</span>'


def _others(token: TokenPicture) -> str:
    return ", ".join(f"{text!r} {_percent(logprob)}" for text, logprob in token.others if text != token.text)


def _percent(logprob: float) -> str:
    return f"{exp(min(0.0, logprob)):.1%}"
