"""A Llama model from GGUF to the files that vLLM serves: bfloat16 safetensors, config, tokenizer.

transformers can read GGUF too. It wants two more packages, takes ten times as long, and loses
the pre-tokenizer that splits digits, so that numbers become other tokens than the model knows.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL_TOKEN = 3

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class BadGguf(ValueError):
    """The bytes are not GGUF version 3, or hold a model that can't be converted."""


def convert(data: bytes | mmap, folder: Path, room: Callable[[int], object] = lambda _: None) -> None:
    """Write the model that `data`, the bytes of a GGUF file, holds into `folder`.

    Makes config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json, the same bytes every time. `room` hears before that how many bytes the
    weights take. Raises `BadGguf`.
    """
    gguf = read(data)
    family, tokenizer = gguf.metadata.get("general.architecture"), gguf.metadata.get("tokenizer.ggml.pre")
    if (family, tokenizer) != ("llama", "smollm"):
        raise BadGguf(
            f"a model of family {family!r} with a tokenizer of family {tokenizer!r} is not known, "
            "only 'llama' with 'smollm' is"
        )
    room(sum(_size_bytes(tensor) for tensor in gguf.tensors.values()))
    try:
        _write_json(folder / "config.json", config(gguf))
        _write_json(folder / "generation_config.json", _special_ids(gguf.metadata))
        _write_json(folder / "tokenizer.json", tokenizer_json(gguf.metadata))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf.metadata))
        write_safetensors(folder / "model.safetensors", gguf)
    except LookupError as error:
        raise BadGguf(f"the header lacks {error}") from error


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `offset` in the file, `shape` with rows first, `kind` as ggml numbers it."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file: what it says of itself, and its tensors by name."""

    data: bytes | mmap
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def floats(self, name: str) -> Floats:
        """The tensor `name`, dequantised."""
        tensor = self.tensors[name]
        if tensor.kind not in _KINDS:
            raise BadGguf(f"{name} is of kind {tensor.kind}, and known are {sorted(_KINDS)}")
        kind = _KINDS[tensor.kind]
        blocks = math.prod(tensor.shape) // kind.block
        if tensor.offset + blocks * kind.block_bytes > len(self.data):
            raise BadGguf(f"the file ends before {name} does")
        raw = np.frombuffer(self.data, np.uint8, blocks * kind.block_bytes, tensor.offset)
        return kind.floats(raw.reshape(blocks, kind.block_bytes)).reshape(tensor.shape)


def read(data: bytes | mmap) -> Gguf:
    """Read the header of `data`. Raises `BadGguf`."""
    cursor = _Cursor(data)
    try:
        if cursor.scalar("4s") != b"GGUF" or cursor.scalar("I") != 3:
            raise BadGguf("not GGUF version 3")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(field_count)}
        tensors = dict(cursor.tensor() for _ in range(tensor_count))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise BadGguf(f"the header can't be read: {error}") from error
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    placed = {name: Tensor(t.shape, t.kind, t.offset + start) for name, t in tensors.items()}
    return Gguf(data, metadata, placed)


class _Cursor:
    def __init__(self, data: bytes | mmap) -> None:
        self.data = data
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        raw: bytes = self.scalar(f"{length}s")
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            return [self.value(item) for _ in range(length)]
        return self.scalar(_SCALARS[kind])

    def tensor(self) -> tuple[str, Tensor]:
        name = self.text()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, Tensor(shape[::-1], self.scalar("I"), self.scalar("Q"))


@dataclass(frozen=True, slots=True)
class _Kind:
    """How ggml packs numbers: `block` of them in `block_bytes`."""

    block: int
    block_bytes: int
    floats: Callable[[Bytes], Floats]


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """A scale, 32 signed bytes."""
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _halves(blocks[:, :2])


def _q4_1(blocks: Bytes) -> Floats:
    """A scale, a minimum, 16 bytes with the first 16 numbers in the low halves and the rest in the high."""
    scale, minimum = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    floats: Floats = numbers.astype(np.float32) * scale + minimum
    return floats


_KINDS = {
    0: _Kind(1, 4, lambda raw: raw.view(np.float32)),
    1: _Kind(1, 2, _halves),
    3: _Kind(32, 20, _q4_1),
    8: _Kind(32, 34, _q8_0),
}


def config(gguf: Gguf) -> dict[str, Any]:
    """The model's config.json."""

    def of_llama(name: str) -> Any:
        return gguf.metadata[f"llama.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": of_llama("embedding_length"),
        "intermediate_size": of_llama("feed_forward_length"),
        "num_hidden_layers": of_llama("block_count"),
        "num_attention_heads": of_llama("attention.head_count"),
        "num_key_value_heads": of_llama("attention.head_count_kv"),
        "head_dim": of_llama("rope.dimension_count"),
        "max_position_embeddings": of_llama("context_length"),
        "rope_theta": of_llama("rope.freq_base"),
        # 1e-05 was kept in 32 bits
        "rms_norm_eps": float(str(np.float32(of_llama("attention.layer_norm_rms_epsilon")))),
        "vocab_size": of_llama("vocab_size"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **_special_ids(gguf.metadata),
    }


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer as the package `tokenizers` keeps it: byte-level BPE, each digit a token of its own."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer's file does not say: the special tokens' roles, and the chat template."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    return {
        # Any other class would build a tokenizer of its own from the vocabulary, without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_safetensors(path: Path, gguf: Gguf) -> None:
    """Write the tensors of `gguf` in bfloat16, one after another, so that memory holds one.

    Format: https://huggingface.co/docs/safetensors
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in gguf.tensors.items():
        start, end = end, end + _size_bytes(tensor)
        header[_hub_name(name)] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for weights in _hub_weights(gguf):
            file.write(bfloat16(weights).tobytes())


def _size_bytes(tensor: Tensor) -> int:
    return 2 * math.prod(tensor.shape)


def bfloat16(numbers: Floats) -> NDArray[np.uint16]:
    """The bits of `numbers` in bfloat16, rounded to the nearest, ties to even. Raises `BadGguf`."""
    if not np.isfinite(numbers).all():
        raise BadGguf("a weight is not a number")
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _hub_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    try:
        if parts[0] == "blk":
            _, layer, part = parts
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
        return f"{_TOP[parts[0]]}.weight"
    except (KeyError, ValueError) as error:
        raise BadGguf(f"a tensor named {name!r} has no place in a Llama model") from error


def _hub_weights(gguf: Gguf) -> Iterator[Floats]:
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    for name in gguf.tensors:
        weights = gguf.floats(name)
        part = name.split(".")[-2]
        yield _rows_of_heads(weights, heads[part]) if part in heads else weights


def _rows_of_heads(weights: Floats, heads: int) -> Floats:
    """Undo llama.cpp's order of rows, which lays the two halves that rotary embedding turns side by side."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    indent = None if path.name == "tokenizer.json" else 1  # a hundred thousand lines
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
