"""Waiting for one of several things."""

from __future__ import annotations

import asyncio
from typing import Any


async def first(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return once one of `futures` is done, or after `timeout_s`."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
