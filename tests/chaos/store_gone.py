"""Valkey is away for a minute while the upstreams are fast: the worker stops reading them instead of growing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import Stream, begin, end, in_time, resident_bytes
from tests.upstream import Script

AWAY_SECONDS = 60.0
STREAMS = 20
FAST = Script(chunks=["x" * 2000] * 200_000, pace_seconds=0.01)  # 4 MB a second from all of them
SHORT = Script(count=50)  # what is asked again gets this
MAX_GROWTH_MIB = 64  # a worker that went on reading would take 80 MB in 20 s
# A lease (3 s) until reading stops, 15 s until the upstreams are closed, and the heartbeat's third of a lease
CLOSED_WITHIN_SECONDS = 21.0
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Seen:
    """What the outage did."""

    growth_mib: float
    read_mib: float
    still_open: int
    ended: int


async def run(say: Say, quick: bool) -> list[Row]:
    away_seconds = max(AWAY_SECONDS / 10, CLOSED_WITHIN_SECONDS + 1) if quick else AWAY_SECONDS
    async with house(apis=1, workers=1) as one:
        one.upstream.script("fast", *[FAST] * STREAMS, SHORT)
        streams = await begin(one.stack, "fast", STREAMS)
        seen = await _be_away(one, streams, away_seconds, say)
        await end(one.stack, streams)
    return [
        Row("store gone", f"growth of the worker in {away_seconds:g} s without a store", f"{seen.growth_mib:.0f} MiB",
            f"< {MAX_GROWTH_MIB} MiB", seen.growth_mib < MAX_GROWTH_MIB),
        Row("store gone", f"upstreams still open after {CLOSED_WITHIN_SECONDS:g} s",
            f"{seen.still_open} of {STREAMS}", "0", seen.still_open == 0),
        Row("store gone", "generations completed when it is back", f"{seen.ended} of {STREAMS}", "all",
            seen.ended == STREAMS),
    ]  # fmt: skip


async def _be_away(one: House, streams: list[Stream], away_seconds: float, say: Say) -> Seen:
    pid = one.workers[0].pid
    before, sent_before = resident_bytes(pid), _sent(one)
    await one.store.kill()
    began = time.monotonic()
    most, still_open = before, STREAMS
    while time.monotonic() - began < away_seconds:
        most = max(most, resident_bytes(pid))
        if time.monotonic() - began < CLOSED_WITHIN_SECONDS:
            still_open = one.upstream.open_requests("fast")
        await asyncio.sleep(0.1)
    read_mib = (_sent(one) - sent_before) * 2000 / 2**20
    say(f"the worker grew from {before >> 20} to {most >> 20} MiB; the upstreams sent {read_mib:.0f} MiB meanwhile")
    one.store.start()
    back_at = time.monotonic()
    await in_time(lambda: all(stream.reading.done() for stream in streams), PATIENCE_SECONDS)
    say(f"all ended {time.monotonic() - back_at:.1f} s after it was back")
    return Seen((most - before) / 2**20, read_mib, still_open, sum(map(_is_whole, streams)))


def _sent(one: House) -> int:
    return sum(request.chunks_sent for request in one.upstream.requests_of("fast"))


def _is_whole(stream: Stream) -> bool:
    terminal = stream.reader.terminal
    return (
        terminal is not None and terminal.event == "generation.completed" and stream.reader.text == SHORT.text("hello")
    )
