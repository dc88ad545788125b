"""What the judges make of flags, of names of tests and of reports."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from judge import openai_plugin, plugin, servers, standins
from judge.selection import NO_ADMIN, NO_SERVER, SELECTED, Module, Selection, matches
from judge.verdict import Run, Verdict, merged, read

CHAT = "tests/entrypoints/openai/chat_completion/test_chat.py"


def test_flags_become_settings() -> None:
    """Values, switches, negations, underscores, fields and lists each have their form."""
    flags = ["--max_model_len", "8192", "--enforce-eager", "--no-enable-prefix-caching", "--seed=0"]
    flags += ["--structured-outputs-config.backend", "xgrammar", "--allowed-media-domains", "a", "b"]
    assert servers.as_settings(flags) == {
        "MAX_MODEL_LEN": "8192",
        "ENFORCE_EAGER": "true",
        "ENABLE_PREFIX_CACHING": "false",
        "SEED": "0",
        "STRUCTURED_OUTPUTS_CONFIG": '{"backend": "xgrammar"}',
        "ALLOWED_MEDIA_DOMAINS": '["a", "b"]',
    }


def test_fields_of_one_flag_are_one_setting() -> None:
    """`--a.b` and `--a.c-d` are two fields of the object that `A` holds."""
    assert servers.as_settings(["--a.b", "1", "--a.c-d", "2"]) == {"A": '{"b": "1", "c_d": "2"}'}


def test_an_abbreviated_flag_is_spelled_out() -> None:
    """One module of vLLM's says `--lora-module`; a setting has one name."""
    assert servers.as_settings(["--lora-module", "x=/y"]) == {"LORA_MODULES": "x=/y"}


def test_flags_are_left_out_with_their_values() -> None:
    """The address is the judge's business, not the test's."""
    flags = ["--host", "0.0.0.0", "--port=55857", "--lora-modules", "a=b", "c=d", "--enforce-eager"]
    kept = servers.without(flags, "host", "port")
    assert kept == ["--lora-modules", "a=b", "c=d", "--enforce-eager"]


def test_a_server_without_context_length_gets_one() -> None:
    """The other arguments of vLLM's test server are flags too."""
    assert plugin.complete(["--enforce-eager"], seed=7, auto_port=True) == [
        *("--enforce-eager", "--seed", "7", "--max-model-len", "2048")
    ]
    given = plugin.complete(["--max_model_len", "5000"], seed=None, override_hf_configs={"a": 1})
    assert given == ["--max_model_len", "5000", "--hf-overrides", '{"a": 1}']


def test_a_value_without_a_flag_is_refused() -> None:
    """Words that are no flags must not vanish."""
    with pytest.raises(ValueError, match="'8192' belongs to no flag"):
        servers.parse(["8192"])


@pytest.mark.parametrize(
    ("name", "pattern", "matched"),
    [
        ("test_a", "test_a", True),
        ("test_ab", "test_a", False),
        ("test_a[x-True]", "test_a*", True),
        ("test_a[hermes]", "*[hermes*", True),
        ("test_a[not hermes]", "*[hermes*", False),
    ],
)
def test_patterns_take_brackets_as_they_are(name: str, pattern: str, matched: bool) -> None:
    """The brackets are those of a test's parameters."""
    assert matches(name, pattern) is matched


@pytest.mark.parametrize(
    ("name", "touches_server", "reason"),
    [
        (f"{CHAT}::test_a[hermes]", True, None),
        (f"{CHAT}::test_a[llama]", True, "another model of the same test"),
        (f"{CHAT}::test_a[hermes]", False, NO_SERVER),
        (f"{CHAT}::test_admin[hermes]", True, NO_ADMIN),
        ("tests/other.py::test_a[hermes]", True, "its module is not selected"),
    ],
)
def test_selection_has_a_reason_for_each_test_left_out(
    name: str, touches_server: bool, reason: str | None
) -> None:
    """Nothing is left out in silence."""
    module = Module(CHAT, only=("*[hermes]",), left_out={"test_admin*": NO_ADMIN})
    assert Selection((module,), {}).left_out(name, touches_server=touches_server) == reason


def test_no_module_is_both_run_and_not_run() -> None:
    """The two tables of the selection exclude each other."""
    files = SELECTED.files()
    assert [file for file in files if any(file.startswith(path) for path in SELECTED.not_run)] == []
    assert len(set(files)) == len(files)


def test_words_choose_files() -> None:
    """`python -m judge.vllm tokenize` runs one file."""
    assert SELECTED.files(["test_tokenization"]) == ["tests/entrypoints/serve/tokenize/test_tokenization.py"]


@pytest.mark.parametrize(
    ("nodeid", "reason"),
    [
        ("tests/api_resources/test_models.py::TestModels::test_method_retrieve[loose]", None),
        (
            "tests/api_resources/test_models.py::TestModels::test_path_params_retrieve[loose]",
            openai_plugin.CLIENT_ONLY,
        ),
        (
            "tests/api_resources/test_responses.py::TestResponses::test_method_retrieve_overload_1[loose]",
            openai_plugin.NOT_SERVED,
        ),
    ],
)
def test_openai_selection(nodeid: str, reason: str | None) -> None:
    """`/models/{id}` is judged, OpenAI's storage is not."""
    assert openai_plugin.left_out(nodeid) == reason


