"""Plans of models that are elsewhere: headers by ranges, and nothing downloaded."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from builder.__main__ import run
from builder.origin import find
from tests.configs import LLAMA_8B
from tests.hub import COMMIT, Hub, serving
from tests.place import Place
from tests.safetensors_file import weights

TOKEN = "hf_ordinarily_secret"
SHARDS = {
    f"model-0000{number}-of-00002.safetensors": weights({f"layer.{number}": ("BF16", (1024, 1024))})
    for number in (1, 2)
}
INDEX = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS, 1)}}
FILES = {
    "README.md": b"# A model",
    "config.json": json.dumps(LLAMA_8B).encode(),
    "consolidated.safetensors": b"another format's",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "pytorch_model.bin": b"pickle",
    **SHARDS,
}
CUT = {"config.json": FILES["config.json"], "model.safetensors": b"<html>"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a model in two files, one in one file with a long header, and one that is damaged."""
    one = {"config.json": FILES["config.json"], "model.safetensors": weights({"a": ("F16", (9,))}, 150_000)}
    with serving(Hub({"org/two": FILES, "org/one": one, "org/cut": CUT})) as hub:
        yield hub


def planned(
    capsys: pytest.CaptureFixture[str], model: str, environ: Mapping[str, str], *arguments: str
) -> tuple[int, dict[str, Any], str]:
    """The exit code, the JSON object and what is said of a plan."""
    errors = io.StringIO()
    code = run(["plan", model, "--json", *arguments], {"HOME": "/nonexistent", **environ}, errors)
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}, errors.getvalue()


def sent_bytes(hub: Hub) -> int:
    """How much of the files' contents was sent."""
    spans = (span.split("-") for _, span in hub.ranges)
    return sum(int(last) - int(first) + 1 for first, last in spans)


def test_a_repository_in_shards_is_planned_by_its_headers(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two megabytes of weights each, of which the first tenth megabyte is read at most."""
    code, found, said = planned(capsys, "org/two", {"HF_ENDPOINT": hub.url})
    assert (code, said) == (0, "")
    assert (found["model"]["name"], found["model"]["source"]) == ("org/two", "Hugging Face")
    assert found["model"]["commit"] == COMMIT
    assert found["weights"]["files"] == 2
    assert found["weights"]["files_bytes"] == sum(map(len, SHARDS.values()))
    assert found["weights"]["bytes_by_dtype"] == {"BF16": 2 * 2 * 1024 * 1024}
    assert found["kv_cache"]["token_bytes"] == 131072
    assert sent_bytes(hub) < 210_000
    assert not [
        path for path in hub.paths("GET") if path.endswith((".bin", ".md", "consolidated.safetensors"))
    ]


def test_a_long_header_is_read_whole(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """In a second request."""
    code, found, _ = planned(capsys, "org/one", {"HF_ENDPOINT": hub.url})
    assert (code, found["weights"]["bytes_by_dtype"]) == (0, {"F16": 18})


def test_what_the_hub_refuses_is_told_without_the_token(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """No such model, no such revision, damaged weights; and a token is sent, never shown."""
    environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    for arguments, code, why in (
        (("org/none",), 66, "has no such model, or the token in HF_TOKEN may not read it"),
        (("org/two", "--revision", "v9"), 66, "has no revision 'v9' of it"),
        (("org/cut",), 65, "model.safetensors is no safetensors file"),
    ):
        found, _, said = planned(capsys, arguments[0], environ, *arguments[1:])
        assert (found, why in said, TOKEN in said) == (code, True, False), said
    hub.token = TOKEN
    assert planned(capsys, "org/two", environ)[0] == 0
    assert planned(capsys, "org/two", {"HF_ENDPOINT": hub.url})[0] == 66


def test_a_prefix_in_a_bucket_is_planned_by_its_headers(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listed once, then parts of each file; what lies deeper or beside it is not looked at."""
    for name, body in FILES.items():
        place.put(name, body)
    place.put("old/model.safetensors", b"x")
    code, found, said = planned(capsys, place.url, {})
    assert (code, said) == (0, "")
    assert (found["model"]["name"], found["model"]["source"]) == (place.url, "S3")
    assert found["weights"]["files_bytes"] == sum(map(len, SHARDS.values()))
    assert found["kv_cache"]["token_bytes"] == 131072
    asked = sorted(line.partition("?")[0] for line in place.answered("GET") if line)
    assert [name for name in asked if "." in name] == [
        "config.json",
        *sorted(SHARDS),
        "model.safetensors.index.json",
    ]


def test_a_part_of_an_object_is_read(place: Place) -> None:
    """And no more of it."""
    for name, body in FILES.items():
        place.put(name, body)
    found = find(place.url, None, {})
    assert found.get("README.md", 2, 5) == FILES["README.md"][2:5]
    assert found.files == {name: len(body) for name, body in FILES.items()}


def test_what_a_bucket_lacks_is_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty prefix, and one without weights."""
    code, _, said = planned(capsys, place.url, {})
    assert (code, "nothing is there" in said) == (66, True), said
    place.put("config.json", b"{}")
    code, _, said = planned(capsys, place.url, {})
    assert (code, "it has no .safetensors files" in said) == (66, True), said
