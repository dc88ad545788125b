"""What a model is on one GPU, as far as a plan needs it, from its config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from builder import layers, states
from builder.config import Config
from builder.kv import LATENT, Layers
from builder.layers import Unknown, head_dim, heads_kept, number_of_layers
from builder.lengths import FP8, ITEM_BYTES, Quantization, dtype, longest, quantization
from handler.errors import BadModel

PERCEIVING = ("vision_config", "audio_config", "thinker_config", "visual", "audio_tower")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GUESSES = re.compile(r"^(?:model\.)?mtp\.")


@dataclass(frozen=True, slots=True)
class Asked:
    """How the model is to be served, in the words of vLLM's flags."""

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 1
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and what one of its GPUs keeps of a sequence."""

    architecture: str
    model_type: str
    compared: bool
    """Whether what is kept by models of this type is compared with vLLM."""
    layers: tuple[Layers, ...]
    unknown: str | None
    """Why it is not known what the layers keep."""
    hidden: int
    feed_forward: int
    """How wide the widest step of a layer is on one GPU."""
    vocabulary: int
    max_model_len: int
    dtype: str
    kv_dtype: str
    quantization: Quantization | None
    planned_bytes: int
    """What the worker counts for a token when it plans its KV cache on a CPU."""
    number_of_layers: int
    perceives: bool
    """Whether it has a part for pictures or sounds besides."""
    guessing: bool
    """Whether the checkpoint has layers that only guess ahead, which vLLM leaves out."""

    @property
    def item_bytes(self) -> int:
        """Of a number, as the model computes."""
        return ITEM_BYTES[self.dtype]

    def left_out(self, tensor: str) -> bool:
        """Whether vLLM does not load the weight called `tensor`."""
        layer = _LAYER.search(tensor)
        beyond = self.guessing and layer is not None and int(layer[1]) >= self.number_of_layers
        return beyond or _GUESSES.match(tensor) is not None


def shape(
    found: Mapping[str, Any],
    asked: Asked,
    weights: Collection[str] = (),
    state_item_bytes: int | None = None,
) -> Shape:
    """What the config.json in `found` makes of a model that is served as `asked`.

    `weights` are the types of the weights, for a file that names none. `state_item_bytes` is what
    vLLM's `--mamba-ssm-cache-dtype` makes of a state's numbers. Raises `BadModel` where the shape of its
    attention is not known, `UsageError` where it can't be served so.
    """
    config = Config(found)
    computed = dtype(config, weights, asked.dtype)
    quantized = quantization(config)
    kv_dtype = asked.kv_cache_dtype
    if kv_dtype == "auto":
        kv_dtype = "fp8" if quantized is not None and quantized.fp8_cache else computed
    item_bytes = 1 if kv_dtype in FP8 else ITEM_BYTES[kv_dtype]
    why = None
    try:
        kept = _kept(config, asked.tensor_parallel, item_bytes, ITEM_BYTES[computed], state_item_bytes)
    except Unknown as reason:
        kept, why = [], str(reason)
    hidden, count = config.number("hidden_size"), number_of_layers(config)
    top = config.number("num_experts_per_tok", 1)
    wide = max(_widest(config.get("intermediate_size")), top * _widest(config.get("moe_intermediate_size")))
    return Shape(
        architecture=config.architecture,
        model_type=config.model_type,
        compared=config.compared,
        layers=tuple(kept),
        unknown=why,
        hidden=hidden,
        feed_forward=-(-(wide or 4 * hidden) // asked.tensor_parallel),
        vocabulary=config.number("vocab_size", int(found.get("vocab_size") or 0)),
        max_model_len=longest(config, asked.max_model_len),
        dtype=computed,
        kv_dtype=kv_dtype,
        quantization=quantized,
        planned_bytes=_planned_bytes(config, kept, asked.tensor_parallel, ITEM_BYTES[computed]),
        number_of_layers=count,
        perceives=any(name in found for name in PERCEIVING),
        guessing=bool(config.get("num_nextn_predict_layers")),
    )


def _kept(
    config: Config, gpus: int, item_bytes: int, model_item_bytes: int, state_item_bytes: int | None
) -> list[Layers]:
    if config.model_type in states.FAMILIES:
        return states.kept(config, gpus, item_bytes, model_item_bytes, state_item_bytes)
    return layers.attention(config, gpus, item_bytes)


def _planned_bytes(config: Config, kept: Collection[Layers], gpus: int, item_bytes: int) -> int:
    """Of a token, as the worker plans a KV cache on a CPU: keys and values of all layers alike."""
    if any(kind.kind == LATENT for kind in kept):
        heads, width = 1, max(kind.width for kind in kept)
    elif any(kind.heads for kind in kept):
        heads, width = heads_kept(config, gpus), head_dim(config)
    else:
        return 0
    return 2 * number_of_layers(config) * heads * width * item_bytes


def _widest(said: Any) -> int:
    """Of one width or of one for each layer."""
    widths = said if isinstance(said, list) else [said]
    if not all(width is None or isinstance(width, int) for width in widths):
        raise BadModel(f"config.json says {said!r} of a width")
    return max((width for width in widths if width), default=0)
