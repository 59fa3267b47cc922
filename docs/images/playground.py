"""Draw the pictures of the playground again: `python docs/images/playground.py`. Needs Chromium.

A real api and worker, and a model that says what is written here; the connection is really dropped in mid-answer.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from PIL import Image  # noqa: E402
from playwright.async_api import Browser, Page, async_playwright, expect  # noqa: E402

from tests.conftest import environment  # noqa: E402
from tests.processes import Processes, valkey  # noqa: E402
from tests.stack import Stack  # noqa: E402
from tests.upstream import Script, Upstream  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

WINDOW = {"width": 1200, "height": 850}
COLOURS = 96  # of the palette: a third of the bytes, and no difference to be seen
EARLIER = ("A name for a lighthouse keeper's cat", "What is the difference between a queue and a log?", "Lunch for two")
QUESTION = "How does an answer survive a lost connection?"
ANSWER = """Every word goes into a **log** before it comes to you, and each entry has a number of its own. \
So a lost connection costs nothing:

1. The worker writes on; it does not know whether anyone is reading.
2. Your browser keeps the number of the last entry it has.
3. When it is back, it asks for what follows that number.

```http
GET /v1/generations/228b05d6…/events
Last-Event-ID: 1795184417831-111
```

What you missed comes at once, the rest as it is written. Nothing comes twice:

| you left | you come back | you get |
|---|---|---|
| in mid-word | after 3 seconds | the rest of the word |
| for the night | tomorrow | the whole answer, at once |
| on the phone | at the desk | the same answer, there too |

Leaving is not cancelling: only *Stop* ends an answer early.
"""


async def ask(page: Page, question: str) -> None:
    await page.locator("#prompt").fill(question)
    await page.locator("#prompt").press("Enter")


async def long_as(page: Page, characters: int) -> None:
    """Wait until so much of the answer is on the page."""

    async def look() -> bool:
        return len(await page.locator(".words").text_content() or "") > characters

    await wait_until(look, timeout=30)


async def draw(browser: Browser, url: str, scheme: str, picture: Path) -> None:
    context = await browser.new_context(viewport=WINDOW, color_scheme=scheme)  # type: ignore[arg-type]
    page = await context.new_page()
    await page.goto(url)
    await page.locator("#model").select_option("quick")
    for question in EARLIER:
        await ask(page, question)
        await expect(page.locator(".turn")).to_have_attribute("data-status", "completed")
        await page.locator("#new").click()
    await page.locator("#model").select_option("fast")
    await ask(page, QUESTION)
    await long_as(page, 240)
    await page.locator("#drop").click()
    await page.mouse.move(700, 300)
    await expect(page.locator(".turn")).to_have_attribute("data-connection", "dropped")
    await expect(page.locator(".turn")).to_have_attribute("data-connection", "connected")
    await long_as(page, 590)
    await page.screenshot(path=picture)
    await context.close()
    drawn = Image.open(picture).convert("RGB")
    drawn.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(picture, optimize=True)


async def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="rejoin-pictures-"))
    processes = Processes(folder)
    server = valkey(processes, folder)
    server.start()
    async with Upstream() as upstream, async_playwright() as playwright:
        upstream.script("quick", Script(chunks=["Done."]))
        upstream.script(
            "fast", Script(chunks=[ANSWER[at : at + 5] for at in range(0, len(ANSWER), 5)], pace_seconds=0.045)
        )
        table = folder / "models.toml"
        table.write_text(f'[fast]\nbase_url = "{upstream.base_url}"\n[quick]\nbase_url = "{upstream.base_url}"\n')
        stack = Stack(processes, environment(server.url, "pictures", upstream) | {"REJOIN_MODELS": str(table)})
        try:
            await stack.api()
            await stack.worker()
            browser = await playwright.chromium.launch(channel="chromium", executable_path="/usr/bin/chromium")
            for scheme, name in (("light", "playground.png"), ("dark", "playground-dark.png")):
                await draw(browser, stack.apis[0].url, scheme, HERE / name)
            await browser.close()
        finally:
            await stack.http.aclose()
            processes.end_all()


if __name__ == "__main__":
    asyncio.run(main())
