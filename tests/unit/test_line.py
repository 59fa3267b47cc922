"""A line to Redis: the script's answer and no other, whatever becomes of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from shared.event_log import new_id
from shared.redis import Client, connect
from tests.processes import Valkey
from tests.proxy import Proxy
from worker.line import Line

ECHO = "return {ARGV[1], #KEYS, ARGV[2]}"


@pytest.fixture
async def proxy(server: Valkey) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as one:
        yield one


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    one = connect(f"redis://127.0.0.1:{proxy.port}/9", connections=1, timeout_seconds=0.3, retries=1)
    yield one
    await one.aclose()


def script(source: str = ECHO) -> AsyncScript:
    return AsyncScript(cast(Client, None), source.encode())


async def echo(line: Line, client: Client, word: str) -> Any:
    return await line.run(client, script(), ["{a}k"], [word, 7])


async def test_a_script_is_loaded_where_it_is_not_known_and_run(client: Client) -> None:
    """The first question of all is answered like every other; strings, numbers and bytes arrive as they are."""
    async with aclosing(Line()) as line:
        unknown = script(f"{ECHO} -- {new_id()}")
        assert await line.run(client, unknown, ["{a}k"], ["é", 7]) == ["é".encode(), 1, b"7"]
        assert await line.run(client, unknown, [], [b"\r\n\x00", "x" * 100_000]) == [b"\r\n\x00", 0, b"x" * 100_000]


async def test_an_error_of_the_script_is_told_and_the_next_question_answered(client: Client) -> None:
    """What Redis refuses is redis-py's error, and costs no connection."""
    async with aclosing(Line()) as line:
        await echo(line, client, "a")
        before = (await client.info("stats"))["total_connections_received"]
        with pytest.raises(ResponseError):
            await line.run(client, script("return redis.error_reply('NO')"), [], [])
        assert (await echo(line, client, "b"))[0] == b"b"
        assert (await client.info("stats"))["total_connections_received"] == before


async def test_a_broken_connection_is_opened_again(client: Client, proxy: Proxy) -> None:
    """A connection that broke while nothing was asked costs no answer."""
    async with aclosing(Line()) as line:
        await echo(line, client, "a")
        proxy.cut()
        assert (await echo(line, client, "b"))[0] == b"b"


async def test_a_late_answer_is_not_the_next_ones(client: Client, proxy: Proxy) -> None:
    """A question that took too long is an error, and what comes after all is heard by nobody."""
    async with aclosing(Line()) as line:
        await echo(line, client, "a")
        proxy.freeze("down")
        with pytest.raises(TimeoutError):
            await echo(line, client, "late")
        proxy.thaw()
        assert (await echo(line, client, "b"))[0] == b"b"


async def test_who_is_cancelled_leaves_no_answer_behind(client: Client, proxy: Proxy) -> None:
    """A question that nobody waits for any more is not answered to who asks next."""
    async with aclosing(Line()) as line:
        await echo(line, client, "a")
        proxy.freeze("down")
        asking = asyncio.create_task(echo(line, client, "cancelled"))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        proxy.thaw()
        assert (await echo(line, client, "b"))[0] == b"b"


async def test_a_line_leads_to_who_is_asked(client: Client, server: Valkey) -> None:
    """Where another server is in charge, the line goes there."""
    other = connect(f"{server.url.rsplit('/', 1)[0]}/8", connections=1)
    which = script("redis.call('SET', 'line', ARGV[1], 'PX', 60000) return ARGV[1]")
    async with aclosing(Line()) as line, other:
        await line.run(client, which, ["line"], ["nine"])
        await line.run(other, which, ["line"], ["eight"])
        assert (await client.get("line"), await other.get("line")) == (b"nine", b"eight")
        await client.delete("line")
        await other.delete("line")


async def test_no_redis_is_a_connection_error() -> None:
    """Who asks where nobody answers is told so, as by redis-py."""
    nobody = connect("redis://127.0.0.1:1/0", connections=1, retries=0)
    async with aclosing(Line()) as line, nobody:
        with pytest.raises(ConnectionError):
            await echo(line, nobody, "a")
