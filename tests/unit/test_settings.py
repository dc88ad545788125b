"""The settings of worker and gateway: what they accept, what they refuse, what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gateway.scaling import Scaling
from gateway.settings import TABLE as GATEWAY_TABLE
from gateway.settings import GatewaySettings, KeptSettings
from handler import platforms
from handler.errors import BadSettings
from handler.settings import DEFAULT_MODEL, TABLE, Settings, public_name, readable, render_markdown
from handler.table import Kind, Setting
from handler.unread import UNREAD

ORDINARY_NAMES = tuple(
    name
    for line in Path(__file__).with_name("ordinary_names.txt").read_text().splitlines()
    if not line.startswith("#")
    for name in line.split()
)


def faults(environ: dict[str, str]) -> tuple[str, ...]:
    """The faults of the worker's settings in `environ`."""
    with pytest.raises(BadSettings) as caught:
        Settings.from_environ(environ)
    return caught.value.faults


def gateway_faults(environ: dict[str, str]) -> tuple[str, ...]:
    """The faults of the gateway's settings in `environ`."""
    with pytest.raises(BadSettings) as caught:
        GatewaySettings.from_environ(environ)
    return caught.value.faults


def test_worker_defaults() -> None:
    """With nothing set, a worker serves the default model on loopback."""
    assert Settings.from_environ({}) == Settings(
        platform=None,
        model_name=DEFAULT_MODEL,
        model_revision=None,
        served_model_name=None,
        tokenizer_name=None,
        custom_chat_template=None,
        hf_token=None,
        max_concurrency=None,
        verify_weights="size",
        engine_mode="auto",
        host="127.0.0.1",
        port=8000,
        port_health=None,
        uds=None,
        api_key=None,
        auth=True,
        api_keys_secret=None,
        usage_table=None,
        endpoint_id=None,
        lambda_response_mode="stream",
        reply_to=(),
        sqs_queue_url=None,
        batch_input=None,
        batch_output=None,
        batch_table=None,
        cors_origins=(),
        max_body_bytes=32 * 2**20,
        drain_timeout_s=30.0,
        keep_alive_s=15.0,
        log_level="INFO",
        lifeline_fd=None,
        notify_socket=None,
        shared_by=1,
        start_failure=None,
        vllm_config_file=None,
        vllm_extra_args=None,
        otel_exporter_otlp_endpoint=None,
        otel_exporter_otlp_traces_endpoint=None,
        otel_exporter_otlp_protocol="http/protobuf",
        otel_service_name="firsttoken-worker",
        levers_off=(),
        foreign_names=(),
    )


def test_gateway_defaults() -> None:
    """With nothing set, a gateway listens on loopback, starts its worker at once and makes a key."""
    assert GatewaySettings.from_environ({"HOME": "/home/me"}) == GatewaySettings(
        host="127.0.0.1",
        port=8000,
        api_key=None,
        endpoints_file=None,
        endpoint_id="local",
        model_name=DEFAULT_MODEL,
        served_model_name=None,
        upstream="local",
        upstream_url=None,
        upstream_key=None,
        upstream_slots=1024,
        upstream_metrics=False,
        start="now",
        min_workers=0,
        max_workers=1,
        idle_timeout_s=None,
        warm_parent=True,
        queue_limit=256,
        queue_timeout_s=300.0,
        start_timeout_s=600.0,
        jobs_limit=10_000,
        webhook_hosts=(),
        execution_timeout_s=590.0,
        data_dir=Path("/home/me/.local/share/firsttoken"),
        database_url="sqlite:////home/me/.local/share/firsttoken/gateway.db",
        price_input=0,
        price_output=0,
        keep_alive_s=15.0,
        drain_timeout_s=30.0,
        max_file_bytes=512 * 2**20,
        max_stored_bytes=16 * 2**30,
        max_body_bytes=32 * 2**20,
        cors_origins=(),
        log_level="INFO",
        otel_exporter_otlp_endpoint=None,
        otel_exporter_otlp_traces_endpoint=None,
        otel_exporter_otlp_protocol="http/protobuf",
        otel_service_name="firsttoken-gateway",
        foreign_names=(),
    )