def _selected(name: str, left_out: str | None = None) -> str:
    return json.dumps({"nodeid": name, "left_out": left_out})


def _phase(name: str, when: str, outcome: str, why: str = "") -> str:
    return json.dumps({"nodeid": name, "when": when, "outcome": outcome, "why": why})


def test_report_gives_each_test_one_outcome() -> None:
    """A failing fixture is an error, also after the test passed; an unfinished test is one too."""
    lines = [
        _selected(name) for name in ("f::pass", "f::fail", "f::setup", "f::teardown", "f::skip", "f::died")
    ]
    lines += [_selected("f::out", NO_ADMIN)]
    for name in ("pass", "fail", "teardown"):
        lines.append(_phase(f"f::{name}", "setup", "passed"))
    lines += [
        _phase("f::pass", "call", "passed"),
        _phase("f::pass", "teardown", "passed"),
        _phase("f::fail", "call", "failed", "AssertionError: no"),
        _phase("f::fail", "teardown", "passed"),
        _phase("f::setup", "setup", "failed", "RuntimeError: no server"),
        _phase("f::teardown", "call", "passed"),
        _phase("f::teardown", "teardown", "failed", "RuntimeError: no end"),
        _phase("f::skip", "setup", "skipped", "Skipped: why"),
    ]
    assert read(lines) == Run(
        outcomes={
            "f::pass": "passed",
            "f::fail": "failed",
            "f::setup": "error",
            "f::teardown": "error",
            "f::skip": "skipped",
            "f::died": "error",
        },
        why={
            "f::pass": "",
            "f::fail": "AssertionError: no",
            "f::setup": "RuntimeError: no server",
            "f::teardown": "RuntimeError: no end",
            "f::skip": "Skipped: why",
            "f::died": "it did not finish",
        },
        left_out={"f::out": NO_ADMIN},
    )


def _run(**outcomes: str) -> Run:
    return Run({f"f::{name}": outcome for name, outcome in outcomes.items()}, {}, {})


def test_verdict_names_the_differences() -> None:
    """The last line is one JSON object."""
    verdict = Verdict(
        vllm=_run(a="passed", b="passed", c="failed"), ours=_run(a="passed", b="error", c="passed")
    )
    expected = {"vllm_passed": 2, "ours_passed": 2, "only_vllm": ["f::b"], "only_ours": ["f::c"]}
    assert json.loads(verdict.json()) == expected
    assert verdict.ok


@pytest.mark.parametrize(("vllm", "ours"), [("passed", "failed"), ("failed", "failed")])
def test_fewer_or_none_at_all_is_no_good_verdict(vllm: str, ours: str) -> None:
    """A judge under whom nothing passes has judged nothing."""
    assert not Verdict(vllm=_run(a=vllm), ours=_run(a=ours)).ok


def test_verdict_text_has_a_row_per_file_and_reasons() -> None:
    """Counts of both sides, what was left out, and why a test differs."""
    vllm = Run({"f::a": "passed", "g::b": "skipped"}, {"f::a": "", "g::b": ""}, {"f::z": NO_ADMIN})
    ours = Run({"f::a": "failed", "g::b": "skipped"}, {"f::a": "NotFoundError: no"}, {"f::z": NO_ADMIN})
    text = Verdict(vllm, ours).text().splitlines()
    assert text[1].split() == ["f", "1", "0", "0", "0", "0", "1", "0", "0"]
    assert text[2].split() == ["g", "0", "0", "0", "1", "0", "0", "0", "1"]
    assert text[3].split() == ["all", "1", "0", "0", "1", "0", "1", "0", "1"]
    assert f"left out on both sides: 1 tests: {NO_ADMIN}" in text
    assert text[-5:-2] == [
        "passes against vLLM's own server alone: 1",
        "  f::a",
        "    failed: NotFoundError: no",
    ]


def test_runs_of_one_side_are_merged() -> None:
    """A side whose tests need several servers is still one side."""
    assert merged([_run(a="passed"), _run(b="failed")]) == _run(a="passed", b="failed")


def test_standins_look_like_a_hugging_face_cache(tmp_path: Path) -> None:
    """Each name leads to the files of the model, with a longer context; adapters are all zero."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    (model / "model.safetensors").write_bytes(b"weights")
    standins.hub(tmp_path / "hf", {"org/big": model}, {"org/adapter": model})
    big = tmp_path / "hf/hub/models--org--big"
    snapshot = big / "snapshots" / (big / "refs/main").read_text()
    assert json.loads((snapshot / "config.json").read_text()) == {**config, "max_position_embeddings": 32768}
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    (adapter,) = (tmp_path / "hf/hub/models--org--adapter/snapshots").iterdir()
    raw = (adapter / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    assert [entry["shape"] for entry in json.loads(raw[8 : 8 + length]).values()] == [[8, 8], [8, 8]]
    assert raw[8 + length :] == bytes(2 * 8 * 8 * 4)
