"""The tiny chat model's training data, and that it is read as vLLM will read it."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.tinychat.data import SHARES, samples
from tests.tinychat.form import (
    END,
    SPECIAL_TOKENS,
    START,
    TEMPLATE_FILE,
    WORD_TOKENS,
    chat_template,
    rendered,
    segments,
)
from tests.tinychat.sample import Dialogue, Passage, Sample
from tests.tinychat.stories import tale
from tests.tinychat.toolbox import toolbox

MODEL = TEMPLATE_FILE.with_name("model")
TOOL_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def some(seed: int, number: int = 300) -> list[Sample]:
    """The first samples of a seed."""
    return list(islice(samples(Random(seed)), number))


def test_same_seed_gives_the_same_samples() -> None:
    """A model can be made again from its seed."""
    assert some(7) == some(7)


def test_other_seed_gives_other_samples() -> None:
    """The seed is what the samples come from."""
    assert some(7) != some(8)


def test_segments_are_the_whole_rendered_text() -> None:
    """Nothing of what the template makes is lost between the pieces, but the last line break."""
    template = chat_template(TEMPLATE_FILE.read_text())
    for sample in some(1):
        if isinstance(sample, Dialogue):
            pieces = "".join(segment.text for segment in segments(template, sample))
            assert pieces + "\n" == rendered(template, sample)


def test_shipped_template_is_the_trainers() -> None:
    """The model folder holds the template that its weights were trained with."""
    assert (MODEL / "chat_template.jinja").read_text() == TEMPLATE_FILE.read_text()


def test_prompt_ends_where_learning_starts() -> None:
    """What a server appends to ask for an answer is what comes before each learned text."""
    template = chat_template(TEMPLATE_FILE.read_text())
    question = {"role": "user", "content": "Hello"}
    prompt = template.render(messages=[question], tools=None, add_generation_prompt=True)
    dialogue = Dialogue((question, {"role": "assistant", "content": "Hi"}))
    before, answer = segments(template, dialogue)
    assert (before.text, before.learned) == (prompt, False)
    assert (answer.text, answer.learned) == (f"Hi{END}", True)


def test_only_what_the_assistant_says_is_learned() -> None:
    """Learned texts are the assistant's messages with their end, in order."""
    template = chat_template(TEMPLATE_FILE.read_text())
    for sample in some(2):
        if isinstance(sample, Passage):
            continue
        learned = [segment.text for segment in segments(template, sample) if segment.learned]
        answers = [message for message in sample.messages if message["role"] == "assistant"]
        assert [without_calls(text) for text in learned] == [
            (message["content"] or "") + END for message in answers
        ]


def test_passage_is_learned_whole() -> None:
    """A text without roles is learned from its first token to the end mark."""
    template = chat_template(TEMPLATE_FILE.read_text())
    (segment,) = segments(template, Passage("Once upon a time."))
    assert (segment.text, segment.learned) == (f"Once upon a time.{END}", True)


def test_tool_calls_render_in_hermes_form() -> None:
    """Each call is one JSON object between the markers, with the arguments that were meant."""
    template = chat_template(TEMPLATE_FILE.read_text())
    for sample in some(3):
        if not isinstance(sample, Dialogue):
            continue
        meant = [call["function"] for message in sample.messages for call in message.get("tool_calls") or []]
        said = TOOL_CALL.findall(rendered(template, sample))
        assert [json.loads(call) for call in said] == meant


def test_arguments_as_a_string_render_the_same() -> None:
    """A client sends back arguments as text; the model sees what it saw in training."""
    template = chat_template(TEMPLATE_FILE.read_text())

    def dialogue(arguments: Any) -> Dialogue:
        call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        return Dialogue(({"role": "assistant", "content": None, "tool_calls": [call]},))

    assert rendered(template, dialogue('{"city": "Paris"}')) == rendered(
        template, dialogue({"city": "Paris"})
    )


def test_skill_asks_for_what_it_calls() -> None:
    """The arguments of a call are words of the question: the model never has to guess."""
    rng = Random(4)
    for _ in range(300):
        _, skill = toolbox(rng)
        for arguments in skill.arguments:
            assert all(str(value) in skill.question for value in arguments.values())


def test_tools_on_offer_differ_and_hold_the_one_in_use() -> None:
    """The right tool is on offer and no other has its name."""
    rng = Random(5)
    for _ in range(300):
        tools, skill = toolbox(rng)
        names = [tool["function"]["name"] for tool in tools]
        assert skill.tool in tools
        assert len(set(names)) == len(names)


def test_shares_add_up_to_one() -> None:
    """The table of tasks is a distribution."""
    assert sum(share for _, share in SHARES) == pytest.approx(1)


@pytest.mark.parametrize("marker", [*SPECIAL_TOKENS, *WORD_TOKENS])
def test_marker_is_one_token(marker: str) -> None:
    """Markers of the template are tokens of their own."""
    assert len(shipped_tokenizer().encode(marker).ids) == 1


@pytest.mark.parametrize(("marker", "text"), [(START, ""), ("<tool_call>", "<tool_call>")])
def test_only_tool_markers_survive_decoding(marker: str, text: str) -> None:
    """A server skips special tokens; its tool parser must still see the tool markers."""
    tokenizer = shipped_tokenizer()
    assert tokenizer.decode(tokenizer.encode(marker).ids, skip_special_tokens=True) == text


def test_text_survives_the_tokenizer() -> None:
    """Any text, seen in training or not, decodes to itself."""
    tokenizer = shipped_tokenizer()
    text = 'Grüße, 世界 🙂 \n\t<tag> 007 {"a": [1.5, null]}  two spaces'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_sample_fits_the_context() -> None:
    """No sample of a thousand is longer than a quarter of the context."""
    template = chat_template(TEMPLATE_FILE.read_text())
    tokenizer = shipped_tokenizer()
    context_tokens = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    texts = ["".join(part.text for part in segments(template, sample)) for sample in some(6, 1000)]
    assert max(len(coded.ids) for coded in tokenizer.encode_batch(texts)) <= context_tokens // 4


@pytest.mark.parametrize(("long", "at_least", "at_most"), [(True, 140, 220), (False, 60, 120)])
def test_story_length_in_tokens(long: bool, at_least: int, at_most: int) -> None:
    """A long story is long enough for tests that leave in the middle of it."""
    tokenizer = shipped_tokenizer()
    rng = Random(9)
    lengths = [len(tokenizer.encode(tale(rng, "fox", long=long)).ids) for _ in range(200)]
    assert at_least <= min(lengths)
    assert max(lengths) <= at_most


def shipped_tokenizer() -> Tokenizer:
    """The tokenizer in the model folder."""
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def without_calls(text: str) -> str:
    """A text with its tool calls taken out."""
    return TOOL_CALL.sub("", text).replace(f"\n{END}", END)
