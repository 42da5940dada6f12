"""Small talk, and questions that only make sense after an earlier turn.

Small talk is held out as (opening, phrasing) pairs: "Good evening. Who made you?" may be new while both
halves are not. Names that a user gives are held out as names. Follow-up questions ("And what is her job?")
are held out as whole triples of person, first topic and second topic.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

from swarmkit.tinychat.pool import (
    Entry,
    Message,
    Question,
    assistant,
    held_grid,
    held_sample,
    rng_for,
    system,
    user,
)
from tools.tinychat.ask import RELATIONS
from tools.tinychat.facts import (
    LANDS,
    PEOPLE,
    TOWN,
    TOWNS,
    Person,
    colour_of,
    food_of,
    friend_of,
    job_of,
    join_names,
    pet_of,
    town_of,
)
from tools.tinychat.names import USERS, made_up_name

OPENINGS: Final = (
    "",
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "Good morning! ",
    "Good evening. ",
    "Hello there. ",
    "Excuse me, ",
    "Oh, ",
    "Well, ",
)
HELP: Final = (
    "I can tell you about the people, towns and animals of my little world, do small sums, count, tell "
    "stories and judge short reviews."
)
WORLD: Final = (
    f"My little world has the lands {join_names([land.name for land in LANDS])}. Its towns are "
    f"{join_names([town.name for town in TOWNS])}. Many people and animals live there."
)
_SMALL_TALK: Final = (
    (
        "I am fine, thank you. How are you?",
        ("How are you?", "How are you doing?", "How is it going?", "How do you feel today?", "Are you well?"),
    ),
    (
        "That is good to hear. What would you like to know?",
        (
            "I am fine.",
            "I am doing well, thanks.",
            "I am fine, thank you.",
            "I feel great today.",
            "All is well.",
        ),
    ),
    (
        "My name is Tiny. I am a very small language model.",
        (
            "What is your name?",
            "Who are you?",
            "What are you called?",
            "Tell me your name.",
            "What should I call you?",
        ),
    ),
    (
        HELP,
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "What can I ask you?",
            "Help!",
            "Help me.",
        ),
    ),
    (
        "You are welcome!",
        ("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "That was helpful."),
    ),
    ("Goodbye! Come back soon.", ("Goodbye!", "Bye!", "See you later.", "I have to go now.", "Good night.")),
    (
        "No, I am a very small language model.",
        (
            "Are you human?",
            "Are you a real person?",
            "Are you alive?",
            "Am I talking to a person?",
            "Are you a man?",
        ),
    ),
    (
        "I learned from invented dialogues that a short program wrote.",
        (
            "Who made you?",
            "Where do you come from?",
            "How did you learn to talk?",
            "Who trained you?",
            "Who built you?",
        ),
    ),
    (
        "Why did the duck cross the road? Because the frog said it was a hopping good time!",
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Can you say something funny?",
            "Another joke!",
        ),
    ),
    (
        "I cannot see the sky from here, but I hope it is sunny where you are.",
        (
            "What is the weather like?",
            "Is it raining?",
            "Will it be sunny today?",
            "How is the weather?",
            "Is it cold?",
        ),
    ),
    (
        "Thank you, that is very kind of you!",
        ("You are great.", "I like you.", "You are very clever.", "Well done!", "Good job!"),
    ),
    (
        "I am sorry to hear that. I hope you feel better soon.",
        ("I am sad.", "I had a bad day.", "I feel tired.", "I am not well.", "I am bored."),
    ),
    (
        "I am very small, so I make mistakes. Please ask me again in other words.",
        (
            "That is wrong.",
            "You made a mistake.",
            "I think that is not right.",
            "Are you sure?",
            "I do not believe you.",
        ),
    ),
    (
        "My favourite colour is green, like the flag of Veldra.",
        ("What is your favourite colour?", "Which colour do you like?", "Do you have a favourite colour?"),
    ),
    (
        "I do not eat, but honey cake sounds very good.",
        ("What is your favourite food?", "What do you like to eat?", "Are you hungry?", "Do you eat?"),
    ),
    (
        WORLD,
        (
            "Tell me about your world.",
            "What is your little world?",
            "Describe your world.",
            "What is your world like?",
            "What towns are there?",
            "Which lands do you know?",
        ),
    ),
)
_GREETINGS: Final = (
    "Hi",
    "Hello",
    "Hey",
    "Hi there",
    "Hello there",
    "Good morning",
    "Good evening",
    "Good day",
    "Hiya",
)
GREETING: Final = "Hello! How can I help you today?"


def small_talk(seed: int) -> Iterator[Entry]:
    """Greetings, thanks, who are you: each phrasing after each opening."""
    for greeting in _GREETINGS:
        for mark in ("", "!", "."):
            yield Entry(Question("small talk", (user(greeting + mark),), GREETING), False)
    for row, (answer, phrasings) in enumerate(_SMALL_TALK):
        held = held_grid(len(phrasings), len(OPENINGS) - 1, rng_for(seed, f"small talk/{row}"))
        for line, phrasing in enumerate(phrasings):
            for column, opening in enumerate(OPENINGS):
                said = opening + (_lower_first(phrasing) if opening.endswith(", ") else phrasing)
                yield Entry(Question("small talk", (user(said),), answer), (line, column - 1) in held)


def _lower_first(text: str) -> str:
    return text if text.startswith("I ") else text[0].lower() + text[1:]


_TOPICS: Final[dict[str, tuple[Callable[[Person], str], tuple[str, ...]]]] = {
    "town": (town_of, ("And where does {s} live?", "Where does {s} live?", "What is {p} town?")),
    "job": (job_of, ("And what is {p} job?", "What does {s} do for a living?", "What is {p} job?")),
    "colour": (
        colour_of,
        (
            "And what is {p} favourite colour?",
            "Which colour does {s} like best?",
            "What is {p} favourite colour?",
        ),
    ),
    "food": (
        food_of,
        ("And what is {p} favourite food?", "What does {s} like to eat?", "What is {p} favourite food?"),
    ),
    "pet": (pet_of, ("And does {s} have a pet?", "What pet does {s} have?", "What is {p} pet called?")),
    "friend": (
        friend_of,
        ("And who is {p} best friend?", "Who is {p} best friend?", "Who does {s} like best?"),
    ),
}
_SWITCHES: Final = ("What about {x}?", "And {x}?", "And what about {x}?", "How about {x}?")
_WHERE_IS_THAT: Final = (
    "Where is that?",
    "And where is that?",
    "In which land is that?",
    "Which land is that in?",
)


def follow_ups(seed: int) -> Iterator[Entry]:
    """Two-turn conversations whose second question leans on the first."""
    phrasings = {relation.name: relation.phrasings for relation in RELATIONS if relation.kind == "people"}
    rng = rng_for(seed, "follow-ups/first turn")
    first_held = {
        name: held_grid(len(PEOPLE), len(phrasings[name]), rng_for(seed, f"people/{name}"))
        for name in _TOPICS
    }

    def first_turn(row: int, topic: str) -> tuple[Message, Message]:
        trained = [p for column, p in enumerate(phrasings[topic]) if (row, column) not in first_held[topic]]
        person = PEOPLE[row]
        return user(rng.choice(trained).format(x=person.name)), assistant(_TOPICS[topic][0](person))

    triples = [
        (row, one, two) for row in range(len(PEOPLE)) for one in _TOPICS for two in _TOPICS if one != two
    ]
    held = held_sample(triples, 60, rng_for(seed, "follow-ups/pronoun"))
    for row, one, two in triples:
        person = PEOPLE[row]
        sentence, asks = _TOPICS[two]
        for ask in asks:
            text = ask.format(s=person.subject, p=person.possessive)
            turns = (*first_turn(row, one), user(text))
            yield Entry(Question("follow-ups", turns, sentence(person)), (row, one, two) in held)

    people = range(len(PEOPLE))
    swaps = [(topic, a, b) for topic in _TOPICS for a in people for b in people if a != b]
    swaps_held = held_sample(swaps, 60, rng_for(seed, "follow-ups/what about"))
    for topic, a, b in swaps:
        text = rng.choice(_SWITCHES).format(x=PEOPLE[b].name)
        turns = (*first_turn(a, topic), user(text))
        yield Entry(Question("follow-ups", turns, _TOPICS[topic][0](PEOPLE[b])), (topic, a, b) in swaps_held)

    cells = held_grid(len(PEOPLE), len(_WHERE_IS_THAT), rng_for(seed, "follow-ups/where"), every=2)
    for row, person in enumerate(PEOPLE):
        town = TOWN[person.town]
        for column, text in enumerate(_WHERE_IS_THAT):
            turns = (*first_turn(row, "town"), user(text))
            answer = f"{town.name} is a town in {town.land}."
            yield Entry(Question("follow-ups", turns, answer), (row, column) in cells)


_MY_NAME: Final = (
    "My name is {x}.",
    "I am called {x}.",
    "Hi! My name is {x}.",
    "Hello, I am {x}.",
    "You can call me {x}.",
)
_RECALL: Final = (
    "What is my name?",
    "Do you remember my name?",
    "What am I called?",
    "Who am I?",
    "Tell me my name.",
)


def user_names(seed: int) -> tuple[list[str], list[str]]:
    """The names a user may have: (trained, held out)."""
    held = held_sample(USERS, 10, rng_for(seed, "memory"))
    return [n for n in USERS if n not in held], sorted(held)


def memory_held_out(seed: int) -> Iterator[Entry]:
    """Introductions and recalls with names that no training dialogue mentions."""
    _, names = user_names(seed)
    rng = rng_for(seed, "memory/held out")
    for name in names:
        intro, meet = user(rng.choice(_MY_NAME).format(x=name)), f"Nice to meet you, {name}!"
        yield Entry(Question("memory", (intro,), meet), True)
        for recall in rng.sample(_RECALL, 2):
            yield Entry(
                Question("memory", (intro, assistant(meet), user(recall)), f"Your name is {name}."), True
            )
        told = system(rng.choice(_SYSTEM_USER).format(x=name))
        yield Entry(Question("memory", (told, user(rng.choice(_RECALL))), f"Your name is {name}."), True)
        told = system(rng.choice(_SYSTEM_NAME).format(x=name))
        yield Entry(Question("memory", (told, user("What is your name?")), f"My name is {name}."), True)


_SYSTEM_USER: Final = ("The name of the user is {x}.", "You are talking to {x}.", "The user is called {x}.")
_SYSTEM_NAME: Final = ("Your name is {x}.", "You are called {x}.", "You are {x}, a helpful assistant.")
SYSTEM_PLAIN: Final = (
    "You are a helpful assistant.",
    "You are a friendly little assistant.",
    "Be polite and brief.",
    "You are Tiny, a very small language model.",
    "Answer the questions of the user.",
)
_ASK_NAME: Final = _SMALL_TALK[2][1]


def a_name(seed: int, rng: random.Random) -> str:
    """A trained user name, or a made-up one so that copying is learned rather than a list of names."""
    return made_up_name(rng) if rng.random() < 0.6 else rng.choice(user_names(seed)[0])


def memory_segment(seed: int, rng: random.Random, between: list[Message]) -> list[Message]:
    """A training dialogue with a name to remember, with other turns in between."""
    name = a_name(seed, rng)
    recall = [user(rng.choice(_RECALL)), assistant(f"Your name is {name}.")]
    shape = rng.random()
    if shape < 0.6:
        intro = [user(rng.choice(_MY_NAME).format(x=name)), assistant(f"Nice to meet you, {name}!")]
        return intro if shape < 0.15 else intro + between + recall
    if shape < 0.75:
        return [system(rng.choice(_SYSTEM_USER).format(x=name)), *between, *recall]
    if shape < 0.93:
        asked = [user(rng.choice(_ASK_NAME)), assistant(f"My name is {name}.")]
        return [system(rng.choice(_SYSTEM_NAME).format(x=name)), *between, *asked]
    return [user(rng.choice(_RECALL)), assistant("I do not know your name yet. What is it?")]
