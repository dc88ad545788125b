"""What a plan says beside what vLLM says: of every kind of model without weights, of two real ones with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from builder.config import NOT_COMPARED, families
from builder.kv import LATENT, pool
from builder.plan import (
    CPU_BATCH_TOKENS,
    CPU_BLOCK_TOKENS,
    CPU_LATENT_BLOCK_TOKENS,
    Plan,
    Wish,
    plan,
)
from builder.shapes import Asked, shape
from scripts.model_families import FILE, text
from tests import servers
from tests.configs import DEEPSEEK_V3, GEMMA3_4B, LLAMA_8B, MISTRAL_7B, QWEN3_06B, QWEN3_NEXT

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")

ORACLE_TIMEOUT_S = 170.0
CACHE_BYTES = 1 << 40
LENGTHS = (1000, 2048, 8192, 32768)
FLOAT32_BYTES = 4
"""What vLLM keeps the numbers of a state in on a CPU that computes in bfloat16."""

SMALL = {"num_hidden_layers": 7}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 10,
    "vocab_size": 512,
}
"""For classes of vLLM's that want real memory."""

ARCHITECTURES = {
    "arcee": "Arcee", "cohere": "Cohere", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
    "ernie4_5": "Ernie4_5", "ernie4_5_moe": "Ernie4_5_Moe", "falcon": "Falcon", "gemma": "Gemma",
    "glm": "Glm", "glm4": "Glm4", "gpt_neox": "GPTNeoX", "granite": "Granite", "granitemoe": "GraniteMoe",
    "llama": "Llama", "llama4_text": "Llama4", "ministral3": "Mistral", "mistral": "Mistral",
    "mixtral": "Mixtral", "olmo": "Olmo", "olmo2": "Olmo2", "olmoe": "Olmoe", "opt": "OPT", "phi": "Phi",
    "phi3": "Phi3", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
    "seed_oss": "SeedOss", "smollm3": "SmolLM3", "stablelm": "StableLm", "starcoder2": "Starcoder2",
    "cohere2": "Cohere2", "exaone4": "Exaone4", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
    "gemma4_text": "Gemma4", "gpt_oss": "GptOss", "olmo3": "Olmo3", "falcon_h1": "FalconH1",
    "falcon_mamba": "FalconMamba", "jamba": "Jamba", "mamba": "Mamba", "mamba2": "Mamba2",
    "qwen3_next": "Qwen3Next",
}  # fmt: skip
"""Those whose config.json needs to say nothing: all of it is the defaults of their class."""

SAYING: Mapping[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {**TINY, "device": "cpu"}),
    "bloom": ("Bloom", {"n_layer": 4, "n_head": 8, "hidden_size": 512, "device": "cpu"}),
    "dots1": (
        "Dots1",
        {
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "scoring_func": "noaux_tc",
        },
    ),
    "gemma3n_text": (
        "Gemma3n",
        {
            **TINY,
            "head_dim": 64,
            "num_kv_shared_layers": 4,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "device": "cpu",
        },
    ),
    "glm4_moe": ("Glm4Moe", {"head_dim": 128}),
    "glm4_moe_lite": ("Glm4MoeLite", {"first_k_dense_replace": 1}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_bigcode": ("GPTBigCode", {}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 3 + ["attention"],
            "num_hidden_layers": 10,
            "num_key_value_heads": 8,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": ["conv", "conv", "full_attention"] * 5,
            "num_hidden_layers": 15,
            "block_dim": 2560,
            "block_ff_dim": 12288,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "conv_dim": 2560,
            "conv_bias": False,
        },
    ),
    "lfm2_moe": ("Lfm2Moe", {"layer_types": ["conv", "full_attention"] * 5, "num_hidden_layers": 10}),
    "nemotron": ("Nemotron", {"num_key_value_heads": 8}),
    "nemotron_h": ("NemotronH", {"hybrid_override_pattern": "M-M*-M-M*-", "num_hidden_layers": None}),
}
"""Those whose class lacks a default that vLLM needs, or that want little memory."""

