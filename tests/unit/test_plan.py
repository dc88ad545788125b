"""`python -m builder plan` on folders: its figures, its text, its errors. No socket."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder import expected, gpus
from builder.__main__ import run
from builder.shapes import Asked, shape
from handler import machine, manifest
from tests.configs import DEEPSEEK_V3, LLAMA_8B, MISTRAL_7B
from tests.safetensors_file import header, weights
from tests.servers import ROOT

TINYCHAT = ROOT / "tests/tinychat/model"
GIB = 1 << 30


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON object of a plan."""
    errors = io.StringIO()
    assert run(["plan", *arguments, "--json"], {"HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}, errors) == 0
    assert errors.getvalue() == ""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(*arguments: str) -> tuple[int, str]:
    """The exit code of a plan that can't be made, and what is said."""
    errors = io.StringIO()
    code = run(["plan", *arguments], {"HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}, errors)
    return code, errors.getvalue()


def model(folder: Path, config: dict[str, Any], **files: bytes) -> Path:
    """A folder with `config` and weight files by their names without `.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, body in (files or {"model": weights({"a": ("BF16", (8, 8))})}).items():
        (folder / f"{name}.safetensors").write_bytes(body)
    return folder


def test_figures_of_the_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    """4 layers of 2 KV heads x 32: 1,024 bytes a token; 2 MiB for the 2,048 tokens that are its most."""
    found = planned(capsys, str(TINYCHAT))
    file_bytes = (TINYCHAT / "model.safetensors").stat().st_size
    assert found["model"] == {
        "name": str(TINYCHAT),
        "source": "folder",
        "commit": None,
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_model_len": 2048,
    }
    assert found["weights"] == {
        "files": 1,
        "files_bytes": file_bytes,
        "bytes": 3_935_616,
        "bytes_by_dtype": {"BF16": 3_935_616},
        "parameters": 1_967_808,
        "quantization": None,
        "loaded_bytes": 3_935_616,
    }
    assert (found["kv_cache"]["token_bytes"], found["kv_cache"]["sequence_bytes"]) == (
        1024,
        {"2048": 2 << 20},
    )
    l4 = next(gpu for gpu in found["gpus"] if gpu["name"] == "L4")
    assert (l4["runpod"], l4["lambda_gib"], l4["ec2"], l4["fits"]) == ("ADA_24", 24, "g6.xlarge", True)
    cache_bytes = int(22.03 * GIB * 0.92) - 3_935_616 - l4["allowance_bytes"]
    assert l4["kv_cache_bytes"] == pytest.approx(cache_bytes, abs=1)
    assert l4["sequences"] == {"2048": cache_bytes // (16 * 1024) / 128}


def test_what_is_asked_for_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Half a cache in fp8, a shorter sequence, more of the card, an allowance of one's own, two GPUs."""
    flags = ["--kv-cache-dtype", "fp8", "--max-model-len", "1000", "--gpu-memory-utilization", "0.5"]
    found = planned(capsys, str(TINYCHAT), *flags, "--overhead-gib", "1.5", "--tensor-parallel", "2")
    h100 = next(gpu for gpu in found["gpus"] if gpu["name"] == "H100 80 GB")
    assert found["kv_cache"]["token_bytes"] == 4 * 1 * 64  # one of two KV heads, a byte a number
    assert list(h100["sequences"]) == ["1000"]
    assert h100["allowance_bytes"] == 1.5 * GIB
    assert h100["weights_bytes"] == 3_935_616 // 2
    assert h100["usable_bytes"] == int(int(79.18 * GIB) * 0.5)
    assert found["cpu"] is None  # which has no second one


def test_text_for_a_person(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Llama-3.1-8B: too large for a T4, too long for an L4, and a row for each card."""
    head, data_bytes = header({"a": ("BF16", (8_030_261_248,))})
    folder = model(tmp_path / "llama", LLAMA_8B, model=head)
    os.truncate(folder / "model.safetensors", len(head) + data_bytes)  # sparse: it takes no room
    assert run(["plan", str(folder), "--overhead-gib", "2"], {"HOME": "/"}, io.StringIO()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        f"{folder}  (LlamaForCausalLM, folder)",
        "weights    16.1 GB in 1 file: 8.03 billion parameters, BF16 16.1 GB",
        "KV cache   131,072 bytes a token in bfloat16",
        "           32 layers of full attention: 8 heads of 256 numbers, 4,096 bytes a token each",
        "           a sequence of 2k 268 MB, 8k 1.1 GB, 32k 4.3 GB, 128k 17.2 GB",
    ]
    rows = {line[:18].rstrip(): " ".join(line[18:].split()) for line in lines}
    assert rows["T4"] == "14.6 GiB 320 - - - - - does not fit: 3.6 GiB short"
    # 0.92 x 22.03 GiB, less 14.96 and 2: 3.31 GiB, 27,120 tokens in blocks of 16, of which one is vLLM's
    where = "MAX_MODEL_LEN=27088; RunPod ADA_24, Lambda 24, EC2 g6.xlarge"
    assert rows["L4"] == f"22.0 GiB 300 3.3 GiB 13 3 - - {where}"
    assert rows["H200"] == "139.8 GiB 4,800 111.7 GiB 446 111 27 6 RunPod HOPPER_141, EC2 p5en.48xlarge x8"
    assert rows["weights"] == "16.1 s 16.1 s assumed 1 GB/s (--read-gb-per-s), while Python imports"
    assert rows["together"].startswith("50.2 s 18.0 s")


def test_shards_that_the_index_names_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And no others: an older file may lie beside them."""
    one, two = weights({"a": ("BF16", (10, 10))}), weights({"b": ("F32", (7,))})
    folder = model(tmp_path / "m", LLAMA_8B, **{"model-1": one, "model-2": two, "old": one})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = planned(capsys, str(folder))["weights"]
    assert (found["files"], found["files_bytes"]) == (2, len(one) + len(two))
    assert (found["bytes_by_dtype"], found["loaded_bytes"]) == ({"BF16": 200, "F32": 28}, 214)
    (folder / "model-2.safetensors").unlink()
    code, said = refused(str(folder))
    assert (code, "names model-2.safetensors, which is not there" in said) == (65, True)


@pytest.mark.parametrize(
    ("files", "code", "why"),
    [
        ({}, 66, "is not the folder of a model"),
        ({"model.safetensors": weights({})}, 66, "has no config.json"),
        ({"config.json": b"{}"}, 66, "it has no .safetensors files"),
        ({"config.json": b"[", "model.safetensors": weights({})}, 65, "config.json of .* is no JSON"),
        ({"config.json": b"[]", "model.safetensors": weights({})}, 65, "is no JSON object"),
        (
            {"config.json": b"{}", "model.safetensors": b"<html>"},
            65,
            "model.safetensors is no safetensors file",
        ),
        ({"config.json": b"{}", "model.safetensors": weights({})}, 65, "unknown attention shape"),
        ({"params.json": b"{}", "consolidated.safetensors": weights({})}, 66, "Mistral's own format"),
    ],
)
def test_errors_say_what_is_missing(files: dict[str, bytes], code: int, why: str, tmp_path: Path) -> None:
    """With the exit codes of the error tree, and without a traceback."""
    folder = tmp_path / "a model"
    folder.mkdir()
    for name, body in files.items():
        (folder / name).write_bytes(body)
    found, said = refused(str(folder))
    assert found == code, said
    assert re.search(why, said)


def test_heads_that_can_t_be_divided_end_it() -> None:
    """A usage error: the command line asks for what can't be."""
    assert refused(str(TINYCHAT), "--tensor-parallel", "4") == (
        64,
        "plan: 6 attention heads can't be divided among 4 GPUs\n",
    )


def test_a_hub_that_is_off_is_told() -> None:
    """At once, with the reason."""
    assert refused("org/model") == (66, "plan: org/model can't be looked at: HF_HUB_OFFLINE is set.\n")


def test_what_is_kept_may_be_unknown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The weights are counted all the same, and no figure stands where none is known."""
    folder = model(tmp_path / "m", {**DEEPSEEK_V3, "model_type": "deepseek_v32", "index_topk": 2048})
    found = planned(capsys, str(folder))
    assert found["kv_cache"]["known"] is False
    assert "sparse attention" in found["kv_cache"]["why_not"]
    assert {gpu["sequences"] is None for gpu in found["gpus"]} == {True}
    assert run(["plan", str(folder)], {"HOME": "/"}, io.StringIO()) == 0
    assert "KV cache   not known: sparse attention" in capsys.readouterr().out


def bake(folder: Path, start: dict[str, Any], **made_with: str) -> Path:
    """A bake of the small model with that `start`, without files in its manifest."""
    (folder / "model").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / "model" / file).write_bytes((TINYCHAT / file).read_bytes())
    named = {"name": "org/baked", "source": "a test", "commit": "c0ffee"}
    made = manifest.Manifest(named, {}, made_with=made_with, start=start)
    (folder / manifest.NAME).write_bytes(made.dump())
    return folder


START = {
    "facts": {},
    "kv_cache": {"blocks": 40, "block_size": 128},
    "phases": {
        "interpreter": 0.2,
        "import vllm": 3.5,
        "engine": 4.5,
        "weights": 2.5,
        "application": 0.3,
        "first token": 0.1,
    },
    "total_s": 9.0,
    "weights": ["model.safetensors"],
}
"""As `warm` writes it."""


def test_a_bake_has_measured_its_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its phases are the parts: all before the engine, the weights, and all the rest."""
    folder = bake(tmp_path / "bake", START)
    for model_name in (folder, folder / "model"):
        found = planned(capsys, str(model_name))
        assert (found["model"]["name"], found["model"]["source"]) == ("org/baked", "bake")
        assert found["model"]["commit"] == "c0ffee"
        (baked,) = found["cold_start"]
        assert (baked["on"], baked["total_s"]) == ("when it was baked", 9.0)
        assert [(part["name"], part["seconds"], part["basis"]) for part in baked["parts"]] == [
            ("process and imports", 4.1, "measured"),
            ("weights", 2.5, "measured"),
            ("engine, first token", 2.4, "measured"),
        ]


def test_a_bake_has_measured_its_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """40 blocks of 128 tokens: two and a half sequences of 2,048."""
    folder = bake(tmp_path / "bake", START, gpu="NVIDIA L4")
    assert planned(capsys, str(folder))["baked"] == {
        "on": "NVIDIA L4",
        "kv_cache_tokens": 5120,
        "sequences": {"2048": 2.5},
    }
    assert run(["plan", str(folder)], {"HOME": "/"}, io.StringIO()) == 0
    assert "5,120 tokens       2  measured on NVIDIA L4" in capsys.readouterr().out


def test_a_bake_without_a_start_is_read_as_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It may have been made without warming."""
    found = planned(capsys, str(bake(tmp_path / "bake", {})))
    assert found["baked"] is None
    assert [start["on"] for start in found["cold_start"]] == ["GPU", "CPU"]


def test_the_rate_of_reading_is_told_or_assumed() -> None:
    """10 GB at 2 GB/s are 5 s; hidden behind 2 s of imports where the files are at hand, else added."""
    near = expected.starts(10_000_000_000, at_hand=True, read_gb_per_s=2.0, baked={})
    far = expected.starts(10_000_000_000, at_hand=False, read_gb_per_s=None, baked={})
    assert [start.total_s for start in near] == pytest.approx([5 + 34.1, 5 + 1.9])
    assert [start.total_s for start in far] == pytest.approx([2 + 10 + 34.1, 2 + 10 + 1.9])
    for start in (*near, *far):
        assert [part.basis for part in start.parts] == ["cited", "assumed", "cited"]


def test_a_rate_replaces_what_a_bake_measured() -> None:
    """Another machine reads at another pace."""
    (start,) = expected.starts(1_000_000_000, at_hand=True, read_gb_per_s=0.5, baked=START)
    assert [part.seconds for part in start.parts] == pytest.approx([4.1, 2.0, 2.4])
    assert start.parts[1].basis == "assumed"


def test_cards_are_sorted_and_can_be_had() -> None:
    """Each has a name of its own and a place; what it can use is less than what is sold as gigabytes."""
    cards = gpus.cards()
    assert len({gpu.name for gpu in cards}) == len(cards)
    assert list(cards) == sorted(cards, key=lambda gpu: gpu.memory_gib)
    for gpu in cards:
        assert gpu.runpod or gpu.ec2, gpu
        assert gpu.lambda_gib is None or gpu.lambda_gib > gpu.memory_gib


def test_batches_are_vllm_s_by_card() -> None:
    """Source: `get_batch_defaults` in vllm/engine/arg_utils.py of 0.32."""
    found = {gpu.name: (gpu.batch_sequences, gpu.batch_tokens) for gpu in gpus.cards()}
    assert (found["L4"], found["A100 80 GB"]) == ((256, 2048), (256, 2048))
    assert (found["H100 80 GB"], found["B200"]) == ((1024, 8192), (1024, 16384))


def test_the_allowance_grows_with_model_batch_and_gpus() -> None:
    """1.5 GiB, a step's activations, four logits in 32 bits; and 1.5 GiB where GPUs talk to each other."""
    known = shape(LLAMA_8B, Asked())
    h100 = next(gpu for gpu in gpus.cards() if gpu.name == "H100 80 GB")
    step = 8192 * (4 * 4096 + 3 * 14336) * 2
    assert gpus.allowance_bytes(known, h100, 1) == 1.5 * GIB + step + 4 * 4 * 128256 * 1024
    assert gpus.allowance_bytes(known, h100, 2) - gpus.allowance_bytes(known, h100, 1) == 1.5 * GIB


def test_a_cache_too_small_for_a_sequence_says_how_long_one_may_be() -> None:
    """By whole blocks, beside the one that vLLM keeps."""
    known = shape(LLAMA_8B, Asked())
    card = gpus.Gpu("a card", 24.0, 1)
    made = gpus.fit(
        known, 16 * GIB, card, gpus=1, lengths=[8192, 131072], utilization=1.0, allowed_bytes=4 * GIB
    )
    assert made.cache_bytes == 4 * GIB
    assert made.longest == (4 * GIB // (16 * 131072) - 1) * 16
    assert made.sequences == {8192: 4.0, 131072: 0.0}
    assert made.fits
    tight = gpus.fit(known, 20 * GIB, card, gpus=1, lengths=[8192], utilization=1.0, allowed_bytes=4 * GIB)
    assert (tight.cache_bytes, tight.fits) == (0, False)


@pytest.mark.parametrize(
    ("sequence_bytes", "free_bytes", "expected_bytes"),
    [
        (1 << 10, 8 * GIB, 64 << 20),  # 32 sequences take less than the least
        (4 << 20, 8 * GIB, 128 << 20),  # 32 of them
        (100 << 20, 8 * GIB, 1 * GIB),  # the most
        (1 * GIB, 8 * GIB, 2 * GIB),  # two always
        (1 * GIB, 4 * GIB, int(1.6 * GIB)),  # but no more than 40 % of what is free
    ],
)
def test_a_cpu_s_cache_is_planned_as_the_worker_does(
    sequence_bytes: int, free_bytes: int, expected_bytes: int
) -> None:
    """One function for both, so that a plan is what a worker takes."""
    assert machine.kv_cache_bytes(sequence_bytes, free_bytes) == expected_bytes


def test_a_plan_needs_no_engine(tmp_path: Path) -> None:
    """It works on a laptop: nothing of torch, transformers, vLLM, numpy or the hub's client is imported."""
    folder = model(tmp_path / "m", MISTRAL_7B)
    program = (
        "import sys; from builder.__main__ import main; "
        "import atexit; atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr)); main()"
    )
    line = [sys.executable, "-c", program, "plan", str(folder), "--json"]
    environ = {"PATH": os.environ["PATH"], "HOME": "/", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environ, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr.replace("'", '"'))}
    assert not loaded & {"vllm", "torch", "transformers", "numpy", "huggingface_hub", "boto3", "safetensors"}
    assert json.loads(done.stdout)["kv_cache"]["layers"][0]["kind"] == "sliding"
