"""Chapter 5: lose a worker.

Workers die: out of memory, with their machine, by a bad deploy. A worker's right to write is a lease of a few seconds.
When it is not renewed, the generation is given to another worker, under a higher epoch, and from then on Redis refuses
whatever the old one might still want to write. The new attempt starts over and says so; the texts are never mixed.
"""

from __future__ import annotations

import asyncio

from tests.reader import Reader
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

MODEL = "tour-lost"
ENDLESS = Script(count=5000, pace_seconds=0.01)
ANSWER = Script(chunks=["The ", "second ", "try."])


async def _lose_a_worker(stack: Stack, upstream: Upstream) -> tuple[dict, Reader]:
    """A generation whose first worker was killed in the middle, and a reader that was there all the time."""
    upstream.script(MODEL, ENDLESS)
    await stack.api()
    victim = await stack.worker()
    generation = await stack.create(MODEL)
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 10)
    upstream.script(MODEL, ANSWER)
    await victim.kill()
    await stack.worker()
    await reading
    return generation, reader


async def test_another_worker_takes_over_and_says_so(stack: Stack, upstream: Upstream) -> None:
    """The reader stays connected, sees attempt 2 begin afresh, and its text in the end is that attempt's alone."""
    generation, reader = await _lose_a_worker(stack, upstream)
    starts = [block.data for block in reader.blocks if block.event == "generation.started"]
    assert [(start["attempt"], start["mode"]) for start in starts] == [(1, "fresh"), (2, "fresh")]
    assert len(reader.responses) == 1
    assert reader.text == "The second try."
    snapshot = await stack.snapshot(generation)
    assert (snapshot["status"], snapshot["attempt"], snapshot["text"]) == ("completed", 2, "The second try.")


async def test_whoever_rejoins_from_the_lost_attempt_is_set_to_the_new_one(stack: Stack, upstream: Upstream) -> None:
    """A cursor of a void attempt leads to the start of the current one, and the response says from where it goes on."""
    generation, reader = await _lose_a_worker(stack, upstream)
    returned = stack.reader(generation)
    returned.blocks = reader.blocks[:5]
    response = await returned.connect()
    first_new = returned.blocks[5]
    assert (first_new.event, first_new.data["attempt"]) == ("generation.started", 2)
    assert response.headers["rejoin-resumed-from"] == first_new.id
    assert returned.text == "The second try."
