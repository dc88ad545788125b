"""The engine of a worker that will be captured: it holds nothing open and can be put to sleep."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop

from handler import ties
from handler.canary import CANARY_TIMEOUT_S, canary
from handler.engine import Engine
from handler.preparation import prepare
from handler.replacements import skip_gloo_when_alone

SLEEP_LEVEL = 2
"""vLLM's deepest sleep: weights and KV cache are given up, not kept in the machine's memory."""


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop that a snapshot can hold: uvloop's where it makes no io_uring, else Python's own.

    It makes one wherever the kernel lets it; containers mostly do not, nor does a machine with
    the sysctl kernel.io_uring_disabled=2.
    """
    loop = uvloop.new_event_loop()
    if not any(ties.held_by_kernel(ties.open_files(), device_released=True)):
        return loop
    loop.close()
    return asyncio.new_event_loop()


class FreezableEngine(Engine):
    """An engine without sockets, for `handler.freeze`."""

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(self._live())

    async def _open(self) -> None:
        self._prepared = self._prepared or prepare(self._settings, self._phases, self._environ)
        skip_gloo_when_alone()
        await super()._open()

    def first_token(self) -> dict[str, Any] | None:
        """Make a token as the start did; vLLM's answer. Raises `EngineFailed` for any other."""
        asked = canary(self.call, self._tasks, self._settings.model_id)
        return self.submit(asyncio.wait_for(asked, CANARY_TIMEOUT_S)).result()

    def sleep(self) -> int | None:
        """Forget every prompt and, in vLLM's sleep mode, weights and KV cache too.

        Returns the level of the sleep, None where the engine has none (ENABLE_SLEEP_MODE, which a
        CPU lacks): its weights stay where they are.
        """
        return self.submit(self._sleep()).result()

    def wake(self) -> None:
        """Undo a `sleep` that had a level: the weights are read again."""
        self.submit(self._wake()).result()

    async def _sleep(self) -> int | None:
        await self._llm.reset_prefix_cache()
        if not self._llm.model_config.enable_sleep_mode:
            return None
        await self._llm.sleep(level=SLEEP_LEVEL)
        return SLEEP_LEVEL

    async def _wake(self) -> None:
        await self._llm.wake_up(tags=["weights"])
        await self._llm.collective_rpc("reload_weights")
        await self._llm.wake_up(tags=["kv_cache"])
