"""A bake out of an object store: its files checked one by one, put in place together, its manifest last.

    DIR/.pull/manifest.json   what is being pulled
    DIR/.pull/files/          what of it has arrived; see builder.pieces

The work is inside of the folder because that may be a volume, which nothing outside can be renamed into.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder import disk, store
from builder.console import Console, size
from builder.digest import Digest
from builder.parallel import Stop
from builder.pieces import Wanted, download, missing_bytes
from builder.progress import progress
from builder.s3 import Bucket, Location, told
from handler import manifest
from handler.errors import ManifestMismatch, ModelNotFound, UsageError
from handler.manifest import Difference, Manifest

WORK = ".pull"


def pull(location: Location, folder: Path, console: Console) -> None:
    """Leave in `folder` the bake that is at `location`, and no other.

    What is in `folder` already is kept where its bytes are right. Raises `ModelNotFound` where there
    is no bake, `ManifestMismatch` where what is there is not what was sealed, `Damaged` where what
    arrives is not, `UsageError` where `folder` holds something else, `NoResources`, `StoreFailed`.
    """
    with told(location):
        bucket = Bucket.open(location)
        raw = bucket.get(manifest.NAME)
        if raw is None:
            raise ModelNotFound(
                f"{location} has no {manifest.NAME}: nothing was pushed there, or a push has not ended"
            )
        with _alone(folder, console):
            if _is_there(folder, raw):
                console.say(f"{folder} has this bake; nothing changed")
                return
            _fill(folder, bucket, raw, console)
    console.say(f"{location} is in {folder}")


def _fill(folder: Path, bucket: Bucket, raw: bytes, console: Console) -> None:
    work = folder / WORK
    files = work / "files"
    files.mkdir(parents=True, exist_ok=True)
    (work / manifest.NAME).write_bytes(raw)
    sealed = Manifest.load(work)
    wanted = _missing(folder, _wanted(bucket, sealed), console)
    disk.need(work, missing_bytes(wanted, files))
    total_bytes = sum(file.size_bytes for file in wanted)
    console.say(
        f"downloading {bucket.location}: {len(wanted)} files, {size(total_bytes)}; "
        f"{len(sealed.files) - len(wanted)} are here"
    )
    download(wanted, files, console)
    _place(folder, sealed, [file.name for file in wanted])


def _is_there(folder: Path, raw: bytes) -> bool:
    """Whether `folder` is whole and has that manifest, as far as the quick check tells."""
    if not manifest.is_bake(folder) or (folder / manifest.NAME).read_bytes() != raw:
        return False
    return not any(manifest.differences(folder, Manifest.load(folder), full=False))


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Hold `folder`, made if need be. Raises `UsageError` where something is in it that no pull put there."""
    if not manifest.is_bake(folder) and not (folder / WORK).is_dir():
        for top in (manifest.MODEL, manifest.CACHE):
            if (folder / top).exists():
                raise UsageError(f"{folder / top} is there and no pull made it; name another folder")
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(store.FOLDER_MODE)
    with store.alone(folder, console):
        yield


def _wanted(bucket: Bucket, sealed: Manifest) -> list[Wanted]:
    """All files of the bake. Raises `ManifestMismatch` where one is not there, or has another size."""
    listed = bucket.objects()
    faults, wanted = [], []
    for name, file in sorted(sealed.files.items()):
        expected = f"{file.size_bytes} bytes"
        if (found := listed.get(name)) is None:
            faults.append(Difference(name, "missing", expected, "no such object"))
        elif found.size_bytes != file.size_bytes:
            faults.append(Difference(name, "size", expected, f"{found.size_bytes} bytes"))
        else:
            wanted.append(bucket.wanted(name, found, Digest("sha256", file.sha256)))
    if faults:
        raise ManifestMismatch(f"{bucket.location} is not what was sealed: {'; '.join(map(str, faults))}")
    return wanted


def _missing(folder: Path, wanted: list[Wanted], console: Console) -> list[Wanted]:
    """Those of `wanted` that `folder` has not yet, or has with other bytes."""

    def look(file: Wanted) -> bool:
        assert file.digest is not None
        right = file.digest.difference(folder / file.name, file.name) is None
        advance(file.size_bytes)
        return right

    alike = [file for file in wanted if _size(folder / file.name) == file.size_bytes]
    with progress(console, "comparing", sum(file.size_bytes for file in alike)) as advance:
        right = Stop().all(lambda file: file.name if look(file) else None, alike)
    return [file for file in wanted if file.name not in right]


def _size(file: Path) -> int | None:
    return file.stat().st_size if manifest.is_file(file) else None


def _place(folder: Path, sealed: Manifest, names: list[str]) -> None:
    """Put what was pulled in the place of what is there; meanwhile there is no manifest."""
    for name in (manifest.NAME, manifest.STATE):
        (folder / name).unlink(missing_ok=True)
    for name in set(manifest.contents(folder)) - sealed.files.keys():
        (folder / name).unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / WORK / "files" / name).replace(folder / name)
    for path in (manifest.MODEL, manifest.CACHE, f"{WORK}/{manifest.NAME}"):
        store.level(folder / path)
    (folder / WORK / manifest.NAME).replace(folder / manifest.NAME)
    shutil.rmtree(folder / WORK)
