"""A model in S3, as a start finds it: whether it is there, and what is called how if it was baked.

`MODEL_NAME=s3://bucket/prefix` is a model's folder there, or a bake's, as `python -m builder push` leaves
it: `manifest.json` at the prefix, the model below `model/`. vLLM asks for the files later, through Run:ai's
streamer; here a start that can't succeed ends in seconds and says why. Endpoint, region and credentials
are what boto3 finds by itself: https://docs.aws.amazon.com/boto3/latest/guide/configuration.html
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from handler.errors import ModelNotFound, NoResources, StoreFailed
from handler.manifest import CONFIGS, MODEL, NAME, Difference, Manifest

S3 = "s3://"
CONNECT_S, READ_S, TRIES = 3, 10, 2
SHOWN = 5
"""How many names below a prefix an error lists."""
NO_CREDENTIALS = "NoCredentials"
"""The code of `StoreFailed` where no credentials were found."""

_REGION = "the bucket is in another region: set AWS_REGION"
_REFUSALS = {
    "301": _REGION,
    "403": "access is denied",
    "AccessDenied": "access is denied",
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": "the credentials have expired",
    "InvalidAccessKeyId": "the access key is not known there",
    "NoSuchBucket": "there is no such bucket",
    "PermanentRedirect": _REGION,
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in S3: its own URL, and the manifest of the bake that it is a part of."""

    url: str
    manifest: Manifest | None = None
    differences: tuple[Difference, ...] = ()
    """Files of the model that are not there, or not in their size."""


def find(name: str) -> Stored:
    """The model that `name`, `s3://bucket/prefix`, means: the folder itself, or the bake's that it is.

    Raises `ModelNotFound` if there is none, `ManifestMismatch` for a manifest that can't be read,
    `NoResources` without boto3 or credentials, `StoreFailed` where S3 can't be reached or refuses.
    """
    with _asking(name) as folder:
        return _found(folder)


@contextmanager
def refusals() -> Iterator[None]:
    """Say in a sentence what boto3 means, as `StoreFailed`."""
    exceptions: Any = importlib.import_module("botocore.exceptions")
    try:
        yield
    except exceptions.ClientError as error:
        said = error.response.get("Error", {})
        code, message = str(said.get("Code")), said.get("Message", "")
        reason = _REFUSALS.get(code, f"{error.operation_name} was answered with {code}")
        raise StoreFailed(f"{reason} ({message})", code=code) from error
    except (exceptions.NoCredentialsError, exceptions.CredentialRetrievalError) as error:
        raise StoreFailed(
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, or give the machine a role",
            code=NO_CREDENTIALS,
        ) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:  # their own words have the URL
        raise StoreFailed(f"the connection failed ({type(error).__name__})") from error
    except exceptions.BotoCoreError as error:
        raise StoreFailed(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is below `s3://bucket/prefix`; the prefix is empty or ends with a slash."""

    client: Any
    bucket: str
    prefix: str

    def at(self, url: str) -> _Folder:
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        prefix = prefix.strip("/")
        return _Folder(self.client, bucket, f"{prefix}/" if prefix else "")

    @property
    def url(self) -> str:
        return f"{S3}{self.bucket}/{self.prefix}".rstrip("/")

    def names(self) -> list[str]:
        """What is directly in it, folders with a slash; of a great many, some."""
        page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, Delimiter="/")
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        return [name for key in keys if (name := key.removeprefix(self.prefix))]

    def sizes(self, part: str) -> dict[str, int]:
        """The size of every object in `part` of it, in bytes, by its name in this folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + part
        )
        entries = (entry for page in pages for entry in page.get("Contents", ()))
        return {entry["Key"].removeprefix(self.prefix): entry["Size"] for entry in entries}

    def read(self, name: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()
        return data


@contextmanager
def _asking(name: str) -> Iterator[_Folder]:
    """The folder `name`, for questions; what S3 answers instead is told of the setting."""
    if importlib.util.find_spec("boto3") is None:
        raise NoResources(f"MODEL_NAME={name} needs boto3: pip install 'firsttoken[aws]'")
    config = importlib.import_module("botocore.config").Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": TRIES},
    )
    try:
        with refusals():
            client = importlib.import_module("boto3").session.Session().client("s3", config=config)
            yield _Folder(client, "", "").at(name)
    except StoreFailed as failure:
        told = f"MODEL_NAME={name}: {failure}"
        if failure.code == "NoSuchBucket":
            raise ModelNotFound(told) from failure
        if failure.code == NO_CREDENTIALS:
            raise NoResources(told) from failure
        raise StoreFailed(told, code=failure.code) from failure


def _found(folder: _Folder) -> Stored:
    names = folder.names()
    if NAME in names and f"{MODEL}/" in names:
        return _baked(folder)
    if not any(config in names for config in CONFIGS):
        there = f"has no {CONFIGS[0]}, so it holds no model" if names else "has no object below it"
        shown = f"; it has {', '.join(sorted(names)[:SHOWN])}" if names else ""
        raise ModelNotFound(f"MODEL_NAME={folder.url}: the prefix {there}{shown}")
    if f"/{folder.prefix}".endswith(f"/{MODEL}/"):
        above = folder.at(folder.url.removesuffix(MODEL))
        if NAME in above.names():
            return _baked(above)
    return Stored(folder.url)


def _baked(folder: _Folder) -> Stored:
    manifest = Manifest.parse(folder.read(NAME), f"{folder.url}/{NAME}")
    sizes = folder.sizes(f"{MODEL}/")
    differences = [
        Difference(
            path,
            "size" if path in sizes else "missing",
            f"{file.size_bytes} bytes",
            f"{sizes[path]} bytes" if path in sizes else "no such object",
        )
        for path, file in sorted(manifest.files.items())
        if path.startswith(f"{MODEL}/") and sizes.get(path) != file.size_bytes
    ]
    return Stored(f"{folder.url}/{MODEL}", manifest, tuple(differences))
