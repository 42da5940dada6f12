"""The generator: pools of questions, the split between trained and held out, and endless dialogues."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Final

from swarmkit.tinychat.pool import Entry, Message, Question, assistant, rng_for, system
from swarmkit.tinychat.review import review_questions
from tools.tinychat.ask import fact_questions
from tools.tinychat.claims import yes_no_questions
from tools.tinychat.echo import repeat_held_out, repeat_question
from tools.tinychat.outside import made_up_question, outside_questions
from tools.tinychat.sums import sum_questions
from tools.tinychat.tales import descriptions, stories
from tools.tinychat.talk import SYSTEM_PLAIN, follow_ups, memory_held_out, memory_segment, small_talk

MOST_PER_KIND: Final = 100
"""Held-out questions asked per kind; a longer list is sampled down."""

_DRILLS: Final = 0.12
"""The share of dialogues that are nothing but sums, which is the cheapest way to see many of them."""
_DRILL_KINDS: Final = ("addition", "subtraction", "multiplication", "comparing")
_DRILL_WEIGHTS: Final = (40, 35, 15, 10)

_WEIGHTS: Final[dict[str, float]] = {
    "people": 17, "towns": 6, "animals": 6, "jobs": 5, "foods": 2, "yes or no": 8,
    "addition": 11, "subtraction": 10, "multiplication": 5, "comparing": 4, "counting": 4, "sentiment": 7,
    "small talk": 8, "descriptions": 5, "stories": 4, "follow-ups": 9, "memory": 7, "outside": 11,
    "repeating": 9,
}  # fmt: skip
"""How often each kind comes up in training. Arithmetic is a skill to learn, so it comes up more often."""


@lru_cache(maxsize=2)
def _entries(seed: int) -> dict[str, list[Entry]]:
    pools: dict[str, list[Entry]] = defaultdict(list)
    every = chain(
        fact_questions(seed), yes_no_questions(seed), sum_questions(seed), review_questions(seed),
        small_talk(seed), descriptions(seed), stories(seed), follow_ups(seed), memory_held_out(seed),
        outside_questions(seed), repeat_held_out(seed),
    )  # fmt: skip
    for item in every:
        pools[item.question.kind].append(item)
    return dict(pools)


def trained_questions(seed: int = 0) -> Iterator[Question]:
    """Every question of the finite pools that training draws from; "memory" and "repeating" are endless."""
    return (e.question for pool in _entries(seed).values() for e in pool if not e.held_out)


def held_out(seed: int = 0) -> list[Question]:
    """The questions kept out of ``dialogues(seed)``, at most ``MOST_PER_KIND`` of each kind.

    The split belongs to the seed: the shipped checkpoint was trained on seed 0, so measure it on seed 0.
    """
    chosen: list[Question] = []
    for kind, pool in _entries(seed).items():
        questions = [e.question for e in pool if e.held_out]
        if len(questions) > MOST_PER_KIND:
            questions = rng_for(seed, f"held out/{kind}").sample(questions, MOST_PER_KIND)
        chosen.extend(questions)
    return chosen


def dialogues(seed: int = 0) -> Iterator[list[Message]]:
    """Training dialogues without end, as chat messages; the same seed gives the same stream.

    >>> first = next(dialogues())
    >>> first[-1]["role"]
    'assistant'
    """
    rng = rng_for(seed, "dialogues")
    pools = {kind: [e.question for e in pool if not e.held_out] for kind, pool in _entries(seed).items()}
    claims = [question for question in pools["yes or no"] if question.answer.startswith("Yes")]
    forbidden = frozenset(e.question.answer for e in _entries(seed)["repeating"])
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())

    def segment(kind: str) -> list[Message]:
        if kind == "repeating":
            question = repeat_question(rng, forbidden).question
        elif kind == "outside" and rng.random() < 0.35:
            question = made_up_question(rng).question
        elif kind == "yes or no" and rng.random() < 0.4:
            question = rng.choice(claims)  # most claims in the pool are wrong, so right ones are favoured
        else:
            question = rng.choice(pools[kind])
        return [*question.messages, assistant(question.answer)]

    def some(turns: int, leave_out: tuple[str, ...] = ("memory",)) -> list[Message]:
        # Several sums in a row are cheap in tokens, so a kind is often kept for the whole dialogue.
        kind, keep = rng.choices(kinds, weights)[0], rng.random() < 0.3
        messages: list[Message] = []
        for _ in range(turns):
            while kind in leave_out:
                kind = rng.choices(kinds, weights)[0]
            messages += segment(kind)
            if not keep:
                kind = rng.choices(kinds, weights)[0]
        return messages

    while True:
        turns = rng.choices((1, 2, 3, 6), (45, 30, 20, 5))[0]
        if rng.random() < _DRILLS:
            drilled = rng.choices(_DRILL_KINDS, _DRILL_WEIGHTS, k=8)
            messages = [message for kind in drilled for message in segment(kind)]
        elif rng.random() < _WEIGHTS["memory"] / sum(weights):
            # Small talk in between could give the model's own name and contradict the system turn.
            between = some(rng.choices((0, 1, 2), (5, 4, 1))[0], leave_out=("memory", "small talk"))
            messages = memory_segment(seed, rng, between)
        else:
            messages = some(turns)
        if messages[0]["role"] != "system" and rng.random() < 0.2:
            messages = [system(rng.choice(SYSTEM_PLAIN)), *messages]
        yield _careless(messages, rng)


def _careless(messages: list[Message], rng: random.Random) -> list[Message]:
    """Now and then type a dialogue's questions in lower case and without the final mark, as people do."""
    copied = ("name", "call", "epeat", "Say:", "Copy")
    if rng.random() >= 0.12 or any(word in m["content"] for m in messages for word in copied):
        return messages  # what is to be copied keeps its capitals
    return [
        {**m, "content": m["content"].lower().rstrip("?.!")} if m["role"] == "user" else m for m in messages
    ]
