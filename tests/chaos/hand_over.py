"""Workers are told to stop under load, as in a rolling deploy: what they cannot finish goes on elsewhere, uncharged.

Half of the stops leave no time to drain; the other half a second, and the figure counts from the end of that second.
"""

from __future__ import annotations

import itertools
import signal
import time
from dataclasses import dataclass, field

from redis.asyncio import Redis

from shared.redis import Keys
from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import NEVER, Stream, begin, by_worker, in_time, p99_under, spread
from tests.processes import Process
from tests.upstream import Script

STOPS = 100
STREAMS = 16  # at every moment
WORKERS = 3
SCRIPT = Script(count=100, pace_seconds=0.02)
PATIENCE_SECONDS = 10.0
END_SECONDS = 60.0  # for a generation to end when nobody is stopped any more


@dataclass
class Seen:
    """What all stops did to the streams."""

    hand_overs: list[float] = field(default_factory=list)
    drained: int = 0
    ended: list[Stream] = field(default_factory=list)


async def run(say: Say, quick: bool) -> list[Row]:
    seen = Seen()
    stops = STOPS // 10 if quick else STOPS
    async with house(apis=2, workers=0) as one, Redis.from_url(one.store.url) as redis:
        one.upstream.script("work", SCRIPT)
        drains = itertools.cycle((0, 1))
        for _ in range(WORKERS):
            await _worker(one, next(drains))
        streams: list[Stream] = []
        for n in range(1, stops + 1):
            streams = await _refill(one, streams, seen)
            await _stop(one, redis, one.workers[-WORKERS], streams, seen)
            await _worker(one, next(drains))
            say(f"stop {n}: {spread(seen.hand_overs)}; {seen.drained} ended in their time")
        await in_time(lambda: all(one.reading.done() for one in streams), END_SECONDS)
        seen.ended += streams
        orphans = [one for one in seen.ended if not _is_whole(one)]
        charged = sum([await _number(redis, one, "charged") for one in seen.ended])
        for stream in seen.ended:
            await stream.leave()
    return [
        Row("hand-over", f"SIGTERM x {stops} to the next attempt", spread(seen.hand_overs), "p99 < 1 s",
            p99_under(seen.hand_overs, 1.0)),
        Row("hand-over", "generations orphaned", f"{len(orphans)} of {len(seen.ended)}", "0", not orphans),
        Row("hand-over", "attempts charged", f"{charged} in {len(seen.hand_overs)} hand-overs", "0",
            charged == 0 and len(seen.hand_overs) >= stops),
    ]  # fmt: skip


async def _worker(one: House, drain_seconds: int) -> Process:
    return await one.worker(REJOIN_DRAIN_SECONDS=str(drain_seconds))


async def _refill(one: House, streams: list[Stream], seen: Seen) -> list[Stream]:
    """As many streams as there are to be; those that have ended make room for new ones."""
    seen.ended += [stream for stream in streams if stream.reading.done()]
    running = [stream for stream in streams if not stream.reading.done()]
    return running + await begin(one.stack, "work", STREAMS - len(running))


async def _stop(one: House, redis: Redis, worker: Process, streams: list[Stream], seen: Seen) -> None:
    """Stop the worker; for each stream it held, either its end comes in time or another attempt does."""
    running = [stream for stream in streams if not stream.reading.done()]
    held = (await by_worker(redis, "chaos", running))[worker.pid]
    before = {stream.id: await _number(redis, stream, "attempts") for stream in held}
    signalled_at = time.monotonic()
    worker.signal(signal.SIGTERM)

    def settled(stream: Stream) -> bool:
        return stream.reading.done() or stream.reader.started_at(before[stream.id] + 1) < NEVER

    await in_time(lambda: all(map(settled, held)), PATIENCE_SECONDS)
    due = signalled_at + int(worker.env["REJOIN_DRAIN_SECONDS"])
    for stream in held:
        next_start = stream.reader.started_at(before[stream.id] + 1)
        if stream.reading.done() and next_start == NEVER:
            seen.drained += 1
        else:
            seen.hand_overs.append(next_start - due)
    await worker.wait()


def _is_whole(stream: Stream) -> bool:
    """It has ended, and with all its words."""
    reader = stream.reader
    terminal = reader.terminal
    return terminal is not None and terminal.event == "generation.completed" and reader.text == SCRIPT.text("hello")


async def _number(redis: Redis, stream: Stream, field_name: str) -> int:
    """A number that the order keeps."""
    return int(await redis.hget(Keys("chaos").order(stream.id), field_name))  # type: ignore[misc]
