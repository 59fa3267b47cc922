"""Valkey is killed while tokens flow, and comes back with its file: nobody starts again, no client is cut off."""

from __future__ import annotations

import asyncio
import time

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import Stream, begin, in_time, spread
from tests.upstream import Script

STREAMS = 20
AWAY_SECONDS = (0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
PATIENCE_SECONDS = 30.0


async def run(say: Say, quick: bool) -> list[Row]:
    outages = (0.1, 5.0) if quick else AWAY_SECONDS
    streams: list[Stream] = []
    silences: list[float] = []
    async with house(apis=2, workers=2) as one:
        for away_seconds in outages:
            hurt, back_at = await _outage(one, away_seconds)
            streams += hurt
            silences += [_first_word_after(stream, back_at) - back_at for stream in hurt]
            say(f"away for {away_seconds:g} s: {spread(silences)} until words came again")
        restarted = [one for one in streams if not _in_one_go(one)]
        cut = sum(len(one.reader.responses) - 1 for one in streams)
        for stream in streams:
            await stream.leave()
    what = f"in {len(outages)} outages of {outages[0]:g} to {outages[-1]:g} s"
    return [
        Row("store away", f"generations that were not whole in one attempt, {what}",
            f"{len(restarted)} of {len(streams)}", "0", bool(streams) and not restarted),
        Row("store away", f"readers cut off, {what}", f"{cut} of {len(streams)}", "0", bool(streams) and cut == 0),
    ]  # fmt: skip


async def _outage(one: House, away_seconds: float) -> tuple[list[Stream], float]:
    """Kill the store mid-stream, start it again; the streams that ran, at their ends, and when it was back."""
    pace = 0.04
    script = Script(count=round((away_seconds + 6) / pace), pace_seconds=pace)  # so that all are amid their words
    one.upstream.script("words", script)
    streams = await begin(one.stack, "words", STREAMS)
    assert not any(stream.reading.done() for stream in streams)
    await one.store.kill()
    await asyncio.sleep(away_seconds)  # the outage itself
    one.store.start()
    back_at = time.monotonic()
    assert not any(stream.reading.done() for stream in streams), "an answer ended while there was no store"
    await in_time(lambda: all(stream.reading.done() for stream in streams), away_seconds + PATIENCE_SECONDS)
    for stream in streams:
        stream.expected = script.text("hello")
    return streams, back_at


def _in_one_go(stream: Stream) -> bool:
    """Completed, every word of it, in its first attempt."""
    reader = stream.reader
    starts = [block for block in reader.blocks if block.event == "generation.started"]
    completed = reader.terminal is not None and reader.terminal.event == "generation.completed"
    return completed and len(starts) == 1 and reader.text == stream.expected


def _first_word_after(stream: Stream, moment: float) -> float:
    return next((arrival for arrival in stream.reader.arrivals if arrival > moment), float("inf"))
