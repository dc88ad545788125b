"""What models keep of a sequence, against figures that were worked out by hand from their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from builder.kv import FULL, LATENT, SLIDING, STATE, Layers, Pool, pool
from builder.shapes import Asked, Shape, shape
from handler.errors import BadModel, UsageError
from tests.configs import DEEPSEEK_V3, GEMMA3_4B, LLAMA_8B, LLAVA_7B, MISTRAL_7B, QWEN3_06B, QWEN3_NEXT


def of(config: dict[str, Any], asked: Asked = Asked(), **changed: Any) -> Shape:  # noqa: B008 - frozen
    """The shape of `config` with some values changed."""
    return shape({**config, **changed}, asked)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """`config` as if it did not say `names`."""
    return {name: value for name, value in config.items() if name not in names}


def token_bytes(found: Shape) -> int:
    """What all layers keep of a token on one GPU."""
    return sum(layers.count * layers.token_bytes for layers in found.layers)


def blocks(found: Shape, *, block_tokens: int = 16, in_flight: int = 4096) -> Pool:
    """Its pool, on a card whose steps have 2,048 tokens."""
    made = pool(found.layers, block_tokens=block_tokens, in_flight=in_flight)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # keys and values: layers x KV heads x head x 2 x 2 bytes
        pytest.param(LLAMA_8B, 32 * 8 * (4096 // 32) * 2 * 2, id="llama"),
        pytest.param(QWEN3_06B, 28 * 8 * 128 * 2 * 2, id="a head that is not hidden size by heads"),
        pytest.param({**LLAMA_8B, "num_key_value_heads": 1}, 32 * 1 * 128 * 2 * 2, id="one KV head"),
        pytest.param(without(LLAMA_8B, "num_key_value_heads"), 32 * 32 * 128 * 2 * 2, id="no grouping"),
        # the defaults of the type: 32 layers, 32 heads, 4,096 wide
        pytest.param(LLAVA_7B, 32 * 32 * (4096 // 32) * 2 * 2, id="a nested text_config that leaves all out"),
        # one vector: layers x (rank + rotary part) x 2 bytes
        pytest.param(DEEPSEEK_V3, 61 * (512 + 64) * 2, id="latent attention"),
    ],
)
def test_bytes_of_a_token(config: dict[str, Any], expected: int) -> None:
    """Two bytes for each number of a key and of a value, of each layer and KV head."""
    assert token_bytes(of(config)) == expected


def test_fp8_halves_a_token() -> None:
    """One byte for each number, asked for or because the checkpoint brings scales for it."""
    compressed = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    modelopt = {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}
    assert [
        token_bytes(found)
        for found in (
            of(LLAMA_8B, Asked(kv_cache_dtype="fp8")),
            of(LLAMA_8B, quantization_config=compressed),
            of(LLAMA_8B, quantization_config=modelopt),
            of(LLAMA_8B, Asked(kv_cache_dtype="bfloat16"), quantization_config=modelopt),
        )
    ] == [65536, 65536, 65536, 131072]


def test_heads_are_divided_and_a_latent_vector_is_not() -> None:
    """Each of 4 GPUs has a quarter of the KV heads, each of 16 one of 8, and each all of a latent vector."""
    on_four, on_sixteen = Asked(tensor_parallel=4), Asked(tensor_parallel=16)
    assert (
        token_bytes(of(LLAMA_8B, on_four)),
        token_bytes(of(LLAMA_8B, on_sixteen)),
        token_bytes(of(DEEPSEEK_V3, on_sixteen)),
    ) == (131072 // 4, 131072 // 8, 70272)


@pytest.mark.parametrize("gpus", [3, 64])
def test_heads_that_can_t_be_divided_are_told(gpus: int) -> None:
    """As vLLM would tell, after the GPUs were paid for."""
    with pytest.raises(UsageError, match=f"32 attention heads can't be divided among {gpus} GPUs"):
        of(LLAMA_8B, Asked(tensor_parallel=gpus))


def test_kv_heads_that_can_t_be_divided_are_told() -> None:
    """12 heads among 6 GPUs are fine, 4 KV heads are not."""
    with pytest.raises(UsageError, match="4 KV heads can't be divided among 6 GPUs"):
        of(LLAMA_8B, Asked(tensor_parallel=6), num_attention_heads=12, num_key_value_heads=4)


def test_a_sliding_window_bounds_a_sequence() -> None:
    """4,095 tokens before the newest and 2 steps of 2,048: 512 blocks and one that the window begins in."""
    found = of(MISTRAL_7B)
    assert found.layers == (Layers(SLIDING, 32, heads=8, width=256, item_bytes=2, window=4096),)
    made = blocks(found)
    assert made.block_bytes == 32 * 16 * 8 * 256 * 2
    assert [made.blocks(tokens) for tokens in (2048, 8191, 8192, 32768)] == [129, 513, 513, 513]


def test_a_window_that_is_null_is_none() -> None:
    """Mistral's later models say so; the type's own default would be 4,096."""
    assert of(MISTRAL_7B, sliding_window=None).layers[0].kind == FULL
    assert of(without(MISTRAL_7B, "sliding_window")).layers[0].kind == SLIDING


def test_a_hybrid_of_windows_shares_blocks() -> None:
    """Of 34 layers each sixth sees all: 5 full, 29 sliding in 6 groups of 5; a nested file says few of it."""
    found = of(GEMMA3_4B)
    full = Layers(FULL, 5, heads=4, width=512, item_bytes=2)
    assert found.layers == (full, Layers(SLIDING, 29, heads=4, width=512, item_bytes=2, window=1024))
    made = blocks(found)
    assert made.block_bytes == 5 * 16 * 4 * 512 * 2
    assert made.blocks(32768) == 32768 // 16 + 6 * ((1023 + 4096) // 16 + 1 + 1)
    assert found.max_model_len == 131072  # which is scaled already


def test_layers_that_are_called_sliding_without_a_window_see_all() -> None:
    """As transformers writes it for some models."""
    found = of(LLAMA_8B, layer_types=["sliding_attention", "full_attention"] * 16)
    assert [layers.kind for layers in found.layers] == [FULL]


def test_gpt_oss_alternates() -> None:
    """As many of both kinds: one group each."""
    config = {
        **LLAMA_8B,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 24,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }
    made = blocks(of(config))
    assert made.block_bytes == 12 * 16 * 8 * 128 * 2
    assert made.blocks(8192) == 512 + (127 + 4096) // 16 + 1 + 1


def test_states_are_as_large_as_pages() -> None:
    """Qwen3-Next: 36 layers keep a state and 12 all tokens, in blocks that either fits into."""
    found = of(QWEN3_NEXT)
    inputs = (2 * 16 * 128 + 32 * 128) * 3  # of the three last tokens
    memory = 32 * 128 * 128
    state_bytes = 2 * (inputs + memory)
    assert found.layers == (
        Layers(FULL, 12, heads=2, width=512, item_bytes=2),
        Layers(STATE, 36, state_bytes=state_bytes, states=2),
    )
    token = 2 * 512 * 2
    block_tokens = 16 * -(-state_bytes // (16 * token))
    made = blocks(found)
    assert block_tokens == 544
    assert made.block_bytes == 12 * block_tokens * token
    assert made.blocks(8192) == -(-8192 // 544) + 3 * 2  # and two states of each of three groups


def test_a_model_of_states_alone_has_a_state_for_each_sequence() -> None:
    """Mamba: no token is kept, however long the sequence is."""
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "conv_kernel": 4,
        "hidden_size": 2560,
        "intermediate_size": 5120,
        "num_hidden_layers": 64,
        "state_size": 16,
        "torch_dtype": "bfloat16",
        "vocab_size": 50280,
    }
    found = of(config)
    state_bytes = 2 * (5120 * 3 + 5120 * 16)
    assert found.layers == (Layers(STATE, 64, state_bytes=state_bytes),)
    made = blocks(found)
    assert (made.block_bytes, made.blocks(10), made.blocks(100_000)) == (64 * state_bytes, 1, 1)


def test_sequences_are_whole_blocks_and_vllm_keeps_one() -> None:
    """100 tokens are 7 blocks of 16: 70 blocks hold 10, and 7 hold none because one is the engine's own."""
    made = pool([Layers(FULL, 1, heads=1, width=1, item_bytes=1)], block_tokens=16, in_flight=0)
    assert made is not None
    assert [made.sequences(16 * count, 100) for count in (70, 8, 7, 0)] == [10.0, 8 / 7, 0.0, 0.0]
    assert made.sequences(-5, 100) == 0.0
    assert [made.longest(16 * count, 1000) for count in (8, 7, 1)] == [112, 96, 0]
    assert made.longest(1 << 30, 1000) == 1000


