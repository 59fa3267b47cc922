"""Write the logs of all running generations: one writer per process, one append in flight and at most one begun in a
millisecond, everything that gathered meanwhile in the next.

Its rule: a numbered event never changes, and stays in memory until the attempt's end is durable, so that a Redis that
came back without its last writes can be given them again. Knows nothing of providers or of the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared import metrics
from shared.config import MAX_GENERATION_BYTES
from shared.errors import UpstreamError
from shared.event_log import LOG_LOST, Answer, Append, Claim, EventLog
from shared.events import Status
from shared.observability import logger
from shared.redis import TROUBLE
from worker.line import Line

MAX_EVENTS = 256  # of one generation in one append
MAX_BYTES = 256 * 1024  # in one append
MAX_GENERATIONS = 256  # in one append
MAX_PENDING_BYTES = 256 * 1024 * 1024  # not yet in Redis, per process: beyond it the upstreams are paused
MAX_RETAINED_BYTES = 256 * 1024 * 1024  # kept for healing, per process: beyond it what is durable is forgotten
GATHER_SECONDS = 0.001  # from one append to the next: a busy writer gathers, since one for ten costs as one for two
GIVE_UP_SECONDS = 15.0  # how long a worker that lost sight of Redis keeps a paused upstream open

log = logger("writer")


class Lost(Exception):
    """This worker is not the writer any more (`reason` says why): stop, close the upstream, do not retry."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Lane:
    """The attempts that one append can speak for: those with something to say, what wakes the lane's task, and the
    connection that task has for itself."""

    dirty: dict[Attempt, None] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    line: Line = field(default_factory=Line)

    def mark(self, attempt: Attempt) -> None:
        self.dirty[attempt] = None
        self.wake.set()


@dataclass(eq=False)
class Attempt:
    """One run of a generation by this worker: its numbered events, and how far Redis has them."""

    generation_id: str
    epoch: int
    writer: Writer
    lane: Lane
    started_at: float  # monotonic: when the claim was sent
    confirmed_at: float  # monotonic: when the last append that succeeded was sent
    events: list[bytes] = field(default_factory=list)  # those with the seqs base + 1, base + 2, …
    base: int = 0
    acked: int = 0  # the last seq Redis has
    size: int = 0  # bytes of all events of this attempt
    pending: int = 0  # bytes not yet acknowledged
    final: Status | None = None
    lost: str | None = None
    upstream_id: str | None = None  # under which the upstream goes on without this worker, where it would
    on_lost: Callable[[], object] | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last_seq(self) -> int:
        return self.base + len(self.events)

    @property
    def is_settled(self) -> bool:
        return self.acked == self.last_seq

    def put(self, event: bytes, final: Status | None = None) -> None:
        """Number an event and hand it to the writer; `final` is the status a terminal event ends the log with.

        Raises Lost when this worker is not the writer any more, UpstreamError when the answer grows too large."""
        if self.lost:
            raise Lost(self.lost)
        if self.size + len(event) > MAX_GENERATION_BYTES and final is None:
            raise UpstreamError("the answer is larger than Rejoin keeps", code="output_too_large", retryable=False)
        self.events.append(bytes(memoryview(event)))  # a copy: what orjson made lives in a block of 4 KiB and more
        self.size += len(event)
        self.pending += len(event)
        self.final = final
        self.writer.enqueue(self, len(event))

    @property
    def must_wait(self) -> bool:
        """Is it time to stop reading the upstream: too much is unwritten, or the lease may have ended?"""
        return self.lost is not None or self.writer.is_full or self.writer.is_uncertain(self)

    async def ready(self) -> None:
        """Wait until more may be written. Raises Lost."""
        while self.must_wait:
            await self._moves()

    async def settled(self) -> None:
        """Wait until Redis has every event. Raises Lost."""
        while not self.is_settled:
            await self._moves()

    async def _moves(self) -> None:
        if self.lost:
            raise Lost(self.lost)
        self.moved.clear()
        await self.moved.wait()
        if self.lost:
            raise Lost(self.lost)

    def lose(self, reason: str) -> None:
        """The log is somebody else's, or gone: whoever drives the upstream is told."""
        if self.lost is None:
            self.lost = reason
            if not (self.final and self.is_settled):
                metrics.ATTEMPTS_LOST.labels(reason).inc()
            self.moved.set()
            if self.on_lost:
                self.on_lost()

    def next_append(self) -> Append:
        """What Redis does not have yet, within the bounds of one append. Nothing new makes a renewal.

        After the end, the end again: a server that lost it (a replica that was promoted) answers with the gap."""
        if self.final and self.is_settled and self.events:
            return Append(self.generation_id, self.epoch, self.acked, self.events[-1:], self.final)
        start = self.acked - self.base
        end, size = start, 0
        while end < len(self.events) and end - start < MAX_EVENTS and size < MAX_BYTES:
            size += len(self.events[end])
            end += 1
        final = self.final if end == len(self.events) and end > start else None
        return Append(self.generation_id, self.epoch, self.acked + 1, self.events[start:end], final)

    def forget_acked(self) -> int:
        """Drop what Redis has; a gap before it can no longer be healed. Answers the bytes freed."""
        durable = self.acked - self.base
        freed = sum(map(len, self.events[:durable]))
        del self.events[:durable]
        self.base = self.acked
        return freed


