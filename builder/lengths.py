"""Of a model's config.json: the longest sequence, the type of numbers, the quantization.

Source: vllm/config/model.py (`_get_and_verify_max_len`, `_resolve_auto_dtype`) and
vllm/transformers_utils/model_arch_config_convertor.py of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from builder.config import Config
from handler.errors import UsageError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = ("auto", *ITEM_BYTES)
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
KV_DTYPES = ("auto", "float16", "bfloat16", *FP8)
"""What is taken of what vLLM's `--kv-cache-dtype` may be."""

_STORED = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
_NO_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
"""Model types that vLLM does not run in float16."""

_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_NO_LENGTH = 2048
"""What vLLM takes where config.json says no length."""
_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""Kinds of rotary embedding whose length in config.json is the scaled one already."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are quantized: the method, and the bits of a parameter, where that is said."""

    method: str
    bits: int | None
    fp8_cache: bool
    """Whether the model is made for a KV cache in 8 bits, which vLLM then takes."""


def longest(config: Config, wanted: int | None = None) -> int:
    """The longest sequence in tokens, or `wanted`. Raises `UsageError` where `wanted` is longer."""
    said = [config.number(name) for name in _LENGTHS if config.get(name) is not None]
    most = config.number("model_max_length", 0) or min(said, default=_NO_LENGTH)
    ropes = list(_ropes(config.get("rope_parameters") or config.get("rope_scaling")))
    if "gemma3" not in config.model_type:
        for rope in ropes:
            if _kind(rope) not in _SCALED:
                most = int(most * (rope.get("factor") or 1))
                break
    if wanted is not None and wanted > most:
        raise UsageError(
            f"--max-model-len {wanted} is more than the model's {most}, and vLLM would not start"
        )
    if wanted is None and any(_kind(rope) == "longrope" for rope in ropes):
        return config.number("original_max_position_embeddings", most)
    return wanted or most


def dtype(config: Config, weights: Collection[str], wanted: str = "auto") -> str:
    """The type that the model computes in: `wanted`, or what config.json, or else the `weights`, have."""
    if wanted != "auto":
        return wanted
    parts = [config.whole, config.text, config.whole.get("vision_config"), config.whole.get("encoder_config")]
    named = (
        part.get("dtype") or part.get("torch_dtype") for part in parts if isinstance(part, dict) and part
    )
    found = str(next((name for name in named if name), "")).removeprefix("torch.")
    if not found:
        stored = {_STORED[name] for name in weights if name in _STORED}
        found = stored.pop() if len(stored) == 1 else "float32"
    slow = found not in ITEM_BYTES or found == "float32"
    if slow or (found == "float16" and config.model_type in _NO_FLOAT16):
        return "bfloat16"  # what vLLM prefers to a type that is slow or that the model can't do
    return found


def quantization(config: Config) -> Quantization | None:
    """How the weights are quantized; None if they are not."""
    parts = (config.whole, config.text)
    names = ("quantization_config", "compression_config")
    found = next((part[name] for part in parts for name in names if isinstance(part.get(name), dict)), None)
    if found is None:
        return None
    inner = found.get("quantization") if isinstance(found.get("quantization"), dict) else {}
    method = str(found.get("quant_method") or inner.get("quant_method") or "unknown").lower()
    algorithm = str(inner.get("quant_algo") or found.get("quant_algo") or "").upper()
    return Quantization(method, _bits(found, method, algorithm), _fp8_cache(found, inner))


def _bits(found: Mapping[str, Any], method: str, algorithm: str) -> int | None:
    groups = found.get("config_groups")
    grouped = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    said = [found.get("bits"), found.get("w_bit"), *(group.get("num_bits") for group in grouped)]
    if found.get("load_in_4bit") or method == "mxfp4" or "FP4" in algorithm:
        said.insert(0, 4)
    return next((bits for bits in said if isinstance(bits, int)), None)


def _fp8_cache(found: Mapping[str, Any], inner: Mapping[str, Any]) -> bool:
    scheme = found.get("kv_cache_scheme") or inner.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return scheme.get("num_bits") == 8 and scheme.get("type") == "float"
    said = scheme or inner.get("kv_cache_quant_algo") or found.get("kv_cache_quant_algo")
    return str(said).lower() == "fp8"


def _ropes(found: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings: one, or one for each kind of layer."""
    if isinstance(found, dict) and found:
        inner = [value for value in found.values() if isinstance(value, dict)]
        yield from inner or [found]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
