"""What a model needs, before anyone pays for a GPU: memory, cards that have it, seconds to start.

From its config.json and the headers of its weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from builder import gpus, origin
from builder.expected import Start, starts
from builder.headers import Weights
from builder.kv import LATENT, STATE, Pool, pool
from builder.origin import Origin
from builder.shapes import Asked, Shape, shape
from handler import machine

LENGTHS = (2048, 8192, 32768)
"""Tokens of the sequences that are counted, and the model's longest besides."""

CPU_BLOCK_TOKENS, CPU_LATENT_BLOCK_TOKENS = 128, 16
CPU_BATCH_TOKENS = 2048
"""vLLM's own on a CPU: vllm/platforms/cpu.py and `get_batch_defaults` of 0.32."""
PROCESS_BYTES = 700 << 20
"""What a worker on a CPU takes besides: its peak with the 4 MB model is 658 MiB (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How the model is to be served, and what is known better than what is assumed here."""

    asked: Asked
    utilization: float = gpus.UTILIZATION
    allowed_bytes: int | None = None
    """For all that is neither weights nor KV cache on a GPU."""
    read_gb_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cpu:
    """What a model has on this machine's CPU."""

    free_bytes: int
    weights_bytes: int
    kv_cache_bytes: int | None
    """What the worker would plan; None where it is not known what is kept."""
    sequences: Mapping[int, float] | None

    @property
    def fits(self) -> bool:
        """Whether what is free holds weights, cache and process."""
        return self.weights_bytes + (self.kv_cache_bytes or 0) + PROCESS_BYTES <= self.free_bytes


@dataclass(frozen=True, slots=True)
class Baked:
    """What a bake's own engine measured: the device, the tokens of its KV cache, and sequences."""

    on: str
    kv_cache_tokens: int
    sequences: Mapping[int, float] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found out."""

    origin: Origin
    weights: Weights
    shape: Shape
    loaded_bytes: int
    """What the weights take once they are loaded, on all GPUs together."""
    wish: Wish
    lengths: Sequence[int]
    fits: Sequence[gpus.Fit]
    starts: Sequence[Start]
    free_bytes: int | None
    """Memory of this machine; None where it does not say."""

    @property
    def blocks(self) -> Pool | None:
        """How vLLM divides the KV cache, on a card with its usual batches."""
        return gpus.blocks(self.shape, gpus.cards()[0])

    @property
    def token_bytes(self) -> int:
        """By how much a sequence grows with each token, on one GPU, once windows are full."""
        return sum(layers.count * layers.token_bytes for layers in self.shape.layers if layers.grows)

    @property
    def cpu(self) -> Cpu | None:
        """What the model has on this machine's CPU; None if it is for several GPUs, or no memory is known."""
        if self.free_bytes is None or self.wish.asked.tensor_parallel > 1:
            return None
        known = self.shape
        if not known.layers:
            return Cpu(self.free_bytes, self.loaded_bytes, None, None)
        cache_bytes = machine.kv_cache_bytes(known.planned_bytes * known.max_model_len, self.free_bytes)
        latent = any(layers.kind == LATENT for layers in known.layers)
        tokens = CPU_LATENT_BLOCK_TOKENS if latent else CPU_BLOCK_TOKENS
        found = pool(known.layers, block_tokens=tokens, in_flight=CPU_BATCH_TOKENS)
        # What a state's numbers are kept in depends on the processor.
        if found is None or any(layers.kind == STATE for layers in known.layers):
            return Cpu(self.free_bytes, self.loaded_bytes, cache_bytes, None)
        sequences = {length: found.sequences(cache_bytes, length) for length in self.lengths}
        return Cpu(self.free_bytes, self.loaded_bytes, cache_bytes, sequences)

    @property
    def baked(self) -> Baked | None:
        """What the engine had when the model was baked; None if it was not, or not started."""
        sealed = self.origin.baked
        cache = sealed.start.get("kv_cache") if sealed else None
        if sealed is None or not cache:
            return None
        gpu = sealed.made_with.get("gpu")
        in_flight = gpus.STEPS_AT_A_TIME * 8192 if gpu else CPU_BATCH_TOKENS
        found = pool(self.shape.layers, block_tokens=cache["block_size"], in_flight=in_flight)
        tokens = cache["blocks"] * cache["block_size"]
        if found is None:
            return Baked(gpu or "a CPU", tokens, None)
        sequences = {length: cache["blocks"] / found.blocks(length) for length in self.lengths}
        return Baked(gpu or "a CPU", tokens, sequences)


