"""GGUF files made by hand, small enough to check number by number."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
ALIGNMENT = 32

Packed = tuple[Sequence[int], int, bytes]
"""Shape with rows first, ggml's number of the kind, bytes."""


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Packed]) -> bytes:
    """Lay out a whole file: header, fields, places of the tensors, tensors."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for name, value in metadata.items():
        head += _text(name) + _field(value)
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(body))
        body += raw + bytes(-len(raw) % ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT) + body


def f32(numbers: NDArray[np.float32]) -> Packed:
    """Pack a tensor as it is."""
    return numbers.shape, F32, numbers.astype("<f4").tobytes()


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(value: Any) -> bytes:
    if isinstance(value, list):
        items = [_field(item) for item in value]
        return (
            struct.pack("<I", 9)
            + items[0][:4]
            + struct.pack("<Q", len(items))
            + b"".join(i[4:] for i in items)
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)
