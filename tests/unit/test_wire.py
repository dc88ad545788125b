"""The frames of a link, cut anywhere on their way."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from handler import wire
from handler.asgi import Message, Receive, Send
from handler.link import Link

Said = tuple[int, int, bytes]


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.written.append(data)

    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return self.aborted

    def abort(self) -> None:
        """Close."""
        self.aborted = True


class End(wire.Wire):
    """Keeps what the other end says."""

    def __init__(self) -> None:
        super().__init__("the other end")
        self.said: list[Said] = []
        self.connection_made(cast("asyncio.Transport", Transport()))

    @property
    def pipe(self) -> Transport:
        """Its transport."""
        return cast("Transport", self.transport)

    def took(self, kind: int, number: int, payload: bytes) -> None:
        """Keep it."""
        self.said.append((kind, number, payload))


frames = st.lists(
    st.tuples(st.integers(wire.ASK, wire.CUT), st.integers(0, 2**32 - 1), st.binary(max_size=40)), max_size=8
)


@settings(deadline=None)
@given(frames, st.lists(st.integers(0, 400), max_size=12))
def test_frames_are_whole_however_they_are_cut(said: list[Said], cuts: list[int]) -> None:
    """What is put is taken: the same frames in the same order."""

    async def go() -> None:
        sender, taker = End(), End()
        for frame in said:
            sender.put(*frame)
        await asyncio.sleep(0)
        sent = b"".join(sender.pipe.written)
        places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
        for begin, end in pairwise(places):
            taker.data_received(sent[begin:end])
        assert taker.said == said

    asyncio.run(go())


async def test_what_is_said_in_one_turn_goes_out_together() -> None:
    """One write for all requests: that is what a link is for."""
    end = End()
    for number in range(32):
        end.put(wire.DATA, number, b"token")
    assert end.pipe.written == []
    await asyncio.sleep(0)
    assert len(end.pipe.written) == 1
    end.put(wire.END, 0)
    await asyncio.sleep(0)
    assert len(end.pipe.written) == 2


async def test_much_goes_out_at_once() -> None:
    """Who says it sees by that when the other end has enough."""
    end = End()
    end.put(wire.DATA, 1, b"x" * wire.PIECE_BYTES)
    assert end.pipe.written == []
    end.put(wire.DATA, 1, b"x")
    assert len(end.pipe.written) == 1
    await asyncio.sleep(0)
    assert len(end.pipe.written) == 1


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    """What was put in the same turn as it ended is dropped."""
    end = End()
    end.put(wire.LEAVE, 1)
    end.pipe.aborted = True
    await asyncio.sleep(0)
    assert end.pipe.written == []


@pytest.mark.parametrize("kind", [0, 10, ord("H")])
async def test_what_is_no_frame_ends_the_connection(kind: int, caplog: pytest.LogCaptureFixture) -> None:
    """`HTTP/1.1 400`, say. The frames before it count."""
    end = End()
    with caplog.at_level(logging.ERROR):
        end.data_received(struct.pack("!BII", wire.END, 7, 0) + bytes([kind]) + b"TTP/1.1 400 Bad Request")
    assert end.said == [(wire.END, 7, b"")]
    assert end.pipe.aborted
    assert "no frame" in caplog.text


async def test_a_full_connection_is_waited_for() -> None:
    """Until the other end reads again, or is gone. Who waits no more takes nobody's turn away."""
    end = End()
    assert end.room.is_set()
    for over in (end.resume_writing, lambda: end.connection_lost(None)):
        end.pause_writing()
        waiting, leaving = (asyncio.ensure_future(end.room.wait()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
        over()
        await waiting


async def test_a_large_frame_costs_no_more_than_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that comes in many reads is put together once, not with each of them."""
    end, joined = End(), []

    class Parts(list[bytes]):
        def clear(self) -> None:
            joined.append(len(self))
            super().clear()

    monkeypatch.setattr(end, "_parts", Parts())
    sent = struct.pack("!BII", wire.DATA, 1, 1000) + b"x" * 1000
    for at in range(0, len(sent), 10):
        end.data_received(sent[at : at + 10])
    assert end.said == [(wire.DATA, 1, b"x" * 1000)]
    assert joined == [101]


async def test_an_application_may_be_cancelled_while_its_answer_waits() -> None:
    """Its reader goes on all the same, and hears the rest."""
    waits, cancel, cancelled, end = (asyncio.Event() for _ in range(4))

    async def app(_: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        waiting = asyncio.ensure_future(
            send({"type": "http.response.body", "body": b"first", "more_body": True})
        )
        await asyncio.sleep(0)
        waits.set()
        await cancel.wait()
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        cancelled.set()
        await end.wait()
        await send({"type": "http.response.body", "body": b"last"})

    def frame(kind: int, payload: bytes = b"") -> bytes:
        return struct.pack("!BII", kind, 1, len(payload)) + payload

    link, hears = Link(app, ServerState()), End()
    link.connection_made(cast("asyncio.Transport", Transport()))
    head = {"method": "POST", "path": "/", "query_string": "", "headers": [], "body_bytes": 0}
    link.data_received(frame(wire.ASK, json.dumps(head).encode()) + frame(wire.PAUSE))
    await waits.wait()
    cancel.set()
    await cancelled.wait()
    link.data_received(frame(wire.RESUME))
    end.set()
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    await task
    await asyncio.sleep(0)
    for written in cast("Transport", link.transport).written:
        hears.data_received(written)
    assert [(kind, payload) for kind, _, payload in hears.said][1:] == [
        (wire.DATA, b"first"),
        (wire.DATA, b"last"),
        (wire.END, b""),
    ]


async def test_what_can_t_be_read_is_one_request_s_fault() -> None:
    """It is answered, and so is the next."""

    async def app(_: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    def ask(number: int, path: str) -> bytes:
        head = {"method": "POST", "path": path, "query_string": "", "headers": [], "body_bytes": 0}
        payload = json.dumps(head).encode()
        return struct.pack("!BII", wire.ASK, number, len(payload)) + payload

    link, hears = Link(app, ServerState()), End()
    link.connection_made(cast("asyncio.Transport", Transport()))
    link.data_received(ask(1, "/\ud800") + ask(2, "/"))
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    await task
    await asyncio.sleep(0)
    for written in cast("Transport", link.transport).written:
        hears.data_received(written)
    heads = {number: json.loads(said)["status"] for kind, number, said in hears.said if kind == wire.HEAD}
    assert heads == {1: 500, 2: 204}
    assert [number for kind, number, _ in hears.said if kind == wire.END] == [1, 2]