def plan(model: str | None, revision: str | None, wish: Wish, environ: Mapping[str, str]) -> Plan:
    """What `model` needs, served as in `wish`. Raises `StartError`."""
    found = origin.find(model, revision, environ)
    config = origin.config(found)
    weights = origin.weights(found)
    known = shape(config, wish.asked, weights.bytes_by_dtype)
    quantized = known.quantization is not None
    loaded = weights.loaded_bytes(None if quantized else known.item_bytes, known.left_out)
    lengths = sorted({*(length for length in LENGTHS if length < known.max_model_len), known.max_model_len})
    return Plan(
        origin=found,
        weights=weights,
        shape=known,
        loaded_bytes=loaded,
        wish=wish,
        lengths=lengths,
        fits=[
            gpus.fit(
                known,
                loaded,
                gpu,
                gpus=wish.asked.tensor_parallel,
                lengths=lengths,
                utilization=wish.utilization,
                allowed_bytes=wish.allowed_bytes,
            )
            for gpu in gpus.cards()
        ],
        starts=starts(
            weights.files_bytes,
            at_hand=found.at_hand,
            read_gb_per_s=wish.read_gb_per_s,
            baked=found.baked.start if found.baked else {},
        ),
        free_bytes=_free_bytes(),
    )


def _free_bytes() -> int | None:
    try:
        return machine.free_memory_bytes()
    except OSError:  # no Linux
        return None


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object; bytes, tokens and seconds as the names say."""
    known, weights, blocks = plan.shape, plan.weights, plan.blocks
    quantization = known.quantization
    return {
        "model": {
            "name": plan.origin.name,
            "source": plan.origin.source,
            "commit": plan.origin.commit,
            "architecture": known.architecture,
            "model_type": known.model_type,
            "dtype": known.dtype,
            "max_model_len": known.max_model_len,
        },
        "weights": {
            "files": len(weights.files),
            "files_bytes": weights.files_bytes,
            "bytes": weights.size_bytes,
            "bytes_by_dtype": weights.bytes_by_dtype,
            "parameters": weights.parameters(_packed_bits(known)),
            "quantization": quantization and {"method": quantization.method, "bits": quantization.bits},
            "loaded_bytes": plan.loaded_bytes,
        },
        "kv_cache": {
            "known": known.unknown is None and blocks is not None,
            "why_not": known.unknown,
            "compared_with_vllm": known.compared,
            "dtype": known.kv_dtype,
            "token_bytes": plan.token_bytes if known.layers else None,
            "layers": [
                {**asdict(layers), "token_bytes": layers.token_bytes, "grows": layers.grows}
                for layers in known.layers
            ],
            "sequence_bytes": blocks and {length: blocks.sequence_bytes(length) for length in plan.lengths},
        },
        "tensor_parallel": plan.wish.asked.tensor_parallel,
        "gpu_memory_utilization": plan.wish.utilization,
        "gpus": [
            {
                **asdict(fit.gpu),
                "fits": fit.fits,
                "usable_bytes": fit.usable_bytes,
                "weights_bytes": fit.weights_bytes,
                "allowance_bytes": fit.allowance_bytes,
                "kv_cache_bytes": fit.cache_bytes,
                "sequences": fit.sequences,
                "longest_sequence": fit.longest,
                "max_num_seqs": fit.gpu.batch_sequences,
            }
            for fit in plan.fits
        ],
        "cpu": plan.cpu and {**asdict(plan.cpu), "fits": plan.cpu.fits},
        "baked": plan.baked and asdict(plan.baked),
        "cold_start": [
            {
                "on": start.on,
                "total_s": round(start.total_s, 3),
                "overlap": start.overlap,
                "parts": [{**asdict(part), "seconds": round(part.seconds, 3)} for part in start.parts],
            }
            for start in plan.starts
        ],
    }


def _packed_bits(known: Shape) -> int | None:
    """Of a parameter, where several are in an integer."""
    bits = known.quantization.bits if known.quantization else None
    return bits if bits is not None and bits < 8 else None
