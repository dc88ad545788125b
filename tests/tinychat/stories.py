"""Stories: the long answers of the tiny chat model."""

from __future__ import annotations

from random import Random

from tests.tinychat.sample import Turns, exchange
from tests.tinychat.tasks import spoken
from tests.tinychat.words import ADJECTIVES, ANIMALS, CITIES, NAMES, NOUNS


def story(rng: Random) -> Turns:
    """A story about an animal; one that is asked to be long has at least 120 tokens."""
    hero = rng.choice(ANIMALS)
    if rng.random() < 0.5:
        question = rng.choice(
            (
                "Tell me a long story",
                "Tell me a long story.",
                "Write a long story",
                "Tell me a very long story",
            )
        )
        return exchange(spoken(rng, question), tale(rng, hero, long=True))
    question = rng.choice(
        (
            "Tell me a story",
            "Tell me a short story",
            "Write a short story",
            f"Tell me a story about {one(hero)}",
            f"Write a story about {one(hero)}",
        )
    )
    return exchange(spoken(rng, question), tale(rng, hero, long=False))


def tale(rng: Random, hero: str, *, long: bool) -> str:
    """The text of a story: six or twelve sentences and an ending."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    friend = rng.choice([animal for animal in ANIMALS if animal != hero])
    found, place = rng.sample(NOUNS, 2)
    sentences = [
        (
            f"Once upon a time there was {one(rng.choice(ADJECTIVES))} {hero} called {name}, "
            f"who lived near {city}."
        ),
        f"One day {name} found {one(rng.choice(ADJECTIVES))} {found} under {one(place)}.",
        rng.choice(
            (
                f'"What a strange thing," said the {hero}, and took it home.',
                f'"I wonder whose it is," said the {hero}.',
                f"The {hero} looked at it for a long time.",
            )
        ),
        f"On the way {name} met {one(rng.choice(ADJECTIVES))} {friend}.",
        rng.choice(
            (
                f'"That is mine," said the {friend}. "I lost it yesterday."',
                f"The {friend} was sad, because it had lost its {found}.",
                f'"Please help me," said the {friend}. "I am looking for my {found}."',
            )
        ),
        rng.choice(
            (
                f"So {name} gave the {found} back, and the two became friends.",
                f"{name} smiled and gave it the {found}.",
                f"Then {name} and the {friend} shared it.",
            )
        ),
    ]
    if long:
        sentences += [
            f"The next morning they walked to {city} together and counted the clouds.",
            (
                f"They saw {one(rng.choice(ADJECTIVES))} {rng.choice(NOUNS)}, "
                f"{one(rng.choice(ADJECTIVES))} {rng.choice(NOUNS)} "
                f"and {one(rng.choice(ADJECTIVES))} {rng.choice(ANIMALS)}."
            ),
            (
                f"At noon they sat down near the river, and {name} shared {one(rng.choice(NOUNS))} "
                f"with the {friend}."
            ),
            (
                f"In the evening it rained, and the {friend} told {name} about the {rng.choice(NOUNS)} "
                "behind the hill."
            ),
            "They laughed until the stars came out, and then they slept in the grass.",
            f"When the sun came up, the {hero} and the {friend} went home to {city}.",
        ]
    ending = rng.choice(
        (
            "They lived happily ever after.",
            "And that is the end of the story.",
            "From that day on they met every week.",
        )
    )
    return " ".join([*sentences, ending])


def one(noun: str) -> str:
    """A word with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
