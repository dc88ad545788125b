"""Write .runpod/hub.json and .runpod/tests.json anew: `python -m scripts.runpod_hub`.

RunPod's Hub makes a form of the first and runs the jobs of the second on each release:
https://docs.runpod.io/hub/publishing-guide. What the form says of the worker's settings comes from
their table, of vLLM's flags from vLLM's own parser. Where vLLM is not installed, the flags stay as
they are in the file.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from argparse import Action
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.seam import make_parser, seam
from handler.settings import DEFAULT_MODEL, TABLE
from handler.table import SWITCH, Setting

FOLDER = Path(__file__).parent.parent / ".runpod"
HUB, TESTS = FOLDER / "hub.json", FOLDER / "tests.json"

CUDA = ["13.0"]
"""What vLLM 0.32's wheel for GPUs is built for; drivers of an earlier version don't run it."""

FIRST_TEST_MS, TEST_MS = 600_000, 120_000
"""The first job waits for a machine, the image and the model."""

SHOWN: Mapping[str, str] = {
    "MODEL_NAME": "Model",
    "HF_TOKEN": "Hugging Face token",
    "SERVED_MODEL_NAME": "Name for clients",
    "MODEL_REVISION": "Model revision",
    "TOKENIZER_NAME": "Tokenizer",
    "CUSTOM_CHAT_TEMPLATE": "Chat template",
    "MAX_CONCURRENCY": "Jobs at once",
    "START_FAILURE": "If the worker can't start",
    "DRAIN_TIMEOUT_S": "Drain timeout (seconds)",
    "KEEP_ALIVE_S": "Keep-alive of streams (seconds)",
    "LOG_LEVEL": "Log level",
    "VLLM_CONFIG_FILE": "vLLM configuration file",
    "VLLM_EXTRA_ARGS": "More vLLM flags",
}
"""The worker's settings that the form has, and what it calls them."""

NOT_SHOWN = frozenset(
    {
        *(
            "HOST",
            "PORT",
            "PORT_HEALTH",
            "UDS",
            "API_KEY",
            "AUTH",
            "CORS_ORIGINS",
            "MAX_BODY_BYTES",
        ),  # no port
        *("PLATFORM", "ENGINE_MODE"),  # found
        *("API_KEYS_SECRET", "USAGE_TABLE", "ENDPOINT_ID", "LAMBDA_RESPONSE_MODE", "REPLY_TO"),  # of Lambda
        *("SQS_QUEUE_URL", "BATCH_INPUT", "BATCH_OUTPUT", "BATCH_TABLE"),  # of Lambda and SQS
        *("LIFELINE_FD", "NOTIFY_SOCKET", "SHARED_BY"),  # for a parent process
        "VERIFY_WEIGHTS",  # for a model in an image of one's own
        *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),  # a job has no trace
        *("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME"),
        *("LEVERS_OFF", "FOREIGN_NAMES"),  # for measurements, for environments that others share
    }
)
"""The settings that a queue endpoint has no use for."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of vLLM in the form. `low` and `high` are vLLM's own bounds, which its parser does not know.

    `unset` says what happens if it is left empty, where that is not vLLM's default: such a flag has
    no default in the form, because the form would set it.
    """

    name: str
    title: str
    note: str = ""
    low: float | None = None
    high: float | None = None
    unset: str = ""


_JSON = "As JSON, such as {}."

