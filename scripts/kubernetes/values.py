"""What stands in free text, where no schema looks: settings, triggers, annotations, Ray's config."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import yaml
from jsonschema import Draft202012Validator

from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from handler.errors import BadSettings
from handler.flags import flag_faults
from handler.parallel import devices_per_engine
from handler.platforms.ray_settings import RaySettings
from handler.settings import Settings
from scripts.install import ROOT
from scripts.kubernetes.pods import Object, environ, name, pods, services
from scripts.kubernetes.policy import GPU

SERVE_CONFIG = ROOT / "deploy" / "ray" / "serve.yaml"
COOLDOWN_S = 60
"""As little as the gateway's own workers stay idle."""

_TEXT = {"type": "string"}
_NUMBER = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
TRIGGER: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "url": _TEXT,
        "format": {"enum": ["prometheus"]},
        "valueLocation": {"type": "string", "pattern": r'^\w+\{endpoint="[^"]+"\}$'},
        "targetValue": _NUMBER,
        "activationTargetValue": _NUMBER,
        "timeout": {"type": "string", "pattern": r"^\d+(ms|s)$"},
        "authMode": {"enum": ["bearer"]},
        "aggregateFromKubeServiceEndpoints": {"enum": ["true", "false"]},
        "aggregationType": {"enum": ["sum"]},  # of what each gateway has
    },
    "required": ["url", "format", "valueLocation", "targetValue", "authMode"],
    "additionalProperties": False,
}
"""The metadata of a `metrics-api` trigger, as used here (KEDA 2.20, pkg/scalers/metrics_api_scaler.go)."""

ANNOTATIONS: Mapping[str, Sequence[str]] = {
    "serving.kserve.io/deploymentMode": ("Standard", "Knative"),
    "serving.kserve.io/autoscalerClass": ("none", "external"),
}
"""KServe 0.20, pkg/constants/constants.go."""

_RESOURCES = {
    "type": "object",
    "properties": {"num_cpus": {"type": "number"}, "num_gpus": {"type": "number"}},
    "additionalProperties": False,
}
SERVE: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "proxy_location": {"enum": ["EveryNode", "HeadOnly", "Disabled"]},
        "http_options": {
            "type": "object",
            "properties": {
                "host": _TEXT,
                "port": {"type": "integer"},
                "keep_alive_timeout_s": {"type": "integer"},
                "request_timeout_s": {"type": "number"},
            },
            "additionalProperties": False,
        },
        "applications": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": _TEXT,
                    "route_prefix": {"type": "string", "pattern": "^/"},
                    "import_path": {"const": "handler.platforms.ray_serve:app"},
                    "args": {"type": "object"},
                    "deployments": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"name": {"const": "worker"}, "ray_actor_options": _RESOURCES},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                },
                "required": ["name", "import_path", "args"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["applications"],
    "additionalProperties": False,
}
"""What of Ray's `ServeDeploySchema` (2.60, ray/serve/schema.py) is used here."""


def faults(objects: Sequence[Object]) -> Iterator[str]:
    """What says something that nobody understands, or that does not fit the rest."""
    for pod in pods(objects):
        for container in pod.containers:
            if pod.component in {"worker", "gateway"}:
                told = environ(container, objects)
                yield from (f"{pod.owner}: {fault}" for fault in _settings(pod.component, told))
    rules = {"ScaledObject": _scaling, "InferenceService": _predictor, "RayService": _serve}
    for one in objects:
        if rule := rules.get(one["kind"]):
            yield from (f"{name(one)}: {fault}" for fault in rule(one, objects))


def flags(objects: Sequence[Object], parser: ArgumentParser) -> Iterator[str]:
    """What vLLM's `parser` does not understand of the workers' environment."""
    for pod in pods(objects):
        for container in pod.containers if pod.component == "worker" else ():
            for fault in flag_faults(parser, environ(container, objects)):
                yield f"{pod.owner}: {fault}"
    for one in objects:
        if one["kind"] == "RayService":
            (application,) = yaml.safe_load(one["spec"]["serveConfigV2"])["applications"]
            given = {key: str(value) for key, value in application["args"].items()}
            yield from (f"{name(one)}: {fault}" for fault in flag_faults(parser, given))


def _settings(component: str, told: Mapping[str, str]) -> Iterator[str]:
    try:
        if component == "gateway":
            GatewaySettings.from_environ(told)
        else:
            Settings.from_environ(told)
    except BadSettings as error:
        yield from error.faults


def _scaling(one: Object, objects: Sequence[Object]) -> Iterator[str]:
    spec = one["spec"]
    target = spec["scaleTargetRef"]["name"]
    targets = [it for it in objects if it["kind"] == "Deployment" and it["metadata"]["name"] == target]
    if not targets:
        yield f"there is no Deployment {target}"
    if any("replicas" in it["spec"] for it in targets):
        yield f"Deployment {target} has replicas: each apply would scale it"
    if spec.get("fallback", {}).get("replicas") == 0:
        yield "fallback.replicas is 0: while the metric can't be read, KEDA would scale to 0"
    if spec.get("minReplicaCount") == 0 and spec.get("cooldownPeriod", 300) < COOLDOWN_S:
        yield f"cooldownPeriod is less than {COOLDOWN_S} s"
    for trigger in spec["triggers"]:
        if trigger["type"] != "metrics-api":
            yield f"{trigger['type']} is no trigger of ours"
            continue
        yield from _shape("trigger", TRIGGER, trigger["metadata"])
        yield from _asked(trigger, one, objects)


