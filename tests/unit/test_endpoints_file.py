"""endpoints.toml: what it means, and every fault in it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.endpoints.file import KEPT, NAMED, ROWS, Described, describe, load
from gateway.settings import TABLE
from handler.errors import BadSettings

WHOLE_GATEWAY = {
    *("HOST", "PORT", "API_KEY", "ENDPOINTS_FILE", "DRAIN_TIMEOUT_S", "DATA_DIR", "DATABASE_URL"),
    *("JOBS_LIMIT", "WEBHOOK_HOSTS", "MAX_FILE_BYTES", "MAX_STORED_BYTES"),
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
    *("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME"),
    *("MAX_BODY_BYTES", "CORS_ORIGINS", "LOG_LEVEL", "FOREIGN_NAMES"),
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
    *("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME"),
}
"""Settings that no endpoint has its own of."""

ID = "allowed: at most 64 letters, digits, - and _, the first a letter or a digit"
PLAIN = (
    'allowed: a string, a number, true or false, or { env = "NAME" } for what the gateway\'s environment has '
    "under a name"
)

TWO = """
[[endpoint]]
id = "chat"
model = "org/a"
queue_limit = 5
warm_parent = false

[endpoint.settings]
MAX_MODEL_LEN = 4096
ENABLE_PREFIX_CACHING = true
GPU_MEMORY_UTILIZATION = 0.4
HF_TOKEN = { env = "TOKEN_OF_CHAT" }

[[endpoint]]
id = "code"
model = "org/b"
"""


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    """A file with `text`."""
    path = folder / "endpoints.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def faults(folder: Path, text: str, **environ: str) -> list[str]:
    """What is wrong with `text`, without the file's name."""
    path = written(folder, text)
    with pytest.raises(BadSettings) as caught:
        load(path, environ)
    assert all(fault.startswith(f"{path}: ") for fault in caught.value.faults)
    return [fault.removeprefix(f"{path}: ") for fault in caught.value.faults]


def test_every_setting_of_the_gateway_is_an_endpoints_or_the_whole_gateways() -> None:
    """A new one is put in one of the two places."""
    per_endpoint = {row.name for row in ROWS.values()}
    assert not per_endpoint & WHOLE_GATEWAY
    assert per_endpoint | WHOLE_GATEWAY == {row.name for row in TABLE}
    assert per_endpoint <= {*NAMED.values(), *KEPT}


def test_an_endpoint_has_its_keys_and_its_workers_their_settings(tmp_path: Path) -> None:
    """What is not in the file comes from the environment; the gateway's own is no worker's."""
    environ = {"QUEUE_LIMIT": "7", "TOKEN_OF_CHAT": "hf_x", "PATH": "/bin", "START": "first_request"}
    chat, code = load(written(tmp_path, TWO), environ).endpoints
    assert (chat.id, chat.settings.model_id, chat.settings.queue_limit) == ("chat", "org/a", 5)
    assert (chat.settings.warm_parent, chat.settings.start) == (False, "first_request")
    assert chat.environ == {
        "ENDPOINT_ID": "chat",
        "MODEL_NAME": "org/a",
        "MAX_MODEL_LEN": "4096",
        "ENABLE_PREFIX_CACHING": "true",
        "GPU_MEMORY_UTILIZATION": "0.4",
        "HF_TOKEN": "hf_x",
        "TOKEN_OF_CHAT": "hf_x",
        "PATH": "/bin",
    }
    assert (code.id, code.settings.queue_limit, code.settings.warm_parent) == ("code", 7, True)
    assert "HF_TOKEN" not in code.environ


def test_one_models_names_in_the_environment_are_no_other_models(tmp_path: Path) -> None:
    """They count for nothing beside the file, in any spelling, and that is told."""
    environ = {"MODEL_NAME": "org/z", "REVISION": "v1", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "z"}
    path = written(tmp_path, '[[endpoint]]\nid = "a"\nmodel = "org/a"\n')
    found = load(path, environ)
    assert found.endpoints[0].environ == {"ENDPOINT_ID": "a", "MODEL_NAME": "org/a"}
    assert found.notes == tuple(
        f"{name} of the environment counts for nothing beside {path}" for name in sorted(environ)
    )


def test_a_setting_of_the_file_takes_the_place_of_all_its_spellings(tmp_path: Path) -> None:
    """And an empty one counts as not set."""
    text = '[[endpoint]]\nid = "a"\nmodel = "m"\n[endpoint.settings]\nHF_TOKEN = ""\nREVISION = "v2"\n'
    environ = {"HUGGING_FACE_HUB_TOKEN": "hf_x", "MODEL_REVISION": "v1"}
    (one,) = load(written(tmp_path, text), environ).endpoints
    assert one.environ == {"ENDPOINT_ID": "a", "MODEL_NAME": "m", "HF_TOKEN": "", "REVISION": "v2"}


