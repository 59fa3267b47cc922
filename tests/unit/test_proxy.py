"""The fault proxy of the tests: each of its switches does what it says, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeAlias

import pytest

from tests.proxy import Proxy
from tests.waiting import wait_until


class Echo:
    """A server that answers each line with itself, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                self.asked.append(line)
                writer.write(line)
        writer.transport.abort()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    one = Echo()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    yield one
    server.close()


class Caller:
    """A client of the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def asks(self, line: bytes) -> bytes:
        self.writer.write(line)
        return await asyncio.wait_for(self.hears(), 5)

    async def hears(self) -> bytes:
        """A line, or nothing when the connection broke."""
        try:
            return await self.reader.readline()
        except ConnectionError:
            return b""


Call: TypeAlias = Callable[[Proxy], Awaitable[Caller]]


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    """Opens a connection through a proxy; all are closed in the end."""
    callers: list[Caller] = []

    async def one_more(proxy: Proxy) -> Caller:
        callers.append(Caller(*await asyncio.open_connection("127.0.0.1", proxy.port)))
        return callers[-1]

    yield one_more
    for caller in callers:
        caller.writer.transport.abort()
    await asyncio.sleep(0)


async def test_everything_passes_until_a_switch_is_set(echo: Echo, call: Call) -> None:
    """And a client that leaves is seen to leave."""
    async with Proxy(echo.port) as proxy:
        caller = await call(proxy)
        assert await caller.asks(b"one\n") == b"one\n"
        caller.writer.close()
        await wait_until(lambda: proxy.open_connections == 0)


@pytest.mark.parametrize(("direction", "arrives"), [("up", False), ("down", True)])
async def test_frozen_bytes_come_later_and_are_not_lost(echo: Echo, call: Call, direction: str, arrives: bool) -> None:
    """One way: the server is asked, or it is not; the answer comes when all flows again."""
    async with Proxy(echo.port) as proxy:
        caller = await call(proxy)
        assert await caller.asks(b"one\n") == b"one\n"
        proxy.freeze(direction)  # type: ignore[arg-type]
        caller.writer.write(b"two\n")
        heard = asyncio.create_task(caller.hears())
        if arrives:
            await wait_until(lambda: b"two\n" in echo.asked)
        done, _ = await asyncio.wait([heard], timeout=0.2)
        assert not done and (b"two\n" in echo.asked) == arrives
        proxy.thaw()
        assert await heard == b"two\n"


async def test_what_a_client_sent_before_it_left_arrives_after_a_freeze(echo: Echo, call: Call) -> None:
    """As late packets do: the server does what nobody waits for any more."""
    async with Proxy(echo.port) as proxy:
        caller = await call(proxy)
        proxy.freeze()
        caller.writer.write(b"late\n")
        await caller.writer.drain()
        await wait_until(lambda: proxy.open_connections == 1)
        caller.writer.close()
        proxy.thaw()
        await wait_until(lambda: echo.asked == [b"late\n"])


async def test_a_dropped_reply_is_to_a_request_that_was_done(echo: Echo, call: Call) -> None:
    """The marked request reaches the server, its answer does not reach the client, and the connection is gone."""
    async with Proxy(echo.port) as proxy:
        proxy.drop_replies(1, to=b"write")
        caller = await call(proxy)
        assert await caller.asks(b"read\n") == b"read\n"
        assert await caller.asks(b"write\n") == b""
        assert echo.asked == [b"read\n", b"write\n"] and proxy.dropped == 1
        again = await call(proxy)
        assert await again.asks(b"write\n") == b"write\n"


async def test_cut_connections_are_broken_and_new_ones_are_not(echo: Echo, call: Call) -> None:
    """All that are open, at once."""
    async with Proxy(echo.port) as proxy:
        callers = [await call(proxy) for _ in range(3)]
        for caller in callers:
            assert await caller.asks(b"one\n") == b"one\n"
        assert proxy.cut() == 3
        assert [await caller.hears() for caller in callers] == [b"", b"", b""]
        assert await (await call(proxy)).asks(b"two\n") == b"two\n"


async def test_a_black_hole_takes_connections_and_says_nothing(echo: Echo, call: Call) -> None:
    """For those that come while it is there; it never reaches the server."""
    async with Proxy(echo.port) as proxy:
        before = await call(proxy)
        assert await before.asks(b"one\n") == b"one\n"
        proxy.black_hole = True
        swallowed = await call(proxy)
        swallowed.writer.write(b"two\n")
        done, _ = await asyncio.wait([heard := asyncio.create_task(swallowed.hears())], timeout=0.2)
        assert not done
        assert await before.asks(b"three\n") == b"three\n"
        proxy.cut()
        assert await heard == b"" and echo.asked == [b"one\n", b"three\n"]


async def test_a_slow_network_delays_both_ways(echo: Echo, call: Call) -> None:
    """A round trip takes at least twice the delay."""
    async with Proxy(echo.port, delay_seconds=0.05) as proxy:
        caller = await call(proxy)
        clock = asyncio.get_running_loop().time
        started = clock()
        assert await caller.asks(b"one\n") == b"one\n"
        assert clock() - started >= 0.1


async def test_a_cut_after_so_many_bytes_gives_exactly_those(echo: Echo, call: Call) -> None:
    """And then the end."""
    async with Proxy(echo.port, cut_after=6) as proxy:
        caller = await call(proxy)
        caller.writer.write(b"one\ntwo\n")
        assert await asyncio.wait_for(caller.reader.read(), 5) == b"one\ntw"
        assert proxy.cuts == 1
