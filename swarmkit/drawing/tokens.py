"""A text whose tokens are coloured by how likely the model found them, or by how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import exp
from statistics import median

from swarmkit.drawing import svg
from swarmkit.drawing.bundle import table
from swarmkit.drawing.values import StepPicture

_LIKELY, _UNLIKELY = 0.5, 0.1
_SLOW, _VERY_SLOW = 2.0, 5.0
"""Multiples of the median time of a token."""
_MOST_LISTED = 12


@dataclass(frozen=True)
class TokenPicture:
    """A token of a text.

    Attributes:
        logprob: the logarithm of its probability; None where that was not recorded.
        others: the likeliest tokens in its place, with the logarithms of their probabilities.
        step: the step that it came out of, where that is known.
    """

    text: str
    logprob: float | None = None
    others: Sequence[tuple[str, float]] = ()
    step: StepPicture | None = None

    @property
    def ms(self) -> float | None:
        """Its share of the time of its step."""
        return None if self.step is None else self.step.total_ms / max(1, self.step.tokens)


def tokens_html(before: str, tokens: Sequence[TokenPicture]) -> str:
    """The text as HTML: tokens below 50 % stand on amber, those below 10 % on red and underlined.

    Where no probabilities were recorded, tokens that took more than twice as long as the one in the middle
    stand on amber, and those that took more than five times as long on red. A table below lists the tokens
    that were least likely, with what the model found likelier.

    Args:
        before: the text that was given, which has no colours.
    """
    times = [token.ms for token in tokens if token.ms is not None and token.step and token.step.position]
    usual = median(times) if times else 0.0
    colours = "".join(_coloured(token, usual) for token in tokens)
    told = [(place, token, token.logprob) for place, token in enumerate(tokens, start=1)]
    rows = sorted(
        ((place, token, logprob) for place, token, logprob in told if logprob is not None),
        key=lambda each: each[2],
    )[:_MOST_LISTED]
    head = ("place", "token", "probability", "likelier or next")
    lines = [
        (str(place), repr(token.text), _percent(chance), _others(token)) for place, token, chance in rows
    ]
    listed = f"<details><summary>The least likely tokens</summary>{table([head, *lines])}</details>"
    return f"<span>{escape(before)}</span>{colours}{listed if rows else ''}"


def _coloured(token: TokenPicture, usual_ms: float) -> str:
    told = []
    if token.logprob is not None:
        told.append(f"{_percent(token.logprob)}; {_others(token)}")
    if token.step is not None:
        told.append(_way(token.step))
    title = escape(". ".join(told), quote=True)
    content = escape(token.text)
    colour = _colour(token, usual_ms)
    if colour is None:
        return f'<span title="{title}">{content}</span>'
    line = ";text-decoration:underline dotted" if colour == svg.RED else ""
    style = f"background:{svg.FILLS[colour]};color:{svg.INK};border-radius:3px{line}"
    return f'<span title="{title}" style="{style}">{content}</span>'


def _colour(token: TokenPicture, usual_ms: float) -> str | None:
    if token.logprob is not None:
        chance = exp(token.logprob)
        return None if chance >= _LIKELY else svg.AMBER if chance >= _UNLIKELY else svg.RED
    if token.ms is None or token.step is None or token.step.position == 0 or not usual_ms:
        return None
    return svg.RED if token.ms > _VERY_SLOW * usual_ms else svg.AMBER if token.ms > _SLOW * usual_ms else None


def _way(step: StepPicture) -> str:
    hops = " → ".join(f"{hop.label} {hop.total_ms:.1f} ms" for hop in step.hops)
    again = "; a server was replaced on the way" if step.recovered else ""
    several = f" for {step.tokens} tokens" if step.tokens > 1 else ""
    return f"{step.total_ms:.1f} ms{several}: {hops}{again}"


def _others(token: TokenPicture) -> str:
    return ", ".join(f"{text!r} {_percent(logprob)}" for text, logprob in token.others if text != token.text)


def _percent(logprob: float) -> str:
    return f"{exp(min(0.0, logprob)):.1%}"
