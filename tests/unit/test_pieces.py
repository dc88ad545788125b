"""Files in pieces: what is asked for, what is asked for again, and what is never written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from builder import pieces
from builder.console import Console
from builder.digest import Digest
from builder.pieces import Broken, Wanted, download
from handler.errors import Damaged

PIECE_BYTES = 4
BODY = b"0123456789"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that broke is tried again at once."""
    monkeypatch.setattr(pieces, "FIRST_WAIT_S", 0.0)


class Source:
    """A source that notes what it is asked, and gives what it is told to."""

    def __init__(self, body: bytes = BODY) -> None:
        self.body = body
        self.asked: list[tuple[int, int]] = []
        self.breaks: dict[int, int] = {}
        """Of an offset, how often the connection breaks there."""
        self.wrong = 0
        """How many more times the first byte is another one."""

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes, one by one."""
        self.asked.append((start, stop))
        for offset in range(start, stop):
            if self.breaks.get(offset):
                self.breaks[offset] -= 1
                raise Broken("a test")
            wrong = offset == 0 and self.wrong > 0
            self.wrong -= wrong
            yield b"?" if wrong else self.body[offset : offset + 1]


def wanted(source: Source, name: str = "file", *, version: str = "1", known: bool = True) -> Wanted:
    """The file of a source, with its digest if that is `known`."""
    digest = Digest("sha256", sha256(BODY).hexdigest()) if known else None
    return Wanted(name, len(source.body), version, source.read, digest)


def take(folder: Path, *files: Wanted) -> str:
    """Download them; returns what was said."""
    stream = io.StringIO()
    download(files, folder, Console(stream), piece_bytes=PIECE_BYTES)
    return stream.getvalue()


def left(folder: Path, file: Wanted, *numbers: int, data: bytes = BODY) -> Path:
    """What a download leaves that is killed when these pieces are there; returns the file of notes."""
    part = pieces._Part(file, folder, PIECE_BYTES)
    part.begin()
    with part.data.open("r+b") as writer:
        for number in numbers:
            start, stop = part.span(number)
            writer.seek(start)
            writer.write(data[start:stop])
            part.note(number)
    return part.done


def test_file_is_put_together(tmp_path: Path) -> None:
    """Each piece is asked for once; an empty file needs none; nothing else stays in the folder."""
    (tmp_path / "stale").write_text("of something else")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/stale").touch()
    source, empty = Source(), Source(b"")
    empty_file = Wanted("a/b/empty", 0, "1", empty.read, None)
    assert take(tmp_path, wanted(source), empty_file) == ""
    assert sorted(source.asked) == [(0, 4), (4, 8), (8, 10)]
    assert empty.asked == []
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "file",
        "a",
        "a/b",
        "a/b/empty",
    }
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("known", [True, False])
def test_download_goes_on_with_the_pieces_that_are_there(tmp_path: Path, *, known: bool) -> None:
    """The others are asked for, whether or not it is known what the file must be."""
    source = Source()
    left(tmp_path, wanted(source, known=known), 0, 2)
    take(tmp_path, wanted(source, known=known))
    assert source.asked == [(4, 8)]
    assert (tmp_path / "file").read_bytes() == BODY


def test_note_that_was_cut_short_is_not_believed(tmp_path: Path) -> None:
    """Half a number would name another piece."""
    source = Source()
    with left(tmp_path, wanted(source), 0, 1).open("a") as notes:
        notes.write("2")
    take(tmp_path, wanted(source))
    assert source.asked == [(8, 10)]


@pytest.mark.parametrize("change", ["another version", "no data", "odd notes"])
def test_pieces_of_something_else_are_not_gone_on_with(tmp_path: Path, change: str) -> None:
    """All of the file is asked for."""
    source = Source()
    notes = left(tmp_path, wanted(source), 0, 1)
    if change == "no data":
        (tmp_path / ".pieces/data/file").unlink()
    elif change == "odd notes":
        notes.write_bytes(b"\xff\n0\n1\n")
    take(tmp_path, wanted(source, version="2" if change == "another version" else "1"))
    assert sorted(source.asked) == [(0, 4), (4, 8), (8, 10)]
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("known", [True, False])
def test_whole_file_is_not_asked_for_again(tmp_path: Path, *, known: bool) -> None:
    """One that an earlier download has put in its place, or had no time to."""
    source = Source()
    part = pieces._Part(wanted(source, known=known), tmp_path, PIECE_BYTES)
    left(tmp_path, wanted(source, known=known), 0, 1, 2)
    part.end()
    left(tmp_path, wanted(source, "other", known=known), 0, 1, 2)
    take(tmp_path, wanted(source, known=known), wanted(source, "other", known=known))
    assert source.asked == []
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes() == BODY


def test_file_in_its_place_is_checked(tmp_path: Path) -> None:
    """It has the size, and other bytes."""
    (tmp_path / "file").write_bytes(b"9876543210")
    take(tmp_path, wanted(Source()))
    assert (tmp_path / "file").read_bytes() == BODY


def test_broken_connection_goes_on_where_it_ended(tmp_path: Path) -> None:
    """As often as it takes, as long as something new comes each time."""
    source = Source()
    source.breaks = dict.fromkeys((0, 1, 2, 3), pieces.TRIES - 1)
    take(tmp_path, wanted(source))
    first = [(start, stop) for start, stop in source.asked if stop == 4]
    assert first == [(0, 4), *((offset, 4) for offset in (0, 1, 2, 3) for _ in range(pieces.TRIES - 1))]
    assert (tmp_path / "file").read_bytes() == BODY


def test_connection_that_only_breaks_is_given_up(tmp_path: Path) -> None:
    """So that nobody waits for ever."""
    source = Source(BODY[:4])
    source.breaks = {2: 1000}
    with pytest.raises(Broken):
        take(tmp_path, wanted(source))
    assert source.asked == [(0, 4)] + [(2, 4)] * (pieces.TRIES - 1)


def test_source_that_sends_too_little_is_broken(tmp_path: Path) -> None:
    """And one that sends too much does not write over the next piece."""
    short = Wanted("file", 4, "1", lambda start, stop: iter([b"ab"] if start == 0 else []), None)
    with pytest.raises(Broken, match="it ended early"):
        take(tmp_path, short)
    long = Wanted("file", 10, "1", lambda start, stop: iter([BODY[start:]]), None)
    take(tmp_path, long)
    assert (tmp_path / "file").read_bytes() == BODY


def test_wrong_file_is_downloaded_once_more(tmp_path: Path) -> None:
    """Whole, and it is said; what was right is left alone."""
    source, right = Source(), Source()
    source.wrong = 1
    said = take(tmp_path, wanted(source), wanted(right, "right"))
    expected, found = (sha256(body).hexdigest() for body in (BODY, b"?123456789"))
    assert said == f"fetch: file: sha256: expected {expected}, found {found}; downloading it again\n"
    assert sorted(source.asked) == sorted([(0, 4), (4, 8), (8, 10)] * 2)
    assert sorted(right.asked) == [(0, 4), (4, 8), (8, 10)]
    assert (tmp_path / "file").read_bytes() == BODY


def test_file_that_stays_wrong_is_an_error(tmp_path: Path) -> None:
    """With all that is known of it, and it is not there."""
    source = Source()
    source.wrong = 2
    expected, found = (sha256(body).hexdigest() for body in (BODY, b"?123456789"))
    with pytest.raises(Damaged) as caught:
        take(tmp_path, wanted(source))
    assert str(caught.value) == (
        f"what arrived is not what was sent: file: sha256: expected {expected}, found {found}"
    )
    assert not (tmp_path / "file").exists()


def test_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    """`a/b` and `a%2Fb` are two files."""
    one, other = Source(b"one"), Source(b"other")
    take(
        tmp_path,
        Wanted("a/b", 3, "1", one.read, None),
        Wanted("a%2Fb", 5, "1", other.read, None),
    )
    assert (tmp_path / "a/b").read_bytes() == b"one"
    assert (tmp_path / "a%2Fb").read_bytes() == b"other"


def test_a_name_may_be_long(tmp_path: Path) -> None:
    """A compiler names its files by what is in them, some folders deep."""
    name = "/".join(["cache", *["f" * 64] * 8])
    take(tmp_path, wanted(Source(), name))
    assert (tmp_path / name).read_bytes() == BODY
