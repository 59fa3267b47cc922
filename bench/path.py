"""The whole path, from a POST over queue, worker, model and log to the client; and what a worker spends on a chunk."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from arq import create_pool
from arq.connections import RedisSettings

from bench import machine
from bench.drive import Counts, Target, faults, loading
from bench.figures import OWN, Figures
from bench.house import TENANT, House, house
from bench.naive import QUEUE
from bench.systems import bounded, listens
from shared.event_log import Hint, new_id
from shared.jobs import Jobs
from shared.prompt import Message, Prompt
from tests.processes import Process, free_port
from tests.waiting import wait_until

CROWDS = (1, 10, 100, 1000, 2000)
MOST_TOKENS = 4000  # a second over all streams of a crowd: below what one worker does, so that lateness is not queueing
PACE_MICROSECONDS = 12_500  # 80 tokens/s, what a fast model does
STREAMS = 100  # of the worker's own figures
SATURATED_CHUNKS = 500
SATURATED_TOKENS = 20_000  # of the whole path, over all streams
COUNTED_APART = ("config|get", "info", "hello", "client|setinfo", "ping", "commandstats")


@dataclass(frozen=True)
class Route:
    """One way to get an answer: where it is asked for, and the processes behind it."""

    name: str
    port: int
    path: str
    pids: list[int]

    def target(self, number: int, count: int, pace_microseconds: int) -> Target:
        prompt = f"bench {number} {count} {pace_microseconds} "
        body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": prompt}]}
        return Target(self.port, number, count, self.path, method="POST", body=json.dumps(body))


@asynccontextmanager
async def upstream(home: House) -> AsyncIterator[dict[str, str]]:
    """The model's server; gives the settings that lead to it."""
    port = free_port()
    process = home.start("upstream", [str(home.programs["upstream"]), str(port)])
    await listens(process, port)
    yield {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "none"}
    await home.end(process)


@asynccontextmanager
async def routes(home: House) -> AsyncIterator[list[Route]]:
    """Rejoin, the direct route and the naive stack, all on one upstream."""
    async with upstream(home) as env:
        api, port = await home.api(**env)
        worker = await home.worker(**env)
        direct, direct_port = await home.uvicorn("bench.naive:direct", **env)
        naive, naive_port = await home.uvicorn("bench.naive:naive", **env)
        arq = await naive_worker(home, env)
        yield [
            Route(OWN, port, "/v1/chat/completions", [api.pid, worker.pid]),
            Route("direct", direct_port, "/chat", [direct.pid]),
            Route("naive", naive_port, "/chat", [naive.pid, arq.pid]),
        ]
        await home.end(api, worker, direct, naive, arq)


async def naive_worker(home: House, env: dict[str, str]) -> Process:
    argv = [sys.executable, "-m", "arq", "bench.naive.NaiveWorker"]
    process = home.start("naive-worker", argv, BENCH_REDIS_URL=home.store.url, **env)
    await process.says("worker.ready", timeout=30)
    return process


