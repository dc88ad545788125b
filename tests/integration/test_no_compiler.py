"""A machine without a C++ compiler, which is the usual one, serves every request that it accepts."""

from __future__ import annotations

from pathlib import Path

from tests.servers import MODEL, engine_environ, worker

NO_COMPILER = {"CXX": "/nonexistent/c++"}


def test_logprobs_need_no_compiler(tiny_model: Path, tmp_path: Path) -> None:
    """Nobody's request may be the one that kills the engine."""
    environ = {**engine_environ(tiny_model), **NO_COMPILER, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with worker(environ) as running, running.server.sync_client() as client:
        for _ in range(2):
            reply = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=2, logprobs=True
            )
            assert reply.choices[0].logprobs is not None
