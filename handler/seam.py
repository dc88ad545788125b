"""Where in vLLM each thing is that the worker uses: no other file names its modules.

tests/integration/test_vllm_seam.py fails with the name, and with the signature that was found, when an
upgrade moves one of them (docs/vllm.md).
"""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any

from handler.errors import EngineFailed

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


def seam(name: str) -> Any:
    """The object of vLLM called `name`, from the first of its places that exists.

    Imports vLLM. Raises `EngineFailed` if it is at none of them.
    """
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


def touched_device() -> str | None:
    """Why this process can have no fork that uses a GPU, or None."""
    cuda: Any = importlib.import_module("torch.cuda")
    return "CUDA is initialised" if cuda.is_initialized() else None


def architecture() -> str | None:
    """The compute capability of the GPU, as `9.0`; None where there is none."""
    capability = seam("current_platform").get_device_capability()
    return None if capability is None else str(capability.as_version_str())
