"""The input of a batch, read in ranges: once whole, for what can't be told line by line, then its items.

Both hold a piece and a line at a time. A line that holds nothing counts as the beginning of the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

from handler.batch_lines import (
    ENVELOPE_BYTES,
    REQUESTS_MAX,
    Item,
    Line,
    Progress,
    Splitter,
    head_of,
    is_blank,
    parse,
)

READ_BYTES = 4 << 20
"""What is read at a time."""
BREAK_BYTES = 64 * 1024
BREAK_S = 1e-4
"""So long a thread that parses stands back each time it has done so much, which takes a millisecond or so."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one look at the whole file has found. `duplicates` are numbers of lines.

    `total` is at most one more than a batch may have: then the rest was not looked at.
    """

    total: int
    duplicates: frozenset[int]
    endpoint: str


class Source:
    """The file of `size_bytes` whose bytes `fetch(start, end)` gives; `batch` is what its batch is called.

    The methods raise what `fetch` raises, and are called in threads.
    """

    def __init__(
        self, fetch: Callable[[int, int], bytes], size_bytes: int, batch: str, max_body_bytes: int
    ) -> None:
        self._fetch = fetch
        self._size_bytes = size_bytes
        self._batch = batch
        self._max_body_bytes = max_body_bytes
        self._since = 0

    def scan(self, goes_on: Callable[[], bool]) -> Plan | None:
        """Look at every line; None if `goes_on` said no before the end."""
        seen: set[bytes] = set()
        duplicates: set[int] = set()
        total, endpoint = 0, ""
        for lines in self._pieces(0, 1):
            if not goes_on():
                return None
            for line in lines:
                total += 1
                self._let_others(line)
                if total > REQUESTS_MAX:
                    return Plan(total, frozenset(duplicates), endpoint)
                custom_id, url = head_of(line)
                endpoint = endpoint or url
                if custom_id is None:
                    continue
                digest = blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
                if digest in seen:
                    duplicates.add(line.number)
                seen.add(digest)
        return Plan(total, frozenset(duplicates), endpoint)

    def items(self, progress: Progress, duplicates: Collection[int]) -> Iterator[list[Item]]:
        """The items from `progress` on, some at a time."""
        for lines in self._pieces(progress.start, progress.number):
            items = []
            for line in lines:
                again = line.number in duplicates
                items.append(parse(line, self._batch, duplicate=again, max_body_bytes=self._max_body_bytes))
                self._let_others(line)
            if items:
                yield items

    def _let_others(self, line: Line) -> None:
        """Give way now and again: a thread that parses holds up the loop, and every stream on it."""
        self._since += line.end - line.start
        if self._since >= BREAK_BYTES:
            self._since = 0
            time.sleep(BREAK_S)

    def _pieces(self, start: int, number: int) -> Iterator[Iterator[Line]]:
        """The lines that end in one piece after the other."""
        splitter = Splitter(self._max_body_bytes + ENVELOPE_BYTES, start, number)
        blank_from: int | None = None

        def requests(lines: Iterator[Line]) -> Iterator[Line]:
            nonlocal blank_from
            for line in lines:
                if is_blank(line):
                    blank_from = line.start if blank_from is None else blank_from
                else:
                    yield line if blank_from is None else replace(line, start=blank_from)
                    blank_from = None

        for at in range(start, self._size_bytes, READ_BYTES):
            yield requests(splitter.feed(self._fetch(at, min(at + READ_BYTES, self._size_bytes))))
        yield requests(splitter.close())
