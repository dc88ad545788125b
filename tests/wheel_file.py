"""Wheels of made-up packages, a few bytes each. The standard library only: a build backend is made of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, bytes] | None = None,
    *,
    needs: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> str:
    """Write the wheel of a package that holds `files` into `folder`; returns its file name."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {need}" for need in needs]
    held = {
        **(files or {}),
        f"{info}/METADATA": "\n".join(lines).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(body)},{len(body)}\n" for path, body in held.items())
    held[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = f"{name}-{version}-py3-none-any.whl"
    with ZipFile(folder / wheel, "w") as archive:
        for path, body in held.items():
            archive.writestr(path, body)
    return wheel


def _digest(body: bytes) -> str:
    return base64.urlsafe_b64encode(sha256(body).digest()).rstrip(b"=").decode()
