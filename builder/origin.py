"""Where a model's files are, and how a little of each is read: what a plan needs, without a download.

A folder, a bake, a prefix of a bucket, or a repository of Hugging Face.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from builder import store
from builder.bucket import Prefix
from builder.console import Console
from builder.credentials import hf_token
from builder.fetch import Repository, cached_as, hub_endpoint, source_of
from builder.headers import Tensor, Weights, read
from builder.selection import SAFE, needed
from handler import baked
from handler.errors import BadModel, ModelNotFound, NoResources
from handler.fetched import models
from handler.manifest import MODEL, Manifest
from handler.prerequisites import installed
from handler.settings import DEFAULT_MODEL

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
READERS = 8
"""Headers that are read at a time: a large model has hundreds of files, each a round trip away."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A model's files: how large each is, and how a part of one is read."""

    name: str
    """As whoever looks for it calls it."""
    source: str
    """`folder`, `bake`, `Hugging Face` or `S3`."""
    files: Mapping[str, int]
    """Bytes of each file, by its path below the model."""
    get: Callable[[str, int, int], bytes]
    """The bytes of a file from one position to before another."""
    commit: str | None = None
    baked: Manifest | None = None
    """What a bake says of itself."""

    @property
    def at_hand(self) -> bool:
        """Whether the files are on this machine, so that a worker's start needs no network."""
        return self.source in {"folder", "bake"}


def find(model: str | None, revision: str | None, environ: Mapping[str, str]) -> Origin:
    """The files of `model`: a folder, a bake, a Hugging Face id, or `s3://bucket/prefix`.

    A model that `fetch` has put into the user's cache is found there. Reads HF_ENDPOINT, HF_TOKEN,
    HF_TOKEN_PATH, HF_HUB_OFFLINE, XDG_CACHE_HOME and HOME from `environ`; boto3 reads the process's own.
    Raises `ModelNotFound`, and `NoResources` where a package is missing.
    """
    name = model or DEFAULT_MODEL
    folder = Path(name).expanduser()
    if (bake := baked.folder(str(folder))) is not None:
        return _bake(bake)
    if (folder / CONFIG).is_file() or any(folder.glob("*.safetensors")):
        return _folder(folder, name)
    source = source_of(name, revision, SAFE, environ, Console(io.StringIO()))
    if isinstance(source, Prefix):
        return Origin(name, "S3", source.sizes(), source.get)
    if isinstance(source, Repository):
        return _repository(source)
    raise ModelNotFound(  # a file in GGUF
        f"{name} can't be planned: `python -m builder fetch {name}` makes a folder of it first"
    )


def config(origin: Origin, name: str = CONFIG) -> dict[str, Any]:
    """What the JSON file `name` holds. Raises `ModelNotFound` without one, `BadModel` where it is no JSON."""
    if name not in origin.files:
        mistral = " Mistral's own format (params.json) is not read." if "params.json" in origin.files else ""
        raise ModelNotFound(f"{origin.name} has no {name}, so it is no model that can be planned.{mistral}")
    try:
        found = json.loads(origin.get(name, 0, origin.files[name]))
    except ValueError as error:
        raise BadModel(f"{name} of {origin.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadModel(f"{name} of {origin.name} is no JSON object")
    return found


def weights(origin: Origin) -> Weights:
    """What the weight files hold that vLLM loads: those that the index names, where there is one.

    Raises `ModelNotFound` where there are none, `BadModel` where a file is missing or damaged.
    """
    try:
        chosen = needed(origin.files)
    except ModelNotFound as failure:
        raise ModelNotFound(f"{origin.name} can't be planned: {failure}") from failure
    names = [name for name in chosen if name.endswith(".safetensors") and "/" not in name]
    if INDEX in origin.files:
        named = set(config(origin, INDEX).get("weight_map", {}).values())
        if missing := sorted(named - origin.files.keys()):
            raise BadModel(f"{INDEX} of {origin.name} names {missing[0]}, which is not there")
        names = [name for name in names if name in named] or names

    def header(name: str) -> list[Tensor]:
        return read(partial(origin.get, name), name, origin.files[name])

    with ThreadPoolExecutor(READERS) as readers:
        tensors = [tensor for found in readers.map(header, names) for tensor in found]
    return Weights({name: origin.files[name] for name in names}, tensors)


def _folder(folder: Path, name: str) -> Origin:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}

    def get(file: str, begin: int, end: int) -> bytes:
        with (folder / file).open("rb") as reader:
            reader.seek(begin)
            return reader.read(end - begin)

    return Origin(name, "folder", files, get)


def _bake(folder: Path) -> Origin:
    sealed = Manifest.load(folder)
    model = _folder(folder / MODEL, sealed.model.get("name", str(folder)))
    return replace(model, source="bake", commit=sealed.model.get("commit"), baked=sealed)


def _repository(source: Repository) -> Origin:
    """The files of a repository, or those that were fetched from it."""
    asked, environ = source.asked, source.environ
    cached = models(environ) / cached_as(asked)
    if store.intact(cached, asked):
        return _folder(cached, asked.model)
    if not installed("huggingface_hub"):
        raise NoResources(f"planning {asked.model} needs huggingface_hub: pip install huggingface_hub")
    try:
        endpoint = hub_endpoint(environ)
        from builder import hub  # noqa: PLC0415 - takes a while to import, and a hub that is away needs none

        found = hub.look(asked.model, asked.revision, endpoint=endpoint, token=hf_token(environ))
    except ModelNotFound as failure:
        raise ModelNotFound(f"{asked.model} can't be looked at: {failure}.") from failure
    return Origin(asked.model, "Hugging Face", found.files, found.get, found.commit)
