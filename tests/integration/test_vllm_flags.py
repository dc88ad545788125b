"""Flags and settings against the parser of the vLLM that is installed."""

from __future__ import annotations

import argparse
import importlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import TABLE as GATEWAY
from gateway.settings import GatewaySettings
from handler import loader
from handler.errors import BadSettings
from handler.flags import ALIASES, REFUSED, SETTINGS, flag_faults, parse_flags
from handler.settings import TABLE as WORKER
from handler.settings import Settings
from handler.table import NEAR, nearest
from handler.unread import COMMON, SERVER, WORKER_VLLM
from scripts.kubernetes import check, values

ORDINARY_NAMES = (Path(__file__).parent.parent / "unit" / "ordinary_names.txt").read_text()

vllm = pytest.importorskip(
    "vllm.entrypoints.launchers.cli_args", reason="needs an engine: make test installs it"
)
loaders = pytest.importorskip("vllm.model_executor.model_loader")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """vLLM's parser."""
    flexible = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser
    made: argparse.ArgumentParser = vllm.make_arg_parser(flexible())
    return made


@pytest.fixture(scope="module")
def names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Each flag of vLLM as an environment variable, and its `dest`."""
    return {
        option[2:].replace("-", "_").upper(): action.dest
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-")
    }


def parsed(parser: argparse.ArgumentParser, environ: dict[str, str], **given: Any) -> argparse.Namespace:
    """What vLLM makes of `environ`."""
    return parse_flags(parser, Settings.from_environ(environ), **given)


def test_defaults_are_vllms(parser: argparse.ArgumentParser) -> None:
    """With nothing set, only model, name and the empty key differ from `vllm serve`."""
    plain, ours = vars(parser.parse_args([])), vars(parsed(parser, {}))
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {name: ours[name] for name in ours if repr(ours[name]) != repr(plain[name])} == {
        "model": model,
        "served_model_name": [model],
        "api_key": [None],
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MAX_MODEL_LEN", "1024", 1024),
        ("MAX_MODEL_LEN", "4k", 4000),
        ("MAX_MODEL_LEN", "auto", -1),
        ("MAX_NUM_BATCHED_TOKENS", "2K", 2048),
        ("TENSOR_PARALLEL_SIZE", "2", 2),
        ("GPU_MEMORY_UTILIZATION", "0.9", 0.9),
        ("DTYPE", "bfloat16", "bfloat16"),
        ("QUANTIZATION", "None", None),
        ("ENFORCE_EAGER", "true", True),
        ("ENABLE_PREFIX_CACHING", "false", False),
        ("DISABLE_LOG_STATS", "yes", True),
        ("SPECULATIVE_CONFIG", '{"method": "ngram", "num_speculative_tokens": 3}', None),
        ("LIMIT_MM_PER_PROMPT", '{"image": 2}', {"image": 2}),
        ("DEFAULT_CHAT_TEMPLATE_KWARGS", '{"enable_thinking": false}', {"enable_thinking": False}),
        ("CUDAGRAPH_CAPTURE_SIZES", "1,2,4", [1, 2, 4]),
        ("ALLOWED_MEDIA_DOMAINS", "a.example, b.example", ["a.example", "b.example"]),
        ("REASONING_PARSER", "deepseek_r1", "deepseek_r1"),
        ("SEED", "-1", -1),
    ],
)
def test_variable_is_a_flag(parser: argparse.ArgumentParser, name: str, text: str, value: object) -> None:
    """Each shape of vLLM's flags can be written as a variable."""
    expected = {"method": "ngram", "num_speculative_tokens": 3} if name == "SPECULATIVE_CONFIG" else value
    assert vars(parsed(parser, {name: text}))[name.lower()] == expected


def test_several_adapters(parser: argparse.ArgumentParser) -> None:
    """A JSON list of adapters works, which worker-vllm documents and vLLM alone does not take."""
    text = '[{"name": "a", "path": "/loras/a"}, {"name": "b", "path": "/loras/b"}]'
    modules = parsed(parser, {"ENABLE_LORA": "true", "LORA_MODULES": text}).lora_modules
    assert [(module.name, module.path) for module in modules] == [("a", "/loras/a"), ("b", "/loras/b")]


def test_extra_args_take_what_vllms_command_line_takes(parser: argparse.ArgumentParser) -> None:
    """Underscores, fields of a config, `-O` and short names reach vLLM as they are."""
    fields = "--compilation-config.mode 3 --compilation-config.cudagraph_num_of_warmups=2"
    args = parsed(parser, {"VLLM_EXTRA_ARGS": f"--max_num_seqs 7 {fields} -O1 -tp 2"})
    config = args.compilation_config
    assert (args.max_num_seqs, args.optimization_level, args.tensor_parallel_size) == (7, "1", 2)
    assert (int(config.mode), config.cudagraph_num_of_warmups) == (3, 2)


