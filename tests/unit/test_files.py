"""The routes of files over a real database and folder: whose they are, what is kept, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.accounts.keys import Key, Keys
from gateway.files.routes import Files
from gateway.files.store import FILES, FileStore, new_id
from gateway.store import Store
from handler.errors import Conflict, RequestError, StorageFull
from handler.messages import Request, Visit, read

BASE = "/v2/local/openai/v1/files"


@dataclass
class Desk:
    """The routes, asked as one key or another; `now` is theirs."""

    store: Store
    folder: Path
    now: float = 1_000_000.0
    max_file_bytes: int = 1 << 20
    max_stored_bytes: int = 1 << 20
    in_use: set[str] = field(default_factory=set)

    async def open(self, writing: tuple[str, ...] = ()) -> Desk:
        """As at the gateway's start."""
        files = FileStore(
            self.store,
            self.folder,
            max_file_bytes=self.max_file_bytes,
            max_stored_bytes=self.max_stored_bytes,
            now=lambda: self.now,
        )
        self.files = await files.open(writing)
        self.part = Files(
            files,
            {"local"},
            Keys(stored=[Key("k1", "", b"1"), Key("k2", "", b"2"), Key("admin", "", b"3", admin=True)]),
            self._check_delete,
        )
        return self

    def _check_delete(self, file_id: str, _: object) -> None:
        if file_id in self.in_use:
            raise Conflict("in use")

    async def ask(
        self, method: str, path: str = "", *, key: str = "k1", query: str = "", request: Request | None = None
    ) -> tuple[int, Any]:
        """Status and body of an answer, a file's content as bytes."""
        request = request or Request(method, BASE + path, query=query, visit=Visit(caller=key))
        try:
            call = self.part.find(request)
            assert call is not None
            async with call(request) as reply:
                body = await read(reply)
        except RequestError as error:
            return error.status, error.body()["error"]
        return reply.status, json.loads(body) if reply.header("content-type") == "application/json" else body

    async def upload(
        self, content: bytes = b"hello", /, *, key: str = "k1", **fields: str
    ) -> tuple[int, Any]:
        """What comes of an upload."""
        form = {
            "purpose": "user_data",
            **{name: value for name, value in fields.items() if name != "filename"},
        }
        sent = httpx.Request(
            "POST", "http://x", data=form, files={"file": (fields.get("filename", "a.txt"), content)}
        )

        async def pieces() -> AsyncIterator[bytes]:
            yield sent.read()

        headers = tuple((name, value) for name, value in sent.headers.items())
        request = Request("POST", BASE, headers, visit=Visit(caller=key), pieces=pieces())
        return await self.ask("POST", request=request)

    def on_disk(self) -> set[str]:
        """The names in the folder."""
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
async def desk(tmp_path: Path, database_url: str) -> AsyncIterator[Desk]:
    """An open one."""
    store = Store.open(database_url)
    yield await Desk(store, tmp_path / "files").open()
    store.close()


async def test_what_was_uploaded_comes_back(desk: Desk) -> None:
    """The object is OpenAI's, and the bytes are the client's."""
    status, file = await desk.upload(b"\x00hello\r\n", filename="../../a.txt", purpose="user_data")
    assert status == 200
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": 8,
        "created_at": 1_000_000,
        "expires_at": None,
        "filename": "../../a.txt",
        "purpose": "user_data",
        "status": "processed",
        "status_details": None,
    }
    assert await desk.ask("GET", f"/{file['id']}") == (200, file)
    assert await desk.ask("GET", f"/{file['id']}/content") == (200, b"\x00hello\r\n")
    assert desk.on_disk() == {file["id"]}
    row = desk.store.read_now(lambda connection: connection.execute(FILES.select()).mappings().one())
    assert row["sha256"] == hashlib.sha256(b"\x00hello\r\n").hexdigest()


