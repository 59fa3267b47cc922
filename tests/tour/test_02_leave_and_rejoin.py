"""Chapter 2: leave and rejoin.

The worker does not mind whether anyone reads. A reader that was cut off names the last id it has, to any api, and gets
exactly what it missed: prefix and rest are, byte for byte, what a reader who stayed has seen.
"""

from __future__ import annotations

from tests.stack import Stack
from tests.upstream import Script, Upstream

MODEL = "tour-leave"


async def test_a_reader_that_left_goes_on_where_it_was_on_another_api(house: Stack, upstream: Upstream) -> None:
    """Leave one api in the middle of an answer, rejoin at the other: nothing twice, nothing missing."""
    script = Script(count=60, pace_seconds=0.02)
    upstream.script(MODEL, script)
    generation = await house.create(MODEL)
    first, second = house.apis

    reader = house.reader(generation, first)
    await reader.connect(stop_after=20)
    left_at = reader.last_event_id
    reader.url = second.url + generation["events_url"]
    await reader.read_to_end()

    stayed = await house.reader(generation).read_to_end()
    assert reader.responses[1].headers["rejoin-resumed-from"] == left_at
    assert reader.raw == stayed.raw
    assert reader.text == script.text("hello")


async def test_an_answer_is_written_while_nobody_reads(house: Stack, upstream: Upstream) -> None:
    """Whoever comes back after the end gets the rest at once."""
    script = Script(count=40, pace_seconds=0.01)
    upstream.script(MODEL, script)
    generation = await house.create(MODEL)
    reader = house.reader(generation)
    await reader.connect(stop_after=5)

    assert (await house.finished(generation))["status"] == "completed"
    await reader.read_to_end()
    assert len(reader.responses) == 2
    assert reader.text == script.text("hello")


async def test_after_the_end_there_is_nothing_to_rejoin(house: Stack, upstream: Upstream) -> None:
    """At the terminal event the answer is 204, at which an EventSource stops asking."""
    upstream.script(MODEL, Script(count=5))
    reader = await house.reader(await house.create(MODEL)).read_to_end()
    assert (await reader.connect()).status == 204
