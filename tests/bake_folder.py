"""A sealed bake of made-up files: what a bake is to a transfer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from handler.manifest import NAME, File, Manifest

THREE_PARTS_BYTES = (32 << 20) + 1


def noise(size_bytes: int, seed: int = 1) -> bytes:
    """As many bytes as that, which no two parts of a file share."""
    return random.Random(seed).randbytes(size_bytes)


def files(weights_bytes: int = 1000) -> dict[str, bytes]:
    """What a bake holds."""
    return {
        "model/config.json": b"{}",
        "model/model.safetensors": noise(weights_bytes),
        "cache/vllm/deep/kernel.so": b"kernel",
        "cache/vllm/empty": b"",
    }


def write(folder: Path, held: Mapping[str, bytes]) -> Path:
    """Write these files into `folder`; returns it."""
    for name, body in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def sealed(folder: Path, held: Mapping[str, bytes], model: str = "org/name") -> Path:
    """Write a bake that holds these files into `folder`; returns it."""
    write(folder, held)
    listed = {name: File(len(body), sha256(body).hexdigest()) for name, body in held.items()}
    (folder / NAME).write_bytes(Manifest({"name": model}, listed).dump())
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