def test_padding_and_uneven_groups() -> None:
    """13 full and 12 sliding layers make two groups of 13, because a few idle pages are cheaper."""
    full = Layers(FULL, 13, heads=1, width=2, item_bytes=2)
    sliding = Layers(SLIDING, 12, heads=1, width=2, item_bytes=2, window=64)
    made = pool([full, sliding], block_tokens=16, in_flight=0)
    assert made is not None
    assert made.block_bytes == 13 * 16 * 4
    assert made.blocks(1600) == 100 + 5
    twice = Layers(SLIDING, 12, heads=2, width=2, item_bytes=2, window=64)
    wider = pool([full, twice], block_tokens=16, in_flight=0)
    assert wider is not None
    assert wider.block_bytes == 13 * 16 * 8  # the page of the wider kind, which holds 32 tokens of the other
    assert wider.blocks(1600) == 50 + 5


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {**DEEPSEEK_V3, "model_type": "deepseek_v32", "index_topk": 2048},
            "sparse attention keeps an index",
        ),
        ({**LLAMA_8B, "is_encoder_decoder": True}, "it has an encoder"),
        ({**LLAMA_8B, "layer_types": ["full_attention"] * 31 + ["odd"]}, "it has layers of the kind 'odd'"),
        (
            {**QWEN3_06B, "layer_types": ["full_attention", "sliding_attention"] * 14, "sliding_window": 64}
            | {"use_sliding_window": True},
            "'qwen3' with several kinds of layers are not known",
        ),
        ({**LLAMA_8B, "model_type": "zigzag", "mamba_d_state": 16}, "'mamba_d_state' are not known"),
        (
            {**LLAMA_8B, "model_type": "bert", "architectures": ["BertModel"]},
            "BertModel is not known to write",
        ),
        ({**DEEPSEEK_V3, "model_type": "minicpm3"}, "with 'kv_lora_rank' are not known here"),
        ({**DEEPSEEK_V3, "model_type": "deepseek_v2", "kv_lora_rank": None}, "its attention is not latent"),
    ],
)
def test_what_is_not_known_is_said(config: dict[str, Any], why: str) -> None:
    """Rather than a wrong number: such a model keeps other things than keys and values."""
    found = shape(config, Asked())
    assert found.layers == ()
    assert why in (found.unknown or "")


