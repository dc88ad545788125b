"""What the weights are, from the headers of safetensors files: never the weights themselves.

A file is 8 bytes with the length of a header, the header, which is JSON, and the tensors one after
the other: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import BadModel

FIRST_BYTES = 100_000
"""What is asked for at first: 97 % of all headers are shorter, says huggingface_hub, which does the same."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, of the types that vLLM converts to the one that it computes in."""
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "C64": 64} | {
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_BESIDE = re.compile(
    r"(scales?|scale_inv|zeros|zero_points?|g_idx|scale_2|global_scale|weight_shape|_extra_state)$"
    r"|\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"
)
"""Names of what lies beside quantized weights and is no parameter."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    name: str
    dtype: str
    """As the format names it: `BF16`, `F8_E4M3`, `I32`."""
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Weights:
    """All weight files of a model: the size of each, and what is in them."""

    files: Mapping[str, int]
    tensors: Sequence[Tensor]

    @property
    def files_bytes(self) -> int:
        """What the files take, headers and all."""
        return sum(self.files.values())

    @property
    def size_bytes(self) -> int:
        """What the tensors take."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """What the tensors of each type take, the most first."""
        counted: Counter[str] = Counter()
        for tensor in self.tensors:
            counted[tensor.dtype] += tensor.size_bytes
        return dict(counted.most_common())

    def parameters(self, packed_bits: int | None = None) -> int:
        """How many parameters they are, where a quantization packs those of `packed_bits` into integers."""
        count = 0
        for tensor in self.tensors:
            if not _BESIDE.search(tensor.name):
                bits = _BITS.get(tensor.dtype, 8)
                packs = packed_bits is not None and tensor.dtype in {"I32", "U32", "U8", "I8"}
                count += tensor.elements * (bits // packed_bits if packs and packed_bits else 1)
        return count

    def loaded_bytes(self, item_bytes: int | None, skipped: Callable[[str], bool] = lambda _: False) -> int:
        """What they take in memory where floats are kept in `item_bytes` each, without the `skipped` names.

        None keeps every tensor as it is stored.
        """
        loaded = (tensor for tensor in self.tensors if not skipped(tensor.name))
        return sum(
            tensor.elements * item_bytes if item_bytes and tensor.dtype in FLOATS else tensor.size_bytes
            for tensor in loaded
        )


def read(get: Callable[[int, int], bytes], file: str, size_bytes: int) -> list[Tensor]:
    """The tensors of `file`, which has `size_bytes`; `get(begin, end)` returns those bytes of it.

    Reads the header only, mostly in one go. Raises `BadModel`.
    """
    first = get(0, min(FIRST_BYTES, size_bytes))
    if len(first) < 8:
        raise BadModel(f"{file} is no safetensors file: it has {size_bytes} bytes")
    length = int.from_bytes(first[:8], "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise BadModel(f"{file} is no safetensors file: its header would have {length} bytes of {size_bytes}")
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += get(8 + len(raw), 8 + length)
    try:
        found = json.loads(raw)
        tensors = parse(found, file)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadModel(f"{file} is no safetensors file: its header can't be read: {error!r}") from error
    expected = 8 + length + sum(tensor.size_bytes for tensor in tensors)
    if size_bytes != expected:
        raise BadModel(f"{file} has {size_bytes} bytes and its header says {expected}: it was cut or altered")
    return tensors


def parse(header: Mapping[str, Any], file: str) -> list[Tensor]:
    """The tensors of a header as JSON, in the order of their bytes.

    Raises `BadModel` where a gap or an overlap is between two, or a shape does not fit its bytes.
    """
    named = ((name, value) for name, value in header.items() if name != "__metadata__")
    tensors, at = [], 0
    for name, value in sorted(named, key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = value["data_offsets"]
        tensor = Tensor(name, value["dtype"], tuple(value["shape"]), end - begin)
        bits = _BITS.get(tensor.dtype)
        if begin != at or (bits and tensor.elements * bits != 8 * tensor.size_bytes):
            raise BadModel(f"{file}: the header is wrong about {name!r}")
        tensors.append(tensor)
        at = end
    return tensors
