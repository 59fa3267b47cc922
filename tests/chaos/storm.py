"""Ten thousand readers come back to one api at once, each with the id of the last event it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.sockets import Raw, connections_to, join
from tests.chaos.streams import NEVER, begin, end, in_time, need_descriptors, spread
from tests.upstream import Script

READERS = 10_000
GENERATIONS = 50
BEHIND = 3  # blocks a reader has missed
WITHIN_SECONDS = 10.0
MAX_CONNECTIONS = 8
PATIENCE_SECONDS = 60.0


async def run(say: Say, quick: bool) -> list[Row]:
    count = READERS // 10 if quick else READERS
    need_descriptors(count + 500)
    async with house(apis=1, workers=1) as one:
        one.upstream.script("slow", Script(chunks=["word "] * 1_000, pace_seconds=2.0))
        streams = await begin(one.stack, "slow", GENERATIONS)
        asks = [(stream.reader.url, stream.reader.blocks[-1 - BEHIND].id) for stream in streams]
        async with _counted_connections(one) as connections:
            served, refused = await _storm([asks[n % GENERATIONS] for n in range(count)])
        say(f"served: {spread(served)}; connections to the store: {connections}")
        await end(one.stack, streams)
    took = max(served)
    return [
        Row("storm", f"{count:,} reconnects at once to the last one served", f"{took:.2f} s",
            f"< {WITHIN_SECONDS:g} s", took < WITHIN_SECONDS),
        Row("storm", "reconnects refused by the api", f"{refused}", "0", refused == 0),
        Row("storm", "connections of the api to Valkey", f"{max(connections)} at most", f"<= {MAX_CONNECTIONS}",
            0 < max(connections) <= MAX_CONNECTIONS),
    ]  # fmt: skip


async def _storm(asks: list[tuple[str, str]]) -> tuple[list[float], int]:
    """All of them at once: for each, after how long it had what it missed; and how many got another answer than 200."""
    began = time.monotonic()
    joining = [asyncio.create_task(join(*ask)) for ask in asks]

    def all_served() -> bool:
        return all(task.done() and task.result().first_event_at for task in joining)

    await in_time(all_served, PATIENCE_SECONDS, every=0.25)
    readers = [task.result() for task in joining if task.done()]
    never = [NEVER] * (len(joining) - len(readers))
    for task in joining:
        task.cancel()
    for reader in readers:
        reader.transport.abort()
    return [_served_at(reader) - began for reader in readers] + never, sum(
        one.status not in (0, 200) for one in readers
    )


def _served_at(reader: Raw) -> float:
    return reader.first_event_at or NEVER if reader.status == 200 else NEVER


@asynccontextmanager
async def _counted_connections(one: House) -> AsyncIterator[list[int]]:
    """How many connections the api has to the store, looked at all the while."""
    counts: list[int] = []

    async def count() -> None:
        while True:
            counts.append(await asyncio.to_thread(connections_to, one.store.port, one.apis[0].process.pid))
            await asyncio.sleep(0.5)

    counting = asyncio.create_task(count())
    try:
        yield counts
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