def test_sources_in_order(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """A variable beats VLLM_EXTRA_ARGS, that beats VLLM_CONFIG_FILE, that beats our default."""
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "max-model-len: 3\nmax-num-seqs: 3\nseed: 3\nenforce-eager: true\n"
        "cudagraph-capture-sizes: [1, 2]\nlimit-mm-per-prompt:\n  image: 4\ncompilation-config:\n  mode: 0\n"
    )
    environ = {
        "MAX_MODEL_LEN": "1",
        "COMPILATION_CONFIG": '{"mode": 3}',
        "VLLM_EXTRA_ARGS": "--max-model-len 2 --max-num-seqs 2 --compilation-config.mode 2",
        "VLLM_CONFIG_FILE": str(file),
    }
    args = parsed(parser, environ, defaults=("--seed=4", "--block-size=16", "--no-enforce-eager"))
    assert (args.max_model_len, args.max_num_seqs, args.seed, args.block_size) == (1, 2, 3, 16)
    assert (args.enforce_eager, args.cudagraph_capture_sizes) == (True, [1, 2])
    assert (args.limit_mm_per_prompt, int(args.compilation_config.mode)) == ({"image": 4}, 3)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("DTYPE", "int3", "argument --dtype: invalid choice: 'int3' (choose from "),
        (
            "MAX_MODEL_LEN",
            "long",
            "argument --max-model-len: invalid human_readable_int_or_auto value: 'long'",
        ),
        ("MAX_LORA_RANK", "7", "argument --max-lora-rank: invalid choice: 7 (choose from 1, 8, "),
        (
            "SPECULATIVE_CONFIG",
            "{",
            "argument --speculative-config/-sc: Value { cannot be converted to JSON.",
        ),
        ("COMPILATION_CONFIG", '{"nope": 1}', "argument --compilation-config/-cc: 1 validation error for "),
        ("LORA_MODULES", '{"path": "/a"}', "Invalid fields for --lora-modules: "),
    ],
)
def test_fault_is_in_vllms_words(parser: argparse.ArgumentParser, name: str, text: str, reason: str) -> None:
    """One fault on one line, with what vLLM allows; no exit and no traceback."""
    (fault,) = flag_faults(parser, {name: text})
    assert fault.startswith(f"{name}={text!r}: {reason}")
    assert "\n" not in fault
    assert " at 0x" not in fault


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--compilation-config.mode", "--compilation-config takes one value"),
        ("-O", "--optimization-level takes one value"),
        ("-asc 2", "-asc is not taken: a worker is one server of one engine"),
        ("-h", "-h is not taken: see docs/settings.md"),
        ("--help=all", "--help is not taken: see docs/settings.md"),
        ("--config /etc/vllm.yaml", "--config is not taken: set VLLM_CONFIG_FILE"),
    ],
)
def test_words_of_vllms_command_line_alone(parser: argparse.ArgumentParser, words: str, reason: str) -> None:
    """What vLLM's parser does beside parsing (help, files, servers) is refused before it gets there."""
    assert flag_faults(parser, {"VLLM_EXTRA_ARGS": words}) == (f"VLLM_EXTRA_ARGS: {reason}",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "it is not a mapping of flags to values"),
        ("", "it is not a mapping of flags to values"),
        ("a: [b\n", "ParserError: while parsing a flow sequence"),
        ("1: 2\n", "TypeError: "),
    ],
)
def test_file_that_is_no_mapping(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, reason: str
) -> None:
    """Whatever vLLM's reader raises is a fault."""
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    (fault,) = flag_faults(parser, {"VLLM_CONFIG_FILE": str(file)})
    assert fault.startswith(f"VLLM_CONFIG_FILE='{file}' can't be read: {reason}")


@pytest.mark.filterwarnings("ignore:--log-config-file")
@pytest.mark.parametrize(
    "junk", ["x y", "None", '{"a":', "[1", "{}", "[]", "-1", '{"nope": 1}', "a.b=c", "é"]
)
def test_no_value_of_any_flag_exits(
    parser: argparse.ArgumentParser, names: dict[str, str], junk: str
) -> None:
    """For every flag, junk is taken or is a fault; nothing else comes out of vLLM's parser."""
    for name in names:
        for fault in flag_faults(parser, {name: junk}):
            assert fault.startswith((name, "ENABLE_AUTO_TOOL_CHOICE", "VLLM_CONFIG_FILE"))


