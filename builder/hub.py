"""A model's files from Hugging Face, or from a server that speaks its protocol.

The only file that imports huggingface_hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2  # what huggingface_hub 2 lets through when a connection breaks
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from builder.console import Console, size
from builder.selection import needed
from handler.errors import ModelNotFound, NoResources

TIMEOUT_S = 10.0
REPORT_S = 15.0
LIBRARY = "firsttoken"


def download(
    model: str, revision: str | None, work: Path, *, endpoint: str, token: str | None, console: Console
) -> str:
    """Put the files of `model` that are needed into `work`; returns the commit that they are of.

    Goes on with what an earlier call left in `work`. Raises `ModelNotFound` and `NoResources`.
    """
    api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)
    try:
        info = api.model_info(model, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        assert info.sha is not None, "the hub names the commit of what it lists"
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        names = needed(sizes)
        total_bytes = sum(sizes[name] for name in names)
        _check_disk(work, total_bytes - _held(work))
        console.say(f"downloading {model}: {len(names)} files, {size(total_bytes)}")
        with _reports(work, total_bytes, console):
            snapshot_download(
                model,
                revision=info.sha,
                local_dir=work,
                allow_patterns=names,
                endpoint=endpoint,
                token=token,
                etag_timeout=TIMEOUT_S,
                library_name=LIBRARY,
                tqdm_class=None if console.terminal else _NoBar,
            )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"it is gated: accept its terms at {endpoint}/{model}, then set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        private = "the token in HF_TOKEN may not read it" if token else "it is private and needs HF_TOKEN"
        raise ModelNotFound(f"{endpoint} has no such model, or {private}") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{endpoint} has no revision {revision!r} of it") from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"{endpoint} answered {error.response.status_code}") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError) as error:
        raise ModelNotFound(f"the connection to {endpoint} failed ({type(error).__name__})") from error
    shutil.rmtree(work / ".cache", ignore_errors=True)  # by which the hub's client goes on after a failure
    return info.sha


class _NoBar(tqdm):
    """The hub's client draws one of its bars on whatever standard error is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]


def _check_disk(work: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(work).free
    if wanted_bytes > free_bytes:
        raise NoResources(
            f"{work.parent} has {size(free_bytes)} free and the model needs {size(wanted_bytes)}"
        )


@contextmanager
def _reports(work: Path, total_bytes: int, console: Console) -> Iterator[None]:
    """Say now and then how much is there, where no bar is drawn."""
    done = Event()

    def report() -> None:
        while not done.wait(REPORT_S):
            console.say(f"{size(_held(work))} of {size(total_bytes)}")

    if not console.terminal:
        Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _held(work: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())
