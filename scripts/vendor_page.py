"""Copy what the page takes from others into gateway/page/vendor: `python -m scripts.vendor_page [--check]`.

npm fetches it by the versions and hashes of gateway/page/package-lock.json. For another version: write it
into gateway/page/package.json, run `npm install --package-lock-only` there, then this. `vendor/SHA256SUMS`
says what each copied file must be, for whoever has no npm.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "gateway" / "page"
VENDOR = PAGE / "vendor"
SUMS = "SHA256SUMS"

COPIED: Mapping[str, str] = {
    "uPlot.esm.js": "uplot/dist/uPlot.esm.js",
    "uPlot.min.css": "uplot/dist/uPlot.min.css",
    "uPlot.LICENSE": "uplot/LICENSE",
}
"""Where each file of vendor/ is in node_modules/."""

NPM_CI = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def fetch(folder: Path) -> dict[str, bytes]:
    """What npm has of the files, by their names in vendor/; `folder` is to be empty."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PAGE / name, folder)
    subprocess.run(NPM_CI, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return {name: (folder / "node_modules" / path).read_bytes() for name, path in COPIED.items()}


def sums(files: Mapping[str, bytes]) -> str:
    """The lines of `SHA256SUMS`, as `sha256sum -c` reads them."""
    return "".join(f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in sorted(files.items()))


def main(argv: Sequence[str]) -> int:
    """Copy, or with `--check` compare; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.vendor_page", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if there is a difference")
    check = parser.parse_args(argv).check
    with tempfile.TemporaryDirectory() as folder:
        files = fetch(Path(folder))
    files[SUMS] = sums(files).encode()
    if check:
        differ = [name for name, body in files.items() if (VENDOR / name).read_bytes() != body]
        print(*[f"vendor_page: {name} is not what npm has" for name in differ], sep="\n", end="")
        return 1 if differ else 0
    VENDOR.mkdir(exist_ok=True)
    for name, body in files.items():
        (VENDOR / name).write_bytes(body)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
