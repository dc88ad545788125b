"""A Hugging Face cache in which small models stand under the names that the tests ask for.

The tests name models of gigabytes and adapters for them. What they judge is the server,
not the model, so each name leads to one of two small models. Tests, their tokenizers and
both servers then find it as they would find the real one, with the hub switched off.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

REVISION = "0" * 40
CONTEXT_TOKENS = 32768
"""Some tests ask for a longer context than the small models have; none of them fills it."""
LORA_RANK = 8


def hub(home: Path, models: Mapping[str, Path], adapters: Mapping[str, Path]) -> None:
    """Fill the `HF_HOME` folder `home` with `models` and with adapters for models, by name."""
    shutil.rmtree(home, ignore_errors=True)
    for name, folder in models.items():
        _model(_snapshot(home, name), folder)
    for name, folder in adapters.items():
        _adapter(_snapshot(home, name), folder)


def _snapshot(home: Path, name: str) -> Path:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def _model(snapshot: Path, folder: Path) -> None:
    """The files of `folder`, with a longer context."""
    for file in folder.iterdir():
        if file.name != "config.json":
            (snapshot / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT_TOKENS}))


def _adapter(snapshot: Path, folder: Path) -> None:
    """A LoRA adapter for the model in `folder` that changes nothing: its matrices are zero."""
    config = json.loads((folder / "config.json").read_text())
    inner, outer = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    shapes: dict[str, list[int]] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes |= {
            f"{prefix}.lora_A.weight": [LORA_RANK, inner],
            f"{prefix}.lora_B.weight": [outer, LORA_RANK],
        }
    (snapshot / "adapter_model.safetensors").write_bytes(zeros(shapes))
    about = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": ["q_proj"]}
    (snapshot / "adapter_config.json").write_text(json.dumps(about))
    for file in folder.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):  # some tests take the adapter's tokenizer
            (snapshot / file.name).symlink_to(file.resolve())


def zeros(shapes: Mapping[str, list[int]]) -> bytes:
    """A safetensors file of float32 zeros: length of the header, header as JSON, data."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)
