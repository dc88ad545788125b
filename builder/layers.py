"""What a model's layers keep of a sequence, from its config.json.

Source: `get_kv_cache_spec` of vLLM 0.32's layers, and how its models make them.
"""

from __future__ import annotations

from builder.config import Config
from builder.kv import CHUNKED, FULL, LATENT, SLIDING, Layers
from handler.errors import UsageError

MLA = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"})
"""Model types whose attention keeps one compressed vector of a token."""

_KINDS = {
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
}
_FULL_EVERY = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "olmo3": 4, "exaone4": 4, "gemma3n_text": 5} | {
    "gemma3_text": 6,
    "gemma4_text": 6,
}
"""Which layer of how many sees everything, where config.json does not list them."""
_MIXED = frozenset({*_FULL_EVERY, "llama", "llama4_text", "ministral3"})
"""Model types whose layers of several kinds are compared with vLLM's, which takes them for one in others."""
_ONE_MORE = frozenset({"cohere2"})
"""Model types whose window does not count the token itself."""

_STRANGE = (
    "mamba", "ssm", "conv_", "linear_", "lru_", "rwkv", "recurrent", "kv_lora_rank", "index_topk",
    "compress_ratios", "cross_attention", "rswa", "global_head_dim", "attention_chunk", "hybrid_",
    "block_configs", "per_layer_config", "swa_", "cla_", "state_size", "num_global_key_value_heads",
    "full_attn_idxs", "attn_layer", "attn_config", "attn_type_list", "v_head_dim", "num_kv_shared",
)  # fmt: skip
"""Beginnings of names after which a model may keep something other than keys and values."""
_WRITES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the names of architectures that write text, and so have a KV cache."""


class Unknown(Exception):
    """What a model keeps of a sequence is not known here: no error, the plan says so and goes on."""


def attention(config: Config, tensor_parallel: int, item_bytes: int) -> list[Layers]:
    """What one of `tensor_parallel` GPUs keeps for each kind of layer, in numbers of `item_bytes`.

    Raises `Unknown`, `BadModel` where config.json lacks a shape, `UsageError` where the heads can't
    be divided.
    """
    if config.whole.get("is_encoder_decoder"):
        raise Unknown("it has an encoder, whose output is kept as well")
    if config.get("index_topk") is not None:
        raise Unknown("sparse attention keeps an index besides, in a form that differs from GPU to GPU")
    heads = config.number("num_attention_heads")
    if heads == 0 or heads % tensor_parallel:
        raise UsageError(f"{heads} attention heads can't be divided among {tensor_parallel} GPUs")
    if config.model_type in MLA:
        return [_latent(config, item_bytes)]
    if not config.compared:
        _check_plain(config)
    return _by_kind(config, tensor_parallel, item_bytes)


def kinds(config: Config) -> list[str]:
    """`FULL`, `SLIDING` or `CHUNKED` for each layer that keeps something of its own."""
    count = config.number("num_hidden_layers")
    window = _window(config)
    if named := config.get("layer_types"):
        found = [_KINDS.get(name, "") for name in named]
        if "" in found:
            raise Unknown(f"it has layers of the kind {named[found.index('')]!r}")
        if not window:
            found = [FULL if kind == SLIDING else kind for kind in found]
    elif config.model_type == "llama4_text":
        found = _llama4_kinds(config, count)
    elif every := _full_every(config):
        found = [SLIDING if window and number % every else FULL for number in range(1, count + 1)]
    else:
        first = config.number("max_window_layers", 0)
        found = [SLIDING if window and number >= first else FULL for number in range(count)]
    if config.model_type == "gemma4_text":
        found[-1] = FULL
    if len(set(found)) > 1 and config.model_type not in _MIXED:
        raise Unknown(
            f"models of the type {config.model_type!r} with several kinds of layers are not known here"
        )
    return found[: count - config.number("num_kv_shared_layers", 0)]


def heads_kept(config: Config, tensor_parallel: int, name: str = "num_key_value_heads") -> int:
    """How many KV heads one GPU keeps. Raises `UsageError` where they can't be divided."""
    total = config.number(name, config.number("num_attention_heads"))
    if config.model_type == "gpt_bigcode" or (
        config.model_type == "falcon" and not config.get("new_decoder_architecture")
    ):
        total = 1 if config.get("multi_query") else config.number("num_attention_heads")
    if total % tensor_parallel and tensor_parallel % max(1, total):
        raise UsageError(f"{total} KV heads can't be divided among {tensor_parallel} GPUs")
    return max(1, total // tensor_parallel)


def number_of_layers(config: Config) -> int:
    """How many layers it has: said, or as many as are listed."""
    listed = config.get("hybrid_override_pattern") or config.get("layer_types") or ()
    return config.number("num_hidden_layers", len(listed) or None)


def head_dim(config: Config) -> int:
    """How many numbers a key has: said, or the hidden size by the number of heads."""
    said = config.number("head_dim", 0)
    return said or config.number("hidden_size") // config.number("num_attention_heads")


def _latent(config: Config, item_bytes: int) -> Layers:
    if config.get("kv_lora_rank") is None:
        raise Unknown("its attention is not latent, against its type's custom")
    # The same vector for all heads, so every GPU keeps it whole.
    width = config.number("kv_lora_rank") + config.number("qk_rope_head_dim")
    return Layers(LATENT, config.number("num_hidden_layers"), heads=1, width=width, item_bytes=item_bytes)


def _by_kind(config: Config, tensor_parallel: int, item_bytes: int) -> list[Layers]:
    found = kinds(config)
    heads, width = heads_kept(config, tensor_parallel), 2 * head_dim(config)
    window = _window(config) + (config.model_type in _ONE_MORE)
    chunk = config.number("attention_chunk_size", 0)
    every = [
        Layers(FULL, found.count(FULL), heads, width, item_bytes),
        Layers(SLIDING, found.count(SLIDING), heads, width, item_bytes, window),
        Layers(CHUNKED, found.count(CHUNKED), heads, width, item_bytes, chunk),
    ]
    if config.model_type == "gemma4_text":
        every[0] = _gemma4_full(config, found.count(FULL), tensor_parallel, item_bytes)
    return [layers for layers in every if layers.count]


def _gemma4_full(config: Config, count: int, tensor_parallel: int, item_bytes: int) -> Layers:
    """Its layers that see everything have fewer and wider heads."""
    own = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None
    name = "num_global_key_value_heads" if own else "num_key_value_heads"
    heads = heads_kept(config, tensor_parallel, name)
    return Layers(FULL, count, heads, 2 * config.number("global_head_dim", 512), item_bytes)


def _llama4_kinds(config: Config, count: int) -> list[str]:
    every = config.number("no_rope_layer_interval", 4)
    rope = config.get("no_rope_layers") or [number % every for number in range(1, count + 1)]
    return [CHUNKED if has and config.get("attention_chunk_size") else FULL for has in rope]


def _window(config: Config) -> int:
    """How many tokens a sliding layer looks back on; 0 where there is no window."""
    if config.get("use_sliding_window") is False:
        return 0
    return config.number("sliding_window", 0)


def _full_every(config: Config) -> int:
    if (every := _FULL_EVERY.get(config.model_type)) is None:
        return 0
    pattern = config.get("sliding_window_pattern", every)
    return len(pattern) if isinstance(pattern, str) else int(pattern)


def _check_plain(config: Config) -> None:
    """Raise `Unknown` where a model that was not compared may keep other things than keys and values."""
    if not config.architecture.endswith(_WRITES):
        raise Unknown(f"{config.architecture} is not known to write text")
    for name, value in config.text.items():
        if value not in (None, False, 0) and name.startswith(_STRANGE):
            raise Unknown(f"models of the type {config.model_type!r} with {name!r} are not known here")
