"""How long a job waits for its worker, and what a worker costs that has nothing to do."""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import cast

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

from bench import machine, programs
from bench.figures import OWN, Figures
from bench.house import House, house
from bench.job_workers import ARQ_QUEUE, BEGAN
from shared.event_log import Hint, new_id
from shared.jobs import Jobs
from tests.processes import Process

WARM_UP = 5


async def job_start(figures: Figures, built: dict[str, Path], rounds: int, times: int, idle_seconds: float) -> None:
    """From the call that enqueues to the first line of the job, one job at a time, on workers that wait."""
    kinds: tuple[tuple[str, Callable[[House], Awaitable[Process]], Callable[[House, int], Awaitable[list[float]]]], ...]
    kinds = (
        (OWN, _rejoin_worker, _send_rejoin),
        ("arq", _arq_worker, _send_arq),
        ("taskiq", _taskiq_worker, _send_taskiq),
    )
    for _ in range(rounds):
        for name, start, send in kinds:
            async with house(built) as home:
                try:
                    process = await start(home)
                except programs.Missing as why:
                    figures.note(f"{name} is NOT MEASURED: {why}")
                    continue
                await send(home, WARM_UP if name != "arq" else 1)
                await machine.wait_for_quiet()
                waits = await send(home, times if name != "arq" else max(8, times // 10))
                figures.add("job start: p50", name, statistics.median(waits), "ms")
                figures.add("job start: p99", name, sorted(waits)[int(len(waits) * 0.99)], "ms")
                await asyncio.sleep(0.5)
                share = await _idle_share(process, idle_seconds)
                figures.add("cpu of an idle worker", name, share * 100, "%")
                print(f"  job start, {name}: {statistics.median(waits):.2f} ms, idle {share:.2%}", flush=True)


async def _idle_share(process: Process, seconds: float) -> float:
    """Of a core."""
    pids = [process.pid, *_children(process.pid)]
    before, began = machine.cpu_seconds(pids), time.monotonic()
    await asyncio.sleep(seconds)
    return (machine.cpu_seconds(pids) - before) / (time.monotonic() - began)


def _children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(one for child in found for one in _children(child))]


async def _rejoin_worker(home: House) -> Process:
    process = home.start("worker", [sys.executable, "-m", "bench.job_workers", "rejoin"], **home.env)
    await process.says("worker.ready", timeout=30)
    return process


async def _arq_worker(home: House) -> Process:
    process = home.start("worker", [sys.executable, "-m", "bench.job_workers", "arq"], REDIS_URL=home.store.url)
    await process.says("worker.ready", timeout=30)
    return process


async def _taskiq_worker(home: House) -> Process:
    python = await asyncio.to_thread(programs.python_with_peers)
    argv = [str(python), "-m", "taskiq", "worker", "bench.taskiq_worker:broker", "--workers", "1"]
    process = home.start("taskiq", argv, REDIS_URL=home.store.url)
    await process.says("Listening started", timeout=30)
    return process


async def _began(home: House) -> int:
    reply = await cast("Awaitable[list[bytes]]", home.redis.blpop([BEGAN], 20))
    return int(reply[1])


async def _send_rejoin(home: House, times: int) -> list[float]:
    jobs, waits = Jobs(home.redis, home.event_log.keys), []
    for _ in range(times):
        sent = time.monotonic_ns()
        await jobs.send(Hint(new_id(), 0, 1))
        waits.append((await _began(home) - sent) / 1e6)
        await asyncio.sleep(0.005)
    return waits


async def _send_arq(home: House, times: int) -> list[float]:
    async with _arq_pool(home) as pool:
        waits = []
        for _ in range(times):
            await asyncio.sleep(random.uniform(0, 0.5))  # anywhere between two of its polls
            sent = time.monotonic_ns()
            await pool.enqueue_job("_began")
            waits.append((await _began(home) - sent) / 1e6)
        return waits


@asynccontextmanager
async def _arq_pool(home: House) -> AsyncIterator[ArqRedis]:
    async with AsyncExitStack() as opened:
        pool = await create_pool(RedisSettings.from_dsn(home.store.url), default_queue_name=ARQ_QUEUE)
        opened.push_async_callback(pool.aclose)
        yield pool


async def _send_taskiq(home: House, times: int) -> list[float]:
    python = await asyncio.to_thread(programs.python_with_peers)
    argv = [str(python), "-m", "bench.taskiq_worker", str(times)]
    process = home.start("taskiq-sender", argv, REDIS_URL=home.store.url)
    assert await process.wait(120) == 0, process.log()
    return [int(line) / 1e6 for line in process.log().split() if line.isdigit()]
