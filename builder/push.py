"""A sealed bake into an object store, its manifest last: where that is, the bake is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console, size
from builder.parallel import Stop
from builder.progress import Advance, progress
from builder.s3 import CHANGED, Bucket, Location, Object, told
from builder.upload import Source, upload
from handler import manifest
from handler.errors import ManifestMismatch, StoreFailed, UsageError
from handler.manifest import Difference, File, Manifest

SHOWN = 3
"""Of the objects that are left as they are, so many are named."""


def push(folder: Path, location: Location, console: Console, *, replace: bool = False) -> None:
    """Upload the bake in `folder` to `location`, but for what is there already.

    Another bake there is replaced only with `replace`. Raises `UsageError` for it otherwise, and for a
    folder that is not sealed; `ManifestMismatch` where a file is not what the manifest says, before
    anything is sent; `StoreFailed`; `NoResources` without boto3.
    """
    if not manifest.is_bake(folder):
        raise UsageError(f"{folder} is no sealed bake: it has no {manifest.NAME}")
    sealed, raw = Manifest.load(folder), (folder / manifest.NAME).read_bytes()
    with told(location):
        bucket = Bucket.open(location)
        listed = bucket.objects()
        old = bucket.get(manifest.NAME) if manifest.NAME in listed else None
        if old not in {None, raw} and not replace:
            raise UsageError(
                f"{location} has another bake, of {_model(old)}; with --replace, that of {_model(raw)} "
                "takes its place"
            )
        sources = _read(folder, sealed, _missing(bucket, listed, sealed.files), console)
        if old not in {None, raw}:
            bucket.call("delete_object", Key=location.key(manifest.NAME))
        upload(bucket, sources, console)
        if old != raw:
            _put_manifest(bucket, raw)
    if not sources and old == raw:
        console.say(f"{location} has this bake; nothing changed")
    else:
        sent_bytes = sum(source.size_bytes for source in sources)
        console.say(
            f"{location} has this bake: {len(sources)} files were uploaded, {size(sent_bytes)}, and "
            f"{len(sealed.files) - len(sources)} were there"
        )
    if others := sorted(listed.keys() - sealed.files.keys() - {manifest.NAME}):
        more = f" and {len(others) - SHOWN} more" if others[SHOWN:] else ""
        console.say(f"not of this bake, and left there: {', '.join(others[:SHOWN])}{more}")


def _missing(bucket: Bucket, listed: Mapping[str, Object], files: Mapping[str, File]) -> list[str]:
    """The names of those of `files` that are not there, or are there as something else."""

    def look(name: str) -> str | None:
        return None if bucket.is_there(name, files[name].sha256) else name

    sizes = {name: found.size_bytes for name, found in listed.items()}
    alike = {name for name, file in files.items() if sizes.get(name) == file.size_bytes}
    return sorted({*files} - alike | {name for name in Stop().all(look, alike) if name})


def _read(folder: Path, sealed: Manifest, names: list[str], console: Console) -> list[Source]:
    """What `names` hold. Raises `ManifestMismatch`, which names every one that is not as it was sealed."""
    total_bytes = sum(sealed.files[name].size_bytes for name in names)
    with progress(console, "hashing", total_bytes) as advance:
        read = Stop().all(lambda name: _source(folder, name, sealed.files[name], advance), names)
    if faults := sorted(str(one) for one in read if isinstance(one, Difference)):
        raise ManifestMismatch(f"{folder} is not what was sealed: {'; '.join(faults)}")
    return [one for one in read if isinstance(one, Source)]


def _source(folder: Path, name: str, expected: File, advance: Advance) -> Source | Difference:
    wanted = f"{expected.size_bytes} bytes"
    try:
        if (size_bytes := (folder / name).stat().st_size) != expected.size_bytes:
            return Difference(name, "size", wanted, f"{size_bytes} bytes")
        source = Source.read(folder / name, name, advance)
    except FileNotFoundError:
        return Difference(name, "missing", wanted, "no such file")
    if source.sha256 != expected.sha256:
        return Difference(name, "sha256", expected.sha256, source.sha256)
    return source


def _put_manifest(bucket: Bucket, raw: bytes) -> None:
    """Put the manifest there, unless another push has been faster."""
    key = bucket.location.key(manifest.NAME)
    try:
        bucket.call("put_object", Key=key, Body=raw, ContentType="application/json", IfNoneMatch="*")
    except StoreFailed as failure:
        if failure.code == "NotImplemented":  # a store that knows no conditions
            bucket.call("put_object", Key=key, Body=raw, ContentType="application/json")
        elif failure.code not in CHANGED:
            raise
        elif bucket.get(manifest.NAME) != raw:
            raise UsageError(f"{bucket.location} was given another bake meanwhile") from failure


def _model(raw: bytes | None) -> str:
    """The model of a manifest, for people: it may be of a version that is not known here."""
    try:
        return str(json.loads(raw or b"")["model"]["name"])
    except (ValueError, LookupError, TypeError):
        return "something unknown"
