"""Chromium for the tests of the page: the system's, without a window, and all that it complains about."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)
TIMEOUT_MS = 60_000
"""How long a state may take to come, on a busy machine."""
REFUSED = (
    "Failed to load resource: the server responded with a status of ",
    "Failed to load resource: net::ERR_",
)
"""What Chromium says of each refusal of the API and of a gateway that is gone: the page has its own words."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium. The test is skipped, and says so, where there is none."""
    if not (path := shutil.which("chromium")):
        pytest.skip("this lane did not run: Chromium is missing (Debian: apt-get install chromium)")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path, args=[*FLAGS, *root])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def tab(browser: Browser, url: str, **context: Any) -> AsyncIterator[Page]:
    """A tab at `url`, of a user who was never here.

    At its end nothing may have been said on the console, broken the policy of the page, or been asked of
    another host.
    """
    faults: list[str] = []

    def said(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not message.text.startswith(REFUSED):
            faults.append(message.text)

    opened = await browser.new_context(**{"reduced_motion": "reduce", **context})
    opened.set_default_timeout(TIMEOUT_MS)
    page = await opened.new_page()
    hosts: set[str] = set()
    page.on("console", said)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    await page.goto(url)
    yield page
    await opened.close()
    assert not faults, faults
    assert hosts - {""} == {urlsplit(url).netloc}  # a download of the page's own has no host
