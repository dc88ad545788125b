"""The page in Chromium, before a real gateway."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from handler.errors import error_body
from tests import servers
from tests.browser import TIMEOUT_MS, chromium, tab
from tests.contract.test_openai_node import NPM
from tests.gateway_process import CHAT, Program, chunk, completion, gateway, started
from tests.scripted_app import Pause, Script, answer, stream
from tests.scripted_worker import READY
from tests.servers import KEY

pytestmark = pytest.mark.timeout(300)

MODELS = answer({"object": "list", "data": [{"id": "org/model"}, {"id": "adapter"}]})
REFUSAL = answer(error_body("The prompt is too long.", type="invalid_request_error", code="too_long"), 400)
HOSTILE = "<img src=x onerror=alert(1)><script>alert(1)</script>"

expect.set_options(timeout=TIMEOUT_MS)


def counted(prompt: int, answered: int) -> str:
    """The chunk that has the usage of a stream."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
    rest = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "org/model"}
    return json.dumps({**rest, "choices": [], "usage": usage})


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Chromium."""
    async with chromium() as running:
        yield running


@asynccontextmanager
async def page_of(
    program: Program, browser: Browser, key: str | None = KEY, **context: Any
) -> AsyncIterator[Page]:
    """The page, signed in with `key` if there is one."""
    async with tab(browser, root(program), **context) as page:
        if key is not None:
            await sign_in(page, key)
            await expect(page.get_by_role("heading", name="Chat")).to_be_visible()
        yield page


def root(program: Program) -> str:
    """Where the page is."""
    return program.base_url.partition("v2/")[0]


async def sign_in(page: Page, key: str) -> None:
    """As a person does."""
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Sign in").click()


async def say(page: Page, text: str) -> None:
    """Send a message."""
    await page.get_by_label("Message").fill(text)
    await page.get_by_role("button", name="Send").click()


async def show(page: Page, view: str) -> None:
    """Go to a view."""
    await page.get_by_role("link", name=view, exact=True).click()
    await expect(page.get_by_role("heading", name=view, exact=True)).to_be_visible()


def last_answer(page: Page) -> Locator:
    """The answer that was asked for last."""
    return page.get_by_role("article", name="Answer").last


def figure(page: Page, name: str) -> Locator:
    """A figure below the last answer."""
    return last_answer(page).locator(f"[data-figure={name}] dd")


async def dark(page: Page) -> bool:
    """Whether the page is dark to the eye."""
    colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128


async def test_sign_in_and_out(tmp_path: Path, browser: Browser) -> None:
    """A wrong key is told in words; a right one is kept in this tab until it signs out."""
    async with gateway(tmp_path, (READY, {"GET /v1/models": [MODELS] * 2})) as program:
        await started(program)
        async with page_of(program, browser, key=None) as page:
            await sign_in(page, "wrong")
            await expect(page.get_by_role("alert")).to_have_text("The gateway does not know this key.")
            await expect(page.get_by_role("navigation")).to_be_hidden()
            await sign_in(page, KEY)
            await expect(page.get_by_role("navigation")).to_be_visible()
            await page.reload()
            await expect(page.get_by_role("navigation")).to_be_visible()
            kept = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
            assert await page.evaluate(kept) == [[KEY], [], ""]
            await page.get_by_role("button", name="Sign out").click()
            await expect(page.get_by_label("API key")).to_be_focused()
            assert await page.evaluate(kept) == [[], [], ""]
            await page.reload()
            await expect(page.get_by_label("API key")).to_be_visible()


async def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(tmp_path: Path, browser: Browser) -> None:
    """Pieces, figures, hostile text as text, the API's own words of an error; Stop reaches the worker."""
    plays = [
        stream(chunk(HOSTILE), Pause("middle"), chunk(" and more"), Pause("end"), counted(31, 1200)),
        stream(chunk("Once upon"), Pause("for ever")),
        REFUSAL,
    ]
    async with gateway(tmp_path, (READY, {CHAT: plays, "GET /v1/models": MODELS})) as program:
        worker = await started(program)
        async with page_of(program, browser) as page:
            text, stop = last_answer(page).locator(".text"), page.get_by_role("button", name="Stop")
            note = page.locator("[data-note]")
            await page.get_by_role("link", name="Chat", exact=True).click()
            await say(page, "Hello")
            await expect(text).to_have_text(HOSTILE)
            await expect(stop).to_be_visible()
            await expect(note).to_have_text(re.compile("^1 worker ready, 1 of "))
            worker.open("middle")
            await expect(text).to_have_text(f"{HOSTILE} and more")
            await expect(figure(page, "first-token")).to_have_text(re.compile(r"^\d.* m?s$"))
            worker.open("end")
            await expect(figure(page, "answer")).to_have_text("1,200 tokens")
            await expect(figure(page, "prompt")).to_have_text("31 tokens")
            await expect(figure(page, "speed")).to_have_text(re.compile(r"^[\d,.]+ tokens/s$"))
            await expect(figure(page, "request")).to_have_text(re.compile("^req_"))
            await expect(stop).to_be_hidden()
            await expect(note).to_have_text(re.compile("^1 worker ready, 0 of "))

            await say(page, "Tell me a story")
            await expect(text).to_have_text("Once upon")
            await stop.click()
            await worker.saw("disconnected", CHAT)
            await expect(figure(page, "ended-by")).to_have_text("stopped")
            await expect(figure(page, "answer")).to_have_text("about 1 token")

            await say(page, "Too much")
            problem = last_answer(page).locator(".problem")
            await expect(problem).to_contain_text("The prompt is too long.")
            await expect(problem).to_contain_text(re.compile("status 400 · code too_long · request req_"))


