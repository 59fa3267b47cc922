"""A queue that is full refuses what is new, and leaves no trace of it."""

from __future__ import annotations

import asyncio

import httpx2
from redis.asyncio import Redis

from tests.processes import Valkey
from tests.stack import Stack
from tests.waiting import wait_until


async def post(stack: Stack, api: int = 0, key: str | None = None) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key else {}
    url = stack.apis[api].url + "/v1/generations"
    return await stack.http.post(url, json={"model": "demo", "prompt": "hello"}, headers=headers)


async def test_no_more_wait_than_are_let_in(stack: Stack, server: Valkey) -> None:
    """Of forty at once over two apis five are taken, and what was refused has no order, no log, no lease, no line."""
    for _ in range(2):
        await stack.api(REJOIN_MAX_QUEUED="5")
    answers = await asyncio.gather(*(post(stack, n % 2) for n in range(40)))
    taken = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) == 5 and len(refused) == 35
    assert {answer.json()["code"] for answer in refused} == {"queue_full"}
    listed = (await stack.http.get(stack.apis[0].url + "/v1/generations")).json()["data"]
    assert {one["id"] for one in listed} == taken
    prefix = stack.env["REJOIN_KEY_PREFIX"]
    async with Redis.from_url(server.url, decode_responses=True) as redis:
        for kind in ("order", "log"):
            keys = [key async for key in redis.scan_iter(f"{prefix}:*:{kind}:*", count=1000)]
            assert {key.rpartition(":")[2] for key in keys} == taken
        leases = [await redis.zrange(f"{prefix}:{{{digit}}}:leases", 0, -1) for digit in "0123456789abcdef"]
        assert {one for some in leases for one in some} == taken


async def test_a_known_key_is_answered_by_a_full_queue_and_a_new_one_is_not(stack: Stack) -> None:
    """A repeat asks for nothing new. Once a worker has made room, what was refused is taken, by the same api."""
    await stack.api(REJOIN_MAX_QUEUED="1")
    first = await post(stack, key="one")
    assert first.status_code == 202
    assert [(await post(stack)).status_code for _ in range(3)] == [429] * 3
    assert (await post(stack, key="two")).status_code == 429
    again = await post(stack, key="one")
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    await stack.worker()
    assert (await stack.finished(first.json()))["status"] == "completed"

    async def is_taken() -> bool:
        return (await post(stack)).status_code == 202

    assert await wait_until(is_taken, timeout=10)
    assert (await post(stack, key="two")).status_code == 202
