"""The objects of one batch: its input, the parts that are done, what is made of them at the end.

    in/a.jsonl                                 read in ranges, of one version
    out/a/batch.json                           how far it is: the shape of `openai.types.Batch`
    out/a/parts/3c1f.../000000000000.jsonl     outcomes of the lines from this byte on, of this version
    out/a/output.jsonl, out/a/error.jsonl      all parts, once the batch is over
    out/a/cancel                               somebody wants it to end

A part holds its good lines and then its bad ones; its metadata says how many bytes the good ones take and how
far the batch is with it, which is where the next part begins. It is written if there is none (If-None-Match),
so that of two workers on the same lines one counts, and the parts are a chain without gap or overlap, whoever
wrote them. The other objects are written only over what was seen of them (If-Match): batch.json first when
a worker takes the batch over, so that whoever had it can write nothing any more.

The methods wait for S3 and are called in threads. They raise `AwsFailed`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any

from handler.batch_lines import Progress
from handler.batch_window import Part
from handler.errors import AwsFailed, UpstreamFailed
from handler.platforms.aws_clients import TRIES, Clients
from handler.platforms.batch_upload import CHANGED, JSONL, Seen, Upload

AHEAD = 2
"""How many parts are read before they are needed."""

NOT_FOUND = 404

_OUTPUT_BYTES = "output-bytes"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch is: its input, and the folder of all that is made of it."""

    id: str
    bucket: str
    key: str
    out_bucket: str
    folder: str

    @property
    def name(self) -> str:
        """What it is called where there are others."""
        return f"{self.bucket}/{self.key}"

    def uri(self, name: str) -> str:
        """The file called `name` of its folder."""
        return f"s3://{self.out_bucket}/{self.folder}{name}"


@dataclass(frozen=True, slots=True)
class Input:
    """The input as it is now. `version` is its version where the bucket keeps them, else its ETag."""

    size_bytes: int
    etag: str
    version: str
    modified: datetime
    metadata: Mapping[str, str]
    pin: Mapping[str, str] = field(repr=False)
    """Arguments of a read of this very version, which fails once it has been replaced."""

    def is_named(self, version: str) -> bool:
        """Whether an event that says `version` means this; one that says none does."""
        return version in {"", "null", self.version, self.etag.strip('"')}


