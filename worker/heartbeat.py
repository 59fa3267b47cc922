"""Renew the leases of generations that appended nothing; stop what can no longer be renewed; hear the nudges.

The log decides: a nudge or a heartbeat only makes the writer ask, and its answer is what stops an attempt.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress

from shared.cluster import Servers
from shared.event_log import process_name
from shared.observability import logger
from shared.redis import TROUBLE, Client, Keys
from worker.writer import Writer

SIGN_SECONDS = 5.0  # how often a worker says that it lives
FRESH_SECONDS = 20.0  # for how long that is believed
log = logger("heartbeat")


def worker_name() -> str:
    return process_name(os.getpid())


async def renew_leases(writer: Writer, lease_seconds: float) -> None:
    """Every third of a lease, have the writer speak for each attempt that was silent since."""
    interval = lease_seconds / 3
    while True:
        await asyncio.sleep(interval)
        silent_since = time.monotonic() - interval * 0.9
        for attempt in writer.attempts.values():
            if attempt.confirmed_at < silent_since:
                writer.renew(attempt)
        writer.give_up_blind()


async def hear_nudges(servers: Servers, keys: Keys, writer: Writer) -> None:
    """When somebody closed a log from outside, ask at once instead of at the next heartbeat."""
    while True:
        try:
            redis, *_ = await servers.all()  # a Cluster passes on to each node what one of them is told
            async with redis.pubsub() as channel:
                await channel.subscribe(keys.nudge)
                async for message in channel.listen():
                    attempt = writer.attempts.get(_generation_id(message))
                    if attempt is not None:
                        writer.renew(attempt)
        except TROUBLE as error:
            servers.doubt(error)
            log.warning("nudges.redis_away", error=type(error).__name__)
            await asyncio.sleep(0.2)


async def show_life(redis: Client, keys: Keys) -> None:
    """Keep this worker's line in the list of workers fresh, and take it away at the end."""
    try:
        await _sign_forever(redis, keys)
    finally:
        with suppress(*TROUBLE, TimeoutError):
            async with asyncio.timeout(1):
                await redis.zrem(keys.workers, worker_name())


async def _sign_forever(redis: Client, keys: Keys) -> None:
    while True:
        try:
            now = time.time()
            async with redis.pipeline(transaction=False) as pipe:
                pipe.zadd(keys.workers, {worker_name(): now})
                pipe.zremrangebyscore(keys.workers, "-inf", now - FRESH_SECONDS)
                pipe.expire(keys.workers, 60)
                await pipe.execute()
        except TROUBLE as error:
            log.warning("sign_of_life.delayed", error=type(error).__name__)
        await asyncio.sleep(SIGN_SECONDS)


async def is_alive(redis: Client, keys: Keys) -> bool:
    """Has a worker on this machine (in this container) shown life lately?"""
    fresh = await redis.zrangebyscore(keys.workers, time.time() - FRESH_SECONDS, "+inf")
    return any(name.decode().rpartition(":")[0] == socket.gethostname() for name in fresh)


def _generation_id(message: dict[str, object]) -> str:
    data = message.get("data")
    return data.decode() if isinstance(data, bytes) else ""
