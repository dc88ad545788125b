"""Files and batches of `python -m gateway` by the official clients, and through `kill -9` of it."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.gateway_process import CHAT, Program, gateway
from tests.scripted_worker import READY, Worker
from tests.servers import KEY
from tests.until import until

MODEL = "org/model"
LINES = 500
WITHIN_S = 600.0
BAD = 20
"""Every so manieth line is one that the worker refuses."""


def line(custom_id: str, text: str | None = None) -> dict[str, Any]:
    """A request that is answered with `text`, its `custom_id` unless given."""
    messages = [{"role": "user", "content": custom_id if text is None else text}]
    body = {"model": MODEL, "messages": messages}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    """The file of these lines."""
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


@asynccontextmanager
async def echoing(folder: Path, **environ: str) -> AsyncIterator[tuple[Program, Worker]]:
    """A gateway with the data of `folder` and a worker that answers what it is told."""
    settings = {"DATA_DIR": str(folder / "data"), **environ}
    async with gateway(folder, (READY, {CHAT: None}), environ=settings) as program:
        worker = await program.director.worker()
        await program.address()
        yield program, worker


async def over(client: openai.AsyncOpenAI, batch_id: str, look_s: float = 0.01) -> openai.types.Batch:
    """The batch, once it is."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in {"completed", "failed", "expired", "cancelled"}:
                return batch
            await asyncio.sleep(look_s)


async def read_lines(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    assert file_id is not None
    return [json.loads(one) for one in (await client.files.content(file_id)).text.splitlines()]


def counted(program: Program) -> dict[str, Any]:
    """What the gateway says was used."""
    address = f"{program.base_url.partition('/v2/')[0]}/admin/usage"
    found: dict[str, Any] = httpx.get(address, headers={"authorization": f"Bearer {KEY}"}, timeout=60).json()
    return found


async def test_both_official_clients_do_files_and_batches(tmp_path: Path) -> None:
    """What one has made, the other sees; all objects are of their strictest types."""
    async with echoing(tmp_path) as (program, _), program.client() as client:
        blocking = openai.OpenAI(base_url=program.base_url, api_key=client.api_key, max_retries=0)
        raw = jsonl([line("a"), line("b", "404"), line("c")])
        with blocking:
            file = await asyncio.to_thread(
                blocking.files.create,
                file=("r\u00fcckw\u00e4rts.jsonl", io.BytesIO(raw)),
                purpose="batch",
                expires_after={"anchor": "created_at", "seconds": 3600},
            )
            assert (file.bytes, file.filename, file.purpose) == (
                len(raw),
                "r\u00fcckw\u00e4rts.jsonl",
                "batch",
            )
            assert file.expires_at == file.created_at + 3600
            assert await client.files.retrieve(file.id) == file
            assert (await client.files.content(file.id)).content == raw
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"for": "a test"},
            )
            done = await over(client, batch.id)
            openai.types.Batch.model_validate(done.model_dump(), strict=True)
            assert await asyncio.to_thread(blocking.batches.retrieve, batch.id) == done
            assert [
                one.id for one in await asyncio.to_thread(lambda: list(blocking.batches.list(limit=1)))
            ] == [batch.id]
        assert (done.status, done.metadata, done.model) == ("completed", {"for": "a test"}, MODEL)
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        assert done.usage is not None
        assert (done.usage.input_tokens, done.usage.output_tokens) == (4, 2)
        outputs = await read_lines(client, done.output_file_id)
        assert [
            (one["custom_id"], one["response"]["body"]["choices"][0]["message"]["content"]) for one in outputs
        ] == [("a", "a"), ("c", "c")]
        (error,) = await read_lines(client, done.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("b", 404)
        assert done.output_file_id is not None
        results = [one.id async for one in client.files.list(purpose="batch_output", order="asc", limit=1)]
        assert results == sorted([done.output_file_id, str(done.error_file_id)])
        assert (await client.files.delete(done.output_file_id)).deleted
        with pytest.raises(openai.NotFoundError) as gone:
            await client.files.content(done.output_file_id)
        assert (gone.value.param, gone.value.code) == ("id", "file_not_found")
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)


async def test_no_line_is_lost_or_counted_twice_though_the_gateway_is_killed_twice(tmp_path: Path) -> None:
    """500 lines, 25 of them bad. Whatever was in work, every good one is in the output once."""
    texts = {number: "400" if number % BAD == 7 else str(number) + "x" for number in range(LINES)}
    texts |= {170: "hold first", 340: "hold second"}
    raw = jsonl(line(str(number), text) for number, text in texts.items())
    async with echoing(tmp_path) as (program, worker), program.client() as client:
        file = await client.files.create(file=("in.jsonl", raw), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await worker.saw("paused", "first")
        while (found := (await client.batches.retrieve(batch.id)).request_counts) is None or (
            found.completed + found.failed < 170
        ):
            pass  # a look is a round trip
        await program.end(signal.SIGKILL)
    async with echoing(tmp_path) as (program, worker):
        await worker.saw("paused", "first")
        worker.open("first")
        await worker.saw("paused", "second")
        await program.end(signal.SIGKILL)
    async with echoing(tmp_path) as (program, worker), program.client() as client:
        worker.open("first")
        worker.open("second")
        done = await over(client, batch.id)
        outputs = await read_lines(client, done.output_file_id)
        errors = await read_lines(client, done.error_file_id)
        used = (await asyncio.to_thread(counted, program))["totals"]
    good = {number: text for number, text in texts.items() if text != "400"}
    assert done.status == "completed"
    assert [
        (one["custom_id"], one["response"]["body"]["choices"][0]["message"]["content"]) for one in outputs
    ] == [(str(number), text) for number, text in good.items()]
    assert [one["custom_id"] for one in errors] == [str(n) for n, text in texts.items() if text == "400"]
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 500, "completed": 475, "failed": 25}
    tokens = (2 * len(good), sum(map(len, good.values())))
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens) == tokens
    assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (475, *tokens)


async def test_an_upload_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    """`kill -9` of the gateway in the middle of it: neither file nor row."""
    async with echoing(tmp_path) as (program, _):
        url = program.base_url.removeprefix("http://").partition("/")
        host, _, port = url[0].partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /{url[2]}/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
            "content-type: multipart/form-data; boundary=x\r\ncontent-length: 10000000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        writer.write(head.encode() + b"x" * 3_000_000)
        await writer.drain()
        files = tmp_path / "data" / "files"
        await asyncio.to_thread(until, lambda: any(path.stat().st_size for path in files.iterdir()))
        await program.end(signal.SIGKILL)
        writer.close()
        assert [path.suffix for path in files.iterdir()] == [".part"]
    async with echoing(tmp_path) as (program, _), program.client() as client:
        assert [file async for file in client.files.list()] == []
        assert list(files.iterdir()) == []
