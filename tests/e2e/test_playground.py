"""The playground in a real browser: start, leave, rejoin. The system's Chromium against a running `rejoin up`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Dialog, Page, ViewportSize, async_playwright, expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The page is the only thing this browser talks to.
QUIET = ["--no-first-run", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
PHONE = ViewportSize(width=360, height=740)
TIMEOUT_MS = 60_000
MARKS = {
    "native": "event: generation.completed",
    "chat_completions": "data: [DONE]",
    "responses": "event: response.completed",
    "ui_messages": '"type":"finish"',
}
PROMPT = "Explain how an answer can survive a lost connection."

REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => complain(`${event.violatedDirective} ${event.blockedURI}`));
"""
# Note when the answer changed, and how long it was then.
WATCH_GROWTH = """() => {
  const answer = document.getElementById("answer");
  window.growth = [];
  new MutationObserver(() => window.growth.push([performance.now(), answer.textContent.length]))
    .observe(answer, { childList: true, characterData: true, subtree: true });
}"""
# Press Start, and Cut as soon as a few words are there: faster than a driver's round trip. Gives what was shown.
START_AND_CUT = """() => new Promise((resolve) => {
  const [start, cut, answer] = ["start", "cut", "answer"].map((id) => document.getElementById(id));
  const observer = new MutationObserver(() => {
    if (answer.textContent.length < 12 || cut.disabled) return;
    observer.disconnect();
    cut.click();
    resolve(answer.textContent);
  });
  observer.observe(answer, { childList: true, characterData: true, subtree: true });
  start.click();
})"""


class Browsing:
    """Tabs of one browser profile on one server, and everything the browser complained about in them."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url.rstrip("/")
        self.complaints: list[str] = []

    async def listen(self) -> None:
        self.context.on("console", self._hear)
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.context.on("dialog", self._refuse)
        await self.context.expose_binding("complain", lambda _, text: self.complaints.append(text))
        await self.context.add_init_script(REPORT_VIOLATIONS)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    async def _refuse(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    async def open(self, path: str = "/") -> Page:
        page = await self.context.new_page()
        await page.goto(self.url + path)
        await expect(page.locator("#start")).to_be_enabled()
        return page

    async def snapshot(self, generation_id: str) -> dict[str, Any]:
        answer = await self.context.request.get(f"{self.url}/v1/generations/{generation_id}")
        assert answer.ok, await answer.text()
        snapshot: dict[str, Any] = await answer.json()
        return snapshot


@pytest.fixture
async def browsing(rejoin_up: Any) -> AsyncIterator[Browsing]:
    """A browser that fails the test when a page logs an error, throws, opens a dialog or breaks its policy."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    expect.set_options(timeout=TIMEOUT_MS)
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=binary, args=QUIET) as browser,
        await browser.new_context() as context,
    ):
        browsing = Browsing(context, rejoin_up.url)
        await browsing.listen()
        yield browsing
        assert browsing.complaints == []


async def start(page: Page, prompt: str = PROMPT) -> str:
    """Ask, and wait for the first words. Gives the generation's id."""
    previous = await shown(page, "generation-id")
    await page.locator("#prompt").fill(prompt)
    await page.locator("#start").click()
    await expect(page.locator("#generation-id")).not_to_have_text(previous)
    await expect(page.locator("#answer")).not_to_be_empty()
    return await shown(page, "generation-id")


async def shown(page: Page, element_id: str) -> str:
    return await page.locator(f"#{element_id}").text_content() or ""


async def status_is(page: Page, status: str) -> None:
    await expect(page.locator("#status")).to_have_text(status)


