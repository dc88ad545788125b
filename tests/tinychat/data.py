"""Synthetic samples for the tiny chat model: every text is made here, so no outside licence applies.

`samples(Random(seed))` yields the same samples for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from random import Random

from tests.tinychat.faq import SYSTEM_PROMPTS
from tests.tinychat.records import json_list, json_object
from tests.tinychat.sample import Dialogue, Passage, Sample, Turns, assistant, user
from tests.tinychat.stories import story, tale
from tests.tinychat.tasks import (
    capital,
    capital_sentence,
    count,
    echo,
    fact,
    memory,
    neighbour,
    small_sum,
    small_talk,
    unknown,
)
from tests.tinychat.toolbox import tool_calls, toolbox
from tests.tinychat.words import ANIMALS, CAPITALS


def samples(rng: Random) -> Iterator[Sample]:
    """Samples without end, tasks in the shares of `SHARES`."""
    makers, weights = zip(*SHARES, strict=True)
    while True:
        yield rng.choices(makers, weights)[0](rng)


def talk(make: Callable[[Random], Turns]) -> Callable[[Random], Dialogue]:
    """Dialogues of one task, some of them with a system prompt or small talk before."""

    @wraps(make)
    def dialogue(rng: Random) -> Dialogue:
        before = small_talk(rng) if rng.random() < 0.2 else ()
        return Dialogue(system_prompt(rng) + before + make(rng))

    return dialogue


def tool_talk(rng: Random) -> Dialogue:
    """A dialogue with tools on offer: one or two calls and their answer, or a question that needs none."""
    tools, skill = toolbox(rng)
    system = system_prompt(rng)
    chance = rng.random()
    if chance < 0.15:
        return Dialogue(system + small_talk(rng), tools)
    turns = (*system, *(small_talk(rng) if rng.random() < 0.1 else ()), user(skill.question))
    turns += (tool_calls(skill),)
    if chance < 0.6:
        return Dialogue(turns, tools)
    results = tuple({"role": "tool", "content": result} for result in skill.results)
    turns += (*results, assistant(skill.answer))
    if rng.random() < 0.15:
        turns += small_talk(rng)
    return Dialogue(turns, tools)


def passage(rng: Random) -> Passage:
    """A text to be continued."""
    country = rng.choice(list(CAPITALS))
    return Passage(
        rng.choice(
            (
                tale(rng, rng.choice(ANIMALS), long=False),
                capital_sentence(country),
                rng.choice(("Hello, my", "My")) + " name is Tiny and I am a very small language model.",
            )
        )
    )


def system_prompt(rng: Random) -> Turns:
    """A system prompt, three times of ten."""
    if rng.random() < 0.7:
        return ()
    return ({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)},)


SHARES: tuple[tuple[Callable[[Random], Sample], float], ...] = (
    (talk(fact), 0.17),
    (talk(unknown), 0.05),
    (talk(capital), 0.06),
    (talk(small_sum), 0.04),
    (talk(count), 0.09),
    (talk(echo), 0.09),
    (talk(neighbour), 0.02),
    (talk(memory), 0.07),
    (talk(story), 0.05),
    (talk(json_object), 0.11),
    (talk(json_list), 0.05),
    (tool_talk, 0.18),
    (passage, 0.02),
)
"""What share of the samples each task has."""
