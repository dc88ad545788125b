"""`handler.batch_window`: many lines at a time, their outcomes in the order of the file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from handler.batch_lines import Item, Line, Outcome, Progress
from handler.batch_window import Pace, Part, Window
from handler.errors import BadRequest, EngineDead, UpstreamFailed
from handler.messages import Request

GONE = BadRequest("no", code="batch_cancelled")


def item(number: int, *, size_bytes: int = 0, fault: BadRequest | None = None) -> Item:
    """The line called by its number, ten bytes long."""
    request = None if fault else Request("POST", "/v1/x", (), b"x" * size_bytes)
    line = Line(number, number * 10, number * 10 + 10, None)
    return Item(line, f"key{number}", str(number), request, fault)


@dataclass
class Batch:
    """A file of `items`, three read at a time; lines are asked until the test answers them."""

    items: Sequence[Item]
    pace: Pace = field(default_factory=lambda: Pace(4, part_lines=1000))
    progress: Progress = field(default_factory=Progress)
    asked: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    blocks_writes: bool = False

    def __post_init__(self) -> None:
        self._left = list(self.items)
        self._answers: dict[int, asyncio.Future[Outcome]] = {}
        self.began_to_write = asyncio.Event()
        self.write_may_end = asyncio.Event()
        self.window = Window(self.progress, self._read, self._ask, self._write, self.pace)

    async def _read(self) -> Sequence[Item]:
        await asyncio.sleep(0)
        items, self._left = self._left[:3], self._left[3:]
        return items

    async def _ask(self, one: Item) -> Outcome:
        number = one.line.number
        self.asked.append(number)
        try:
            return await self._answers.setdefault(number, asyncio.get_running_loop().create_future())
        finally:
            self.ended.append(number)

    async def _write(self, part: Part) -> None:
        self.parts.append(part)
        self.began_to_write.set()
        if self.blocks_writes:
            await self.write_may_end.wait()

    def answer(self, *numbers: int, good: bool = True, size_bytes: int = 4) -> None:
        """Have lines answered."""
        for number in numbers:
            self._answers[number].set_result(Outcome(good, b"o" * (size_bytes - 1) + b"\n"))

    def break_down(self, number: int, error: Exception) -> None:
        """Have a line fail."""
        self._answers[number].set_exception(error)

    @property
    def written(self) -> list[tuple[int, int, int, int]]:
        """Of each part where it begins, how far it goes, and its good and bad lines."""
        return [(part.start, part.progress.start, len(part.outputs), len(part.errors)) for part in self.parts]


async def settle() -> None:
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_lines_end_in_any_order_and_count_in_the_files() -> None:
    """At most as many are asked as may be; all is one part, good and bad apart."""
    batch = Batch([item(0), item(1), item(2, fault=GONE), *[item(n) for n in range(3, 8)]])
    running = asyncio.create_task(batch.window.run())
    await settle()
    assert batch.asked == [0, 1, 3, 4]
    batch.answer(4, 1)
    await settle()
    assert batch.asked == [0, 1, 3, 4, 5, 6]
    batch.answer(6, 3, good=False)
    batch.answer(0, 5)
    await settle()
    batch.answer(7)
    assert await running is True
    assert batch.written == [(0, 80, 5, 3)]
    assert batch.parts[0].progress == Progress(80, 8, 5, 3)


async def test_a_part_is_written_once_it_is_full_and_the_next_after_it() -> None:
    """What ends while one is written is in the next, from where the first ends."""
    batch = Batch([item(n) for n in range(7)], Pace(7, part_lines=2), blocks_writes=True)
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0, 1)
    await settle()
    assert batch.written == [(0, 20, 2, 0)]
    batch.answer(2, 3, 4)
    await settle()
    assert len(batch.parts) == 1
    batch.write_may_end.set()
    await settle()
    assert batch.written[1:] == [(20, 50, 3, 0)]
    batch.answer(5, 6)
    assert await running is True
    assert batch.written[2:] == [(50, 70, 2, 0)]
    assert batch.window.written == 3


async def test_a_part_is_written_once_it_is_large_and_no_larger() -> None:
    """However many lines that are."""
    batch = Batch([item(n) for n in range(4)], Pace(4, part_bytes=100))
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0, 1, 2, 3, size_bytes=60)
    assert await running is True
    assert batch.written == [(0, 20, 2, 0), (20, 40, 2, 0)]


async def test_a_part_is_written_once_it_is_old() -> None:
    """Though more lines are asked."""
    batch = Batch([item(0), item(1)], Pace(2, part_s=0.01))
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0)
    await batch.began_to_write.wait()
    assert batch.written == [(0, 10, 1, 0)]
    batch.answer(1)
    assert await running is True


async def test_what_is_held_is_bounded_by_bytes_and_not_by_lines() -> None:
    """Lines go on behind one that takes long, until what waits for it is too much. One always may."""
    pace = Pace(2, held_bytes=10_000, part_lines=1000)
    batch = Batch([item(0, size_bytes=20_000), *[item(n) for n in range(1, 30)]], pace)
    running = asyncio.create_task(batch.window.run())
    await settle()
    assert batch.asked == [0]
    batch.answer(0)
    await settle()
    assert batch.asked == [0, 1, 2]
    for number in range(2, 9):
        batch.answer(number, size_bytes=200)
        await settle()
    assert batch.asked == list(range(9))  # 1,024 + 7 * (1,024 + 200) bytes: the next would be too much
    batch.answer(1)
    await settle()
    assert batch.asked == list(range(11))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_lines_that_are_large_are_not_read_ahead() -> None:
    """Those of one reading may be more than there is room for, those of the next are not read."""
    pace = Pace(100, held_bytes=1000, ahead_bytes=1000)
    batch = Batch([item(n, size_bytes=1000) for n in range(30)], pace)
    running = asyncio.create_task(batch.window.run())
    await settle()
    assert (batch.asked, len(batch._left)) == ([0], 27)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_file_of_bad_lines_needs_nobody_to_answer() -> None:
    """And goes on without a pause."""
    batch = Batch([item(n, fault=GONE) for n in range(10)], Pace(2, part_lines=1000, part_s=3600))
    async with asyncio.timeout(60):
        assert await batch.window.run() is True
    assert batch.written == [(0, 100, 0, 10)]


async def test_nothing_is_written_of_an_empty_rest() -> None:
    """It is over at once."""
    batch = Batch([], progress=Progress(50, 6))
    assert await batch.window.run() is True
    assert batch.parts == []


async def test_a_stop_waits_for_what_runs_and_begins_nothing() -> None:
    """What had ended is written at once, what ends by then too."""
    batch = Batch([item(n) for n in range(8)])
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0)
    await settle()
    assert batch.asked == [0, 1, 2, 3, 4]
    batch.window.stop(3600)
    await settle()
    assert batch.written == [(0, 10, 1, 0)]
    batch.answer(1, 2, 3, 4)
    assert await running is False
    assert batch.written[1:] == [(10, 50, 4, 0)]
    assert batch.asked == [0, 1, 2, 3, 4]


async def test_what_still_runs_after_a_stops_grace_is_ended() -> None:
    """What has ended behind it is asked again by the next shift."""
    batch = Batch([item(n) for n in range(4)])
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0, 2)
    await settle()
    batch.window.stop(0)
    assert await running is False
    assert batch.written == [(0, 10, 1, 0)]
    assert sorted(batch.ended) == [0, 1, 2, 3]


async def test_a_line_that_held_up_a_whole_shift_is_told_so() -> None:
    """Or it would hold up every other; what waited for it is written."""
    batch = Batch([item(n) for n in range(4)])
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(1, 2)
    await settle()
    batch.window.stop(0, head_is_late=True)
    assert await running is False
    assert batch.written == [(0, 30, 2, 1)]
    assert b'"code": "request_timeout"' in batch.parts[0].errors[0]


async def test_a_line_is_not_late_if_others_were_written() -> None:
    """It may have begun a moment ago."""
    batch = Batch([item(n) for n in range(2)], Pace(2, part_lines=1))
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(0)
    await settle()
    batch.window.stop(0, head_is_late=True)
    assert await running is False
    assert batch.written == [(0, 10, 1, 0)]


async def test_a_refusal_is_told_to_all_that_is_left() -> None:
    """What runs is ended; what had been answered keeps its answer."""
    batch = Batch([item(n) for n in range(20)])
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.answer(1)
    await settle()
    batch.window.refuse(GONE)
    assert await running is True
    assert batch.written == [(0, 200, 1, 19)]
    assert batch.asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [EngineDead(), UpstreamFailed("no")])
async def test_what_is_no_fault_of_a_line_ends_the_work(error: Exception) -> None:
    """Wherever in the file it is; nothing goes on behind."""
    batch = Batch([item(n) for n in range(8)])
    running = asyncio.create_task(batch.window.run())
    await settle()
    batch.break_down(2, error)
    with pytest.raises(type(error)):
        await running
    assert sorted(batch.ended) == [0, 1, 2, 3]


async def test_what_can_not_be_written_ends_the_work() -> None:
    """Nothing is lost by that: it is asked again."""
    batch = Batch([item(0, fault=GONE)])

    async def refuse(_: Part) -> None:
        raise UpstreamFailed("no")

    batch.window._write = refuse
    with pytest.raises(UpstreamFailed):
        await batch.window.run()


async def test_what_can_not_be_read_ends_the_work() -> None:
    """As above."""
    batch = Batch([])

    async def refuse() -> Sequence[Item]:
        raise UpstreamFailed("no")

    batch.window._read = refuse
    with pytest.raises(UpstreamFailed):
        await batch.window.run()


async def test_a_part_begins_where_the_last_shift_ended() -> None:
    """And counts on."""
    progress = Progress(20, 2, 1, 1)
    batch = Batch([item(2, fault=GONE)], progress=progress)
    assert await batch.window.run() is True
    assert batch.written == [(20, 30, 0, 1)]
    assert batch.parts[0].progress == replace(progress, start=30, number=3, failed=2)
