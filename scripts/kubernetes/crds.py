"""Make deploy/kubernetes/schemas/ of what operators publish: names and types, nothing else.

    python -m scripts.kubernetes.crds kedacore/keda=CLONE kserve/kserve=CLONE ray-project/kuberay=CLONE

A schema of theirs is hundreds of kilobytes, because a pod is in it with all its descriptions. Here a pod is
Kubernetes' own, by reference, and an object takes no name that theirs lacks, so that a slip is found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from scripts.install import ROOT
from scripts.kubernetes.schema import CORE, FOLDER, core

INLINED = ("io.k8s.api.core.v1.PodSpec", "io.k8s.api.core.v1.Container")
"""What operators have the fields of in objects of their own, beside others."""
SAME_FROM = 4
"""As many names as an object must have to be taken for one of Kubernetes' that has just these."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a schema is from: a file in a commit."""

    repository: str
    tag: str
    commit: str
    path: str
    kind: str
    version: str


SOURCES = (
    Source(
        "kedacore/keda",
        "v2.20.2",
        "68a5b5028f35b22d50597c69819ab32c4e92f21a",
        "config/crd/bases/keda.sh_scaledobjects.yaml",
        "ScaledObject",
        "v1alpha1",
    ),
    Source(
        "kedacore/keda",
        "v2.20.2",
        "68a5b5028f35b22d50597c69819ab32c4e92f21a",
        "config/crd/bases/keda.sh_triggerauthentications.yaml",
        "TriggerAuthentication",
        "v1alpha1",
    ),
    Source(
        "kserve/kserve",
        "v0.20.0",
        "1fb781055dd1567164358233e1125142ca6ef1fe",
        "config/crd/full/serving.kserve.io_inferenceservices.yaml",
        "InferenceService",
        "v1beta1",
    ),
    Source(
        "ray-project/kuberay",
        "v1.7.0",
        "59d663aeec13760646da3db9c1cf8cfe883e30b7",
        "ray-operator/config/crd/bases/ray.io_rayservices.yaml",
        "RayService",
        "v1",
    ),
)


def main(argv: Sequence[str]) -> None:
    """Write the schema of each source whose repository `argv` has a clone of."""
    clones = dict(word.split("=", 1) for word in argv)
    for source in SOURCES:
        if clone := clones.get(source.repository):
            line = ["git", "-C", clone, "show", f"{source.commit}:{source.path}"]
            raw = subprocess.run(line, capture_output=True, check=True).stdout
            text = json.dumps(made(yaml.safe_load(raw), source), separators=(",", ":"), sort_keys=True)
            (ROOT / FOLDER / f"{source.kind}.json").write_text(text + "\n")


def made(crd: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The schema of one kind of `crd`."""
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == source.version)
    compact = _Compact(core())
    spec = compact.schema(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return {
        "$id": f"https://kubernetes.io/crd/{source.kind}.json",
        "$comment": f"{source.repository} {source.tag} {source.commit} {source.path}",
        "type": "object",
        "properties": {
            "apiVersion": {"enum": [f"{crd['spec']['group']}/{source.version}"]},
            "kind": {"enum": [source.kind]},
            "metadata": _ref("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
            "spec": spec,
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "$defs": compact.shared,
    }


class _Compact:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._names = {name: {*one.get("properties", ())} for name, one in definitions.items()}
        self._by_names: dict[frozenset[str], str] = {}
        for name in sorted(self._names, reverse=True):  # of several that are alike the first is meant
            self._by_names[frozenset(self._names[name])] = name
        self._numbers: dict[str, int] = {}
        self.shared: dict[str, Any] = {}

    def schema(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """`theirs`, with what makes a manifest right or wrong and no more."""
        if theirs.get("x-kubernetes-int-or-string"):
            return {"type": ["integer", "string"]}
        if theirs.get("x-kubernetes-preserve-unknown-fields"):
            return {"type": "object"}
        if "properties" in theirs:
            return self._object(theirs)
        found = {name: theirs[name] for name in ("type", "enum", "minimum") if name in theirs}
        if isinstance(values := theirs.get("additionalProperties"), dict):
            found["additionalProperties"] = self.schema(values)
        if "items" in theirs:
            found["items"] = self.schema(theirs["items"])
        return found

    def _object(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        fields = theirs["properties"]
        if len(fields) >= SAME_FROM and (name := self._by_names.get(frozenset(fields))):
            return _ref(name)
        inlined = self._inlined(fields)
        found = {
            "type": "object",
            "properties": {
                name: _ref(inlined[name], name) if name in inlined else self.schema(field)
                for name, field in fields.items()
            },
            "additionalProperties": False,
        }
        if required := theirs.get("required"):
            found["required"] = required
        return self._once(found) if len(fields) >= SAME_FROM else found

    def _inlined(self, fields: Iterable[str]) -> dict[str, str]:
        """Which of `fields` are those of one of Kubernetes' own, of whose names most are there."""
        for name in INLINED:
            common = self._names[name] & {*fields}
            if len(common) > len(self._names[name]) / 2:
                return dict.fromkeys(common, name)
        return {}

    def _once(self, schema: dict[str, Any]) -> dict[str, Any]:
        number = self._numbers.setdefault(json.dumps(schema, sort_keys=True), len(self._numbers))
        self.shared[str(number)] = schema
        return {"$ref": f"#/$defs/{number}"}


def _ref(name: str, field: str | None = None) -> dict[str, str]:
    return {"$ref": f"{CORE}#/$defs/{name}" + (f"/properties/{field}" if field else "")}


if __name__ == "__main__":
    main(sys.argv[1:])
