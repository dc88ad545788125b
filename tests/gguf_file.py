"""GGUF files made by hand, small enough to check number by number."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
ALIGNMENT = 32

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 2, 1, 4, 64

# How byte-level BPE writes the 256 bytes: https://github.com/openai/gpt-2/blob/master/src/encoder.py
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ALPHABET = [chr(b) for b in _PRINTABLE] + [chr(256 + n) for n in range(256 - len(_PRINTABLE))]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_ALPHABET, "he", "ll", "llo", "hello", "12"]

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


def metadata(**changes: Any) -> dict[str, Any]:
    """What a small Llama model says of itself."""
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["h e", "l l", "ll o", "he llo", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    } | {name.replace("__", "."): value for name, value in changes.items()}


def weights() -> dict[str, Packed]:
    """Tensors of that model, each number another."""
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
        "output_norm.weight": (HIDDEN,),
    }
    return {
        name: f32(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
        for name, shape in shapes.items()
    }
