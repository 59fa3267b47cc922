"""A worker is killed mid-stream, again and again: how long until readers have the next attempt's first entry.

Two workers run, so no process start is in the figure. First as it is without a supervisor that tells (the lease ends),
then under `rejoin up`, which saw its child die and ends the leases itself.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import Redis

from shared.redis import Keys
from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import begin, by_worker, end, in_time, p99_under, spread
from tests.processes import Process, Processes
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

LEASE_SECONDS = 3.0
STREAMS = 8
UPSTREAM = Script(count=2_000, pace_seconds=0.03)
PATIENCE_SECONDS = 15.0
KILLS = 30

Kill = Callable[[int], Awaitable[None]]  # the pid of a worker


async def run(say: Say, quick: bool) -> list[Row]:
    async with house(apis=2, workers=2) as one, Redis.from_url(one.store.url) as redis:
        one.upstream.script("endless", UPSTREAM)
        goal = LEASE_SECONDS + 1
        took = []
        for n in range(1, kills(quick) + 1):
            took += await kill_one(one.stack, redis, "chaos", lambda pid: _kill(one, pid))
            await one.worker()
            say(f"kill {n}: {spread(took)}")
    return [Row("recovery", "kill -9 to the next attempt, lease 3 s", spread(took), f"p99 < {goal:g} s",
                p99_under(took, goal))]  # fmt: skip


async def run_under_up(say: Say, quick: bool) -> list[Row]:
    took = []
    async with _rejoin_up() as (stack, redis):
        for n in range(1, kills(quick) + 1):
            took += await kill_one(stack, redis, "rejoin", _kill_pid)
            say(f"kill {n}: {spread(took)}")
            await _two_workers(redis)
    return [Row("recovery-up", "kill -9 to the next attempt, `rejoin up`", spread(took), "p99 < 1 s",
                p99_under(took, 1.0))]  # fmt: skip


def kills(quick: bool) -> int:
    return KILLS // 10 if quick else KILLS


async def kill_one(stack: Stack, redis: Redis, prefix: str, kill: Kill) -> list[float]:
    """Begin some streams, kill the worker that has most of them; the seconds each of these streams was without one."""
    streams = await begin(stack, "endless", STREAMS)
    held = await by_worker(redis, prefix, streams)
    pid = max(held, key=lambda pid: len(held[pid]))
    orphans = held[pid]
    killed_at = time.monotonic()
    await kill(pid)
    await in_time(lambda: all(one.reader.started_at(2) < float("inf") for one in orphans), PATIENCE_SECONDS)
    await end(stack, streams)
    return [one.reader.started_at(2) - killed_at for one in orphans]


async def _kill(one: House, pid: int) -> None:
    (victim,) = [worker for worker in one.workers if worker.pid == pid]
    victim.signal(signal.SIGKILL)


async def _kill_pid(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def _rejoin_up() -> AsyncIterator[tuple[Stack, Redis]]:
    """`rejoin up` with two workers, on the scripted upstream."""
    with tempfile.TemporaryDirectory(prefix="rejoin-") as name:
        folder = Path(name)
        processes = Processes(folder)
        async with Upstream() as upstream:
            upstream.script("endless", UPSTREAM)
            try:
                process, api = await _start_up(processes, folder / "data", upstream)
                stack = Stack(processes, {}, apis=[api])
                async with Redis.from_url(f"unix://{(folder / 'data').resolve()}/valkey.sock") as redis:
                    yield stack, redis
                await stack.http.aclose()
                await process.terminate()
            finally:
                processes.end_all()


async def _start_up(processes: Processes, data: Path, upstream: Upstream) -> tuple[Process, Api]:
    argv = [sys.executable, "-m", "cli", "up", "--port", "0", "--workers", "2", "--data", str(data)]
    env = {"OPENAI_BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-test-key-of-the-upstream"}
    process = await processes.start("rejoin-up", argv, {**env, "REJOIN_DRAIN_SECONDS": "0"})
    url = await process.says(r"ready (http://\S+)", timeout=60)
    return process, Api(process, urlsplit(url).port or 0)


async def _two_workers(redis: Redis) -> None:
    """Until the dead one has been replaced: a kill is to find a second worker that runs."""

    async def living() -> bool:
        names = await redis.zrange(Keys("rejoin").workers, 0, -1)
        pids = [int(re.split(":", name.decode())[-1]) for name in names]
        return sum(_exists(pid) for pid in pids) >= 2

    await wait_until(living, timeout=60, every=0.1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
