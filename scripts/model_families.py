"""Writes builder/families.json: what transformers takes for what a config.json leaves out.

`python -m scripts.model_families`, where vLLM is installed. tests/integration/test_plan_vllm.py fails
when the file is not what this would write.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "builder/families.json"

TYPES = (
    # every layer alike
    "apertus", "arcee", "bloom", "cohere", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5",
    "ernie4_5_moe", "falcon", "gemma", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode",
    "gpt_neox", "granite", "granitemoe", "llama", "llama4_text", "mistral", "ministral3", "mixtral",
    "nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
    # some with a window
    "cohere2", "exaone4", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "olmo3",
    # some or all with a state
    "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
)  # fmt: skip
"""The model types whose layers are compared with vLLM's."""

KEYS = (
    "attention_chunk_size", "attention_k_eq_v", "attn_layer_offset", "attn_layer_period", "conv_L_cache",
    "conv_dim", "conv_kernel", "expand", "full_attn_idxs", "global_head_dim", "head_dim", "hidden_size",
    "intermediate_size", "kv_lora_rank", "linear_conv_kernel_dim", "linear_key_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "mamba_d_conv",
    "mamba_d_head", "mamba_d_ssm", "mamba_d_state", "mamba_expand", "mamba_head_dim", "mamba_n_groups",
    "mamba_n_heads", "mamba_num_heads", "mamba_ssm_cache_dtype", "mamba_ssm_dtype",
    "max_position_embeddings", "max_window_layers", "moe_intermediate_size", "multi_query", "n_groups",
    "new_decoder_architecture", "no_rope_layer_interval", "num_attention_heads", "num_experts_per_tok",
    "num_heads", "num_hidden_layers", "num_key_value_heads", "num_kv_shared_layers", "qk_rope_head_dim",
    "sliding_window", "sliding_window_pattern", "ssm_state_size", "state_size", "use_sliding_window",
    "vocab_size",
)  # fmt: skip
"""What is read of a config.json, where a type has a default for it."""


def defaults() -> dict[str, dict[str, Any]]:
    """Of each type, the defaults of its class that are numbers, words and switches, none derived."""
    auto: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(TYPES):
        cls = auto.CONFIG_MAPPING[name]
        taken = {key: getattr(cls, cls.attribute_map.get(key, key), None) for key in KEYS}
        found[name] = {key: value for key, value in taken.items() if isinstance(value, (bool, int, str))}
    return found


def text() -> str:
    """The file: a line for each model type."""
    lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in defaults().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text())