FLAGS = (
    Flag("MAX_MODEL_LEN", "Context length", "A number, 4k, or auto. If not set: what the model has."),
    Flag("TOOL_CALL_PARSER", "Tool call parser"),
    Flag("REASONING_PARSER", "Reasoning parser"),
    Flag("QUANTIZATION", "Quantization", "If not set: what the model's files say."),
    Flag("GPU_MEMORY_UTILIZATION", "Share of GPU memory", low=0.01, high=1),
    Flag("TENSOR_PARALLEL_SIZE", "Tensor parallel size", "The number of GPUs of a worker.", low=1, high=16),
    Flag("DTYPE", "Data type"),
    Flag("KV_CACHE_DTYPE", "Data type of the KV cache"),
    Flag("MAX_NUM_SEQS", "Sequences in a batch", low=1, high=8192),
    Flag("MAX_NUM_BATCHED_TOKENS", "Tokens in a batch", "A number, or 8k."),
    Flag("ENABLE_PREFIX_CACHING", "Prefix caching"),
    Flag("ENABLE_CHUNKED_PREFILL", "Chunked prefill"),
    Flag("ENFORCE_EAGER", "Eager mode"),
    Flag("PIPELINE_PARALLEL_SIZE", "Pipeline parallel size", low=1, high=16),
    Flag("ENABLE_EXPERT_PARALLEL", "Expert parallel"),
    Flag("CPU_OFFLOAD_GB", "Offload to CPU memory (GiB)", low=0, high=1024),
    Flag("LOAD_FORMAT", "Load format", unset="what fits where the files lie"),
    Flag("TOKENIZER_MODE", "Tokenizer mode", "mistral is for Mistral's own files."),
    Flag("TOKENIZER_REVISION", "Tokenizer revision"),
    Flag("TRUST_REMOTE_CODE", "Trust remote code"),
    Flag("ENABLE_AUTO_TOOL_CHOICE", "Automatic tool choice", unset="on with a tool call parser"),
    Flag(
        "DEFAULT_CHAT_TEMPLATE_KWARGS",
        "Arguments of the chat template",
        _JSON.format('{"enable_thinking": false}'),
    ),
    Flag("OVERRIDE_GENERATION_CONFIG", "Sampling defaults", _JSON.format('{"temperature": 0.6}')),
    Flag(
        "SPECULATIVE_CONFIG",
        "Speculative decoding",
        _JSON.format('{"method": "ngram", "num_speculative_tokens": 3}'),
    ),
    Flag("STRUCTURED_OUTPUTS_CONFIG", "Structured output", _JSON.format('{"backend": "xgrammar"}')),
    Flag("LIMIT_MM_PER_PROMPT", "Images, videos and sounds in a prompt", _JSON.format('{"image": 4}')),
    Flag("ENABLE_LORA", "LoRA"),
    Flag("LORA_MODULES", "LoRA adapters", _JSON.format('[{"name": "a", "path": "org/adapter"}]')),
    Flag("MAX_LORAS", "LoRA adapters in a batch", low=1, high=1024),
    Flag("MAX_LORA_RANK", "Highest LoRA rank"),
    Flag("RUNNER", "Runner", "pooling is for embeddings, rerank and score."),
    Flag("CONVERT", "Convert the model"),
    Flag(
        "HF_OVERRIDES",
        "Overrides of the model's configuration",
        _JSON.format('{"max_position_embeddings": 65536}'),
    ),
    Flag("MAX_LOGPROBS", "Most logprobs", "-1 is no limit.", low=-1, high=1_000_000),
    Flag("SEED", "Seed"),
    Flag("DISABLE_LOG_STATS", "No statistics in the log"),
)
"""The flags that users of such endpoints set. Any other works as a variable too (docs/settings.md)."""

FIRST = (
    "MODEL_NAME",
    "HF_TOKEN",
    "SERVED_MODEL_NAME",
    "MAX_MODEL_LEN",
    "TOOL_CALL_PARSER",
    "REASONING_PARSER",
)
"""What the form shows at once, in this order."""

PRESETS: Mapping[str, Mapping[str, str]] = {
    "SmolLM2 135M, to try it": {"MODEL_NAME": DEFAULT_MODEL},
    "Qwen3 8B": {
        "MODEL_NAME": "Qwen/Qwen3-8B",
        "MAX_MODEL_LEN": "32768",
        "TOOL_CALL_PARSER": "hermes",
        "REASONING_PARSER": "qwen3",
    },
    "Llama 3.1 8B Instruct (gated: needs a token)": {
        "MODEL_NAME": "meta-llama/Llama-3.1-8B-Instruct",
        "MAX_MODEL_LEN": "32768",
        "TOOL_CALL_PARSER": "llama3_json",
    },
    "gpt-oss 20B": {
        "MODEL_NAME": "openai/gpt-oss-20b",
        "MAX_MODEL_LEN": "65536",
        "TOOL_CALL_PARSER": "openai",
        "REASONING_PARSER": "openai_gptoss",
    },
}

_MESSAGES = [{"role": "user", "content": "Say hello."}]

JOBS: Mapping[str, Mapping[str, Any]] = {
    "openai_chat": {
        "openai_route": "/v1/chat/completions",
        "openai_input": {"model": DEFAULT_MODEL, "messages": _MESSAGES, "max_tokens": 16},
    },
    "openai_chat_stream": {
        "openai_route": "/v1/chat/completions",
        "openai_input": {"model": DEFAULT_MODEL, "messages": _MESSAGES, "max_tokens": 16, "stream": True},
    },
    "openai_models": {"openai_route": "/v1/models"},
    "route_completions": {
        "route": "/v1/completions",
        "method": "POST",
        "body": {"prompt": "The capital of France is", "max_tokens": 16},
    },
    "route_models": {"route": "/v1/models", "method": "GET"},
    "prompt": {"prompt": "The capital of France is", "sampling_params": {"max_tokens": 16, "temperature": 0}},
    "messages": {"messages": _MESSAGES, "sampling_params": {"max_tokens": 16}},
}
"""A job of each shape that `handler.jobs.parse` takes."""

Input = dict[str, Any]


def hub(flags: Mapping[str, Input]) -> dict[str, Any]:
    """The content of hub.json; `flags` are the inputs of `FLAGS`, by name."""
    rows = {row.name: _of_setting(row, SHOWN[row.name]) for row in TABLE if row.name in SHOWN}
    rows |= {flag.name: flags[flag.name] for flag in FLAGS}
    order = [*FIRST, *(name for name in rows if name not in FIRST)]
    return {
        "title": "firsttoken: vLLM",
        "description": "Any model that vLLM serves, behind OpenAI's API: exact errors, whole streams, "
        "cancellation that stops the GPU.",
        "type": "serverless",
        "category": "language",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": 100,
            "gpuIds": "AMPERE_48,ADA_48_PRO",
            "gpuCount": 1,
            "allowedCudaVersions": CUDA,
            "presets": [{"name": name, "defaults": dict(preset)} for name, preset in PRESETS.items()],
            "env": [{"key": name, "input": {**rows[name], "advanced": name not in FIRST}} for name in order],
        },
    }


