"""Generations that run, each with a reader that keeps the time at which every block came.

What all the scenarios with a figure share. A stream that never got what it waits for counts as an endless time, so that
a broken system misses its goal instead of leaving the figure empty.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from shared.redis import Keys
from tests.chaos.report import percentile
from tests.reader import Reader, check_history
from tests.stack import Api, Stack, gather_bounded
from tests.waiting import wait_until

NEVER = math.inf


@dataclass
class Timed(Reader):
    """A reader that knows when (monotonic) each of its blocks came."""

    arrivals: list[float] = field(default_factory=list)

    def _take(self, pending: bytes) -> bytes:
        left = super()._take(pending)
        self.arrivals += [time.monotonic()] * (len(self.blocks) - len(self.arrivals))
        return left

    def started_at(self, attempt: int) -> float:
        """When the start of an attempt was in hands; NEVER if it was not."""
        for block, arrival in zip(self.blocks, self.arrivals, strict=True):
            if block.event == "generation.started" and block.data["attempt"] >= attempt:
                return arrival
        return NEVER


@dataclass
class Stream:
    """A generation and who reads it."""

    generation: dict
    reader: Timed
    reading: asyncio.Task[object]
    expected: str = ""  # the whole text, where a scenario asks for it

    @property
    def id(self) -> str:
        return str(self.generation["id"])

    async def leave(self) -> None:
        """Stop reading. What the reader saw must be a history that the protocol allows."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        check_history(self.reader.blocks)


async def begin(stack: Stack, model: str | Callable[[int], str], count: int, prompt: str = "hello") -> list[Stream]:
    """So many running generations over all apis, each with one reader that has seen some of its words."""
    streams = await gather_bounded(50, *(_begin(stack, n, model, prompt) for n in range(count)))
    await wait_until(lambda: all(len(one.reader.blocks) > 5 for one in streams), timeout=60)
    return streams


async def _begin(stack: Stack, n: int, model: str | Callable[[int], str], prompt: str) -> Stream:
    api = stack.apis[n % len(stack.apis)]
    generation = await stack.create(model if isinstance(model, str) else model(n), prompt, api)
    reader = Timed(api.url + generation["events_url"])
    return Stream(generation, reader, asyncio.create_task(reader.read_to_end(timeout=600)))


async def end(stack: Stack, streams: Sequence[Stream], api: Api | None = None) -> None:
    """Cancel what still runs, and leave."""
    await gather_bounded(20, *(stack.cancel(one.generation, api) for one in streams))
    await asyncio.gather(*(one.leave() for one in streams))


async def by_worker(redis: Redis, prefix: str, streams: Iterable[Stream]) -> dict[int, list[Stream]]:
    """The streams each worker holds, by its pid, as the orders name it."""
    held: dict[int, list[Stream]] = defaultdict(list)
    for stream in streams:
        owner = await redis.hget(Keys(prefix).order(stream.id), "owner")  # type: ignore[misc]
        held[int(owner.decode().rpartition(":")[2])].append(stream)
    return held


async def in_time(condition: Callable[[], object], timeout: float, every: float = 0.01) -> bool:
    """Wait for the condition; False when its time is over, for the figures to tell."""
    try:
        await wait_until(condition, timeout, every)
        return True
    except AssertionError:
        return False


def spread(values: Sequence[float]) -> str:
    """`p50 … p99 … of n`, in seconds."""
    if not values:
        return "nothing was measured"
    p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, worst {max(values):.3f} s of {len(values):,}"


def p99_under(values: Sequence[float], seconds: float) -> bool:
    """Nothing measured is a goal missed."""
    return bool(values) and percentile(values, 0.99) < seconds


def need_descriptors(count: int) -> None:
    """Raise the limit of open files for this process and those it starts. RuntimeError where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise RuntimeError(f"this needs {count} open files and {hard} are allowed: raise `ulimit -n`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def resident_bytes(pid: int) -> int:
    """The memory a process holds now."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