def test_tables_name_flags_of_this_vllm(parser: argparse.ArgumentParser, names: dict[str, str]) -> None:
    """What is refused, ours or renamed exists in this vLLM, and what is said to be gone is gone."""
    dests = {action.dest for action in parser._actions}
    assert {*SETTINGS, *REFUSED} <= dests
    assert set(ALIASES.values()) <= names.keys()
    assert names.keys().isdisjoint(ALIASES)
    assert SERVER.keys() | COMMON.keys() <= names.keys()
    assert names.keys().isdisjoint(WORKER_VLLM)


def test_reasons_name_flags_that_exist(names: dict[str, str]) -> None:
    """A note that sends the reader to another name sends them to one that is read."""
    known = {
        *names,
        *(row.name for row in (*WORKER, *GATEWAY)),
        "VLLM_CONFIG_FILE",
        "HF_HOME",
        "VLLM_EXTRA_ARGS",
    }
    words = {
        word.partition("=")[0].strip(",;")
        for reason in (*WORKER_VLLM.values(), *SERVER.values(), *COMMON.values(), *REFUSED.values())
        for word in reason.split()
        if word.partition("=")[0].strip(",;").isupper() and "_" in word
    }
    assert words <= known


@pytest.mark.filterwarnings("ignore:--log-config-file")
def test_settings_and_flags_are_not_slips_of_each_other(
    parser: argparse.ArgumentParser, names: dict[str, str]
) -> None:
    """No right name of one program or of vLLM is taken for a slip by another."""
    settings = {name for row in (*WORKER, *GATEWAY) for name in row.names}
    flags = names.keys() - settings
    assert [(flag, near) for flag in flags if (near := nearest(flag, settings, NEAR))] == []
    environ = dict.fromkeys({*settings, *flags} - {"FOREIGN_NAMES"}, "1")
    for read in (Settings.from_environ, GatewaySettings.from_environ):
        with pytest.raises(BadSettings) as caught:
            read(environ)
        assert [fault for fault in caught.value.faults if "the nearest is" in fault] == []
    assert [fault for fault in flag_faults(parser, environ) if "the nearest is" in fault] == []


def test_ordinary_environment_has_no_flags(parser: argparse.ArgumentParser) -> None:
    """No name of a shell, a cloud, a cluster or a library changes or stops the engine."""
    environ = {
        name: "1"
        for line in ORDINARY_NAMES.splitlines()
        if not line.startswith("#")
        for name in line.split()
        if name != "GRPC_PORT"
    }
    keys = {"API_KEY": "ft-1"}  # on Lambda, which is among them, there has to be one
    assert repr(parsed(parser, environ | keys)) == repr(parsed(parser, keys))


def test_names_that_vllm_reads_itself_are_left_alone(
    parser: argparse.ArgumentParser, names: dict[str, str]
) -> None:
    """vLLM's own VLLM_ variables are not flags with something in front."""
    own = importlib.import_module("vllm.envs").environment_variables
    assert flag_faults(parser, dict.fromkeys(own.keys() - names.keys(), "1")) == ()


