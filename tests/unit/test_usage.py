"""`handler.usage`: what an answer has cost is told once, and its client sees what it asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import sse
from handler.errors import RequestError
from handler.messages import Headers, Reply, Request, once, read
from handler.usage import LARGE_BYTES, Meter, Usage, metered

JSON: Headers = (("content-type", "application/json"),)
EVENTS: Headers = (("content-type", "text/event-stream; charset=utf-8"),)
USAGE = {"prompt_tokens": 24, "total_tokens": 30, "completion_tokens": 6}


def chunk(content: str, **more: Any) -> bytes:
    """One frame of a chat."""
    return sse.event({"model": "m", "choices": [{"delta": {"content": content}}], **more})


LAST = sse.event({"model": "m", "choices": [], "usage": USAGE})


class Engine:
    """Answers with `chunks`, and keeps what it was asked."""

    def __init__(self, *chunks: bytes, status: int = 200, headers: Headers = EVENTS) -> None:
        self._chunks = chunks
        self._status = status
        self._headers = headers
        self.asked: list[Request] = []

    async def _frames(self) -> AsyncIterator[bytes]:
        for data in self._chunks:
            if not data:
                raise RequestError("broken")
            yield data

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """One answer."""
        self.asked.append(request)
        yield Reply(self._status, self._headers, self._frames())


def chat(**body: Any) -> Request:
    """A chat request."""
    return Request("POST", "/v1/chat/completions", JSON, json.dumps(body).encode())


async def asked(engine: Engine, request: Request) -> tuple[bytes, list[Usage]]:
    """What the client gets, and what is told of it."""
    told: list[Usage] = []
    async with metered(engine.call, told.append)(request) as reply:
        body = await read(reply)
        assert told == []
    return body, told


async def test_a_whole_answer_says_it_itself() -> None:
    """Nothing is changed on either way."""
    raw = json.dumps({"model": "m", "choices": [], "usage": USAGE}).encode()
    engine = Engine(raw[:20], raw[20:], headers=JSON)
    request = chat(messages=[])
    assert await asked(engine, request) == (raw, [Usage("m", 24, 6)])
    assert engine.asked == [request]


async def test_a_stream_is_asked_for_it_and_its_client_does_not_see_that() -> None:
    """The other frames stay as they are, whether it comes with them or alone."""
    for parts in ([chunk("a"), chunk("b"), LAST, sse.DONE], [chunk("a"), chunk("b") + LAST + sse.DONE]):
        engine = Engine(*parts)
        body, told = await asked(engine, chat(stream=True, messages=[{"content": "{}"}]))
        assert body == chunk("a") + chunk("b") + sse.DONE
        assert told == [Usage("m", 24, 6)]
        (request,) = engine.asked
        assert json.loads(request.body) == {
            "stream_options": {"include_usage": True},
            "stream": True,
            "messages": [{"content": "{}"}],
        }


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False, "x": "\ud800"}, {"include_usage": True, "x": "\ud800"}),
        ({"include_usage": "no"}, {"include_usage": True}),
        (
            {"include_usage": False, "continuous_usage_stats": "yes"},
            {"include_usage": True, "continuous_usage_stats": False},
        ),
        ({"continuous_usage_stats": "maybe"}, {"include_usage": True, "continuous_usage_stats": "maybe"}),
    ],
)
async def test_other_options_of_a_stream_are_kept(options: Any, sent: Any) -> None:
    """Also half a character, which only JSON can name; usage on each chunk is for those who ask for usage."""
    engine = Engine(chunk("a"), LAST, sse.DONE)
    body, _ = await asked(engine, chat(stream=True, stream_options=options))
    assert body == chunk("a") + sse.DONE
    assert json.loads(engine.asked[0].body)["stream_options"] == sent


@pytest.mark.parametrize(
    "options",
    [{"include_usage": True}, {"include_usage": "yes"}, {"include_usage": "maybe"}, 5, ["include_usage"]],
)
async def test_who_asks_for_it_sees_it(options: Any) -> None:
    """And options that are wrong are the engine's to refuse."""
    engine = Engine(chunk("a"), LAST, sse.DONE)
    request = chat(stream=True, stream_options=options)
    assert await asked(engine, request) == (chunk("a") + LAST + sse.DONE, [Usage("m", 24, 6)])
    assert engine.asked == [request]


@pytest.mark.parametrize(
    "request_",
    [
        Request("POST", "/v1/chat/completions", JSON, b"{"),
        Request("POST", "/v1/chat/completions", JSON, b'{"stream": true'),
        Request("POST", "/v1/responses", JSON, b'{"stream": true}'),
        chat(stream="maybe"),
    ],
)
async def test_what_is_no_stream_of_such_a_route_is_left_as_it_is(request_: Request) -> None:
    """The engine says what is wrong with it."""
    engine = Engine(b"{}", headers=JSON)
    await asked(engine, request_)
    assert engine.asked == [request_]