async def test_a_file_is_its_keys_alone(desk: Desk) -> None:
    """Another key finds nothing and deletes nothing; an admin's sees it."""
    _, file = await desk.upload()
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        status, error = await desk.ask(method, f"/{file['id']}{path}", key="k2")
        assert (status, error["param"], error["message"]) == (404, "id", f"No such File object: {file['id']}")
    assert (await desk.ask("GET", key="k2"))[1]["data"] == []
    assert (await desk.ask("GET", key="admin"))[1]["data"] == [file]
    assert (await desk.ask("GET", f"/{file['id']}", key="admin")) == (200, file)


async def test_a_deleted_file_is_gone(desk: Desk) -> None:
    """Row and bytes; a reader that has begun reads on."""
    _, file = await desk.upload()
    request = Request("GET", f"{BASE}/{file['id']}/content", visit=Visit(caller="k1"))
    call = desk.part.find(request)
    assert call is not None
    async with call(request) as reply:
        assert await desk.ask("DELETE", f"/{file['id']}") == (
            200,
            {"id": file["id"], "object": "file", "deleted": True},
        )
        assert await read(reply) == b"hello"
    assert desk.on_disk() == set()
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        assert (await desk.ask(method, f"/{file['id']}{path}"))[0] == 404


async def test_a_file_in_use_is_not_deleted(desk: Desk) -> None:
    """Who uses it says so."""
    _, file = await desk.upload()
    desk.in_use.add(file["id"])
    assert (await desk.ask("DELETE", f"/{file['id']}"))[0] == 409
    assert (await desk.ask("GET", f"/{file['id']}/content"))[1] == b"hello"


async def test_a_list_is_paged(desk: Desk) -> None:
    """The newest first unless asked otherwise; a page says where the next begins."""
    ids = [(await desk.upload(purpose=purpose))[1]["id"] for purpose in ["batch", "user_data", "batch"]]

    async def listed(query: str) -> tuple[list[str], bool]:
        _, page = await desk.ask("GET", query=query)
        found = [file["id"] for file in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == (
            "list",
            found[0] if found else None,
            found[-1] if found else None,
        )
        return found, page["has_more"]

    assert sorted(ids) == ids
    assert await listed("") == (ids[::-1], False)
    assert await listed("order=asc&limit=2") == (ids[:2], True)
    assert await listed(f"order=asc&limit=2&after={ids[1]}") == (ids[2:], False)
    assert await listed(f"after={ids[1]}") == (ids[:1], False)
    assert await listed("purpose=batch") == ([ids[2], ids[0]], False)
    assert await listed("purpose=vision") == ([], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"), ("order=up", "order")],
)
async def test_a_wrong_page_is_refused(desk: Desk, query: str, param: str) -> None:
    """By the parameter's name."""
    status, error = await desk.ask("GET", query=query)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e9"}, "expires_after.seconds"),
    ],
)
async def test_a_refused_upload_leaves_nothing(desk: Desk, fields: dict[str, str], param: str) -> None:
    """Neither row nor bytes."""
    status, error = await desk.upload(**fields)
    assert (status, error["param"]) == (400, param)
    assert desk.on_disk() == set()
    assert (await desk.ask("GET"))[1]["data"] == []