def _asked(trigger: Object, one: Object, objects: Sequence[Object]) -> Iterator[str]:
    """Whether the trigger asks for what the gateway has, where it is, with a key."""
    metadata = trigger["metadata"]
    metric, _, labels = metadata.get("valueLocation", "").partition("{")
    if metric not in {row.name for row in Metrics().rows if row.type == "gauge"}:
        yield f"{metric} is no gauge of the gateway"
    endpoints = {
        told["ENDPOINT_ID"]
        for pod in pods(objects)
        for told in (environ(container, objects) for container in pod.containers)
        if "UPSTREAM_URL" in told
    }
    if labels.partition('"')[2].partition('"')[0] not in endpoints:
        yield f"{labels} is none of the gateway's endpoints: {', '.join(sorted(endpoints))}"
    url = urlsplit(metadata.get("url", ""))
    host, _, namespace = (url.hostname or "").partition(".")
    if (url.port or 80) not in services(objects).get(host, ()) or url.path != "/metrics":
        yield f"there are no metrics at {metadata.get('url')}"
    if namespace.partition(".")[0] != one["metadata"].get("namespace"):
        yield f"{url.hostname} is not in the namespace {one['metadata'].get('namespace')}"
    gateways = sum(
        it["spec"].get("replicas", 1)
        for it in objects
        if it["kind"] == "Deployment" and it["metadata"]["name"] == host
    )
    if gateways > 1 and metadata.get("aggregateFromKubeServiceEndpoints") != "true":
        yield f"of {gateways} gateways one is asked: each knows of its own requests"
    reference = trigger.get("authenticationRef", {}).get("name")
    keys = [
        it for it in objects if it["kind"] == "TriggerAuthentication" and it["metadata"]["name"] == reference
    ]
    if not keys:
        yield f"there is no TriggerAuthentication {reference}"
    for key in keys:
        found = [(it["parameter"], it["name"], it["key"]) for it in key["spec"]["secretTargetRef"]]
        if found != [("token", "scaler", "API_KEY")]:
            yield f"{name(key)} is not the key of the Secret scaler"


def _predictor(one: Object, _: Sequence[Object]) -> Iterator[str]:
    for key, value in one["metadata"].get("annotations", {}).items():
        if key.startswith("serving.kserve.io/") and value not in ANNOTATIONS.get(key, ()):
            yield f"{key}: {value} is not known here"
    names = [container["name"] for container in one["spec"]["predictor"]["containers"]]
    if names != ["kserve-container"]:
        yield f"its container is called {names}, KServe wants kserve-container"


def _serve(one: Object, _: Sequence[Object]) -> Iterator[str]:
    config = yaml.safe_load(one["spec"]["serveConfigV2"])
    before = [*_shape("serveConfigV2", SERVE, config), *_as_ray(config)]
    yield from before
    if before:
        return
    (application,) = config["applications"]
    (base,) = (ours := yaml.safe_load(SERVE_CONFIG.read_text()))["applications"]
    if {**config, "applications": 0} != {**ours, "applications": 0}:
        yield f"serveConfigV2 is not {SERVE_CONFIG.relative_to(ROOT)} any more"
    if any(application.get(field) != base[field] for field in base.keys() - {"args"}):
        yield f"the application is not that of {SERVE_CONFIG.relative_to(ROOT)} any more"
    given = {key: str(value) for key, value in application["args"].items()}
    group = one["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"].get(GPU, 0))
    try:
        Settings.from_environ({**given, "API_KEY": "node"})
        settings = RaySettings.from_environ(given, gpus=gpus > 0)
    except BadSettings as error:
        yield from error.faults
        return
    if (group["minReplicas"], group["maxReplicas"]) != (settings.min_workers, settings.max_workers):
        yield "the nodes are not as many as MIN_WORKERS and MAX_WORKERS"
    options = application.get("deployments", [{}])[0].get("ray_actor_options", {})
    if not gpus == options.get("num_gpus", 0) == (devices_per_engine(given) if gpus else 0):
        yield f"a node has {gpus} GPUs, a replica {options.get('num_gpus', 0)}"


def _as_ray(config: Any) -> Iterator[str]:
    """What Ray itself says of the config, where it is installed."""
    if find_spec("ray") is None:
        return
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415 - it takes a second

    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        yield f"serveConfigV2: {' '.join(str(error).split())}"


def _shape(what: str, schema: Mapping[str, Any], value: Any) -> Iterator[str]:
    yield from (f"{what}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value))
