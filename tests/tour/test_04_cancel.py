"""Chapter 4: cancel.

A caller may stop a generation at any moment, through any api. The log is closed there and then, its readers are told,
and the connection to the model is closed, so that nothing more is paid for. What was said stays. A caller may also say
beforehand that a generation is to end when nobody reads it any more.
"""

from __future__ import annotations

import asyncio

from tests.stack import Stack
from tests.upstream import Script, Upstream

MODEL = "tour-cancel"
ENDLESS = Script(count=5000, pace_seconds=0.01)


async def test_a_cancel_ends_the_stream_and_the_call_to_the_model(house: Stack, upstream: Upstream) -> None:
    """Readers get `generation.cancelled`, the model's server sees its socket closed, and the text so far is kept."""
    upstream.script(MODEL, ENDLESS)
    generation = await house.create(MODEL)
    reader = house.reader(generation)
    await reader.connect(stop_after=10)
    reading = asyncio.create_task(reader.read_to_end())

    final = await house.cancel(generation, house.apis[1])
    await asyncio.gather(reading, upstream.wait_closed(MODEL))

    assert final["status"] == "cancelled"
    assert reader.terminal is not None and reader.terminal.data["by"] == "caller"
    assert final["text"] == reader.text != ""


async def test_a_cancel_that_comes_too_late_changes_nothing(house: Stack, upstream: Upstream) -> None:
    """There is one terminal event, and the first one stands."""
    upstream.script(MODEL, Script(count=5))
    generation = await house.create(MODEL)
    before = await house.finished(generation)
    after = await house.cancel(generation)
    assert after["status"] == "completed"
    assert after["last_event_id"] == before["last_event_id"]


async def test_a_generation_may_end_with_its_last_reader(stack: Stack, upstream: Upstream) -> None:
    """`on_disconnect: cancel`: when the grace time has passed without a reader, the log is closed."""
    upstream.script(MODEL, ENDLESS)
    grace = {"REJOIN_DISCONNECT_GRACE_SECONDS": "1.5"}
    await stack.api(**grace)
    await stack.worker(**grace)
    generation = await stack.create(MODEL, on_disconnect="cancel")
    await stack.reader(generation).connect(stop_after=10)

    reader = stack.reader(generation)
    assert (await stack.finished(generation))["status"] == "cancelled"
    await reader.read_to_end()
    assert reader.terminal is not None and reader.terminal.data["by"] == "disconnect"
    await upstream.wait_closed(MODEL)