@pytest.mark.parametrize(
    ("table", "settings", "computed"),
    [(TABLE, Settings, {"notes", "rest"}), (GATEWAY_TABLE, GatewaySettings, set())],
    ids=["worker", "gateway"],
)
def test_every_field_has_a_row(
    table: tuple[Setting, ...], settings: type[Settings | GatewaySettings], computed: set[str]
) -> None:
    """Rows and fields are the same set, so no setting is read and lost, or shown and not read."""
    assert {row.field for row in table} == {field.name for field in dataclasses.fields(settings)} - computed
    assert all(row.field == row.name.lower() for row in table)


def test_every_default_is_allowed() -> None:
    """A default is written as a user would write it, and means what it means when unset."""
    written = {row.name: row.default for row in TABLE if row.default}
    assert Settings.from_environ(written) == Settings.from_environ({})
    written = {row.name: row.default for row in GATEWAY_TABLE if row.default}
    assert GatewaySettings.from_environ(written) == GatewaySettings.from_environ({})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODEL_NAME", "org/name", "org/name"),
        ("MODEL_NAME", " gpt2 ", "gpt2"),
        ("MODEL_NAME", "org/name-GGUF:Q4_K_M", "org/name-GGUF:Q4_K_M"),
        ("MODEL_NAME", "/models/my model", "/models/my model"),
        ("MODEL_NAME", "./tiny", "./tiny"),
        ("MODEL_NAME", "tests/data/tiny", "tests/data/tiny"),
        ("MODEL_NAME", "s3://bucket/some/prefix", "s3://bucket/some/prefix"),
        ("MODEL_NAME", "gs://bucket_1/name", "gs://bucket_1/name"),
        ("MODEL_NAME", "az://container/name", "az://container/name"),
        ("CUSTOM_CHAT_TEMPLATE", "\n{{ x }}\n", "\n{{ x }}\n"),
        ("MAX_CONCURRENCY", "30", 30),
        ("ENGINE_MODE", "FORK", "fork"),
        ("PLATFORM", "http", "http"),
        ("HOST", "::1", "::1"),
        ("HOST", "localhost", "localhost"),
        ("PORT", "0", 0),
        ("AUTH", "off", False),
        ("AUTH", "False", False),
        ("AUTH", "1", True),
        ("CORS_ORIGINS", "*", ("*",)),
        (
            "CORS_ORIGINS",
            "https://a.example, http://localhost:3000/",
            ("https://a.example", "http://localhost:3000"),
        ),
        ("CORS_ORIGINS", '["https://a.example"]', ("https://a.example",)),
        ("MAX_BODY_BYTES", "2048", 2048),
        ("MAX_BODY_BYTES", "32MiB", 32 * 2**20),
        ("MAX_BODY_BYTES", "10 mb", 10_000_000),
        ("DRAIN_TIMEOUT_S", "2.5", 2.5),
        ("KEEP_ALIVE_S", "0", 0.0),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LIFELINE_FD", "7", 7),
        ("NOTIFY_SOCKET", "@abstract", "@abstract"),
        ("VLLM_CONFIG_FILE", "/etc/vllm.yml", "/etc/vllm.yml"),
        ("FOREIGN_NAMES", "SEED, HOST", ("SEED", "HOST")),
    ],
)
def test_value_is_read(name: str, text: str, value: object) -> None:
    """Each kind of value is read as its row says."""
    assert getattr(Settings.from_environ({name: text}), name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MODEL_NAME", "https://huggingface.co/org/name"),
        ("MODEL_NAME", "org/name with spaces"),
        ("MODEL_NAME", "--model"),
        ("MODEL_NAME", "~/models/mine"),
        ("MODEL_NAME", "s3://"),
        ("MODEL_NAME", "gs://Bucket/name"),
        ("MODEL_NAME", "hdfs://host/name"),
        ("SERVED_MODEL_NAME", "two words"),
        ("MAX_CONCURRENCY", "0"),
        ("MAX_CONCURRENCY", "-1"),
        ("MAX_CONCURRENCY", "1e3"),
        ("ENGINE_MODE", "process"),
        ("PLATFORM", "heroku"),
        ("HOST", "x86_64-conda-linux-gnu"),
        ("HOST", "http://127.0.0.1"),
        ("PORT", "65536"),
        ("UDS", "/" + "x" * 107),
        ("AUTH", "perhaps"),
        ("CORS_ORIGINS", "example.com"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("CORS_ORIGINS", "[1]"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_BYTES", "2GiB"),
        ("MAX_BODY_BYTES", "10 apples"),
        ("DRAIN_TIMEOUT_S", "nan"),
        ("DRAIN_TIMEOUT_S", "soon"),
        ("LOG_LEVEL", "loud"),
        ("START_FAILURE", "retry"),
        ("VLLM_CONFIG_FILE", "/etc/vllm.json"),
        ("FOREIGN_NAMES", "NOT-A-NAME"),
    ],
)
def test_value_is_refused(name: str, text: str) -> None:
    """What is not allowed is refused with the name, the value and what is allowed."""
    allowed = next(row.kind.allowed for row in TABLE if row.name == name).replace("`", "")
    assert faults({name: text}) == (f"{name}={text!r} is not allowed; allowed: {allowed}",)


def test_all_faults_are_reported_at_once() -> None:
    """One start shows everything that is wrong, in the table's order, slips last."""
    given = {"PORT": "lots", "ENGINE_MODE": "best", "MODEL_NAM": "x", "AUTH": "maybe"}
    assert faults(given) == (
        "ENGINE_MODE='best' is not allowed; allowed: auto, thread, fork, spawn",
        "PORT='lots' is not allowed; allowed: a whole number from 0 to 65535",
        "AUTH='maybe' is not allowed; allowed: true, false, on, off, yes, no, 1, 0",
        "MODEL_NAM is not a setting; the nearest is MODEL_NAME",
    )


def test_fault_says_its_text() -> None:
    """What a person reads at the start is a list with one line for each fault."""
    with pytest.raises(BadSettings) as caught:
        Settings.from_environ({"PORT": "lots"})
    assert str(caught.value) == (
        "bad settings:\n  - PORT='lots' is not allowed; allowed: a whole number from 0 to 65535"
    )


@pytest.mark.parametrize("name", ["API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_secret_is_not_shown_when_it_is_at_fault(name: str) -> None:
    """The value of a secret stays out of the fault."""
    assert faults({name: "s3cret with spaces"}) == (
        f"{name} (not shown) is not allowed; allowed: printable characters without spaces",
    )


def test_secrets_that_differ_are_not_shown() -> None:
    """Two spellings of a secret with different values are named and not shown."""
    assert faults({"HF_TOKEN": "hf_one", "HUGGING_FACE_HUB_TOKEN": "hf_two"}) == (
        "HF_TOKEN and HUGGING_FACE_HUB_TOKEN are one setting with different values; keep HF_TOKEN",
    )


def test_repr_holds_no_secret() -> None:
    """Settings that end up in a log or a traceback show no secret."""
    environ = {
        "API_KEY": "k-secret",
        "HF_TOKEN": "hf_secret",
        "AWS_SECRET_ACCESS_KEY": "aws-secret",
        "VLLM_EXTRA_ARGS": "--hf-token hf_secret",
    }
    secrets = ("k-secret", "hf_secret", "aws-secret")
    for settings in (Settings.from_environ(environ), GatewaySettings.from_environ(environ)):
        assert not [secret for secret in secrets if secret in repr(settings)]


def test_long_value_is_cut() -> None:
    """A fault stays one line that can be read."""
    (fault,) = faults({"MODEL_REVISION": "x" * 300})
    assert fault.startswith(f"MODEL_REVISION='{'x' * 117}...' is not allowed; allowed: at most 256 ")


@pytest.mark.parametrize(
    ("alias", "name", "text"),
    [(alias, row.name, "x") for row in TABLE for alias in row.aliases if alias != "ALLOWED_ORIGINS"]
    + [("ALLOWED_ORIGINS", "CORS_ORIGINS", "*")],
)
def test_other_spelling_is_read(alias: str, name: str, text: str) -> None:
    """worker-vllm's names do what ours do."""
    assert Settings.from_environ({alias: text}) == Settings.from_environ({name: text})


def test_spellings_that_agree_are_no_fault() -> None:
    """A setting may be given twice if it is given the same."""
    both = {"SERVED_MODEL_NAME": "m", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "m"}
    assert Settings.from_environ(both).model_id == "m"


def test_spellings_that_differ_are_a_fault() -> None:
    """No spelling wins silently."""
    assert faults({"SERVED_MODEL_NAME": "a", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "b"}) == (
        (
            "SERVED_MODEL_NAME='a' and OPENAI_SERVED_MODEL_NAME_OVERRIDE='b' are one setting "
            "with different values; keep SERVED_MODEL_NAME"
        ),
    )


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_empty_is_not_set(empty: str) -> None:
    """Templates and compose files leave variables empty; that is no value."""
    assert Settings.from_environ({row.name: empty for row in TABLE}) == Settings.from_environ({})


@pytest.mark.parametrize(
    "environ", [{"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}, {"PLATFORM": "aws_lambda", "HOST": "0.0.0.0"}]
)
def test_a_function_needs_keys(environ: dict[str, str]) -> None:
    """A URL may be in front of it; on which address a server would listen does not matter there."""
    (fault,) = faults(environ)
    assert fault.startswith(
        "there is no key for those who call the function through a URL; set API_KEYS_SECRET"
    )
    for given in ({"API_KEYS_SECRET": "keys"}, {"API_KEY": "ft-1"}, {"AUTH": "off"}):
        Settings.from_environ({**environ, **given})
    assert readable(environ).api_key, "why it does not start is not for everybody"


@pytest.mark.parametrize(
    ("environ", "platform"),
    [
        ({}, "http"),
        ({"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}, "aws_lambda"),
        ({"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001", "PLATFORM": "http"}, "http"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://..."}, "runpod"),
        ({"AWS_LAMBDA_RUNTIME_API": ""}, "http"),
    ],
)
def test_the_platform_is_found(environ: dict[str, str], platform: str) -> None:
    """By what it sets, unless another is named."""
    assert platforms.chosen(environ) == platform


def test_a_worker_of_a_queue_needs_one() -> None:
    """By its name; nothing tells such a worker's environment from another."""
    assert faults({"PLATFORM": "sqs"}) == ("PLATFORM=sqs takes messages from a queue; set SQS_QUEUE_URL",)
    Settings.from_environ({"PLATFORM": "sqs", "SQS_QUEUE_URL": BATCHES["SQS_QUEUE_URL"]})


BATCHES = {
    "SQS_QUEUE_URL": "https://sqs.eu-central-1.amazonaws.com/123456789012/batches",
    "BATCH_INPUT": "s3://bucket/in",
    "BATCH_OUTPUT": "s3://bucket/out/",
    "BATCH_TABLE": "state",
}


def test_batches_are_where_it_is_said() -> None:
    """A prefix is a folder; a queue by itself is not for batches."""
    settings = Settings.from_environ(BATCHES)
    assert (settings.batch_input, settings.batch_output) == ("s3://bucket/in/", "s3://bucket/out/")
    assert Settings.from_environ({"SQS_QUEUE_URL": BATCHES["SQS_QUEUE_URL"]}).batch_input is None


@pytest.mark.parametrize("name", sorted(BATCHES))
def test_batches_need_all_their_settings(name: str) -> None:
    """What is missing is named; what is wrong is not missing."""
    needed = "batches need BATCH_INPUT, BATCH_OUTPUT, BATCH_TABLE, SQS_QUEUE_URL"
    assert faults({**BATCHES, name: ""}) == (f"{needed}; set {name}",)
    assert len(faults({**BATCHES, name: "!"})) == 1


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("s3://bucket/in", "s3://bucket/in/out"),
        ("s3://bucket/a/in", "s3://bucket/a"),
        ("s3://bucket", "s3://bucket/a"),
    ],
)
def test_a_batch_is_never_made_of_what_another_writes(given: str, written: str) -> None:
    """Neither folder lies in the other."""
    (fault,) = faults({**BATCHES, "BATCH_INPUT": given, "BATCH_OUTPUT": written})
    assert "lie in each other" in fault
    Settings.from_environ({**BATCHES, "BATCH_INPUT": "s3://bucket/in", "BATCH_OUTPUT": "s3://bucket/in2"})


def test_places_for_answers() -> None:
    """Queues and prefixes of buckets."""
    queue = "https://sqs.eu-central-1.amazonaws.com/123456789012/answers"
    assert Settings.from_environ({"REPLY_TO": f"{queue}, s3://bucket/a b/"}).reply_to == (
        queue,
        "s3://bucket/a b/",
    )
    for wrong in ("answers", "s3://", "https://host", "gs://bucket"):
        (fault,) = faults({"REPLY_TO": wrong})
        assert fault.startswith(f"REPLY_TO='{wrong}' is not allowed; allowed: URLs of queues")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "worker.internal"])
def test_listening_beyond_this_machine_needs_a_key(host: str) -> None:
    """A worker that anyone can reach asks for a key, or says that something else does."""
    assert faults({"HOST": host}) == (
        (
            f"HOST={host} can be reached from other machines and there is no API_KEY; "
            "set API_KEY, or AUTH=off if something in front of the worker asks for a key"
        ),
    )
    for enough in ({"API_KEY": "k"}, {"AUTH": "off"}, {"UDS": "/run/worker.sock"}):
        assert Settings.from_environ({"HOST": host, **enough}).host == host


@pytest.mark.parametrize("environ", [{"PLATFORM": "runpod"}, {"RUNPOD_WEBHOOK_GET_JOB": "https://plane"}])
def test_who_takes_jobs_needs_no_key(environ: dict[str, str]) -> None:
    """The image has a HOST for every platform, and on a queue nobody listens there."""
    assert Settings.from_environ({"HOST": "0.0.0.0", **environ}).api_key is None
    assert faults({"HOST": "0.0.0.0", **environ, "PLATFORM": "http"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    """On this machine alone a key is optional."""
    assert Settings.from_environ({"HOST": host}).api_key is None


def test_gateway_may_listen_anywhere() -> None:
    """The gateway always has a key, so every address is right."""
    assert GatewaySettings.from_environ({"HOST": "0.0.0.0"}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("slip", "name"),
    [
        ("MODEL_NAMES", "MODEL_NAME"),
        ("MODELNAME", "MODEL_NAME"),
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("DRAIN_TIMEOUT", "DRAIN_TIMEOUT_S"),
        ("CORS_ORIGIN", "CORS_ORIGINS"),
        ("APIKEY", "API_KEY"),
        ("OPENAI_SERVED_MODEL_NAME_OVERIDE", "OPENAI_SERVED_MODEL_NAME_OVERRIDE"),
    ],
)
def test_slip_names_the_nearest(slip: str, name: str) -> None:
    """A name that is nearly a setting would else be a setting that silently does nothing."""
    assert faults({slip: "1"}) == (f"{slip} is not a setting; the nearest is {name}",)


def test_gateway_slip_names_the_nearest() -> None:
    """The gateway finds slips of its own names."""
    assert gateway_faults({"QUEUE_TIMEOUT": "9", "ENDPOINT_IDS": "a"}) == (
        "ENDPOINT_IDS is not a setting; the nearest is ENDPOINT_ID",
        "QUEUE_TIMEOUT is not a setting; the nearest is QUEUE_TIMEOUT_S",
    )


def test_ordinary_environment_has_no_slips() -> None:
    """No name of a shell, a cloud, a cluster or a library is taken for a slip."""
    environ = {**dict.fromkeys(ORDINARY_NAMES, "1"), "API_KEY": "ft-1"}  # which Lambda's own names call for
    assert Settings.from_environ(environ).port == 8000
    assert GatewaySettings.from_environ(environ).port == 8000


def test_gateway_and_worker_share_an_environment() -> None:
    """What is set for one is no fault to the other."""
    worker = {row.name: row.default for row in TABLE if row.default}
    gateway = {row.name: row.default for row in GATEWAY_TABLE if row.default}
    both = {
        **worker,
        **gateway,
        "UDS": "/run/worker.sock",
        "TOOL_CALL_PARSER": "hermes",
        "MAX_MODEL_LEN": "1024",
    }
    assert Settings.from_environ(both).uds == "/run/worker.sock"
    assert GatewaySettings.from_environ(both).endpoint_id == "local"


def test_foreign_names_are_not_read() -> None:
    """A name that belongs to another program is neither read nor taken for a slip."""
    environ = {"FOREIGN_NAMES": "HOST,MODEL_NAMES", "HOST": "x86_64-conda-linux-gnu", "MODEL_NAMES": "a"}
    settings = Settings.from_environ(environ)
    assert (settings.host, settings.rest) == ("127.0.0.1", {})
    assert GatewaySettings.from_environ(environ).host == "127.0.0.1"


def test_names_without_effect_are_noted() -> None:
    """worker-vllm's dead knobs and names too common to read are accepted, each with its reason."""
    environ = {"DEFAULT_BATCH_SIZE": "50", "MODEL": "gpt2", "MAX_NUM_BATCHED_TOKENS": "0", "DEVICE": ""}
    assert Settings.from_environ(environ).notes == (
        "DEFAULT_BATCH_SIZE does nothing here: tokens are sent as they are made",
        "MODEL does nothing here: set MODEL_NAME",
        "MAX_NUM_BATCHED_TOKENS=0 counts as not set",
    )


def test_every_name_without_effect_is_accepted() -> None:
    """None of them is a fault, to the worker or to the gateway."""
    environ = dict.fromkeys(UNREAD, "1")
    assert len(Settings.from_environ(environ).notes) == len(UNREAD)
    assert GatewaySettings.from_environ(environ).port == 8000


def test_rest_is_the_environment_without_settings() -> None:
    """What is no setting is left for the flags of vLLM."""
    environ = {"PORT": "1", "REVISION": "main", "SEED": " 7 ", "HOME": "/root", "EMPTY": ""}
    assert Settings.from_environ(environ).rest == {"SEED": "7", "HOME": "/root"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
        ("/models/SmolLM2", "SmolLM2"),
        ("/models/SmolLM2/", "SmolLM2"),
        ("./tiny", "tiny"),
        ("tests/data/tiny", "tiny"),
        ("s3://bucket/some/prefix/", "prefix"),
        ("s3://bucket", "bucket"),
        ("gs://bucket/some/prefix", "prefix"),
        ("az://container/models/name/", "name"),
        ("/hf/hub/models--org--name/snapshots/12fd25f77366fa6b3b4b768ec3050bf629380bac", "org/name"),
        ("/", "model"),
        ("..", "model"),
    ],
)
def test_public_name_is_never_a_path(model: str, name: str) -> None:
    """Clients see the name that a user would expect, and nothing of the machine's folders."""
    assert public_name(model) == name
    assert Settings.from_environ({"MODEL_NAME": model}).model_id == name
    assert GatewaySettings.from_environ({"MODEL_NAME": model}).model_id == name


def test_served_model_name_wins() -> None:
    """Whatever the model is, it goes by the name that was given."""
    assert Settings.from_environ({"MODEL_NAME": "/m/x", "SERVED_MODEL_NAME": "mine"}).model_id == "mine"


@pytest.mark.parametrize("endpoint_id", ["a/b", "-a", "ä", "a" * 65, "a b", "a?b"])
def test_endpoint_id_stands_in_a_url(endpoint_id: str) -> None:
    """An endpoint id is a path segment that needs no escape."""
    assert gateway_faults({"ENDPOINT_ID": endpoint_id}) == (
        (
            f"ENDPOINT_ID={endpoint_id!r} is not allowed; "
            "allowed: at most 64 letters, digits, - and _, the first a letter or a digit"
        ),
    )


def test_queue_timeout_is_below_the_clients() -> None:
    """The gateway answers before openai's clients give up after 600 s."""
    assert gateway_faults({"QUEUE_TIMEOUT_S": "600"}) == (
        "QUEUE_TIMEOUT_S='600' is not allowed; allowed: seconds from 1 to 599",
    )


@pytest.mark.parametrize(
    ("text", "nano"), [("0", 0), ("0.15", 150_000_000), ("1000000", 10**15), ("0.000000001", 1)]
)
def test_prices_are_whole_billionths(text: str, nano: int) -> None:
    """So sums of what they make are exact."""
    settings = GatewaySettings.from_environ({"PRICE_INPUT": text, "PRICE_OUTPUT": text})
    assert (settings.price_input, settings.price_output) == (nano, nano)


@pytest.mark.parametrize("text", ["-1", "free", "nan", "inf", "1000001", "0.0000000001"])
def test_what_is_no_price(text: str) -> None:
    """No more decimals than are kept."""
    assert gateway_faults({"PRICE_OUTPUT": text}) == (
        f"PRICE_OUTPUT={text!r} is not allowed; allowed: a number from 0 to 1000000, with at most 9 decimals",
    )


def test_the_data_folder_is_the_users_own() -> None:
    """Where the desktop's standard has it, unless another is set; relative ones are of this place."""
    for environ, folder in (
        ({"HOME": "/home/me", "XDG_DATA_HOME": "/data/me"}, "/data/me/firsttoken"),
        ({"HOME": "/home/me", "DATA_DIR": "/srv/gateway"}, "/srv/gateway"),
        ({"HOME": "/home/me", "DATA_DIR": "here"}, str(Path("here").absolute())),
    ):
        settings = KeptSettings.from_environ(environ)
        assert settings.data_dir == Path(folder)
        assert settings.database_url == f"sqlite:///{folder}/gateway.db"
    settings = KeptSettings.from_environ({"DATABASE_URL": "postgresql://u:secret@host/db", "PORT": "no port"})
    assert settings.database_url == "postgresql://u:secret@host/db"
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    "url", ["u:secret@host", "mysql://u:secret@host/name", "sqlite:///secret.db", "sqlite://"]
)
def test_the_address_of_a_database_is_not_shown(url: str) -> None:
    """It may hold a password. That of a file does not depend on the working folder."""
    allowed = "sqlite:////srv/gateway.db, an absolute path, or postgresql://user:password@host/name"
    assert gateway_faults({"DATABASE_URL": url}) == (
        f"DATABASE_URL (not shown) is not allowed; allowed: a URL such as {allowed}",
    )


def test_bounds_of_workers() -> None:
    """The idle timeout is measured unless it is set; the least is not more than the most."""
    environ = {"MIN_WORKERS": "1", "MAX_WORKERS": "4", "IDLE_TIMEOUT_S": "90"}
    assert GatewaySettings.from_environ(environ).scaling == Scaling(1, 4, 90.0)
    assert GatewaySettings.from_environ({"IDLE_TIMEOUT_S": "Auto"}).scaling == Scaling(0, 1, None)
    assert gateway_faults({"MIN_WORKERS": "3", "MAX_WORKERS": "2", "IDLE_TIMEOUT_S": "never"}) == (
        "IDLE_TIMEOUT_S='never' is not allowed; allowed: auto, or seconds from 1 to 86400",
        "MIN_WORKERS=3 is more than MAX_WORKERS=2",
    )


def test_render_markdown() -> None:
    """The page shows each row with its default, what is allowed and its other spellings."""
    table = (
        Setting("A", "a", Kind("text", str), None, "Does a.", ("B", "C")),
        Setting("D", "d", Kind("`x`, `y`", str), "x", "Does d."),
    )
    assert render_markdown(table) == (
        "| Name | Default | Allowed | What it does | Other spellings |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `A` | not set | text | Does a. | `B`, `C` |\n"
        "| `D` | `x` | `x`, `y` | Does d. |  |\n"
    )
