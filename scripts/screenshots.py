"""Take the pictures of the page in docs/images: `make screenshots`.

A gateway with the model in `MODEL_NAME` answers and counts for real. What is made up is the past: the keys
of a small team, and what they used on the 29 days before, because a new gateway has none.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image
from playwright.async_api import Page, async_playwright

from gateway.accounts import key_table, usage
from gateway.store import Store

IMAGES = Path(__file__).parent.parent / "docs" / "images"
KEY = "ft-of-the-screenshots"
SIZE = {"width": 1200, "height": 760}
SCALE = 1.5
COLOURS = 96
"""The commonest of each picture are kept, others become the nearest: some 50 KB, and it looks the same."""
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
<include>/etc/fonts/fonts.conf</include>
<match target="pattern">
<test name="family" qual="any" compare="contains"><string>sans</string></test>
<edit name="family" mode="prepend" binding="strong"><string>Inter</string></edit>
</match>
</fontconfig>
"""
"""What a bare Debian shows a page in is DejaVu; Debian's fonts-inter looks as most people's systems do."""

VIEWS = {
    "chat": "text=0 of",
    "workers": "dd:has-text('4 of')",
    "usage": "canvas",
}
"""The views, and what each shows once it is there."""
QUESTIONS = ("Why is the sky blue?", "And why is it red in the evening?")


def remember(folder: Path, model: str) -> None:
    """Write the past into the gateway's database, before it starts."""
    chance, today, now_s = random.Random(7), datetime.now(UTC).date(), time.time()  # noqa: S311 - a picture
    price = usage.Prices(100_000_000, 400_000_000)
    with closing(Store.open(f"sqlite:///{folder / 'gateway.db'}")) as store:
        for name, scale, limits in (
            ("search", 90_000, {"requests_per_minute": 600, "endpoints": ["local"]}),
            ("support-bot", 40_000, {"tokens_per_minute": 200_000}),
            ("nightly-eval", 24_000, {"expires_at": int(now_s) + 30 * 86_400}),
        ):
            new = key_table.parse({"name": name, **limits}, now_s)
            key, _ = store.write_now(partial(key_table.create, new=new))
            for ago in range(1, 30):
                day = today - timedelta(days=ago)
                busy = 1.0 if day.weekday() < 5 else 0.3
                prompt = int(scale * busy * chance.uniform(0.3, 1.2))
                answered = int(prompt * chance.uniform(0.4, 0.7))
                cost, requests = price.cost_nano(prompt, answered), prompt // 350 + 1
                entry = usage.Entry(key.id, "local", model, prompt, answered, cost, requests)
                store.write_now(partial(usage.add, entry=entry, day=day))


@asynccontextmanager
async def gateway(folder: Path, model: str) -> AsyncIterator[str]:
    """`python -m gateway` with that past; its URL."""
    environ = {
        **os.environ,
        "API_KEY": KEY,
        "DATA_DIR": str(folder),
        "MAX_WORKERS": "2",
        "PORT": "0",
        "PRICE_INPUT": "0.1",
        "PRICE_OUTPUT": "0.4",
        "SERVED_MODEL_NAME": model,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway"), env=environ, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            words = line.decode().split()
            if url := next((word for word in words if word.startswith("http://")), None):
                yield url.partition("v2/")[0]
                break
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def take(page: Page, name: str, scheme: str) -> None:
    """One picture, small."""
    raw = await page.screenshot(animations="disabled")
    pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    colours, of, counts = np.unique(
        pixels.reshape(-1, 3).astype(int), axis=0, return_inverse=True, return_counts=True
    )
    kept = colours[np.argsort(counts)[-COLOURS:]]
    nearest = ((colours[:, None] - kept) ** 2).sum(axis=2).argmin(axis=1)
    small = Image.fromarray(nearest[of].reshape(pixels.shape[:2]).astype(np.uint8))
    small.putpalette(kept.astype(np.uint8).tobytes())
    IMAGES.mkdir(exist_ok=True)
    small.save(IMAGES / f"page-{name}-{scheme}.png", optimize=True)


async def tour(page: Page, url: str) -> None:
    """Every view, in both themes."""
    await page.goto(url)
    await page.get_by_label("API key").fill(KEY)
    await page.get_by_role("button", name="Sign in").click()
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Max tokens").fill("120")
    for number, question in enumerate(QUESTIONS, 1):
        await page.get_by_label("Message").fill(question)
        await page.keyboard.press("Enter")
        await page.locator("[data-figure=prompt]").nth(number - 1).wait_for(timeout=120_000)
    for view, shown in VIEWS.items():
        await page.goto(f"{url}#/{view}")
        async with load(url) if view == "workers" else nullcontext():
            await page.locator(shown).first.wait_for()
            await pictures(page, view)


async def pictures(page: Page, view: str) -> None:
    """What is shown now, in both themes."""
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        await take(page, view, scheme)


@asynccontextmanager
async def load(url: str) -> AsyncIterator[None]:
    """Answers that are being made, one more every few seconds, so that the workers have something to show."""
    body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}

    async def ask(session: aiohttp.ClientSession) -> None:
        async with session.post(f"{url}v2/local/openai/v1/completions", json=body) as answer:
            async for _ in answer.content:
                pass

    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session:
        asked = []
        for _ in range(4):
            asked.append(asyncio.create_task(ask(session)))
            await asyncio.sleep(3)
        yield
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)


async def main() -> int:
    """Returns the exit status."""
    if not (chromium := shutil.which("chromium")):
        print(
            "screenshots: Chromium is missing (Debian: apt-get install chromium fonts-inter)", file=sys.stderr
        )
        return 1
    model = os.environ["SERVED_MODEL_NAME"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "fonts.conf").write_text(FONTS)
        await asyncio.to_thread(remember, folder, model)
        async with gateway(folder, model) as url, async_playwright() as driver:
            browser = await driver.chromium.launch(
                executable_path=chromium,
                args=["--no-sandbox", "--disable-gpu"],
                env={**os.environ, "FONTCONFIG_FILE": str(folder / "fonts.conf")},
            )
            page = await browser.new_page(viewport=SIZE, device_scale_factor=SCALE, locale="en-GB")  # type: ignore[arg-type]
            await tour(page, url)
            await browser.close()
    print(
        *(f"{path.stat().st_size // 1000:4} KB  {path.name}" for path in sorted(IMAGES.iterdir())), sep="\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