async def test_a_file_expires(desk: Desk) -> None:
    """When its form says, one for a batch after thirty days; then nobody sees it, and its place is free."""
    _, hour = await desk.upload(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    _, month = await desk.upload(purpose="batch")
    assert hour["expires_at"] == 1_003_600
    assert month["expires_at"] == 1_000_000 + 30 * 86_400
    desk.now += 3600
    assert (await desk.ask("GET", f"/{hour['id']}"))[0] == 404
    assert (await desk.ask("GET"))[1]["data"] == [month]
    expired = await desk.files.expired()
    assert expired == [hour["id"]]
    await desk.files.delete(expired)
    assert desk.on_disk() == {month["id"]}


async def test_a_file_has_a_largest_size(desk: Desk) -> None:
    """The limit itself is taken."""
    desk.max_file_bytes = 5
    await desk.open()
    assert (await desk.upload(b"12345"))[0] == 200
    status, error = await desk.upload(b"123456")
    assert (status, error["code"]) == (413, "request_too_large")
    assert len(desk.on_disk()) == 1


async def test_all_files_together_have_a_largest_size(desk: Desk) -> None:
    """What is deleted makes room again; a client is not told to send all of it once more."""
    desk.max_stored_bytes = 8
    await desk.open()
    _, file = await desk.upload(b"12345")
    status, error = await desk.upload(b"1234")
    assert (status, error["code"]) == (413, "storage_full")
    assert desk.on_disk() == {file["id"]}
    await desk.ask("DELETE", f"/{file['id']}")
    assert (await desk.upload(b"1234"))[0] == 200


async def test_a_full_disk_is_told_and_leaves_nothing(desk: Desk) -> None:
    """As a bound of our own, and not as a fault of the server, after which a client sends it all again."""
    desk.max_file_bytes = desk.max_stored_bytes = 8 << 20
    await desk.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        status, error = await desk.upload(b"x" * (3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, error["code"], error["message"]) == (413, "storage_full", "The disk is full.")
    assert desk.on_disk() == set()


async def test_what_is_on_its_way_counts(desk: Desk) -> None:
    """However many come at once, and whatever they announce."""
    desk.max_stored_bytes = 8
    await desk.open()
    with desk.files.draft() as one, desk.files.draft() as two:
        await one.write(b"12345")
        await two.write(b"123")
        with pytest.raises(StorageFull):
            await two.write(b"4")
    assert (await desk.upload(b"12345678"))[0] == 200


@pytest.mark.sqlite
async def test_a_start_removes_what_has_no_row(desk: Desk) -> None:
    """Half of an upload, and a file whose row was not written; what is still written stays."""
    _, file = await desk.upload()
    for name in ("file-1.part", "file-2", "file-3"):
        (desk.folder / name).write_bytes(b"left")
    await desk.open(writing=("file-3",))
    assert desk.on_disk() == {file["id"], "file-3"}


async def test_a_client_that_leaves_in_its_upload_leaves_nothing(desk: Desk) -> None:
    """As if it had never been there."""
    begun = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
        begun.set()
        await asyncio.Event().wait()

    headers = (("content-type", "multipart/form-data; boundary=x"),)
    request = Request("POST", BASE, headers, visit=Visit(caller="k1"), pieces=pieces())
    uploading = asyncio.create_task(desk.ask("POST", request=request))
    await begun.wait()
    assert len(desk.on_disk()) == 1
    uploading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert desk.on_disk() == set()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "", 405), ("POST", "/file-1", 405), ("POST", "/file-1/content", 405), ("GET", "/file-1", 404)],
)
async def test_what_there_is_not(desk: Desk, method: str, path: str, status: int) -> None:
    """In the usual words."""
    assert (await desk.ask(method, path))[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/v2/other/openai/v1/files",
        "/v2/local/openai/v1/filesystem",
        "/v2/local/openai/v1/files/a/b",
        "/v2/local/openai/v1/files/a/content/b",
        "/v1/files",
    ],
)
async def test_other_routes_are_other_parts(desk: Desk, path: str) -> None:
    """The part says nothing of them."""
    assert desk.part.find(Request("GET", path)) is None


@pytest.mark.parametrize("file_id", ["..", ".", "a%2fb", "file-1.part", "\x00", "\ud800"])
async def test_an_id_never_names_a_path(desk: Desk, file_id: str) -> None:
    """Only rows have files."""
    (desk.folder / "file-1.part").write_bytes(b"secret")
    assert (await desk.ask("GET", f"/{file_id}/content"))[0] == 404
    assert (await desk.ask("DELETE", f"/{file_id}"))[0] == 404


def test_ids_are_in_the_order_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none comes twice."""
    times: Callable[[], int] = iter([1_700_000_000_000_000_000, 1_700_000_000_001_000_000]).__next__
    monkeypatch.setattr("gateway.files.store.time.time_ns", times)
    before, after = new_id("file-"), new_id("file-")
    assert before < after
    assert len(before) == len("file-") + 32
