"""A caller that is cancelled within a call to Redis leaves its reply behind: nobody else may ever get to read it.

In March 2023 ChatGPT showed its users the titles of other users' chats for that reason (redis-py, CVE-2023-28858).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest
from redis.asyncio import Redis

from shared.config import Settings
from shared.event_log import Append, EventLog, Hint, new_id
from shared.events import TextDelta, encode
from shared.prompt import Message, Prompt
from shared.redis import connect

CALLS = 100_000  # cancelled ones, over both kinds of clients
GENERATIONS = 40
TURNS = 24  # of the event loop at most before a call is cancelled: the slowest takes about that many
Check: TypeAlias = Callable[[], Awaitable[bool]]


async def prepared(log: EventLog) -> list[Check]:
    """Calls on generations that each say their own id only, which tell whether the answer was of what they asked."""
    checks: list[Check] = []
    for _ in range(GENERATIONS):
        generation_id = new_id()
        prompt = Prompt(model=f"model-{generation_id}", messages=[Message(role="user", content="x")])
        await log.create(generation_id, tenant="t", provider="demo", prompt=prompt)
        claim = await log.claim(Hint(generation_id, 0, 1), "nonce")
        assert claim is not None
        events = [encode(TextDelta(generation_id))] * 3
        await log.append([Append(generation_id, claim.epoch, 1, events)])
        checks += _checks(log, generation_id, claim.epoch, events)
    return checks


def _checks(log: EventLog, generation_id: str, epoch: int, events: list[bytes]) -> list[Check]:
    async def read() -> bool:
        return [entry.data for entry in await log.read(generation_id)][2:] == events

    async def entry() -> bool:
        found = await log.entry(generation_id, f"{epoch}-2")
        return found is not None and (found.position, found.data) == ((epoch, 2), events[1])

    async def order() -> bool:
        found = await log.order(generation_id)
        return found is not None and found.model == f"model-{generation_id}"

    async def orders() -> bool:
        return [one.id + one.model for one in await log.orders([generation_id] * 3)] == [
            f"{generation_id}model-{generation_id}"
        ] * 3

    async def append() -> bool:  # a repeat: it changes nothing, and answers how many there were
        return [one.code for one in await log.append([Append(generation_id, epoch, 1, events)] * 2)] == ["OK"] * 2

    async def gap() -> bool:  # answers the last seq of this log
        return await log.append([Append(generation_id, epoch, 9, events)]) == [("GAP", 3)]

    return [read, entry, order, orders, append, gap]


@pytest.mark.parametrize("connections", [1, 4], ids=["the worker's writer", "the api"])
async def test_a_cancelled_callers_reply_is_read_by_nobody_else(
    redis_url: str, key_prefix: str, connections: int
) -> None:
    """50,000 calls cancelled at random moments over so few connections: every answer that is given is of its question,
    and no connection is lost from the pool."""
    chance = random.Random(connections)
    client: Redis = connect(redis_url, connections=connections)
    checks = await prepared(EventLog(client, Settings(_env_file=None, redis_url=redis_url, key_prefix=key_prefix)))
    seen: Counter[str] = Counter()

    async def hurried() -> None:
        while seen["cancelled"] < CALLS // 2:
            check = chance.choice(checks)
            call = asyncio.ensure_future(check())
            for _ in range(chance.randrange(TURNS)):
                await asyncio.sleep(0)
            call.cancel()
            try:
                seen["right" if await call else f"wrong {check.__name__}"] += 1
            except asyncio.CancelledError:
                seen["cancelled"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8 * connections):
            group.create_task(hurried())
    assert set(seen) == {"right", "cancelled"}, seen
    assert seen["right"] > CALLS / 100, "hardly any call was given the time to be answered"
    async with asyncio.timeout(20):
        assert all(await asyncio.gather(*(check() for check in checks)))
    await client.aclose()
