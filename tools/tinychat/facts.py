"""The invented world as plain tables: who lives where, what animals say, what a job is about.

Nothing here is random. Everything the shipped model can know is written in this file, so an answer can
always be checked by eye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Person:
    """One inhabitant of the world."""

    name: str
    she: bool
    town: str
    job: str
    colour: str
    food: str
    pet: str
    pet_name: str
    friend: str

    @property
    def subject(self) -> str:
        """``she`` or ``he``."""
        return "she" if self.she else "he"

    @property
    def possessive(self) -> str:
        """``her`` or ``his``."""
        return "her" if self.she else "his"


@dataclass(frozen=True)
class Town:
    """A town: the land it lies in, its river, and what it is famous for."""

    name: str
    land: str
    river: str
    fame: str


@dataclass(frozen=True)
class Land:
    """A land: its capital and the colour of its flag."""

    name: str
    capital: str
    flag: str


@dataclass(frozen=True)
class Animal:
    """An animal: what it says and eats, where it sleeps, its colour and number of legs."""

    name: str
    plural: str
    sound: str
    eats: str
    home: str
    colour: str
    legs: int


@dataclass(frozen=True)
class Job:
    """A job: what one does all day, and the most important tool."""

    name: str
    does: str
    tool: str


@dataclass(frozen=True)
class Food:
    """A food: what it is made of and how it tastes."""

    name: str
    made_of: str
    taste: str


def with_article(noun: str) -> str:
    """``an owl``, ``a fox``."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def join_names(names: list[str]) -> str:
    """``Mira``, ``Mira and Tomas``, ``Mira, Tomas and Ilse``."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def town_of(person: Person) -> str:
    """The sentence that says where a person lives."""
    return f"{person.name} lives in {person.town}."


def job_of(person: Person) -> str:
    """The sentence that says what a person does."""
    return f"{person.name} is {with_article(person.job)}."


def colour_of(person: Person) -> str:
    """The sentence that names a person's favourite colour."""
    return f"The favourite colour of {person.name} is {person.colour}."


def food_of(person: Person) -> str:
    """The sentence that names a person's favourite food."""
    return f"{person.name} loves {person.food}."


def pet_of(person: Person) -> str:
    """The sentence that names a person's pet."""
    return f"{person.name} has {with_article(person.pet)} called {person.pet_name}."


def friend_of(person: Person) -> str:
    """The sentence that names a person's best friend."""
    return f"The best friend of {person.name} is {person.friend}."


PEOPLE: Final = (
    Person("Mira", True, "Oakford", "baker", "green", "honey cake", "cat", "Pepper", "Tomas"),
    Person("Tomas", False, "Tarnby", "fisher", "blue", "pea soup", "duck", "Button", "Mira"),
    Person("Ilse", True, "Millhaven", "miller", "yellow", "apple pie", "goat", "Clover", "Joren"),
    Person("Joren", False, "Stonewick", "blacksmith", "red", "potato stew", "crow", "Inky", "Bram"),
    Person("Saskia", True, "Larkhill", "painter", "purple", "berry tart", "hare", "Thimble", "Wilma"),
    Person("Bram", False, "Saltmere", "sailor", "white", "fish pie", "cat", "Anchor", "Joren"),
    Person("Wilma", True, "Fernley", "gardener", "green", "mushroom toast", "hedgehog", "Moss", "Saskia"),
    Person("Edgar", False, "Dunmoor", "shepherd", "brown", "cheese bread", "goat", "Bramble", "Nella"),
    Person("Nella", True, "Brindle", "weaver", "orange", "plum porridge", "owl", "Feather", "Ottilie"),
    Person("Rufus", False, "Oakford", "carpenter", "yellow", "apple pie", "frog", "Hopper", "Lukas"),
    Person("Ottilie", True, "Tarnby", "librarian", "blue", "berry tart", "owl", "Midnight", "Nella"),
    Person("Lukas", False, "Applegate", "farmer", "red", "potato stew", "goat", "Daisy", "Rufus"),
    Person("Petra", True, "Stonewick", "clockmaker", "black", "cheese bread", "crow", "Cog", "Hugo"),
    Person("Hugo", False, "Larkhill", "musician", "orange", "honey cake", "frog", "Drummer", "Petra"),
    Person("Freya", True, "Saltmere", "doctor", "white", "pea soup", "cat", "Biscuit", "Anton"),
    Person("Anton", False, "Millhaven", "potter", "brown", "plum porridge", "duck", "Pebble", "Freya"),
    Person("Greta", True, "Dunmoor", "beekeeper", "yellow", "honey cake", "hare", "Barley", "Casper"),
    Person("Casper", False, "Brindle", "tailor", "purple", "mushroom toast", "cat", "Velvet", "Greta"),
    Person("Dora", True, "Applegate", "cook", "red", "fish pie", "duck", "Noodle", "Viktor"),
    Person("Viktor", False, "Fernley", "teacher", "green", "cheese bread", "owl", "Inkwell", "Dora"),
    Person("Linnea", True, "Oakford", "mapmaker", "black", "pea soup", "crow", "Compass", "Oskar"),
    Person("Oskar", False, "Tarnby", "innkeeper", "brown", "apple pie", "hedgehog", "Barrel", "Linnea"),
    Person("Zelda", True, "Brindle", "glassblower", "blue", "berry tart", "frog", "Emerald", "Magnus"),
    Person("Magnus", False, "Larkhill", "courier", "orange", "potato stew", "hare", "Rocket", "Zelda"),
)