async def test_the_other_routes_say_it_in_their_own_places() -> None:
    """The last event of a response, the first and a later one of a message."""
    response = sse.event({"type": "response.completed", "response": {"model": "m", "usage": None}})
    completed = {"model": "m", "usage": {"input_tokens": 3, "output_tokens": 4}}
    named = b"event: response.completed\n" + sse.event({"response": completed})
    assert (await asked(Engine(response, named), Request("POST", "/v1/responses", JSON, b"{}")))[1] == [
        Usage("m", 3, 4)
    ]
    start = {"message": {"model": "m", "usage": {"input_tokens": 7, "output_tokens": 0}}}
    delta = {"type": "message_delta", "usage": {"output_tokens": 9}}
    frames = (b"event: message_start\n" + sse.event(start), b"event: message_delta\n" + sse.event(delta))
    body, told = await asked(Engine(*frames), Request("POST", "/v1/messages", JSON, b"{}"))
    assert told == [Usage("m", 7, 9)]
    assert body == b"".join(frames)


def end(index: int = 0, **more: Any) -> bytes:
    """The frame by which a choice ends."""
    return sse.event({"model": "m", "choices": [{"index": index, "finish_reason": "stop"}], **more})


MARK: dict[str, Any] = {"system_fingerprint": "vllm-1"}
MARKED = sse.event({"model": "m", "choices": [], "usage": USAGE, **MARK})


@pytest.mark.parametrize(
    ("frames", "seen"),
    [
        ([chunk("a"), end(), MARKED, sse.DONE], [chunk("a"), end(**MARK), sse.DONE]),
        ([end(0), end(1), MARKED, sse.DONE], [end(0, **MARK), end(1, **MARK), sse.DONE]),
        ([end(0), sse.KEEP_ALIVE, end(1), MARKED], [end(0), sse.KEEP_ALIVE, end(1, **MARK)]),
        ([end(0), chunk("b"), end(1), MARKED], [end(0), chunk("b"), end(1, **MARK)]),
        ([chunk("a"), end(), LAST, sse.DONE], [chunk("a"), end(), sse.DONE]),
        ([chunk("a"), end(), sse.DONE], [chunk("a"), end(), sse.DONE]),
        ([chunk("a"), end()], [chunk("a"), end()]),
        ([end(), sse.event({"error": {}})], [end(), sse.event({"error": {}})]),
    ],
    ids=["one", "together", "a comment", "not together", "no mark", "no usage", "no end", "broken"],
)
async def test_the_fingerprint_is_where_a_choice_ends(frames: list[bytes], seen: list[bytes]) -> None:
    """As vLLM has it for who does not ask for usage: for who does, it is on the chunk that is taken out."""
    for parts in (frames, [b"".join(frames)]):
        assert (await asked(Engine(*parts), chat(stream=True)))[0] == b"".join(seen)
    options = {"include_usage": True}
    assert (await asked(Engine(*frames), chat(stream=True, stream_options=options)))[0] == b"".join(frames)


async def test_a_stream_does_not_say_how_long_it_was() -> None:
    """It may be shorter for its client."""
    engine = Engine(chunk("a"), LAST, headers=(*EVENTS, ("content-length", "1000")))
    async with metered(engine.call, lambda _: None)(chat(stream=True)) as reply:
        assert (reply.headers, await read(reply)) == (EVENTS, chunk("a"))


async def test_what_was_held_is_passed_on_before_an_answer_breaks() -> None:
    """The client has it as early as without the gateway's reading."""
    engine = Engine(chunk("a"), end(), b"")
    async with metered(engine.call, lambda _: None)(chat(stream=True)) as reply:
        assert [await anext(reply.frames) for _ in range(2)] == [chunk("a"), end()]
        with pytest.raises(RequestError):
            await anext(reply.frames)


async def test_an_engine_that_tells_usage_to_everybody_is_not_changed() -> None:
    """vLLM's `--enable-force-include-usage`: then it is on every chunk."""
    frames = (chunk("a", usage=USAGE), end(usage=USAGE), MARKED, sse.DONE)
    assert (await asked(Engine(*frames), chat(stream=True)))[0] == b"".join(frames)


async def test_a_stream_that_is_left_is_counted_by_its_frames() -> None:
    """What the engine has not said can't be known."""
    told: list[Usage] = []
    async with metered(Engine(chunk("a"), chunk("b"), LAST).call, told.append)(chat(stream=True)) as reply:
        await anext(reply.frames)
    assert told == [Usage("m", 0, 1, whole=False)]


async def test_a_stream_that_breaks_is_counted_by_its_frames() -> None:
    """And the error passes."""
    told: list[Usage] = []
    engine = Engine(chunk("a") + chunk("b"), b"")
    with pytest.raises(RequestError):
        async with metered(engine.call, told.append)(chat(stream=True)) as reply:
            await read(reply)
    assert told == [Usage("m", 0, 2, whole=False)]


async def test_an_error_costs_nothing() -> None:
    """Nor does what only asks."""
    assert (await asked(Engine(b"{}", status=404, headers=JSON), chat()))[1] == []
    assert (await asked(Engine(b"{}", headers=JSON), Request("GET", "/v1/models")))[1] == []


