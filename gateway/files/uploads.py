"""A file that comes in a form, multipart/form-data: its bytes go on as they come, its fields are kept.

https://www.rfc-editor.org/rfc/rfc7578. What a client calls its file is data here, never a path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from handler.errors import BadRequest
from handler.messages import Request

WRITE_BYTES = 1 << 20
"""How much of a file is held before it is given on."""
FIELDS_MAX = 32
FIELD_MAX_BYTES = 4096
OVERHEAD_BYTES = FIELDS_MAX * (FIELD_MAX_BYTES + 4096)
"""How much larger than its file a form may be."""


@dataclass(slots=True)
class _Part:
    name: str
    filename: str | None
    value: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class Form:
    """What came with a file: its name, and the form's other fields."""

    filename: str
    fields: Mapping[str, str]


async def read_form(request: Request, write: Callable[[bytes], Awaitable[None]]) -> Form:
    """Give the bytes of the form's `file` to `write`, some at a time, and return the rest of it.

    Raises `BadRequest` for what is no such form, and what `write` does.
    """
    assert request.pieces is not None, "the body is still to be read"
    media_type, options = parse_options_header(request.header("content-type"))
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadRequest("The content type of your request must be multipart/form-data, with a boundary.")
    reader = _Reader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())  # type: ignore[arg-type]
        async for piece in request.pieces:
            parser.write(piece)
            if len(reader.file) >= WRITE_BYTES:
                await write(reader.take())
    except FormParserError as error:
        raise BadRequest(f"We could not parse the form in the body of your request: {error}.") from None
    if not reader.complete:
        raise BadRequest("The form in the body of your request has no end.")
    if reader.filename is None:
        raise BadRequest(
            "Missing required parameter: 'file'.", param="file", code="missing_required_parameter"
        )
    if reader.file:
        await write(reader.take())
    return Form(reader.filename, reader.fields)


class _Reader:
    """What the parser tells, part by part."""

    def __init__(self) -> None:
        self.filename: str | None = None
        self.file = bytearray()
        self.fields: dict[str, str] = {}
        self.complete = False
        self._headers: dict[str, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        self._part: _Part | None = None
        self._parts = 0

    def callbacks(self) -> dict[str, Callable[..., None]]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        return {
            **{f"on_{name}": getattr(self, name) for name in names},
            "on_headers_finished": self.headers_finished,
            "on_end": self.end,
        }

    def take(self) -> bytes:
        """What has come of the file since the last time."""
        taken, self.file = bytes(self.file), bytearray()
        return taken

    def part_begin(self) -> None:
        self._headers = {}
        self._parts += 1
        if self._parts > FIELDS_MAX:
            raise FormParserError(f"it has more than {FIELDS_MAX} fields")

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        if b"name" not in options:
            raise FormParserError("a part has no name")
        filename = options.get(b"filename")
        self._part = _Part(_text(options[b"name"]), None if filename is None else _text(filename))
        if self._part.name == "file":
            if self.filename is not None:
                raise FormParserError("it has more than one file")
            self.filename = self._part.filename or "upload"

    def part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        assert part is not None, "a part has headers first"
        if part.name == "file":
            self.file += data[start:end]
            return
        part.value += data[start:end]
        if len(part.value) > FIELD_MAX_BYTES:
            raise FormParserError(f"a field has more than {FIELD_MAX_BYTES} bytes")

    def part_end(self) -> None:
        assert self._part is not None, "a part has headers first"
        if self._part.name != "file":
            self.fields[self._part.name] = _text(bytes(self._part.value))

    def end(self) -> None:
        self.complete = True


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").replace("\0", "\ufffd")  # PostgreSQL's texts have no zero
