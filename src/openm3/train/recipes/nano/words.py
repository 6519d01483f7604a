"""Pools of words, and made-up ones: what is asked for must be copied from the prompt, never recalled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any


def listed(text: str) -> list[str]:
    """The words of a text, as a list."""
    return text.split()


ADJECTIVES = listed("""
    old new small big tall short round flat heavy light dark bright quiet loud cold warm soft hard dry wet clean dusty
    golden silver wooden iron paper glass stone blue red green yellow white black grey pink purple brown orange broken
    hidden lost empty full early late first last northern southern eastern western royal secret famous plain striped
    rusty shiny crooked narrow wide deep tiny giant gentle proud lucky sleepy hungry brave
""")
NOUNS = listed("""
    lantern bridge garden tower river mountain castle village harbor island forest valley library museum theater market
    station airport kitchen window mirror carpet basket bottle hammer ladder wagon engine rocket piano guitar violin
    drum trumpet clock compass map letter parcel ticket coin ring crown sword shield helmet boat ship ferry train truck
    horse camel tiger eagle falcon rabbit turtle dolphin salmon spider lemon apple cherry pepper potato bread cheese
    butter coffee pencil notebook folder drawer cabinet locker gate fence chimney roof cellar stable barn mill well
    statue fountain temple palace hotel school clinic bakery shop factory mine camp tent lamp candle stove oven
""")
NAMES = listed("""
    Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karl Laura Maria Nina Oscar Paula Quinn Rosa Samuel Tara Uma
    Victor Wanda Xavier Yara Zoe Ali Bela Chen Dina Elif Farid Gita Hugo Ines Jamal Kofi Lena Milan Noor Omar Priya
    Ravi Sofia Tomas Uri Vera Yusuf Aiko Bruno
""")
CITIES = listed("""
    Paris London Berlin Madrid Rome Vienna Prague Oslo Helsinki Lisbon Dublin Athens Warsaw Tokyo Seoul Delhi Cairo
    Lagos Nairobi Lima Quito Bogota Havana Toronto Boston Chicago Denver Miami Sydney Perth Geneva Zurich Hamburg Munich
    Naples Turin Porto Seville Ghent Bergen
""")
COLOURS = listed("red orange yellow green cyan blue purple pink brown black white grey")

ONSETS = listed("b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl sk sl st tr")
VOWELS = listed("a e i o u")
CODAS = ["", "", "", "", "l", "m", "n", "r", "s", "t", "k", "x"]


def made_up(rng: random.Random) -> str:
    """A word that is in no dictionary, of two or three syllables: `tovik`, `brasel`."""
    n = rng.choice((2, 2, 2, 3))
    out = ""
    for i in range(n):
        closed = i == n - 1 or rng.random() < 0.2
        out += rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if closed else "")
    return out


def distinct(rng: random.Random, make: Callable[[], Any], n: int, taken: Iterable[Any] = ()) -> list:
    """`n` different draws of make(), none of them in `taken`."""
    out: list = []
    seen = set(taken)
    while len(out) < n:
        item = make()
        if item not in seen:
            seen.add(item)
            out.append(item)
    return out


def a(noun: str) -> str:
    """With its article: a circle, an orange star."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
