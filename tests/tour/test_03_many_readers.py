"""Chapter 3: many readers.

A log may be read by any number of readers at once, on any api, each at a place of its own. The model is asked once.
A late reader hears the story from its start; a slow one holds up nobody.
"""

from __future__ import annotations

import asyncio

from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

MODEL = "tour-many"


async def test_twenty_readers_on_two_apis_see_the_same_bytes(house: Stack, upstream: Upstream) -> None:
    """All of them get the same stream, of one call to the model."""
    script = Script(count=50, pace_seconds=0.01)
    upstream.script(MODEL, script)
    asked_before = upstream.hits(MODEL)
    generation = await house.create(MODEL)
    readers = [house.reader(generation, house.apis[n % 2]) for n in range(20)]
    await asyncio.gather(*(reader.read_to_end() for reader in readers))
    assert {reader.raw for reader in readers} == {readers[0].raw}
    assert readers[0].text == script.text("hello")
    assert upstream.hits(MODEL) == asked_before + 1


async def test_a_late_reader_gets_the_beginning_and_a_snapshot_reader_the_state(
    house: Stack, upstream: Upstream
) -> None:
    """Who joins in the middle may have it all from the start, or the state so far and then what follows it."""
    script = Script(count=150, pace_seconds=0.02)
    upstream.script(MODEL, script)
    generation = await house.create(MODEL)
    early = house.reader(generation)
    reading = asyncio.create_task(early.read_to_end())
    await wait_until(lambda: len(early.blocks) > 20)

    late, informed = house.reader(generation), house.reader(generation, query="&snapshot=true")
    await asyncio.gather(reading, late.read_to_end(), informed.read_to_end())

    assert late.raw == early.raw
    snapshot = informed.blocks[0]
    assert snapshot.event == "snapshot" and snapshot.data["text"] != ""
    assert snapshot.data["text"] + informed.text == script.text("hello")
