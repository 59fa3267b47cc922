"""The programs in the pages about clients, run as they stand against a running `rejoin up`; only its port differs.

A fence of one of the LANGUAGES is a program and is run, whichever block it is; ```text shows something that is not.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from playwright.async_api import async_playwright, expect

from tests.conformance.environments import HERE, node_with, python_with, run
from tests.conformance.test_ai_sdk import HERE as AI_SDK
from tests.conformance.test_ai_sdk import installed
from tests.conftest import RejoinUp, start_rejoin_up
from tests.e2e.test_playground import BROWSERS, QUIET
from tests.processes import ROOT, Processes

PAGES = [ROOT / "docs/clients.md", *sorted((ROOT / "docs/clients").glob("*.md"))]
LANGUAGES = {"python", "js", "jsx", "sh"}
NOT_PROGRAMS = {"text", "json"}
SHOWN_URL = "http://127.0.0.1:8000"
CLIENTS = {"python", "node", "curl", "langchain", "llama-index", "ai-sdk", "react", "browser"}
PYTHONS = {"langchain_openai": "langchain", "llama_index": "llama-index"}
PAGE = '<!doctype html><meta charset="utf-8"><p id="answer"></p><script type="module">\n{}\n</script>'


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.client}-line-{self.line}"

    @property
    def client(self) -> str:
        """Which client it is a program of, by what it imports."""
        if self.language == "python":
            return next((name for module, name in PYTHONS.items() if module in self.code), "python")
        if self.language == "js":
            if "document." in self.code:
                return "browser"
            return "ai-sdk" if 'from "ai"' in self.code else "node"
        return {"jsx": "react", "sh": "curl"}.get(self.language, self.language)

    @property
    def prompt(self) -> str:
        """The question that it asks."""
        found = re.search(r"Tell me [^\"]+\.", self.code)
        assert found is not None, f"{self} asks nothing that this test knows"
        return found[0]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"(?ms)^ *```(\S*)[^\n]*\n(.*?)^ *```$", text)
    return [Block(page, text[: one.start()].count("\n") + 1, one[1], one[2]) for one in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PROGRAMS = [block for block in BLOCKS if block.language not in NOT_PROGRAMS | {"jsx"}]
COMPONENTS = [page for page in PAGES if any(block.language == "jsx" for block in blocks_of(page))]


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RejoinUp]:
    """A `rejoin up` as the pages' reader has it, but in more of a hurry."""
    processes = Processes(tmp_path_factory.mktemp("docs-log"))
    try:
        yield await start_rejoin_up(processes, tmp_path_factory.mktemp("docs-up"), REJOIN_DEMO_WORDS_PER_SECOND="150")
    finally:
        processes.end_all()


async def answer_to(up: RejoinUp, prompt: str) -> str:
    """What the demo model says to a prompt, from the native API."""
    async with httpx2.AsyncClient(base_url=up.url, timeout=60, trust_env=False) as http:
        order = await http.post("/v1/generations", json={"prompt": prompt, "model": "demo"})
        text = (await http.get(f"/v1/generations/{order.json()['id']}/text")).text
    assert len(text) > 300
    return text


def words_in(said: str) -> str:
    """The text deltas of all streams in an output, whichever protocol's."""
    words = []
    for line in re.findall(r"(?m)^data: (\{.*\})$", said):
        data = json.loads(line)
        kind = data.get("type", "")
        if kind in ("response.output_text.delta", "text-delta"):
            words.append(data["delta"])
        elif kind == "text.delta":
            words.append(data["text"])
        elif "choices" in data:
            words += [choice["delta"].get("content") or "" for choice in data["choices"]]
    return "".join(words)


def beside_the_sdk(folder: Path) -> None:
    """Put the programs for the docs' AI SDK blocks where Node finds the packages of `ai` 7."""
    for script in AI_SDK.glob("doc_*.mjs"):
        shutil.copy(script, folder)
    (folder / "node_modules").symlink_to(AI_SDK / "v7/node_modules")