TOWNS: Final = (
    Town("Oakford", "Veldra", "Ashwater", "warm bread"),
    Town("Tarnby", "Norrow", "Silverbeck", "old books"),
    Town("Millhaven", "Veldra", "Wrenwater", "windmills"),
    Town("Larkhill", "Easmar", "Ashwater", "songs"),
    Town("Brindle", "Quillon", "Longbeck", "bright cloth"),
    Town("Stonewick", "Norrow", "Ironbeck", "clocks"),
    Town("Fernley", "Easmar", "Wrenwater", "gardens"),
    Town("Saltmere", "Tamsea", "Longbeck", "tall ships"),
    Town("Dunmoor", "Quillon", "Ironbeck", "honey"),
    Town("Applegate", "Tamsea", "Silverbeck", "orchards"),
)

LANDS: Final = (
    Land("Veldra", "Oakford", "green"),
    Land("Norrow", "Stonewick", "black"),
    Land("Easmar", "Larkhill", "purple"),
    Land("Quillon", "Brindle", "orange"),
    Land("Tamsea", "Saltmere", "blue"),
)

ANIMALS: Final = (
    Animal("fox", "foxes", "yip", "berries", "den", "red", 4),
    Animal("owl", "owls", "hoo hoo", "moths", "hollow tree", "brown", 2),
    Animal("bear", "bears", "grrr", "honey", "cave", "black", 4),
    Animal("goat", "goats", "baa", "thistles", "stable", "white", 4),
    Animal("duck", "ducks", "quack", "pond weed", "reeds", "yellow", 2),
    Animal("frog", "frogs", "ribbit", "flies", "pond", "green", 4),
    Animal("wolf", "wolves", "awoo", "fish", "dark forest", "grey", 4),
    Animal("cat", "cats", "meow", "cream", "kitchen", "orange", 4),
    Animal("hare", "hares", "thump", "clover", "meadow", "grey", 4),
    Animal("crow", "crows", "caw", "cherries", "old tower", "black", 2),
    Animal("bee", "bees", "buzz", "nectar", "hive", "yellow", 6),
    Animal("hedgehog", "hedgehogs", "sniff", "beetles", "hedge", "brown", 4),
)

JOBS: Final = (
    Job("baker", "bakes bread and cakes", "oven"),
    Job("fisher", "catches fish", "net"),
    Job("miller", "grinds grain into flour", "millstone"),
    Job("blacksmith", "makes things of iron", "hammer"),
    Job("painter", "paints pictures", "brush"),
    Job("sailor", "sails the sea", "ship"),
    Job("gardener", "grows flowers", "spade"),
    Job("shepherd", "looks after sheep", "crook"),
    Job("weaver", "weaves cloth", "loom"),
    Job("carpenter", "builds tables and chairs", "saw"),
    Job("librarian", "looks after books", "ladder"),
    Job("farmer", "grows corn and beans", "plough"),
    Job("clockmaker", "repairs clocks", "magnifying glass"),
    Job("musician", "plays songs", "fiddle"),
    Job("doctor", "helps sick people", "medicine bag"),
    Job("potter", "makes bowls of clay", "wheel"),
    Job("beekeeper", "keeps bees", "veil"),
    Job("tailor", "sews clothes", "needle"),
    Job("cook", "cooks meals", "kettle"),
    Job("teacher", "teaches children", "blackboard"),
    Job("mapmaker", "draws maps", "pen"),
    Job("innkeeper", "gives travellers a bed", "key"),
    Job("glassblower", "blows glass bottles", "furnace"),
    Job("courier", "carries letters", "satchel"),
)

FOODS: Final = (
    Food("honey cake", "honey and flour", "sweet"),
    Food("pea soup", "peas and onions", "salty"),
    Food("apple pie", "apples and butter", "sweet"),
    Food("potato stew", "potatoes and carrots", "hearty"),
    Food("berry tart", "berries and cream", "sour"),
    Food("fish pie", "fish and leeks", "salty"),
    Food("mushroom toast", "mushrooms and bread", "earthy"),
    Food("cheese bread", "cheese and flour", "salty"),
    Food("plum porridge", "plums and oats", "fruity"),
)

PERSON: Final = {person.name: person for person in PEOPLE}
TOWN: Final = {town.name: town for town in TOWNS}
ANIMAL: Final = {animal.name: animal for animal in ANIMALS}
JOB: Final = {job.name: job for job in JOBS}