def test_every_fault_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    """File, table, key, value and what is allowed; an unknown key with the nearest."""
    text = """
    endpoints = 1

    [[endpoint]]
    id = "chat"
    model = "org/a"
    queue_limits = 2
    queue_limit = "4"
    warm_parent = 1
    start = "later"

    [endpoint.settings]
    HF_TOKEN = { env = "NOT_THERE" }
    max_model_len = 1
    MODEL_NAME = "org/b"
    PORT = 1
    UDS = "/x"
    VERIFY_WEIGHTS = "maybe"
    MAX_CONCURENCY = 2
    LORA_MODULES = ["a"]

    [[endpoint]]
    id = "chat"

    [[endpoint]]
    id = "no id"
    model = 3
    settings = 4
    """
    one, two, three = "endpoint 1 'chat'", "endpoint 2 'chat'", "endpoint 3 'no id'"
    model = "a Hugging Face id, a folder (~ is not expanded), or s3://bucket/prefix, gs://..., az://..."
    assert faults(tmp_path, text) == [
        "endpoints is no key; the nearest is endpoint; every endpoint is a table [[endpoint]]",
        f"{one}: queue_limits is no key; the nearest is queue_limit",
        f"{one}: queue_limit = '4' is not allowed; allowed: a whole number from 0 to 100000",
        f"{one}: warm_parent = 1 is not allowed; allowed: true, false",
        f"{one}: start = 'later' is not allowed; allowed: now, first_request",
        f'{one}: settings: HF_TOKEN = {{ env = "NOT_THERE" }}, and NOT_THERE is not set',
        f"{one}: settings: max_model_len is no name of a setting; allowed: capital letters, digits and _",
        f"{one}: settings: MODEL_NAME is a key of its own; write model = ... in [[endpoint]]",
        f"{one}: settings: PORT is the whole gateway's; set it in the gateway's environment",
        f"{one}: settings: UDS is not for a worker behind a gateway",
        f"{one}: settings: LORA_MODULES is not allowed; {PLAIN}",
        f"{one}: settings: VERIFY_WEIGHTS='maybe' is not allowed; allowed: size, full",
        f"{one}: settings: MAX_CONCURENCY is not a setting; the nearest is MAX_CONCURRENCY",
        f"{two}: model is missing; allowed: {model}",
        f"{three}: id = 'no id' is not allowed; {ID}",
        f"{three}: model = 3 is not allowed; allowed: {model}",
        f"{three}: settings is no table; write [endpoint.settings] above them",
        f"{two}: id = 'chat' is another endpoint's too",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "there is no endpoint; write at least one table [[endpoint]]"),
        ("[endpoint]\nid = 'a'\n", "endpoint is no list of tables; write [[endpoint]] above each"),
        ("id = ", "no TOML: Invalid value (at "),
        ("\xff", "no TOML: "),
        ("a = " + "[" * 10_000, "no TOML: "),
        ("a = " + "9" * 10_000, "no TOML: "),
    ],
)
def test_a_file_without_endpoints_is_one_fault(tmp_path: Path, text: str, fault: str) -> None:
    """Empty, of another shape, or no TOML."""
    (told,) = faults(tmp_path, text)
    assert told.startswith(fault)


def test_a_file_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    """As editors of Windows write one."""
    path = tmp_path / "endpoints.toml"
    path.write_text("[[endpoint]]\nid = 'a'\nmodel = 'org/m'\n", encoding="utf-8-sig")
    assert [one.id for one in load(path, {}).endpoints] == ["a"]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    """By its variable and its path."""
    with pytest.raises(BadSettings) as caught:
        load(tmp_path / "endpoints.toml", {})
    path = f"ENDPOINTS_FILE={tmp_path}/endpoints.toml"
    why = "No such file or directory; it has to be a TOML file that this user may read"
    assert caught.value.faults == (f"{path}: {why}",)


def test_a_secret_in_a_file_that_others_can_read_is_told_without_it(tmp_path: Path) -> None:
    """Not if only its owner can, nor one that stands in the environment."""
    text = """
    [[endpoint]]
    id = "a"
    model = "m"

    [endpoint.settings]
    HF_TOKEN = "hf_x"
    SOME_API_KEY = "k"
    OTHER_TOKEN = { env = "OTHER" }
    TOKENIZER_NAME = "org/t"
    """
    path = written(tmp_path, text, 0o644)
    notes = load(path, {"OTHER": "o"}).notes
    assert notes == tuple(
        f"{path}: endpoint 1 'a': settings: {name} stands in a file that others can read; "
        f'write {{ env = "{name}" }}, or chmod 600 {path}'
        for name in ("HF_TOKEN", "SOME_API_KEY")
    )
    path.chmod(0o600)
    assert load(path, {"OTHER": "o"}).notes == ()


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    """What is described may be logged."""
    (one, _) = load(written(tmp_path, TWO), {"TOKEN_OF_CHAT": "hf_x"}).endpoints
    assert "hf_x" not in repr(one)


def test_without_a_file_the_environment_describes_one() -> None:
    """As it is."""
    environ = {"ENDPOINT_ID": "e", "MODEL_NAME": "org/m", "QUEUE_LIMIT": "3"}
    settings, described = describe(environ)
    assert (settings.endpoint_id, settings.queue_limit) == ("e", 3)
    assert described.endpoints == (Described(settings, environ),)


def test_faults_of_environment_and_file_are_told_together(tmp_path: Path) -> None:
    """Those of the environment once, however many endpoints have them from there."""
    path = written(tmp_path, TWO.replace("org/b", "no model"))
    with pytest.raises(BadSettings) as caught:
        describe({"ENDPOINTS_FILE": str(path), "PORT": "many", "QUEUE_TIMEOUT_S": "0", "TOKEN_OF_CHAT": "x"})
    assert [fault.partition(" is not")[0] for fault in caught.value.faults] == [
        "PORT='many'",
        "QUEUE_TIMEOUT_S='0'",
        f"{path}: endpoint 2 'code': model = 'no model'",
    ]
