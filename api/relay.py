"""Follow one log through one dialect to one client: resume, heartbeat, send. Knows nothing of what is being said, or of
who is asking.

A client is a cursor: what it has not taken yet stays in the log. It has `send_timeout_seconds` to take what was sent.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.frames import Dialect, Ending
from api.tail import NEVER, Gone, Reader, Tail, just_before
from shared import metrics
from shared.config import Settings
from shared.event_log import EventLog, Order, gone
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


async def open_reader(
    stack: AsyncExitStack,
    tail: Tail,
    event_log: EventLog,
    order: Order,
    cursor: Position | None,
    *,
    resumed: bool = False,
) -> Opening:
    """Set a reader on its way. `stack` holds its feed open; `resumed` is for the metrics: it says that it came back.

    Raises Gone (of shared.errors) when the log is no more, AtEnd when the cursor is the terminal event."""
    opening = await _opening(stack, tail, event_log, order, cursor)
    metrics.READERS_STARTED.labels("yes" if resumed else "no").inc()
    return opening


async def _opening(
    stack: AsyncExitStack, tail: Tail, event_log: EventLog, order: Order, cursor: Position | None
) -> Opening:
    """Find where a reader goes on from, by the cursor table of docs/protocol.md.

    Raises Gone (of shared.errors) when the log is no more, AtEnd when the cursor is the terminal event."""
    feed = None
    if not order.ended:
        feed = await stack.enter_async_context(tail.follow(order))
        order = await event_log.order(order.id) or order  # a fresh start may have come before the subscription stood
    last = await event_log.tail(order.id)
    if last is None:
        raise gone(order)
    newest = (order.fresh, 0) if order.fresh else None
    if cursor is None:
        return await _from_the_start(event_log, Reader(event_log, order, feed, NEVER, None), newest)
    if cursor == last.position and is_terminal(last.data):
        raise AtEnd
    if cursor > last.position and feed is not None and not is_terminal(last.data):
        return Opening(Reader(event_log, order, feed, cursor, last.position), _text(cursor))
    exists = await event_log.entry(order.id, _text(cursor)) is not None
    if exists and (newest is None or cursor >= newest):
        return Opening(Reader(event_log, order, feed, cursor, None), _text(cursor))
    start = just_before(newest) if newest else NEVER
    return Opening(Reader(event_log, order, feed, start, None), _text(newest or (0, 1)))


async def _from_the_start(event_log: EventLog, reader: Reader, newest: Position | None) -> Opening:
    """Entry `0-1`, then from the newest fresh start: what earlier attempts said is void."""
    if newest is not None:
        queued = await event_log.entry(reader.generation_id, "0-1")
        reader.prefix = [queued] if queued else []
        reader.cursor = just_before(newest)
    return Opening(reader, "0-1")


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


class Relay(StreamingResponse):
    """A StreamingResponse with a leaner body: no task group, one small task that waits for the client to leave.

    It owns `stack`, which holds the feed open, from the moment it is called."""

    def __init__(
        self,
        opening: Opening,
        dialect: Dialect,
        stack: AsyncExitStack,
        drain: Drain,
        settings: Settings,
        *,
        headers: dict[str, str],
        greeting: bytes = b"",
    ) -> None:
        super().__init__(_nothing(), media_type=dialect.media_type, headers=headers)
        self._reader = opening.reader
        self._dialect = dialect
        self._stack = stack
        self._watch = Watch(opening.reader, drain)
        self._settings = settings
        self._greeting = greeting
        self._transport: asyncio.Transport | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave it to app.py to `run` this when all that is around a route has returned: for each stream that is open
        the frames of routing, validation and middleware would cost more memory than the stream itself."""
        relaying = scope.get(RELAYING)
        if relaying is None:  # another application around the routes
            await self.run(scope, receive, send)
        else:
            relaying.append(partial(self.run, scope, receive, send))

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay until the end of the log, of the client or of the server."""
        self._transport = scope.get(TRANSPORT)
        async with self._stack:
            _keep_little(scope)
            try:
                async with self._watch.kept(receive):
                    complete = await self._relay(send)
            except (TimeoutError, OSError) as error:  # the client does not take what it was sent, or its socket broke
                complete = False
                metrics.READERS_TIMED_OUT.inc(isinstance(error, TimeoutError))
            if not complete and not self._watch.client_left:
                _abort(scope)

    async def _relay(self, send: Send) -> bool:
        """Until the terminal event, the client's leaving or the server's. True if the body was ended properly."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._greeting:
            await self._send(send, self._greeting)
        while not self._watch.client_left:
            try:
                entries = await self._reader.next(self._settings.ping_seconds)
            except Gone:
                return await self._end(send, Ending.GONE)
            if self._watch.client_left:
                break
            body, ending = self._render(entries)
            is_silent, is_over = not entries, bool(entries) and is_terminal(entries[-1].data)
            del entries  # while a slow client is waited for, its bytes are enough to keep
            if ending is Ending.ABORT:
                if body:
                    await self._send(send, body)
                return False
            if ending is not None or is_over:
                await self._finish(send, body)
                return True
            if body:
                await self._send(send, body)
            if self._watch.is_draining:
                return await self._end(send, Ending.DRAINING)
            if is_silent and (ping := self._dialect.ping()):
                await self._send(send, ping)
        return False

    def _render(self, entries: list[Entry]) -> tuple[bytes, Ending | None]:
        chunks: list[bytes] = []
        for entry in entries:
            for frame in self._dialect.frames(entry):
                if isinstance(frame, Ending):
                    return b"".join(chunks), frame
                chunks.append(self._dialect.encode(frame))
        return b"".join(chunks), None

    async def _end(self, send: Send, ending: Ending) -> bool:
        last_words = self._dialect.ending(ending, jittered(self._settings.retry_milliseconds))
        if last_words is None:
            return False
        await self._finish(send, last_words)
        return True

    async def _send(self, send: Send, body: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": True}
        if self._has_taken_all():  # then nothing is waited for, and a time-out costs as much as the rest
            await send(message)
            return
        async with asyncio.timeout(self._settings.send_timeout_seconds):
            await send(message)

    def _has_taken_all(self) -> bool:
        return self._transport is not None and not self._transport.get_write_buffer_size()

    async def _finish(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(self._settings.send_timeout_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": False})


class Whole(Response):
    """Waits for the end of a log and answers once, with what `build` makes of its snapshot (or of an early ending)."""

    def __init__(
        self, reader: Reader, stack: AsyncExitStack, drain: Drain, build: Callable[[Snapshot | Ending], Response]
    ) -> None:
        super().__init__()
        self._reader = reader
        self._stack = stack
        self._watch = Watch(reader, drain)
        self._build = build

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack, self._watch.kept(receive):
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


def _keep_little(scope: Scope) -> None:
    """Have the server's `send` wait earlier than it would by itself: what a client has not taken stays in the log."""
    transport = scope.get(TRANSPORT)
    if transport is not None:
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SYSTEM_UNSENT_BYTES)


def _abort(scope: Scope) -> None:
    """Break the connection off, so that the client sees that the body is not complete.

    ASGI has no word for it. Closing politely would wait for a client that never reads, so the transport is aborted
    where the server lets us have it; elsewhere an error makes the server close the connection."""
    transport = scope.get(TRANSPORT)
    if transport is None:
        raise ConnectionAbortedError("the stream had to stop before its end")
    transport.abort()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""  # a generator that gives nothing: the relay sends its body itself
