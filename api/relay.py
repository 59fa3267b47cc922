"""Follow one log through one dialect to one client: resume, heartbeat, send. Knows nothing of what is being said, or of
who is asking.

A client is a cursor: what it has not taken yet stays in the log. It has `send_timeout_seconds` to take what was sent.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.frames import Dialect, Ending
from api.tail import FIRST_PAGE, NEVER, Gone, Reader, Tail, just_before
from shared import metrics
from shared.config import Settings
from shared.event_log import Order, gone
from shared.events import Entry, Position, Snapshot, format_id, is_terminal

DRAIN_SPREAD_SECONDS = 2.0  # over which the open streams of a stopping server are ended
SYSTEM_UNSENT_BYTES = 128 * 1024  # that the system takes for one client; by itself it would take megabytes
MAX_UNSENT_BYTES = 0  # beyond what the system takes: a client is waited for before it is sent more
TRANSPORT = "rejoin.transport"  # where app.py leaves the server's transport in the scope
RELAYING = "rejoin.relaying"  # the list in which a relay leaves what is to be awaited once the routes have returned


class AtEnd(Exception):
    """The cursor is the terminal event: there is nothing more, and never will be."""


@dataclass(frozen=True)
class Opening:
    """A reader set on its way, and the id it says it began from."""

    reader: Reader
    resumed_from: str


async def open_reader(tail: Tail, order: Order, cursor: Position | None, *, resumed: bool = False) -> Opening:
    """Set a reader on its way, to be closed by who asked. `resumed` is for the metrics: it says that it came back.

    Raises Gone (of shared.errors) when the log is no more, AtEnd when the cursor is the terminal event."""
    reader = Reader(tail, order)
    try:
        if not order.ended:
            await tail.follow(reader, order)
        resumed_from = await _place(reader, order, cursor)
    except BaseException:
        await reader.aclose()
        raise
    metrics.READERS_STARTED.labels("yes" if resumed else "no").inc()
    return Opening(reader, resumed_from)


async def _place(reader: Reader, order: Order, cursor: Position | None) -> str:
    """Find where a reader goes on from, by the cursor table of docs/protocol.md; the id it says it began from.

    One look at the log, once the subscription stands: a fresh start may have come before that."""
    seen = await reader.event_log.look(order.id, _text(cursor) if cursor else "-", FIRST_PAGE)
    last, newest = seen.tail, (seen.order or order).fresh
    if last is None:
        raise gone(order)
    if reader.feed is not None:
        reader.feed.prime(last)
    if cursor is None:
        _place_at_the_start(reader, seen.page, newest)
        return "0-1"
    if cursor == last.position and is_terminal(last.data):
        raise AtEnd
    if cursor > last.position and reader.feed is not None and not is_terminal(last.data):
        reader.cursor, reader.ahead_of = cursor, last.position
        return _text(cursor)
    if seen.page and seen.page[0].position == cursor and (newest is None or cursor >= (newest, 0)):
        reader.cursor, reader.page = cursor, seen.page[1:]
        return _text(cursor)
    reader.cursor = just_before((newest, 0)) if newest else NEVER
    return _text((newest, 0) if newest else (0, 1))


def _place_at_the_start(reader: Reader, page: list[Entry], newest: int | None) -> None:
    """Entry `0-1`, then from the newest fresh start: what earlier attempts said is void."""
    if newest is None:
        reader.page = page
    else:
        reader.prefix = [entry for entry in page[:1] if entry.position == (0, 1)]
        reader.cursor = just_before((newest, 0))


def _text(position: Position) -> str:
    return format_id(position).decode()


class Drained(Protocol):
    """What is told that the server is going down."""

    def drain(self) -> None: ...


@dataclass
class Drain:
    """Tells every open relay that the server is going down, spread over a moment so that not all come back at once."""

    begun: bool = False
    relays: set[Drained] = field(default_factory=set)

    def begin(self) -> None:
        if self.begun:
            return
        self.begun = True
        loop = asyncio.get_running_loop()
        for relay in self.relays:
            loop.call_later(random.uniform(0, DRAIN_SPREAD_SECONDS), relay.drain)


class _NoBody:
    """The body iterator of a relay, which sends its body itself."""

    def __aiter__(self) -> _NoBody:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


NO_BODY = _NoBody()


class Watch:
    """Tells who follows a log that its client has left, or that the server is going down; either wakes the reader."""

    def __init__(self, reader: Reader, drain: Drain) -> None:
        self.client_left = False
        self.is_draining = False
        self._reader = reader
        self._drain = drain

    @asynccontextmanager
    async def kept(self, receive: Receive) -> AsyncIterator[None]:
        """For as long as the log is followed. One small task waits for the client to leave."""
        listening = asyncio.create_task(self._listen(receive))
        self._drain.relays.add(self)
        if self._drain.begun:
            self.drain()
        try:
            yield
        finally:
            self._drain.relays.discard(self)
            listening.cancel()

    def drain(self) -> None:
        self.is_draining = True
        self._reader.wake()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        self._reader.wake()


class Said(NamedTuple):
    """What a client is sent, and why the stream ends behind it, if it does."""

    body: bytes = b""
    ending: Ending | None = None

    @property
    def is_over(self) -> bool:
        return self.ending is not None


NOTHING = Said()


class Relay(StreamingResponse):
    """A StreamingResponse that sleeps until its client leaves, and is written to by the feed.

    A client that has had all there is gets what is new straight from the feed, and no task is woken for it. One that
    has to catch up, that does not take what it is sent, or whose stream is over, has a task of its own for so long.
    From the moment it is called it owns the reader."""

    _send: Callable[[Message], Coroutine[Any, Any, None]]

    def __init__(
        self,
        opening: Opening,
        dialect: Dialect,
        drain: Drain,
        settings: Settings,
        *,
        headers: dict[str, str],
        greeting: bytes = b"",
    ) -> None:
        super().__init__(NO_BODY, media_type=dialect.media_type, headers=headers)
        self._reader = opening.reader
        self._dialect = dialect
        self._drain = drain
        self._settings = settings
        self._held = Said(greeting)  # what is to be said next
        self._is_draining = False
        self._error: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self._owner: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._spoke_at = 0.0  # monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin the answer, and leave it to app.py to `run` the rest when all that is around a route has returned: for
        each stream that is open the frames of routing, validation and middleware would cost more memory than itself."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self.raw_headers = []
        self._transport = scope.get(TRANSPORT)
        _keep_little(self._transport)
        relaying = scope.get(RELAYING)
        if relaying is None:  # another application around the routes
            await self.run(receive, send)
        else:
            relaying.append(self)

    async def run(self, receive: Receive, send: Send) -> None:
        """Relay until the end of the log, of the client or of the server. Raises what nobody expected."""
        self._send, self._owner = cast(Any, send), asyncio.current_task()
        self._drain.relays.add(self)
        if self._drain.begun:
            self.drain()
        self._wake_pump()
        try:
            while (await receive())["type"] != "http.disconnect":  # also once the answer is complete
                pass
        except asyncio.CancelledError:
            if self._error is None:
                raise
        finally:
            await self.aclose()
        if self._error is not None:
            raise self._error

    async def aclose(self) -> None:
        """Stop, wherever it stands."""
        self._drain.relays.discard(self)
        self._reader.on_news = None
        if self._timer is not None:
            self._timer.cancel()
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        await self._reader.aclose()

    def drain(self) -> None:
        """The server is going down: end the stream, so that its client comes back elsewhere."""
        self._is_draining = True
        self._reader.wake()
        self._wake_pump()

    # --- a client that has had all there was

    def _leave_to_the_feed(self) -> None:
        self._pump, self._reader.on_news = None, self._on_news
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._settings.ping_seconds, self._ping_when_silent)

    def _on_news(self, entries: list[Entry]) -> bool:
        """Write what is new, if the client has taken all before; what takes longer is for the pump. True: taken."""
        try:
            if not entries or not self._has_taken_all():
                self._wake_pump()
                return False
            said = self._render(entries)
            if said.is_over or not said.body or not self._write(said.body):
                self._held = said
                self._wake_pump()
        except Exception as error:  # the feed goes on for the others
            self._break_off(error)
        return True

    def _has_taken_all(self) -> bool:
        return self._transport is not None and not self._transport.get_write_buffer_size()

    def _write(self, body: bytes) -> bool:
        """Write without waiting. False if the server would wait: it does before it takes anything."""
        sending = self._send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            sending.send(None)
        except StopIteration:
            self._spoke_at = time.monotonic()
            return True
        sending.close()
        return False

    def _ping_when_silent(self) -> None:
        left = self._spoke_at + self._settings.ping_seconds - time.monotonic()
        if left <= 0 and self._pump is None:  # the pump pings by itself
            self._held, left = Said(self._dialect.ping()), self._settings.ping_seconds
            self._wake_pump()
        self._timer = asyncio.get_running_loop().call_later(max(left, 0.1), self._ping_when_silent)

    # --- a client that has to catch up

    def _wake_pump(self) -> None:
        self._reader.on_news = None
        if self._pump is None:
            self._pump = asyncio.create_task(self._run_pump())

    async def _run_pump(self) -> None:
        try:
            await self._catch_up()
        except Exception as error:
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        """The client does not take what it was sent, or its socket broke; anything else is for `run` to raise."""
        metrics.READERS_TIMED_OUT.inc(isinstance(error, TimeoutError))
        if not isinstance(error, OSError):
            self._error = error
        self._abort()

    async def _catch_up(self) -> None:
        """Say all there is, until the client is level with the log or the stream is over."""
        while not await self._say(self._held):
            if self._is_draining:
                self._held = self._early(Ending.DRAINING)
            elif self._reader.is_level:
                self._leave_to_the_feed()
                return
            else:
                self._held = await self._next()

    async def _next(self) -> Said:
        try:
            entries = await self._reader.next(self._settings.ping_seconds)
        except Gone:
            return self._early(Ending.GONE)
        if entries or self._is_draining:
            return self._render(entries)
        return Said(self._dialect.ping())

    async def _say(self, said: Said) -> bool:
        """Send it. True if the stream is over."""
        self._held = NOTHING
        if said.ending is Ending.ABORT:
            await self._send_body(said.body)
            self._abort()
        elif said.is_over:
            async with asyncio.timeout(self._settings.send_timeout_seconds):
                await self._send({"type": "http.response.body", "body": said.body, "more_body": False})
        else:
            await self._send_body(said.body)
        return said.is_over

    async def _send_body(self, body: bytes) -> None:
        if not body:
            return
        message: Message = {"type": "http.response.body", "body": body, "more_body": True}
        self._spoke_at = time.monotonic()
        if self._has_taken_all():  # then nothing is waited for, and a time-out costs as much as the rest
            await self._send(message)
            return
        async with asyncio.timeout(self._settings.send_timeout_seconds):
            await self._send(message)

    # --- what is said

    def _render(self, entries: list[Entry]) -> Said:
        body, ending = self._dialect.render(entries)
        if ending is None and entries and is_terminal(entries[-1].data):
            ending = Ending.STOP
        return Said(body, ending)

    def _early(self, ending: Ending) -> Said:
        """The last words of a stream that has to stop early, if its protocol has any; else it is broken off."""
        last_words = self._dialect.ending(ending, jittered(self._settings.retry_milliseconds))
        return Said(b"", Ending.ABORT) if last_words is None else Said(last_words, ending)

    def _abort(self) -> None:
        """Break the connection off, so that the client sees that the body is not complete.

        ASGI has no word for it. Closing politely would wait for a client that never reads, so the transport is aborted
        where the server lets us have it; elsewhere an error makes the server close the connection."""
        self._reader.on_news = None
        if self._transport is not None:
            self._transport.abort()
        elif self._owner is not None:
            self._error = self._error or ConnectionAbortedError("the stream had to stop before its end")
            self._owner.cancel()


class Whole(Response):
    """Waits for the end of a log and answers once, with what `build` makes of its snapshot (or of an early ending)."""

    def __init__(self, reader: Reader, drain: Drain, build: Callable[[Snapshot | Ending], Response]) -> None:
        super().__init__()
        self._reader = reader
        self._watch = Watch(reader, drain)
        self._build = build

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._reader), self._watch.kept(receive):
            answer = self._build(await self._collect())
        if not self._watch.client_left:
            await answer(scope, receive, send)

    async def _collect(self) -> Snapshot | Ending:
        snapshot = Snapshot()
        while not self._watch.client_left:
            try:
                entries = await self._reader.next(timeout_seconds=60)
            except Gone:
                return Ending.GONE
            for entry in entries:
                snapshot.add(entry)
            if entries and is_terminal(entries[-1].data):
                return snapshot
            if self._watch.is_draining:
                return Ending.DRAINING
        return Ending.ABORT


def jittered(milliseconds: int) -> int:
    """Around the given time, half to one and a half of it: clients that left together do not come back together."""
    return round(milliseconds * random.uniform(0.5, 1.5))


def _keep_little(transport: asyncio.Transport | None) -> None:
    """Have the server's `send` wait earlier than it would by itself: what a client has not taken stays in the log."""
    if transport is not None:
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SYSTEM_UNSENT_BYTES)
