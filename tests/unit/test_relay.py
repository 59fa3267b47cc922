"""The short way from a push to a socket, and the ways off it: a real log and tail, a real Valkey, a made-up server.

The server is all that is made up: it says how much its client has taken, and keeps what it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api.dialects.native import Native
from api.relay import Drain, Relay, open_reader
from api.tail import Tail
from shared.cluster import OneServer
from shared.config import Settings
from shared.event_log import Append, Claim, EventLog, Hint, new_id
from shared.events import Completed, TextDelta, encode
from shared.prompt import Prompt
from shared.redis import connect
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio


class Server:
    """One connection of an ASGI server: `unsent` bytes are waiting for the client, `sends` is what each send held."""

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.unsent = 0
        self.is_aborted = False
        self.is_complete = False
        self.taken = asyncio.Event()  # the client has taken what was unsent
        self._gone = asyncio.Event()

    async def send(self, message: Any) -> None:
        while self.unsent:
            await self.taken.wait()
        if message["type"] == "http.response.body":
            self.sends.append(message["body"])
            if not message.get("more_body"):
                self.is_complete = True
                self._gone.set()

    async def receive(self) -> Any:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._gone.set()

    def abort(self) -> None:
        self.is_aborted = True
        self._gone.set()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return self

    def setsockopt(self, *option: int) -> None:
        pass

    @property
    def body(self) -> bytes:
        return b"".join(self.sends)


class House:
    """A log with a running attempt, a tail that follows it, and the clients of one api."""

    def __init__(self, log: EventLog, tail: Tail, settings: Settings, claim: Claim) -> None:
        self.log, self.tail, self.settings, self.claim = log, tail, settings, claim
        self.drain = Drain()
        self.written = 0
        self.running: list[asyncio.Task[None]] = []

    async def write(self, *texts: str) -> None:
        """Append these, as one push."""
        await self._append([encode(TextDelta(text)) for text in texts])

    async def finish(self) -> None:
        await self._append([encode(Completed("stop"))], "completed")

    async def _append(self, events: list[bytes], final: Any = None) -> None:
        append = Append(self.claim.generation_id, self.claim.epoch, self.written + 1, events, final)
        (answer,) = await self.log.append([append])
        assert answer.code == "OK"
        self.written += len(events)

    async def client(self, dialect: Any = None, *, transport: bool = True) -> tuple[Server, Relay]:
        """A client that has been sent all there is."""
        order = await self.log.order(self.claim.generation_id)
        assert order is not None
        opening = await open_reader(self.tail, order, None)
        server = Server()
        response = Relay(opening, dialect or Native(), self.drain, self.settings, headers={})
        relaying: list[Relay] = []
        scope = {"rejoin.transport": server if transport else None, "rejoin.relaying": relaying}
        await response(scope, server.receive, server.send)
        assert relaying == [response]
        self.running.append(asyncio.create_task(response.run(server.receive, server.send)))
        await wait_until(lambda: server.body.count(b"\n\n") >= self.written + 2 and response._pump is None)
        return server, response


def texts(server: Server) -> list[str]:
    """What the client was told, in order."""
    said = (line.partition(b'"text":"')[2] for line in server.body.split(b"\n"))
    return [text.partition(b'"')[0].decode() for text in said if text]


@asynccontextmanager
async def house(settings: Settings) -> AsyncIterator[House]:
    url = settings.redis_url
    client, subscriber = connect(url, connections=4), connect(url, connections=1, timeout_seconds=None)
    log = EventLog(client, settings)
    tail = Tail(OneServer(subscriber), log, 5)
    follows = asyncio.create_task(tail.run())
    generation_id = new_id()
    prompt = Prompt(model="demo", messages=[{"role": "user", "content": "hello"}])
    await log.create(generation_id, tenant="t", provider="demo", prompt=prompt)
    claim = await log.claim(Hint(generation_id, 0, 1), new_id())
    assert claim is not None
    home = House(log, tail, settings, claim)
    try:
        yield home
    finally:
        for task in (*home.running, follows):
            task.cancel()
        await asyncio.gather(*home.running, follows, return_exceptions=True)
        await client.aclose()
        await subscriber.aclose()


async def test_news_go_to_a_client_that_keeps_up_without_a_task(settings: Settings) -> None:
    """Each push is one send, and nothing is kept in memory."""
    async with house(settings) as home:
        server, relay = await home.client()
        before = len(server.sends)
        await home.write("a")
        await wait_until(lambda: texts(server) == ["a"])
        await home.write("b", "c")
        await wait_until(lambda: texts(server) == ["a", "b", "c"])
        assert len(server.sends) == before + 2 and relay._pump is None
        feed = relay._reader.feed
        assert feed is not None and feed._window is None and feed.floor == feed.last


async def test_a_client_that_does_not_take_what_it_is_sent_gets_all_of_it_later(settings: Settings) -> None:
    """While it is behind, what comes waits for it, and the other clients do not."""
    async with house(settings) as home:
        slow, _ = await home.client()
        quick, _ = await home.client()
        slow.unsent = 1000
        for text in ("a", "b", "c"):
            await home.write(text)
        await wait_until(lambda: texts(quick) == ["a", "b", "c"])
        assert texts(slow) == []
        slow.unsent = 0
        slow.taken.set()
        await wait_until(lambda: texts(slow) == ["a", "b", "c"])
        await home.write("d")
        await wait_until(lambda: texts(slow) == texts(quick) == ["a", "b", "c", "d"])


async def test_a_push_too_large_for_one_send_is_read_bit_by_bit(settings: Settings) -> None:
    """What a client that never reads would cost is bounded."""
    async with house(settings) as home:
        server, _ = await home.client()
        long = [str(n) * 5000 for n in range(10)]
        await home.write(*long)
        await wait_until(lambda: texts(server) == long)
        assert max(map(len, server.sends)) < 25_000


async def test_what_a_page_gave_is_not_told_again(settings: Settings) -> None:
    """A reader may have read further in the log than the subscription has come."""
    async with house(settings) as home:
        await home.write("a", "b")
        server, relay = await home.client()
        reader, feed = relay._reader, relay._reader.feed
        assert feed is not None and reader.is_level
        epoch, seq = reader.cursor
        feed.last, feed.floor, feed._last_id = (epoch, seq - 1), (epoch, seq - 1), b""
        assert not reader.is_level
        reader.on_news = None
        relay._wake_pump()
        await home.write("c")
        await wait_until(lambda: texts(server) == ["a", "b", "c"])
        await wait_until(lambda: relay._pump is None)
        await home.write("d")
        await wait_until(lambda: texts(server) == ["a", "b", "c", "d"])


async def test_the_end_completes_the_answer(settings: Settings) -> None:
    """The terminal event is the last bytes of a body that is complete, and the reader is gone."""
    async with house(settings) as home:
        server, _ = await home.client()
        await home.write("a")
        await home.finish()
        await asyncio.wait_for(home.running[0], 5)
        assert server.is_complete and not server.is_aborted
        assert b"generation.completed" in server.sends[-1]
        assert not home.tail._feeds and not home.drain.relays


async def test_a_client_that_leaves_ends_its_feed(settings: Settings) -> None:
    """Nothing is left of it, whether it was level or behind."""
    async with house(settings) as home:
        level, _ = await home.client()
        behind, relay = await home.client()
        behind.unsent = 1000
        await home.write("a")
        await wait_until(lambda: relay._pump is not None)
        level.leave()
        behind.leave()
        await asyncio.wait_for(asyncio.gather(*home.running), 5)
        assert not home.tail._feeds and not home.drain.relays and relay._timer is not None and relay._timer.cancelled()


class Broken(Native):
    """A dialect with a mistake in it."""

    def render(self, entries: Any) -> Any:
        if any(b"poison" in entry.data for entry in entries):
            raise LookupError("a mistake")
        return super().render(entries)


async def test_a_mistake_in_rendering_breaks_off_that_stream_alone(settings: Settings) -> None:
    """The others go on, the mistake is raised where the server sees it, and the body does not look complete."""
    async with house(settings) as home:
        bad, _ = await home.client(Broken())
        good, _ = await home.client()
        await home.write("poison")
        await home.write("fine")
        await wait_until(lambda: texts(good) == ["poison", "fine"])
        with pytest.raises(LookupError):
            await asyncio.wait_for(home.running[0], 5)
        assert bad.is_aborted and not bad.is_complete and texts(bad) == []


async def test_a_server_that_hides_its_transport_is_served_by_the_pump(settings: Settings) -> None:
    """Slower, and the same words; where the stream has to be broken off, an error says so."""
    async with house(settings) as home:
        server, _ = await home.client(Broken(), transport=False)
        await home.write("a")
        await home.write("b")
        await wait_until(lambda: texts(server) == ["a", "b"])
        await home.write("poison")
        with pytest.raises(LookupError):
            await asyncio.wait_for(home.running[0], 5)
        assert not server.is_complete


async def test_a_server_that_goes_down_tells_a_client_that_is_level(settings: Settings) -> None:
    """It ends its stream properly, with the time after which to come back."""
    async with house(settings) as home:
        server, relay = await home.client()
        relay.drain()
        await asyncio.wait_for(home.running[0], 5)
        assert server.is_complete and b"retry: " in server.sends[-1]


async def test_a_silent_stream_is_pinged(settings: Settings) -> None:
    """A ping comes when nothing was said for so long, and not after each word."""
    async with house(settings) as home:
        home.settings = home.settings.model_copy(update={"ping_seconds": 0.3})
        server, _ = await home.client()
        await wait_until(lambda: server.body.count(b":\n\n") >= 2)
        await home.write("a")
        await wait_until(lambda: texts(server) == ["a"])
