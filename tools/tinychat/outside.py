"""Questions that the little world cannot answer, and the polite reply to all of them.

Held out are names: the cities, people, things and animals of the held-out questions are in no training
dialogue. Odd questions about the world itself ("How tall is Mira?") are held out as (who, phrasing) pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, held_grid, held_sample, rng_for, words
from tools.tinychat.facts import PEOPLE, TOWNS
from tools.tinychat.names import PLACES, STRANGERS, made_up_name

SORRY: Final = (
    "I am sorry, I only know my little world. Ask me about its people, towns and animals, or try a small sum."
)
SORRY_BIG: Final = "I am sorry, I can only do sums with small numbers."

_THINGS: Final = (
    "quantum physics",
    "a computer",
    "the internet",
    "football",
    "tennis",
    "chess",
    "electricity",
    "gravity",
    "the moon",
    "the sun",
    "a black hole",
    "a dinosaur",
    "an airplane",
    "a train",
    "a car",
    "a bicycle",
    "a telephone",
    "television",
    "cinema",
    "the stock market",
    "money",
    "tax law",
    "politics",
    "the president",
    "democracy",
    "philosophy",
    "chemistry",
    "biology",
    "algebra",
    "geometry",
    "evolution",
    "a volcano",
    "an earthquake",
    "the ocean",
    "climate change",
    "nuclear power",
    "a robot",
    "space travel",
    "a satellite",
    "Mars",
    "pizza",
    "sushi",
    "coffee",
    "chocolate",
    "yoga",
    "jazz",
    "rock music",
    "the piano",
    "ballet",
    "photography",
    "the great pyramid",
    "ancient Rome",
    "world history",
    "the war",
    "medicine",
    "a vaccine",
    "the brain",
    "sleep",
    "love",
    "time travel",
    "magic",
    "a dragon",
    "a unicorn",
    "Python",
    "Linux",
    "a video game",
    "basketball",
    "swimming",
    "the Olympics",
    "the law",
    "religion",
    "poetry",
    "grammar",
    "Latin",
    "French",
)
_BEASTS: Final = words(
    """
    elephant tiger lion giraffe zebra penguin whale shark dolphin snake camel monkey kangaroo crocodile
    parrot spider horse pig turtle eagle octopus panda rhino gorilla lizard ostrich moose badger
    """
)
_ABOUT_PLACE: Final = (
    "What is the capital of {x}?",
    "Where is {x}?",
    "How many people live in {x}?",
    "Tell me about {x}.",
    "Which river flows through {x}?",
    "Who lives in {x}?",
    "How far is it to {x}?",
    "What is {x} famous for?",
    "Have you ever been to {x}?",
    "What language do they speak in {x}?",
)
_ABOUT_STRANGER: Final = (
    "Who is {x}?",
    "Where does {x} live?",
    "What is {x}'s job?",
    "Tell me about {x}.",
    "When was {x} born?",
    "What is {x}'s favourite food?",
    "Who was {x}?",
    "What is {x}'s favourite colour?",
    "How old is {x}?",
    "Who is {x}'s best friend?",
    "What pet does {x} have?",
    "What did {x} do?",
)
_ABOUT_THING: Final = (
    "What is {x}?",
    "Tell me about {x}.",
    "Can you explain {x}?",
    "Who invented {x}?",
    "How does {x} work?",
    "What do you think about {x}?",
    "Do you know anything about {x}?",
    "Teach me about {x}.",
    "Write a poem about {x}.",
    "Explain {x} to me.",
    "Why is {x} important?",
    "Help me with {x}.",
)
_ABOUT_BEAST: Final = (
    "What does {x} say?",
    "What does {x} eat?",
    "How many legs does {x} have?",
    "Where does {x} sleep?",
    "What colour is {x}?",
    "What sound does {x} make?",
    "How big is {x}?",
    "How fast is {x}?",
)
_ODD_PERSON: Final = (
    "How tall is {x}?",
    "How old is {x}?",
    "When was {x} born?",
    "What is {x}'s phone number?",
    "Is {x} married?",
    "What is {x}'s last name?",
    "How much money does {x} have?",
    "What shoes does {x} wear?",
)
_ODD_TOWN: Final = (
    "How many people live in {x}?",
    "Who is the mayor of {x}?",
    "How far is it to {x}?",
    "How old is {x}?",
    "What is the weather in {x}?",
    "Is there a train to {x}?",
)
_BIG: Final = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What is {a} minus {b}?",
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "How much is {a} plus {b}?",
    "Multiply {a} by {b}.",
    "Add {a} and {b}.",
)


def outside_questions(seed: int) -> Iterator[Entry]:
    """Every outside question; a sixth of the names is held out, with two phrasings each."""
    grids: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("place", PLACES, _ABOUT_PLACE),
        ("stranger", STRANGERS, _ABOUT_STRANGER),
        ("thing", _THINGS, _ABOUT_THING),
        ("beast", _BEASTS, _ABOUT_BEAST),
    )
    for kind, names, phrasings in grids:
        rng = rng_for(seed, f"outside/{kind}")
        held = held_sample(names, len(names) // 6, rng)
        for name in names:
            asked = rng.sample(phrasings, 2) if name in held else phrasings
            said = name if kind != "beast" else ("an " if name[0] in "aeiou" else "a ") + name
            for phrasing in asked:
                yield entry("outside", phrasing.format(x=said), SORRY, name in held)
    grids = (
        ("odd person", tuple(p.name for p in PEOPLE), _ODD_PERSON),
        ("odd town", tuple(t.name for t in TOWNS), _ODD_TOWN),
    )
    for kind, names, phrasings in grids:
        cells = held_grid(len(names), len(phrasings), rng_for(seed, f"outside/{kind}"), every=2)
        for row, name in enumerate(names):
            for column, phrasing in enumerate(phrasings):
                yield entry("outside", phrasing.format(x=name), SORRY, (row, column) in cells)
    rng = rng_for(seed, "outside/big")
    sums = sorted({(rng.randint(101, 999), rng.randint(101, 9999)) for _ in range(200)})
    held_sums = held_sample(sums, 20, rng)
    for row, (a, b) in enumerate(sums):
        out = (a, b) in held_sums
        for column, phrasing in enumerate(_BIG):
            if not out or column == row % len(_BIG):
                yield entry("outside", phrasing.format(a=a, b=b), SORRY_BIG, out)


def made_up_question(rng: random.Random) -> Entry:
    """A question about a made-up name, which teaches that unknown names are unknown."""
    phrasings = rng.choice((_ABOUT_PLACE, _ABOUT_STRANGER))
    return entry("outside", rng.choice(phrasings).format(x=made_up_name(rng)), SORRY, False)
