"""The converter from GGUF: the numbers, the names, the tokenizer, and what it refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from builder import gguf
from tests.gguf_file import (
    F16,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Q4_1,
    Q8_0,
    TOKENS,
    f32,
    gguf_bytes,
    metadata,
    weights,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the small model was converted into."""
    gguf.convert(gguf_bytes(metadata(), weights()), tmp_path)
    return tmp_path


def test_q4_1_is_scale_times_number_plus_minimum() -> None:
    """The low halves of the bytes are the first 16 numbers, the high halves the other 16."""
    numbers = [n | (15 - n) << 4 for n in range(16)]
    raw = struct.pack("<ee", 0.5, -2.0) + bytes(numbers)
    found = gguf.read(gguf_bytes({}, {"w.weight": ((1, 32), Q4_1, raw)})).floats("w.weight")
    expected = [n * 0.5 - 2 for n in range(16)] + [(15 - n) * 0.5 - 2 for n in range(16)]
    assert found.tolist() == [expected]


def test_q8_0_is_scale_times_signed_byte() -> None:
    """Two blocks, each with a scale of its own."""
    raw = struct.pack("<e32b", 0.25, *range(-16, 16)) + struct.pack("<e32b", 2.0, *range(32))
    found = gguf.read(gguf_bytes({}, {"w.weight": ((2, 32), Q8_0, raw)})).floats("w.weight")
    assert found.tolist() == [[n / 4 for n in range(-16, 16)], [n * 2.0 for n in range(32)]]


def test_f16_is_widened() -> None:
    """Half precision needs no scale."""
    raw = struct.pack("<4e", 1.5, -2.0, 0.0, 65504.0)
    found = gguf.read(gguf_bytes({}, {"w.weight": ((4,), F16, raw)})).floats("w.weight")
    assert found.tolist() == [1.5, -2.0, 0.0, 65504.0]


def test_unknown_kind_is_refused() -> None:
    """A packing that is not known is an error and not noise."""
    file = gguf.read(gguf_bytes({}, {"w.weight": ((32,), 12, bytes(32))}))
    with pytest.raises(gguf.BadGguf, match=r"w\.weight is of kind 12"):
        file.floats("w.weight")


@pytest.mark.parametrize(
    ("number", "bits"),
    [
        (1.0, 0x3F80),
        (-0.0, 0x8000),
        (1 + 2**-8, 0x3F80),  # a tie goes to the even neighbour, here down
        (1 + 3 * 2**-8, 0x3F82),  # and here up
        (1 + 2**-8 + 2**-20, 0x3F81),
        (2.0 - 2**-20, 0x4000),  # a carry into the exponent
    ],
)
def test_bfloat16_rounds_to_nearest_ties_to_even(number: float, bits: int) -> None:
    """The rounding is torch's."""
    assert gguf.bfloat16(np.array([number], np.float32)).tolist() == [bits]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weight_that_is_no_number_is_refused(number: float) -> None:
    """A damaged scale would poison every answer."""
    with pytest.raises(gguf.BadGguf, match="not a number"):
        gguf.bfloat16(np.array([number], np.float32))


