"""The writer: sends at once when idle, gathers when busy, heals what Redis lost, stops when fenced, within bounds."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import fakeredis
import pytest
from redis.exceptions import ConnectionError

from shared.config import MAX_GENERATION_BYTES, Settings
from shared.errors import UpstreamError
from shared.event_log import Answer, Append, Claim, EventLog, Hint, Run, new_id
from shared.events import Cancelled, Completed, TextDelta, encode, fold
from shared.prompt import Message, Prompt
from shared.redis import Client
from tests.waiting import wait_until
from worker import writer as writer_module
from worker.writer import GATHER_SECONDS, Lost, Writer

DONE = encode(Completed("stop"))


class Watched(EventLog):
    """The real log on fakeredis; it counts the appends, can hold them up, and can lose its connection."""

    def __init__(self, redis: Client, settings: Settings) -> None:
        super().__init__(redis, settings)
        self.batches: list[list[Append]] = []
        self.began: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = 0
        self.replies_lost = 0

    async def append(self, appends: Sequence[Append], run: Run | None = None) -> list[Answer]:
        self.batches.append(list(appends))
        self.began.append(time.monotonic())
        await self.gate.wait()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("away")
        answers = await super().append(appends, run)
        if self.replies_lost:
            self.replies_lost -= 1
            raise ConnectionError("the reply was lost")
        return answers


@pytest.fixture
async def log() -> AsyncIterator[Watched]:
    redis = fakeredis.FakeAsyncRedis()
    yield Watched(redis, Settings(_env_file=None, key_prefix="w"))
    await redis.aclose()


@asynccontextmanager
async def running(log: EventLog, lease_seconds: float = 3.0) -> AsyncIterator[Writer]:
    writer = Writer(log, lease_seconds)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def claimed(log: EventLog) -> Claim:
    generation_id = new_id()
    prompt = Prompt(model="demo", messages=[Message(role="user", content="x")])
    await log.create(generation_id, tenant="t", provider="demo", prompt=prompt)
    claim = await log.claim(Hint(generation_id, 0, 1), "nonce")
    assert claim is not None
    return claim


def delta(text: str) -> bytes:
    return encode(TextDelta(text))


async def rewind(log: EventLog, generation_id: str, keep: int) -> None:
    """Redis came back without the newest entries: only the first `keep` are left."""
    key = log.keys.log(generation_id)
    entries = await log.servers.client.xrange(key)
    await log.servers.client.delete(key)
    for entry_id, data in entries[:keep]:
        await log.servers.client.xadd(key, {b"data": data}, id=entry_id)


async def text_of(log: EventLog, claim: Claim) -> str:
    return fold(await log.read(claim.generation_id, count=10_000)).text


async def test_what_gathers_while_an_append_is_in_flight_goes_in_the_next(log: Watched) -> None:
    """The first delta goes alone and at once; the hundred that come meanwhile, of three generations, go in one step."""
    claims = [await claimed(log) for _ in range(3)]
    async with running(log) as writer:
        with (
            writer.open(claims[0], time.monotonic()) as a,
            writer.open(claims[1], time.monotonic()) as b,
            writer.open(claims[2], time.monotonic()) as c,
        ):
            log.gate.clear()
            a.put(delta("first "))
            await wait_until(lambda: len(log.batches) == 1)
            for n in range(33):
                for attempt in (a, b, c):
                    attempt.put(delta(f"{n} "))
            log.gate.set()
            for attempt in (a, b, c):
                await attempt.settled()
            assert [len(one.events) for one in log.batches[0]] == [1]
            assert len(log.batches) == 2 and sorted(len(one.events) for one in log.batches[1]) == [33, 33, 33]
    assert await text_of(log, claims[0]) == "first " + "".join(f"{n} " for n in range(33))


async def test_a_busy_writer_appends_once_a_millisecond(redis: Client, settings: Settings) -> None:
    """Events that come one by one right behind one another share appends; on a real server, which answers sooner."""
    log = Watched(redis, settings)
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            while len(log.began) < 10:
                attempt.put(delta("word "))
                await asyncio.sleep(0)
            await attempt.settled()
    await writer.aclose()
    first, *others = (len(one.events) for (one,) in log.batches)
    assert first < max(others), "the first did not wait for more"
    assert all(later - before >= GATHER_SECONDS for before, later in pairwise(log.began))


async def test_an_attempt_that_is_closed_while_the_writer_gathers(
    log: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to append then, and the writer goes on with the others."""
    monkeypatch.setattr(writer_module, "GATHER_SECONDS", 0.05)
    closed, other = await claimed(log), await claimed(log)
    async with running(log) as writer:
        with writer.open(other, time.monotonic()) as attempt:
            for _ in range(3):
                attempt.put(delta("a "))
                await asyncio.wait_for(attempt.settled(), 5)
                with writer.open(closed, time.monotonic()) as lost:
                    lost.put(delta("b "))
                    await asyncio.sleep(0.01)  # the writer has begun to gather,
                await asyncio.sleep(0.1)  # and has ended
    assert await text_of(log, other) == "a a a "


async def test_an_append_is_bounded(log: Watched) -> None:
    """At most 256 events of a generation go in one append; the rest follows in order."""
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            for n in range(1000):
                attempt.put(delta(f"{n} "))
            await attempt.settled()
    assert max(len(one.events) for batch in log.batches for one in batch) == 256
    assert await text_of(log, claim) == "".join(f"{n} " for n in range(1000))