async def overflow(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    return int(await page.evaluate("document.documentElement.scrollWidth - innerWidth"))


async def test_the_answer_appears_word_by_word(browsing: Browsing) -> None:
    """The answer on the screen grows in many small steps over time, not in one piece at the end."""
    page = await browsing.open()
    await page.evaluate(WATCH_GROWTH)
    generation_id = await start(page)
    await status_is(page, "completed")
    growth = await page.evaluate("growth")
    lengths = [length for _, length in growth]
    assert len(set(lengths)) >= 5
    assert lengths == sorted(lengths)
    assert growth[-1][0] - growth[0][0] > 50
    assert await shown(page, "answer") == (await browsing.snapshot(generation_id))["text"]


async def test_control_enter_starts(browsing: Browsing) -> None:
    """Ctrl+Enter in the prompt box does what the Start button does, and the facts are filled in."""
    page = await browsing.open()
    await page.locator("#prompt").fill(PROMPT)
    await page.locator("#prompt").press("Control+Enter")
    await status_is(page, "completed")
    snapshot = await browsing.snapshot(await shown(page, "generation-id"))
    assert await shown(page, "last-event-id") == snapshot["last_event_id"]
    assert await shown(page, "attempt") == str(snapshot["attempt"])
    assert await shown(page, "connections") == "1"


async def test_cut_and_rejoin_while_it_is_written_gives_the_uninterrupted_text(browsing: Browsing) -> None:
    """Rejoining asks for what follows the last event the page has, and neither loses nor repeats a word."""
    page = await browsing.open()
    before = await page.evaluate(START_AND_CUT)
    await expect(page.locator("#connection")).to_have_text("disconnected")
    cursor = await shown(page, "last-event-id")
    async with page.expect_request(lambda request: "/events" in request.url) as asked:
        await page.locator("#rejoin").click()
    assert f"after={cursor}" in (await asked.value).url
    await status_is(page, "completed")
    text = (await browsing.snapshot(await shown(page, "generation-id")))["text"]
    assert await shown(page, "answer") == text
    assert text.startswith(before) and len(before) < len(text)
    assert await shown(page, "connections") == "2"


async def test_rejoining_after_the_end_gives_the_rest(browsing: Browsing) -> None:
    """While disconnected nothing is added to the screen; rejoined after the end, the page has the whole answer."""
    page = await browsing.open()
    before = await page.evaluate(START_AND_CUT)
    generation_id = await shown(page, "generation-id")
    await expect(page.locator(f"#recent [data-id='{generation_id}'] .badge")).to_have_text("completed")
    assert await shown(page, "answer") == before
    await expect(page.locator("#connection")).to_have_text("disconnected")
    await page.locator("#rejoin").click()
    await status_is(page, "completed")
    assert await shown(page, "answer") == (await browsing.snapshot(generation_id))["text"]


async def test_a_second_tab_gets_the_same_text(browsing: Browsing) -> None:
    """A tab opened on a running generation shows the same answer from its beginning."""
    first = await browsing.open()
    generation_id = await start(first)
    async with browsing.context.expect_page() as opened:
        await first.locator("#second-tab").click()
    second = await opened.value
    await status_is(second, "completed")
    await status_is(first, "completed")
    assert await shown(second, "generation-id") == generation_id
    assert await shown(second, "answer") == await shown(first, "answer")
    assert await shown(second, "answer") == (await browsing.snapshot(generation_id))["text"]


async def test_cancel_keeps_the_partial_text(browsing: Browsing) -> None:
    """A cancelled generation keeps what had been written, and can neither be cut, rejoined nor cancelled again."""
    page = await browsing.open()
    generation_id = await start(page)
    await page.locator("#cancel").click()
    await status_is(page, "cancelled")
    snapshot = await browsing.snapshot(generation_id)
    assert snapshot["status"] == "cancelled"
    assert await shown(page, "answer") == snapshot["text"] != ""
    for button in ("#cut", "#rejoin", "#cancel"):
        await expect(page.locator(button)).to_be_disabled()


async def test_cancel_while_disconnected_shows_what_had_been_written(browsing: Browsing) -> None:
    """Cancelled without a connection, the page still shows the end and all the text that was kept."""
    page = await browsing.open()
    before = await page.evaluate(START_AND_CUT)
    await page.locator("#cancel").click()
    await status_is(page, "cancelled")
    text = (await browsing.snapshot(await shown(page, "generation-id")))["text"]
    assert await shown(page, "answer") == text
    assert text.startswith(before)


async def test_a_reload_rejoins(browsing: Browsing) -> None:
    """The address names the generation, so that a reloaded page goes on with it, its prompt included."""
    page = await browsing.open()
    generation_id = await start(page)
    await page.reload()
    await status_is(page, "completed")
    assert await shown(page, "generation-id") == generation_id
    assert await shown(page, "question") == PROMPT
    assert await shown(page, "answer") == (await browsing.snapshot(generation_id))["text"]


async def test_the_recent_list_leads_back(browsing: Browsing) -> None:
    """A generation is in the list, newest first, with its status; a click on it joins it; Back leaves it again."""
    page = await browsing.open()
    await start(page, "An older one.")
    generation_id = await start(page)
    newest = page.locator("#recent li").first
    await expect(newest).to_have_attribute("data-id", generation_id)
    await status_is(page, "completed")
    await expect(newest.locator(".badge")).to_have_text("completed")

    other = await browsing.open()
    await other.locator(f"#recent [data-id='{generation_id}'] a").click()
    await status_is(other, "completed")
    assert await shown(other, "answer") == await shown(page, "answer")
    await other.go_back()
    await status_is(other, "idle")
    await expect(other.locator("#question")).to_be_hidden()
    await expect(other.locator("#answer")).to_be_empty()


async def test_markup_in_a_prompt_is_text(browsing: Browsing) -> None:
    """Tags in a prompt, and in an answer that repeats it, are shown as they were typed and never become elements."""
    markup = "<script>alert(1)</script><img src=x onerror=alert(2)><b>bold</b>"
    page = await browsing.open()
    generation_id = await start(page, markup)
    await status_is(page, "completed")
    assert await shown(page, "question") == markup
    assert await shown(page, "answer") == (await browsing.snapshot(generation_id))["text"]
    assert await page.locator("#stage :is(script, img, b)").count() == 0


async def test_the_policy_forbids_everything_foreign(browsing: Browsing) -> None:
    """The page is served with a policy without exceptions, under which inline script and style do not run."""
    page = await browsing.context.new_page()
    response = await page.goto(browsing.url)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    await page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.head.append(script);
    }""")
    assert await page.evaluate("window.ran") is None
    assert any("script-src" in complaint for complaint in browsing.complaints)
    browsing.complaints.clear()  # provoked


async def test_an_unknown_generation_is_explained(browsing: Browsing) -> None:
    """An address that names no generation shows the server's reason and its code, and the page stays usable."""
    page = await browsing.open("/#no-such-generation")
    await expect(page.locator("#error")).to_be_visible()
    assert await shown(page, "error-code") != ""
    browsing.complaints.clear()  # the browser logs every 4xx
    await start(page)
    await expect(page.locator("#error")).to_be_hidden()


