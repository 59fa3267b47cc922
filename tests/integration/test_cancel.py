"""A stop really stops the bill: at every moment of a generation, and nothing that was said is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.reader import Reader
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

CLOSED_WITHIN_SECONDS = 0.5


async def _cancel_and_time(house: Stack, upstream: Upstream, model: str, generation: dict) -> float:
    started = time.monotonic()
    state = await house.cancel(generation)
    assert state["status"] == "cancelled"
    await upstream.wait_closed(model)
    return time.monotonic() - started


async def test_cancel_before_pickup_never_calls_the_upstream(stack: Stack, upstream: Upstream) -> None:
    """A generation cancelled in the queue is never run, also when a worker comes later."""
    upstream.script("unpicked", Script())
    await stack.api()
    generation = await stack.create("unpicked")
    assert (await stack.cancel(generation))["status"] == "cancelled"
    await stack.worker()
    other = await stack.create("other")
    await stack.finished(other)  # the queue was served, past the cancelled one
    assert upstream.hits("unpicked") == 0
    state = await stack.snapshot(generation)
    assert (state["status"], state["attempt"], state["text"]) == ("cancelled", 0, "")


@pytest.mark.parametrize(
    ("moment", "script"),
    [
        ("before the first token", Script(first_delay_seconds=30)),
        ("before the headers", Script(stall_headers=True)),
        ("mid-stream", Script(count=2000, pace_seconds=0.01)),
        ("during silence", Script(count=20, stall_at=5)),
    ],
)
async def test_cancel_closes_the_upstream_at_once(
    house: Stack, upstream: Upstream, moment: str, script: Script
) -> None:
    """Within 500 ms the upstream sees its socket closed; what was said so far stays."""
    model = moment.replace(" ", "-")
    upstream.script(model, script)
    generation = await house.create(model)
    await upstream.wait_hits(model, 1)
    reader = house.reader(generation)
    words = 0 if moment.startswith("before") else 4
    await reader.connect(stop_after=2 + words)
    reading = asyncio.create_task(reader.read_to_end())
    assert await _cancel_and_time(house, upstream, model, generation) < CLOSED_WITHIN_SECONDS
    await reading
    assert reader.terminal is not None and reader.terminal.event == "generation.cancelled"
    state = await house.snapshot(generation)
    assert state["text"] == reader.text
    assert "".join(script.outputs("hello")[:words]) == state["text"][: len("".join(script.outputs("hello")[:words]))]  # type: ignore[arg-type]


async def test_cancel_again_and_after_the_end_changes_nothing(house: Stack, upstream: Upstream) -> None:
    """The first outcome stands: a second cancel, and a cancel of a completed generation, answer the same snapshot."""
    upstream.script("ended", Script(count=10))
    generation = await house.create("ended")
    await house.finished(generation)
    assert (await house.cancel(generation))["status"] == "completed"
    upstream.script("twice", Script(count=2000, pace_seconds=0.01))
    generation = await house.create("twice")
    await house.reader(generation).connect(stop_after=5)
    first = await house.cancel(generation, house.apis[0])
    second = await house.cancel(generation, house.apis[1])
    assert first["last_event_id"] == second["last_event_id"]
    assert first["text"] == second["text"] != ""
    reader = await house.reader(generation).read_to_end()
    assert reader.terminal is not None and reader.terminal.id == first["last_event_id"]


async def test_delete_erases_the_words_and_stops_the_upstream(house: Stack, upstream: Upstream) -> None:
    """DELETE of a running generation closes the upstream, ends its readers, and leaves 410 behind."""
    upstream.script("deleted", Script(count=2000, pace_seconds=0.01))
    generation = await house.create("deleted")
    reader = house.reader(generation)
    reading = asyncio.create_task(reader.connect())
    await wait_until(lambda: len(reader.blocks) > 5)
    answer = await house.http.delete(f"{house.apis[0].url}/v1/generations/{generation['id']}")
    assert answer.status_code == 204
    await upstream.wait_closed("deleted")
    await reading
    assert reader.terminal is not None and reader.terminal.data["by"] == "delete"
    gone = await Reader(reader.url).connect()
    assert gone.status == 410 and b'"outcome":"cancelled"' in gone.body


GRACE = {"REJOIN_DISCONNECT_GRACE_SECONDS": "1.5"}


class TestOnDisconnect:
    """`on_disconnect: cancel`: when nobody reads for a grace time, the generation ends."""

    async def test_the_last_reader_leaving_ends_it(self, stack: Stack, upstream: Upstream) -> None:
        """It goes on while any reader of any api is there, and ends a grace time after the last has left."""
        upstream.script("attended", Script(count=5000, pace_seconds=0.01))
        await stack.api(**GRACE)
        await stack.api(**GRACE)
        await stack.worker(**GRACE)
        generation = await stack.create("attended", on_disconnect="cancel")
        first, second = stack.reader(generation, stack.apis[0]), stack.reader(generation, stack.apis[1])
        reading = asyncio.create_task(second.connect())
        await first.connect(stop_after=5)
        await asyncio.sleep(4)  # two and a half graces with one reader left: the time itself is what is tested
        assert (await stack.snapshot(generation))["status"] == "in_progress"
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        state = await stack.finished(generation, timeout=5)
        assert state["status"] == "cancelled"
        await upstream.wait_closed("attended")

    async def test_nobody_ever_reading_ends_it_in_the_queue_too(self, stack: Stack, upstream: Upstream) -> None:
        """A generation nobody ever attended is not run by a worker that comes later."""
        api = await stack.api(**GRACE, REJOIN_CLAIM_GRACE_SECONDS="1")
        generation = await stack.create("unattended", on_disconnect="cancel")
        state = await stack.finished(generation, timeout=10)
        assert state["status"] == "cancelled" and api.process.running
        assert upstream.hits("unattended") == 0

    async def test_a_reader_that_returns_in_time_keeps_it(self, stack: Stack, upstream: Upstream) -> None:
        """Leaving and rejoining within the grace time costs nothing."""
        script = Script(count=150, pace_seconds=0.02)
        upstream.script("returned", script)
        await stack.api(**GRACE)
        await stack.worker(**GRACE)
        generation = await stack.create("returned", on_disconnect="cancel")
        reader = stack.reader(generation)
        await reader.connect(stop_after=10)
        await asyncio.sleep(0.7)  # half a grace
        await reader.read_to_end()
        assert reader.text == script.text("hello")
