"""What every pod of ours keeps to, beyond having the right shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from handler.parallel import devices_per_engine
from handler.platforms.door import PROBES
from scripts.kubernetes.pods import Object, Pod, environ, name, pods

GPU = "nvidia.com/gpu"
TO_END_S = 20
"""What a process of ours may take beyond its drain: to flush, to write down, to let go of a device."""
SILENCE_S = 60
"""How long a worker may not answer before it is killed: no prefill takes that."""
DRAINS = {"worker": ("Deployment", "InferenceService"), "gateway": ("Deployment",)}
"""Whose pods drain by themselves when they are told to stop; Ray has its own way."""
ANSWERED: Mapping[str, Sequence[str]] = {
    "worker": PROBES,
    "gateway": ("/health",),
    "ray": ("/api/healthz", "/-/healthz"),
}
"""The paths that a probe may ask."""
FOLDERS = {"HOME": "/tmp", "TMPDIR": "/tmp", "HF_HOME": "", "XDG_CACHE_HOME": "", "DATA_DIR": ""}  # noqa: S108
"""Variables that name a folder to write to, and the one that the image names."""


def faults(objects: Sequence[Object]) -> Iterator[str]:
    """What is wrong with the pods that `objects` come to."""
    for pod in pods(objects):
        if pod.component not in {"worker", "gateway", "ray-head"}:
            yield f"{pod.owner}: {pod.component!r} is nothing that is known here"
            continue
        for rule in (_rights, _account, _resources, _probes, _grace, _folders, _memory):
            yield from (f"{pod.owner}: {fault}" for fault in rule(pod, objects))
    for one in objects:
        if one["kind"] == "RayService":
            autoscaler = one["spec"]["rayClusterConfig"].get("autoscalerOptions", {})
            yield from (f"{name(one)}: autoscaler: {fault}" for fault in _unprivileged(autoscaler))


def _rights(pod: Pod, _: Sequence[Object]) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield f"has the node's {field}"
    for container in pod.containers:
        yield from (f"{container['name']}: {fault}" for fault in _unprivileged(container))


def _unprivileged(container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for field, value in wanted.items():
        if context.get(field) != value:
            yield f"{field} is not {value}"
    if context.keys() - wanted:
        yield f"has {sorted(context.keys() - wanted)} of its own"


def _account(pod: Pod, _: Sequence[Object]) -> Iterator[str]:
    if pod.component != "ray-head":  # its autoscaler asks Kubernetes for nodes, as who KubeRay says
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield "has a token of Kubernetes"
        if pod.spec.get("serviceAccountName") != pod.component:
            yield "has not its own account"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "has variables of every service, which look like settings"


def _resources(pod: Pod, _: Sequence[Object]) -> Iterator[str]:
    for container in pod.containers:
        resources = container.get("resources", {})
        for field in ("cpu", "memory"):
            if field not in resources.get("requests", {}):
                yield f"{container['name']}: requests no {field}"
        if "memory" not in resources.get("limits", {}):
            yield f"{container['name']}: has no limit of memory"


def _probes(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    by_ray = pod.owner.startswith("RayService")
    kinds = ("readinessProbe", "livenessProbe") + (() if by_ray else ("startupProbe",))
    for container in pod.containers:
        ports = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
        told = environ(container, objects)
        ports |= {told[key]: int(told[key]) for key in ("PORT", "PORT_HEALTH") if key in told}
        for kind in kinds:
            if (probe := container.get(kind)) is None:
                yield f"{container['name']}: has no {kind}"
                continue
            asked = probe.get("httpGet", {})
            if asked.get("path") not in ANSWERED["ray" if by_ray else pod.component]:
                yield f"{container['name']}: {kind} asks for {asked.get('path')}"
            if asked.get("port") not in {*ports, *ports.values()}:
                yield f"{container['name']}: {kind} asks port {asked.get('port')}, which there is none of"
            if kind == "livenessProbe" and probe["periodSeconds"] * probe["failureThreshold"] < SILENCE_S:
                yield f"{container['name']}: is killed after less than {SILENCE_S} s of silence"
        if pod.component == "worker" and not by_ray:
            paths = {kind: container.get(kind, {}).get("httpGet", {}).get("path") for kind in kinds}
            if (paths["startupProbe"], paths["readinessProbe"]) != ("/ready", "/ready"):
                yield f"{container['name']}: /ping is answered before the model is there; ask /ready"


def _grace(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    if pod.owner.partition(" ")[0] not in DRAINS.get(pod.component, ()):
        return
    (container,) = pod.spec["containers"]
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain_s = float(environ(container, objects).get("DRAIN_TIMEOUT_S", 30))
    wanted = before + drain_s + TO_END_S
    if pod.spec.get("terminationGracePeriodSeconds", 30) < wanted:
        yield f"is killed before it has drained: terminationGracePeriodSeconds is less than {wanted:g}"
    if not before:
        yield "has no preStop: it is asked by nodes that have not heard yet that it stops"


def _folders(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
    for container in pod.containers:
        mounts = container.get("volumeMounts", ())
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{container['name']}: mounts {mount['name']}, which is no volume"
        writable = [PurePosixPath(mount["mountPath"]) for mount in mounts if not mount.get("readOnly")]
        told = environ(container, objects)
        for variable, default in FOLDERS.items():
            folder = told.get(variable, default)
            if folder and not any(PurePosixPath(folder).is_relative_to(at) for at in writable):
                yield f"{container['name']}: can't write to {variable}={folder}"


def _memory(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    if pod.component != "worker":
        return
    (container,) = pod.spec["containers"]
    shm = [mount["name"] for mount in container.get("volumeMounts", ()) if mount["mountPath"] == "/dev/shm"]  # noqa: S108
    sizes = [
        volume.get("emptyDir", {}).get("sizeLimit")
        for volume in pod.spec.get("volumes", ())
        if volume["name"] in shm and volume.get("emptyDir", {}).get("medium") == "Memory"
    ]
    if not sizes or None in sizes:
        yield "has no /dev/shm of a size: NCCL needs more than the 64 MiB of a container"
    devices = int(container.get("resources", {}).get("limits", {}).get(GPU, 0))
    wanted = devices_per_engine(environ(container, objects))
    if devices and devices != wanted:
        yield f"has {devices} of {GPU}, and its engine is for {wanted}"
