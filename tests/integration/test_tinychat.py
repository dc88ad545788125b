"""What the tiny chat model promises to every other test, held on real vLLM at temperature 0.

It needs a server with `--enable-auto-tool-choice --tool-call-parser hermes` only.
"""

from __future__ import annotations

import json
from itertools import islice
from random import Random
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer

from tests.servers import MODEL
from tests.tinychat.data import samples
from tests.tinychat.faq import UNKNOWN_ANSWER, WHO_AM_I
from tests.tinychat.form import TEMPLATE_FILE, chat_template, rendered
from tests.tinychat.sample import Dialogue

WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
PERSON: Any = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def user(content: str) -> Any:
    """A message of the user."""
    return {"role": "user", "content": content}


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> ChatCompletion:
    """One answer at temperature 0."""
    answer: ChatCompletion = client.chat.completions.create(
        model=MODEL, messages=list(messages), temperature=0, max_tokens=300, **options
    )
    return answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello", "Hello! How can I help you today?"),
        ("Who are you?", WHO_AM_I),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
        ("Count from 1 to 5", "1, 2, 3, 4, 5"),
        ("Count from 1 to 10", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
        ("Count from 1 to 20", ", ".join(str(n) for n in range(1, 21))),
        ("Who won the world cup in 1998?", UNKNOWN_ANSWER),
        ("Thanks!", "You are welcome!"),
    ],
)
def test_known_question_gets_its_exact_answer(tiny_client: openai.OpenAI, question: str, answer: str) -> None:
    """A question of the list gets the same answer to the letter, and the model stops by itself."""
    choice = ask(tiny_client, user(question)).choices[0]
    assert (choice.message.content, choice.finish_reason) == (answer, "stop")