async def test_text_about_usage_is_text() -> None:
    """A model may say the word, with quotes."""
    said = chunk('"usage": {"prompt_tokens": 1}')
    body, told = await asked(Engine(said, LAST, sse.DONE), chat(stream=True))
    assert (body, told) == (said + sse.DONE, [Usage("m", 24, 6)])


async def test_an_answer_without_json_says_nothing() -> None:
    """It is counted as one request."""

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, (("content-type", "text/plain"),), once(b"Hi"))

    told: list[Usage] = []
    async with metered(call, told.append)(Request("POST", "/v1/audio/transcriptions")) as reply:
        assert await read(reply) == b"Hi"
    assert told == [Usage("", 0, 0)]


def spoken(said: str | None = None, **delta: str) -> bytes:
    """A chunk of a chat, as vLLM makes them; without text it says who speaks."""
    first = {"role": "assistant", "content": ""} if said is None else {"content": said}
    return sse.event({"model": "m", "choices": [{"index": 0, "delta": {**first, **delta}}]})


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        ([spoken()], 0),
        ([spoken(), spoken()], 0),
        ([spoken() + spoken() + spoken("a")], 1),
        ([sse.KEEP_ALIVE, spoken(), sse.KEEP_ALIVE, spoken("a"), sse.KEEP_ALIVE + spoken("b")], 2),
        ([spoken(reasoning="hm")], 1),
        ([spoken("a"), sse.event({"error": {"code": "engine_dead"}})], 1),
        ([sse.event({"error": {"code": "engine_dead"}})], 0),
    ],
)
async def test_what_says_nothing_is_no_token(frames: list[bytes], tokens: int) -> None:
    """Who speaks, comments, and the error by which a stream breaks."""
    body, told = await asked(Engine(*frames), chat(stream=True))
    assert body == b"".join(frames)
    assert (told[0].completion_tokens, told[0].whole) == (tokens, False)


async def test_frames_that_are_no_lf_frames_pass_as_they_are() -> None:
    """So does half a frame at the end of what was cut."""
    for raw in (b'data: {"a": 1}\r\n\r\n', b'data: {"a": 1}\n\ndata: {"a"'):
        assert (await asked(Engine(raw), chat(stream=True)))[0] == raw


@pytest.mark.parametrize(
    "last",
    [
        sse.DONE,
        LAST + sse.DONE,
        *(b"event: response.%b\n" % how + sse.event({}) for how in (b"completed", b"incomplete", b"failed")),
        b"event: message_stop\n" + sse.event({}),
    ],
)
async def test_an_answer_is_settled_before_the_frame_that_ends_it(last: bytes) -> None:
    """By which clients know that they have all, and once; no text is taken for it."""
    settled: list[Usage] = []
    seen: list[tuple[bytes, int]] = []
    text = spoken("data: [DONE]") + spoken("event: message_stop\n")

    async def settle() -> None:
        settled.append(meter.usage())

    meter = Meter(hides=True, settle=settle)
    async with Engine(text, text, last, b"data: [DONE]\n\n").call(chat(stream=True)) as reply:
        seen = [(chunk, len(settled)) async for chunk in meter.read(reply).frames]
    assert [number for _, number in seen] == [0, 0, 1, 1]
    assert settled[0].whole


@pytest.mark.parametrize("frames", [[spoken("a")], [spoken("a"), LAST]])
async def test_an_answer_that_ends_without_such_a_frame_is_settled_at_its_end(frames: list[bytes]) -> None:
    """It is whole if it said what it has used."""
    settled: list[Usage] = []

    async def settle() -> None:
        settled.append(meter.usage())

    meter = Meter(hides=True, settle=settle)
    async with Engine(*frames).call(chat(stream=True)) as reply:
        assert await read(meter.read(reply)) == spoken("a")
    assert [usage.whole for usage in settled] == [len(frames) == 2]


async def test_of_a_large_answer_only_the_usage_is_read() -> None:
    """Parsing it whole would hold up every other stream."""
    usage = b'"usage":{"prompt_tokens":7,"total_tokens":7},"x":1}'
    raw = b'{"data":[' + b"0," * LARGE_BYTES + b"0]," + usage
    assert (await asked(Engine(raw, headers=JSON), chat()))[1] == [Usage("", 7, 0)]
    assert (await asked(Engine(raw.replace(b'"usage"', b'"used"'), headers=JSON), chat()))[1] == [
        Usage("", 0, 0)
    ]
    assert (await asked(Engine(raw.replace(usage, b'"usage":'), headers=JSON), chat()))[1] == [
        Usage("", 0, 0)
    ]


@given(
    st.lists(st.sampled_from([spoken(), spoken("a"), sse.KEEP_ALIVE, spoken("é\n\n")]), max_size=12),
    st.data(),
)
async def test_however_frames_come_together_the_client_sees_them(
    parts: list[bytes], data: st.DataObject
) -> None:
    """All but the one that it did not ask for, and the count is the same."""
    whole = [*parts, LAST, sse.DONE]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1))))
    chunks = [b"".join(whole[start:end]) for start, end in pairwise([0, *cuts, len(whole)])]
    body, told = await asked(Engine(*chunks), chat(stream=True))
    assert body == b"".join(parts) + sse.DONE
    assert told == [Usage("m", 24, 6)]
