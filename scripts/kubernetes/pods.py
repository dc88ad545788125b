"""The pods that a set of objects comes to, whoever makes them: a Deployment, KServe, KubeRay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

COMPONENT = "app.kubernetes.io/component"
"""The label that says what a pod is: `worker`, `gateway`, `ray-head`."""


@dataclass(frozen=True, slots=True)
class Pod:
    """What a kind of pod is made of."""

    owner: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def component(self) -> str:
        """What it is."""
        return self.labels.get(COMPONENT, "")

    @property
    def containers(self) -> Sequence[Object]:
        """All that run in it."""
        found: Sequence[Object] = [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]
        return found


def name(one: Object) -> str:
    """What an object is called in a fault: `Deployment worker`."""
    return f"{one['kind']} {one['metadata']['name']}"


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every kind of pod."""
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "Deployment":
            yield _templated(name(one), spec["template"])
        elif one["kind"] == "InferenceService":
            predictor = spec["predictor"]
            yield Pod(name(one), predictor.get("labels", {}), predictor)
        elif one["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            yield _templated(f"{name(one)} head", cluster["headGroupSpec"]["template"])
            for group in cluster.get("workerGroupSpecs", ()):
                yield _templated(f"{name(one)} {group['groupName']}", group["template"])


def services(objects: Sequence[Object]) -> Mapping[str, set[int]]:
    """The names of the Services, those that operators make too, and the ports of each."""
    found: dict[str, set[int]] = {}
    for one in objects:
        called = one["metadata"]["name"]
        if one["kind"] == "Service":
            found[called] = {port["port"] for port in one["spec"]["ports"]}
        elif one["kind"] == "InferenceService":
            found[f"{called}-predictor"] = {80}
        elif one["kind"] == "RayService":
            found[f"{called}-serve-svc"] = {8000}
    return found


def _templated(owner: str, template: Object) -> Pod:
    return Pod(owner, template.get("metadata", {}).get("labels", {}), template["spec"])


def environ(container: Object, objects: Sequence[Object]) -> dict[str, str]:
    """The environment of `container`; something stands for what a Secret has."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in objects if one["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= maps.get(source.get("configMapRef", {}).get("name"), {})
    for variable in container.get("env", ()):
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        found[variable["name"]] = _stand_in(secret["key"]) if secret else variable.get("value", "")
    return found


def _stand_in(key: str) -> str:
    return "postgresql+psycopg://secret" if key == "DATABASE_URL" else "secret"
