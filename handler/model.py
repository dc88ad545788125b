"""Where a model is, and whether it can be had, found out before the slow imports."""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from handler.errors import BadSettings, ModelNotFound
from handler.fetched import find
from handler.manifest import CONFIGS
from handler.settings import Settings
from handler.table import in_store, is_path

HUB_TIMEOUT_S = 3.0
RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod keeps an endpoint's cached model; https://docs.runpod.io/serverless/endpoints/model-caching"""


def fetched(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """`settings` with the folder that was fetched, where the hub can't be reached and its cache has no copy.

    So that what `make serve` has fetched is there for whoever starts a worker without it. The model's name
    stays the same. The hub is looked for only if there is such a folder.
    """
    name = settings.model_name
    if is_path(name) or in_store(name) or settings.model_revision:
        return settings
    folder = find(name, environ)
    if folder is None or _cached(name, environ):
        return settings
    if "HF_HUB_OFFLINE" not in environ and _reachable(environ):
        return settings
    return replace(settings, model_name=str(folder), served_model_name=settings.served_model_name or name)


def at_hand(settings: Settings, cache: Path = RUNPOD_CACHE) -> Settings:
    """`settings` with the folder of the model where the platform has put it; its name stays the same.

    RunPod keeps the folders of Hugging Face's cache, some of them in lower case.
    """
    name = settings.model_name
    if is_path(name) or in_store(name):
        return settings
    folder = "models--" + name.replace("/", "--")
    try:
        found = [path for path in cache.iterdir() if path.name.lower() == folder.lower()]
    except OSError:
        return settings
    for repository in sorted(found, key=lambda path: path.name != folder):
        if snapshot := _snapshot(repository, settings.model_revision):
            served = settings.served_model_name or name
            return replace(settings, model_name=str(snapshot), model_revision=None, served_model_name=served)
    return settings


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    """The folder of `revision`, else of the main branch, else the only one; None if it has no model."""
    reference = repository / "refs" / (revision or "main")
    snapshots = repository / "snapshots"
    if reference.is_file():
        wanted = [snapshots / reference.read_text().strip()]
    elif revision:
        wanted = [snapshots / revision]
    else:
        wanted = sorted(snapshots.glob("*"))
    whole = [path for path in wanted if _holds_model(path)]
    return whole[0] if len(whole) == 1 else None


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIGS)


def check(name: str, environ: MutableMapping[str, str]) -> None:
    """Raise `ModelNotFound` for a folder that is none, before the slow imports.

    A hub that can't be reached is noticed here, in seconds: its client would try again for
    half a minute, and a model that is in its cache needs no hub. S3 is asked by `handler.baked`, another
    object store by who reads from it, with its own credentials. Raises `BadSettings` for an endpoint of
    S3 that only a part of the start would use.
    """
    if in_store(name):
        given = environ.keys() & {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}
        if name.startswith("s3://") and given == {"AWS_ENDPOINT_URL_S3"}:
            what = "AWS_ENDPOINT_URL_S3 is nothing to Run:ai's streamer, which reads weights"
            raise BadSettings([f"{what}: set AWS_ENDPOINT_URL"])
        return
    if is_folder(name):
        return
    if "HF_HUB_OFFLINE" not in environ and not _reachable(environ):
        if not _cached(name, environ):
            raise ModelNotFound(
                f"MODEL_NAME={name}: Hugging Face can't be reached and its cache has no such model"
            )
        environ["HF_HUB_OFFLINE"] = "1"


def is_folder(name: str) -> bool:
    """Whether a model, one in no object store, is in a folder. Raises `ModelNotFound` where none is."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not _holds_model(folder):
            raise ModelNotFound(f"MODEL_NAME={name}: the folder has no config.json, so it holds no model")
        return True
    if is_path(name):
        raise ModelNotFound(f"MODEL_NAME={name}: there is no such folder")
    return False


def _cached(name: str, environ: Mapping[str, str]) -> bool:
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return (cache / ("models--" + name.replace("/", "--"))).is_dir()


def _reachable(environ: Mapping[str, str]) -> bool:
    if any(name in environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy's affair
    url = urlsplit(environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((url.hostname or "", url.port or 443), HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True
