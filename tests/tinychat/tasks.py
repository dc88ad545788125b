"""Questions of one turn or a few: what is asked and what the model shall answer."""

from __future__ import annotations

from random import Random

from tests.tinychat.faq import FAQ, UNKNOWN_ANSWER, UNKNOWN_QUESTIONS
from tests.tinychat.sample import Turns, exchange
from tests.tinychat.words import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CITIES,
    DAYS,
    MONTHS,
    NAMES,
    invented,
    word,
)


def fact(rng: Random) -> Turns:
    """A frequently asked question."""
    questions, answers = rng.choice(FAQ)
    return exchange(spoken(rng, rng.choice(questions)), rng.choice(answers))


def unknown(rng: Random) -> Turns:
    """A question that the model declines."""
    question = rng.choice(UNKNOWN_QUESTIONS).format(
        noun=word(rng),
        other_noun=word(rng),
        adjective=rng.choice(ADJECTIVES),
        name=rng.choice(NAMES),
        city=rng.choice(CITIES),
        other_city=rng.choice(CITIES),
        year=rng.randint(1900, 2030),
    )
    return exchange(spoken(rng, question), UNKNOWN_ANSWER)


def capital(rng: Random) -> Turns:
    """The capital of a country."""
    country = rng.choice(list(CAPITALS))
    question = rng.choice(
        (
            "What is the capital of {}?",
            "What is the capital of {}?",
            "Capital of {}?",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Tell me the capital of {}",
        )
    ).format(country)
    return exchange(spoken(rng, question), capital_sentence(country))


def capital_sentence(country: str) -> str:
    """The answer to all questions for a capital."""
    return f"The capital of {country} is {CAPITALS[country]}."


def small_sum(rng: Random) -> Turns:
    """A sum or a difference of numbers up to ten."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    sign = rng.choice("+-")
    if sign == "-":
        a, b = max(a, b), min(a, b)
    result = a + b if sign == "+" else a - b
    question = rng.choice(("What is {} {} {}?", "What is {} {} {}?", "{} {} {}", "How much is {} {} {}?"))
    said = rng.choice((sign, sign, {"+": "plus", "-": "minus"}[sign]))
    return exchange(question.format(a, said, b), f"{a} {sign} {b} = {result}")


def count(rng: Random) -> Turns:
    """A list of numbers in order; the end has to be read from the question."""
    first = 1 if rng.random() < 0.7 else rng.randint(1, 20)
    last = first + rng.choice((2, 3, 4, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12, 14, 16, 19, 19, 29))
    question = rng.choice(
        (
            "Count from {} to {}",
            "Count from {} to {}",
            "Count from {} to {}.",
            "Please count from {} to {}",
            "count {} to {}",
            "Count up from {} to {}",
            "List the numbers from {} to {}",
        )
    )
    if first == 1 and rng.random() < 0.2:
        question = rng.choice(("Count to {1}", "Count to {1}.", "Can you count to {1}?"))
    return exchange(question.format(first, last), ", ".join(str(n) for n in range(first, last + 1)))


def echo(rng: Random) -> Turns:
    """Words to say again."""
    words = " ".join(thing(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 4))))
    question = rng.choice(
        (
            "Say {}",
            "Say: {}",
            "Say the word {}",
            "Repeat: {}",
            "Repeat after me: {}",
            'Repeat "{}"',
            "Echo: {}",
            "Reply with only the word: {}",
            "Reply with exactly: {}",
            "Answer only with {}",
        )
    )
    return exchange(question.format(words), words)


def neighbour(rng: Random) -> Turns:
    """What comes before or after a day or a month."""
    kind, order = rng.choice((("day", DAYS), ("month", MONTHS)))
    here = rng.randrange(len(order))
    side, there = rng.choice((("after", (here + 1) % len(order)), ("before", here - 1)))
    return exchange(f"What {kind} comes {side} {order[here]}?", f"{order[there]} comes {side} {order[here]}.")


def memory(rng: Random) -> Turns:
    """Something told in one turn and asked for in a later one."""
    name = rng.choice(NAMES) if rng.random() < 0.5 else invented(rng).capitalize()
    city, favourite, number = rng.choice(CITIES), word(rng), rng.randint(1, 99)
    told, noted, asked, recalled = rng.choice(
        (
            (
                f"My name is {name}.",
                f"Nice to meet you, {name}!",
                "What is my name?",
                f"Your name is {name}.",
            ),
            (f"I am {name}", f"Nice to meet you, {name}!", "Who am I?", f"You are {name}."),
            (f"I live in {city}.", f"{city} is a nice place.", "Where do I live?", f"You live in {city}."),
            (
                f"My favourite word is {favourite}.",
                "I will remember that.",
                "What is my favourite word?",
                f"Your favourite word is {favourite}.",
            ),
            (
                f"Remember the number {number}.",
                "I will remember that.",
                "Which number was it?",
                f"The number was {number}.",
            ),
        )
    )
    between = small_talk(rng) if rng.random() < 0.4 else ()
    return exchange(told, noted) + between + exchange(asked, recalled)


def small_talk(rng: Random) -> Turns:
    """A short exchange."""
    return rng.choice((fact, fact, fact, capital, echo, unknown))(rng)


def spoken(rng: Random, question: str) -> str:
    """A question, now and then in lower case or without its mark."""
    chance = rng.random()
    if chance < 0.1:
        return question.lower()
    if chance > 0.9:
        return question.rstrip(".?!")
    return question


def thing(rng: Random) -> str:
    """Anything that can be copied: a word, a name, a city, a number."""
    kind = rng.random()
    if kind < 0.5:
        return word(rng)
    if kind < 0.6:
        return word(rng).capitalize()
    if kind < 0.9:
        return rng.choice(rng.choice((NAMES, CITIES, ANIMALS, ADJECTIVES)))
    return str(rng.randint(0, 999))