def test_tensors_have_the_hub_s_names_and_shapes(folder: Path) -> None:
    """vLLM finds each weight by name; the safetensors library reads what was written by hand."""
    layer = "model.layers.0"
    with safe_open(folder / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - as above
        assert file.metadata() == {"format": "pt"}
    assert kinds == {"BF16"}
    assert shapes == {
        "model.embed_tokens.weight": [len(TOKENS), HIDDEN],
        "model.norm.weight": [HIDDEN],
        f"{layer}.input_layernorm.weight": [HIDDEN],
        f"{layer}.self_attn.q_proj.weight": [HEADS * HEAD_DIM, HIDDEN],
        f"{layer}.self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, HIDDEN],
        f"{layer}.self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, HIDDEN],
        f"{layer}.self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD_DIM],
        f"{layer}.post_attention_layernorm.weight": [HIDDEN],
        f"{layer}.mlp.gate_proj.weight": [FFN, HIDDEN],
        f"{layer}.mlp.up_proj.weight": [FFN, HIDDEN],
        f"{layer}.mlp.down_proj.weight": [HIDDEN, FFN],
    }


def test_rows_of_queries_and_keys_are_put_back_in_order(folder: Path) -> None:
    """llama.cpp lays rows 0 and 2 of a head of four side by side, then 1 and 3; values it leaves alone."""
    layer = "model.layers.0.self_attn"
    assert _first_column(folder, f"{layer}.q_proj.weight") == [0, 64, 32, 96, 128, 192, 160, 224]
    assert _first_column(folder, f"{layer}.k_proj.weight") == [0, 64, 32, 96]
    assert _first_column(folder, f"{layer}.v_proj.weight") == [0, 32, 64, 96]


def test_config_is_the_model_s(folder: Path) -> None:
    """The whole config.json; 1e-05 has lost nothing in 32 bits."""
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(TOKENS),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_output_of_its_own_unties_the_embedding(tmp_path: Path) -> None:
    """A model with an output matrix keeps it as lm_head."""
    output = f32(np.ones((len(TOKENS), HIDDEN), np.float32))
    gguf.convert(gguf_bytes(metadata(), weights() | {"output.weight": output}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert _first_column(tmp_path, "lm_head.weight") == [1] * len(TOKENS)


def test_each_digit_is_a_token(folder: Path) -> None:
    """Even where the vocabulary has the two as one token: the pre-tokenizer keeps them apart."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hello 12").tokens == ["hello", "Ġ", "1", "2"]


def test_control_tokens_are_special(folder: Path) -> None:
    """They are one token in a prompt and nothing in an answer's text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "hello"


def test_roles_and_template_are_kept(folder: Path) -> None:
    """The whole tokenizer_config.json."""
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages[0]['content'] }}",
    }


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    """Byte-level tokens hold every text, also what the model never saw."""
    assert (
        _TOKENIZER.decode(_TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        == text
    )


@given(st.integers(min_value=0, max_value=1000))
def test_file_cut_short_is_refused(length: int) -> None:
    """Wherever the header ends early."""
    with pytest.raises(gguf.BadGguf):
        gguf.read(_FILE[:length])


def test_another_format_is_refused() -> None:
    """A zip, for one, or GGUF of another version."""
    with pytest.raises(gguf.BadGguf, match="not GGUF version 3"):
        gguf.read(b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize("change", [{"general__architecture": "gemma3"}, {"tokenizer__ggml__pre": "qwen2"}])
def test_another_family_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    """Its rows, names or pre-tokenizer would be guessed."""
    with pytest.raises(gguf.BadGguf, match="is not known"):
        gguf.convert(gguf_bytes(metadata(**change), weights()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A weight that no one would read is not dropped in silence."""
    extra = weights() | {"blk.0.attn_q.bias": f32(np.ones(8, np.float32))}
    with pytest.raises(gguf.BadGguf, match=r"blk\.0\.attn_q\.bias"):
        gguf.convert(gguf_bytes(metadata(), extra), tmp_path)


_FILE = gguf_bytes(metadata(), {})
_TOKENIZER = Tokenizer.from_str(json.dumps(gguf.tokenizer_json(metadata())))


def _first_column(folder: Path, name: str) -> list[float]:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    place = json.loads(raw[8 : 8 + length])[name]
    start, end = (8 + length + offset for offset in place["data_offsets"])
    wide = np.frombuffer(raw[start:end], "<u2").astype(np.uint32) << 16
    column: list[float] = wide.view(np.float32).reshape(place["shape"])[:, 0].tolist()
    return column


def test_header_that_lacks_something_is_refused(tmp_path: Path) -> None:
    """With what it lacks."""
    fields = metadata()
    del fields["llama.block_count"]
    with pytest.raises(gguf.BadGguf, match=r"^the header lacks 'llama\.block_count'$"):
        gguf.convert(gguf_bytes(fields, weights()), tmp_path)


def test_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """With the first tensor that is not whole."""
    with pytest.raises(gguf.BadGguf, match=r"^the file ends before output_norm\.weight does$"):
        gguf.convert(gguf_bytes(metadata(), weights())[:-32], tmp_path)
