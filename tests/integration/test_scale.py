"""Workers and apis scale apart: many generations, many readers, few connections."""

from __future__ import annotations

import asyncio
import random

from redis.asyncio import Redis

from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

MAX_CONNECTIONS = 8


async def test_three_workers_and_two_apis_complete_fifty_generations_once(stack: Stack, upstream: Upstream) -> None:
    """Clients that hop between the apis get every text complete, once."""
    script = Script(count=100, pace_seconds=0.01)
    upstream.script("hop", script)
    for _ in range(2):
        await stack.api()
    await asyncio.gather(*(stack.worker() for _ in range(3)))
    generations = await asyncio.gather(*(stack.create("hop", f"p{n}", stack.apis[n % 2]) for n in range(50)))
    chance = random.Random(3)

    async def hop(n: int, generation: dict) -> None:
        reader = stack.reader(generation)
        async with asyncio.timeout(60):
            while reader.terminal is None:
                api = stack.apis[chance.randrange(2)]
                await reader.connect(stop_after=chance.randrange(1, 40), url=api.url + generation["events_url"])
        check_history(reader.blocks)
        assert reader.text == script.text(f"p{n}")

    await asyncio.gather(*(hop(n, generation) for n, generation in enumerate(generations)))
    assert upstream.hits("hop") == 50

    def took() -> list[int]:
        return [worker.log().count("generation.completed") for worker in stack.workers]

    await wait_until(lambda: sum(took()) >= 50)  # a reader sees the end a moment before the worker tells of it
    assert sum(took()) == 50 and min(took()) > 0, f"the work was not spread: {took()}"


async def test_a_thousand_readers_need_at_most_eight_connections(
    stack: Stack, upstream: Upstream, redis_url: str
) -> None:
    """One api process serves 1,000 readers of 20 running generations over at most 8 connections to Redis."""
    script = Script(count=100, pace_seconds=0.1)
    upstream.script("crowd", script)
    api = await stack.api()
    await stack.worker()
    generations = await asyncio.gather(*(stack.create("crowd") for _ in range(20)))
    readers = [stack.reader(generations[n % 20]) for n in range(1000)]
    reading = [asyncio.create_task(reader.read_to_end(timeout=90)) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 3 for reader in readers), timeout=60)
    client: Redis = Redis.from_url(redis_url)
    own = await _connections_of(client, api.process.pid)
    await client.aclose()
    assert own <= MAX_CONNECTIONS, own
    await asyncio.gather(*reading)
    for reader in readers:
        assert reader.text == script.text("hello")


async def _connections_of(client: Redis, pid: int) -> int:
    """How many connections to the server the process holds, by the ports its sockets have."""
    ports = {line.split()[1].rpartition(":")[2] for line in _tcp_of(pid)}
    clients = await client.client_list()
    return sum(f"{int(one['addr'].rpartition(':')[2]):04X}" in ports for one in clients)


def _tcp_of(pid: int) -> list[str]:
    import os
    from pathlib import Path

    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[9] in inodes]


async def test_a_reader_that_joins_late_catches_up_and_follows(house: Stack, upstream: Upstream) -> None:
    """A reader far behind the feed's window reads the log, then goes over to the pushes without a seam."""
    script = Script(count=1500, pace_seconds=0.002)
    upstream.script("late", script)
    generation = await house.create("late")
    await Reader(house.apis[0].url + generation["events_url"]).connect(stop_after=700)
    readers = [house.reader(generation, house.apis[n % 2]) for n in range(10)]
    await asyncio.gather(*(reader.read_to_end() for reader in readers))
    for reader in readers:
        check_history(reader.blocks)
        assert reader.text == script.text("hello")
