"""A worker dies amid an answer and its upstream can go on from a beginning: no client, in any dialect, sees a seam."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Process
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from worker.providers.demo import answer

QUESTION = "Tell me a long story"
BEGUN = Script(count=400, pace_seconds=0.05)  # of the attempt that is lost
REST = Script(count=400)
MODELS = """
[vllm]
continuation = "continue_final_message"
[deepseek]
continuation = "prefix"
[mistral]
continuation = "prefix"
repeats_prefix = true
[plain]
"""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "models.toml"
    path.write_text(MODELS)
    return {"REJOIN_MODELS": str(path), "REJOIN_LEASE_SECONDS": "1", "REJOIN_DEMO_WORDS_PER_SECOND": "30"}


async def _lose_the_worker(stack: Stack, victim: Process, models: dict[str, str]) -> None:
    await stack.worker(**models)
    await victim.kill()


@pytest.mark.parametrize("model", ["vllm", "deepseek", "mistral", "demo"])
async def test_the_second_attempt_goes_on_where_the_first_was_lost(
    stack: Stack, upstream: Upstream, models: dict[str, str], model: str
) -> None:
    """One log, two attempts, the second `continued`: every token once, none paid for or shown twice."""
    upstream.script(model, BEGUN, Script(count=400, repeats_prefix=model == "mistral"))
    hits = upstream.hits(model)
    await stack.api(**models)
    victim = await stack.worker(**models)
    generation = await stack.create(model, QUESTION)
    reader = stack.reader(generation)
    await reader.connect(stop_after=20)
    reading = asyncio.create_task(reader.read_to_end())
    await _lose_the_worker(stack, victim, models)
    await reading
    check_history(reader.blocks)
    starts = [block.data for block in reader.blocks if block.event == "generation.started"]
    assert [start["mode"] for start in starts] == ["fresh", "continued"]
    expected = answer(QUESTION) if model == "demo" else REST.text(QUESTION)
    assert reader.text == expected
    state = await stack.snapshot(generation)
    assert (state["status"], state["attempt"], state["text"]) == ("completed", 2, expected)
    late = await stack.reader(generation).read_to_end()
    assert late.raw == reader.raw, "who comes late sees the same"
    if model != "demo":
        assert upstream.hits(model) - hits == 2
        begun = upstream.requests_of(model)[-1].body["messages"][-1]["content"]
        assert begun and REST.text(QUESTION).startswith(begun)


async def test_without_a_way_to_go_on_the_second_attempt_starts_afresh(
    stack: Stack, upstream: Upstream, models: dict[str, str]
) -> None:
    """A route that says nothing of continuation is not asked for it."""
    upstream.script("plain", BEGUN, REST)
    await stack.api(**models)
    victim = await stack.worker(**models)
    generation = await stack.create("plain", QUESTION)
    reader = stack.reader(generation)
    await reader.connect(stop_after=20)
    await _lose_the_worker(stack, victim, models)
    await reader.read_to_end()
    assert [b.data["mode"] for b in reader.blocks if b.event == "generation.started"] == ["fresh", "fresh"]
    assert reader.text == REST.text(QUESTION)


DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat_completions": (
        "/v1/chat/completions",
        {"stream": True, "messages": [{"role": "user", "content": QUESTION}]},
    ),
    "responses": ("/v1/responses", {"stream": True, "input": QUESTION}),
    "ui_messages": (
        "/api/chat",
        {"id": "c1", "messages": [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": QUESTION}]}]},
    ),
}


def _text(dialect: str, event: dict[str, Any]) -> str:
    match dialect:
        case "chat_completions":
            assert "error" not in event, event
            return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        case "responses":
            assert event["type"] not in ("error", "response.failed"), event
            return event["delta"] if event["type"] == "response.output_text.delta" else ""
        case _:
            assert event["type"] != "error", event
            return event["delta"] if event["type"] == "text-delta" else ""


async def _events(body: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The data of each event. Lines end with LF and with nothing else: a U+2028 is text."""
    pending = b""
    async for piece in body:
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_no_dialect_shows_a_seam(stack: Stack, upstream: Upstream, models: dict[str, str], dialect: str) -> None:
    """One connection from the first token to the last, over two workers: the whole text, one beginning, no error."""
    upstream.script("vllm", BEGUN, REST)
    api = await stack.api(**models)
    victim = await stack.worker(**models)
    path, body = DIALECTS[dialect]
    text, losing, numbers, kinds = "", None, [], []
    async with stack.http.stream("POST", api.url + path, json={"model": "vllm", **body}) as response:
        assert response.status_code == 200
        async for event in _events(response.aiter_bytes()):
            text += _text(dialect, event)
            numbers.append(event.get("sequence_number", len(numbers)))
            kinds.append(event.get("type"))
            if text and losing is None:
                losing = asyncio.create_task(_lose_the_worker(stack, victim, models))
    assert losing is not None
    await losing
    assert text == REST.text(QUESTION)
    assert numbers == list(range(len(numbers))), "numbers go on without a gap"
    for once in ("response.created", "start", "response.output_item.added", "text-start"):
        assert kinds.count(once) <= 1


async def test_plain_text_shows_no_seam(stack: Stack, upstream: Upstream, models: dict[str, str]) -> None:
    """`curl` on the text route gets the answer in one piece."""
    upstream.script("vllm", BEGUN, REST)
    api = await stack.api(**models)
    victim = await stack.worker(**models)
    generation = await stack.create("vllm", QUESTION)
    text, losing = "", None
    async with stack.http.stream("GET", f"{api.url}/v1/generations/{generation['id']}/text") as response:
        async for piece in response.aiter_text():
            text += piece
            if losing is None:
                losing = asyncio.create_task(_lose_the_worker(stack, victim, models))
    assert losing is not None
    await losing
    assert text == REST.text(QUESTION)
