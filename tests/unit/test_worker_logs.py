"""What workers have written, read out of their files."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

from gateway.control import Control
from gateway.endpoints.endpoints import Endpoints
from gateway.upstreams import WorkerView
from gateway.worker_logs import Reader, Source, follow, last, sources
from handler.errors import BadRequest
from handler.messages import Request, read


def view(name: str, log: Path | None, started_at: float = 0.0) -> WorkerView:
    """A worker that writes to `log`."""
    return WorkerView(name, "ready", None, 1, (), started_at, None, 0, 1, None, log=log)


def test_logs_come_in_the_order_of_the_workers_starts(tmp_path: Path) -> None:
    """Of all endpoints; one worker may be asked for by its id."""
    a, b, c = (tmp_path / name for name in "abc")
    workers = [("chat", [view("w1", a, 3.0), view("w2", b, 1.0)]), ("code", [view("w3", c, 2.0)])]
    assert sources(workers, None) == [
        Source("chat", "w2", b),
        Source("code", "w3", c),
        Source("chat", "w1", a),
    ]
    assert sources(workers, "w3") == [Source("code", "w3", c)]
    assert sources([("chat", [view("w4", None)])], None) == []


def test_the_last_lines_may_be_in_the_file_before(tmp_path: Path) -> None:
    """A log that was turned over is read with its predecessor."""
    log = tmp_path / "w.log"
    log.with_name("w.log.1").write_text("1\n2\n")
    log.write_text("3\n4\nbegun")
    assert last([Source("chat", "w", log)], 3) == ["chat w 2", "chat w 3", "chat w 4"]
    assert last([Source("chat", "w", log)], 0) == []
    assert last([Source("chat", "w", tmp_path / "gone")], 3) == []


def test_a_reader_goes_on_in_the_file_that_takes_the_place(tmp_path: Path) -> None:
    """Nothing is lost between the two, and a line is told when it is whole."""
    log = tmp_path / "w.log"
    log.write_text("1\n2")
    reader = Reader(log)
    assert reader.more() == ["1"]
    with log.open("a") as file:
        file.write("0\n30\n")
    log.replace(log.with_name("w.log.1"))
    log.write_text("40\n")
    assert reader.more() == ["20", "30", "40"]
    assert reader.more() == []
    log.unlink()
    with pytest.raises(FileNotFoundError):
        reader.more()
    reader.close()


async def test_following_hears_of_workers_that_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest lines of those that are there, then all that is written."""
    first, second = tmp_path / "1.log", tmp_path / "2.log"
    first.write_text("a\nb\n")
    there = [Source("chat", "w1", first)]
    async with aclosing(follow(lambda: there, 1, look_s=0)) as looks:
        assert await anext(looks) == ["chat w1 b"]
        assert await anext(looks) == []
        second.write_text("c\n")
        there.append(Source("chat", "w2", second))
        assert await anext(looks) == ["chat w2 c"]
        first.unlink()
        assert await anext(looks) == []
        del there[0]
        assert await anext(looks) == []


async def ask(query: str) -> bytes:
    """What `/admin/logs` answers of a gateway without endpoints."""
    endpoints = Endpoints([], lambda _: pytest.fail("there is none"), lambda: pytest.fail("nobody reloads"))
    request = Request("GET", "/admin/logs", query=query)
    call = Control(endpoints).find(request)
    assert call is not None
    async with call(request) as reply:
        return await read(reply)


@pytest.mark.parametrize("lines", ["10001", "-1", "1.5", "many", "٣", "9" * 5000])
async def test_how_many_lines_is_a_number(lines: str) -> None:
    """Within a bound; what is left out or empty is the default."""
    assert await ask("endpoint=&worker=&lines=") == b""
    with pytest.raises(BadRequest):
        await ask(f"lines={lines}")
