"""Random weights of a model's real shape, so that a start is measured without a download.

Bytes, tensor names and compute are those of the real model; what it says is noise. Made of one block
of noise, read on and on, so that the disk and not the generator sets the pace.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from builder.gguf import bfloat16
from handler.errors import NoResources

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPARE_BYTES = 1 << 30
"""What a disk has to have beside the weights."""

_BLOCK = 4_194_301  # a prime, so that no two rows of a tensor are alike
_WORD = re.compile(r"[Ġ▁]?[A-Za-z]+")
_ROWS = 1024

Bits = NDArray[np.uint16]
Tell = Callable[[int, int], None]
"""Called with the bytes that are written, and those that will be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama model in bfloat16, with embeddings of its own at both ends."""

    like: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    shard_bytes: int = 4 << 30

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name, in the order in which vLLM loads them."""
        hidden, queries, values = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (values, hidden),
            "self_attn.v_proj": (values, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (self.feed_forward, hidden),
            "mlp.up_proj": (self.feed_forward, hidden),
            "mlp.down_proj": (hidden, self.feed_forward),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            **{
                f"model.layers.{number}.{name}.weight": size
                for number in range(self.layers)
                for name, size in layer.items()
            },
            "model.norm.weight": (hidden,),
            HEAD: (self.vocabulary, hidden),
        }

    @property
    def weights_bytes(self) -> int:
        """What all tensors take."""
        return sum(map(_size_bytes, self.tensors().values()))

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """The tensors by files, none larger than `shard_bytes` unless a tensor is."""
        files: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, size in self.tensors().items():
            if files[-1] and filled + _size_bytes(size) > self.shard_bytes:
                files.append({})
                filled = 0
            files[-1][name] = size
            filled += _size_bytes(size)
        return files

    def config(self) -> dict[str, object]:
        """What config.json holds."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }


HEAD = "lm_head.weight"
SHAPES: Mapping[str, Shape] = {
    "8b": Shape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128_256),
    "tiny": Shape("a tiny Llama", 128, 2, 4, 2, 32, 256, 4096, shard_bytes=1 << 20),
}


def write(shape: Shape, tokenizer: Path, folder: Path, tell: Tell) -> None:
    """Write a model of `shape` into `folder` with the tokenizer of the folder `tokenizer`.

    A folder that holds it already is left as it is: config.json is written last. Raises
    `NoResources` where the disk is too full.
    """
    config = json.dumps(shape.config(), indent=1)
    done = folder / "config.json"
    if done.is_file() and done.read_text() == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    wanted = shape.weights_bytes + SPARE_BYTES
    for old in folder.glob("*.safetensors"):
        old.unlink()
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise NoResources(
            f"{folder} has room for {free / 1e9:.1f} GB, and the weights of {shape.like} need "
            f"{wanted / 1e9:.1f} GB; name another folder with --folder"
        )
    words = speakable(tokenizer)
    noise, written = Noise(), 0
    index: dict[str, str] = {}
    files = shape.shards()
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(tensors, name)
        with (folder / name).open("wb") as file:
            _write_header(file, tensors)
            for tensor, size in tensors.items():
                for bits in _weights(tensor, size, noise, words):
                    written += file.write(bits.data)
                    tell(written, shape.weights_bytes)
    mapped = {"metadata": {"total_size": shape.weights_bytes}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(mapped))
    for file_name in TOKENIZER_FILES:
        if (tokenizer / file_name).is_file():
            shutil.copyfile(tokenizer / file_name, folder / file_name)
    done.write_text(config)


def speakable(tokenizer: Path) -> list[int]:
    """The tokens that are a word or a part of one: what a model has to say for a client to see text."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(number for token, number in vocabulary.items() if _WORD.fullmatch(token))


class Noise:
    """Normal numbers in bfloat16, which repeat after some millions."""

    def __init__(self, deviation: float = 0.02) -> None:
        numbers = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
        self._block: Bits = bfloat16(numbers * np.float32(deviation))
        self._at = 0

    def take(self, count: int) -> Iterator[Bits]:
        """The next `count` numbers, in pieces."""
        while count:
            piece = self._block[self._at : self._at + count]
            self._at = (self._at + len(piece)) % len(self._block)
            count -= len(piece)
            yield piece


def _weights(name: str, size: tuple[int, ...], noise: Noise, words: list[int]) -> Iterator[Bits]:
    """The numbers of one tensor: ones for a norm, and at the end noise for `words` alone.

    What has no weights there has the logit 0, and the largest of thousands of others is above it.
    """
    if len(size) == 1:
        yield bfloat16(np.ones(size, np.float32))
    elif name != HEAD:
        yield from noise.take(math.prod(size))
    else:
        spoken = np.zeros(size[0], bool)
        spoken[words] = True
        for first in range(0, size[0], _ROWS):
            rows = spoken[first : first + _ROWS]
            block = np.zeros((len(rows), size[1]), np.uint16)
            block[rows] = np.concatenate(list(noise.take(int(rows.sum()) * size[1])) or [block[:0]]).reshape(
                -1, size[1]
            )
            yield block


def _write_header(file: BinaryIO, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Format: https://huggingface.co/docs/safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        begin, end = end, end + _size_bytes(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)


def _size_bytes(size: tuple[int, ...]) -> int:
    return 2 * math.prod(size)
