"""Names from outside the little world, listed and made up."""

from __future__ import annotations

import random
from typing import Final

from swarmkit.tinychat.pool import words
from tools.tinychat.facts import LANDS, PEOPLE, TOWNS

PLACES: Final = words(
    """
    Paris London Berlin Rome Madrid Tokyo Sydney Cairo Lima Oslo Vienna Prague Dublin Athens Boston
    Chicago Toronto Nairobi Mumbai Beijing Moscow Lisbon Warsaw Helsinki Budapest Amsterdam Brussels
    Copenhagen Geneva Seoul France Germany Italy Spain Japan Australia Egypt Peru Norway Austria Ireland
    Greece Canada Kenya India China Russia Portugal Poland Finland Hungary Belgium Denmark Switzerland
    Brazil Mexico Chile Cuba Turkey Iceland America Europe Africa Asia Texas California
    """
)
STRANGERS: Final = words(
    """
    Peter Paul Alice Robert Julia Napoleon Caesar Shakespeare Einstein Newton Mozart Beethoven Picasso
    Galileo Cleopatra Darwin Columbus Plato Aristotle Michael Susan Jennifer David Emma Olivia Noah Liam
    James William Charlotte Sophia Benjamin Daniel Henry Amelia Lucas Harper Ethan Grace Chloe Oliver
    Leonardo Marie Elizabeth Victoria Gandhi Lincoln Washington Sherlock Dracula
    """
)
USERS: Final = words(
    """
    Anna Ben Clara Dennis Elena Felix Gina Harold Iris Jonas Karin Leo Maya Nils Olga Pablo Rosa Simon
    Tara Ulla Vera Walter Yara Zoe Amir Bella Carlo Diana Emil Fatima Georg Hannah Ivan Jana Kofi Lena
    Marco Nora Otto Paula Quentin Rita Samir Tessa Uwe Vito Wendy Xenia Yusuf Zora
    """
)

_ONSETS: Final = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "kl",
    "st",
    "sh",
    "th",
    "w",
)
_VOWELS: Final = ("a", "e", "i", "o", "u", "ei", "ou", "ia")
_CODAS: Final = ("", "n", "r", "s", "l", "x", "th", "ck", "nd", "m")
_LISTED: Final = frozenset((*PLACES, *STRANGERS, *USERS, *(x.name for x in (*PEOPLE, *TOWNS, *LANDS))))


def made_up_name(rng: random.Random) -> str:
    """A name that belongs to nobody, such as ``Kloreth``; never one of the listed names."""
    while True:
        syllables = rng.randint(2, 3)
        body = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
        name = (body + rng.choice(_CODAS)).capitalize()
        if name not in _LISTED:
            return name
