"""`gateway.files.uploads`: a form in pieces, its file given on as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.files import uploads
from gateway.files.uploads import Form, read_form
from handler.errors import BadRequest, StorageFull
from handler.messages import Request

HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
PURPOSE = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = b"\r\n--x--\r\n"


@dataclass
class Sink:
    """What was written, and in how large pieces."""

    pieces: list[bytes] = field(default_factory=list)

    async def write(self, data: bytes) -> None:
        """As `read_form` wants it."""
        self.pieces.append(data)


async def cut(raw: bytes, sizes: Sequence[int]) -> AsyncIterator[bytes]:
    """`raw` in pieces of `sizes`, and the rest."""
    for size in sizes:
        if raw[:size]:
            yield raw[:size]
        raw = raw[size:]
    if raw:
        yield raw


def form(
    raw: bytes, sizes: Sequence[int] = (), content_type: str = "multipart/form-data; boundary=x"
) -> Request:
    """A request with the form `raw`."""
    return Request("POST", "/v1/files", (("content-type", content_type),), pieces=cut(raw, sizes))


def as_httpx_sends(filename: str, content: bytes, **fields: str) -> Request:
    """The form that the official client for Python sends."""
    sent = httpx.Request("POST", "http://x", data=fields, files={"file": (filename, content)})
    return form(sent.read(), content_type=sent.headers["content-type"])


@given(st.binary(max_size=200), st.lists(st.integers(0, 40), max_size=12))
async def test_however_the_pieces_fall_the_file_is_the_same(content: bytes, sizes: list[int]) -> None:
    """Boundaries and what looks like them included."""
    sink = Sink()
    if b"\r\n--x" in content:
        return
    found = await read_form(form(PURPOSE + HEAD + content + END, sizes), sink.write)
    assert (found, b"".join(sink.pieces)) == (Form("a", {"purpose": "batch"}), content)


async def test_fields_come_before_and_after_the_file() -> None:
    """In any order."""
    sink = Sink()
    assert await read_form(form(HEAD + b"1" + b"\r\n" + PURPOSE + b"--x--\r\n"), sink.write) == Form(
        "a", {"purpose": "batch"}
    )
    assert sink.pieces == [b"1"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\u00fc \U0001f600.jsonl", 'quo"te', "C:\\x\\y", "a\r\nb"]
)
async def test_a_name_is_data(name: str) -> None:
    """Whatever it looks like; the client escapes what would end it."""
    found = await read_form(as_httpx_sends(name, b"x", purpose="batch"), Sink().write)
    escaped = {'"': "%22", "\r": "%0D", "\n": "%0A"}
    expected = "".join(escaped.get(letter, letter) for letter in name)
    assert found.filename in {expected, expected.rpartition("\\")[2]}


async def test_a_file_is_given_on_before_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of it is held than `WRITE_BYTES` and a piece."""
    monkeypatch.setattr(uploads, "WRITE_BYTES", 10)
    sink = Sink()
    content = b"0123456789" * 10
    await read_form(form(HEAD + content + END, [len(HEAD), *[4] * 25]), sink.write)
    assert b"".join(sink.pieces) == content
    assert max(map(len, sink.pieces)) < 20


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (HEAD + b"half", "has no end"),
        (b"no form at all", "could not parse"),
        (PURPOSE + b"--x--\r\n", "Missing required parameter: 'file'"),
        (HEAD + b"1\r\n" + HEAD + b"2" + END, "more than one file"),
        (PURPOSE * 33 + HEAD + b"1" + END, "more than 32 fields"),
        (PURPOSE.replace(b"batch", b"x" * 5000) + HEAD + END, "more than 4096 bytes"),
        (HEAD.replace(b'"file"', b'"' + b"x" * 9000 + b'"') + END, "header size"),
        (b"--x\r\nContent-Type: text/plain\r\n\r\n1" + END, "has no name"),
    ],
)
async def test_a_broken_form_is_refused_in_words(raw: bytes, why: str) -> None:
    """With what is wrong with it."""
    with pytest.raises(BadRequest, match=why):
        await read_form(form(raw), Sink().write)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"]
)
async def test_what_is_no_form_is_refused(content_type: str) -> None:
    """Before it is read."""
    with pytest.raises(BadRequest, match="multipart/form-data"):
        await read_form(form(HEAD + END, content_type=content_type), Sink().write)


async def test_who_writes_may_refuse() -> None:
    """And the rest of the form is not read."""

    async def full(_: bytes) -> None:
        raise StorageFull("no room")

    with pytest.raises(StorageFull):
        await read_form(form(HEAD + b"1" + END), full)
