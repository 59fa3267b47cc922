"""One subscription connection per api process, gaps filled from the log, fanned out to every reader in memory.

The log is the data, a push is a copy of it. Each push says which entry it follows, so a missed one is seen at once and
read from the log. A reader is a cursor: it takes what follows it from the feed's window, or from the log when it fell
behind. Nothing here grows with a slow reader. Knows nothing of HTTP or of what the events say.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection

from shared import metrics
from shared.cluster import Servers
from shared.event_log import PAGE, EventLog, Order
from shared.events import Entry, Position, format_id, is_terminal, parse_id
from shared.observability import logger
from shared.redis import COMMAND_TIMEOUT_SECONDS, TROUBLE, Replies

WINDOW = 256  # entries of a log kept in memory for readers that fall behind a little
LOOK_SECONDS = 2.0  # how often a silent log is looked at: a lost last push, an expired key, a flushed server
PING_AFTER_SECONDS = 1.0  # of silence on the subscription
DEAD_AFTER_SECONDS = 2.5  # looked at twice a second: given up within 3 s
SUBSCRIBE_SECONDS = 10.0  # that Redis has to take a subscription
AWAY_TRIES = 100  # a tenth of a second each, before a reader that waits for Redis is pinged
FIRST_PAGE = 32  # entries a reader asks the log for; twice as many each time, while they are thin
MAX_BATCH_BYTES = 16 * 1024  # of events given to a reader at once: what one that never reads costs, a few times over
NEVER: Position = (0, 0)  # before the first entry of any log, `0-1`
LAST_SEQ = 2**63 - 1
log = logger("tail")


class Gone(Exception):
    """The log is not there any more."""


def just_before(position: Position) -> Position:
    """The cursor of a reader that is to see `position` next."""
    epoch, seq = position
    return (epoch, seq - 1) if seq > 0 else (epoch - 1, LAST_SEQ)


class Feed:
    """What this process knows of one log while somebody reads it: its newest entries, in order, without a gap."""

    __slots__ = (
        *("acknowledged", "floor", "generation_id", "has_ended", "heard_at", "is_gone", "last", "readers"),
        *("_event_log", "_filling", "_last_id", "_target", "_window"),
    )

    def __init__(self, generation_id: str, event_log: EventLog) -> None:
        self.generation_id = generation_id
        self.readers: set[Reader] = set()
        self.acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last: Position | None = None  # the newest entry known; None until the log was looked at
        self.floor: Position = NEVER  # the window holds all that follows this
        self.has_ended = False
        self.is_gone = False
        self.heard_at = time.monotonic()
        self._event_log = event_log
        self._last_id = b""  # of `last`, where it came in a push: two equal ids need not be read
        self._window: deque[tuple[Position, Entry]] | None = None  # for readers that are not told at once
        self._target: Position | None = None  # an entry somebody told of that is not in the window yet
        self._filling: asyncio.Task[None] | None = None

    def prime(self, tail: Entry) -> None:
        """Take where the log was seen to end after the subscription stood: from here on nothing is missed."""
        if self.last is None:
            self.floor = self.last = tail.position
            self.has_ended = is_terminal(tail.data)
        if self._target is not None and self._target > self.last:
            self.fill(self._target)

    def push(self, previous: bytes, entries: list[Entry]) -> list[Entry]:
        """Take a push, without telling the readers: what follows directly is kept, a hole is filled from the log.
        Answers what of it was new."""
        self.heard_at = time.monotonic()
        if self.last is None:
            self._target = entries[-1].position
        elif previous == self._last_id or parse_id(previous) <= self.last:
            return self._extend(entries)
        else:
            self.fill(entries[-1].position)
        return []

    def fill(self, target: Position) -> None:
        """Read from the log up to `target`; at most one read is in flight, later calls only raise its target."""
        if self._target is None or target > self._target:
            self._target = target
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        while self.last is not None and self._target is not None and self._target > self.last:
            target = self._target
            try:
                entries = await self._event_log.read(self.generation_id, format_id(self.last).decode())
                if not entries and await self._event_log.tail(self.generation_id) is None:
                    self.go()
            except TROUBLE:
                await asyncio.sleep(0.1)
                continue
            self.tell(self._extend(entries))
            metrics.HOLES_FILLED.inc(bool(entries))
            if not entries and self._target == target:
                self._target = None  # the log ends earlier than we were told: its writer will heal it

    def _extend(self, entries: Iterable[Entry]) -> list[Entry]:
        assert self.last is not None
        is_any_behind = None in [reader.on_news for reader in self.readers]
        window = (self._window or deque()) if is_any_behind else None
        new: list[Entry] = []
        for entry in entries:
            position = entry.position
            if position > self.last:
                if window is not None:
                    window.append((position, entry))
                new.append(entry)
                self.last, self._last_id = position, entry.id
                self.has_ended = is_terminal(entry.data)
        self._keep(window)
        return new

    def _keep(self, window: deque[tuple[Position, Entry]] | None) -> None:
        """Nothing where every reader is told at once: a window for each stream is what would take the most memory."""
        self._window = window
        if window is None:
            assert self.last is not None
            self.floor = self.last
        else:
            while len(window) > WINDOW:
                self.floor = window.popleft()[0]

    def following(self, cursor: Position) -> list[Entry] | None:
        """What follows a cursor, from memory; None when the window does not reach back that far."""
        if cursor < self.floor or self.last is None:
            return None
        found: list[Entry] = []
        for position, entry in reversed(self._window or ()):
            if position <= cursor:
                break
            found.append(entry)
        found.reverse()
        return found

    def go(self) -> None:
        """The log is no more."""
        self.is_gone = True
        self.tell([])

    def tell(self, entries: list[Entry]) -> None:
        """Tell every reader what is new; of nothing, that the log is gone, or its end not where it was thought."""
        for reader in tuple(self.readers):
            reader.hear(entries)

    def close(self) -> None:
        if self._filling is not None:
            self._filling.cancel()


class Reader:
    """One cursor on one log; `aclose` ends it. `next` waits for what follows; while it `is_level` with the log, it
    may have `on_news` told instead. A log that has ended has no feed: it is read page by page."""

    __slots__ = (
        *("__weakref__", "ahead_of", "cursor", "event_log", "feed", "generation_id", "is_attending", "on_news"),
        *("page", "prefix", "_page_size", "_tail", "_waiter", "_woken"),
    )

    def __init__(self, tail: Tail, order: Order) -> None:
        self.generation_id = order.id
        self.event_log = tail.event_log
        self.feed: Feed | None = None
        self.cursor: Position = NEVER
        self.prefix: list[Entry] = []  # given first: entry 0-1 for a reader that then skips void attempts
        self.page: list[Entry] = []  # what follows the cursor, where it was read already
        self.ahead_of: Position | None = None  # the tail at the time our cursor was ahead of it
        # Told what is new while this is level with the log and nobody is in `next`. False: `next` shall give it.
        self.on_news: Callable[[list[Entry]], bool] | None = None
        self.is_attending = False
        self._tail = tail
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._page_size = FIRST_PAGE

    async def next(self, timeout_seconds: float) -> list[Entry]:
        """The entries that follow, in order, at once if there are any; empty after the time-out or a `wake`.

        Raises Gone when the log is no more."""
        if self.prefix:
            entries, self.prefix = self.prefix, []
            return entries
        entries = await self._look()
        if not entries and not self._woken:
            await self._wait(timeout_seconds)
            entries = await self._look()
        self._woken = False
        if entries:
            self.cursor = entries[-1].position
        return entries

    @property
    def is_level(self) -> bool:
        """Has it given all there is, so that the feed will tell when there is more?"""
        feed = self.feed
        if feed is None or feed.is_gone or feed.last is None or self.ahead_of is not None or self._woken:
            return False
        return self.cursor == feed.last and not self.prefix and not self.page

    def hear(self, entries: list[Entry]) -> None:
        """The feed has something new. `on_news` is only set while this is level with the feed."""
        if self._waiter is not None:
            _finish(self._waiter)
        elif self.on_news is not None:
            if len(entries) > 1 and sum([len(entry.data) for entry in entries]) > MAX_BATCH_BYTES:
                entries = []  # to be read from the log, bit by bit
            if not self.on_news(entries):
                self.page = entries
            elif entries:
                self.cursor = entries[-1].position

    def wake(self) -> None:
        """Have `next` return now: the client has gone, or the server is going."""
        self._woken = True
        if self._waiter is not None:
            _finish(self._waiter)

    async def aclose(self) -> None:
        """Read no more; the last reader of a log ends its feed."""
        await self._tail.leave(self)

    async def _look(self) -> list[Entry]:
        feed = self.feed
        if feed is None or self.page:
            return await self._read()
        if self.ahead_of is not None:
            await self._mind_being_ahead(feed)
        kept = feed.following(self.cursor)
        found = await self._read() if kept is None else _batch(kept)
        if not found and feed.is_gone:
            raise Gone
        return found

    async def _read(self) -> list[Entry]:
        """A page of the log. Empty, too, when woken, or when Redis has been away for a while: the client is pinged."""
        after = "-" if self.cursor == NEVER else format_id(self.cursor).decode()
        for _ in range(AWAY_TRIES):
            try:
                page, self.page = self.page, []
                page = page or await self.event_log.read(self.generation_id, after, self._page_size)
                if not page and self.feed is None:  # it had ended, so there is more to read, or it expired
                    raise Gone
                batch = _batch(page)
                self.page = page[len(batch) :]
                self._page_size = len(batch) if self.page else min(PAGE, 2 * self._page_size)
                return batch
            except TROUBLE:
                await asyncio.sleep(0.1)
            if self._woken:
                break
        return []

    async def _mind_being_ahead(self, feed: Feed) -> None:
        """Our cursor was ahead of the tail. Either the writer heals the log up to it, or another epoch or the end comes
        first, and what we have is void: then go on from the newest fresh start."""
        assert self.ahead_of is not None and feed.last is not None
        epoch = self.cursor[0]
        if feed.last[0] == epoch and feed.last >= self.cursor:
            self.ahead_of = None
        elif feed.has_ended or feed.last[0] not in (epoch, self.ahead_of[0]):
            order = await self.event_log.order(self.generation_id)
            self.cursor = just_before((order.fresh, 0)) if order and order.fresh else NEVER
            self.ahead_of = None

    async def _wait(self, timeout_seconds: float) -> None:
        if self.feed is None:  # an ended log of which Redis gives nothing at the moment
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_seconds, _finish, self._waiter)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None


class Tail:
    """All feeds of this process over one subscription connection. `run` owns its tasks until cancelled."""

    def __init__(self, subscriber: Servers, event_log: EventLog, disconnect_grace_seconds: float) -> None:
        self.event_log = event_log
        self._subscriber = subscriber
        self._grace_seconds = disconnect_grace_seconds
        self._feeds: dict[bytes, Feed] = {}  # by the id as it stands in the channel's name
        self._attended: Counter[str] = Counter()
        self._strays: set[str] = set()  # subscribed, and nobody reads them
        self._connection: AbstractConnection | None = None
        self._heard_at = 0.0
        self._prefix = len(event_log.keys.push(""))

    async def follow(self, reader: Reader, order: Order) -> None:
        """Give a reader the feed of its log, subscribed; what it finds in the log from here on, it can `prime` it with.

        Raises redis' errors while Redis is away. Whatever is raised, the reader is to be closed."""
        feed = self._feeds.get(order.id.encode())
        is_new = feed is None
        if feed is None:
            feed = self._feeds[order.id.encode()] = Feed(order.id, self.event_log)
        reader.feed = feed
        feed.readers.add(reader)
        if is_new:
            await self._subscribe("SUBSCRIBE", [order.id])
        if order.on_disconnect == "cancel":
            reader.is_attending = True
            self._attended[order.id] += 1
            await self._attend_now([order.id])
        if not feed.acknowledged.done():
            await asyncio.wait([feed.acknowledged], timeout=SUBSCRIBE_SECONDS)
            if not feed.acknowledged.done():
                raise TimeoutError("Redis does not take the subscription")

    async def leave(self, reader: Reader) -> None:
        """A reader has gone; harmless a second time."""
        feed, reader.feed = reader.feed, None
        if feed is None:
            return
        feed.readers.discard(reader)
        self._attended[feed.generation_id] -= reader.is_attending
        if self._attended[feed.generation_id] <= 0:
            del self._attended[feed.generation_id]
        if not feed.readers:
            del self._feeds[feed.generation_id.encode()]
            feed.close()
            await asyncio.shield(self._unsubscribe(feed.generation_id))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen_forever())
            group.create_task(self._watch_connection())
            group.create_task(self._look_at_silent_logs())
            group.create_task(self._attend())

    async def _subscribe(self, command: str, generation_ids: list[str]) -> None:
        """Tell Redis; while the connection is down there is nobody to tell: all are subscribed when it is back."""
        connection = self._connection
        if connection is None or not generation_ids:
            return
        try:
            await connection.send_command(command, *map(self.event_log.keys.push, generation_ids), check_health=False)
        except TROUBLE:
            await connection.disconnect(nowait=True)

    async def _unsubscribe(self, generation_id: str) -> None:
        if generation_id.encode() not in self._feeds:  # somebody may have come as the last reader left
            await self._subscribe("UNSUBSCRIBE", [generation_id])

    async def _listen_forever(self) -> None:
        while True:
            connection: AbstractConnection | None = None
            try:
                client, *_ = await self._subscriber.all()  # a Cluster passes on to each node what one of them is told
                connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
                async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):  # a peer may accept and say nothing
                    await connection.connect()
                metrics.TAIL_CONNECTIONS.inc()
                await self._listen(connection)
            except TROUBLE as error:
                self._subscriber.doubt(error)
                log.warning("tail.redis_away", error=type(error).__name__, feeds=len(self._feeds))
            finally:
                self._connection = None
                if connection is not None:
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _listen(self, connection: AbstractConnection) -> None:
        self._connection, self._heard_at = connection, time.monotonic()
        ids = [feed.generation_id for feed in self._feeds.values()]
        for start in range(0, len(ids), 500):
            await self._subscribe("SUBSCRIBE", ids[start : start + 500])
        await Replies(connection, self._take).ended

    def _take(self, replies: list[Any]) -> None:
        """All that one read brought: the events of one log that came together go out together."""
        self._heard_at = time.monotonic()
        news: dict[Feed, list[Entry]] = {}
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
            if reply[0] == b"message":
                self._dispatch(reply[1], reply[2], news)
            elif reply[0] == b"subscribe":
                self._acknowledge(reply[1][self._prefix :])
        for feed, entries in news.items():
            feed.tell(entries)

    def _dispatch(self, channel: bytes, payload: bytes, news: dict[Feed, list[Entry]]) -> None:
        generation_id = channel[self._prefix :]
        feed = self._feeds.get(generation_id)
        if feed is None:
            return
        head, _, lines = payload.partition(b"\n")
        said_id, _, previous = head.partition(b" ")
        if said_id != generation_id:
            log.error("tail.foreign_push", generation_id=feed.generation_id)
            return
        new = feed.push(previous, [Entry(*line.split(b" ", 1)) for line in lines.split(b"\n")])
        if feed in news:
            news[feed] += new
        elif new:
            news[feed] = new

    def _acknowledge(self, generation_id: bytes) -> None:
        feed = self._feeds.get(generation_id)
        if feed is None:  # it was subscribed again as its last reader left
            self._strays.add(generation_id.decode())
        elif feed.acknowledged.done():  # subscribed again after a cut: read what was missed
            feed.fill((2**62, 0))
        else:
            feed.acknowledged.set_result(None)

    async def _watch_connection(self) -> None:
        """A connection that says nothing is asked; one that does not answer is given up."""
        while True:
            await asyncio.sleep(PING_AFTER_SECONDS / 2)
            connection, silent = self._connection, time.monotonic() - self._heard_at
            if connection is None:
                continue
            while self._strays:
                await self._unsubscribe(self._strays.pop())
            try:
                if silent > DEAD_AFTER_SECONDS:
                    await connection.disconnect(nowait=True)
                elif silent > PING_AFTER_SECONDS:
                    await connection.send_command("PING", check_health=False)
            except TROUBLE:
                await connection.disconnect(nowait=True)

    async def _look_at_silent_logs(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS / 2)
            horizon = time.monotonic() - LOOK_SECONDS
            silent = [feed for feed in self._feeds.values() if feed.heard_at < horizon and feed.last is not None]
            for lane in self.event_log.servers.lanes:  # a node of a Cluster that is away keeps nobody from the others
                with suppress(*TROUBLE):
                    await self._look_at([feed for feed in silent if feed.generation_id[-1] in lane])

    async def _look_at(self, feeds: list[Feed]) -> None:
        tails = [
            tail
            for start in range(0, len(feeds), 200)
            for tail in await self.event_log.tails([feed.generation_id for feed in feeds[start : start + 200]])
        ]
        for feed, tail in zip(feeds, tails, strict=True):
            if tail is None:
                feed.go()
                continue
            feed.heard_at = time.monotonic()
            if feed.last is not None and tail > feed.last:
                feed.fill(tail)

    async def _attend(self) -> None:
        pause = self._grace_seconds / 3
        while True:
            await asyncio.sleep(pause)
            pause = self._grace_seconds / 3
            if not await self._attend_now(list(+self._attended)):
                pause = min(pause, 0.2)  # say it as soon as Redis is back: the grace time does not wait

    async def _attend_now(self, generation_ids: list[str]) -> bool:
        try:
            await self.event_log.attend(generation_ids)
            return True
        except TROUBLE as error:
            log.warning("attend.delayed", error=type(error).__name__)
            return False


def _batch(entries: list[Entry]) -> list[Entry]:
    """What one send may hold: the first of these, up to so many bytes."""
    size = 0
    for n, entry in enumerate(entries, 1):
        size += len(entry.data)
        if size >= MAX_BATCH_BYTES:
            return entries[:n]
    return entries


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