async def in_the_browser(code: str, up: RejoinUp, expected: str) -> None:
    """Run a block as the script of a page of the api's own origin, until its #answer is the expected one."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"NOT TESTED in a browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    complaints: list[str] = []
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=binary, args=QUIET) as browser,
        await browser.new_context() as context,
    ):
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        page = await context.new_page()
        address = up.url.rstrip("/") + "/page-of-the-docs"
        await page.route(address, lambda route: route.fulfill(body=PAGE.format(code), content_type="text/html"))
        await page.goto(address)
        await expect(page.locator("#answer")).to_have_text(expected, timeout=60_000)
    assert complaints == []


def test_every_block_is_run_or_says_that_it_is_none() -> None:
    """A fence of another language is an error, and so is a client without a program."""
    assert {block.language for block in BLOCKS} <= LANGUAGES | NOT_PROGRAMS
    assert {block.client for block in BLOCKS if block.language in LANGUAGES} == CLIENTS
    for page in PAGES:
        assert len(re.findall(r"(?m)^\s*(?:```|~~~)", page.read_text())) == 2 * len(blocks_of(page)), page


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", PROGRAMS, ids=str)
async def test_a_program_of_the_docs_says_the_answer(block: Block, up: RejoinUp, tmp_path: Path) -> None:
    """It exits with 0, and the whole answer is in what it printed."""
    code = block.code.replace(SHOWN_URL, up.url.rstrip("/"))
    prompt = "Tell me about rivers." if block.client == "ai-sdk" else block.prompt
    expected = await answer_to(up, prompt)
    match block.client:
        case "browser":
            return await in_the_browser(code, up, expected)
        case "ai-sdk":
            node = installed(7)
            beside_the_sdk(tmp_path)
            (tmp_path / "block.mjs").write_text(code)
            argv = [node, tmp_path / "doc_transport.mjs", up.url, prompt]
        case "node":
            node, folder = await node_with("openai_node")
            (tmp_path / "node_modules").symlink_to(folder / "node_modules")
            (tmp_path / "block.mjs").write_text(code)
            argv = [node, tmp_path / "block.mjs"]
        case "curl":
            if shutil.which("curl") is None:
                pytest.skip("NOT TESTED with curl: apt-get install curl")
            argv = ["sh", "-eu", "-c", code]
        case client:
            python = sys.executable if client == "python" else await python_with(client)
            (tmp_path / "block.py").write_text(code)
            argv = [python, tmp_path / "block.py"]
    status, said = await run(*argv, cwd=tmp_path, timeout=90, LANGSMITH_TRACING="false", PYTHONUTF8="1")
    assert status == 0, said[-6000:]
    if block.client == "ai-sdk":
        result = json.loads(said)
        assert result["errors"] == [None, None]
        ended = expected if "ended=true" in code else ""  # without it there is nothing to resume any more
        assert result["answers"] == [expected, ended]
    else:
        assert expected in said or expected in words_in(said), said[-6000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", COMPONENTS, ids=lambda page: page.stem)
async def test_the_react_components_of_a_page_chat_and_stop(page: Path, up: RejoinUp, tmp_path: Path) -> None:
    """A page's jsx blocks, as one module: the form asks and shows the answer, the button ends the model's work."""
    node = installed(7)
    beside_the_sdk(tmp_path)
    code = "\n".join(block.code for block in blocks_of(page) if block.language == "jsx")
    assert set(re.findall(r"\bfunction ([A-Z]\w*)", code)) == {"Chat", "Stop"}, "doc_react.mjs knows no other"
    (tmp_path / "block.jsx").write_text(code + "\nexport { Stop, transport };\n")
    _, folder = await node_with("jsx_node")
    compiled = await run(node, folder / "compile.mjs", tmp_path / "block.jsx", tmp_path / "block.mjs", cwd=HERE)
    assert compiled == (0, "")
    prompt = "Tell me about rivers."
    expected = await answer_to(up, prompt)
    status, said = await run(node, tmp_path / "doc_react.mjs", up.url, prompt, cwd=tmp_path, timeout=90)
    assert status == 0, said[-6000:]
    result = json.loads(said)
    assert result["shown"] == [prompt, expected]
    async with httpx2.AsyncClient(base_url=up.url, timeout=60, trust_env=False) as http:
        stopped = (await http.get(f"/v1/generations/{result['stopped']}")).json()
    assert stopped["status"] == "cancelled" and expected.startswith(stopped["text"])
