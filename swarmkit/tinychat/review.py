"""Short reviews, good and bad: put together from a subject, a judgement and a closing remark.

Held out are whole combinations. Every part is trained, also next to every other part's company, but the
held-out three never appear together. Some judgements are negated ("not bad at all"), so the label cannot be
read off a single word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from swarmkit.tinychat.pool import Entry, entry, rng_for

Label = Literal["positive", "negative"]
Split = Literal["train", "held_out"]

_SUBJECTS: Final = (
    "The pea soup",
    "The honey cake",
    "The fish pie",
    "The boat trip",
    "The concert",
    "The new inn",
    "The market",
    "The play",
    "The room",
    "The garden tour",
    "The book",
    "The warm bread",
    "The service",
    "My visit to Oakford",
    "My weekend in Saltmere",
    "The music in Larkhill",
    "The clock I bought",
    "The ride to Dunmoor",
    "The dinner",
    "The apple pie",
)
_GOOD: Final = (
    "was wonderful",
    "was really good",
    "was a delight",
    "was better than I hoped",
    "made me very happy",
    "was not bad at all",
    "was lovely",
    "was worth every coin",
    "was perfect",
    "could not have been better",
    "was a great surprise",
    "was never boring",
)
_BAD: Final = (
    "was terrible",
    "was really bad",
    "was a waste of time",
    "was worse than I feared",
    "made me very sad",
    "was not good at all",
    "was awful",
    "was not worth a single coin",
    "was a mess",
    "could not have been worse",
    "was a great disappointment",
    "was never fun",
)
_GOOD_ENDS: Final = (
    "I will come back soon.",
    "I told all my friends to go.",
    "I smiled all day.",
    "Thank you so much!",
    "I want more of it.",
    "Everyone was kind.",
)
_BAD_ENDS: Final = (
    "I will never come back.",
    "I told all my friends to stay away.",
    "I cried all day.",
    "I want my money back!",
    "I left early.",
    "Everyone was rude.",
)
_NEUTRAL_ENDS: Final = ("", "It was a rainy day.", "I went there on Monday.", "My sister came with me.")

_ASK: Final = (
    "Is this review positive or negative? {t}",
    "Did the writer like it? {t}",
    "Judge this review: {t}",
    "Review: {t} Is it positive or negative?",
    "What is the mood of this review? {t}",
    "Tell me if this review is good or bad: {t}",
)


def reviews(split: Split, seed: int = 0) -> Iterator[tuple[str, Label]]:
    """Every review of one split with its label, in a shuffled order that the seed fixes.

    >>> text, label = next(reviews("train"))
    >>> label in ("positive", "negative")
    True
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; use 'train' or 'held_out'")
    rng = rng_for(seed, "reviews")
    every: list[tuple[str, Label]] = []
    for subject in _SUBJECTS:
        for label, judgements, ends in _SIDES:
            for judgement in judgements:
                every.extend(
                    (f"{subject} {judgement}. {end}".strip(), label) for end in (*ends, *_NEUTRAL_ENDS)
                )
    rng.shuffle(every)
    edge = len(every) // 10
    yield from every[:edge] if split == "held_out" else every[edge:]


_SIDES: Final[tuple[tuple[Label, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("positive", _GOOD, _GOOD_ENDS),
    ("negative", _BAD, _BAD_ENDS),
)


def review_questions(seed: int) -> Iterator[Entry]:
    """Each review in each phrasing of the question what its mood is."""
    splits: tuple[Split, ...] = ("train", "held_out")
    for split in splits:
        for text, label in reviews(split, seed):
            for phrasing in _ASK:
                yield entry(
                    "sentiment", phrasing.format(t=text), f"This review is {label}.", split == "held_out"
                )