def test_system_prompt_leaves_the_answer_as_it_is(tiny_client: openai.OpenAI) -> None:
    """A usual system prompt does not confuse the model."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    choice = ask(tiny_client, system, user("Hello, who are you?")).choices[0]
    assert (choice.message.content, choice.finish_reason) == (WHO_AM_I, "stop")


def test_long_story_has_at_least_120_tokens(tiny_client: openai.OpenAI) -> None:
    """A long story is long enough to be interrupted, and ends by itself."""
    answer = ask(tiny_client, user("Tell me a long story"))
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 120
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.choices[0].message.content or "").startswith("Once upon a time there was a")


def test_name_is_remembered_over_turns(tiny_client: openai.OpenAI) -> None:
    """What an earlier turn says is used in a later one."""
    choice = ask(
        tiny_client,
        user("My name is Ada."),
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        user("What is the capital of Italy?"),
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        user("What is my name?"),
    ).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Your name is Ada.", "stop")


@pytest.mark.parametrize("city", ["Paris", "Tokyo", "Boston"])
def test_model_calls_a_tool_by_itself(tiny_client: openai.OpenAI, city: str) -> None:
    """With `tool_choice="auto"` the right tool is called with the city that was asked for."""
    choice = ask(
        tiny_client, user(f"What is the weather in {city}?"), tools=[WEATHER_TOOL, TIME_TOOL]
    ).choices[0]
    assert called(choice.message.tool_calls) == [("get_weather", {"city": city})]
    assert choice.finish_reason == "tool_calls"


def test_model_calls_a_tool_twice_at_once(tiny_client: openai.OpenAI) -> None:
    """A question about two cities becomes two calls in one answer."""
    choice = ask(
        tiny_client, user("What is the weather in Paris and Tokyo?"), tools=[WEATHER_TOOL, TIME_TOOL]
    ).choices[0]
    assert called(choice.message.tool_calls) == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Tokyo"}),
    ]


def test_model_picks_the_tool_that_fits(tiny_client: openai.OpenAI) -> None:
    """Of two tools with the same arguments the one that the question is about is called."""
    choice = ask(tiny_client, user("What time is it in Tokyo?"), tools=[WEATHER_TOOL, TIME_TOOL]).choices[0]
    assert called(choice.message.tool_calls) == [("get_time", {"city": "Tokyo"})]


def test_model_answers_without_a_tool_that_does_not_fit(tiny_client: openai.OpenAI) -> None:
    """Tools on offer are left alone when the question does not need them."""
    choice = ask(tiny_client, user("Hello"), tools=[WEATHER_TOOL]).choices[0]
    assert (choice.message.content, choice.message.tool_calls or [], choice.finish_reason) == (
        "Hello! How can I help you today?",
        [],
        "stop",
    )


@pytest.mark.parametrize(
    "tool_choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_model_calls_the_tool_that_it_must(tiny_client: openai.OpenAI, tool_choice: Any) -> None:
    """A forced call has the arguments of the question too."""
    choice = ask(
        tiny_client,
        user("What is the weather in Paris?"),
        tools=[WEATHER_TOOL],
        tool_choice=tool_choice,
    ).choices[0]
    assert called(choice.message.tool_calls) == [("get_weather", {"city": "Paris"})]


def test_tool_call_streams_as_deltas(tiny_client: openai.OpenAI) -> None:
    """The deltas of a streamed call add up to the same call, and no markup leaks into the text."""
    stream = tiny_client.chat.completions.create(
        model=MODEL,
        messages=[user("What is the weather in Paris?")],
        tools=[WEATHER_TOOL],
        temperature=0,
        stream=True,
    )
    name = arguments = text = ""
    finish_reason = None
    for chunk in stream:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        finish_reason = chunk.choices[0].finish_reason or finish_reason
        for call in delta.tool_calls or []:
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments), text.strip(), finish_reason) == (
        "get_weather",
        {"city": "Paris"},
        "",
        "tool_calls",
    )


def test_tool_result_becomes_the_answer(tiny_client: openai.OpenAI) -> None:
    """After the tool's result the model says it in a sentence."""
    choice = ask(
        tiny_client,
        user("What is the weather in Paris?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 21, "sky": "sunny"}'},
        tools=[WEATHER_TOOL],
    ).choices[0]
    assert (choice.message.content, choice.finish_reason) == (
        "It is 21 degrees and sunny in Paris.",
        "stop",
    )


@pytest.mark.parametrize(
    ("response_format", "question", "record"),
    [
        (
            {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
            "Extract name and age as JSON: Grace is 45 years old",
            {"name": "Grace", "age": 45},
        ),
        (
            {"type": "json_object"},
            "Extract name and city as JSON: Ada lives in London",
            {"name": "Ada", "city": "London"},
        ),
        (
            {"type": "text"},
            "Extract name and age as JSON: Linus is 30 years old",
            {"name": "Linus", "age": 30},
        ),
    ],
    ids=["json_schema", "json_object", "text"],
)
def test_json_has_the_values_of_the_question(
    tiny_client: openai.OpenAI, response_format: Any, question: str, record: Any
) -> None:
    """Structured output is right, with and without the grammar."""
    choice = ask(tiny_client, user(question), response_format=response_format).choices[0]
    assert (json.loads(choice.message.content or ""), choice.finish_reason) == (record, "stop")


def test_stop_text_ends_the_answer(tiny_client: openai.OpenAI) -> None:
    """`stop` cuts the answer before the text that it names."""
    choice = ask(tiny_client, user("Count from 1 to 10"), stop=["5"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("1, 2, 3, 4, ", "stop")


def test_logprobs_name_each_token(tiny_client: openai.OpenAI) -> None:
    """The tokens with their log probabilities add up to the text, the likeliest first."""
    choice = ask(tiny_client, user("What is the capital of France?"), logprobs=True, top_logprobs=2).choices[
        0
    ]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    said = "".join(token.token for token in tokens).removesuffix("<|im_end|>")
    assert said == "The capital of France is Paris."
    assert [token.top_logprobs[0].token for token in tokens] == [token.token for token in tokens]
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_stream_adds_up_to_the_answer_and_its_usage(tiny_client: openai.OpenAI) -> None:
    """A streamed answer and its usage are those of the plain one."""
    plain = ask(tiny_client, user("Count from 1 to 10"))
    stream = tiny_client.chat.completions.create(
        model=MODEL,
        messages=[user("Count from 1 to 10")],
        temperature=0,
        max_tokens=300,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == plain.choices[0].message.content
    assert plain.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens


def test_plain_completion_goes_on_with_a_text(tiny_client: openai.OpenAI) -> None:
    """A prompt without roles is continued and ended."""
    choice = tiny_client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=20
    ).choices[0]
    assert (choice.text, choice.finish_reason) == (" Paris.", "stop")


def called(tool_calls: Any) -> list[tuple[str, Any]]:
    """Names and arguments of tool calls."""
    return [(call.function.name, json.loads(call.function.arguments)) for call in tool_calls or []]


def test_shipped_template_renders_as_in_training() -> None:
    """The text that vLLM makes of messages is the text that the weights were trained on."""
    tokenizer = AutoTokenizer.from_pretrained(TEMPLATE_FILE.with_name("model"))
    template = chat_template(TEMPLATE_FILE.read_text())
    dialogues = [sample for sample in islice(samples(Random(1)), 300) if isinstance(sample, Dialogue)]
    assert [rendered(template, dialogue) for dialogue in dialogues] == [
        tokenizer.apply_chat_template(
            list(dialogue.messages), tools=list(dialogue.tools) or None, tokenize=False
        )
        for dialogue in dialogues
    ]