async def test_nothing_is_wider_than_a_phone(browsing: Browsing) -> None:
    """At 360 pixels nothing scrolls sideways: while empty, while cut with an endless word to show, and at the end."""
    page = await browsing.open()
    await page.set_viewport_size(PHONE)
    assert await overflow(page) <= 0
    await page.locator("#prompt").fill("x" * 400)
    await page.evaluate(START_AND_CUT)
    await expect(page.locator("#connection")).to_have_text("disconnected")
    assert await overflow(page) <= 0
    await page.locator("#rejoin").click()
    await status_is(page, "completed")
    assert await overflow(page) <= 0


async def test_every_dialect_side_by_side(browsing: Browsing) -> None:
    """One running log, five protocols: each column shows its own frames as they come, to the end, and no markup."""
    page = await browsing.open()
    generation_id = await start(page, "Say <b>it</b> in every protocol.")
    async with browsing.context.expect_page() as opening:
        await page.locator("#dialects").click()
    dialects = await opening.value
    for name in ("native", "text", "chat_completions", "responses", "ui_messages"):
        await expect(dialects.get_by_test_id(f"dialect-{name}")).to_have_attribute("data-state", "ended")
    text = (await browsing.snapshot(generation_id))["text"]
    assert await dialects.get_by_test_id("dialect-text").locator("pre").text_content() == text
    raw = {name: await dialects.get_by_test_id(f"dialect-{name}").locator("pre").text_content() for name in MARKS}
    for name, mark in MARKS.items():
        assert mark in (raw[name] or ""), name
    assert await dialects.locator("#columns b").count() == 0
    await dialects.set_viewport_size(PHONE)
    assert await dialects.evaluate("document.documentElement.scrollWidth <= innerWidth")
