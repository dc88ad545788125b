"""A warm parent without an engine: the real `Zygote`, whose workers are scripted ones.

`python -m tests.scripted_zygote zygote --socket PATH`, as the gateway starts its parent.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from handler.listener import listen_unix
from handler.zygote import Asked, Tell, Zygote
from tests.scripted_worker import work

COMMAND = (sys.executable, "-m", "tests.scripted_zygote")


def serve(asked: Asked, _: Tell) -> int:
    """In the fork: be the worker that the test asks for."""
    os.environ.clear()
    os.environ.update(asked.environ)
    asyncio.run(work(asked.environ))
    return 0


def never(*_: object) -> Any:
    """For what a test that forks does not come to."""
    raise AssertionError("not to be called")


if __name__ == "__main__":
    zygote = Zygote(work=serve, unsafe=lambda: None, instead=never, learn=never)
    sys.exit(zygote.serve(listen_unix(Path(sys.argv[-1])), int(os.environ["LIFELINE_FD"])))
