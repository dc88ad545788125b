"""Values to be picked out of a sentence into JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.tinychat.sample import Turns, exchange
from tests.tinychat.tasks import thing
from tests.tinychat.words import CAPITALS, CITIES, NAMES, invented, word

RECORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("name", "age"), "{name} is {age} years old"),
    (("name", "age"), "{name} is {age}"),
    (("name", "city"), "{name} lives in {city}"),
    (("name", "age", "city"), "{name} is {age} years old and lives in {city}"),
    (("name", "age", "city"), "{name} lives in {city} and is {age} years old"),
    (("city", "country"), "{city} is in {country}"),
    (("item", "count"), "there are {count} {item}s"),
    (("title", "year"), "{title} came out in {year}"),
    (("name", "email"), "write to {name} at {email}"),
    (("color", "size"), "a {size} {color} shirt"),
)
"""Keys of a JSON object, and a sentence that says their values."""


def json_object(rng: Random) -> Turns:
    """Values to pick from a sentence into a JSON object."""
    keys, sentence = rng.choice(RECORDS)
    values = record(rng)
    chosen = {key: values[key] for key in keys}
    body = rng.choice(
        (
            sentence.format(**chosen),
            sentence.format(**chosen),
            ", ".join(f"{key} {value}" for key, value in chosen.items()),
            ", ".join(f"{key} is {value}" for key, value in chosen.items()),
        )
    )
    asked = rng.choice(
        (" and ".join((", ".join(keys[:-1]), keys[-1])), ", ".join(keys), "the " + " and ".join(keys))
    )
    question = rng.choice(
        (
            f"Give me JSON with {asked}: {body}",
            f"Return a JSON object with {asked}. {body}.",
            f"Extract {asked} as JSON: {body}",
            f"Extract {asked}: {body}.",
            f"{body}. Answer in JSON with {asked}.",
            f"Convert to JSON: {body}",
            f"Make JSON of this: {body}",
        )
    )
    return exchange(question, json.dumps(chosen))


def record(rng: Random) -> dict[str, Any]:
    """A value for every key of `RECORDS`."""
    name = rng.choice(NAMES) if rng.random() < 0.5 else invented(rng).capitalize()
    return {
        "name": name,
        "age": rng.randint(1, 99),
        "city": rng.choice(CITIES),
        "country": rng.choice(list(CAPITALS)),
        "item": word(rng),
        "count": rng.randint(1, 50),
        "title": f"{word(rng).capitalize()} {word(rng).capitalize()}",
        "year": rng.randint(1950, 2030),
        "email": f"{name.lower()}@example.com",
        "color": rng.choice(("red", "blue", "green", "yellow")),
        "size": rng.choice(("small", "medium", "large")),
    }


def json_list(rng: Random) -> Turns:
    """Words to copy into a JSON list: dense practice in taking the space off a word."""
    words = [thing(rng) for _ in range(rng.randint(2, 8))]
    between = rng.choice((", ", " "))
    question = rng.choice(("JSON list: {}", "Make a JSON list of {}", "As a JSON list: {}"))
    return exchange(question.format(between.join(words)), json.dumps(words))
