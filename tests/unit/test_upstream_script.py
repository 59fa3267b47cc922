"""The scripted upstream itself, spoken to over a bare socket: the other suites stand on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.upstream import Script, Upstream, words
from tests.waiting import wait_until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def asked(upstream: Upstream, model: str, text: str = "hi") -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(upstream.host, upstream.port)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    try:
        yield reader, writer
    finally:
        writer.close()


def contents(raw: bytes) -> str:
    """The text in the frames, which the server never cuts over two HTTP chunks."""
    frames = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])


async def test_the_default_script_says_words_that_can_be_foretold() -> None:
    """A test can compute the text an upstream is going to send."""
    async with Upstream() as upstream, asked(upstream, "any", "a question") as (reader, _):
        raw = await reader.read()
        assert contents(raw) == "".join(words(20, "a question")) == Script().text("a question")
        assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await upstream.wait_closed("any")
        (request,) = upstream.requests
        assert (request.chunks_sent, request.left_early, upstream.hits("any")) == (20, False, 1)


def test_words_are_the_same_for_the_same_seed_and_odd_enough() -> None:
    """The words differ by seed only, and among many are all that breaks careless code."""
    text = "".join(words(1000, 1))
    assert words(1000, 1) == words(1000, 1) != words(1000, 2)
    assert all(oddity in text for oddity in ("👋", "é", "日", "\u2028", '"', "\n\n", "\r\n", "\x00"))


@pytest.mark.parametrize(
    "script",
    [Script(stall_headers=True), Script(stall_at=1), Script(pace_seconds=60), Script(count=100_000)],
    ids=["no headers", "stalled", "pacing", "writing"],
)
async def test_a_client_that_leaves_is_noticed_at_once(script: Script) -> None:
    """Whatever the script is at, the client's close ends it within milliseconds."""
    async with Upstream() as upstream:
        upstream.script("m", script)
        async with asked(upstream, "m"):
            await upstream.wait_hits("m")
            left_at = asyncio.get_running_loop().time()
        await upstream.wait_closed("m", timeout=1)
        (request,) = upstream.requests
        assert request.left_early and request.closed_at and request.closed_at - left_at < 0.1
        await wait_until(lambda: upstream.open_sockets == 0)


async def test_a_stalled_answer_goes_on_when_released() -> None:
    """A test decides when the silence ends."""
    async with Upstream() as upstream:
        upstream.script("m", Script(stall_at=5))
        async with asked(upstream, "m") as (reader, _):
            await upstream.wait_sent("m", 5)
            assert upstream.open_requests("m") == 1
            upstream.release("m")
            assert contents(await reader.read()) == Script().text("hi")


async def test_each_hit_has_its_script() -> None:
    """The first requests can be refused, and each one can be answered otherwise."""
    async with Upstream() as upstream:
        upstream.script("a", Script(status=503, fail_first=1))
        upstream.script("b", Script(chunks=["one"]), Script(chunks=["two"]))
        answers = []
        for model in ("a", "a", "b", "b", "b"):
            async with asked(upstream, model) as (reader, _):
                answers.append(await reader.read())
        assert answers[0].startswith(b"HTTP/1.1 503") and answers[1].startswith(b"HTTP/1.1 200")
        assert [contents(raw) for raw in answers[2:]] == ["one", "two", "two"]


async def test_a_cut_comes_at_its_byte() -> None:
    """The body ends exactly where the script says, and is not called complete."""
    async with Upstream() as upstream:
        upstream.script("m", Script(cut_at_byte=10, cut="close"))
        async with asked(upstream, "m") as (reader, _):
            assert (await reader.read()).endswith(b'\r\n\r\na\r\ndata: {"id\r\n')


async def test_a_reset_is_a_reset() -> None:
    """The client's read fails instead of ending."""
    async with Upstream() as upstream:
        upstream.script("m", Script(cut_at=1))
        async with asked(upstream, "m") as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read()
