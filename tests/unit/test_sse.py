"""`handler.sse`: however the bytes are cut, whole frames come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import sse

LINE = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=12)
EVENT = st.one_of(
    LINE.map(lambda text: [f"data: {text}"]),
    LINE.map(lambda text: [f": {text}"]),
    st.tuples(LINE, LINE).map(lambda pair: [f"event: {pair[0]}", f"data: {pair[1]}"]),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """The frames of a stream in one style of line ends, and its bytes cut anywhere."""
    end = draw(st.sampled_from(["\n", "\r\n"]))
    frames = [
        ("".join(line + end for line in lines) + end).encode()
        for lines in draw(st.lists(EVENT, min_size=1, max_size=8))
    ]
    whole = b"".join(frames)
    return frames, cut(whole, draw(st.lists(st.integers(0, len(whole)), max_size=12)))


def cut(whole: bytes, places: Iterable[int]) -> list[bytes]:
    """`whole` cut at `places`, with nothing that is empty."""
    ends = sorted({0, *places, len(whole)})
    return [whole[begin:end] for begin, end in pairwise(ends)]


async def arriving(chunks: Sequence[bytes], failure: Exception | None = None) -> AsyncIterator[bytes]:
    """`chunks` one by one, then `failure`."""
    for chunk in chunks:
        yield chunk
    if failure is not None:
        raise failure


def regrouped(chunks: Sequence[bytes]) -> list[bytes]:
    """What `sse.frames` makes of `chunks`."""

    async def collect() -> list[bytes]:
        return [chunk async for chunk in sse.frames(arriving(chunks))]

    return asyncio.run(collect())


@given(streams())
def test_any_cut_regroups_to_whole_frames(stream: tuple[list[bytes], list[bytes]]) -> None:
    """The bytes are the same, none is held back, and each chunk ends where a frame ends."""
    frames, chunks = stream
    out = regrouped(chunks)
    assert b"".join(out) == b"".join(frames)
    ends, at = set[int](), 0
    for frame in frames:
        at += len(frame)
        ends.add(at)
    at = 0
    for chunk in out:
        at += len(chunk)
        assert at in ends
        chunk.decode()  # so no character is cut either


@given(streams())
def test_a_frame_leaves_with_the_chunk_that_completes_it(stream: tuple[list[bytes], list[bytes]]) -> None:
    """Before the next chunk is asked for, every frame that is whole has gone out."""
    frames, chunks = stream
    taken = 0

    async def watched() -> AsyncIterator[bytes]:
        nonlocal taken
        for chunk in chunks:
            assert given_out == whole_until(taken), "a whole frame was held back"
            taken += len(chunk)
            yield chunk

    def whole_until(size: int) -> int:
        at = 0
        for frame in frames:
            if at + len(frame) > size:
                break
            at += len(frame)
        return at

    given_out = 0

    async def collect() -> None:
        nonlocal given_out
        async for chunk in sse.frames(watched()):
            given_out += len(chunk)

    asyncio.run(collect())


def test_frames_that_are_ready_together_leave_together() -> None:
    """One wake-up carries all the tokens of an engine step."""
    assert regrouped([b"data: 1\n\ndata: 2\n\n", b"data: 3\n\nda", b"ta: 4\n\n"]) == [
        b"data: 1\n\ndata: 2\n\n",
        b"data: 3\n\n",
        b"data: 4\n\n",
    ]


def test_an_end_without_blank_line_is_passed_on() -> None:
    """What the source never finished is still its last word."""
    assert regrouped([b"data: 1\n\ndata: ", b"2"]) == [b"data: 1\n\n", b"data: 2"]


async def test_a_source_that_fails_loses_its_cut_frame_only() -> None:
    """Whole frames arrive, half a frame is dropped, and the failure is raised."""
    failing = sse.frames(arriving([b"data: 1\n\ndata: 2", b"\n\ndata: 3"], OSError("gone")))
    assert [await anext(failing), await anext(failing)] == [b"data: 1\n\n", b"data: 2\n\n"]
    with pytest.raises(OSError, match="gone"):
        await anext(failing)


@given(st.lists(LINE, max_size=5))
def test_split_is_the_inverse_of_joining(lines: list[str]) -> None:
    """The frames of a chunk, joined, are the chunk."""
    frames = [f"data: {line}\n\n".encode() for line in lines]
    assert sse.split(b"".join(frames)) == frames


@given(st.dictionaries(LINE, st.one_of(LINE, st.none(), st.integers())))
def test_data_reads_what_event_wrote(value: dict[str, object]) -> None:
    """`event` and `data` are inverse for every JSON object."""
    assert sse.data(sse.event(value)) == value


def test_data_of_a_named_event_is_read() -> None:
    """As `/v1/responses` and `/v1/messages` have them."""
    assert sse.data(b'event: message_stop\ndata: {"type":"message_stop"}\n\n') == {"type": "message_stop"}


@pytest.mark.parametrize(
    "frame", [sse.DONE, sse.KEEP_ALIVE, b"data: {\n\n", b": data: {}\n\n", b"data: {}\ndata: {}\n\n"]
)
def test_data_of_other_frames_is_none(frame: bytes) -> None:
    """What is no JSON in one line."""
    assert sse.data(frame) is None


def test_a_lone_surrogate_is_escaped() -> None:
    """JSON can name half a character, UTF-8 can't hold it: the frame stays JSON."""
    assert sse.event({"a": "\ud800"}) == b'data: {"a":"\\ud800"}\n\n'
