"""The tail: a push is only a copy. Whatever happens to the subscription, readers get the log."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from shared.redis import Keys
from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until


async def test_a_subscription_cut_again_and_again_loses_nothing(stack: Stack, upstream: Upstream, redis: Redis) -> None:
    """Redis ends the subscriber's connection ten times mid-stream: readers stay connected and miss no position."""
    script = Script(count=200, pace_seconds=0.01)
    upstream.script("unsubscribed", script)
    await stack.api()
    await stack.worker()
    generations = [await stack.create("unsubscribed") for _ in range(10)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    for n in range(10):
        await wait_until(lambda n=n: len(readers[0].blocks) > 15 * (n + 1))
        await redis.client_kill_filter(_type="pubsub")
    await asyncio.gather(*reading)
    for reader in readers:
        check_history(reader.blocks)
        assert len(reader.responses) == 1
        assert reader.text == script.text("hello")


async def test_a_push_of_another_generation_is_never_delivered(house: Stack, upstream: Upstream, redis: Redis) -> None:
    """A payload on the wrong channel, or out of order, changes nothing that a reader sees."""
    script = Script(count=100, pace_seconds=0.02)
    upstream.script("foreign", script)
    generation = await house.create("foreign")
    reader = house.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 10)
    channel = Keys(house.env["REJOIN_KEY_PREFIX"]).push(generation["id"])
    other = "0" * 32
    last = reader.last_event_id
    await redis.publish(channel, f'{other} {last}\n{last[:-1]}999 {{"type":"text.delta","text":"secret of another"}}')
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello")


async def test_a_flushed_store_is_noticed_within_seconds(stack: Stack, upstream: Upstream, redis: Redis) -> None:
    """When a log is gone its readers are told to come back, and then that it is no more; the worker stops."""
    upstream.script("flushed", Script(count=20, stall_at=5))
    api = await stack.api()
    await stack.worker()
    generation = await stack.create("flushed")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.connect())
    await wait_until(lambda: len(reader.blocks) > 5)
    keys = Keys(stack.env["REJOIN_KEY_PREFIX"])
    await redis.delete(keys.log(generation["id"]), keys.order(generation["id"]))
    response = await asyncio.wait_for(reading, 5)
    assert response.clean and len(reader.retries) == 2
    assert (await Reader(api.url + generation["events_url"]).connect()).status == 404
    await upstream.wait_closed("flushed")


async def test_a_log_that_expires_under_a_reader_is_410(stack: Stack, upstream: Upstream, redis: Redis) -> None:
    """The order outlives the log: whoever waited is sent away, and told the outcome when asking again."""
    upstream.script("expired", Script(count=20, stall_at=5))
    api = await stack.api()
    await stack.worker()
    generation = await stack.create("expired")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.connect())
    await wait_until(lambda: len(reader.blocks) > 5)
    await redis.pexpire(Keys(stack.env["REJOIN_KEY_PREFIX"]).log(generation["id"]), 1)
    await asyncio.wait_for(reading, 5)
    again = await Reader(api.url + generation["events_url"]).connect()
    assert again.status == 410