async def first_token(figures: Figures, built: dict[str, Path], rounds: int, times: int) -> None:
    """POST to the first token at the client, one request after the other."""
    async with house(built) as home, routes(home) as all_routes:
        for n in range(rounds + 1):
            for route in all_routes:
                await machine.wait_for_quiet()
                requests = max(5, times // 20) if route.name == "naive" or n == 0 else times
                counts = await _ask(home, [route.target(one, 3, 1000) for one in range(requests)], "--flight", "1")
                _check(figures, route.name, counts)
                if n == 0:  # imports, connections, scripts: not what is measured here
                    continue
                for share in ("p50", "p99"):
                    figures.add(f"POST to first token, idle: {share}", route.name, counts["first"][share], "ms")
                print(f"  first token, {route.name}: {counts['first']['p50']:.2f} ms", flush=True)
        for share in ("p50", "p99"):
            figure = f"POST to first token, idle: {share}"
            mine, theirs = figures.median(figure), figures.median(figure, "direct")
            if mine is not None and theirs is not None:
                figures.add(f"first token over the direct route: {share}", OWN, mine - theirs, "ms")


async def crowds(figures: Figures, built: dict[str, Path], rounds: int, seconds: float, sizes: Sequence[int]) -> None:
    """So many POSTs at the same moment: when the first token comes, and how late each one after it is."""
    async with house(built) as home, routes(home) as all_routes:
        for route in all_routes:  # imports, connections, scripts: not what is measured here
            await _ask(home, [route.target(one, 3, 1000) for one in range(5)])
        for n in range(rounds):
            for size in sizes:
                each = min(1e6 / PACE_MICROSECONDS, MOST_TOKENS / size)
                for route in all_routes:
                    await machine.wait_for_quiet()
                    clients = [route.target(one, max(2, int(each * seconds)), int(1e6 / each)) for one in range(size)]
                    cpu = machine.cpu_seconds(route.pids)
                    counts = await _ask(home, clients, "--flight", str(size + 1), "--skip", "1")
                    cpu = machine.cpu_seconds(route.pids) - cpu
                    _check(figures, route.name, counts)
                    _keep_crowd(figures, route.name, size, counts, cpu)
            print(f"  crowds: round {n + 1} is done", flush=True)


def _keep_crowd(figures: Figures, name: str, size: int, counts: Counts, cpu: float) -> None:
    figures.add(f"{size:,} at once: first token p50", name, counts["first"]["p50"], "ms")
    figures.add(f"{size:,} at once: first token p99", name, counts["first"]["p99"], "ms")
    figures.add(f"{size:,} at once: token late p50", name, counts["latency"]["p50"], "ms")
    figures.add(f"{size:,} at once: token late p99", name, counts["latency"]["p99"], "ms")
    figures.add(f"{size:,} at once: cpu per token", name, cpu / max(1, counts["events"]) * 1e6, "µs")


async def _ask(home: House, clients: Sequence[Target], *options: str) -> Counts:
    async with loading(home.programs["load"], home.folder, clients, "--seconds", "60", *options) as load:
        return await load.result()


def _check(figures: Figures, name: str, counts: Counts) -> None:
    found = faults(counts)
    figures.checked(name, counts["expected"], found)
    if found:
        figures.note(f"{name}: {found} events or requests were not as they should be: {counts['complaint'][:200]}")


# --- the worker alone: nobody reads


Send: TypeAlias = Callable[[House, list[str]], Awaitable[Callable[[], bool | Awaitable[bool]]]]


async def worker(figures: Figures, built: dict[str, Path], rounds: int, seconds: float) -> None:
    """CPU for each chunk at 100 streams x 80/s, and tokens a second when the model does not hold back; no readers."""
    kinds: tuple[tuple[str, Callable[[House, dict[str, str]], Awaitable[Process]], Send], ...]
    kinds = ((OWN, _own_worker, send_own), ("naive", naive_worker, _send_naive))
    for _ in range(rounds):
        for name, start, send in kinds:
            async with house(built) as home, upstream(home) as env:
                process = await start(home, env)
                await timed(home, process, send, 20, 0)
                await machine.wait_for_quiet()
                chunks = int(seconds * 1e6 / PACE_MICROSECONDS)
                before = await _commands(home)
                cpu, _ = await timed(home, process, send, chunks, PACE_MICROSECONDS)
                sent, executed = _since(before, await _commands(home))
                tokens = STREAMS * chunks
                figures.add("worker cpu per chunk, 100 x 80/s", name, cpu / tokens * 1e6, "µs")
                figures.add("redis: commands sent per token", name, sent / tokens, "")
                figures.add("redis: commands run per token, with those in scripts", name, executed / tokens, "")
                cpu, took = await timed(home, process, send, SATURATED_CHUNKS, 0)
                rate = STREAMS * SATURATED_CHUNKS / took
                figures.add("tokens/s of one worker, saturated", name, rate, "1/s")
                figures.add("worker cpu per chunk, saturated", name, cpu / STREAMS / SATURATED_CHUNKS * 1e6, "µs")
                print(f"  worker, {name}: {rate:,.0f} tokens/s, {sent / tokens:.3f} commands a token", flush=True)
        async with house(built) as home, upstream(home) as env:
            used = await _objects(home, env, int(seconds * 1e6 / PACE_MICROSECONDS))
            figures.add("worker cpu per chunk, 100 x 80/s", "sdk objects", used, "µs")


async def _own_worker(home: House, env: dict[str, str]) -> Process:
    return await home.worker(**env)


async def timed(home: House, process: Process, send: Send, chunks: int, pace: int) -> tuple[float, float]:
    """CPU seconds of the worker, and seconds, until it has written all answers."""
    cpu, began = machine.cpu_seconds([process.pid]), time.monotonic()
    done = await send(home, [f"bench {number} {chunks} {pace} " for number in range(STREAMS)])
    await wait_until(done, timeout=120, every=0.02)
    return machine.cpu_seconds([process.pid]) - cpu, time.monotonic() - began


async def send_own(home: House, prompts: list[str]) -> Callable[[], bool | Awaitable[bool]]:
    log, jobs = home.event_log, Jobs(home.redis, home.event_log.keys)
    ids = [new_id() for _ in prompts]

    async def one(generation_id: str, text: str) -> None:
        prompt = Prompt(model="bench", messages=[Message(role="user", content=text)])
        await log.create(generation_id, tenant=TENANT, provider="openai_compatible", prompt=prompt)
        await jobs.send(Hint(generation_id, 0, 1))

    async def is_done() -> bool:
        orders = await log.orders(ids)
        failed = [order.status for order in orders if order.ended and order.status != "completed"]
        assert not failed, f"a generation ended as {failed[0]}"
        return all(order.ended for order in orders)

    await bounded(16, [lambda pair=pair: one(*pair) for pair in zip(ids, prompts, strict=True)])  # type: ignore[misc]
    return is_done


async def _send_naive(home: House, prompts: list[str]) -> Callable[[], bool | Awaitable[bool]]:
    keys = [f"answer:{new_id()}" for _ in prompts]
    pool = await create_pool(RedisSettings.from_dsn(home.store.url), default_queue_name=QUEUE)
    for key, text in zip(keys, prompts, strict=True):
        await pool.enqueue_job("answer", key, [{"role": "user", "content": text}])
    await pool.aclose()

    async def is_done() -> bool:
        async with home.redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.xrevrange(key, "+", "-", 1)
            replies = await pipe.execute()
        return all(reply and b"end" in reply[0][1] for reply in replies)

    return is_done


async def _commands(home: House) -> dict[str, int]:
    stats: dict[str, Any] = await home.redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(found["calls"]) for name, found in stats.items()}


