"""`bench`: from scripted windows to the figures, the table and the line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from bench import figures, load, overhead
from bench.figures import Figures, Window

SPEEDS = {"vllm": [90.0, 100.0, 120.0], "worker": [100.0, 105.0, 130.0], "gateway": [80.0, 92.0, 99.0]}
"""Tokens per second of three rounds."""
FIRST_S = {"vllm": 0.100, "worker": 0.104, "gateway": 0.110}


def windows(streams: int) -> list[Window]:
    """Three rounds of each path: 100 tokens a window, answers that begin at one time but for the last."""
    return [
        Window(
            path=path,
            streams=streams,
            first_s=[FIRST_S[path]] * 9 + [2 * FIRST_S[path]],
            tokens=100,
            wall_s=100 / speed,
            cpu_s=0.5,
        )
        for path, speeds in SPEEDS.items()
        for speed in speeds
    ]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3.0], 99, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([0.0, 10.0], 99, 9.9),
        ([float(value) for value in range(101)], 99, 99.0),
    ],
)
def test_percentile(values: Sequence[float], percent: float, expected: float) -> None:
    """A percentile is linear between the two values nearest to it, in whatever order they come."""
    assert figures.percentile(values, percent) == pytest.approx(expected)


def test_figures_are_medians_of_the_rounds() -> None:
    """Each round counts once, however long it took; the slowest and the fastest are kept."""
    found = Figures.of([window for window in windows(8) if window.path == "vllm"])
    assert asdict(found) == pytest.approx(
        {
            "first_p50_s": 0.100,
            "first_p99_s": 0.191,
            "tokens_per_s": 100.0,
            "tokens_per_s_min": 90.0,
            "tokens_per_s_max": 120.0,
            "cpu_s_per_token": 0.005,
            "cores": 0.5,
        }
    )


def test_ratios_are_of_the_most_streams() -> None:
    """Ours by vLLM's, on the medians, at the largest number of streams that was measured."""
    few = [
        Window("vllm", 1, [1.0], 1, 1.0, 1.0),
        Window("worker", 1, [9.0], 9, 1.0, 1.0),
        Window("gateway", 1, [9.0], 9, 1.0, 1.0),
    ]
    assert figures.ratios(figures.results(few + windows(32))) == {
        "ttft_ratio": 1.04,
        "tokens_ratio": 1.05,
        "gateway_tokens_ratio": 0.92,
        "gateway_ttft_ratio": 1.1,
        "ttft_p99_ratio": 1.04,
        "gateway_ttft_p99_ratio": 1.1,
    }


def test_table() -> None:
    """The table shows each path, what the gateway adds, and the ratios."""
    assert figures.table(figures.results(windows(32))).splitlines() == [
        "                       TTFT p50        p99   tokens/s        min - max   CPU/token  cores",
        "",
        "32 streams",
        "  vLLM's own server    100.0 ms   191.0 ms      100.0         90 - 120    5.000 ms   0.50",
        "  worker alone         104.0 ms   198.6 ms      105.0        100 - 130    5.000 ms   0.53",
        "  gateway + worker     110.0 ms   210.1 ms       92.0          80 - 99    5.000 ms   0.46",
        "  the gateway adds      +6.0 ms   +11.5 ms    -12.4 %                    +0.000 ms  -0.07",
        "  worker / vLLM           1.040      1.040      1.050                        1.000  1.050",
        "  gateway / vLLM          1.100      1.100      0.920                        1.000  0.920",
    ]


def test_verdicts_name_goal_and_outcome() -> None:
    """A goal that is just reached is met; one that is not is said to be missed."""
    assert figures.verdicts({"ttft_ratio": 1.05, "tokens_ratio": 0.999, "gateway_tokens_ratio": 0.9}) == [
        "ttft_ratio 1.050, goal <= 1.05: met",
        "tokens_ratio 0.999, goal >= 1: missed",
        "gateway_tokens_ratio 0.900, goal >= 0.9: met",
    ]


