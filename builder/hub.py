"""A model's files from Hugging Face, or from a server that speaks its protocol.

The only file that imports huggingface_hub. Its own downloads begin a file anew after a kill, and
check nothing but its size, so that only requests and their errors are its.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from httpx2 import URL, HTTPError  # what huggingface_hub 2 lets through when a connection breaks
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined] # documented, and not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from builder import disk
from builder.console import Console, size
from builder.credentials import without_password
from builder.digest import Digest, git_blob
from builder.pieces import Broken, Wanted, download, missing_bytes
from builder.selection import Choice, needed, remarks
from handler.errors import ModelNotFound

TIMEOUT_S = 10.0
LIBRARY = "firsttoken"
BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses after which the hub's client waits, as long as it is told to, and asks again."""
EXPIRED = (401, 403, 410)
"""What a signed address answers when its time is over."""


def fetch(
    model: str,
    revision: str | None,
    work: Path,
    *,
    endpoint: str,
    token: str | None,
    choice: Choice,
    console: Console,
) -> str:
    """Put the files of `model` that are needed into `work`; returns the commit that they are of.

    Goes on with what an earlier call left in `work`. Raises `ModelNotFound`, `Damaged`, `NoResources`,
    and `UsageError` where `choice` names what is not there.
    """
    with _refusals(model, revision, without_password(endpoint), known=token is not None):
        api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)
        info = api.model_info(model, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        assert info.sha is not None, "the hub names the commit of what it lists"
        listed = {file.rfilename: file for file in info.siblings or ()}
        names = needed(listed, choice)
        headers = build_hf_headers(token=token, library_name=LIBRARY)
        files = [
            _wanted(listed[name], hf_hub_url(model, name, revision=info.sha, endpoint=endpoint), headers)
            for name in names
        ]
        disk.need(work, missing_bytes(files, work))
        total_bytes = sum(file.size_bytes for file in files)
        console.say(f"downloading {model}: {len(files)} files, {size(total_bytes)}")
        for remark in remarks(listed, names):
            console.say(remark)
        download(files, work, console)
    return info.sha


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository that is looked at and not downloaded: its commit, and its files with their sizes."""

    commit: str
    files: Mapping[str, int]
    get: Callable[[str, int, int], bytes]
    """The bytes of a file from one position to before another. Raises `ModelNotFound`."""


def look(model: str, revision: str | None, *, endpoint: str, token: str | None) -> Repository:
    """What `model` consists of. Raises `ModelNotFound`."""
    shown, known = without_password(endpoint), token is not None
    with _refusals(model, revision, shown, known=known):
        api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)
        info = api.model_info(model, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    commit = info.sha
    assert commit is not None, "the hub names the commit of what it lists"
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    headers = build_hf_headers(token=token, library_name=LIBRARY)

    def get(file: str, begin: int, end: int) -> bytes:
        url = hf_hub_url(model, file, revision=commit, endpoint=endpoint)
        with _refusals(model, revision, shown, known=known):
            return b"".join(_Remote(url, headers, files[file]).read(begin, end))

    return Repository(commit, files, get)


def _wanted(file: RepoSibling, url: str, headers: Mapping[str, str]) -> Wanted:
    if file.size is None:
        raise ModelNotFound(f"the hub does not say how large {file.rfilename} is")
    digest = None
    if file.lfs is not None:
        digest = Digest("sha256", file.lfs.sha256)
    elif file.blob_id:
        digest = git_blob(file.size, file.blob_id)
    version = url if digest is None else digest.value
    return Wanted(file.rfilename, file.size, version, _Remote(url, headers, file.size).read, digest)


class _Remote:
    """A file at the hub, and the address that the hub sends those to who want it."""

    def __init__(self, url: str, headers: Mapping[str, str], size_bytes: int) -> None:
        self.url = url
        self.headers = {**headers, "accept-encoding": "identity"}
        self.size_bytes = size_bytes
        # Signed for an hour or so. With it the hub, which counts requests, is asked once for each file.
        self.address: str | None = None

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`; raises `Broken`, and `HfHubHTTPError` where the hub refuses."""
        address, headers = self.address, dict(self.headers)
        if address is not None and URL(address).host != URL(self.url).host:
            headers.pop("authorization", None)
        part = (start, stop) != (0, self.size_bytes)
        if part:
            headers["range"] = f"bytes={start}-{stop - 1}"
        try:
            with http_stream_backoff(
                "GET",
                address or self.url,
                headers=headers,
                timeout=TIMEOUT_S,
                retry_on_exceptions=(),
                retry_on_status_codes=BUSY,
            ) as response:
                if address is not None and response.status_code in EXPIRED:
                    self.address = None
                    raise Broken("an address has expired")
                hf_raise_for_status(response)
                if part and response.status_code != HTTPStatus.PARTIAL_CONTENT:
                    raise ModelNotFound("its server does not send parts of files")
                self.address = str(response.url)
                yield from response.iter_bytes()
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            raise Broken(type(error).__name__) from error


@contextmanager
def _refusals(model: str, revision: str | None, endpoint: str, *, known: bool) -> Iterator[None]:
    """Say what the hub and its client mean; `known` is whether a token was sent."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(
            f"it is gated: accept its terms at {endpoint}/{model}, then set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        private = "the token in HF_TOKEN may not read it" if known else "it is private and needs HF_TOKEN"
        raise ModelNotFound(f"{endpoint} has no such model, or {private}") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{endpoint} has no revision {revision!r} of it") from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"{endpoint} answered {error.response.status_code}") from error
    except HTTPError as error:
        raise ModelNotFound(f"the connection to {endpoint} failed ({type(error).__name__})") from error
    except Broken as error:
        raise ModelNotFound(f"the connection to {endpoint} broke again and again ({error})") from error