class BatchStore:
    """The objects of the batch at `place`."""

    def __init__(self, place: Place, clients: Clients) -> None:
        self.place = place
        self._clients = clients
        self._out = {"Bucket": place.out_bucket}

    # --- the input -----------------------------------------------------------------------------

    def head(self) -> Input | None:
        """The input; None if it is not there."""
        answer = self._found("head_object", Bucket=self.place.bucket, Key=self.place.key)
        if answer is None:
            return None
        version, etag = answer.get("VersionId", "null"), answer["ETag"]
        versioned = version != "null"  # S3's word for an object without one
        return Input(
            answer["ContentLength"],
            etag,
            version if versioned else etag.strip('"'),
            answer["LastModified"],
            answer.get("Metadata", {}),
            {"IfMatch": etag, **({"VersionId": version} if versioned else {})},
        )

    def read(self, given: Input, start: int, end: int) -> bytes:
        """The bytes of `given` from `start` to before `end`. Fails if it was replaced or deleted since."""
        return self._get(
            Bucket=self.place.bucket,
            Key=self.place.key,
            Range=f"bytes={start}-{end - 1}",
            **given.pin,
        )[0]

    # --- batch.json ----------------------------------------------------------------------------

    def load(self) -> tuple[dict[str, Any], Seen]:
        """batch.json, empty if it is not there, and the ETag that was seen, for `save`."""
        try:
            raw, answer = self._get(**self._out, Key=self._key("batch.json"))
        except AwsFailed as error:
            if error.http_status != NOT_FOUND:
                raise
            return {}, Seen(None)
        try:
            said = json.loads(raw)
        except ValueError:
            said = {}
        return said if isinstance(said, dict) else {}, Seen(answer["ETag"])

    def save(self, batch: Mapping[str, Any], seen: Seen) -> Seen | None:
        """Write batch.json if it is still as it was `seen`; None if it is not, and nothing was written."""
        raw = json.dumps(batch, indent=2).encode() + b"\n"
        key = self._key("batch.json")
        try:
            answer = self._put(key, raw, ContentType="application/json", **seen.unchanged)
        except AwsFailed as error:
            if error.http_status not in CHANGED:
                raise
            # Or the answer to a first try was lost: then it was written.
            said, now = self.load()
            return now if said == batch else None
        return Seen(answer["ETag"])

    def is_cancelled(self, since: datetime) -> bool:
        """Whether somebody has, `since` then, said that the batch is to end."""
        answer = self._found("head_object", **self._out, Key=self._key("cancel"))
        return answer is not None and answer["LastModified"] >= since

    # --- parts ---------------------------------------------------------------------------------

    def parts(self, version: str) -> list[int]:
        """Where the parts that are there begin, in order."""
        folder, starts = self._parts(version), list[int]()
        asked: dict[str, str] = {"Prefix": folder}
        while asked:
            page = self._clients.call("s3", "list_objects_v2", **self._out, **asked)
            names = (found["Key"].removeprefix(folder) for found in page.get("Contents", ()))
            starts += [int(number) for name in names if (number := name.removesuffix(".jsonl")).isdecimal()]
            more = page.get("NextContinuationToken")
            asked = {"Prefix": folder, "ContinuationToken": more} if more else {}
        return sorted(starts)

    def progress(self, version: str, start: int) -> Progress:
        """How far the batch is with the part that begins at `start`."""
        answer = self._clients.call("s3", "head_object", **self._out, Key=self._part(version, start))
        return Progress.load(answer["Metadata"])

    def put_part(self, version: str, part: Part) -> bool:
        """Write a part; False, and nothing is written, if there is one from its start on."""
        output = b"".join(part.outputs)
        metadata = {_OUTPUT_BYTES: str(len(output)), **part.progress.dump()}
        try:
            self._put(
                self._part(version, part.start),
                output + b"".join(part.errors),
                Metadata=metadata,
                IfNoneMatch="*",
                **JSONL,
            )
        except AwsFailed as error:
            if error.http_status not in CHANGED:
                raise
            return False
        return True

    # --- the end -------------------------------------------------------------------------------

    def results(self) -> tuple[Seen, Seen]:
        """output.jsonl and error.jsonl as they are now, for `merge`."""
        return self._seen("output.jsonl"), self._seen("error.jsonl")

    def merge(self, version: str, seen: tuple[Seen, Seen], goes_on: Callable[[], bool]) -> bool:
        """Write output.jsonl and error.jsonl from the parts.

        False, and they are not written, if `goes_on` said no or one of them is not as it was `seen`.
        """
        output, errors = (
            Upload(self._clients, self.place.out_bucket, self._key(name), was)
            for name, was in zip(("output.jsonl", "error.jsonl"), seen, strict=True)
        )
        try:
            for good, bad in self._chain(version, self.parts(version)):
                if not goes_on():
                    return False
                output.write(good)
                errors.write(bad)
            return output.finish() and errors.finish()
        finally:
            output.abort()
            errors.abort()

    def _chain(self, version: str, starts: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """Each part's good lines and its bad ones. Raises `UpstreamFailed` where one is missing."""
        next_start = 0
        with ThreadPoolExecutor(AHEAD) as pool:
            coming: deque[Future[tuple[bytes, Any]]] = deque()
            todo = deque(starts)
            for start in starts:
                while todo and len(coming) < AHEAD:
                    key = self._part(version, todo.popleft())
                    coming.append(pool.submit(self._get, **self._out, Key=key))
                raw, answer = coming.popleft().result()
                if start != next_start:
                    raise UpstreamFailed(
                        f"the part that begins at {next_start} is missing, another is at {start}"
                    )
                next_start = Progress.load(answer["Metadata"]).start
                output_bytes = int(answer["Metadata"][_OUTPUT_BYTES])
                yield raw[:output_bytes], raw[output_bytes:]

    # --- requests ------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return self.place.folder + name

    def _parts(self, version: str) -> str:
        return self._key(f"parts/{sha256(version.encode()).hexdigest()[:12]}/")

    def _part(self, version: str, start: int) -> str:
        return f"{self._parts(version)}{start:012d}.jsonl"

    def _put(self, key: str, body: bytes, **parameters: Any) -> Any:
        return self._clients.call("s3", "put_object", **self._out, Key=key, Body=body, **parameters)

    def _seen(self, name: str) -> Seen:
        answer = self._found("head_object", **self._out, Key=self._key(name))
        return Seen(None if answer is None else answer["ETag"])

    def _found(self, operation: str, **parameters: Any) -> Any:
        """What S3 answers; None if there is no such object."""
        try:
            return self._clients.call("s3", operation, **parameters)
        except AwsFailed as error:
            if error.http_status == NOT_FOUND:
                return None
            raise

    def _get(self, **parameters: Any) -> tuple[bytes, Any]:
        """An object's bytes. boto3 tries a request again, and not the reading of its answer."""
        for tried in range(1, TRIES + 1):
            try:
                answer = self._clients.call("s3", "get_object", **parameters)
            except AwsFailed as error:
                if error.http_status is not None or tried == TRIES:
                    raise
            else:
                return answer["Body"], answer
        raise AssertionError("the last try returns or raises")
