"""Where the token may be, and that nothing that is said has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.credentials import hf_token, without_password, without_secrets
from handler.errors import UsageError


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder of mounted secrets, of both names."""
    for name in ("HF_TOKEN", "hf_token"):
        (tmp_path / name).write_text(f"of {name}".replace(" ", "-") + "\n")
    (tmp_path / "elsewhere").write_text("of-the-path\n")
    return tmp_path


def test_first_place_that_has_a_token_is_taken(secrets: Path) -> None:
    """The environment, the file that it names, the mounted secret in upper or lower case."""
    environ = {"HF_TOKEN": " of-the-environment ", "HF_TOKEN_PATH": str(secrets / "elsewhere")}
    found = [hf_token(environ, secrets)]
    found.append(hf_token({**environ, "HF_TOKEN": ""}, secrets))
    found.append(hf_token({}, secrets))
    (secrets / "HF_TOKEN").unlink()
    found.append(hf_token({}, secrets))
    (secrets / "hf_token").unlink()
    found.append(hf_token({"HF_TOKEN_PATH": str(secrets / "gone")}, secrets))
    assert found == ["of-the-environment", "of-the-path", "of-HF_TOKEN", "of-hf_token", None]


@pytest.mark.parametrize(
    "token", ["two words", "line\nline", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "\x7f"]
)
def test_what_can_be_no_token_is_refused_unquoted(token: str, tmp_path: Path) -> None:
    """A client would quote it when it refuses to send it."""
    (tmp_path / "HF_TOKEN").write_text(token, encoding="latin-1")
    for environ, place in [({"HF_TOKEN": token}, "HF_TOKEN"), ({}, f"{tmp_path}/HF_TOKEN")]:
        with pytest.raises(UsageError) as caught:
            hf_token(environ, tmp_path)
        assert str(caught.value) == (
            f"{place} holds something that can't be a token: spaces or odd characters"
        )


def test_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    """A folder, for one."""
    with pytest.raises(UsageError) as caught:
        hf_token({"HF_TOKEN_PATH": str(tmp_path)}, tmp_path)
    assert str(caught.value) == f"{tmp_path}, for the Hugging Face token, can't be read: Is a directory"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@hub.example:8443/x?y", "https://hub.example:8443/x?y"),
        ("https://token@hub.example", "https://hub.example"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
    ],
)
def test_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """Who the user is goes with it."""
    assert without_password(url) == shown


def test_a_program_is_told_no_secret() -> None:
    """By their names; settings that sound alike are none."""
    secrets = ("HF_TOKEN", "API_KEYS", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "GH_PAT", "client_secret")
    harmless = {"PIP_INDEX_URL": "https://user:password@index", "MAX_NUM_BATCHED_TOKENS": "64"}
    assert without_secrets(dict.fromkeys(secrets, "canary") | harmless) == harmless
