"""Leave and rejoin: at every event id, at every byte, on any api, prefix and rest are the uninterrupted stream."""

from __future__ import annotations

import asyncio
import random

from tests.proxy import Proxy
from tests.reader import Reader, check_history
from tests.stack import Stack, gather_bounded
from tests.upstream import Script, Upstream


async def _finished(house: Stack, upstream: Upstream, model: str, script: Script) -> tuple[dict, Reader]:
    upstream.script(model, script)
    generation = await house.create(model)
    full = await house.reader(generation).read_to_end()
    assert full.text == script.text("hello")
    return generation, full


async def test_resume_at_every_cursor_of_a_finished_generation_gives_the_exact_tail(
    house: Stack, upstream: Upstream
) -> None:
    """At every id of a finished log, a rejoining reader gets exactly the bytes it has not seen."""
    generation, full = await _finished(house, upstream, "finished", Script(count=60))
    fresh = next(i for i, block in enumerate(full.blocks) if block.event == "generation.started")

    async def resume(n: int) -> None:
        reader = house.reader(generation, house.apis[n % 2])
        reader.blocks = full.blocks[: n + 1]
        response = await reader.connect()
        if n == len(full.blocks) - 1:
            assert response.status == 204
        else:
            assert response.headers["rejoin-resumed-from"] == (
                full.blocks[n].id if n >= fresh else f"{full.blocks[fresh].id}"
            )
            assert response.clean
        assert reader.raw == full.raw

    await gather_bounded(16, *(resume(n) for n in range(len(full.blocks))))


async def test_resume_at_every_cursor_of_a_running_generation_gives_the_exact_stream(
    house: Stack, upstream: Upstream
) -> None:
    """Readers that leave after 1, 2, 3, … events of a running log and rejoin have the same bytes in the end."""
    script = Script(count=80, pace_seconds=0.02)
    upstream.script("running", script)
    generation = await house.create("running")

    async def leave_and_rejoin(n: int) -> Reader:
        reader = house.reader(generation, house.apis[n % 2])
        await reader.connect(stop_after=n)
        await reader.connect(stop_after=3, url=house.apis[(n + 1) % 2].url + generation["events_url"])
        return await reader.read_to_end()

    full, *readers = await asyncio.gather(
        house.reader(generation).read_to_end(), *(leave_and_rejoin(n) for n in range(1, 81))
    )
    assert full.text == script.text("hello")
    check_history(full.blocks)
    for reader in readers:
        assert reader.raw == full.raw


async def test_a_connection_cut_at_any_byte_loses_and_doubles_nothing(house: Stack, upstream: Upstream) -> None:
    """A proxy cuts 200 connections at random bytes, inside characters and frames: prefix and rest are the stream."""
    generation, full = await _finished(house, upstream, "cut", Script(count=120))
    size = len(full.responses[0].body) + 400  # the headers are bytes too
    chance = random.Random(20)

    async def cut_and_rejoin(at: int) -> None:
        async with Proxy(house.apis[0].port, cut_after=at) as proxy:
            reader = house.reader(generation)
            await reader.connect(url=f"http://127.0.0.1:{proxy.port}{generation['events_url']}")
            await reader.read_to_end()
            assert reader.raw == full.raw, f"cut at {at}"

    await gather_bounded(16, *(cut_and_rejoin(chance.randrange(1, size)) for _ in range(200)))


async def test_a_running_stream_cut_again_and_again_is_whole(house: Stack, upstream: Upstream) -> None:
    """A reader whose every connection breaks after a few hundred bytes still gets each position once."""
    script = Script(count=100, pace_seconds=0.01)
    upstream.script("choppy", script)
    generation = await house.create("choppy")
    chance = random.Random(7)
    async with Proxy(house.apis[0].port) as proxy:
        reader = house.reader(generation)
        async with asyncio.timeout(60):
            while reader.terminal is None:
                proxy.cut_after = chance.randrange(400, 1500)
                await reader.connect(url=f"http://127.0.0.1:{proxy.port}{generation['events_url']}")
        assert proxy.cuts > 5
    full = await house.reader(generation).read_to_end()
    assert reader.raw == full.raw
    assert reader.text == script.text("hello")


async def test_snapshot_then_deltas_is_the_whole_text(house: Stack, upstream: Upstream) -> None:
    """`?snapshot=true` gives the state so far in one event, then only what follows it."""
    script = Script(count=60, pace_seconds=0.02)
    upstream.script("snapshot", script)
    generation = await house.create("snapshot")
    await house.reader(generation).connect(stop_after=20)
    reader = await house.reader(generation, query="&snapshot=true").read_to_end()
    first = reader.blocks[0]
    assert first.event == "snapshot" and first.id == first.data["last_event_id"]
    assert len(first.data["text"]) > 0
    assert first.data["text"] + reader.text == script.text("hello")


async def test_text_is_the_words_alone_from_the_start(house: Stack, upstream: Upstream) -> None:
    """The text route streams the words as they come, and the whole of them to a late reader."""
    script = Script(count=40, pace_seconds=0.005)
    upstream.script("plain", script)
    generation = await house.create("plain")
    url = f"{house.apis[0].url}/v1/generations/{generation['id']}/text"
    for _ in range(2):
        answer = await house.http.get(url)
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.text == script.text("hello")


async def test_snapshot_of_an_ended_generation_is_all_there_is(house: Stack, upstream: Upstream) -> None:
    """A page that opens after the end gets the whole state in one event, and 204 when its EventSource comes back."""
    generation, full = await _finished(house, upstream, "late-snapshot", Script(count=10))
    reader = house.reader(generation, query="&snapshot=true")
    first = await reader.connect()
    assert first.status == 200 and first.clean
    assert [block.event for block in reader.blocks] == ["snapshot"]
    assert reader.blocks[0].data["text"] == full.text and reader.blocks[0].data["status"] == "completed"
    assert (await reader.connect()).status == 204
