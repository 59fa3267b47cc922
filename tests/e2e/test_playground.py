"""The playground in a real browser: ask, leave, rejoin, go on. Chromium, real processes, a scripted model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Locator,
    Page,
    Request,
    Route,
    ViewportSize,
    async_playwright,
    expect,
)

from shared.config import Settings
from shared.event_log import Append, EventLog, Hint, new_id
from shared.events import Completed, Event, SourceAdded, TextDelta, encode
from shared.prompt import Prompt
from shared.redis import connect
from tests.conformance.environments import node_with
from tests.conftest import environment
from tests.processes import Processes, Valkey, free_port
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The page is the only thing this browser talks to.
QUIET = ["--no-first-run", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
PHONE = ViewportSize(width=390, height=740)
TIMEOUT_MS = 60_000
ENDED = re.compile("completed|incomplete|failed|cancelled")
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
# Note each length of the answer, and whether there was a network then.
WATCH_GROWTH = """() => {
  window.growth = [];
  const note = () => {
    const turn = document.querySelector(".turn:last-child");
    if (!turn) return;
    const length = turn.querySelector(".words").textContent.length;
    growth.push([performance.now(), length, turn.dataset.connection]);
  };
  const watched = { childList: true, characterData: true, subtree: true, attributes: true };
  new MutationObserver(note).observe(document.getElementById("turns"), watched);
}"""
STORED = """() => Object.keys(localStorage).filter((key) => key.startsWith("rejoin.conversation."))
  .map((key) => JSON.parse(localStorage[key])).sort((one, other) => other.changed - one.changed)"""

MARKDOWN = """# A heading

