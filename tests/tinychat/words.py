"""Words that the synthetic dialogues are made of."""

from __future__ import annotations

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Ada Alan Ben Carla David Emma Frank Gina Grace Hugo Iris Ivan Jack Kate Lena Leo Linus Mark Maya
    Mia Nina Noah Nora Olga Omar Oscar Paul Pavel Peter Quinn Rita Rosa Ruth Sam Sara Simon Tara Tom
    Uma Victor Wendy Xavier Yara Zoe
""")

CAPITALS = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Mexico": "Mexico City",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
}

CITIES = _words("""
    Athens Austin Beijing Berlin Boston Cairo Chicago Delhi Denver Dublin Geneva Havana Kyiv Lima
    Lisbon London Madrid Milan Moscow Munich Nairobi Oslo Paris Prague Riga Rome Seattle Seoul
    Sydney Tokyo Toronto Vienna Warsaw Zurich
""")

NOUNS = _words("""
    apple basket blue bottle bridge button camera candle carpet castle cloud coffee copper desert
    doctor dragon engine farmer flower forest garden green guitar hammer hello helmet island jacket
    kettle ladder lemon market mirror model mountain needle ocean orange paper pencil pepper planet
    pocket potato queue rabbit red ribbon river rocket saddle school server shadow signal silver
    spider spring square statue stone string summer sunset table teapot ticket tiger token tomato
    tunnel turtle valley velvet violin wallet walnut water window winter wizard worker world yellow
    zebra
""")

ADJECTIVES = _words("""
    big blue brave bright busy clever cold gentle happy kind new old quiet red silly small soft tiny
    warm wise
""")

ANIMALS = _words("""
    ant bear bee cat cow crow dog dragon duck fox frog goat hen horse lion mouse owl rabbit robot
    turtle whale
""")

DAYS = _words("""
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")

MONTHS = _words("""
    January February March April May June July August September October November December
""")

SYLLABLES = _words("""
    ba ko mi ru ten sal por vi ne zu lor ga pi dex fa qui jo wen tha cre
""")
"""What words that exist nowhere are made of: who can copy those can copy anything."""


def invented(rng: Random) -> str:
    """A word of one to three syllables that exists nowhere."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))


def word(rng: Random) -> str:
    """A noun, or a word that exists nowhere."""
    return rng.choice(NOUNS) if rng.random() < 0.4 else invented(rng)
