"""Long answers: descriptions of people, places and animals, and small stories.

A description is held out as a (who or what, phrasing) pair. A story is held out as a whole (person, animal)
pair: no story about those two is ever trained, in no phrasing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, held_grid, held_sample, rng_for
from tools.tinychat.facts import (
    ANIMAL,
    ANIMALS,
    LANDS,
    PEOPLE,
    TOWNS,
    Animal,
    Land,
    Person,
    Town,
    join_names,
    with_article,
)

_ABOUT: Final = (
    "Tell me about {x}.",
    "What do you know about {x}?",
    "Can you tell me about {x}?",
    "Describe {x}.",
    "I would like to hear about {x}.",
    "Tell me everything about {x}.",
    "What can you tell me about {x}?",
    "Please say something about {x}.",
)
_STORY: Final = (
    "Tell me a story about {p} and {a}.",
    "Can you tell a story about {p} and {a}?",
    "I want to hear a story with {p} and {a}.",
    "Write a short story about {p} and {a}.",
)
_STORY_OF_ONE: Final = (
    "Tell me a story about {p}.",
    "Can you tell a story about {p}?",
    "I want to hear a story with {p}.",
    "Write a short story about {p}.",
)
_ANY_STORY: Final = (
    "Tell me a story.",
    "Tell me a story!",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Please tell me a short story.",
    "Do you know a story?",
)


def describe_person(p: Person) -> str:
    """Some sentences on a person."""
    return (
        f"{p.name} is {with_article(p.job)} who lives in {p.town}. {p.possessive.capitalize()} favourite "
        f"colour is {p.colour}, and {p.subject} loves {p.food}. {p.name} has {with_article(p.pet)} called "
        f"{p.pet_name}, and {p.possessive} best friend is {p.friend}."
    )


def describe_town(t: Town) -> str:
    """Some sentences on a town."""
    people = join_names([p.name for p in PEOPLE if p.town == t.name])
    return (
        f"{t.name} is a town in {t.land}. The river {t.river} flows through it, and it is famous for "
        f"{t.fame}. {people} live there."
    )


def describe_land(d: Land) -> str:
    """Some sentences on a land."""
    towns = join_names([t.name for t in TOWNS if t.land == d.name])
    return f"{d.name} is a land with the towns {towns}. Its capital is {d.capital}, and its flag is {d.flag}."


def describe_animal(n: Animal) -> str:
    """Some sentences on an animal."""
    return (
        f"{n.plural.capitalize()} are {n.colour} and have {n.legs} legs. They eat {n.eats} and sleep in the "
        f"{n.home}. {with_article(n.name).capitalize()} says {n.sound}."
    )


def story(p: Person, n: Animal) -> str:
    """A small story about a person and an animal; the animal decides which of four it is."""
    animal, she, her = n.name, p.subject, p.possessive
    plots = (
        f"One morning {p.name} the {p.job} walked out of {p.town} and met {with_article(animal)} near the "
        f"{n.home}. The {animal} was hungry, so {p.name} shared some {p.food} with it. From that day on "
        f"they were friends, and every evening the {animal} came by to say {n.sound}. The end.",
        f"Once there was {with_article(animal)} who was lost in {p.town}. It said {n.sound} so sadly that "
        f"{p.name} the {p.job} opened the door. {she.capitalize()} gave it {n.eats} to eat and carried it "
        f"back to the {n.home}. The next day {p.name} found a {p.colour} stone on {her} doorstep as a "
        "gift. The end.",
        f"Long ago {p.name} lost {her} {p.colour} hat in the wind. {with_article(animal).capitalize()} saw "
        f"it fly past the {n.home} and ran after it all the way to {p.town}. {p.name} was so glad that "
        f"{she} baked {p.food} for everyone, and the {animal} said {n.sound}. The end.",
        f"{p.name} the {p.job} and {with_article(animal)} wanted to see the whole world. They left "
        f"{p.town} with some {p.food} in a {p.colour} bag. After a day the {animal} missed the {n.home}, "
        f"and {p.name} missed {p.friend}. So they went home again, and the {animal} said {n.sound}. The end.",
    )
    return plots[ANIMALS.index(n) % len(plots)]


def descriptions(seed: int) -> Iterator[Entry]:
    """Everyone and everything, described; one phrasing of each is held out."""
    subjects = [
        *((p.name, describe_person(p)) for p in PEOPLE),
        *((t.name, describe_town(t)) for t in TOWNS),
        *((d.name, describe_land(d)) for d in LANDS),
        *((n.plural, describe_animal(n)) for n in ANIMALS),
    ]
    held = held_grid(len(subjects), len(_ABOUT), rng_for(seed, "descriptions"))
    for row, (subject, answer) in enumerate(subjects):
        for column, phrasing in enumerate(_ABOUT):
            yield entry("descriptions", phrasing.format(x=subject), answer, (row, column) in held)
    for p in PEOPLE:
        yield entry("descriptions", f"Who is {p.name}?", describe_person(p), False)


def stories(seed: int) -> Iterator[Entry]:
    """Stories about every person with every animal; some pairs are held out."""
    pairs = [(p.name, n.name) for p in PEOPLE for n in ANIMALS]
    held = held_sample(pairs, 40, rng_for(seed, "stories"))
    for p in PEOPLE:
        for n in ANIMALS:
            for phrasing in _STORY:
                text = phrasing.format(p=p.name, a=with_article(n.name))
                yield entry("stories", text, story(p, n), (p.name, n.name) in held)
        if (p.name, p.pet) not in held:
            for phrasing in _STORY_OF_ONE:
                yield entry("stories", phrasing.format(p=p.name), story(p, ANIMAL[p.pet]), False)
    favourite = next(p for p in PEOPLE if (p.name, p.pet) not in held)
    for text in _ANY_STORY:
        yield entry("stories", text, story(favourite, ANIMAL[favourite.pet]), False)
