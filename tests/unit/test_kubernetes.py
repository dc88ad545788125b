"""deploy/kubernetes/ is right as far as can be seen without a cluster, and a slip in it is found."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts.install import ROOT
from scripts.kubernetes import check, names, schema
from scripts.kubernetes.crds import SOURCES
from scripts.kubernetes.pods import environ, name, pods

DOCS = ROOT / "docs" / "kubernetes.md"
OVERLAYS = {folder.name: check.rendered(folder) for folder in check.overlays(check.FOLDER)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of deploy/kubernetes, to make slips in."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(check.FOLDER, folder)
    return folder


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_an_overlay_has_no_fault(overlay: str) -> None:
    """What people apply."""
    assert check.found(check.FOLDER / "overlays" / overlay) == []


def test_nor_has_one_with_a_component_that_no_overlay_has(tmp_path: Path) -> None:
    """Every component is rendered somewhere."""
    for folder in check.combined(check.FOLDER, tmp_path):
        assert check.found(folder) == [], folder.name
    used = {component for _, components in check.COMBINED.values() for component in components}
    used |= {
        Path(component).name
        for overlay in check.overlays(check.FOLDER)
        for component in yaml.safe_load((overlay / "kustomization.yaml").read_text()).get("components", ())
    }
    assert used == {folder.name for folder in (check.FOLDER / "components").iterdir()}


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_the_overlay_of_the_docs_can_be_pasted(overlay: str, tmp_path: Path) -> None:
    """Over each of ours; what is not for rayservice says so, and what is in its place has the same model."""
    pasted, for_ray = map(textwrap.dedent, re.findall(r"(?ms)^ +```yaml\n(.*?)^ +```", DOCS.read_text()))
    lines = pasted.splitlines()
    if overlay == "rayservice":
        at = next(n for n, line in enumerate(lines) if "Not with rayservice" in line)
        del lines[at : at + 2]
        lines += for_ray.splitlines()
    mine = tmp_path / "my"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("\n".join(lines).replace("overlays/keda", f"overlays/{overlay}"))
    shutil.copytree(check.FOLDER, tmp_path / "deploy" / "kubernetes")
    assert check.found(mine) == []
    if overlay == "rayservice":
        expected, found = map(serve_config, (OVERLAYS[overlay], check.rendered(mine)))
        expected["applications"][0]["args"].update(MODEL_NAME="Qwen/Qwen3-8B", MAX_MODEL_LEN=8192)
        assert found == expected


def serve_config(objects: Iterable[Mapping[str, Any]]) -> Any:
    """What Ray is to serve."""
    (service,) = (one for one in objects if one["kind"] == "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


SLIPS = [
    (overlay, file, *slip)
    for overlay, files in yaml.safe_load(
        Path(__file__).with_name("kubernetes_slips.yaml").read_text()
    ).items()
    for file, slips in files.items()
    for slip in slips
]
"""Overlay, file, what stands there, what somebody writes, what is said of it."""


@pytest.mark.parametrize(
    ("overlay", "file", "before", "after", "said"),
    SLIPS,
    ids=[f"{overlay}-{after[:40]}" for overlay, _, _, after, _ in SLIPS],
)
def test_a_slip_is_found(copy: Path, overlay: str, file: str, before: str, after: str, said: str) -> None:
    """Of every kind: names, types, values, what does not fit the rest."""
    path = copy / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    try:
        found = check.found(copy / "overlays" / overlay)
    except check.Unrenderable as error:
        found = [str(error)]
    assert any(said in fault for fault in found), found


def test_there_is_a_slip_for_every_overlay_and_for_each_file() -> None:
    """No file is without one, but those that say what belongs together."""
    files = {
        str(path.relative_to(check.FOLDER)) for path in check.FOLDER.rglob("*.*") if path.suffix != ".json"
    }
    named = {file for _, file, *_ in SLIPS}
    assert {overlay for overlay, *_ in SLIPS} == {*OVERLAYS}
    rest = {path for path in files - named if not path.endswith("kustomization.yaml")}
    assert rest == {
        *(f"base/{role}/account.yaml" for role in ("gateway", "worker")),
        *(f"base/gateway/{one}.yaml" for one in ("service", "budget", "network", "volume")),
        "base/namespace/namespace.yaml",
        "components/model-cache/volume.yaml",
        "overlays/rayservice/network.yaml",
    }


def test_one_of_two_gateways_is_not_asked_for_both(copy: Path) -> None:
    """Each counts its own requests."""
    component = copy / "components" / "postgres" / "kustomization.yaml"
    component.write_text(component.read_text().replace('value: "true"', 'value: "false"', 1))
    folders = {folder.name: folder for folder in check.combined(copy, copy.parent / "combined")}
    (fault,) = check.found(folders["keda+postgres"])
    assert "of 2 gateways one is asked" in fault


def test_the_overlay_of_the_docs_can_be_applied(copy: Path) -> None:
    """What people paste: its model and its images are in what is rendered, and no Secret is left out."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    snippet, _ = re.findall(r"(?s)```yaml\n(.*?)```", page)
    (copy.parent / "deploy").mkdir()
    copy.rename(copy.parent / "deploy" / "kubernetes")
    mine = copy.parent / "my"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(textwrap.dedent(snippet))
    assert check.found(mine) == []
    objects = check.rendered(mine)
    told = {pod.component: environ(pod.containers[0], objects) for pod in pods(objects)}
    assert {one["MODEL_NAME"] for one in told.values()} == {"Qwen/Qwen3-8B"}
    images = {pod.containers[0]["image"] for pod in pods(objects)}
    assert images == {f"registry.example/team/{name}:1" for name in ("firsttoken", "firsttoken-gateway")}
    assert {*re.findall(r"create secret generic (\w+)", page)} == {*names.SECRETS}


FREE = {"data", "limits", "requests", "metadata", "rayStartParams"}
"""Where any name may stand, as may labels (they have a slash); `values` knows those of a trigger."""


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of each name that a schema knows, in an object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if "/" in key or (at and at[-1] in FREE and at != ("metadata",)):
                continue
            yield (*at, key)
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*at, index))


EVERY: list[tuple[Mapping[str, Any], tuple[str | int, ...]]] = [
    (one, place) for objects in OVERLAYS.values() for one in objects for place in places(one)
]


@given(where=st.sampled_from(EVERY), letter=st.sampled_from("aeinrstx"), data=st.data())
def test_no_name_takes_another_letter(
    where: tuple[Mapping[str, Any], tuple[Any, ...]], letter: str, data: Any
) -> None:
    """Wherever it stands, in every kind of object that there is."""
    one, place = where
    changed = deepcopy(dict(one))
    inner: Any = changed
    for step in place[:-1]:
        inner = inner[step]
    key = place[-1]
    position = data.draw(st.integers(0, len(key)))
    inner[f"{key[:position]}{letter}{key[position:]}"] = inner.pop(key)
    assert [*schema.faults(changed)], f"{name(one) if 'kind' in changed else one}: {place}"


def test_schemas_say_where_they_are_from() -> None:
    """Repository, version, commit and path; and there is no other."""
    texts = {path.stem: path.read_text() for path in (check.FOLDER / "schemas").iterdir()}
    assert texts.keys() == {source.kind for source in SOURCES}
    for source in SOURCES:
        made = json.loads(texts[source.kind])
        assert made["$comment"] == f"{source.repository} {source.tag} {source.commit} {source.path}"
        assert '"description":"' not in texts[source.kind]
