"""Imports and configures vLLM: all that a start can do before it needs a device.

A worker does it itself, or is forked by a parent that has done it (`handler.warm`).
"""

from __future__ import annotations

import logging
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler import (
    baked,
    caches,
    generated,
    kept,
    loader,
    machine,
    manifest,
    model,
    pack,
    prerequisites,
    readahead,
    replacements,
    shortcuts,
    structure,
    traces,
)
from handler.errors import EngineFailed
from handler.flags import parse_flags
from handler.levers import pulled
from handler.openmp import openmp
from handler.phases import Phases
from handler.seam import make_parser, seam
from handler.settings import Settings
from handler.shaping import shaping
from handler.table import FALSE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """vLLM, imported and configured for `settings`: all that a start can do before it needs a device."""

    settings: Settings
    args: Namespace
    vllm_config: Any
    mode: str
    """Where the engine core runs: `thread`, `fork` or `spawn`."""
    weights: loader.Choice
    shaping: Mapping[str, str]
    """What decides which caches are made and found (`handler.shaping`)."""
    renderer: Any = None
    """vLLM's front end for prompts, tokenizer included, where a warm parent has made it."""
    memories: tuple[kept.Memory, ...] = ()
    """What was taken from the last start, and is noted for the next."""


def check(settings: Settings, environ: MutableMapping[str, str]) -> None:
    """Raise `StartError` for what can be known to fail before the slow imports."""
    prerequisites.check()
    model.check(settings.model_name, environ)
    baked.check(settings.model_name, environ, full=settings.verify_weights == "full")


def prepare(settings: Settings, phases: Phases, environ: MutableMapping[str, str]) -> Prepared:
    """Import vLLM and configure it. Touches no device, so a process may fork after it.

    Raises `StartError`, or what vLLM raises for a configuration that it refuses.
    """
    memories = tuple(remember(environ))
    with phases.span("import vllm"):
        before_import(environ, settings)
        parser = make_parser()
        seam("AsyncLLM")
        platform = seam("current_platform")
        on_cpu = platform.is_cpu()
        mode = resolve_mode(settings.engine_mode, on_cpu=on_cpu, in_process=pulled("inprocess", environ))
    with phases.span("config"):
        weights = loader.choose(
            settings, accelerator="cuda" if platform.is_cuda() else "rocm" if platform.is_rocm() else None
        )
        args = read_flags(parser, settings, [*weights.flags, *traced(environ, settings)])
        inspects = not (on_cpu and pulled("modelinfo", environ))
        lacking = caches.missing(
            environ, inspects=inspects, compiles=not args.enforce_eager, files=readahead.place(environ)
        )
        for cache in lacking:
            log.warning("%s", cache)
        if not inspects:
            replacements.register_model_class(settings.model_name)
        if on_cpu and pulled("kernels", environ):
            replacements.look_for_kernels_in_vllm()
        if on_cpu and not args.enforce_eager and pulled("aot", environ):
            replacements.accept_compiled_models()
        shaped = shaping(parser, args, mode, environ)  # before vLLM adds to its arguments
        for line in baked.unlike(settings.model_name, shaped):
            log.warning("a setting is not as when the model was baked", extra={"reason": line})
        vllm_config = configure(args, mode)
        if not args.enforce_eager and manifest.is_of_bake(Path(settings.model_name)):
            replacements.name_compiled_models(manifest.MODEL)
    return Prepared(settings, args, vllm_config, mode, weights, shaped, memories=memories)


def remember(environ: Mapping[str, str]) -> Iterator[kept.Memory]:
    """Begin to take from the last start what Python would otherwise look for and compile again.

    Yields each of the memories that are on.
    """
    if pulled("pack", environ):
        modules = pack.Pack(pack.place(environ), time.time())
        modules.begin()
        yield modules
    if pulled("generated", environ):
        yield generated.keep(environ)


