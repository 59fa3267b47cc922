"""The network between the processes and Redis: packets that go nowhere, replies that are lost after the deed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator

import pytest

from shared import lua
from tests.chaos.looks import stands_still
from tests.processes import Valkey
from tests.proxy import Proxy
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream, frame
from tests.waiting import wait_until

PADDING = "x" * 100_000


@pytest.fixture
async def proxy(server: Valkey) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as one:
        yield one


def through(proxy: Proxy) -> dict[str, str]:
    return {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"}


def swallow(proxy: Proxy) -> None:
    """From now on nothing gets through, nothing breaks, and new connections are taken and never answered."""
    proxy.freeze()
    proxy.black_hole = True


def restore(proxy: Proxy) -> None:
    """The network is back. What was held up arrives now, late; connections that were answered by nobody break."""
    proxy.black_hole = False
    proxy.thaw()


async def test_a_worker_that_is_cut_off_stops_reading_and_is_fenced_when_it_is_back(
    stack: Stack, upstream: Upstream, proxy: Proxy
) -> None:
    """Another worker goes on after a lease; the one cut off holds its upstream, and its late words are refused."""
    words = [f"word{n} " for n in range(60)]
    padded = [frame(choices=[{"index": 0, "delta": {"content": "x "}}], padding=PADDING) for _ in range(5000)]
    upstream.script("cut-off", Script(chunks=padded, pace_seconds=0.01), Script(chunks=words))
    lease = {"REJOIN_LEASE_SECONDS": "1"}
    await stack.api(**lease)
    await stack.worker(**through(proxy), **lease)
    generation = await stack.create("cut-off")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 20)
    await stack.worker(**lease)
    swallow(proxy)
    cut_off_at = time.monotonic()
    (request,) = upstream.requests_of("cut-off")
    await stack.attempt(generation, 2)
    stands_still_at = await stands_still(request)
    assert request.closed_at is None, "it may be the only one with an answer: it is held, not closed"
    print("STILL", stands_still_at - cut_off_at)
    assert stands_still_at - cut_off_at < 10
    await asyncio.wait_for(reading, 30)
    restore(proxy)
    r = time.monotonic()
    await stack.workers[0].says("generation.lost.*FENCED", timeout=30)
    print("FENCED", time.monotonic() - r)
    await wait_until(lambda: request.closed_at is not None)
    assert request.left_early
    check_history(reader.blocks)
    assert reader.text == "".join(words)
    again = await stack.reader(generation).read_to_end()
    assert again.text == "".join(words)
    assert (await stack.snapshot(generation))["attempt"] == 2 and stack.workers[0].running


async def test_an_api_that_is_cut_off_notices_and_its_readers_lose_nothing(
    stack: Stack, upstream: Upstream, proxy: Proxy
) -> None:
    """The tail gives its silent connection up in seconds; when Redis is back, open streams go on where they were."""
    script = Script(count=200, pace_seconds=0.04)
    upstream.script("deaf", script)
    api = await stack.api(**through(proxy))
    await stack.worker()
    generation = await stack.create("deaf")
    readers = [stack.reader(generation) for _ in range(20)]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 10 for reader in readers))
    swallow(proxy)
    cut_off_at = time.monotonic()
    posting = asyncio.create_task(stack.http.post(api.url + "/v1/generations", json={"prompt": "x"}))
    await api.process.says("tail.redis_away")
    assert time.monotonic() - cut_off_at < 6, "3 s, and room for a slow machine"
    answer = await posting
    assert answer.status_code == 503 and answer.json()["code"] == "store_unavailable"
    restore(proxy)
    await asyncio.gather(*reading)
    for reader in readers:
        check_history(reader.blocks)
        assert reader.text == script.text("hello") and len(reader.responses) == 1
    assert (await stack.snapshot(generation))["attempt"] == 1


def asks_for(script_name: str) -> bytes:
    """What stands in a request that runs a script."""
    return hashlib.sha1(lua.source(script_name).encode()).hexdigest().encode()


@pytest.fixture
async def unanswered(stack: Stack, proxy: Proxy) -> Stack:
    """A house behind the proxy that has run each script once, and is saved by no second hint."""
    env = {**through(proxy), "REJOIN_CLAIM_GRACE_SECONDS": "60"}
    await stack.api(**env)
    await stack.worker(**env)
    await stack.finished(await stack.create("warm-up"))
    return stack


@pytest.mark.parametrize("script_name", ["create", "announce", "take", "claim"])
async def test_a_lost_reply_changes_nothing(
    unanswered: Stack, upstream: Upstream, proxy: Proxy, script_name: str
) -> None:
    """Redis did what it was asked and the answer never came: sent again, it is one order, listed once, one attempt."""
    model, script = f"unanswered-{script_name}", Script(count=20)
    upstream.script(model, script)
    proxy.drop_replies(1, to=asks_for(script_name))
    generation = await unanswered.create(model)
    reader = await unanswered.reader(generation).read_to_end(timeout=30)
    assert proxy.dropped == 1
    assert reader.text == script.text("hello")
    assert (await unanswered.snapshot(generation))["attempt"] == 1
    assert upstream.hits(model) == 1
    listed = (await unanswered.http.get(unanswered.apis[0].url + "/v1/generations")).json()["data"]
    assert [one["id"] for one in listed].count(generation["id"]) == 1


async def test_a_lost_reply_to_an_append_doubles_no_word(unanswered: Stack, upstream: Upstream, proxy: Proxy) -> None:
    """Ten appends in one answer, and the one with its end, are applied and never acknowledged."""
    script = Script(count=80, pace_seconds=0.02)
    upstream.script("unanswered", script)
    generation = await unanswered.create("unanswered")
    reader = unanswered.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 5)
    for n in range(1, 11):
        proxy.drop_replies(1, to=asks_for("append"))
        await wait_until(lambda n=n: proxy.dropped == n)
    proxy.drop_replies(1, to=b"generation.completed")
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello")
    await unanswered.workers[0].says(f"generation.completed.*{generation['id']}")
    assert proxy.dropped == 11 and "generation.lost" not in unanswered.workers[0].log()
    assert (await unanswered.snapshot(generation))["attempt"] == 1
