"""The Hugging Face token: where it may be. It goes into requests and nowhere else, nor does any secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from handler.errors import UsageError

SECRETS = Path("/run/secrets")
"""Where builds and Compose mount secrets: https://docs.docker.com/build/building/secrets/."""
NAMES = ("HF_TOKEN", "hf_token")

_SECRET = re.compile(r"(^|_)(CREDENTIALS?|KEYS?|PAT|TOKEN)(_FILE|_ID|_PATH)?$|PASS(PHRASE|WD|WORD)|SECRET")
_TOKEN = re.compile(r"[!-~]+")


def hf_token(environ: Mapping[str, str], secrets: Path = SECRETS) -> str | None:
    """The token in HF_TOKEN, else in the file that HF_TOKEN_PATH names, else in a mounted secret.

    Raises `UsageError`, which does not quote it, where a file can't be read or what is there can be
    no token: an HTTP client would quote it in its complaint.
    """
    for place, text in _places(environ, secrets):
        if token := text.strip():
            if not _TOKEN.fullmatch(token):
                raise UsageError(f"{place} holds something that can't be a token: spaces or odd characters")
            return token
    return None


def _places(environ: Mapping[str, str], secrets: Path) -> Iterator[tuple[str, str]]:
    yield "HF_TOKEN", environ.get("HF_TOKEN", "")
    files = [secrets / name for name in NAMES]
    if path := environ.get("HF_TOKEN_PATH"):
        files.insert(0, Path(path).expanduser())
    for file in files:
        try:
            yield str(file), file.read_text(errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(
                f"{file}, for the Hugging Face token, can't be read: {error.strerror}"
            ) from error


def without_password(url: str) -> str:
    """`url` as it may be shown and written down."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a program that has no use for what is secret by its name."""
    return {name: value for name, value in environ.items() if not _SECRET.search(name.upper())}
