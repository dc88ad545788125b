"""Check template.yaml with cfn-lint, SAM and checkov: `make lint-aws`.

Each must find nothing, and what it is told to pass over must still be there to pass over: a check that is
skipped for nothing would hide what comes next. Standard library only; the tools are in environments of
their own (`scripts.install --tools`). They ask nobody on the network: telemetry is off.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.install import ROOT, TOOLS

TEMPLATE = ROOT / "template.yaml"
SKIPS = ROOT / ".checkov.yaml"
NOWHERE = "http://127.0.0.1:9"
"""A proxy that nobody serves: what would ask the network fails at once."""

IGNORED = {("Worker", "E3002"): "Additional properties are not allowed ('AcceleratorConfig' was unexpected)"}
"""What cfn-lint passes over: of which resource (its Metadata says so) which rule, and what that finds."""


def main() -> int:
    """Run every check; returns the exit status."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        environ = quiet(folder)
        checks = (cfn_lint, sam_validate, ignored_of_cfn_lint, checkov)
        found = [*pool.map(lambda check: list(check(environ, folder)), checks)]
    for fault in (fault for faults in found for fault in faults):
        print(fault, file=sys.stderr)
    return 1 if any(found) else 0


def quiet(folder: Path) -> dict[str, str]:
    """The environment of tools that keep to themselves; what SAM remembers of itself is in `folder`."""
    remembered = {"telemetryEnabled": False, "lastVersionCheck": 4_102_444_800}  # in 2100
    (folder / "metadata.json").write_text(json.dumps(remembered))
    return {
        **os.environ,
        "__SAM_CLI_APP_DIR": str(folder),
        "SAM_CLI_TELEMETRY": "0",
        "PYTHONDONTWRITEBYTECODE": "",  # they are compiled once, which takes longer than they do
        "CKV_SKIP_PACKAGE_UPDATE_CHECK": "true",
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
    }


def cfn_lint(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """What cfn-lint finds."""
    del folder
    done = run(environ, "cfn/bin/cfn-lint", str(TEMPLATE))
    if done.returncode:
        yield f"cfn-lint:\n{done.stdout}{done.stderr}"


def sam_validate(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """What SAM finds, whose own linter sees the template after its transform."""
    del folder
    where = ("--region=us-east-1", f"--template={TEMPLATE}")
    done = run(environ, "cfn/bin/sam", "validate", "--lint", *where)
    if done.returncode:
        yield f"sam validate --lint:\n{done.stdout}{done.stderr}"


def ignored_of_cfn_lint(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Where cfn-lint, told to pass over nothing, finds something else than what is `IGNORED`."""
    bare = folder / TEMPLATE.name
    bare.write_text(re.sub(r"(?m)^    Metadata:\n      cfn-lint:\n(?: {7,}.*\n)+", "", TEMPLATE.read_text()))
    done = run(environ, "cfn/bin/cfn-lint", "--format=json", str(bare))
    found = {
        (match["Location"]["Path"][1], match["Rule"]["Id"]): match["Message"]
        for match in json.loads(done.stdout)
    }
    if found != IGNORED:
        yield f"cfn-lint: is to pass over {IGNORED}, and there is {found}"


def checkov(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Where checkov, told to skip nothing, finds something else than what `.checkov.yaml` skips."""
    options = ("--skip-download", "--framework=cloudformation", "--output=json", f"--file={TEMPLATE}")
    done = run(environ, "checkov/bin/checkov", *options, cwd=folder)  # elsewhere: it looks for its file
    failed = json.loads(done.stdout)["results"]["failed_checks"]
    skipped = re.findall(r"(?m)^ +- (CKV\w+)$", SKIPS.read_text())
    for check in failed:
        if check["check_id"] not in skipped:
            yield f"checkov: {check['resource']}: {check['check_id']}: {check['check_name']}"
    for needless in sorted(set(skipped) - {check["check_id"] for check in failed}):
        yield f"checkov: {needless} is skipped for nothing"


def run(
    environ: Mapping[str, str], tool: str, *arguments: str, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run one of the tools."""
    line: list[str | Path] = [TOOLS / tool, *arguments]
    return subprocess.run(line, cwd=cwd, env=dict(environ), capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