def test_hub_endpoint_of_worker_vllm_starts(parser: argparse.ArgumentParser) -> None:
    """The environment that RunPod's Hub form for worker-vllm fills in has no fault."""
    environ = {
        "MODEL_NAME": "deepseek-ai/deepseek-r1-distill-llama-8b",
        "TOKENIZER_MODE": "auto",
        "SKIP_TOKENIZER_INIT": "False",
        "TRUST_REMOTE_CODE": "false",
        "DTYPE": "auto",
        "KV_CACHE_DTYPE": "auto",
        "MAX_MODEL_LEN": "auto",
        "DISTRIBUTED_EXECUTOR_BACKEND": "mp",
        "RAY_WORKERS_USE_NSIGHT": "0",
        "PIPELINE_PARALLEL_SIZE": "1",
        "TENSOR_PARALLEL_SIZE": "1",
        "MAX_PARALLEL_LOADING_WORKERS": "1",
        "ENABLE_PREFIX_CACHING": "false",
        "DISABLE_SLIDING_WINDOW": "false",
        "SEED": "0",
        "MAX_NUM_SEQS": "256",
        "MAX_LOGPROBS": "20",
        "DISABLE_LOG_STATS": "false",
        "QUANTIZATION": "None",
        "ENABLE_LORA": "false",
        "MAX_LORAS": "1",
        "MAX_LORA_RANK": "16",
        "LORA_DTYPE": "auto",
        "FULLY_SHARDED_LORAS": "false",
        "DEVICE": "auto",
        "SCHEDULER_DELAY_FACTOR": "0",
        "ENABLE_CHUNKED_PREFILL": "true",
        "SPECULATIVE_METHOD": "",
        "ENABLE_LOG_REQUESTS": "false",
        "GPU_MEMORY_UTILIZATION": "0.95",
        "BLOCK_SIZE": "16",
        "ENFORCE_EAGER": "false",
        "DISABLE_CUSTOM_ALL_REDUCE": "false",
        "DEFAULT_BATCH_SIZE": "50",
        "DEFAULT_MIN_BATCH_SIZE": "1",
        "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "3",
        "RAW_OPENAI_OUTPUT": "true",
        "OPENAI_RESPONSE_ROLE": "assistant",
        "MAX_CONCURRENCY": "30",
        "ENABLE_EXPERT_PARALLEL": "false",
        "BASE_PATH": "/runpod-volume",
        "ENABLE_AUTO_TOOL_CHOICE": "false",
        "TOOL_CALL_PARSER": "",
        "REASONING_PARSER": "",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "VLLM_USE_DEEP_GEMM": "0",
        "MAX_NUM_BATCHED_TOKENS": "0",
    }
    args = parsed(parser, environ)
    assert (args.gpu_memory_utilization, args.block_size, args.max_num_batched_tokens) == (0.95, 16, None)
    assert Settings.from_environ(environ).max_concurrency == 30


def test_checks_of_vllms_server(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """vLLM's later checks take our arguments, and what they find joins the faults."""
    server: Callable[[argparse.Namespace], object] = importlib.import_module(
        "vllm.entrypoints.launchers.launcher"
    ).validate_api_server_args
    checks = (vllm.validate_parsed_serve_args, server)
    template = tmp_path / "none.jinja"
    environ = {"TOOL_CALL_PARSER": "hermess", "CUSTOM_CHAT_TEMPLATE": str(template)}
    with pytest.raises(BadSettings) as caught:
        parsed(parser, environ, checks=checks)
    chat, tool = caught.value.faults
    assert chat.startswith("vLLM: ")
    assert str(template) in chat
    assert tool.startswith("vLLM: invalid tool call parser: hermess (chose from { ")
    assert parsed(parser, {"TOOL_CALL_PARSER": "hermes"}, checks=checks).enable_auto_tool_choice is True


def test_ways_to_read_weights_are_vllms(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """Each way that can be chosen is flags that vLLM takes, and a format that it has."""
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    settings = Settings.from_environ({"MODEL_NAME": str(tmp_path)})
    packages = ("instanttensor", "fastsafetensors", "runai_model_streamer", "none")
    seen = set()
    for accelerator in (None, "cuda"):
        for kind in ("ext4", "nfs4"):
            for package in packages:
                choice = loader.choose(
                    settings,
                    accelerator=accelerator,
                    installed=package.__eq__,
                    mounts=lambda kind=kind: f"1 0 0:1 / / rw - {kind} disk rw",  # type: ignore[misc] # bound
                )
                args = parse_flags(parser, settings, defaults=choice.flags)
                assert args.load_format in typing.get_args(loaders.LoadFormats)
                seen.add(choice.name)
                if choice.name == "safetensors threads":
                    assert args.model_loader_extra_config == {
                        "enable_multithread_load": True,
                        "num_threads": 2,
                    }
    assert {
        *packages[:2],
        "runai_streamer",
        "safetensors",
        "safetensors prefetch",
        "safetensors threads",
    } == seen


def test_flags_of_reading_weights_are_vllms(names: dict[str, str]) -> None:
    """A flag that is renamed would no longer count as set by the user."""
    assert {flag.replace("-", "_").upper() for flag in loader.FLAGS} <= names.keys()


def test_kubernetes_gives_workers_flags_that_are_there(parser: argparse.ArgumentParser) -> None:
    """In every overlay; a slip in one is found."""
    rendered = {folder.name: check.rendered(folder) for folder in check.overlays(check.FOLDER)}
    for overlay, objects in rendered.items():
        assert [*values.flags(objects, parser)] == [], overlay
    settings = next(
        one
        for one in rendered["gpu"]
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("worker")
    )
    settings["data"]["MAX_MODEL_LENGHT"] = "4096"
    (fault,) = values.flags(rendered["gpu"], parser)
    assert "MAX_MODEL_LENGHT" in fault
