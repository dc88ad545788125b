"""vLLM, loaded once per worker: the only file that imports it.

What is used of vLLM is little and named in `SEAM`; tests/integration/test_vllm_seam.py
fails with the name and the signature found when an upgrade moves one of them. vLLM's own
OpenAI application is hosted as it is and never re-implemented.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import hashlib
import importlib
import json
import logging
import math
import mmap
import os
import re
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeVar

import uvloop

from handler import (
    asgi,
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
    shortcuts,
    structure,
    traces,
    tracing,
)
from handler.core_thread import ThreadCoreClient
from handler.errors import BadSettings, EngineFailed, ModelNotFound, NoResources, StartError
from handler.flags import parse_flags
from handler.levers import pulled
from handler.messages import Call, Request, read
from handler.phases import Phases
from handler.settings import Settings
from handler.table import FALSE

log = logging.getLogger(__name__)

T = TypeVar("T")

SEAM: Mapping[str, tuple[str, ...]] = {
    # what it is: where 0.29 to 0.32 have it, then newer ones, then older ones
    "make_arg_parser": (
        "vllm.entrypoints.launchers.cli_args",
        "vllm.frontend.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "validate_parsed_serve_args": (
        "vllm.entrypoints.launchers.cli_args",
        "vllm.frontend.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "build_app": (
        "vllm.entrypoints.launchers.app",
        "vllm.frontend.entrypoints.launchers.app",
        "vllm.entrypoints.openai.api_server",
    ),
    "init_app_state": (
        "vllm.entrypoints.launchers.api_server.app_state",
        "vllm.frontend.entrypoints.launchers.api_server.app_state",
        "vllm.entrypoints.openai.api_server",
    ),
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils", "vllm.utils"),
    "AsyncEngineArgs": ("vllm.engine.arg_utils",),
    "AsyncLLM": ("vllm.v1.engine.async_llm",),
    "EngineCore": ("vllm.v1.engine.core",),
    "EngineCoreClient": ("vllm.v1.engine.core_client",),
    "EngineDeadError": ("vllm.v1.engine.exceptions",),
    "UsageContext": ("vllm.usage.usage_lib",),
    "ToolParserManager": ("vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers"),
    "ReasoningParserManager": ("vllm.reasoning",),
    "current_platform": ("vllm.platforms",),
    "Executor": ("vllm.v1.executor.abstract",),
    "allocate_kv_cache": ("vllm.v1.worker.utils",),
    "renderer_from_config": ("vllm.renderers",),
    "register_kernels": ("vllm.triton_utils.dispatcher",),
    "ModelRegistry": ("vllm.model_executor.models",),
    "ModelConfig": ("vllm.config",),
    "RayPrometheusStatLogger": ("vllm.v1.metrics.ray_wrappers",),
}
"""Every name of vLLM that the worker uses."""

LARGE_MODEL_BYTES = 64 << 20
CANARY_TIMEOUT_S = 600.0
CLOSE_GRACE_S = 10.0
"""What vLLM gets to end beyond the drain's deadline; then the process ends without it."""
TYPICAL_TOKENS = 4096
"""What a long prompt and its answer take of the KV cache."""


