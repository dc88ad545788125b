"""Weights for tests, written as the format says and not by the code that is tested."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1}


def weights(tensors: Mapping[str, tuple[str, Sequence[int]]], pad: int = 0) -> bytes:
    """A file of `tensors`, each a type and a shape, of zeros; the header is at least `pad` bytes long."""
    head, data_bytes = header(tensors, pad)
    return head + bytes(data_bytes)


def header(tensors: Mapping[str, tuple[str, Sequence[int]]], pad: int = 0) -> tuple[bytes, int]:
    """What such a file begins with, and how many bytes follow."""
    found: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + ITEM_BYTES[dtype] * prod(shape)
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(found).encode().ljust(pad)
    return struct.pack("<Q", len(text)) + text, end
