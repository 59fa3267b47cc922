"""An api with 2,000 open streams is told to stop: each stream is ended properly, with a `retry:` of its own."""

from __future__ import annotations

import signal
import time

from tests.chaos.house import house
from tests.chaos.report import Row, Say
from tests.chaos.sockets import Raw, join
from tests.chaos.streams import begin, end, in_time, need_descriptors
from tests.stack import gather_bounded
from tests.upstream import Script

OPEN_STREAMS = 2000
GENERATIONS = 20
WITHIN_SECONDS = 5.0
PATIENCE_SECONDS = 20.0


async def run(say: Say, quick: bool) -> list[Row]:
    count = OPEN_STREAMS // 10 if quick else OPEN_STREAMS
    need_descriptors(count + 500)
    async with house(apis=2, workers=1) as one:
        one.upstream.script("slow", Script(count=1_000, pace_seconds=0.5))
        stopping, staying = one.apis
        streams = await begin(one.stack, "slow", GENERATIONS)
        urls = [stopping.url + stream.generation["events_url"] for stream in streams]
        readers = await gather_bounded(100, *(join(urls[n % GENERATIONS]) for n in range(count)))
        opened = await in_time(lambda: all(reader.first_event_at for reader in readers), PATIENCE_SECONDS)
        say(f"{count} streams are open")
        stopped_at = time.monotonic()
        stopping.process.signal(signal.SIGTERM)
        await in_time(lambda: all(reader.closed_at for reader in readers), PATIENCE_SECONDS)
        took = max((reader.closed_at or float("inf")) - stopped_at for reader in readers)
        proper = [reader for reader in readers if _ended_well(reader)]
        retries = {reader.retries[-1] for reader in proper}
        await end(one.stack, streams, staying)
        say(f"all closed after {took:.2f} s, {len(proper)} properly, {len(retries)} different retries")
    return [
        Row("draining", f"SIGTERM to the last of {count:,} streams closed", f"{took:.2f} s", f"< {WITHIN_SECONDS:g} s",
            opened and took < WITHIN_SECONDS),
        Row("draining", "ended properly, with a `retry:` at the end", f"{len(proper):,} of {count:,}", "all",
            len(proper) == count),
        Row("draining", "different `retry:` values", f"{len(retries)} of {count:,}", f"> {count // 10}",
            len(retries) > count // 10),
    ]  # fmt: skip


def _ended_well(reader: Raw) -> bool:
    """The body came to its proper end, and the last thing in it says when to come back."""
    return reader.status == 200 and reader.is_complete and len(reader.retries) == 2
