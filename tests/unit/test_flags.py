"""Flags of vLLM from the environment, against a small parser made as vLLM's is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from handler.errors import BadSettings
from handler.flags import engine_argv, flag_faults, parse_flags
from handler.settings import DEFAULT_MODEL, Settings


class Parser(argparse.ArgumentParser):
    """A parser with one flag of each shape that vLLM's has, and its reader of files."""

    def load_config_file(self, path: str) -> list[str]:
        """The words of a file of `key: JSON` lines."""
        words: list[str] = []
        for line in Path(path).read_text().splitlines():
            key, _, text = line.partition(": ")
            value = json.loads(text)
            if value is True:
                words.append(f"--{key}")
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            else:
                words += [f"--{key}", str(value)]
        return words


@pytest.fixture
def parser() -> Parser:
    """A new parser."""
    parser = Parser(prog="vllm")
    optional = argparse.BooleanOptionalAction
    parser.add_argument("model_tag", nargs="?")
    for name in ("model", "revision", "tokenizer", "chat-template", "host", "uds", "config", "ssl-keyfile"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--hf-token", nargs="?")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", "--device-memory-utilization", type=float, default=0.92)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "half"], default="auto")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--disable-log-stats", action="store_true")
    parser.add_argument("--enforce-eager", action=optional, default=False)
    parser.add_argument("--trust-remote-code", action=optional, default=False)
    parser.add_argument("--enable-prefix-caching", action=optional)
    parser.add_argument("--enable-auto-tool-choice", action=optional, default=False)
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--response-role", default="assistant")
    parser.add_argument("--speculative-config", type=json.loads)
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--cudagraph-capture-sizes", nargs="+", type=int)
    return parser


def parsed(parser: Parser, environ: dict[str, str], **given: Any) -> argparse.Namespace:
    """What `parser` makes of `environ`."""
    return parse_flags(parser, Settings.from_environ(environ), **given)


def faults(parser: Parser, environ: dict[str, str], **given: Any) -> tuple[str, ...]:
    """The faults of the flags in `environ`, which both entrances report alike."""
    with pytest.raises(BadSettings) as caught:
        parsed(parser, environ, **given)
    given.pop("defaults", None)
    assert flag_faults(parser, environ, **given) == caught.value.faults
    return caught.value.faults


def test_nothing_set_is_vllms_defaults_and_our_model(parser: Parser) -> None:
    """Without flags in the environment only the settings of ours reach vLLM."""
    expected = vars(parser.parse_args([])) | {
        "model": DEFAULT_MODEL,
        "served_model_name": [DEFAULT_MODEL],
        "api_key": [""],
    }
    assert vars(parsed(parser, {})) == expected


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MAX_MODEL_LEN", "1024", 1024),
        ("SEED", "-1", -1),
        ("GPU_MEMORY_UTILIZATION", "0.5", 0.5),
        ("DTYPE", "half", "half"),
        ("DISABLE_LOG_STATS", "true", True),
        ("DISABLE_LOG_STATS", "0", False),
        ("ENFORCE_EAGER", "yes", True),
        ("ENABLE_PREFIX_CACHING", "False", False),
        ("TRUST_REMOTE_CODE", "1", True),
        ("SPECULATIVE_CONFIG", '{"method": "ngram", "n": 3}', {"method": "ngram", "n": 3}),
        ("LORA_MODULES", "a=/loras/a b=/loras/b", ["a=/loras/a", "b=/loras/b"]),
        ("LORA_MODULES", '{"name": "a", "path": "/a"}', ['{"name": "a", "path": "/a"}']),
        ("LORA_MODULES", '[{"name": "a"}, "b=/b"]', ['{"name": "a"}', "b=/b"]),
        ("CUDAGRAPH_CAPTURE_SIZES", "1,2, 4 8", [1, 2, 4, 8]),
        ("CUDAGRAPH_CAPTURE_SIZES", "[1, 2]", [1, 2]),
    ],
)
def test_variable_is_a_flag(parser: Parser, name: str, text: str, value: object) -> None:
    """Every shape of flag can be written as a variable."""
    assert vars(parsed(parser, {name: text}))[name.lower()] == value


