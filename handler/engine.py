"""vLLM, loaded once per worker, on an event loop and in a thread of its own.

vLLM's own OpenAI application is hosted as it is and never re-implemented.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any, Self, TypeVar

import uvloop

from handler import asgi, baked, kept, machine, traces, tracing
from handler.canary import CANARY_TIMEOUT_S, canary
from handler.core_thread import ThreadCoreClient
from handler.diagnosis import start_error
from handler.errors import StartError
from handler.levers import pulled
from handler.messages import Call
from handler.phases import Phases
from handler.preparation import Prepared, check, prepare
from handler.replacements import allocate_kv_cache_untouched, replaced
from handler.seam import seam
from handler.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_GRACE_S = 10.0
"""Seconds that vLLM has to shut down, beyond the drain's deadline; then the process ends without it."""
TYPICAL_TOKENS = 4096
"""Tokens of the KV cache that a long prompt and its answer take."""


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
            self._opened.set_exception(start_error(error))
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
            theirs = sys.modules[async_llm.__module__]
            stack.enter_context(replaced(theirs, "renderer_from_config", lambda *_, **__: ready.renderer))
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


def plan_kv_cache_bytes(vllm_config: Any, shared_by: int = 1) -> int:
    """How much memory to give the KV cache on a CPU, where vLLM would take most of it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    token = 2 * heads * model.get_head_size() * model.dtype.itemsize
    return machine.kv_cache_bytes(token * model.max_model_len, machine.free_memory_bytes() // shared_by)


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