async def test_workers_and_their_cold_starts(tmp_path: Path, browser: Browser) -> None:
    """What a starting worker does, live; once it is ready, its phases as bars; who is in flight."""
    start = (
        ("status", "loading weights"),
        ("pause", "weights"),
        ("status", "first token"),
        ("pause", "token"),
        *READY,
    )
    scripts = {CHAT: stream(chunk("a"), Pause("generating")), "GET /v1/models": MODELS}
    async with gateway(tmp_path, (start, scripts), environ={"START": "first_request"}) as program:
        await program.address()
        async with page_of(program, browser) as page:
            await show(page, "Workers")
            await expect(page.get_by_text("No worker runs. The next request starts one.")).to_be_visible()
            await show(page, "Chat")
            await say(page, "Hello")
            worker = await program.director.worker()
            await expect(last_answer(page)).to_contain_text("A worker is starting (loading weights)")
            await show(page, "Workers")
            badge = page.locator(".worker .badge")
            await expect(badge).to_have_text("starting: loading weights")
            await expect(page.locator(".figures")).to_contain_text("Waiting1")
            worker.open("weights")
            await expect(badge).to_have_text("starting: first token")
            worker.open("token")
            await expect(badge).to_have_text("ready")
            await expect(page.locator(".figures")).to_contain_text(re.compile("Waiting0In flight1"))
            rows = page.get_by_role("table", name="Cold start, first token after 1.50 s").locator("tbody tr")
            assert [" ".join(row.split()) for row in await rows.all_inner_texts()] == [
                "import vllm 600 ms 600 ms 0 CPU",
                "open engine 700 ms 200 ms 400 disk",
                "first token 100 ms 0 ms 0 waiting",
            ]
            begins = (
                "marks => marks.map(mark => mark.getBoundingClientRect()).map(({ x, width }) => [x, width])"
            )
            (first_x, first_width), *others = await rows.locator(".mark").evaluate_all(begins)
            shares = [(x - first_x) / first_width for x, _ in others]
            assert shares == pytest.approx([1, 13 / 6], abs=0.02)
            worker.open("generating")
            await show(page, "Chat")
            await expect(last_answer(page).locator(".text")).to_have_text("a")


async def test_a_worker_that_can_not_start_says_why(tmp_path: Path, browser: Browser) -> None:
    """Its reason, and the last lines of its output."""
    start = (("say_why", "The model does not fit", "75"), ("exit", "75"))
    async with gateway(tmp_path, (start, {}), environ={"START": "first_request"}) as program:
        await program.address()
        async with page_of(program, browser) as page:
            await say(page, "Hello")
            await expect(last_answer(page).locator(".problem")).to_contain_text("The model does not fit")
            await show(page, "Workers")
            await expect(page.locator(".worker[data-state=failed]").first).to_contain_text(
                "The model does not fit"
            )


