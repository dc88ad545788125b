"""Whether what objects call each other by is there, and whether traffic may go where they send it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from scripts.kubernetes.pods import Object, Pod, environ, name, pods, services

SECRETS: Mapping[str, set[str]] = {
    "worker": {"API_KEY", "HF_TOKEN"},
    "gateway": {"API_KEY", "DATABASE_URL"},
    "scaler": {"API_KEY"},
}
"""The Secrets that docs/kubernetes.md has people make. None is among the objects: those are for everybody."""


REFERENCES = {
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
}
"""What a variable may come from."""


def faults(objects: Sequence[Object]) -> Iterator[str]:
    """What is named and is not there."""
    there: dict[str, set[str]] = {"Secret": {*SECRETS}}
    for one in objects:
        if one["kind"] == "Secret":
            yield f"{name(one)} is in plain text"
        there.setdefault(one["kind"], set()).add(one["metadata"]["name"])
    every = [*pods(objects)]
    for pod in every:
        for kind, called in _named(pod):
            if called not in there.get(kind, ()):
                yield f"{pod.owner}: there is no {kind} {called}"
        for container in pod.containers:
            yield from (f"{pod.owner}: {fault}" for fault in _secret_keys(container))
    for one in objects:
        yield from (f"{name(one)}: {fault}" for fault in _selected(one, every))
    yield from _roads(objects, every)


def _named(pod: Pod) -> Iterator[tuple[str, str]]:
    """The kind and the name of each object that `pod` names."""
    if account := pod.spec.get("serviceAccountName"):
        yield "ServiceAccount", account
    for volume in pod.spec.get("volumes", ()):
        if claim := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", claim["claimName"]
    for container in pod.containers:
        sources = [*container.get("envFrom", ())]
        sources += [variable.get("valueFrom", {}) for variable in container.get("env", ())]
        for source in sources:
            for reference, called in source.items():
                yield REFERENCES[reference], called["name"]


def _secret_keys(container: Object) -> Iterator[str]:
    for variable in container.get("env", ()):
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        if secret and secret["key"] not in SECRETS.get(secret["name"], {secret["key"]}):
            yield f"{variable['name']}: the Secret {secret['name']} has no {secret['key']}"


def _selected(one: Object, every: Sequence[Pod]) -> Iterator[str]:
    """Whom a Service, a budget, a policy or a Deployment selects."""
    spec = one.get("spec", {})
    if one["kind"] == "Service":
        selector, ports = {"matchLabels": spec["selector"]}, [port["targetPort"] for port in spec["ports"]]
    elif one["kind"] in {"PodDisruptionBudget", "Deployment"}:
        selector, ports = spec["selector"], []
    elif one["kind"] == "NetworkPolicy":
        selector, ports = spec["podSelector"], []
    else:
        return
    chosen = [pod for pod in every if selects(selector, pod.labels)]
    if not chosen:
        yield "selects no pod"
    for pod in chosen:
        known = {
            value
            for container in pod.containers
            for port in container.get("ports", ())
            for value in (port.get("name"), port["containerPort"])
        }
        yield from (f"{pod.owner} has no port {port}" for port in ports if port not in known)


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether `selector` takes a pod with `labels`."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", ()):
        if rule["operator"] != "In":
            raise ValueError(f"{rule['operator']} is not understood here")
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def _roads(objects: Sequence[Object], every: Sequence[Pod]) -> Iterator[str]:
    """Whether the gateways' upstream is there, and may be asked."""
    there = services(objects)
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in policies:
        yield "no policy denies by default"
    for pod in every:
        for container in pod.containers:
            if not (url := environ(container, objects).get("UPSTREAM_URL")):
                continue
            parts = urlsplit(url)
            host, port = (parts.hostname or "").partition(".")[0], parts.port or 80
            if port not in there.get(host, ()):
                yield f"{pod.owner}: there is no Service for UPSTREAM_URL={url}"
            for other in every:
                if other.component in {"worker", "ray-head"} and not _may(policies, pod, other, 8000):
                    yield f"{pod.owner} may not ask {other.owner} on port 8000"


def _may(policies: Sequence[Object], asking: Pod, asked: Pod, port: int) -> bool:
    """Whether `policies` let `asking` connect to `port` of `asked`, within the namespace."""

    def allowed(pod: Pod, other: Pod, way: str, peers: str) -> bool:
        return any(
            _fits(rule, other, peers, port)
            for policy in policies
            if selects(policy["podSelector"], pod.labels)
            for rule in policy.get(way, ())
        )

    return allowed(asking, asked, "egress", "to") and allowed(asked, asking, "ingress", "from")


def _fits(rule: Object, other: Pod, peers: str, port: int) -> bool:
    if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
        return False
    return peers not in rule or any(
        peer.keys() == {"podSelector"} and selects(peer["podSelector"], other.labels) for peer in rule[peers]
    )
