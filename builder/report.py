"""A plan as a person reads it: a few lines and two tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from builder.console import size
from builder.gpus import GIB, Fit, Gpu
from builder.kv import STATE, Layers
from builder.plan import Plan, as_json

_KINDS = {
    "full": "of full attention",
    "latent": "of latent attention",
    "sliding": "that see a window",
    "chunked": "that see a chunk",
    "state": "with a state",
}


def report(plan: Plan) -> str:
    """The text, without a line's end at its end."""
    return "\n".join([*_model(plan), "", *_table(plan), "", *_start(plan), "", *_notes(plan)])


def _model(plan: Plan) -> Iterator[str]:
    found, known, weights = plan.origin, plan.shape, plan.weights
    commit = f" @ {found.commit[:12]}" if found.commit else ""
    yield f"{found.name}  ({known.architecture}, {found.source}{commit})"
    told = as_json(plan)["weights"]
    kinds = ", ".join(f"{dtype} {size(count)}" for dtype, count in weights.bytes_by_dtype.items())
    count = f"{_millions(told['parameters'])} parameters"
    files = f"{len(weights.files)} file{'s' if len(weights.files) != 1 else ''}"
    loaded = f", {size(plan.loaded_bytes)} once loaded" if plan.loaded_bytes != weights.size_bytes else ""
    yield f"weights    {size(weights.files_bytes)} in {files}: {count}, {kinds}{loaded}"
    if known.quantization:
        bits = f", {known.quantization.bits} bits" if known.quantization.bits else ""
        yield f"           quantized: {known.quantization.method}{bits}"
    yield from _cache(plan)


def _cache(plan: Plan) -> Iterator[str]:
    known, blocks = plan.shape, plan.blocks
    if known.unknown:
        yield f"KV cache   not known: {known.unknown}"
        return
    gpus = plan.wish.asked.tensor_parallel
    each = f" on each of {gpus} GPUs" if gpus > 1 else ""
    yield f"KV cache   {plan.token_bytes:,} bytes a token in {known.kv_dtype}{each}"
    for layers in known.layers:
        yield f"           {layers.count} layers {_KINDS[layers.kind]}: {_kept(layers)}"
    if blocks is None:
        yield "           how vLLM shares its memory between these is not known"
        return
    lengths = (f"{_tokens(length)} {size(blocks.sequence_bytes(length))}" for length in plan.lengths)
    yield f"           a sequence of {', '.join(lengths)}"


def _kept(layers: Layers) -> str:
    if layers.kind == STATE:
        return f"{size(layers.state_bytes)} of a sequence each"
    several = f"{layers.heads} heads" if layers.heads > 1 else "1 head"
    heads = "one vector" if layers.kind == "latent" else several
    kept = f"{heads} of {layers.width} numbers, {layers.token_bytes:,} bytes a token each"
    return f"{kept}, the last {layers.window:,} tokens" if layers.window else kept


def _table(plan: Plan) -> Iterator[str]:
    several = f"{plan.wish.asked.tensor_parallel} x " if plan.wish.asked.tensor_parallel > 1 else ""
    heads = ["", "memory", "GB/s", "KV cache", *(_tokens(length) for length in plan.lengths), "where"]
    rows = [heads, *(_row(plan, fit, several) for fit in plan.fits), *_here(plan)]
    yield "sequences at once, each of so many tokens"
    yield from _aligned(rows, left={0, len(heads) - 1})


def _row(plan: Plan, fit: Fit, several: str) -> list[str]:
    gpu = fit.gpu
    row = [several + gpu.name, f"{gpu.memory_gib:.1f} GiB", f"{gpu.bandwidth_gb_per_s:,}"]
    if fit.cache_bytes <= 0:
        short = f"does not fit: {-fit.cache_bytes / GIB:.1f} GiB short"
        return [*row, "-", *("-" for _ in plan.lengths), short]
    return [*row, f"{fit.cache_bytes / GIB:.1f} GiB", *_counts(plan, fit.sequences), _where(plan, fit)]


def _where(plan: Plan, fit: Fit) -> str:
    if fit.longest is not None and fit.longest < plan.shape.max_model_len:
        least = f"MAX_MODEL_LEN={fit.longest}" if fit.longest else "no room for a sequence"
        return f"{least}; {_had(fit.gpu)}"
    return _had(fit.gpu)


def _had(gpu: Gpu) -> str:
    places = [
        gpu.runpod and f"RunPod {gpu.runpod}",
        gpu.lambda_gib and f"Lambda {gpu.lambda_gib}",
        gpu.ec2 and f"EC2 {gpu.ec2}",
    ]
    return ", ".join(place for place in places if place)


def _here(plan: Plan) -> Iterator[list[str]]:
    """What is known of this machine, and of the one that baked the model."""
    if (cpu := plan.cpu) is not None:
        row = ["this machine's CPU", f"{cpu.free_bytes / GIB:.1f} GiB", ""]
        if not cpu.fits:
            yield [*row, "-", *("-" for _ in plan.lengths), "does not fit into what is free now"]
        else:
            cache = "?" if cpu.kv_cache_bytes is None else f"{cpu.kv_cache_bytes / GIB:.1f} GiB"
            yield [*row, cache, *_counts(plan, cpu.sequences), "with what is free now"]
    if (baked := plan.baked) is not None:
        tokens = f"{baked.kv_cache_tokens:,} tokens"
        yield [
            "when it was baked",
            "",
            "",
            tokens,
            *_counts(plan, baked.sequences),
            f"measured on {baked.on}",
        ]


def _counts(plan: Plan, sequences: Mapping[int, float] | None) -> list[str]:
    return [_count(sequences[length]) if sequences else "?" for length in plan.lengths]


def _start(plan: Plan) -> Iterator[str]:
    yield "expected cold start, without an image to pull"
    rows = [["", *(start.on for start in plan.starts), "", ""]]
    for parts in zip(*(start.parts for start in plan.starts), strict=True):
        why = dict.fromkeys(part.why for part in parts)
        rows.append(
            [parts[0].name, *(_seconds(part.seconds) for part in parts), parts[0].basis, "; ".join(why)]
        )
    overlap = "the longer of imports and weights counts" if plan.starts[0].overlap else ""
    rows.append(["together", *(_seconds(start.total_s) for start in plan.starts), "", overlap])
    yield from _aligned(rows, left={0, len(rows[0]) - 2, len(rows[0]) - 1})


def _notes(plan: Plan) -> Iterator[str]:
    known = plan.shape
    allowed = "as given" if plan.wish.allowed_bytes is not None else "assumed"
    least, *_, most = sorted(fit.allowance_bytes / GIB for fit in plan.fits)
    yield (
        f"KV cache: {plan.wish.utilization:g} of a card's memory, less the weights and "
        f"{least:.1f} to {most:.1f} GiB for all else ({allowed}; --overhead-gib)."
    )
    yield "vLLM works on 256 sequences at once by default, on 1,024 from 70 GiB on (MAX_NUM_SEQS)."
    if known.perceives:
        yield "It has a part for pictures or sounds, which needs memory besides that is not counted here."
    if not known.unknown and not known.compared:
        yield f"Models of the type {known.model_type!r} were not compared with vLLM: by the general rule."


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _count(sequences: float) -> str:
    return f"{int(sequences):,}" if sequences else "-"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
