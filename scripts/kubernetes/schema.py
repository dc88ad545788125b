"""Whether an object has the shape that Kubernetes, or the operator whose kind it is, wants."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from scripts.install import ROOT

VERSIONS = ("1.32", "1.37")
"""The oldest Kubernetes that is meant, and the newest that PyPI's `kubernetes-validate` knows."""
FOLDER = Path("deploy/kubernetes/schemas")
"""Of kinds that are operators'; `scripts.kubernetes.crds` made them."""
CORE = "/api/_definitions.json"
"""What Kubernetes' own are called in a reference."""

Object = Mapping[str, Any]


def faults(one: Object) -> Iterator[str]:
    """What is wrong with the shape of `one`, for the oldest and for the newest Kubernetes."""
    found: dict[str, None] = {}
    for version in VERSIONS:
        schema = _schema(str(one.get("kind")), str(one.get("apiVersion")), version)
        if schema is None:
            yield f"{one.get('apiVersion')} {one.get('kind')} is no kind that is known here"
            return
        validator = Draft202012Validator(schema, registry=_registry(version))
        for error in validator.iter_errors(one):
            at = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
            found[f"{at.removeprefix('.') or 'it'}: {error.message}"] = None
    yield from found


@cache
def core(version: str = VERSIONS[-1]) -> Mapping[str, Any]:
    """Kubernetes' own definitions by name; strict: an object takes no name that is not in its schema."""
    found: Mapping[str, Any] = _file(version, "_definitions")["$defs"]
    return found


def _file(version: str, name: str) -> Any:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    return json.loads((folder / f"{name}.json").read_text())


@cache
def _schema(kind: str, api_version: str, version: str) -> Any:
    if (theirs := ROOT / FOLDER / f"{kind}.json").is_file():
        return json.loads(theirs.read_text())
    # rbac.authorization.k8s.io/v1 is -rbac-v1
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    try:
        return _file(version, f"{kind.lower()}-{group}")
    except FileNotFoundError:
        return None


@cache
def _registry(version: str) -> Registry[Any]:
    definitions = Resource.from_contents(_file(version, "_definitions"), DRAFT202012)
    empty: Registry[Any] = Registry()
    return definitions @ empty