# What only scripts run while answers are written: everything else came over the wire.
IN_SCRIPTS = (
    *("xadd", "publish", "time", "zadd", "hset", "pexpire", "zscore", "zrem", "xrevrange"),
    *("set", "rpush", "ltrim", "zcard", "info"),
)


def _since(before: dict[str, int], after: dict[str, int]) -> tuple[int, int]:
    """Commands that were sent, and commands that were run; without those by which the bench looks and waits."""
    spent = {name: count - before.get(name, 0) for name, count in after.items()}
    spent = {name: count for name, count in spent.items() if count and name not in COUNTED_APART}
    scripted = "evalsha" in spent
    looking = ("hmget",) if scripted else ("xrevrange",)
    sent = sum(count for name, count in spent.items() if not (scripted and name in IN_SCRIPTS) and name not in looking)
    return sent, sum(count for name, count in spent.items() if scripted or name not in looking)


async def _objects(home: House, env: dict[str, str], chunks: int) -> float:
    """Microseconds of CPU for each chunk of a process that only iterates over the SDK's objects."""
    process = home.start("objects", [sys.executable, "-m", "bench.naive", str(STREAMS), str(chunks)], **env)
    assert await process.wait(120) == 0, process.log()
    found = orjson.loads(process.log().strip().splitlines()[-1])
    return float(found["cpu"] / found["chunks"] * 1e6)


async def saturated(figures: Figures, built: dict[str, Path], rounds: int, sizes: Sequence[int]) -> None:
    """Tokens a second through the whole path, with a client for each stream, when the model does not hold back."""
    async with house(built) as home, routes(home) as all_routes:
        for route in all_routes:
            await _ask(home, [route.target(one, 3, 1000) for one in range(5)])
        for _ in range(rounds):
            for size in sizes:
                for route in all_routes:
                    await machine.wait_for_quiet()
                    chunks = max(10, SATURATED_TOKENS // size)
                    counts = await _ask(
                        home, [route.target(one, chunks, 0) for one in range(size)], "--flight", str(size + 1)
                    )
                    _check(figures, route.name, counts)
                    rate = counts["events"] / counts["seconds"]
                    figures.add(f"{size:,} at once: tokens/s, saturated", route.name, rate, "1/s")
                    print(f"  saturated, {size:,} at once, {route.name}: {rate:,.0f} tokens/s", flush=True)
