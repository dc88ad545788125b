"""Which GPUs a model fits, with room for how many sequences. builder/gpus.json has the cards.

What a card has left for the KV cache, vLLM measures when it starts. Before that it is what the card
has, times `gpu_memory_utilization`, less the weights and an allowance, which is assumed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from builder.kv import LATENT, Pool, pool
from builder.shapes import Shape

GIB = 1 << 30
UTILIZATION = 0.92
"""vLLM 0.32's own default: vllm/config/cache.py."""

FIXED_BYTES = 3 * GIB // 2
"""For CUDA's context, its graphs and what its libraries take."""
SHARED_BYTES = 3 * GIB // 2
"""And for communication, where several GPUs share a model."""
LOGITS = 4
"""How often vLLM holds 32 bits for each word of the vocabulary and each sequence, when it tries the
largest batch. With what else is allowed that makes 4.4 GiB for Llama-3-8B on an H100 and 5.5 on each of
two. vLLM's own log had 3.1 and 4.8 (vllm-project/vllm pull request 10511, of 2024), without the graphs,
which it counts since 0.21 and which take 0.3 to 1.1 (logs in vllm-project/vllm 20264 and others)."""

BLOCK_TOKENS = 16
LATENT_BLOCK_TOKENS = 64
"""Of the kernels for latent attention on the GPUs of data centres."""
STEPS_AT_A_TIME = 2
"""vLLM prepares a step while the one before it runs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card, and where it can be had."""

    name: str
    memory_gib: float
    """What CUDA has to give away; less than what is sold."""
    bandwidth_gb_per_s: int
    runpod: str | None = None
    """RunPod's pool."""
    lambda_gib: int | None = None
    """`AcceleratorMemorySize` of a Lambda function that gets it."""
    ec2: str | None = None
    """The smallest instance of EC2."""

    @property
    def memory_bytes(self) -> int:
        """The same in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def large(self) -> bool:
        """Whether vLLM takes larger batches by default, as it does from 70 GiB on but for the A100."""
        return self.memory_gib >= 70 and "A100" not in self.name

    @property
    def batch_sequences(self) -> int:
        """How many sequences vLLM works on at a time by default (`max_num_seqs`, in its arg_utils.py)."""
        return 1024 if self.large else 256

    @property
    def batch_tokens(self) -> int:
        """How many tokens a step has at most by default (`max_num_batched_tokens`, as above)."""
        if self.memory_gib >= 160:
            return 16384
        return 8192 if self.large else 2048


@dataclass(frozen=True, slots=True)
class Fit:
    """What a model has on a card, or on each of several."""

    gpu: Gpu
    usable_bytes: int
    weights_bytes: int
    allowance_bytes: int
    sequences: Mapping[int, float] | None
    """How many sequences of a number of tokens have room; None where it is not known what they keep."""
    longest: int | None
    """The longest of them, in tokens."""

    @property
    def cache_bytes(self) -> int:
        """What is left for the KV cache; below 0 where the weights don't fit."""
        return self.usable_bytes - self.weights_bytes - self.allowance_bytes

    @property
    def fits(self) -> bool:
        """Whether vLLM would start, be it for shorter sequences than the model's longest."""
        return self.cache_bytes > 0 and self.longest != 0


@cache
def cards() -> Sequence[Gpu]:
    """Every card of the list, the smallest first."""
    found = json.loads(resources.files("builder").joinpath("gpus.json").read_text())
    return tuple(Gpu(**card) for card in found["gpus"])


def allowance_bytes(shape: Shape, gpu: Gpu, gpus: int) -> int:
    """What is assumed for all that is neither weights nor KV cache, on each of `gpus` cards."""
    step = gpu.batch_tokens * (4 * shape.hidden + 3 * shape.feed_forward) * shape.item_bytes
    sampling = LOGITS * 4 * shape.vocabulary * gpu.batch_sequences
    return FIXED_BYTES + (SHARED_BYTES if gpus > 1 else 0) + step + sampling


def blocks(shape: Shape, gpu: Gpu) -> Pool | None:
    """How vLLM divides the KV cache on `gpu`; None where that is not known."""
    latent = any(layers.kind == LATENT for layers in shape.layers)
    return pool(
        shape.layers,
        block_tokens=LATENT_BLOCK_TOKENS if latent else BLOCK_TOKENS,
        in_flight=STEPS_AT_A_TIME * gpu.batch_tokens,
    )


def fit(
    shape: Shape,
    weights_bytes: int,
    gpu: Gpu,
    *,
    gpus: int,
    lengths: Sequence[int],
    utilization: float = UTILIZATION,
    allowed_bytes: int | None = None,
) -> Fit:
    """What a model with `weights_bytes` has on each of `gpus` cards, for sequences of `lengths` tokens.

    `allowed_bytes` replaces the allowance.
    """
    allowed = allowance_bytes(shape, gpu, gpus) if allowed_bytes is None else allowed_bytes
    usable = int(gpu.memory_bytes * utilization)
    shared = -(-weights_bytes // gpus)
    left = usable - shared - allowed
    found = blocks(shape, gpu)
    if found is None:
        return Fit(gpu, usable, shared, allowed, None, None)
    sequences = {tokens: found.sequences(left, tokens) for tokens in lengths}
    return Fit(gpu, usable, shared, allowed, sequences, found.longest(left, shape.max_model_len))