class Writer:
    """Group-commits: sends at once when nothing is in flight, else gathers. Of a Redis Cluster each partition is a lane
    of its own, which the others do not wait for; otherwise there is one lane."""

    def __init__(self, event_log: EventLog, lease_seconds: float) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.pending_bytes = 0
        self.retained_bytes = 0
        self._event_log = event_log
        self._lease_seconds = lease_seconds
        self._lanes = {name: Lane() for name in event_log.servers.lanes}
        self._has_paused = False

    @contextmanager
    def open(self, claim: Claim, claimed_at: float) -> Iterator[Attempt]:
        """Begin an attempt; `claimed_at` is the monotonic time at which the claim was sent."""
        lane = self._lanes[self._event_log.lane_of(claim.generation_id)]
        attempt = Attempt(claim.generation_id, claim.epoch, self, lane, claimed_at, claimed_at)
        self.attempts[claim.generation_id] = attempt
        try:
            yield attempt
        finally:
            lane.dirty.pop(attempt, None)
            if self.attempts.get(claim.generation_id) is attempt:
                del self.attempts[claim.generation_id]
            self.pending_bytes -= attempt.pending
            self.retained_bytes -= sum(map(len, attempt.events))
            if self._has_paused and not self.is_full:
                self._wake_paused()

    def enqueue(self, attempt: Attempt, added: int) -> None:
        self.pending_bytes += added
        self.retained_bytes += added
        if self.retained_bytes > MAX_RETAINED_BYTES:
            self.retained_bytes -= attempt.forget_acked()
        self._has_paused = self._has_paused or self.is_full
        attempt.lane.mark(attempt)

    def renew(self, attempt: Attempt) -> None:
        """Have the next append speak for this attempt, even if it has nothing to say."""
        attempt.lane.mark(attempt)

    @property
    def is_full(self) -> bool:
        return self.pending_bytes > MAX_PENDING_BYTES

    def is_uncertain(self, attempt: Attempt) -> bool:
        """Has a whole lease passed, by our own clock, since the last success was sent?"""
        return time.monotonic() - attempt.confirmed_at > self._lease_seconds

    def give_up_blind(self) -> None:
        """Close the upstreams of attempts that have not reached Redis for a lease and `GIVE_UP_SECONDS`."""
        horizon = time.monotonic() - self._lease_seconds - GIVE_UP_SECONDS
        for attempt in list(self.attempts.values()):
            if attempt.confirmed_at < horizon:
                attempt.lose("UNREACHABLE")

    async def run(self) -> None:
        """Append for ever. Redis being away only delays it: what was not acknowledged is sent again."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes.values():
                group.create_task(self._run_lane(lane))

    async def aclose(self) -> None:
        for lane in self._lanes.values():
            await lane.line.aclose()
        await self._event_log.servers.aclose()

    async def _run_lane(self, lane: Lane) -> None:
        patience, began = 0.05, 0.0
        while True:
            await lane.wake.wait()
            lane.wake.clear()
            while lane.dirty:
                if time.monotonic() - began < GATHER_SECONDS:
                    await asyncio.sleep(GATHER_SECONDS)
                batch, began = _next_batch(lane), time.monotonic()
                if not batch:  # who had something to say was closed meanwhile
                    break
                try:
                    await self._commit(batch, lane.line)
                    patience = 0.05
                except TROUBLE as error:
                    metrics.APPENDS_FAILED.inc()
                    log.warning("writer.redis_away", error=type(error).__name__, generations=len(batch))
                    again = (attempt for attempt, _ in batch if self._is_open(attempt))
                    lane.dirty = dict.fromkeys((*again, *lane.dirty))
                    await asyncio.sleep(patience)
                    patience = min(patience * 2, 0.5)

    async def _commit(self, batch: list[tuple[Attempt, Append]], line: Line) -> None:
        sent_at = time.monotonic()
        answers = await self._event_log.append([append for _, append in batch], line.run)
        metrics.APPEND_SECONDS.observe(time.monotonic() - sent_at)
        metrics.EVENTS_APPENDED.inc(
            sum(len(append.events) for (_, append), answer in zip(batch, answers, strict=True) if answer.code == "OK")
        )
        for (attempt, append), answer in zip(batch, answers, strict=True):
            if self._is_open(attempt):
                await self._settle(attempt, append, answer, sent_at)
        if self._has_paused and not self.is_full:
            self._wake_paused()

    async def _settle(self, attempt: Attempt, append: Append, answer: Answer, sent_at: float) -> None:
        match answer.code:
            case "OK":
                attempt.confirmed_at = sent_at
                self._acknowledge(attempt, append.first_seq + len(append.events) - 1)
                if self.is_uncertain(attempt):  # it took longer than a lease: ask again before going on
                    self.renew(attempt)
            case "GAP" if answer.last >= attempt.base:
                metrics.GAPS_HEALED.inc()
                log.info("generation.gap_healed", generation_id=attempt.generation_id, from_seq=answer.last + 1)
                self._acknowledge(attempt, answer.last)
            case "GAP":
                await self._event_log.close(attempt.generation_id, LOG_LOST, held_at=attempt.epoch)
                attempt.lose("LOG_LOST")
            case lost:
                attempt.lose(lost)
        if not attempt.is_settled and not attempt.lost:
            attempt.lane.dirty[attempt] = None
        attempt.moved.set()

    def _acknowledge(self, attempt: Attempt, seq: int) -> None:
        low, high = sorted((attempt.acked - attempt.base, seq - attempt.base))
        moved = sum(map(len, attempt.events[low:high]))
        change = -moved if seq > attempt.acked else moved
        attempt.pending += change
        self.pending_bytes += change
        attempt.acked = seq

    def _is_open(self, attempt: Attempt) -> bool:
        return attempt.lost is None and self.attempts.get(attempt.generation_id) is attempt

    def _wake_paused(self) -> None:
        self._has_paused = False
        for attempt in self.attempts.values():
            attempt.moved.set()


def _next_batch(lane: Lane) -> list[tuple[Attempt, Append]]:
    batch: list[tuple[Attempt, Append]] = []
    size = 0
    while lane.dirty and len(batch) < MAX_GENERATIONS and size < MAX_BYTES:
        attempt = next(iter(lane.dirty))
        del lane.dirty[attempt]
        append = attempt.next_append()
        size += sum(map(len, append.events))
        batch.append((attempt, append))
    return batch