def before_import(environ: MutableMapping[str, str], settings: Settings) -> None:
    """Set what vLLM and torch read from the environment as they load, where the user has not."""
    if pulled("structure", environ):
        structure.keep(environ)
    if pulled("inductor", environ):
        shortcuts.import_inductor_later()
    if pulled("sources", environ):
        shortcuts.name_sources_by_frame()
    if pulled("distributions", environ):
        shortcuts.keep_distributions(environ)
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry unless it is asked for
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # vLLM warns of a dozen things at each start that are as they should be here.
    environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if log.isEnabledFor(logging.DEBUG) else "ERROR")
    logging.getLogger("vllm").setLevel(environ["VLLM_LOGGING_LEVEL"])  # until vLLM has read the same
    if machine.has_accelerator():
        return
    if settings.shared_by > 1:
        # Where each rank is a process, vLLM binds it to cores, the same ones in each worker.
        environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if settings.engine_mode != "spawn" and "OMP_NUM_THREADS" not in environ:
        environ.update(openmp(settings.model_name, max(1, machine.cores() // settings.shared_by)))
    eager = settings.rest.get("ENFORCE_EAGER", "").lower() not in FALSE
    if eager and "enforce-eager" not in (settings.vllm_extra_args or ""):
        # An eager vLLM compiles a helper of logprobs all the same, at the first request that asks for
        # them: half a minute, and without a C++ compiler the end of the engine.
        environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def resolve_mode(mode: str, *, on_cpu: bool, in_process: bool) -> str:
    """`auto` is a thread on the CPU and a forked process on a GPU.

    `spawn` imports vLLM once more in every process it starts: it is the fallback where a fork
    does not work, and what is measured against.
    """
    if mode == "auto":
        mode = "spawn" if not in_process else "thread" if on_cpu else "fork"
    if mode == "spawn":
        log.warning(
            "ENGINE_MODE=spawn: each process of the engine imports vLLM once more, about 5 s and 0.6 GB"
        )
    return mode


def traced(environ: MutableMapping[str, str], settings: Settings) -> list[str]:
    """vLLM's flags for spans of its own in the traces that `settings` want."""
    if (url := traces.url(settings)) is None:
        return []
    environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")  # else vLLM speaks gRPC
    return ["--otlp-traces-endpoint", url]


def read_flags(parser: ArgumentParser, settings: Settings, defaults: Sequence[str] = ()) -> Namespace:
    """vLLM's arguments. Raises `BadSettings` with every fault that its parser or checks find."""
    # On a CPU a compile costs a minute and a C++ compiler, and an eager model 20 % of the tokens
    # (docs/decisions/0004-engine-in-process.md). ENFORCE_EAGER=false brings the compiler back.
    eager = ["--enforce-eager"] if seam("current_platform").is_cpu() else []
    return parse_flags(parser, settings, defaults=[*eager, *defaults], checks=flag_checks())


def flag_checks() -> list[Callable[[Namespace], object]]:
    """What can be wrong with vLLM's arguments that its parser does not see."""
    return [check_parsers, seam("validate_parsed_serve_args")]


def check_parsers(args: Namespace) -> None:
    """Load the parser plugins; raise `ValueError` for a tool or reasoning parser that is none."""
    tools, reasoning = seam("ToolParserManager"), seam("ReasoningParserManager")
    if args.tool_parser_plugin:
        tools.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        reasoning.import_reasoning_parser(args.reasoning_parser_plugin)
    faults = []
    for name, given, known in (
        ("TOOL_CALL_PARSER", args.tool_call_parser, tools.list_registered()),
        ("REASONING_PARSER", args.reasoning_parser, reasoning.list_registered()),
    ):
        if given and given not in known:
            faults.append(f"{name}={given!r} is no parser of vLLM's; there are {', '.join(sorted(known))}")
    if faults:
        raise ValueError("; ".join(faults))


def configure(args: Namespace, mode: str) -> Any:
    """vLLM's whole configuration for `args`."""
    engine_args = seam("AsyncEngineArgs").from_cli_args(args)
    if mode == "thread":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the CPU platform starts a process per rank
        if engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size == 1:
            engine_args.distributed_executor_backend = "uni"  # also where an image of worker-vllm's says mp
    vllm_config = engine_args.create_engine_config(usage_context=seam("UsageContext").OPENAI_API_SERVER)
    if mode == "fork":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the CPU platform has just set spawn
    return vllm_config


def settle(ready: Prepared) -> Prepared:
    """Do once, in a process that only forks, what every worker on a CPU would repeat.

    vLLM's kernels are registered and the tokenizer is read; a fork has both. Returns `ready`, with its
    renderer where that can be made here.
    """
    platform = seam("current_platform")
    if not platform.is_cpu() or ready.renderer is not None:
        return ready
    if override := getattr(platform, "register_triton_kernel_overrides", None):
        override()
        platform.register_triton_kernel_overrides = lambda: None
    try:
        return replace(ready, renderer=seam("renderer_from_config")(ready.vllm_config))
    except EngineFailed:  # an older vLLM, whose front end is made otherwise
        return ready