def seam(name: str) -> Any:
    """The object of vLLM called `name`, from the first of its places that exists."""
    for module in SEAM[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise EngineFailed(f"this vLLM has no {name} in any of {', '.join(SEAM[name])}; see docs/vllm.md")


def make_parser() -> ArgumentParser:
    """vLLM's own command-line parser: the list of its flags and what they may hold."""
    parser: ArgumentParser = seam("make_arg_parser")(seam("FlexibleArgumentParser")(prog="vllm"))
    return parser


@dataclass(frozen=True, slots=True)
class Prepared:
    """vLLM, imported and configured for `settings`: all that a start can do before it needs a device."""

    settings: Settings
    args: Namespace
    vllm_config: Any
    mode: str
    weights: loader.Choice
    shaping: Mapping[str, str]
    """What of the settings decides which caches are made and found."""
    renderer: Any = None
    """vLLM's front end for prompts, tokenizer included, where a warm parent has made it."""
    memories: tuple[kept.Memory, ...] = ()
    """What was taken from the last start, and is noted for the next."""


class Engine:
    """One model on one event loop of its own, in a thread of its own.

    `call` answers with vLLM's application; it must run on `loop` (see `submit`).
    """

    def __init__(
        self,
        settings: Settings,
        phases: Phases,
        environ: MutableMapping[str, str],
        prepared: Prepared | None = None,
        fit: Callable[[], None] = lambda: None,
        metrics_to_ray: bool = False,
    ) -> None:
        self._prepared = prepared
        self._fit = fit
        self._metrics_to_ray = metrics_to_ray
        self._settings = settings
        self._phases = phases
        self._environ = environ
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._closing = False
        self._llm: Any = None
        self._stop: asyncio.Event
        self.loop: asyncio.AbstractEventLoop
        self.mode = settings.engine_mode
        self.call: Call
        self._tasks: tuple[str, ...] = ()
        self._memories: tuple[kept.Memory, ...] = ()
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    def start(
        cls,
        settings: Settings,
        phases: Phases,
        environ: MutableMapping[str, str],
        prepared: Prepared | None = None,
        fit: Callable[[], None] = lambda: None,
        metrics_to_ray: bool = False,
    ) -> Self:
        """Begin to load the model; other things may be imported beside it.

        What is `prepared` already is not done again. `fit` is called before a device is touched,
        and may wait, and raise `StartError`. `metrics_to_ray`: vLLM tells its metrics to Ray, which
        runs this process, and not to Prometheus' registry.
        """
        if prepared is None:
            check(settings, environ)
        engine = cls(settings, phases, environ, prepared, fit, metrics_to_ray)
        engine._thread.start()
        return engine

    def wait_open(self) -> None:
        """Wait until a first token was made. Raises `StartError` if none can be."""
        self._opened.result()

    def save(self) -> None:
        """Write down what the next start can take from this one."""
        for memory in self._memories:
            memory.save()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @property
    def is_dead(self) -> bool:
        """Whether the engine died; it never comes back."""
        return self.dead.done()

    def running(self) -> int:
        """How many requests the engine holds, waiting and running."""
        core = getattr(self._llm.engine_core, "core", None)
        if core is not None:
            return sum(core.scheduler.get_request_counts())
        return int(self._llm.get_num_unfinished_requests())

    def capacity(self) -> int:
        """How many requests it works on at once: what a batch holds, and what the KV cache has room for.

        Room counts as `TYPICAL_TOKENS` each, or as a whole sequence where that is shorter: beyond
        that requests wait for each other here, while another worker may be idle.
        """
        config = self._llm.vllm_config
        batch = int(config.scheduler_config.max_num_seqs)
        tokens = math.prod(self.kv_cache().values() or (0,))
        if not tokens:  # a model without a KV cache
            return batch
        return max(1, min(batch, tokens // min(int(config.model_config.max_model_len), TYPICAL_TOKENS)))

    def kv_cache(self) -> dict[str, int]:
        """What the KV cache holds: `blocks` of `block_size` tokens each; empty for a model without one."""
        cache = self._llm.vllm_config.cache_config
        if not cache.num_gpu_blocks:
            return {}
        return {"blocks": int(cache.num_gpu_blocks), "block_size": int(cache.block_size)}

    def close(self) -> None:
        """Stop the engine and free the model; one that still opens is left to the end of the process."""
        self._closing = True
        if not self._opened.done():
            return  # nothing can interrupt vLLM while it loads
        if self._thread.is_alive() and self._opened.exception() is None:
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(self._settings.drain_timeout_s + CLOSE_GRACE_S)  # it may hang in a device

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            await self._open()
        except StartError as error:
            self._opened.set_exception(error)
            return
        except BaseException as error:  # noqa: BLE001 - the boundary of the start
            self._opened.set_exception(_start_error(error))
            return
        self._llm.output_handler.add_done_callback(self._died)
        self._opened.set_result(None)
        if not self._closing:
            await self._stop.wait()
        self._llm.shutdown(timeout=self._settings.drain_timeout_s)

    def _end_start(self) -> None:
        for memory in self._memories:
            memory.end()

    def _died(self, _: asyncio.Task[None]) -> None:
        # vLLM's output task ends when the engine is dead, in every mode, and in no other case.
        if not self._closing:
            log.error("engine died")
            self.dead.set_result(None)

    async def _open(self) -> None:
        phases = self._phases
        ready = self._prepared or prepare(self._settings, phases, self._environ)
        args, self.mode = ready.args, ready.mode
        self._memories = ready.memories
        os.register_at_fork(after_in_child=self._end_start)  # a core in a process of its own lives on
        theirs = args.otlp_traces_endpoint not in {None, traces.url(self._settings)}
        heard = None if theirs else tracing.listen(phases)
        if pulled("gc", self._environ):
            gc.freeze()  # vLLM collects five times while it loads; let it not walk what was imported
        self._fit()
        with phases.span("engine"):
            self._llm = build(ready, self._environ, metrics_to_ray=self._metrics_to_ray)
            tasks = self._tasks = await self._llm.get_supported_tasks()
        with phases.span("application"):
            app = seam("build_app")(args, tasks, self._llm.model_config)
            await seam("init_app_state")(self._llm, app.state, args, tasks)
            app.state.server = SimpleNamespace(should_exit=False)  # vLLM asks it to exit when the engine dies
            self.call = asgi.call_app(app, keep_alive_s=self._settings.keep_alive_s)
        with phases.span("first token"):
            await asyncio.wait_for(canary(self.call, tasks, self._settings.model_id), CANARY_TIMEOUT_S)
        gc.collect()
        gc.freeze()  # what was loaded stays: later collections need not look at it
        gc.enable()
        if heard is not None:
            heard()
        phases.done()
        self._end_start()
        phases.facts |= facts(ready, phases)


def check(settings: Settings, environ: MutableMapping[str, str]) -> None:
    """Raise `StartError` for what can be known to fail before the slow imports."""
    prerequisites.check()
    model.check(settings.model_name, environ)
    baked.check(settings.model_name, environ, full=settings.verify_weights == "full")


def touched_device() -> str | None:
    """Why this process can have no fork that uses a GPU, or None."""
    cuda: Any = importlib.import_module("torch.cuda")
    return "CUDA is initialised" if cuda.is_initialized() else None


def architecture() -> str | None:
    """The compute capability of the GPU, as `9.0`; None where there is none."""
    capability = seam("current_platform").get_device_capability()
    return None if capability is None else str(capability.as_version_str())


def settle(ready: Prepared) -> Prepared:
    """In a process that only forks: do once what every worker would repeat, on a CPU.

    What vLLM has replaced here is replaced in a fork, and the tokenizer is read.
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


def speak_to_nobody() -> None:
    """Have torch make groups of processes without gloo where this process is alone in them.

    gloo listens on a TCP port for each group, though nobody can come: 13 ports and threads, which a
    snapshot would take with it. A group of one needs no transport. To be called once torch was
    imported (its own name for such a group is "fake").
    """
    distributed: Any = importlib.import_module("torch.distributed")
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    make_first, make = distributed.init_process_group, distributed.new_group

    def alone(kwargs: dict[str, Any], size: int) -> dict[str, Any]:
        return {**kwargs, "backend": "fake"} if kwargs.get("backend") == "gloo" and size == 1 else kwargs

    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        return make_first(*args, **alone(kwargs, kwargs.get("world_size", 0)))

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return make(ranks, *args, **alone(kwargs, len(ranks or ())))

    distributed.init_process_group, distributed.new_group = init_process_group, new_group


def look_for_kernels_in_vllm() -> None:
    """Have vLLM look for the Triton kernels that it replaces on a CPU in its own modules only.

    It goes through the names of everything that was imported, 350,000 of them, 0.3 s.
    """
    try:
        dispatcher: Any = sys.modules[seam("register_kernels").__module__]
    except EngineFailed:  # an older vLLM, which replaces none
        return

    class OnlyVllm:
        @property
        def modules(self) -> dict[str, Any]:
            loaded = sys.modules.copy()  # at once: another thread may be importing
            return {name: module for name, module in loaded.items() if name.startswith("vllm.")}

    dispatcher.sys = OnlyVllm()


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
            register_model_class(settings.model_name)
        if on_cpu and pulled("kernels", environ):
            look_for_kernels_in_vllm()
        if on_cpu and not args.enforce_eager and pulled("aot", environ):
            accept_compiled_models()
        shaped = shaping(parser, args, mode, environ)  # before vLLM adds to its arguments
        for line in baked.unlike(settings.model_name, shaped):
            log.warning("a setting is not as when the model was baked", extra={"reason": line})
        vllm_config = configure(args, mode)
        if not args.enforce_eager and manifest.is_of_bake(Path(settings.model_name)):
            name_compiled_models(manifest.MODEL)
    return Prepared(settings, args, vllm_config, mode, weights, shaped, memories=memories)


def remember(environ: Mapping[str, str]) -> Iterator[kept.Memory]:
    """Take from the last start what Python would look for and compile again, from now on."""
    if pulled("pack", environ):
        modules = pack.Pack(pack.place(environ), time.time())
        modules.begin()
        yield modules
    if pulled("generated", environ):
        yield generated.keep(environ)


NOT_SHAPING = frozenset(
    {
        *("api_key", "chat_template", "config", "hf_token", "host", "model", "model_tag", "port", "revision"),
        *("served_model_name", "subparser", "tokenizer", "uds"),
        *(flag.replace("-", "_") for flag in loader.FLAGS),
    }
)
"""Flags (by `dest`) that no cache depends on, and secrets."""


def shaping(parser: ArgumentParser, args: Namespace, mode: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What of a start decides which caches it makes and finds: flags that are not vLLM's default, as text.

    Of a text that is no plain word, in which a password might be, its digest. And the compiler that is
    named, which torch has in its keys though nothing is compiled.
    """
    found = {
        name: _word(str(value))
        for name, value in vars(args).items()
        if name not in NOT_SHAPING and value != parser.get_default(name)
    }
    compiler = {name: environ[name] for name in ("CXX",) if environ.get(name)}
    return {**found, "engine_mode": mode, **compiler}


def _word(text: str) -> str:
    if re.fullmatch(r"[\w.-]{1,64}", text):
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def name_compiled_models(name: str) -> None:
    """Have vLLM know a compiled model by `name`, not by the folder that the model is in today.

    The key of its cache has every field of the model's configuration in it, so that a model which was
    moved is compiled again.
    """
    config = seam("ModelConfig")
    theirs = config.compute_hash

    def compute_hash(self: Any) -> Any:
        named = copy.copy(self)
        named.model = name
        return theirs(named)

    config.compute_hash = compute_hash


def facts(ready: Prepared, phases: Phases) -> dict[str, Any]:
    """What else a reader of a cold start wants to know."""
    weights_bytes = ready.weights.weights_bytes
    found: dict[str, Any] = {
        "engine_mode": ready.mode,
        "loader": f"{ready.weights.name}: {ready.weights.why}",
    }
    if ready.vllm_config.cache_config.kv_cache_memory_bytes:
        found["kv_cache_bytes"] = ready.vllm_config.cache_config.kv_cache_memory_bytes
    if weights_bytes:
        found["weights_bytes"] = weights_bytes
        if took_s := phases.wall_s("weights"):
            found["weights_gb_per_s"] = round(weights_bytes / took_s / 1e9, 2)
    if (expected_s := baked.expected_s(ready.settings.model_name)) is not None:
        found["expected_s"] = expected_s
    if ready.settings.levers_off:
        found["levers_off"] = list(ready.settings.levers_off)
    return found


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


def openmp(model: str, cores: int) -> dict[str, str]:
    """How OpenMP computes beside an event loop in the same process.

    Its threads spin between parallel regions: with one on every core the loop starves for
    seconds. A large model gets every core and threads that sleep instead; in a small one the
    regions are so short that waking a thread takes longer than its work, so a core stays free.
    """
    weights_bytes = sum(Path(file).stat().st_size for file in readahead.weights(model))
    if weights_bytes >= LARGE_MODEL_BYTES:
        return {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"}
    return {"OMP_NUM_THREADS": str(max(1, cores - 1))}


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


def register_model_class(model_name: str) -> None:
    """Give vLLM the class of the model in the folder `model_name`, imported here.

    vLLM would inspect it in a process that imports vLLM first, so as not to initialise CUDA in
    this one, and keep the result in a cache that a first start does not have. To be called on a
    CPU only. What vLLM does not know it is left to say itself.
    """
    try:
        config = json.loads((Path(model_name).expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return
    registry = seam("ModelRegistry")
    for architecture in config.get("architectures") or ():
        if known := registry.models.get(architecture):
            registry.register_model(architecture, known.load_model_cls())


def accept_compiled_models() -> None:
    """Have vLLM keep the compiled model that it finds in its cache, on a CPU.

    It calls `finalize_loading` on what it has loaded. On a CPU that is a plain function, which
    has no such method, so vLLM throws it away and compiles again. Gone once vLLM asks first.

    And torch compiles its headers, for 5 s, before it looks whether there is anything to compile.
    """
    compiler: Any = importlib.import_module("torch.compiler")
    load = compiler.load_compiled_function

    def load_with_end(*args: Any, **kwargs: Any) -> Any:
        codecache: Any = importlib.import_module("torch._inductor.codecache")
        with ExitStack() as stack:
            if hasattr(codecache, "_precompile_header"):
                stack.enter_context(replaced(codecache, "_precompile_header", lambda *_, **__: None))
            loaded = load(*args, **kwargs)
        function = loaded._artifacts.compiled_fn  # noqa: SLF001 - where vLLM looks
        if not hasattr(function, "finalize_loading"):
            function.finalize_loading = lambda *_: None
        return loaded

    compiler.load_compiled_function = load_with_end


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


def plan_kv_cache_bytes(vllm_config: Any, shared_by: int = 1) -> int:
    """How much memory to give the KV cache on a CPU, where vLLM would take most of it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    token = 2 * heads * model.get_head_size() * model.dtype.itemsize
    return machine.kv_cache_bytes(token * model.max_model_len, machine.free_memory_bytes() // shared_by)


def build(ready: Prepared, environ: Mapping[str, str], *, metrics_to_ray: bool = False) -> Any:
    """The engine. In `thread` mode its core runs in this process, else vLLM starts one."""
    args, vllm_config = ready.args, ready.vllm_config
    cache = vllm_config.cache_config
    planned = seam("current_platform").is_cpu() and cache.kv_cache_memory_bytes is None
    if planned and pulled("kvplan", environ):
        cache.kv_cache_memory_bytes = plan_kv_cache_bytes(vllm_config, ready.settings.shared_by)
        if pulled("kvlazy", environ):
            allocate_kv_cache_untouched()
    async_llm = seam("AsyncLLM")
    make = partial(
        async_llm.from_vllm_config,
        vllm_config,
        usage_context=seam("UsageContext").OPENAI_API_SERVER,
        stat_loggers=[seam("RayPrometheusStatLogger")] if metrics_to_ray else None,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    with ExitStack() as stack:
        if ready.renderer is not None:
            stack.enter_context(
                replaced(
                    sys.modules[async_llm.__module__], "renderer_from_config", lambda *_, **__: ready.renderer
                )
            )
        if ready.mode == "thread":
            core, executor = seam("EngineCore"), seam("Executor").get_class(vllm_config)
            client = ThreadCoreClient(
                lambda: core(vllm_config, executor, not args.disable_log_stats),
                partial(seam("EngineDeadError"), suppress_context=True),
            )
            if not pulled("overlap", environ):
                client.opened()
            # Else the weights are loaded while vLLM reads the tokenizer.
            clients = seam("EngineCoreClient")
            stack.enter_context(
                replaced(clients, "make_async_mp_client", staticmethod(lambda *_, **__: client.opened()))
            )
        return make()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` while the block runs."""
    theirs = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


def allocate_kv_cache_untouched() -> None:
    """Have vLLM's KV cache on a CPU be memory that no page of was touched yet.

    vLLM fills it with zeros, which has the kernel find every page at once: 0.4 s for a GiB and on a
    busy machine seconds, and the memory is gone though no token needs it. Fresh memory of the kernel
    is zero anyway. For a cache that was planned only: one that the user has sized is had at once, or
    the start fails.
    """
    try:
        module: Any = sys.modules[seam("allocate_kv_cache").__module__]
    except EngineFailed:  # an older vLLM, which allocates each layer by itself
        return
    torch: Any = importlib.import_module("torch")

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def zeros(self, *size: Any, **kwargs: Any) -> Any:
            if len(size) == 1 and isinstance(size[0], int) and kwargs.get("dtype") is torch.int8:
                return torch.frombuffer(mmap.mmap(-1, size[0]), dtype=torch.int8)
            return torch.zeros(*size, **kwargs)

    module.torch = Torch()


async def canary(call: Call, tasks: tuple[str, ...], model_id: str) -> dict[str, Any] | None:
    """Make a first token, or a first vector, through the real route; returns the answer.

    A chat where the model has a template, so that no client is the first to load it.
    """
    one = {"model": model_id, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    try:
        if "generate" in tasks:
            chat = {**one, "messages": [{"role": "user", "content": "Hello"}]}
            with suppress(_Refused):
                return await _asked(call, "/v1/chat/completions", chat)
            return await _asked(call, "/v1/completions", {**one, "prompt": "Hello"})
        if "embed" in tasks:
            return await _asked(call, "/v1/embeddings", {"model": model_id, "input": "Hello"})
    except _Refused as refused:
        raise EngineFailed(f"the engine started but answers {refused}") from None
    return None


class _Refused(Exception):
    """What was answered instead of a token."""


async def _asked(call: Call, path: str, body: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    async with call(Request("POST", path, (("content-type", "application/json"),), raw)) as reply:
        answer = await read(reply)
    if reply.status != 200:
        raise _Refused(f"{reply.status}: {answer.decode(errors='replace')[:500]}")
    found: dict[str, Any] = json.loads(answer)
    return found


def _start_error(error: BaseException) -> StartError:
    """The error that a person reads for what vLLM raised at its start."""
    for cause in _chain(error):
        kind = type(cause).__module__.partition(".")[0]
        if kind == "huggingface_hub" or (isinstance(cause, OSError) and "huggingface.co" in str(cause)):
            return _from(
                ModelNotFound(f"the model can't be had from Hugging Face: {_first_line(cause)}"), error
            )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return _from(NoResources(f"not enough memory: {_first_line(cause)}"), error)
    if type(error).__module__.startswith("pydantic"):  # vLLM's configuration: it can never start so
        return _from(BadSettings([f"vLLM: {' '.join(str(error).split())}"]), error)
    log.error("engine failed to start", exc_info=error)
    return _from(
        EngineFailed(f"the engine failed to start: {type(error).__name__}: {_first_line(error)}"), error
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _from(error: StartError, cause: BaseException) -> StartError:
    error.__cause__ = cause
    return error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