def test_second_name_of_a_flag(parser: Parser) -> None:
    """A flag with two long names has two variables."""
    assert parsed(parser, {"DEVICE_MEMORY_UTILIZATION": "0.5"}).gpu_memory_utilization == 0.5
    both = {"DEVICE_MEMORY_UTILIZATION": "0.5", "GPU_MEMORY_UTILIZATION": "0.6"}
    assert faults(parser, both) == (
        (
            "DEVICE_MEMORY_UTILIZATION='0.5' and GPU_MEMORY_UTILIZATION='0.6' are one flag "
            "with different values"
        ),
    )


def test_worker_vllms_name_of_a_flag(parser: Parser) -> None:
    """A name of worker-vllm that vLLM spells otherwise keeps working."""
    assert parsed(parser, {"OPENAI_RESPONSE_ROLE": "bot"}).response_role == "bot"


def test_our_settings_are_flags() -> None:
    """Model, revision, tokenizer and template reach vLLM, always under the public name."""
    settings = Settings.from_environ(
        {
            "MODEL_NAME": "/models/mine",
            "MODEL_REVISION": "v1",
            "TOKENIZER_NAME": "org/other",
            "CUSTOM_CHAT_TEMPLATE": "{{ messages }}\n",
        }
    )
    assert engine_argv(settings) == (
        "--model=/models/mine",
        "--revision=v1",
        "--served-model-name=mine",
        "--tokenizer=org/other",
        "--chat-template={{ messages }}\n",
        "--api-key=",
    )


def test_words_hold_no_secret() -> None:
    """Words may be logged, so keys and tokens are not among them."""
    settings = Settings.from_environ({"API_KEY": "k-secret", "HF_TOKEN": "hf_secret"})
    assert "secret" not in " ".join(engine_argv(settings))


def test_strongest_source_wins(parser: Parser, tmp_path: Path) -> None:
    """A variable beats VLLM_EXTRA_ARGS, that beats the file, that beats our default, that vLLM's."""
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 3\nseed: 3\nmax-num-seqs: 3\n")
    environ = {
        "MAX_MODEL_LEN": "1",
        "VLLM_EXTRA_ARGS": "--max-model-len 2 --seed 2",
        "VLLM_CONFIG_FILE": str(file),
    }
    defaults = ["--max-model-len=4", "--seed=4", "--max-num-seqs=4", "--block-size=4"]
    args = parsed(parser, environ, defaults=defaults)
    assert (args.max_model_len, args.seed, args.max_num_seqs, args.block_size) == (1, 2, 3, 4)
    assert args.tensor_parallel_size == 1


def test_false_beats_a_weaker_true(parser: Parser) -> None:
    """Switching off a flag of ours or of a weaker source works for both kinds of switch."""
    environ = {
        "ENFORCE_EAGER": "false",
        "DISABLE_LOG_STATS": "false",
        "VLLM_EXTRA_ARGS": "--disable-log-stats",
    }
    args = parsed(parser, environ, defaults=["--enforce-eager"])
    assert (args.enforce_eager, args.disable_log_stats) == (False, False)


