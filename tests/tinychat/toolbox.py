"""Tools on offer in the synthetic dialogues, what is asked of them and what they return."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.tinychat.sample import Message, Tool
from tests.tinychat.words import CITIES, NAMES, NOUNS, invented

SKIES = ("sunny", "cloudy", "rainy", "windy")


@dataclass(frozen=True, slots=True)
class Skill:
    """One tool and one use of it: `results` and `arguments` are one per call."""

    tool: Tool
    question: str
    arguments: tuple[dict[str, Any], ...]
    results: tuple[str, ...]
    answer: str


def toolbox(rng: Random) -> tuple[tuple[Tool, ...], Skill]:
    """One to three tools in any order, and the use of one of them."""
    used = rng.choices(SKILLS, SKILL_WEIGHTS)[0]
    others = rng.sample([make for make in SKILLS if make is not used], rng.choice((0, 0, 1, 2)))
    skill = used(rng)
    offered = [skill.tool, *(make(rng).tool for make in others)]
    rng.shuffle(offered)
    return tuple(offered), skill


def tool_calls(skill: Skill) -> Message:
    """The assistant's message that calls the tool."""
    name = skill.tool["function"]["name"]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for arguments in skill.arguments
        ],
    }


def tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> Tool:
    """A tool as `/v1/chat/completions` takes it."""
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def weather(rng: Random) -> Skill:
    """The weather of a place, sometimes of two at once."""
    key = place_key(rng)
    properties: dict[str, Any] = {
        key: text_type(rng, rng.choice(("The city", "City name", "The city, e.g. Paris")))
    }
    if rng.random() < 0.2:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    offered = tool(
        rng.choice(("get_weather", "get_weather", "get_current_weather", "weather", "fetch_weather")),
        rng.choice(
            ("Get the weather", "Get the weather of a city", "Get the current weather", "Weather of a place")
        ),
        properties,
        [key],
    )
    places = tuple(place(rng) for _ in range(2 if rng.random() < 0.15 else 1))
    asked = " and ".join(places)
    question = rng.choice(
        (
            f"What is the weather in {asked}?",
            f"What is the weather in {asked}?",
            f"What's the weather like in {asked}?",
            f"What is the weather like in {asked} today?",
            f"Weather in {asked}?",
            f"How is the weather in {asked} today?",
            f"Is it raining in {asked}?",
            f"Tell me the weather in {asked}",
        )
    )
    reports = tuple((rng.randint(-9, 39), rng.choice(SKIES)) for _ in places)
    shape = rng.choice(
        (
            '{{"temperature": {0}, "sky": "{1}"}}',
            '{{"city": "{2}", "temperature": {0}, "sky": "{1}"}}',
            "{0} degrees, {1}",
        )
    )
    results = tuple(
        shape.format(degrees, sky, where) for (degrees, sky), where in zip(reports, places, strict=True)
    )
    answer = " ".join(
        f"It is {degrees} degrees and {sky} in {where}."
        for (degrees, sky), where in zip(reports, places, strict=True)
    )
    return Skill(offered, question, tuple({key: where} for where in places), results, answer)


def clock(rng: Random) -> Skill:
    """The time of a place."""
    key, where = place_key(rng), place(rng)
    offered = tool(
        rng.choice(("get_time", "get_time", "current_time", "clock")),
        rng.choice(("Get the time in a city", "Current time of a place")),
        {key: text_type(rng, "The city")},
        [key],
    )
    question = rng.choice(
        (f"What time is it in {where}?", f"Tell me the time in {where}", f"Time in {where}?")
    )
    now = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return Skill(offered, question, ({key: where},), (json.dumps({"time": now}),), f"It is {now} in {where}.")


def search(rng: Random) -> Skill:
    """A search for a few words."""
    key = rng.choice(("query", "query", "q", "text"))
    wanted = " ".join(noun(rng) for _ in range(rng.randint(1, 3)))
    offered = tool(
        rng.choice(("search", "web_search", "search_web", "lookup")),
        rng.choice(("Search the web", "Search for a text")),
        {key: text_type(rng, "What to search for")},
        [key],
    )
    question = rng.choice((f"Search for {wanted}", f"Look up {wanted}", f"Search the web for {wanted}"))
    found = noun(rng)
    return Skill(
        offered, question, ({key: wanted},), (json.dumps({"result": found}),), f"I found this: {found}."
    )


def adder(rng: Random) -> Skill:
    """The sum of two numbers."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    number = {"type": rng.choice(("integer", "number"))}
    offered = tool(
        rng.choice(("add", "add_numbers", "sum")), "Add two numbers", {"a": number, "b": number}, ["a", "b"]
    )
    question = rng.choice((f"Add {a} and {b}", f"What is {a} plus {b}?", f"What is {a} + {b}?"))
    total = a + b
    return Skill(
        offered, question, ({"a": a, "b": b},), (json.dumps({"result": total}),), f"The result is {total}."
    )


def messenger(rng: Random) -> Skill:
    """A message to a person."""
    who, text = rng.choice(NAMES), " ".join(noun(rng) for _ in range(rng.randint(1, 3)))
    offered = tool(
        rng.choice(("send_message", "send_email", "notify")),
        "Send a message to a person",
        {"to": text_type(rng, "Who gets it"), "text": text_type(rng, "The message")},
        ["to", "text"],
    )
    question = rng.choice((f"Send {who} the message {text}", f"Tell {who}: {text}"))
    return Skill(
        offered,
        question,
        ({"to": who, "text": text},),
        (json.dumps({"ok": True}),),
        f"I sent your message to {who}.",
    )


SKILLS: tuple[Callable[[Random], Skill], ...] = (weather, clock, search, adder, messenger)
SKILL_WEIGHTS = (3, 1, 1, 1, 1)


def place_key(rng: Random) -> str:
    """How a tool calls the argument that names a place."""
    return rng.choice(("city", "city", "location", "place"))


def place(rng: Random) -> str:
    """A city, or one that exists nowhere."""
    return rng.choice(CITIES) if rng.random() < 0.7 else invented(rng).capitalize()


def noun(rng: Random) -> str:
    """A noun, or a word that exists nowhere."""
    return rng.choice(NOUNS) if rng.random() < 0.5 else invented(rng)


def text_type(rng: Random, description: str) -> dict[str, str]:
    """The schema of a string, four times of ten with a description."""
    if rng.random() < 0.6:
        return {"type": "string"}
    return {"type": "string", "description": description}
