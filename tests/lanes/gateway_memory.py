"""The largest file and the largest batch through a gateway whose memory is watched: `make test-large`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from handler.batch_lines import FILE_MAX_BYTES, REQUESTS_MAX
from tests.acceptance.test_gateway_batches import echoing, jsonl, line, over
from tests.memory import forget_peak, peak_bytes

UPLOAD_BYTES = 500 << 20
UPLOAD_GROWS_MAX_BYTES = 32 << 20
BATCH_GROWS_MAX_BYTES = 150 << 20
"""What a gateway may take beyond what it took before; a batch's window alone is 16 MiB."""


async def test_a_file_of_500_mib_streams_to_the_disk_and_back(tmp_path: Path) -> None:
    """In and out, in flat memory."""
    source = tmp_path / "large"
    digest = hashlib.sha256()
    with source.open("wb") as out:
        for number in range(UPLOAD_BYTES >> 20):
            piece = hashlib.sha256(str(number).encode()).digest() * (1 << 15)
            digest.update(piece)
            out.write(piece)
    async with echoing(tmp_path) as (program, _), program.client() as client:
        await client.files.create(file=("small", b"x"), purpose="user_data")
        pid = program.process.pid
        forget_peak(pid)
        before = peak_bytes(pid)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with source.open("rb") as file:
            made = await client.files.create(file=("large", file), purpose="user_data", timeout=300)
        sent_s = loop.time() - began_s
        found = hashlib.sha256()
        async with client.files.with_streaming_response.content(made.id) as answer:
            async for piece in answer.iter_bytes(1 << 20):
                found.update(piece)
        grew = peak_bytes(pid) - before
        print(json.dumps({"bytes": made.bytes, "upload_s": round(sent_s, 1), "grew_mib": grew >> 20}))
    assert made.bytes == UPLOAD_BYTES
    assert found.hexdigest() == digest.hexdigest()
    assert grew < UPLOAD_GROWS_MAX_BYTES


@pytest.mark.timeout(900)
async def test_fifty_thousand_lines_of_200_mb_stream_through_bounded_memory(tmp_path: Path) -> None:
    """Every line asked, all answers kept."""
    text = "x" * (FILE_MAX_BYTES // REQUESTS_MAX - 200)
    source = tmp_path / "large.jsonl"
    with source.open("wb") as out:
        for number in range(REQUESTS_MAX):
            out.write(jsonl([line(str(number), text)]))
    async with echoing(tmp_path) as (program, _), program.client() as client:
        small = await client.files.create(file=("small", jsonl([line("a")])), purpose="batch")
        asked = await client.batches.create(
            input_file_id=small.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await over(client, asked.id)
        with source.open("rb") as file:
            large = await client.files.create(file=("large.jsonl", file), purpose="batch", timeout=300)
        pid = program.process.pid
        forget_peak(pid)
        before = peak_bytes(pid)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        asked = await client.batches.create(
            input_file_id=large.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        done = await over(client, asked.id, look_s=0.5)
        took_s, grew = loop.time() - began_s, peak_bytes(pid) - before
        print(json.dumps({"lines": REQUESTS_MAX, "took_s": round(took_s, 1), "grew_mib": grew >> 20}))
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {
            "total": REQUESTS_MAX,
            "completed": REQUESTS_MAX,
            "failed": 0,
        }
        assert done.output_file_id is not None
        numbers: list[str] = []
        async with client.files.with_streaming_response.content(done.output_file_id) as answer:
            numbers += [json.loads(raw)["custom_id"] async for raw in answer.iter_lines()]
    assert numbers == [str(number) for number in range(REQUESTS_MAX)]
    assert grew < BATCH_GROWS_MAX_BYTES