def test_line_of_json() -> None:
    """The last line holds the ratios, what was measured where, and every path's figures."""
    line = figures.line(windows(32), {"model": "m", "rounds": 3, "machine": "a machine"})
    assert json.loads(json.dumps(line)) == {
        **figures.ratios(figures.results(windows(32))),
        "streams": 32,
        "model": "m",
        "rounds": 3,
        "machine": "a machine",
        "other_cores": 0.0,
        "results": {
            "32": {
                "vllm": _json(100.0, 191.0, 100.0),
                "worker": _json(104.0, 198.64, 105.0),
                "gateway": _json(110.0, 210.1, 92.0),
            }
        },
    }


def _json(p50_ms: float, p99_ms: float, tokens_per_s: float) -> dict[str, float]:
    return {
        "ttft_p50_ms": p50_ms,
        "ttft_p99_ms": p99_ms,
        "tokens_per_s": tokens_per_s,
        "cpu_ms_per_token": 5.0,
    }


def test_prompts_are_the_same_for_each_server_and_never_alike() -> None:
    """One seed makes the same bodies, of which no two hold the same prompt."""
    options = argparse.Namespace(prompt_words=40, max_tokens=64)
    one, again = (list(overhead.prompts(random.Random("0 32"), 64, options)) for _ in range(2))
    assert one == again
    assert len(set(one)) == 64


def test_tokens_per_s_counts_all_streams() -> None:
    """The speed of a window is all its tokens by its time."""
    outcome = load.Outcome(2.0, 0.1, [load.Sample(0.1, 1.0, 64), load.Sample(0.1, 2.0, 36)])
    assert outcome.tokens_per_s == pytest.approx(50.0)


FRAMES = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"two tokens"}}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"total_tokens":11,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
)


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.written.append(bytes(data))


def answer(*frames: bytes, status: bytes = b"200 OK") -> list[bytes]:
    """An HTTP answer in chunks, in the pieces in which it arrives."""
    chunks = [b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames]
    return [b"HTTP/1.1 " + status + b"\r\ntransfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]


def stream_of(*bodies: bytes) -> tuple[load.Stream, Wire, list[load.Sample]]:
    """A connection that has asked the first of `bodies`."""
    todo = list(bodies)
    wire, samples = Wire(), list[load.Sample]()
    stream = load.Stream(b"POST / HTTP/1.1\r\n")
    stream.connection_made(wire)
    stream.begin(lambda: todo.pop(0) if todo else None, samples)
    return stream, wire, samples


async def test_tokens_are_counted_by_usage() -> None:
    """Several tokens may come in one chunk, so that chunks are not what is counted."""
    stream, _, samples = stream_of(b"{}")
    for piece in answer(*FRAMES):
        stream.data_received(piece)
    await stream.ended
    assert [sample.tokens for sample in samples] == [2]


async def test_the_first_text_is_not_the_first_chunk() -> None:
    """The chunk that holds the role and no text does not stop the clock, wherever the text is cut."""
    stream, _, _ = stream_of(b"{}")
    head, role, text, *_ = answer(*FRAMES)
    stream.data_received(head + role + text[:40])
    assert stream.first_s is None
    stream.data_received(text[40:])
    assert stream.first_s is not None


async def test_a_stream_asks_again_when_it_is_answered() -> None:
    """The next request goes out on the same connection as soon as the answer is whole."""
    stream, wire, samples = stream_of(b"one", b"two")
    stream.data_received(b"".join(answer(*FRAMES)))
    assert wire.written == [
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\none",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\ntwo",
    ]
    assert not stream.ended.done()
    stream.data_received(b"".join(answer(*FRAMES)))
    await stream.ended
    assert len(samples) == 2


async def test_an_error_ends_the_benchmark() -> None:
    """A server that answers with an error is not measured: what it said is raised."""
    stream, _, _ = stream_of(b"{}")
    stream.data_received(b"".join(answer(b'{"error": "no"}', status=b"404 Not Found")))
    with pytest.raises(load.BadAnswer, match=r'^404: \{"error": "no"\}$'):
        await stream.ended


async def test_a_closed_connection_ends_the_benchmark() -> None:
    """A connection that closes in mid-answer is not taken for an answer."""
    stream, _, _ = stream_of(b"{}")
    stream.connection_lost(None)
    with pytest.raises(load.BadAnswer, match="the connection was closed"):
        await stream.ended