Some *stress*, some **strength**, some ~~regret~~, `code`, and [a link](https://example.org/a?b=c).
Another: https://example.com/bare and <mailto:you@example.org>.

## Below it

1. one
2. two
   - inner
   - [ ] task

> A quote
> of two lines

| left | middle | right |
|:-----|:------:|------:|
| a    |   b    |     1 |

```python
print("<b>not bold</b>")
```

    indented code

Hard\\
break, then a picture: ![a cat](https://example.org/cat.png)

---

[later], and the end.

[later]: https://example.net/later
"""
HOSTILE = """<script>alert("script")</script><img src=x onerror=alert("img")><svg onload=alert(1)><b>bold</b>

<iframe src="https://example.org"></iframe>

[a](javascript:alert(1)) [b](JaVaScRiPt:alert(2)) [c](&#106;avascript:alert(3))
[d](data:text/html,<script>alert(4)</script>)
[e](vbscript:x) [f](file:///etc/passwd) [g](\\x01javascript:alert(5)) [h](//example.org/x) [i](/docs) [j](blob:x)
<javascript:alert(6)> ![k](javascript:alert(7)) ![l](https://example.org/beacon.png "x\\" onerror=alert(8)")
![m](data:image/svg+xml,<svg onload=alert(9)>) [n](https://example.org "\\" onmouseover=alert(10)")
[o]: javascript:alert(11)
[o]

| <img src=x onerror=alert(12)> | [p](javascript:alert(13)) |
|---|---|
| <style>body{display:none}</style> | ok |

`<script>alert(14)</script>` &lt;script&gt;alert(15)&lt;/script&gt; \x00 \u202e \ufffe

```html" onclick="alert(16)
<script>alert(17)</script>
unclosed
"""
ELEMENTS = {
    *("A", "P", "UL", "OL", "LI", "BLOCKQUOTE", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "HR", "STRONG", "EM", "S"),
    *("BR", "CODE", "PRE", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "DIV", "H3", "H4", "H5", "H6"),
}


@dataclass
class Place:
    """One api with its figures, one worker, and the scripted models behind them."""

    stack: Stack
    upstream: Upstream
    metrics_port: int
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = self.stack.apis[0].url

    def model(self, *scripts: Script) -> str:
        """The name of a model of this test's own."""
        name = f"model-{uuid.uuid4().hex[:8]}"
        self.upstream.script(name, *scripts)
        return name

    def asked(self, model: str) -> list[list[dict[str, Any]]]:
        """The messages of each request for a model."""
        return [request.body["messages"] for request in self.upstream.requests_of(model)]

    async def figure(self, name: str) -> float:
        answer = await self.stack.http.get(f"http://127.0.0.1:{self.metrics_port}/metrics")
        found = re.search(rf"(?m)^rejoin_{re.escape(name)} (\S+)$", answer.text)
        assert found is not None, name
        return float(found[1])

    async def readers(self, number: int) -> None:
        """Wait until exactly so many streams are open at the server."""

        async def look() -> bool:
            return await self.figure("open_readers") == number

        await wait_until(look, timeout=20, every=0.05)

    async def written(self, *events: Event) -> str:
        """The id of an answer with these events, put into the log as a worker does."""
        env = self.stack.env
        settings = Settings(_env_file=None, redis_url=env["REDIS_URL"], key_prefix=env["REJOIN_KEY_PREFIX"])
        redis = connect(settings.redis_url, connections=2)
        log, generation_id = EventLog(redis, settings), new_id()
        prompt = Prompt(model="by-hand", messages=[{"role": "user", "content": "?"}])
        await log.create(generation_id, tenant="local", provider="demo", prompt=prompt)
        claim = await log.claim(Hint(generation_id, 0, 1), new_id())
        assert claim is not None
        await log.append([Append(generation_id, claim.epoch, 1, tuple(map(encode, events)), "completed")])
        await redis.aclose()
        return generation_id


class Browsing:
    """Tabs of one browser profile, and everything the browser complained about in them."""

    def __init__(self, context: BrowserContext, place: Place) -> None:
        self.context = context
        self.place = place
        self.complaints: list[str] = []
        self.asked: list[str] = []  # every address that a page (not its shared worker) asked for

    async def listen(self) -> None:
        self.context.on("console", self._hear)
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.context.on("dialog", self._refuse)
        self.context.on("request", self._note)
        await self.context.expose_binding("complain", lambda _, text: self.complaints.append(text))
        await self.context.add_init_script(REPORT_VIOLATIONS)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _note(self, request: Request) -> None:
        self.asked.append(request.url)

    async def _refuse(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    async def open(self, path: str = "/", url: str | None = None) -> Page:
        page = await self.context.new_page()
        await page.goto((url or self.place.url) + path)
        await expect(page.locator("#model option")).not_to_have_count(0)
        return page

    async def snapshot(self, generation_id: str) -> dict[str, Any]:
        return await self.place.stack.snapshot(generation_id)

    def forgive(self, expected: str) -> None:
        """Take what a test provoked off the complaints; it has to be there."""
        assert any(expected in complaint for complaint in self.complaints), self.complaints
        self.complaints = [complaint for complaint in self.complaints if expected not in complaint]


@pytest.fixture(scope="module")
async def place(server: Valkey, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    processes = Processes(tmp_path_factory.mktemp("playground"))
    env = environment(server.url, f"page{uuid.uuid4().hex[:8]}", upstream) | {"REJOIN_DEMO_WORDS_PER_SECOND": "40"}
    stack, port = Stack(processes, env), free_port()
    try:
        await stack.api(REJOIN_METRICS_PORT=str(port))
        await stack.worker()
        yield Place(stack, upstream, port)
    finally:
        await stack.http.aclose()
        processes.end_all()


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    expect.set_options(timeout=TIMEOUT_MS)
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=binary, args=QUIET) as browser,
    ):
        yield browser


@asynccontextmanager
async def profile(chromium: Browser, place: Place, **options: Any) -> AsyncIterator[Browsing]:
    """A profile that fails the test when a page logs an error, throws, opens a dialog or breaks its policy."""
    async with await chromium.new_context(**options) as context:
        browsing = Browsing(context, place)
        await browsing.listen()
        yield browsing
        assert browsing.complaints == []


@pytest.fixture
async def browsing(chromium: Browser, place: Place) -> AsyncIterator[Browsing]:
    async with profile(chromium, place) as one:
        yield one


async def choose(page: Page, model: str) -> None:
    """Choose a model as a reader does: from the list, or by its name where it is not there."""
    if model in await page.locator("#model option").all_text_contents():
        await page.locator("#model").select_option(model)
        return
    await page.locator("#model").select_option(label="another…")
    await page.locator("#model-name").fill(model)
    await page.locator("#model-name").press("Enter")
    await expect(page.locator("#model")).to_have_value(model)


async def ask(page: Page, question: str = PROMPT, model: str = "") -> Locator:
    """Ask, and give the turn, once the question is on the page."""
    before = await page.locator(".turn").count()
    if model:
        await choose(page, model)
    await page.locator("#prompt").fill(question)
    await page.locator("#prompt").press("Enter")
    await expect(page.locator(".turn")).to_have_count(before + 1)
    return page.locator(".turn").nth(before)


def words(turn: Locator) -> Locator:
    return turn.locator(".words")


async def speaking(turn: Locator) -> None:
    await expect(words(turn)).not_to_be_empty()


async def ended(turn: Locator, status: str = "completed") -> None:
    await expect(turn).to_have_attribute("data-status", ENDED)
    await expect(turn).to_have_attribute("data-status", status)


async def id_of(turn: Locator) -> str:
    id_element = turn.get_by_test_id("generation-id")
    await expect(id_element).to_have_text(re.compile("[0-9a-f]{32}"))
    return await id_element.text_content() or ""


async def stored(page: Page) -> list[dict[str, Any]]:
    """The conversations as the browser keeps them, the newest first."""
    found: list[dict[str, Any]] = await page.evaluate(STORED)
    return found


async def kept_text(page: Page) -> str:
    """The text of the last answer of the newest conversation, as the browser keeps it."""
    turn = (await stored(page))[0]["turns"][-1]
    return str(turn["answers"][turn["shown"]]["end"]["text"])


async def same_words(turn: Locator, text: str) -> None:
    """On the page, but for the white space, is the text, which has no Markdown in it."""
    assert (await words(turn).inner_text()).split() == text.split()


async def overflow(page: Page) -> int:
    """By how many pixels the page, or the conversation on it, is wider than its window."""
    widths = (
        "[document.documentElement, document.getElementById('thread')].map((box) => box.scrollWidth - box.clientWidth)"
    )
    return int(max(await page.evaluate(widths)))


# ---- asking and going on ----


async def test_the_answer_appears_word_by_word(browsing: Browsing) -> None:
    """The answer on the screen grows in many small steps over time, not in one piece at the end."""
    page = await browsing.open()
    await page.evaluate(WATCH_GROWTH)
    turn = await ask(page)
    await ended(turn)
    growth = await page.evaluate("growth")
    lengths = [length for _, length, _ in growth]
    assert len(set(lengths)) >= 5
    assert lengths == sorted(lengths)
    assert growth[-1][0] - growth[0][0] > 50
    snapshot = await browsing.snapshot(await id_of(turn))
    await same_words(turn, snapshot["text"])
    assert await kept_text(page) == snapshot["text"]
    assert await turn.get_by_test_id("last-event-id").text_content() == snapshot["last_event_id"]
    assert await turn.get_by_test_id("connections").text_content() == "1"


async def test_a_follow_up_reaches_the_model_with_what_was_said(browsing: Browsing) -> None:
    """The model is told the questions and answers before, in order; an answer without words is left out."""
    place = browsing.place
    model = place.model(Script(chunks=["Four."]), Script(status=400), Script(chunks=["As I said: ", "four."]))
    page = await browsing.open()
    await ended(await ask(page, "What are two and two?", model))
    await ended(await ask(page, "This one fails."), "failed")
    await ended(await ask(page, "And again?"))
    said = [{"role": "user", "content": "What are two and two?"}, {"role": "assistant", "content": "Four."}]
    assert place.asked(model)[0] == said[:1]
    assert place.asked(model)[-1] == [*said, {"role": "user", "content": "And again?"}]


async def test_conversations_are_chosen_renamed_and_deleted(browsing: Browsing) -> None:
    """Each is listed under its first question; one may be renamed; a deleted one is erased here and at the server."""
    page = await browsing.open()
    rows = page.locator("#conversations li")
    first = await ask(page, "The first one")
    await ended(first)
    first_id = await id_of(first)
    await page.locator("#new").click()
    await expect(page.locator("#welcome")).to_be_visible()
    await ended(await ask(page, "The second one"))
    await expect(rows.locator(".name")).to_have_text(["The second one", "The first one"])

    await rows.nth(1).locator("a").click()
    await expect(page.locator("#title")).to_have_text("The first one")
    await expect(page.get_by_test_id("question")).to_have_text("The first one")
    await rows.nth(1).hover()
    await rows.nth(1).locator('[data-act="rename"]').click()
    await page.locator("#rename-name").fill("Renamed")
    await page.locator("#rename-name").press("Enter")
    await expect(rows.locator(".name")).to_have_text(["The second one", "Renamed"])
    await page.go_back()
    await expect(page.locator("#title")).to_have_text("The second one")
    await page.go_forward()
    await page.reload()
    await expect(page.locator("#title")).to_have_text("Renamed")

    await rows.nth(1).hover()
    await rows.nth(1).locator('[data-act="delete"]').click()
    await page.get_by_role("button", name="Keep it").click()
    await expect(rows).to_have_count(2)
    await rows.nth(1).locator('[data-act="delete"]').click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    await expect(rows.locator(".name")).to_have_text(["The second one"])
    await expect(page.locator("#welcome")).to_be_visible()
    assert [one["title"] for one in await stored(page)] == ["The second one"]

    async def gone() -> bool:
        answer = await browsing.place.stack.http.get(f"{browsing.place.url}/v1/generations/{first_id}")
        return answer.status_code == 410

    await wait_until(gone)


async def test_the_model_is_the_one_that_was_chosen(
    browsing: Browsing, stack: Stack, upstream: Upstream, tmp_path: Path
) -> None:
    """The list is the server's; the chosen model is asked, and remembered, and each conversation has its own."""
    table = tmp_path / "models.toml"
    table.write_text("".join(f'[{name}]\nbase_url = "{upstream.base_url}"\n' for name in ("first-one", "second-one")))
    upstream.script("second-one", Script(chunks=["I am the second."]))
    await stack.api(REJOIN_MODELS=str(table))
    await stack.worker(REJOIN_MODELS=str(table))
    page = await browsing.open(url=stack.apis[0].url)
    names = await page.locator("#model option").all_text_contents()
    assert {"demo", "first-one", "second-one"} <= set(names)
    turn = await ask(page, "Who are you?", "second-one")
    await ended(turn)
    await expect(words(turn)).to_have_text("I am the second.")
    await expect(turn.get_by_test_id("summary")).to_contain_text("second-one")
    await page.locator("#new").click()
    await page.locator("#model").select_option("demo")
    await page.locator("#conversations a").click()
    await expect(page.locator("#model")).to_have_value("second-one")
    other = await browsing.open(url=stack.apis[0].url)
    await expect(other.locator("#model")).to_have_value("demo")


async def test_a_retry_is_another_answer_to_the_same_question(browsing: Browsing) -> None:
    """The model is asked again without its first answer; both stay, and the reader turns from one to the other."""
    place = browsing.place
    model = place.model(Script(chunks=["The first try."]), Script(chunks=["The second try."]))
    page = await browsing.open()
    turn = await ask(page, "Try.", model)
    await ended(turn)
    await turn.get_by_test_id("retry").click()
    await expect(words(turn)).to_have_text("The second try.")
    await ended(turn)
    assert place.asked(model) == [[{"role": "user", "content": "Try."}]] * 2
    await expect(turn.get_by_test_id("page")).to_have_text("2 of 2")
    await turn.get_by_role("button", name="Earlier answer").click()
    await expect(words(turn)).to_have_text("The first try.")
    await page.reload()
    await expect(page.locator(".turn .words")).to_have_text("The first try.")
    await expect(page.get_by_test_id("page")).to_have_text("1 of 2")


async def test_the_last_question_can_be_edited(browsing: Browsing) -> None:
    """The edited question takes the place of the last one, and what is before it stays."""
    place = browsing.place
    model = place.model(Script(chunks=["One."]), Script(chunks=["Tow."]), Script(chunks=["Two."]))
    page = await browsing.open()
    await ended(await ask(page, "Say one.", model))
    turn = await ask(page, "Say tow.")
    await ended(turn)
    await turn.hover()
    await turn.locator('[data-act="edit"]').click()
    await page.locator("#edit-text").fill("Say two.")
    await page.get_by_role("button", name="Ask this").click()
    await expect(page.get_by_test_id("question")).to_have_text(["Say one.", "Say two."])
    await expect(page.locator(".words")).to_have_text(["One.", "Two."])
    assert [message["content"] for message in place.asked(model)[-1]] == ["Say one.", "One.", "Say two."]


# ---- leaving and rejoining ----


async def test_a_reload_in_mid_answer_goes_on(browsing: Browsing) -> None:
    """Reloaded twice while it is written, the page ends with the whole answer once; the model was asked once."""
    place = browsing.place
    script = Script(count=60, stall_at=30, pace_seconds=0.002)
    model = place.model(script)
    page = await browsing.open()
    turn = await ask(page, "Go on.", model)
    for _ in range(2):
        await place.upstream.wait_sent(model, 30)
        await speaking(turn)
        await page.reload()
    await speaking(turn)
    place.upstream.release(model)
    await ended(turn)
    assert await kept_text(page) == script.text("Go on.") == (await browsing.snapshot(await id_of(turn)))["text"]
    assert place.upstream.hits(model) == 1
    assert len((await stored(page))[0]["turns"]) == 1


async def test_a_reload_before_the_order_was_confirmed_asks_for_the_same_answer(browsing: Browsing) -> None:
    """The server took the order, its answer was lost, the page was reloaded: the same generation, asked for once."""
    place, model = browsing.place, browsing.place.model(Script(chunks=["Once."]))
    page = await browsing.open()
    made: list[str] = []

    async def lose_the_answer(route: Route) -> None:
        answer = await route.fetch()
        made.append((await answer.json())["id"])
        await route.abort()

    await page.route(lambda url: url.endswith("/v1/generations"), lose_the_answer)
    turn = await ask(page, "Only once.", model)
    await expect(turn.get_by_test_id("answer-problem")).to_contain_text("very same request")
    browsing.forgive("ERR_FAILED")
    await page.unroute_all()
    await page.reload()
    await ended(turn)
    assert await id_of(turn) == made[0]
    assert place.upstream.hits(model) == 1


async def test_drop_my_network_loses_nothing(browsing: Browsing) -> None:
    """For three seconds no stream is open and nothing is added; then the page has what was said meanwhile."""
    place = browsing.place
    model = place.model(Script(count=400, pace_seconds=0.02))
    page = await browsing.open()
    await page.evaluate(WATCH_GROWTH)
    await place.readers(0)
    resumed = await place.figure('readers_started_total{resumed="yes"}')
    turn = await ask(page, "Drop it.", model)
    await speaking(turn)
    await place.readers(1)
    await page.locator("#drop").click()
    await expect(turn).to_have_attribute("data-connection", "dropped")
    await expect(page.locator("#drop")).to_have_attribute("aria-pressed", "true")
    await place.readers(0)
    await ended(turn)
    growth = await page.evaluate("growth")
    dropped = [(at, length) for at, length, connection in growth if connection == "dropped"]
    assert len({length for _, length in dropped[1:]}) == 1, "words came without a network"
    after = next(at for at, _, connection in growth if at > dropped[0][0] and connection == "connected")
    assert 2900 <= after - dropped[0][0] < 20_000
    assert await kept_text(page) == (await browsing.snapshot(await id_of(turn)))["text"]
    assert await turn.get_by_test_id("connections").text_content() == "2"
    assert await place.figure('readers_started_total{resumed="yes"}') == resumed + 1
    await expect(page.locator("#timeline")).to_have_attribute("aria-label", re.compile("away once"))


async def test_a_question_asked_without_a_network_is_answered_when_it_is_back(browsing: Browsing) -> None:
    """While the network is dropped no stream is opened for a new question either; it is answered all the same."""
    place = browsing.place
    model = place.model(Script(chunks=["Hello."]), Script(chunks=["Behind ", "your ", "back."]))
    page = await browsing.open()
    await ended(await ask(page, "First.", model))
    await place.readers(0)
    await page.evaluate(WATCH_GROWTH)
    begun = await place.figure('readers_started_total{resumed="no"}')
    await page.locator("#drop").click()
    turn = await ask(page, "Second.")
    await expect(turn).to_have_attribute("data-connection", "dropped")
    await place.upstream.wait_hits(model, 2)
    await place.upstream.wait_closed(model)
    await expect(turn).to_have_attribute("data-connection", "dropped")
    assert await place.figure('readers_started_total{resumed="no"}') == begun
    await expect(words(turn)).to_have_text("Behind your back.")
    await ended(turn)


async def test_the_strip_shows_words_gaps_and_nothing_else(browsing: Browsing) -> None:
    """The strip has marks in the colour of words on both sides of a gap in the colour of being away."""
    model = browsing.place.model(Script(count=500, pace_seconds=0.02))
    page = await browsing.open()
    turn = await ask(page, "Draw.", model)
    await speaking(turn)
    colours = """() => {
      const canvas = document.getElementById("timeline");
      const pixels = canvas.getContext("2d").getImageData(0, Math.round(canvas.height / 2) - 12, canvas.width, 1).data;
      const row = [];
      for (let at = 0; at < pixels.length; at += 4) row.push(pixels[at + 3] === 0 ? " " : pixels[at] > 128 ? "g" : "w");
      return row.join("");
    }"""
    assert "g" not in await page.evaluate(colours)
    await page.locator("#drop").click()
    await expect(turn).to_have_attribute("data-connection", "dropped")
    await expect(turn).to_have_attribute("data-connection", "connected")

    async def drawn() -> str:
        middle = colours.replace("- 12", "")
        return re.sub(r"(.)\1*", r"\1", str(await page.evaluate(middle)).replace(" ", ""))

    await wait_until(lambda: _matches(drawn, "wgw"), timeout=20, every=0.1)


async def _matches(look: Any, wanted: str) -> bool:
    return bool(re.search(wanted, await look()))


async def test_many_tabs_on_one_conversation_share_one_connection(browsing: Browsing) -> None:
    """Eight tabs, more than a host may have connections: one stream is open at the server, and all show the same."""
    place = browsing.place
    script = Script(count=80, stall_at=40)
    model = place.model(script)
    await place.readers(0)
    first = await browsing.open()
    turn = await ask(first, "For all.", model)
    await place.upstream.wait_sent(model, 40)
    await speaking(turn)
    link = first.locator("#second-tab")
    async with browsing.context.expect_page() as opening:
        await link.click()
    path = "/" + (await link.get_attribute("href") or "").removeprefix("/")
    tabs = [first, await opening.value, *[await browsing.open(path) for _ in range(6)]]
    for tab in tabs:
        await speaking(tab.locator(".turn"))
    await place.readers(1)
    await tabs[3].close()
    await place.readers(1)
    place.upstream.release(model)
    shown = set()
    for tab in tabs[:3] + tabs[4:]:
        await ended(tab.locator(".turn"))
        shown.add(await words(tab.locator(".turn")).inner_text())
    assert len(shown) == 1
    assert await kept_text(tabs[-1]) == script.text("For all.")
    await place.readers(0)


async def test_a_question_asked_in_one_tab_is_answered_in_the_other_too(browsing: Browsing) -> None:
    """A tab that has the conversation open shows the new question, its words as they come, and its end."""
    place, model = browsing.place, browsing.place.model(Script(chunks=["Hello."]), Script(count=60, stall_at=30))
    one = await browsing.open()
    await ended(await ask(one, "First.", model))
    other = await browsing.open("/" + one.url.rpartition("/")[2])
    await ended(other.locator(".turn"))
    await ask(one, "Second.")
    await expect(other.get_by_test_id("question")).to_have_text(["First.", "Second."])
    await speaking(other.locator(".turn").nth(1))
    place.upstream.release(model)
    await ended(other.locator(".turn").nth(1))
    await ended(one.locator(".turn").nth(1))
    assert await other.locator(".words").nth(1).inner_text() == await one.locator(".words").nth(1).inner_text()
    assert len([url for url in browsing.asked if url.endswith("/v1/generations")]) == 2  # one tab alone asks


async def test_the_answer_goes_on_when_nobody_is_there(browsing: Browsing) -> None:
    """With the last tab the stream is closed; the answer is written on, and a new tab has all of it."""
    place = browsing.place
    script = Script(count=60, stall_at=20)
    model = place.model(script)
    page = await browsing.open()
    await place.readers(0)
    await speaking(await ask(page, "Leave.", model))
    await place.readers(1)
    address = "/" + page.url.rpartition("/")[2]
    await page.close()
    await place.readers(0)
    place.upstream.release(model)
    await place.upstream.wait_closed(model)
    page = await browsing.open(address)
    await ended(page.locator(".turn"))
    assert await kept_text(page) == script.text("Leave.")


async def test_an_answer_is_kept_though_its_conversation_is_not_on_the_page(browsing: Browsing) -> None:
    """What runs in another conversation is followed too: its mark goes when it ends, and its words are kept."""
    place = browsing.place
    script = Script(count=20, stall_at=10)
    model = place.model(script)
    page = await browsing.open()
    await speaking(await ask(page, "Behind.", model))
    await page.locator("#new").click()
    mark = page.locator("#conversations .dot")
    await expect(mark).to_be_visible()
    await page.reload()
    await expect(mark).to_be_visible()
    await place.readers(1)
    place.upstream.release(model)
    await expect(mark).to_be_hidden()
    assert await kept_text(page) == script.text("Behind.")


async def test_without_a_shared_worker_each_tab_has_its_own_connection(chromium: Browser, place: Place) -> None:
    """Where the browser has no SharedWorker (Chrome on Android), the page works as well, with a connection per tab."""
    async with profile(chromium, place) as browsing:
        await browsing.context.add_init_script("delete globalThis.SharedWorker")
        model = place.model(Script(count=40, stall_at=20))
        await place.readers(0)
        one = await browsing.open()
        turn = await ask(one, "Alone.", model)
        await speaking(turn)
        other = await browsing.open("/" + one.url.rpartition("/")[2])
        await speaking(other.locator(".turn"))
        await place.readers(2)
        await one.locator("#drop").click()
        await place.readers(1)
        place.upstream.release(model)
        for page in (one, other):
            await ended(page.locator(".turn"))
        assert await words(turn).inner_text() == await words(other.locator(".turn")).inner_text()


async def test_a_fresh_attempt_takes_back_what_the_lost_one_had_said(
    browsing: Browsing, stack: Stack, upstream: Upstream
) -> None:
    """The worker dies in mid-answer, the next one starts over: the void words leave the page, and a notice says so."""
    model = f"voided-{uuid.uuid4().hex[:8]}"
    upstream.script(model, Script(chunks=["Void ", "words."], stall_end=True), Script(chunks=["The true answer."]))
    api = await stack.api()
    worker = await stack.worker()
    page = await browsing.open(url=api.url)
    turn = await ask(page, "Will it hold?", model)
    await expect(words(turn)).to_have_text("Void words.")
    await worker.kill()
    await stack.worker()
    await ended(turn)
    await expect(words(turn)).to_have_text("The true answer.")
    await expect(turn.get_by_test_id("notice")).to_contain_text("Attempt 2 started over")
    await expect(page.locator(".legend.void")).to_be_visible()
    upstream.release(model)


async def test_an_answer_is_joined_by_its_id(browsing: Browsing) -> None:
    """An answer that was started elsewhere opens by its id, is kept as a conversation, and can be asked about."""
    place = browsing.place
    generation = await place.stack.create("demo", "elsewhere")
    page = await browsing.open(f"/#{generation['id']}")
    turn = page.locator(".turn")
    await ended(turn)
    await same_words(turn, (await browsing.snapshot(generation))["text"])
    await page.reload()
    await expect(page.locator("#conversations li")).to_have_count(1)
    await ended(page.locator(".turn"))
    await expect(turn.get_by_test_id("retry")).to_be_hidden()
    await ended(await ask(page, "And then?"))


# ---- stopping and failing ----


async def test_stop_keeps_what_was_said(browsing: Browsing) -> None:
    """Stop, and Escape, end the answer at the model's server; the words stay, and the next question may be asked."""
    place = browsing.place
    model = place.model(Script(count=10_000, pace_seconds=0.01))
    page = await browsing.open()
    for number, stop in enumerate((page.locator("#stop").click, lambda: page.keyboard.press("Escape"))):
        turn = await ask(page, f"Stop {number}.", model)
        await speaking(turn)
        await expect(page.locator("#stop")).to_be_enabled()
        await stop()
        await ended(turn, "cancelled")
        await place.upstream.wait_closed(model)
        snapshot = await browsing.snapshot(await id_of(turn))
        assert snapshot["status"] == "cancelled"
        assert await kept_text(page) == snapshot["text"] != ""
        await expect(page.locator("#stop")).to_be_hidden()
        await expect(turn.get_by_test_id("summary")).to_contain_text("stopped")


async def test_stop_without_a_network_shows_what_had_been_written(browsing: Browsing) -> None:
    """Stopped while the streams are dropped, the page still shows the end and all the text that was kept."""
    model = browsing.place.model(Script(count=10_000, pace_seconds=0.01))
    page = await browsing.open()
    turn = await ask(page, "Stop.", model)
    await speaking(turn)
    await page.locator("#drop").click()
    await expect(turn).to_have_attribute("data-connection", "dropped")
    await page.locator("#stop").click()
    await ended(turn, "cancelled")
    assert await kept_text(page) == (await browsing.snapshot(await id_of(turn)))["text"]


async def test_a_failing_model_is_said_in_words_and_may_be_asked_again(browsing: Browsing) -> None:
    """What had come stays, the reason and its code are shown, and one click asks again."""
    place = browsing.place
    model = place.model(Script(chunks=["Half an ", "answer"], error_at=2), Script(chunks=["A whole one."]))
    page = await browsing.open()
    turn = await ask(page, "Fail.", model)
    await ended(turn, "failed")
    await expect(words(turn)).to_have_text("Half an answer")
    problem = turn.get_by_test_id("answer-problem")
    await expect(problem).to_contain_text("upstream_error")
    await expect(problem).to_contain_text("Asking again may work")
    await turn.get_by_test_id("again").click()
    await ended(turn)
    await expect(words(turn)).to_have_text("A whole one.")
    await expect(problem).to_be_hidden()


async def test_a_server_that_cannot_be_reached_is_said_and_tried_again(browsing: Browsing) -> None:
    """The question stays on the page with the reason; "Try again" sends the same request."""
    page = await browsing.open()
    keys: list[str | None] = []

    async def refuse(route: Route) -> None:
        keys.append(route.request.headers.get("idempotency-key"))
        await route.abort("connectionrefused")

    await page.route(lambda url: url.endswith("/v1/generations"), refuse)
    turn = await ask(page)
    await expect(turn.get_by_test_id("answer-problem")).to_contain_text("cannot be reached")
    browsing.forgive("ERR_CONNECTION_REFUSED")
    await page.unroute_all()
    async with page.expect_request(lambda request: request.url.endswith("/v1/generations")) as asking:
        await turn.get_by_test_id("again").click()
    assert (await asking.value).headers["idempotency-key"] == keys[0]
    await ended(turn)


async def test_an_unknown_generation_is_explained(browsing: Browsing) -> None:
    """An address that names no generation shows the server's reason and its code, and the page stays usable."""
    page = await browsing.open("/#" + "0" * 32)
    await expect(page.locator("#problem")).to_be_visible()
    await expect(page.locator("#problem-code")).to_have_text("not_found")
    browsing.forgive("404")
    await ended(await ask(page))
    await expect(page.locator("#problem")).to_be_hidden()


async def test_an_answer_whose_log_is_gone_says_so(browsing: Browsing) -> None:
    """A conversation with an unfinished answer that was deleted elsewhere says what became of it, and may ask again."""
    place, model = browsing.place, browsing.place.model(Script(count=20, stall_at=10))
    page = await browsing.open()
    turn = await ask(page, "Gone?", model)
    await speaking(turn)
    generation_id, address = await id_of(turn), "/" + page.url.rpartition("/")[2]
    await page.close()
    await place.stack.http.delete(f"{place.url}/v1/generations/{generation_id}")
    page = await browsing.open(address)
    turn = page.locator(".turn")
    await ended(turn, "failed")
    await expect(turn.get_by_test_id("answer-problem")).to_contain_text("deleted")
    browsing.forgive("410")
    place.upstream.release(model)


async def test_a_key_is_asked_for_and_stays_in_the_tab(
    browsing: Browsing, stack: Stack, rejoin_env: dict[str, str]
) -> None:
    """With keys the page asks for one, tells a wrong one, and keeps it out of addresses and out of what is kept."""
    key = "a-key-" + uuid.uuid4().hex
    keys = {"REJOIN_API_KEYS": f"me:{hashlib.sha256(key.encode()).hexdigest()}", "REJOIN_SECRET": "s" * 40}
    stack.env |= keys
    await stack.api()
    await stack.worker()
    page = await browsing.context.new_page()
    await page.goto(stack.apis[0].url)
    for attempt in ("wrong", key):
        await expect(page.locator("#key-form")).to_be_visible()
        await page.locator("#key").fill(attempt)
        await page.locator("#key-save").click()
        if attempt != key:
            await expect(page.locator("#key-note")).to_contain_text("did not accept")
    await expect(page.locator("#key-form")).to_be_hidden()
    browsing.forgive("401")
    await expect(page.locator("#model option")).not_to_have_count(0)
    turn = await ask(page)
    await ended(turn)
    await page.reload()
    await expect(words(turn)).not_to_be_empty()
    await expect(page.locator("#model option")).not_to_have_count(0)
    assert await page.evaluate("sessionStorage['rejoin.api-key']") == key
    assert key not in json.dumps(await page.evaluate("({...localStorage})"))
    assert not [url for url in browsing.asked if key in url]


async def test_a_full_storage_is_said_and_takes_nothing_off_the_page(chromium: Browser, place: Place) -> None:
    """An answer that the browser cannot keep stays on the page with a word of advice, and is followed once."""
    full = """const keep = Storage.prototype.setItem;
    Storage.prototype.setItem = function (key, text) {
      if (text.length > 2000) throw new DOMException("full", "QuotaExceededError");
      return keep.call(this, key, text);
    };"""
    async with profile(chromium, place) as browsing:
        await browsing.context.add_init_script(full)
        model = place.model(Script(chunks=["0123456789 "] * 300), Script(chunks=["Small."]))
        page = await browsing.open()
        begun = await place.figure('readers_started_total{resumed="no"}')
        turn = await ask(page, "Much.", model)
        await ended(turn)
        await expect(page.locator("#problem")).to_contain_text("Delete a conversation")
        assert len(await words(turn).inner_text()) > 3000
        await page.locator("#problem-close").click()
        await ended(await ask(page, "Little."))
        await expect(words(turn)).to_contain_text("0123456789")
        assert await place.figure('readers_started_total{resumed="no"}') == begun + 2


# ---- Markdown ----


async def test_markdown_becomes_elements(browsing: Browsing) -> None:
    """Headings, lists, quotes, tables, code with its language, links that tell nobody where they stood, no pictures."""
    model = browsing.place.model(Script(chunks=[MARKDOWN[at : at + 3] for at in range(0, len(MARKDOWN), 3)]))
    page = await browsing.open()
    turn = await ask(page, "Format.", model)
    await ended(turn)
    box = words(turn)
    await expect(box.locator("h3")).to_have_text("A heading")
    await expect(box.locator("h4")).to_have_text("Below it")
    assert await box.locator("em, strong, s, p > code").all_text_contents() == ["stress", "strength", "regret", "code"]
    await expect(box.locator("ol > li")).to_have_count(2)
    await expect(box.locator("ol ul > li").first).to_have_text("inner")
    await expect(box.locator("blockquote")).to_have_text(re.compile(r"A quote\s+of two lines"))
    assert await box.locator("th").evaluate_all("(cells) => cells.map((cell) => cell.dataset.align)") == [
        "left",
        "center",
        "right",
    ]
    code = box.locator("figure").first
    await expect(code.locator(".language")).to_have_text("python")
    await expect(code.locator("pre")).to_have_text('print("<b>not bold</b>")')
    links = await box.locator("a").evaluate_all(
        "(all) => all.map((one) => [one.textContent, one.href, one.rel, one.target])"
    )
    assert [link[:2] for link in links] == [
        ["a link", "https://example.org/a?b=c"],
        ["https://example.com/bare", "https://example.com/bare"],
        ["mailto:you@example.org", "mailto:you@example.org"],
        ["a cat", "https://example.org/cat.png"],
        ["later", "https://example.net/later"],
    ]
    assert {tuple(link[2:]) for link in links} == {("noopener noreferrer", "_blank")}
    assert await page.locator("#thread img").count() == 0

    await browsing.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await code.get_by_role("button", name="Copy this code").click()
    await expect(page.locator("#announce")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == 'print("<b>not bold</b>")\n'
    await turn.get_by_role("button", name="Copy this answer").click()

    async def copied() -> bool:
        return bool(await page.evaluate("navigator.clipboard.readText()") == MARKDOWN)

    await wait_until(copied)


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_hostile_markdown_never_executes(browsing: Browsing, size: int) -> None:
    """Tags, handlers, addresses that run something are text: in a question, an answer, its reasoning, a tool's name."""
    pieces = [HOSTILE[at : at + size] for at in range(0, len(HOSTILE), size)]
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "<img src=x>", "arguments": HOSTILE}}
    model = browsing.place.model(Script(chunks=pieces, reasoning=pieces, tool_calls=[call]), Script(chunks=["Fine."]))
    page = await browsing.open()
    turn = await ask(page, HOSTILE, model)
    await ended(turn)
    for link in await turn.locator("a[href]").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))"):
        assert re.match(r"https?://|mailto:|/playground/dialects\.html#[0-9a-f]{32}$", link), link
    boxes = turn.locator(".prose *")
    assert set(await boxes.evaluate_all("(all) => all.map((one) => one.tagName)")) <= ELEMENTS
    attributes = set(await boxes.evaluate_all("(all) => all.flatMap((one) => one.getAttributeNames())"))
    known = {"href", "target", "rel", "class", "type", "start", "tabindex", "role", "aria-label"}
    assert attributes <= known | {"data-level", "data-align"}
    await expect(turn.get_by_test_id("question")).to_have_text(HOSTILE.strip(), use_inner_text=False)
    await expect(turn.get_by_test_id("tools")).to_contain_text("<img src=x>")
    assert await words(turn).locator("pre").last.text_content() == "<script>alert(17)</script>\nunclosed\n"
    await ended(await ask(page, "Still there?"))
    foreign = [url for url in browsing.asked if not url.startswith(browsing.place.url)]
    assert foreign == []


IN_PIECES = r"""async () => {
  const { Markdown } = await import("/playground/markdown.js");
  let seed = 7;
  const chance = (below) => (seed = (seed * 48271) % 2147483647) % below;
  const parts = [
    ...["a", "b c", "\n", "\n", "\n\n", "# ", "- ", "1. ", "> ", "```\n", "    ", "  ", "|", "|-|-|\n", "a|b\n"],
    ...["---\n", "===\n", "*", "**", "_", "`", "[x]", "(y)", "[x]: http://z\n", "![", "]", "<b>", "&amp;", "\\"],
    ...["\t", "\r\n", "\r", "é", "👋", "~~~\n", "#", "-", "+ ", "http://a.b ", "\u2028", "\u0000"],
  ];
  const wrong = [];
  for (let round = 0; round < 1500; round += 1) {
    const text = Array.from({ length: 3 + chance(40) }, () => parts[chance(parts.length)]).join("");
    const [whole, pieces] = [document.createElement("div"), document.createElement("div")];
    const one = new Markdown(whole);
    one.append(text);
    one.end();
    const many = new Markdown(pieces);
    for (let at = 0; at < text.length; ) {
      const next = at + 1 + chance(6);
      many.append(text.slice(at, next));
      many.paint();
      at = next;
    }
    many.end();
    if (!whole.isEqualNode(pieces)) wrong.push([text, whole.innerHTML, pieces.innerHTML]);
  }
  return wrong.slice(0, 3);
}"""


async def test_markdown_in_pieces_is_markdown_in_one_piece(browsing: Browsing) -> None:
    """However a text is cut on its way, and as often as it is painted meanwhile, in the end it looks the same."""
    page = await browsing.open()
    assert await page.evaluate(IN_PIECES) == []


LOOKED_AT = r"""async (text) => {
  const { Markdown } = await import("/playground/markdown.js");
  const box = document.createElement("div");
  const markdown = new Markdown(box);
  let looked = 0;
  const first = [];
  for (const word of text.match(/\S*\s*/g)) {
    markdown.append(word);
    looked += markdown.open.length;
    markdown.paint();
    first.push(box.firstChild);
  }
  return { looked, kept: first.at(-1) === first[1000], words: box.textContent.length };
}"""


async def test_a_long_answer_costs_as_much_as_its_parts(browsing: Browsing) -> None:
    """Twice as many paragraphs are twice the characters looked at, and what is settled is left alone."""
    page = await browsing.open()
    paragraph = "word " * 60 + "\n\n- item\n- item\n\n"
    half, full = [await page.evaluate(LOOKED_AT, paragraph * number) for number in (160, 320)]
    assert full["kept"]
    assert 1.8 < full["looked"] / half["looked"] < 2.2
    assert full["looked"] < 320 * len(paragraph) * 130


@pytest.mark.parametrize(
    "piece",
    [
        "x",
        "> ",
        "- ",
        "*a **b ",
        "[",
        "![](",
        "`",
        "<",
        "|",
        "http://a",
        "&#",
        "#",
        "\\",
        "_a__",
        "~~",
        "[a](",
        "1. ",
        "\t",
    ],
)
async def test_a_hundred_thousand_characters_in_one_line_do_not_break_it(browsing: Browsing, piece: str) -> None:
    """Lines made to be slow, or to nest without end, are shown within seconds, and the page lives on."""
    page = await browsing.open()
    script = """async (text) => {
      const { Markdown } = await import("/playground/markdown.js");
      const box = document.createElement("div");
      document.getElementById("thread").append(box);
      const markdown = new Markdown(box);
      const began = performance.now();
      markdown.append(text);
      markdown.paint();
      markdown.end();
      const depth = (node) => Math.max(0, ...[...node.children].map(depth)) + 1;
      return [performance.now() - began, box.getBoundingClientRect().width, depth(box)];
    }"""
    took, width, depth = await page.evaluate(script, (piece * 100_000)[:100_000])
    assert took < 10_000
    assert width > 0
    assert depth < 300


# ---- reasoning, tools, sources ----


async def test_reasoning_is_folded_and_tool_calls_are_shown(browsing: Browsing) -> None:
    """The reasoning is there, closed until it is opened; a tool call has its name and its arguments in one piece."""
    calls = [
        {"index": 0, "id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}},
        {"index": 0, "function": {"arguments": '"Rome"}'}},
    ]
    model = browsing.place.model(
        Script(reasoning=["First **this**, ", "then that."], chunks=["Done."], tool_calls=calls)
    )
    page = await browsing.open()
    turn = await ask(page, "Think.", model)
    await ended(turn)
    reasoning = turn.get_by_test_id("reasoning")
    await expect(reasoning).not_to_have_attribute("open", "")
    await expect(reasoning.locator(".prose")).to_be_hidden()
    await reasoning.locator("summary").click()
    await expect(reasoning.locator(".prose")).to_have_text("First this, then that.")
    await expect(reasoning.locator("strong")).to_have_text("this")
    await expect(turn.get_by_test_id("tools").locator("li")).to_have_text('weather{"city": "Rome"}')


async def test_sources_are_shown_under_the_answer(browsing: Browsing) -> None:
    """Each source has its title, its host, its score and its snippet; only a web address becomes a link."""
    generation_id = await browsing.place.written(
        TextDelta("See [1]."),
        SourceAdded("1", "The <b>log</b>", "https://example.org/log?x=1", 0.914, "Append-only."),
        SourceAdded("2", "A script", "javascript:alert(1)", 0.5, "<img src=x onerror=alert(2)>"),
        SourceAdded("3", "notes.md"),
        Completed("stop"),
    )
    page = await browsing.open(f"/#{generation_id}")
    sources = page.get_by_test_id("sources").locator("li")
    await expect(sources).to_have_count(3)
    assert [re.sub(r"\s+", " ", text) for text in await sources.all_inner_texts()] == [
        "The <b>log</b> 0.91 example.org Append-only.",
        "A script 0.50 <img src=x onerror=alert(2)>",
        "notes.md",
    ]
    links = await sources.locator("a").evaluate_all("(all) => all.map((one) => [one.href, one.rel])")
    assert links == [["https://example.org/log?x=1", "noopener noreferrer"]]
    await page.reload()
    await expect(sources).to_have_count(3)


# ---- looks, keyboard, screen reader ----


async def test_light_and_dark_follow_the_system_until_one_is_chosen(chromium: Browser, place: Place) -> None:
    """The system's choice holds, the switch goes over it, is kept over a reload, and goes for the other page too."""
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"

    async def is_dark(page: Page) -> bool:
        return max(await page.evaluate(background)) < 64

    async with profile(chromium, place, color_scheme="dark") as browsing:
        page = await browsing.open()
        assert await is_dark(page)
        await page.emulate_media(color_scheme="light")
        assert not await is_dark(page)
        for name, dark in (("light", False), ("dark", True)):
            await page.locator("#theme").click()
            await expect(page.locator("#theme")).to_have_attribute("data-state", name)
            assert await is_dark(page) is dark
        await page.reload()
        assert await is_dark(page)
        other = await browsing.context.new_page()
        await other.goto(place.url + "/playground/dialects.html")
        assert await is_dark(other)
        await page.locator("#theme").click()
        await expect(page.locator("#theme")).to_have_attribute("data-state", "system")
        assert not await is_dark(page)


async def test_the_keyboard_is_enough(browsing: Browsing) -> None:
    """Ask over two lines, stop, retry, drop the network, rename, delete, start anew: without a mouse."""
    page = await browsing.open()
    keys = page.keyboard
    await expect(page.locator("#prompt")).to_be_focused()
    await choose(page, browsing.place.model(Script(count=10_000, pace_seconds=0.01)))
    await keys.press("Alt+q")
    await expect(page.locator("#prompt")).to_be_focused()
    await keys.type("Two")
    await keys.press("Shift+Enter")
    await keys.type("lines")
    await expect(page.locator(".turn")).to_have_count(0)
    await keys.press("Enter")
    turn = page.locator(".turn")
    assert await turn.get_by_test_id("question").text_content() == "Two\nlines"
    await speaking(turn)
    await keys.press("Alt+x")
    await expect(turn).to_have_attribute("data-connection", "dropped")
    await expect(turn).to_have_attribute("data-connection", "connected")
    await keys.press("Escape")
    await ended(turn, "cancelled")
    await keys.press("Alt+r")
    await expect(turn).to_have_attribute("data-status", "in_progress")
    await keys.press("Escape")
    await ended(turn, "cancelled")
    await expect(turn.get_by_test_id("page")).to_have_text("2 of 2")

    await keys.press("Alt+k")
    await expect(page.locator("#shortcuts-dialog")).to_be_visible()
    await keys.press("Escape")
    await expect(page.locator("#shortcuts-dialog")).to_be_hidden()

    await page.locator("#conversations a").focus()
    await keys.press("Tab")
    await expect(page.locator("#conversations [data-act=rename]")).to_be_focused()
    await keys.press("Enter")
    await keys.type("By hand")
    await keys.press("Enter")
    await expect(page.locator("#conversations .name")).to_have_text("By hand")
    await expect(page.locator("#conversations [data-act=rename]")).to_be_focused()
    await keys.press("Tab")
    await keys.press("Enter")
    await expect(page.locator("#delete-dialog")).to_be_visible()
    await keys.press("Escape")
    await keys.press("Alt+n")
    await expect(page.locator("#welcome")).to_be_visible()
    await expect(page.locator("#prompt")).to_be_focused()


async def test_the_tab_key_goes_from_top_to_bottom(browsing: Browsing) -> None:
    """The first stop skips to the question; then the list, the answer, the dock, in the order they are seen in."""
    page = await browsing.open()
    turn = await ask(page)
    await ended(turn)
    await page.evaluate("document.activeElement.blur(), getSelection().removeAllRanges()")
    await page.evaluate("document.body.tabIndex = -1, document.body.focus(), document.body.removeAttribute('tabindex')")
    stops = []
    for _ in range(40):
        await page.keyboard.press("Tab")
        stops.append(await page.evaluate("document.activeElement.id || document.activeElement.dataset.act || ''"))
        if stops[-1] in ("model", "send"):
            break
    wanted = [
        "skip",
        "home",
        "new",
        "rename",
        "delete",
        "theme",
        "shortcuts",
        "second-tab",
        "thread",
        "copy",
        "drop",
        "prompt",
    ]
    assert [stop for stop in stops if stop in wanted] == wanted


async def test_a_screen_reader_hears_the_finished_answer_and_not_every_word(browsing: Browsing) -> None:
    """One polite region speaks: that the question was sent, and the answer once it is whole."""
    model = browsing.place.model(Script(chunks=["Sixty "] * 60, pace_seconds=0.01))
    page = await browsing.open()
    await page.evaluate("""() => {
      window.spoken = [];
      const region = document.getElementById("announce");
      new MutationObserver(() => spoken.push(region.textContent)).observe(region, { childList: true });
    }""")
    turn = await ask(page, "Speak.", model)
    await expect(turn.locator("article")).to_have_attribute("aria-busy", "true")
    await ended(turn)
    await expect(turn.locator("article")).to_have_attribute("aria-busy", "false")
    assert await page.evaluate("spoken") == ["Sent", "Answer: " + "Sixty " * 60]
    await expect(page.locator("#announce")).to_have_attribute("aria-live", "polite")
    assert await page.locator("#thread [aria-live], #thread [role=log], #thread[aria-live]").count() == 0


async def test_nothing_is_wrong_by_the_rules_of_accessibility(chromium: Browser, place: Place) -> None:
    """axe-core finds nothing, in light and dark: welcome, answer, error, a dialog, a phone, its menu, sources."""
    _, folder = await node_with("axe")
    axe = (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()
    whole = Script(reasoning=["Hm."], chunks=[MARKDOWN])

    async def check(page: Page, state: str) -> None:
        await page.evaluate(axe)
        found = await page.evaluate("axe.run().then((found) => found.violations)")
        places = [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in found]
        assert places == [], state

    for scheme in ("light", "dark"):
        async with profile(chromium, place, color_scheme=scheme, reduced_motion="reduce") as browsing:
            page = await browsing.open()
            await check(page, "welcome")
            turn = await ask(page, "All of it.", place.model(whole))
            await ended(turn)
            await turn.get_by_test_id("reasoning").locator("summary").click()
            await turn.get_by_test_id("facts").click()
            await check(page, "answer")
            await ended(await ask(page, "Fail.", place.model(Script(status=401))), "failed")
            await check(page, "error")
            await page.locator("#shortcuts").click()
            await check(page, "dialog")
            await page.keyboard.press("Escape")
            await page.set_viewport_size(PHONE)
            await check(page, "phone")
            await page.locator("#menu").click()
            await check(page, "menu")
            source = SourceAdded("1", "T", "https://example.org", 0.9, "S")
            page = await browsing.open(f"/#{await place.written(TextDelta('x'), source, Completed('stop'))}")
            await expect(page.get_by_test_id("sources")).to_be_visible()
            await check(page, "sources")
            await page.goto(place.url + "/playground/dialects.html")
            await check(page, "dialects")


async def test_nothing_is_wider_than_a_phone(chromium: Browser, place: Place) -> None:
    """At 390 pixels nothing scrolls sideways: empty, with an endless word, with wide code, an error, the list."""
    wide = (
        "x" * 400
        + "\n\n```\n"
        + "y" * 400
        + "\n```\n\n|"
        + " zzzzzzzzzz |" * 30
        + "\n|"
        + "-|" * 30
        + "\n\n"
        + MARKDOWN
    )
    async with profile(chromium, place, viewport=PHONE, has_touch=True, is_mobile=True) as browsing:
        page = await browsing.open()
        assert await overflow(page) <= 0
        turn = await ask(page, "w" * 400, place.model(Script(chunks=[wide], stall_end=True, reasoning=["r" * 400])))
        await speaking(turn)
        await turn.get_by_test_id("reasoning").locator("summary").click()
        await page.locator("#drop").tap()
        await expect(turn).to_have_attribute("data-connection", "dropped")
        assert await overflow(page) <= 0
        await page.locator("#stop").tap()
        await ended(turn, "cancelled")
        await turn.get_by_test_id("facts").tap()
        assert await overflow(page) <= 0
        failing = place.model(Script(chunks=["x"], error_at=1))
        await ended(await ask(page, "Fail.", failing), "failed")
        assert await overflow(page) <= 0
        assert await page.evaluate("innerWidth") == PHONE["width"]
        await expect(page.locator("#side")).to_be_hidden()
        await page.locator("#menu").tap()
        await expect(page.locator("#side")).to_be_visible()
        assert await overflow(page) <= 0
        await page.locator("#new").tap()
        await expect(page.locator("#side")).to_be_hidden()
        await expect(page.locator("#welcome")).to_be_visible()


async def test_nothing_moves_by_itself_for_those_who_do_not_want_it(chromium: Browser, place: Place) -> None:
    """With `prefers-reduced-motion` no animation and no transition runs, not even while an answer is written."""
    running = "document.getAnimations().length"
    model = place.model(Script(count=20, stall_at=10))
    async with profile(chromium, place, reduced_motion="reduce") as browsing:
        page = await browsing.open()
        turn = await ask(page, "Still.", model)
        await speaking(turn)
        assert await page.evaluate(running) == 0
        await page.emulate_media(reduced_motion="no-preference")
        assert await page.evaluate(running) > 0
        place.upstream.release(model)
        await ended(turn)


# ---- the policy, and the other page ----


async def test_the_policy_forbids_everything_foreign(browsing: Browsing) -> None:
    """The page is served with a policy without exceptions, under which inline script and style do not run."""
    page = await browsing.context.new_page()
    response = await page.goto(browsing.place.url)
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
    browsing.forgive("script-src")


async def test_every_file_of_the_page_is_served_and_no_other(place: Place) -> None:
    """What the page imports is there, under the policy; a file beside it is not."""
    folder = Path(__file__).parents[2] / "api" / "playground"
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=place.url, trust_env=False))
        for path in folder.iterdir():
            if path.suffix in (".js", ".css", ".svg") or path.name == "dialects.html":
                answer = await http.get(f"/playground/{path.name}")
                assert (answer.status_code, answer.content) == (200, path.read_bytes()), path.name
                assert "default-src 'none'" in answer.headers["content-security-policy"]
        for name in ("__init__.py", "index.html", "..%2fapp.py"):
            assert (await http.get(f"/playground/{name}")).status_code == 404


async def test_every_dialect_side_by_side(browsing: Browsing) -> None:
    """One running log, five protocols: each column shows its own frames as they come, to the end, and no markup."""
    page = await browsing.open()
    turn = await ask(page, "Say <b>it</b> in every protocol.")
    await ended(turn)
    await turn.get_by_test_id("facts").click()
    async with browsing.context.expect_page() as opening:
        await turn.get_by_test_id("dialects").click()
    dialects = await opening.value
    for name in ("native", "text", "chat_completions", "responses", "ui_messages"):
        await expect(dialects.get_by_test_id(f"dialect-{name}")).to_have_attribute("data-state", "ended")
    text = (await browsing.snapshot(await id_of(turn)))["text"]
    assert await dialects.get_by_test_id("dialect-text").locator("pre").text_content() == text
    raw = {name: await dialects.get_by_test_id(f"dialect-{name}").locator("pre").text_content() for name in MARKS}
    for name, mark in MARKS.items():
        assert mark in (raw[name] or ""), name
    assert await dialects.locator("#columns b").count() == 0
    await dialects.set_viewport_size(PHONE)
    assert await dialects.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await dialects.locator("#back").click()
    await expect(dialects.locator(".turn")).to_have_count(1)