REAL: Mapping[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA_8B,
    "Qwen3-0.6B": QWEN3_06B,
    "Mistral-7B": MISTRAL_7B,
    "Gemma-3-4B": {
        **GEMMA3_4B["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-V3, 6 layers": {
        **{name: value for name, value in DEEPSEEK_V3.items() if name != "quantization_config"},
        "num_hidden_layers": 6,
    },
    "Qwen3-Next, 12 layers": {**QWEN3_NEXT, "num_hidden_layers": 12},
    "Ministral 3 with an alternating window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "ministral3",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 3,
        "num_hidden_layers": 9,
        "sliding_window": 300,
    },
    "Llama with an alternating window": {
        **LLAMA_8B,
        "layer_types": ["sliding_attention", "full_attention"] * 16,
        "sliding_window": 512,
    },
}
"""As published, but for a few that are cut short."""


def cases() -> Iterator[dict[str, Any]]:
    """What vLLM is asked."""
    common = {"device": "meta", "cache_bytes": CACHE_BYTES, "lengths": LENGTHS}
    said = {name: (short, SMALL) for name, short in ARCHITECTURES.items()} | dict(SAYING)
    for name, (short, values) in said.items():
        architecture = short if short.endswith("Model") else f"{short}ForCausalLM"
        kept = {key: value for key, value in {**SMALL, **values}.items() if key != "device"}
        if "n_layer" in kept:
            del kept["num_hidden_layers"]
        config = {"model_type": name, "architectures": [architecture], **kept}
        yield {"name": name, "config": config, **common, "device": values.get("device", "meta")}
    for name, config in REAL.items():
        yield {"name": name, "config": config, **common}
    fp8 = {"kv_cache_dtype": "fp8"}
    yield {"name": "Llama-3.1-8B in fp8", "config": LLAMA_8B, "flags": fp8, **common}


CASES = {case["name"]: case for case in cases()}


@pytest.fixture(scope="module")
def vllm_says(default_model: Path, tiny_model: Path) -> dict[str, dict[str, Any]]:
    """What vLLM makes of each case, and of the two real models, in one process that imports it once."""
    folders = {"default": default_model, "tiny": tiny_model}
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}
    asked = [
        *CASES.values(),
        *(
            {"name": name, "config": config, "device": "meta", "cache_bytes": CACHE_BYTES, "lengths": [1024]}
            for name, config in configs.items()
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kv_oracle"],
        input="\n".join(map(json.dumps, asked)),
        capture_output=True,
        text=True,
        check=True,
        timeout=ORACLE_TIMEOUT_S,
        cwd=servers.ROOT,
    )
    answers = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {answer["name"]: answer for answer in answers}


@pytest.mark.parametrize("name", CASES)
def test_sequences_are_vllm_s(name: str, vllm_says: dict[str, dict[str, Any]]) -> None:
    """Blocks, the longest sequence, and how many of four lengths have room: exactly, for every type."""
    case, theirs = CASES[name], vllm_says[name]
    assert "error" not in theirs, theirs["error"]
    flags = case.get("flags", {})
    known = shape(
        case["config"], Asked(kv_cache_dtype=flags.get("kv_cache_dtype", "auto")), (), FLOAT32_BYTES
    )
    latent = any(layers.kind == LATENT for layers in known.layers)
    block_tokens = CPU_LATENT_BLOCK_TOKENS if latent else CPU_BLOCK_TOKENS
    made = pool(known.layers, block_tokens=block_tokens, in_flight=CPU_BATCH_TOKENS)
    assert made is not None
    # Latent attention on a CPU computes a prompt in one step, however long it is.
    assert latent or made.in_flight == theirs["in_flight"]
    assert {
        "block_bytes": made.block_bytes,
        "blocks": CACHE_BYTES // made.block_bytes,
        "max_model_len": known.max_model_len,
        "sequences": {str(length): made.sequences(CACHE_BYTES, length) for length in LENGTHS},
    } == {
        "block_bytes": theirs["block_bytes"],
        "blocks": theirs["blocks"],
        "max_model_len": theirs["max_model_len"],
        "sequences": theirs["sequences"],
    }


def test_every_type_that_counts_as_compared_is() -> None:
    """No type is in the list of defaults for nothing."""
    compared = {case["config"]["model_type"] for case in CASES.values()}
    assert compared == set(families()) - NOT_COMPARED


def test_defaults_are_those_of_transformers() -> None:
    """`python -m scripts.model_families` would write the same file."""
    assert FILE.read_text() == text()


def engine_says(server: servers.Server) -> dict[str, str]:
    """What a worker's engine tells of its KV cache on /metrics."""
    transport = httpx.HTTPTransport(uds=str(server.uds))
    with httpx.Client(transport=transport, timeout=60) as client:
        metrics = client.get("http://worker/metrics").text
    (line,) = (line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{"))
    return dict(re.findall(r'(\w+)="([^"]*)"', line))


def planned(folder: Path) -> Plan:
    """The plan of a model that is served as the tests do."""
    wish = Wish(Asked(max_model_len=servers.MAX_MODEL_LEN))
    return plan(str(folder), None, wish, {})


def check(made: Plan, told: Mapping[str, str]) -> None:
    """The cache's bytes, bytes per token, and maximum concurrency are what the running engine has."""
    cache_bytes = int(told["kv_cache_memory_bytes"])
    slots = int(told["num_gpu_blocks"]) * int(told["block_size"])
    assert made.cpu is not None
    assert made.cpu.kv_cache_bytes == cache_bytes
    assert made.token_bytes == cache_bytes / slots
    assert made.cpu.sequences == {servers.MAX_MODEL_LEN: float(told["kv_cache_max_concurrency"])}


def test_the_running_engine_of_the_small_model_has_what_was_planned(
    stack: servers.Stack, tiny_model: Path, vllm_says: dict[str, dict[str, Any]]
) -> None:
    """1,024 bytes a token, 64 MiB, 64 sequences of 1,024 tokens; and the weights to the byte."""
    made = planned(tiny_model)
    check(made, engine_says(stack.worker))
    assert made.loaded_bytes == vllm_says["tiny"]["weights_bytes"]


def test_the_running_engine_of_the_default_model_has_what_was_planned(
    default_model: Path, vllm_says: dict[str, dict[str, Any]]
) -> None:
    """SmolLM2: 23,040 bytes a token, room for 32 sequences; files and weights to the byte."""
    made = planned(default_model)
    with servers.worker(servers.engine_environ(default_model)) as worker:
        check(made, engine_says(worker.server))
        started = re.search(r"cold start (\{.*\})", worker.errors.read_text())
    assert started is not None
    assert made.weights.files_bytes == json.loads(started[1])["facts"]["weights_bytes"]
    assert made.loaded_bytes == vllm_says["default"]["weights_bytes"]
