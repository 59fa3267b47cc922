"""Chapter 1: start and stream.

A caller asks with one POST and is answered at once: the generation is ordered, and has an id. A worker picks it up and
writes what the model says into a log, event by event; whoever asks for the events gets them as they are written. A log
begins with `generation.queued`, goes on with `generation.started`, then the words, and ends with one terminal event.
"""

from __future__ import annotations

from tests.stack import Stack
from tests.upstream import Script, Upstream

MODEL = "tour-stream"


async def test_a_prompt_becomes_a_log_and_the_log_becomes_a_stream(house: Stack, upstream: Upstream) -> None:
    """The stream tells a generation's whole life in order, and its words are the model's."""
    upstream.script(MODEL, Script(chunks=["To ", "be ", "or ", "not."]))
    generation = await house.create(MODEL, "How does it begin?")
    assert generation["status"] == "queued"

    reader = await house.reader(generation).read_to_end()

    assert [block.event for block in reader.blocks] == [
        "generation.queued",
        "generation.started",
        "text.delta",
        "text.delta",
        "text.delta",
        "text.delta",
        "generation.completed",
    ]
    assert reader.text == "To be or not."


async def test_each_event_has_the_number_that_its_writer_gave_it(house: Stack, upstream: Upstream) -> None:
    """The first entry is `0-1`; an attempt's are `<epoch>-0`, `<epoch>-1`, and so on, without a hole."""
    upstream.script(MODEL, Script(count=5))
    reader = await house.reader(await house.create(MODEL)).read_to_end()
    queued, *attempt = [block.id for block in reader.blocks]
    epoch = attempt[0].partition("-")[0]
    assert queued == "0-1"
    assert attempt == [f"{epoch}-{seq}" for seq in range(len(attempt))]


async def test_the_snapshot_is_the_log_folded(house: Stack, upstream: Upstream) -> None:
    """Who does not want a stream asks for the state: status, text, usage, and the id to go on from."""
    upstream.script(MODEL, Script(chunks=["All ", "of it."]))
    generation = await house.create(MODEL)
    reader = await house.reader(generation).read_to_end()
    snapshot = await house.snapshot(generation)
    assert (snapshot["status"], snapshot["text"], snapshot["finish_reason"]) == ("completed", "All of it.", "stop")
    assert snapshot["usage"]["output_tokens"] == 2
    assert snapshot["last_event_id"] == reader.last_event_id
