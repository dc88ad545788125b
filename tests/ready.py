"""Waiting for a worker of a pool, as whoever holds a request does."""

from __future__ import annotations

import asyncio

from gateway.upstreams import Pool


async def until_ready(pool: Pool, waiting: int = 1) -> None:
    """Let `waiting` requests want a worker until one is ready. Raises what they would be refused with."""
    news = asyncio.Event()
    pool.listen(news.set)
    pool.want(waiting, 0.0)
    try:
        while not pool.capacity:
            if refusal := pool.refusal:
                raise refusal
            news.clear()
            await news.wait()
    finally:
        pool.want(0, 0.0)