def test_extra_args_are_shell_words(parser: Parser) -> None:
    """Quotes, `=`, underscores and short names work as on a command line."""
    args = parsed(parser, {"VLLM_EXTRA_ARGS": """--speculative-config '{"a b": 1}' --seed=-3 -tp 2"""})
    assert (args.speculative_config, args.seed, args.tensor_parallel_size) == ({"a b": 1}, -3, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "MAX_MODEL_LEN",
            "long",
            "MAX_MODEL_LEN='long': argument --max-model-len: invalid int value: 'long'",
        ),
        (
            "ENFORCE_EAGER",
            "maybe",
            "ENFORCE_EAGER='maybe' is not allowed; allowed: true, false, on, off, yes, no, 1, 0",
        ),
        (
            "LORA_MODULES",
            "[1",
            "LORA_MODULES='[1' is not JSON: Expecting ',' delimiter: line 1 column 3 (char 2)",
        ),
        (
            "SPECULATIVE_CONFIG",
            "{",
            "SPECULATIVE_CONFIG='{': argument --speculative-config: invalid loads value: '{'",
        ),
        ("SSL_KEYFILE", "/k", "SSL_KEYFILE is not taken: TLS ends in front of the worker"),
        ("MAX_MODEL_LENGTH", "1", "MAX_MODEL_LENGTH is not a flag of vLLM; the nearest is MAX_MODEL_LEN"),
        (
            "TENSOR_PARALLEL",
            "2",
            "TENSOR_PARALLEL is not a flag of vLLM; the nearest is TENSOR_PARALLEL_SIZE",
        ),
        ("VLLM_MAX_MODEL_LEN", "1", "VLLM_MAX_MODEL_LEN is not a flag of vLLM; the nearest is MAX_MODEL_LEN"),
        ("NO_ENFORCE_EAGER", "1", "NO_ENFORCE_EAGER is not a flag of vLLM; the nearest is ENFORCE_EAGER"),
        ("VLLM_EXTRA_ARGS", "'", "VLLM_EXTRA_ARGS can't be split into words: No closing quotation"),
        ("VLLM_EXTRA_ARGS", "4 --seed 1", "VLLM_EXTRA_ARGS begins with a value that belongs to no flag"),
        ("VLLM_EXTRA_ARGS", "--seed", "VLLM_EXTRA_ARGS: --seed takes one value"),
        ("VLLM_EXTRA_ARGS", "--seed 1 2", "VLLM_EXTRA_ARGS: --seed takes one value"),
        ("VLLM_EXTRA_ARGS", "--enforce-eager true", "VLLM_EXTRA_ARGS: --enforce-eager takes no value"),
        ("VLLM_EXTRA_ARGS", "--seed x", "VLLM_EXTRA_ARGS: argument --seed: invalid int value: 'x'"),
        (
            "VLLM_EXTRA_ARGS",
            "--max-model-length 1",
            "VLLM_EXTRA_ARGS: vLLM has no --max-model-length; the nearest is --max-model-len",
        ),
        ("VLLM_EXTRA_ARGS", "--xyzzy hf_secret", "VLLM_EXTRA_ARGS: vLLM has no --xyzzy"),
        ("VLLM_EXTRA_ARGS", "--port 1", "VLLM_EXTRA_ARGS: --port is not taken: set PORT"),
        ("VLLM_EXTRA_ARGS", "--hos 0.0.0.0", "VLLM_EXTRA_ARGS: vLLM has no --hos; the nearest is --host"),
        ("VLLM_EXTRA_ARGS", "--hf-token=hf_secret", "VLLM_EXTRA_ARGS: --hf-token is not taken: set HF_TOKEN"),
        ("VLLM_EXTRA_ARGS", "--help", "VLLM_EXTRA_ARGS: --help is not taken: see docs/settings.md"),
        (
            "VLLM_EXTRA_ARGS",
            "--trust-remote-code",
            "VLLM_EXTRA_ARGS: --trust-remote-code is not taken: set TRUST_REMOTE_CODE=true",
        ),
        ("ENABLE_AUTO_TOOL_CHOICE", "1", "ENABLE_AUTO_TOOL_CHOICE needs TOOL_CALL_PARSER"),
    ],
)
def test_fault(parser: Parser, name: str, text: str, message: str) -> None:
    """What is wrong is said with the name that the user wrote, and vLLM's own reason; nothing exits."""
    assert faults(parser, {name: text}) == (message,)


def test_file_faults(parser: Parser, tmp_path: Path) -> None:
    """A file is held to the same rules as words."""
    file = tmp_path / "vllm.yaml"
    file.write_text('port: 1\nmodel: "m"\ntrust-remote-code: true\nseed: "x"\nnope: 1\n')
    assert faults(parser, {"VLLM_CONFIG_FILE": str(file)}) == (
        "VLLM_CONFIG_FILE: --port is not taken: set PORT",
        "VLLM_CONFIG_FILE: --model is not taken: set MODEL_NAME",
        "VLLM_CONFIG_FILE: --trust-remote-code is not taken: set TRUST_REMOTE_CODE=true",
        "VLLM_CONFIG_FILE: vLLM has no --nope",
        "VLLM_CONFIG_FILE: argument --seed: invalid int value: 'x'",
    )


def test_file_that_is_not_there(parser: Parser, tmp_path: Path) -> None:
    """A file that can't be read is a fault and no traceback."""
    path = tmp_path / "vllm.yaml"
    assert faults(parser, {"VLLM_CONFIG_FILE": str(path)}) == (
        f"VLLM_CONFIG_FILE='{path}' can't be read: No such file or directory",
    )


