"""What of vLLM and torch is replaced, while an engine starts or for good, and why.

docs/vllm.md lists it, with what each waits for to be gone.
"""

from __future__ import annotations

import copy
import importlib
import json
import mmap
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from handler.errors import EngineFailed
from handler.seam import seam


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` while the block runs."""
    theirs = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


def register_model_class(model_name: str) -> None:
    """Give vLLM the class of the model in the folder `model_name`, imported here.

    vLLM would inspect it in a process that imports vLLM first, so as not to initialise CUDA in
    this one, and keep the result in a cache that a first start does not have. To be called on a
    CPU only. A model that vLLM does not know is left for vLLM to refuse.
    """
    try:
        config = json.loads((Path(model_name).expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return
    registry = seam("ModelRegistry")
    for architecture in config.get("architectures") or ():
        if known := registry.models.get(architecture):
            registry.register_model(architecture, known.load_model_cls())


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


def skip_gloo_when_alone() -> None:
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
