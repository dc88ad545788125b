"""What is read of safetensors files: headers only, and every byte of a file accounted for."""

from __future__ import annotations

import json
import struct
from math import prod

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from builder.headers import Tensor, Weights, parse, read
from handler.errors import BadModel
from tests.safetensors_file import weights

NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U8": np.uint8}

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(NUMPY)), SHAPES),
    max_size=6,
)


def tensors(body: bytes, size_bytes: int | None = None) -> list[Tensor]:
    """What is read of a file that holds `body`."""
    return read(lambda begin, end: body[begin:end], "a file", len(body) if size_bytes is None else size_bytes)


@given(TENSORS)
def test_header_and_tensors_are_the_file(made: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Written by the format's own library: 8 bytes of length, the header and all tensors are the file."""
    body = safetensors.numpy.save(
        {name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in made.items()}
    )
    found = tensors(body)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == made
    (header_bytes,) = struct.unpack("<Q", body[:8])
    assert 8 + header_bytes + sum(tensor.size_bytes for tensor in found) == len(body)
    assert sum(tensor.elements for tensor in found) == sum(prod(shape) for _, shape in made.values())


def test_weights_are_not_read() -> None:
    """Of a long header what is missing is asked for besides, and nothing behind it."""
    made = weights({"a": ("F32", (1000, 1000))}, pad=150_000)
    asked: list[tuple[int, int]] = []

    def get(begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return made[begin:end]

    assert read(get, "a file", len(made)) == [Tensor("a", "F32", (1000, 1000), 4_000_000)]
    assert asked == [(0, 100_000), (100_000, 150_008)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "it has 0 bytes"),
        (b"<html>not found</html>", "its header would have"),
        (struct.pack("<Q", 4) + b"null", "its header can't be read"),
        (struct.pack("<Q", 2) + b"{}" + bytes(7), "has 17 bytes and its header says 10: it was cut"),
        (weights({"a": ("F32", (8,))})[:-1], "it was cut or altered"),
    ],
)
def test_what_is_no_whole_file_is_told(body: bytes, why: str) -> None:
    """A page of HTML, a download that ended early."""
    with pytest.raises(BadModel, match=why):
        tensors(body)


@pytest.mark.parametrize("begin", [0, 33])
def test_gaps_and_overlaps_are_told(begin: int) -> None:
    """Each tensor begins where the last one ended."""
    header = {
        "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [begin, begin + 4]},
    }
    with pytest.raises(BadModel, match="the header is wrong about"):
        parse(header, "a file")


def test_shapes_that_do_not_fit_their_bytes_are_told() -> None:
    """Ten numbers of four bytes are not 32."""
    header = {"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 32]}}
    with pytest.raises(BadModel, match="the header is wrong about 'a'"):
        parse(header, "a file")
    assert parse(
        json.loads(json.dumps({"a": {**header["a"], "dtype": "NEW"}})), "a file"
    )  # not known, so taken


def test_parameters_of_packed_weights() -> None:
    """Eight of 4 bits in an integer of 32, two in a byte; what lies beside them is none."""
    made = [
        Tensor("q.qweight", "I32", (64, 8), 2048),
        Tensor("q.qzeros", "I32", (1, 8), 32),
        Tensor("q.scales", "F16", (1, 64), 128),
        Tensor("q.g_idx", "I32", (512,), 2048),
        Tensor("experts_blocks", "U8", (16,), 16),
        Tensor("norm.weight", "F16", (64,), 128),
    ]
    found = Weights({"model.safetensors": 5000}, made)
    assert found.parameters(4) == 64 * 8 * 8 + 16 * 2 + 64
    assert found.parameters() == 64 * 8 + 16 + 64
    assert found.bytes_by_dtype == {"I32": 4128, "F16": 256, "U8": 16}


def test_loading_converts_floats() -> None:
    """32 bits take half in bfloat16; what is quantized stays as it is, and what is left out is gone."""
    made = [Tensor("a", "F32", (4,), 16), Tensor("b", "I32", (4,), 16), Tensor("mtp.c", "F32", (4,), 16)]
    found = Weights({"model.safetensors": 100}, made)
    assert found.loaded_bytes(2) == 8 + 16 + 8
    assert found.loaded_bytes(2, lambda name: name.startswith("mtp")) == 24
    assert found.loaded_bytes(None) == found.size_bytes == 48