async def test_lost_connections_and_lost_replies_change_nothing(log: Watched) -> None:
    """What was not acknowledged is sent again, and what had been applied is not doubled."""
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            for n in range(30):
                log.fails, log.replies_lost = n % 3 == 0, n % 3 == 1
                attempt.put(delta(f"{n} "))
                await attempt.settled()
            attempt.put(DONE, "completed")
            log.replies_lost = 1
            await attempt.settled()
    state = fold(await log.read(claim.generation_id))
    assert (state.text, state.status) == ("".join(f"{n} " for n in range(30)), "completed")
    assert writer.pending_bytes == writer.retained_bytes == 0


async def test_a_gap_is_healed_from_memory(log: Watched) -> None:
    """When Redis came back without acknowledged events, they are written again, byte for byte, before the next."""
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            for n in range(20):
                attempt.put(delta(f"{n} "))
            await attempt.settled()
            before = await log.read(claim.generation_id)
            await rewind(log, claim.generation_id, keep=7)
            writer.renew(attempt)  # silence heals too: the heartbeat shows the gap
            await wait_until(lambda: attempt.is_settled and len(log.batches) > 2)
            assert await log.read(claim.generation_id) == before
            await rewind(log, claim.generation_id, keep=2)
            attempt.put(delta("end"))
            attempt.put(DONE, "completed")
            await attempt.settled()
    assert await text_of(log, claim) == "".join(f"{n} " for n in range(20)) + "end"


async def test_a_gap_that_cannot_be_healed_fails_honestly(log: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forgotten for want of memory cannot be written again: the generation ends as `log_lost`."""
    monkeypatch.setattr(writer_module, "MAX_RETAINED_BYTES", 500)
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            for n in range(30):
                attempt.put(delta(f"{n} "))
                await attempt.settled()
            assert attempt.base > 0 and writer.retained_bytes < 1000
            await rewind(log, claim.generation_id, keep=3)
            attempt.put(delta("never"))
            with pytest.raises(Lost, match="LOG_LOST"):
                await attempt.settled()
    state = fold(await log.read(claim.generation_id))
    assert state.status == "failed" and state.error is not None and state.error["code"] == "log_lost"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory in use")
async def test_what_is_kept_for_healing_costs_what_it_says(log: Watched) -> None:
    """Twenty thousand short events take a few megabytes, and not the 4 KiB each that their encoder's buffers took."""
    claim = await claimed(log)
    with Writer(log, 3.0).open(claim, time.monotonic()) as attempt:
        before = resident_bytes()
        for _ in range(20_000):
            attempt.put(delta("word "))
        assert resident_bytes() - before < 20 * 1024 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_a_fenced_attempt_is_told_at_once(log: Watched) -> None:
    """After a cancel, the next append is refused: the driver is called back, and nothing more can be put."""
    claim = await claimed(log)
    called: list[bool] = []
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            attempt.on_lost = lambda: called.append(True)
            await log.close(claim.generation_id, Cancelled("caller"))
            attempt.put(delta("late"))
            with pytest.raises(Lost, match="FENCED"):
                await attempt.settled()
            with pytest.raises(Lost):
                attempt.put(delta("later"))
    assert called == [True]
    assert await text_of(log, claim) == ""


async def test_a_lease_that_may_have_ended_pauses_the_driver(log: Watched) -> None:
    """After a whole lease without success the upstream is not read; the next append decides, and reading goes on."""
    claim = await claimed(log)
    async with running(log, lease_seconds=0.2) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            log.gate.clear()
            attempt.put(delta("a"))
            await wait_until(lambda: attempt.must_wait)
            waiting = asyncio.create_task(attempt.ready())
            log.gate.set()
            await asyncio.wait_for(waiting, 5)
            assert not writer.is_full


async def test_a_worker_blind_for_too_long_gives_up(log: Watched) -> None:
    """Past a lease and the time it may stay paused, the upstream is closed."""
    claim = await claimed(log)
    async with running(log) as writer:
        long_ago = time.monotonic() - 3.0 - writer_module.GIVE_UP_SECONDS - 1
        with writer.open(claim, long_ago) as attempt:
            writer.give_up_blind()
            assert attempt.lost == "UNREACHABLE"


async def test_memory_is_bounded(log: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Redis is away the upstreams are paused at a bound; one answer has a bound of its own."""
    monkeypatch.setattr(writer_module, "MAX_PENDING_BYTES", 10_000)
    claim = await claimed(log)
    async with running(log) as writer:
        with writer.open(claim, time.monotonic()) as attempt:
            log.gate.clear()
            while not attempt.must_wait:
                attempt.put(delta("x" * 100))
            assert 10_000 < writer.pending_bytes < 11_000
            log.gate.set()
            await attempt.ready()
            with pytest.raises(UpstreamError) as too_large:
                for _ in range(MAX_GENERATION_BYTES // 100_000 + 1):
                    attempt.put(delta("x" * 100_000))
            assert too_large.value.code == "output_too_large"
            attempt.put(DONE, "completed")  # its end can always be said
    assert writer.pending_bytes == 0
