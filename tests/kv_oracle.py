"""What vLLM itself makes of models' config.json, without their weights: a process that is asked on stdin.

    {"name": ..., "config": {...}, "device": "meta", "cache_bytes": ..., "lengths": [...]}    a line each
    {"name": ..., "block_bytes": ..., "sequences": {...}, ...}

The models are made on torch's device `meta`, which has shapes and no memory, and then asked for the
specification of their KV cache as the engine asks them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from judge.servers import free_port

NAMES = {
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "UsageContext": "vllm.usage.usage_lib",
    "VllmConfig": "vllm.config",
    "set_current_vllm_config": "vllm.config",
    "initialize_model": "vllm.model_executor.model_loader.utils",
    "set_default_torch_dtype": "vllm.utils.torch_utils",
    "get_kv_cache_spec": "vllm.v1.worker.gpu.attn_utils",
    "current_platform": "vllm.platforms",
}


def vllm(name: str, module: str | None = None) -> Any:
    """A name of vLLM's."""
    return getattr(importlib.import_module(module or NAMES[name]), name)


def alone() -> None:
    """Have vLLM's layers find themselves in a group of one."""
    state: Any = importlib.import_module("vllm.distributed")
    with vllm("set_current_vllm_config")(vllm("VllmConfig")()):  # of no model, so that experts have one too
        state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        state.initialize_model_parallel(1, 1)


def configured(folder: Path, case: Mapping[str, Any]) -> Any:
    """vLLM's configuration for a case, on a CPU."""
    replacements: Any = importlib.import_module("handler.replacements")
    (folder / "config.json").write_text(json.dumps(case["config"]))
    replacements.register_model_class(str(folder))  # else a process of its own imports vLLM to inspect it
    args = vllm("AsyncEngineArgs")(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        **case.get("flags", {}),
    )
    return args.create_engine_config(usage_context=vllm("UsageContext").OPENAI_API_SERVER)


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM says of the case."""
    torch: Any = importlib.import_module("torch")
    utils: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")
    layouts: Any = importlib.import_module("vllm.v1.attention.backends.utils")
    with tempfile.TemporaryDirectory() as folder:
        config = configured(Path(folder), case)
        if not torch.distributed.is_initialized():
            alone()
        with vllm("set_current_vllm_config")(config):
            with vllm("set_default_torch_dtype")(config.model_config.dtype), torch.device(case["device"]):
                model = vllm("initialize_model")(config)
            vllm("current_platform").update_block_size_for_backend(config)
            specs = vllm("get_kv_cache_spec")(config)
            layers = config.compilation_config.static_forward_context
            backends = {layers[name].get_attn_backend() for name in specs}
            names = [layout.name for layout in layouts.get_supported_kv_cache_layouts(backends)]
            layouts.resolve_kv_cache_layout(config, [names], specs.values())
            made = utils.get_kv_cache_configs(config, [specs], [case["cache_bytes"]])
            whole = utils.generate_scheduler_kv_cache_config(made)
            longest, sequences = config.model_config.max_model_len, {}
            for length in case["lengths"]:
                config.model_config.max_model_len = length
                sequences[length] = utils.get_max_concurrency_for_kv_cache_config(config, whole)
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
    return {
        "name": case["name"],
        "block_bytes": made[0].kv_cache_tensors[0].size // made[0].num_blocks,
        "blocks": made[0].num_blocks,
        "sequences": sequences,
        "in_flight": config.max_in_flight_tokens,
        "max_model_len": longest,
        "weights_bytes": weights,
    }


def main() -> None:
    """Answer each line of stdin with one of stdout."""
    for line in sys.stdin:
        case = json.loads(line)
        try:
            found = answer(case)
        except Exception as error:  # noqa: BLE001 - the process's boundary: the test shows it
            found = {"name": case["name"], "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