def smoke() -> dict[str, Any]:
    """The content of tests.json."""
    return {
        "tests": [
            {"name": name, "input": dict(job), "timeout": TEST_MS if number else FIRST_TEST_MS}
            for number, (name, job) in enumerate(JOBS.items())
        ],
        "config": {
            "gpuTypeId": "NVIDIA GeForce RTX 4090",
            "gpuCount": 1,
            "env": [{"key": "MODEL_NAME", "value": DEFAULT_MODEL}],
            "allowedCudaVersions": CUDA,
        },
    }


def flags_of_vllm() -> dict[str, Input]:
    """The inputs of `FLAGS` as vLLM's parser has them. Call it before anything else has imported vLLM."""
    sys.argv.append("--help")  # vLLM collects what its flags mean for a help page only
    try:
        parser = make_parser()
    finally:
        sys.argv.pop()
    actions: dict[str, Action] = {
        option[2:].replace("-", "_").upper(): action
        for action in parser._actions  # noqa: SLF001 - argparse has no public list of what was added
        for option in action.option_strings
    }
    registered = {
        "TOOL_CALL_PARSER": seam("ToolParserManager").list_registered(),
        "REASONING_PARSER": seam("ReasoningParserManager").list_registered(),
    }
    return {flag.name: _of_flag(flag, actions[flag.name], registered.get(flag.name)) for flag in FLAGS}


def flags_of_file() -> dict[str, Input]:
    """The inputs of `FLAGS` as hub.json has them."""
    kept = {row["key"]: row["input"] for row in json.loads(HUB.read_text())["config"]["env"]}
    return {flag.name: kept[flag.name] for flag in FLAGS}


def as_environ(value: object) -> str:
    """`value` of a form as it is in the worker's environment."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def dump(content: Mapping[str, Any]) -> str:
    """`content` as the file has it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _of_setting(row: Setting, title: str) -> Input:
    made: Input = {"name": title, "type": "string", "description": _plain(row.help)}
    if row.name == "MODEL_NAME":
        made |= {"type": "huggingface", "required": True}
    elif row.secret:
        made["description"] += " Keep it in a RunPod secret: {{ RUNPOD_SECRET_name }}."
    elif row.kind is SWITCH:
        made |= _switch()
    elif row.kind.names:
        made["options"] = _options(row.kind.names, optional=row.default is None)
    elif row.kind.low is not None:
        made |= {"type": "number", "min": row.kind.low, "max": row.kind.high}
    if row.default is not None:
        made["default"] = json.loads(row.default) if made["type"] == "number" else row.default
    elif "options" in made:
        made["default"] = ""
    return made


def _of_flag(flag: Flag, action: Action, registered: list[str] | None) -> Input:
    note = flag.note or (f"If not set: {flag.unset}." if flag.unset else "")
    made: Input = {"name": flag.title, "type": "string", "description": f"{_sentence(action)} {note}".strip()}
    default = None if flag.unset else action.default
    names = [str(choice) for choice in action.choices or registered or ()]
    if action.nargs == 0 and default is None:
        made["options"] = _options(["true", "false"], optional=True)
    elif action.nargs == 0:
        made |= _switch()
    elif names:
        made["options"] = _options(sorted(names) if registered else names, optional=not default)
    elif action.type in {int, float}:
        made["type"] = "number"
        made |= {key: bound for key, bound in (("min", flag.low), ("max", flag.high)) if bound is not None}
    if isinstance(default, bool | int | float | str) and default != "":
        made["default"] = str(default) if names else default
    elif "options" in made:
        made["default"] = ""
    return made


def _switch() -> Input:
    return {"type": "boolean", "trueValue": "true", "falseValue": "false"}


def _options(names: list[str] | tuple[str, ...], *, optional: bool) -> list[dict[str, str]]:
    unset = [{"label": "not set", "value": ""}] if optional else []
    return [*unset, *({"label": name, "value": name} for name in names)]


def _sentence(action: Action) -> str:
    """The first sentence of the help of `action`."""
    help_text = " ".join((action.help or "").replace("%%", "%").partition("\n\n")[0].split())
    return _plain(re.split(r"(?<=[.:])\s", help_text)[0].removesuffix(":").removesuffix(".") + ".")


def _plain(text: str) -> str:
    return re.sub(r"\[([\w.]+)\]\[\]", r"\1", text).replace("`", "")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    HUB.write_text(dump(hub(flags_of_vllm() if importlib.util.find_spec("vllm") else flags_of_file())))
    TESTS.write_text(dump(smoke()))