async def test_a_gateway_that_is_gone_is_told_once(tmp_path: Path, browser: Browser) -> None:
    """On every view that asks again and again, in the bar above it."""
    async with gateway(tmp_path, (READY, {"GET /v1/models": MODELS})) as program:
        await started(program)
        async with page_of(program, browser) as page:
            asked: set[str] = set()
            page.on("requestfailed", lambda request: asked.add(request.url.partition("/admin/")[2][:6]))
            told = page.get_by_text("The gateway can't be reached.")
            for view in ("Usage", "Workers"):
                await show(page, view)
            assert await program.end(signal.SIGTERM) == 0
            await expect(told).to_have_count(1)
            await show(page, "Usage")
            while "usage?" not in asked:
                await page.wait_for_event("requestfailed")
            await expect(told).to_have_count(1)


async def test_keys_are_made_used_counted_and_revoked(tmp_path: Path, browser: Browser) -> None:
    """A key that was made here works, its usage shows and moves, and once it is revoked it opens nothing."""
    plays = [usual(7, 3), usual(5, 2)]
    async with gateway(tmp_path, (READY, {CHAT: plays, "GET /v1/models": MODELS})) as program:
        await started(program)
        async with page_of(program, browser) as page:
            await show(page, "Keys")
            await page.get_by_role("button", name="Create key").click()
            await page.get_by_label("Name").fill("team")
            await page.get_by_label("Requests per minute").fill("60")
            await page.get_by_label("local").check()
            await page.get_by_role("button", name="Create", exact=True).click()
            shown = page.get_by_label("The new key")
            await expect(shown).to_have_value(re.compile("^ft-"))
            made = await shown.input_value()
            await page.get_by_role("button", name="Copy").click()
            await expect(page.get_by_role("dialog").get_by_role("status")).to_have_text(re.compile("[Cc]op"))
            await page.get_by_role("button", name="Done").click()
            row = page.get_by_role("row").filter(has_text="team")
            await expect(row).to_contain_text("60 requests")
            assert made not in await page.content()

            async with openai.AsyncOpenAI(base_url=program.base_url, api_key=made, max_retries=0) as client:

                async def ask() -> None:
                    message = {"role": "user", "content": "hi"}
                    await client.chat.completions.create(model="org/model", messages=[message])  # type: ignore[list-item]

                await show(page, "Usage")
                await ask()
                usage = (
                    page.get_by_role("region", name="Usage by day").get_by_role("row").filter(has_text="team")
                )
                await expect(usage).to_contain_text(re.compile(r"local\s*m\s*1\s*7\s*3"))
                await ask()
                await expect(usage).to_contain_text(re.compile(r"local\s*m\s*2\s*12\s*5\s*0\.00$"))
                await expect(page.locator("[data-legend]")).to_contain_text("team17")
                await expect(page.locator("[data-chart] canvas")).to_be_visible()
                async with page.expect_download() as downloaded:
                    await page.get_by_role("button", name="Download CSV").click()
                await (await downloaded.value).save_as(tmp_path / "usage.csv")
                (row_of_csv,) = csv.DictReader((tmp_path / "usage.csv").read_text().splitlines())
                names = ("key_name", "endpoint", "model", "requests", "prompt_tokens", "completion_tokens")
                assert [row_of_csv[name] for name in names] == ["team", "local", "m", "2", "12", "5"]

                await show(page, "Keys")
                await page.get_by_role("button", name="Revoke team").click()
                await page.get_by_role("button", name="Revoke", exact=True).click()
                await expect(row).to_contain_text("revoked")
                with pytest.raises(openai.AuthenticationError):
                    await ask()


async def test_a_key_that_is_no_admins_can_chat_only(tmp_path: Path, browser: Browser) -> None:
    """It sees no admin's view, by its address neither; once it is revoked the page says so."""
    async with gateway(tmp_path, (READY, {CHAT: stream(chunk("Hello!"), counted(1, 1))})) as program:
        await started(program)
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, base_url=root(program), timeout=60
        ) as admin:
            made = (await admin.post("admin/keys", json={"name": "guest"})).json()
            async with page_of(program, browser, key=made["key"]) as page:
                for name in ("Workers", "Usage", "Keys"):
                    await expect(page.get_by_role("link", name=name)).to_be_hidden()
                await page.goto(f"{root(program)}#/keys")
                await expect(page.get_by_role("heading", name="Chat")).to_be_visible()
                await say(page, "hi")
                await expect(last_answer(page).locator(".text")).to_have_text("Hello!")
                await admin.delete(f"admin/keys/{made['id']}")
                await say(page, "hi")
                await expect(page.get_by_role("alert")).to_contain_text("This key is no longer good")