def test_all_faults_are_reported_at_once(parser: Parser) -> None:
    """Every source's faults are in one list, those of values after those of names."""
    environ = {
        "MAX_MODEL_LEN": "long",
        "DTYPE": "int3",
        "MAX_NUM_SEQ": "1",
        "VLLM_EXTRA_ARGS": "--block-size x --port 1 --seed y",
    }
    # Which quotes are around choices depends on Python: from 3.12.8 and 3.13.1 on there are none.
    told = tuple(fault.replace("from 'auto', 'half'", "from auto, half") for fault in faults(parser, environ))
    assert told == (
        "MAX_NUM_SEQ is not a flag of vLLM; the nearest is MAX_NUM_SEQS",
        "VLLM_EXTRA_ARGS: --port is not taken: set PORT",
        "DTYPE='int3': argument --dtype: invalid choice: 'int3' (choose from auto, half)",
        "MAX_MODEL_LEN='long': argument --max-model-len: invalid int value: 'long'",
        "VLLM_EXTRA_ARGS: argument --block-size: invalid int value: 'x'",
        "VLLM_EXTRA_ARGS: argument --seed: invalid int value: 'y'",
    )


def test_flag_faults_do_not_wait_for_settings(parser: Parser) -> None:
    """Faults of flags can be had where the settings are at fault too, to report both."""
    environ = {"PORT": "lots", "SEED": "x", "FOREIGN_NAMES": "DTYPE", "DTYPE": "int3"}
    assert flag_faults(parser, environ) == ("SEED='x': argument --seed: invalid int value: 'x'",)


@pytest.mark.parametrize(
    ("environ", "auto"),
    [
        ({}, False),
        ({"TOOL_CALL_PARSER": "hermes"}, True),
        ({"VLLM_EXTRA_ARGS": "--tool-call-parser hermes"}, True),
        ({"TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": "false"}, False),
        ({"TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": "true"}, True),
    ],
)
def test_tool_parser_turns_tools_on(parser: Parser, environ: dict[str, str], auto: bool) -> None:
    """Whoever names a tool parser wants tool calls, unless they say otherwise."""
    assert parsed(parser, environ).enable_auto_tool_choice is auto


def test_trust_is_given_by_name_alone(parser: Parser, tmp_path: Path) -> None:
    """Code of a model's repository runs for TRUST_REMOTE_CODE=true and for nothing else."""
    assert parsed(parser, {}).trust_remote_code is False
    assert parsed(parser, {"VLLM_EXTRA_ARGS": "--no-trust-remote-code"}).trust_remote_code is False
    assert parsed(parser, {"TRUST_REMOTE_CODE": "true"}).trust_remote_code is True


def test_no_key_of_vllms_own(parser: Parser) -> None:
    """vLLM's application never asks for a key: an empty one keeps it from reading VLLM_API_KEY."""
    assert parsed(parser, {"API_KEY": "k", "VLLM_API_KEY": "v"}).api_key == [""]


def test_common_names_are_not_flags(parser: Parser) -> None:
    """MODEL, CONFIG and their like mean other things on many machines; they change nothing."""
    environ = {"MODEL": "gpt2", "CONFIG": "/etc/app.toml", "MAX_NUM_BATCHED_TOKENS": "0", "HELP": "1"}
    assert parsed(parser, environ) == parsed(parser, {})


def test_foreign_flag_is_not_read(parser: Parser) -> None:
    """A flag's name that belongs to another program is left to it."""
    assert parsed(parser, {"BLOCK_SIZE": "1K", "FOREIGN_NAMES": "BLOCK_SIZE"}).block_size is None


def test_checks_add_their_faults(parser: Parser) -> None:
    """What vLLM checks after its parser is reported with the rest."""

    def known_parser(args: argparse.Namespace) -> None:
        raise KeyError(f"invalid tool call parser: {args.tool_call_parser}")

    def template(_: argparse.Namespace) -> None:
        raise ValueError("no such\n  template")

    environ = {"TOOL_CALL_PARSER": "hermess"}
    assert faults(parser, environ, checks=(known_parser, template)) == (
        "vLLM: invalid tool call parser: hermess",
        "vLLM: no such template",
    )


def test_callers_parser_is_left_as_it_was(parser: Parser) -> None:
    """The parser that was given still exits where argparse exits."""
    parsed(parser, {})
    with pytest.raises(SystemExit):
        parser.parse_args(["--nope"])