def test_a_shape_that_is_missing_is_an_error() -> None:
    """A type that nobody knows, without a number of heads: nothing can be counted."""
    config = without({**LLAMA_8B, "model_type": "zigzag"}, "num_attention_heads")
    with pytest.raises(BadModel, match="says nothing of num_attention_heads, for the model type 'zigzag'"):
        shape(config, Asked())
    with pytest.raises(BadModel, match="says 'many' of num_hidden_layers"):
        shape({**LLAMA_8B, "num_hidden_layers": "many"}, Asked())


def test_an_unknown_type_with_plain_shapes_is_read_by_the_general_rule() -> None:
    """And is marked as not compared with vLLM."""
    found = of(LLAMA_8B, model_type="zigzag")
    assert (token_bytes(found), found.compared, of(LLAMA_8B).compared) == (131072, False, True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 2.0, "type": "linear"}}, 8192),
        ({"max_position_embeddings": 4096, "rope_parameters": {"a": {"factor": 4.0}, "b": {}}}, 16384),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 8192, "seq_length": 2048}, 2048),
    ],
)
def test_the_longest_sequence(changed: dict[str, Any], expected: int) -> None:
    """The least that config.json says, scaled as vLLM does."""
    assert of(LLAMA_8B, **changed).max_model_len == expected


def test_a_length_that_vllm_would_refuse_is_told() -> None:
    """A shorter one is taken."""
    assert of(LLAMA_8B, Asked(max_model_len=4096)).max_model_len == 4096
    with pytest.raises(UsageError, match="131073 is more than the model's 131072"):
        of(LLAMA_8B, Asked(max_model_len=131073))


@pytest.mark.parametrize(
    ("changed", "weights", "expected"),
    [
        ({}, [], "bfloat16"),
        ({"torch_dtype": None, "dtype": "float16"}, [], "float16"),
        ({"torch_dtype": "float32"}, [], "bfloat16"),  # vLLM computes in half of it
        ({"torch_dtype": None}, ["F16"], "float16"),
        ({"torch_dtype": None}, ["F16", "BF16"], "bfloat16"),
        ({"torch_dtype": "float16", "model_type": "gemma2"}, [], "bfloat16"),  # which can't do float16
    ],
)
def test_the_type_that_is_computed_in(changed: dict[str, Any], weights: list[str], expected: str) -> None:
    """What config.json says, else what the weights are, as far as vLLM takes it."""
    assert shape({**LLAMA_8B, **changed}, Asked(), weights).dtype == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("gptq", 4)),
        ({"quant_method": "awq", "w_bit": 4}, ("awq", 4)),
        ({"quant_method": "mxfp4"}, ("mxfp4", 4)),
        ({"quant_method": "fp8"}, ("fp8", None)),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}},
            ("compressed-tensors", 8),
        ),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, ("modelopt", 4)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", 4)),
    ],
)
def test_quantization_is_named(said: dict[str, Any], expected: tuple[str, int | None]) -> None:
    """The method, and the bits of a parameter where the file says them."""
    found = of(LLAMA_8B, quantization_config=said).quantization
    assert found is not None
    assert (found.method, found.bits) == expected


def test_layers_that_guess_ahead_are_left_out() -> None:
    """DeepSeek's 62nd layer is for speculation only; a model without such layers has all of its own."""
    found = of(DEEPSEEK_V3)
    assert found.left_out("model.layers.61.mlp.gate.weight")
    assert not found.left_out("model.layers.60.mlp.gate.weight")
    assert not of(LLAMA_8B).left_out("model.layers.61.mlp.gate.weight")
    assert of(QWEN3_NEXT).left_out("mtp.layers.0.mlp.gate.weight")


def test_latent_layers_are_named_so() -> None:
    """One vector of a token, whatever the number of heads."""
    expected = (Layers(LATENT, 61, heads=1, width=576, item_bytes=2),)
    assert of(DEEPSEEK_V3).layers == expected