async def test_by_keyboard_alone(tmp_path: Path, browser: Browser) -> None:
    """Sign in, ask, stop, change the theme, go to a view, make a key: no pointer, and the focus is seen."""
    script = stream(chunk("Once upon"), Pause("for ever"))
    async with gateway(tmp_path, (READY, {CHAT: script, "GET /v1/models": MODELS})) as program:
        worker = await started(program)
        async with page_of(program, browser, key=None, color_scheme="light") as page:
            press = page.keyboard.press

            async def tab_to(name: str) -> None:
                for _ in range(40):
                    focus = await page.evaluate(FOCUS)
                    if focus["name"].startswith(name):
                        assert focus["outline"] != "none", f"nobody sees that {name} has the focus"
                        return
                    await press("Tab")
                raise AssertionError(f"Tab never comes to {name}")

            await expect(page.get_by_label("API key")).to_be_focused()
            await page.keyboard.type(KEY)
            await press("Enter")
            await expect(page.get_by_role("heading", name="Chat")).to_be_focused()
            await tab_to("Message")
            await page.keyboard.type("Tell me a story")
            await press("Enter")
            await expect(last_answer(page).locator(".text")).to_have_text("Once upon")
            await press("Escape")
            await worker.saw("disconnected", CHAT)
            await expect(page.get_by_role("status").filter(has_text="Stopped.")).to_be_attached()

            assert not await dark(page)
            await tab_to("Theme: auto")
            await press("Enter")
            await press("Enter")
            await tab_to("Theme: dark")
            assert await dark(page)

            await tab_to("Skip to content")
            await tab_to("Keys")
            await press("Enter")
            await expect(page.get_by_role("heading", name="Keys")).to_be_focused()
            await tab_to("Create key")
            await press("Enter")
            await expect(page.get_by_label("Name")).to_be_focused()
            await page.keyboard.type("by keyboard")
            await press("Enter")
            await expect(page.get_by_label("The new key")).to_be_focused()
            await tab_to("Done")
            await press("Enter")
            await expect(page.get_by_role("row").filter(has_text="by keyboard")).to_be_visible()
            await page.reload()
            assert await dark(page)


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core, a script that finds what keeps people out of a page."""
    if not shutil.which("npm"):
        pytest.skip("this lane did not run: npm is missing (Debian: apt-get install npm)")
    folder = tmp_path_factory.mktemp("axe")
    shutil.copy(servers.ROOT / "tests" / "node" / "page" / "package.json", folder)
    subprocess.run(NPM, cwd=folder, check=True, timeout=150, stdout=subprocess.DEVNULL)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_no_view_keeps_anybody_out(tmp_path: Path, browser: Browser, axe: str, scheme: str) -> None:
    """axe-core finds nothing in any view: contrast, names, roles, order; as wide as a phone, too."""
    plays = [stream(chunk("Hello!"), counted(5, 1)), REFUSAL]
    async with AsyncExitStack() as stack:
        scripts = {CHAT: plays, "GET /v1/models": MODELS}
        program = await stack.enter_async_context(gateway(tmp_path, (READY, scripts)))
        await started(program)
        page = await stack.enter_async_context(page_of(program, browser, key=None, color_scheme=scheme))

        async def check() -> None:
            for width in (1280, 390):
                await page.set_viewport_size({"width": width, "height": 860})
                await page.evaluate(axe)
                found = await page.evaluate("axe.run().then(({ violations }) => violations)")
                assert [(fault["id"], [node["target"] for node in fault["nodes"]]) for fault in found] == []
            await page.set_viewport_size({"width": 1280, "height": 860})

        await check()
        await sign_in(page, KEY)
        await say(page, "Hello")
        await expect(figure(page, "prompt")).to_be_visible()
        await say(page, "Too much")
        await expect(last_answer(page).locator(".problem")).to_be_visible()
        await check()
        await show(page, "Workers")
        await expect(page.locator(".waterfall")).to_be_visible()
        await check()
        await show(page, "Usage")
        await expect(page.locator("[data-chart] canvas")).to_be_visible()
        await check()
        await show(page, "Keys")
        await page.get_by_role("button", name="Create key").click()
        await check()
        await page.get_by_label("Name").fill("team")
        await page.get_by_role("button", name="Create", exact=True).click()
        await expect(page.get_by_label("The new key")).to_be_focused()
        await page.get_by_role("button", name="Done").click()
        await check()
        await page.get_by_role("button", name="Revoke team").click()
        await check()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 664), (320, 568)])
async def test_the_window_is_enough(tmp_path: Path, browser: Browser, width: int, height: int) -> None:
    """Of a chat only the conversation scrolls, and no view is wider than a phone."""
    viewport = {"width": width, "height": height}
    async with gateway(tmp_path, (READY, {"GET /v1/models": MODELS})) as program:
        await started(program)
        async with page_of(program, browser, viewport=viewport) as page:
            await expect(page.get_by_label("Message")).to_be_visible()
            assert await page.evaluate(SIZE) == [width, height]
            for name in ("Workers", "Usage", "Keys"):
                await show(page, name)
                await expect(page.get_by_role("heading", name=name)).to_be_visible()
                assert (await page.evaluate(SIZE))[0] == width


async def test_a_long_name_hides_nothing(tmp_path: Path, browser: Browser) -> None:
    """It has as many lines as it wants: the tables still fit, and Revoke is in sight."""
    async with gateway(tmp_path, (READY, {CHAT: completion("Hi"), "GET /v1/models": MODELS})) as program:
        await started(program)
        async with httpx.AsyncClient(
            base_url=root(program), headers={"authorization": f"Bearer {KEY}"}
        ) as http:
            fields = {"name": "W" * 64, "models": ["organisation/model-" + "8" * 60]}
            assert (await http.post("/admin/keys", json=fields)).status_code == 201
        async with page_of(program, browser) as page:
            await show(page, "Keys")
            await expect(page.get_by_role("button", name="Revoke W")).to_be_visible()
            assert await page.evaluate(FITS)


async def test_the_chart_tells_of_keys_with_long_names_what_tells_them_apart(
    tmp_path: Path, browser: Browser
) -> None:
    """As much of it as leaves the chart in sight."""
    plays = {CHAT: [usual(7, 3)] * COLOURS, "GET /v1/models": MODELS}
    async with gateway(tmp_path, (READY, plays)) as program:
        await started(program)
        async with httpx.AsyncClient(
            base_url=root(program), headers={"authorization": f"Bearer {KEY}"}
        ) as http:
            for number in range(COLOURS):
                fields = {"name": "W" * 63 + str(number)}
                made = (await http.post("/admin/keys", json=fields)).json()
                bearer = {"authorization": f"Bearer {made['key']}"}
                body = {"model": "org/model", "messages": []}
                asked = await http.post(f"{program.base_url}/chat/completions", json=body, headers=bearer)
                assert asked.status_code == 200
        async with page_of(program, browser) as page:
            await show(page, "Usage")
            box = await page.locator("[data-chart] .u-over").bounding_box()
            assert box is not None
            await page.mouse.move(box["x"] + box["width"] - 10, box["y"] + box["height"] - 10)
            tip = page.locator("#tip")
            await expect(tip.locator("div")).to_have_count(COLOURS)
            names = {text.partition(":")[0] for text in await tip.locator("div").all_inner_texts()}
            assert names == {f"{'W' * 16}…{'W' * 14}{number}" for number in range(COLOURS)}
            shown = await tip.bounding_box()
            assert shown is not None
            assert shown["height"] < 400


COLOURS = 8
FITS = "(({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth)(document.querySelector('.scroll'))"
SIZE = "(({ scrollWidth, scrollHeight }) => [scrollWidth, scrollHeight])(document.scrollingElement)"
FOCUS = """() => {
  const at = document.activeElement;
  if (at === document.body) return { name: "", outline: "none" };
  const label = at.labels?.[0]?.textContent ?? at.getAttribute("aria-label") ?? at.textContent;
  const seen = at.closest(".composer") ?? at;
  return { name: label.trim(), outline: getComputedStyle(seen).outlineStyle };
}"""


def usual(prompt: int, answered: int) -> Script:
    """A whole answer with its usage."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
    body = json.loads(completion("hi").steps[0].data)  # type: ignore[union-attr]
    return answer({**body, "usage": usage})


@pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")
async def test_with_a_real_engine(stack: servers.Stack, browser: Browser) -> None:
    """The answer of the model, its usage as vLLM counts it, and the phases of a real start."""
    async with tab(browser, stack.gateway.base_url.partition("v2/")[0]) as page:
        await sign_in(page, servers.KEY)
        await page.get_by_label("Temperature").fill("0")
        await page.get_by_label("System prompt").fill("")
        await say(page, "What is the capital of France?")
        await expect(last_answer(page).locator(".text")).to_contain_text("Paris")
        await expect(figure(page, "ended-by")).to_have_text("stop")
        await show(page, "Workers")
        await expect(page.locator(".waterfall").first).to_contain_text("first token")
