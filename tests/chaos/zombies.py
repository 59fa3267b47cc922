"""Workers are stopped (SIGSTOP) until others have all their streams, then woken: nothing a zombie says is accepted.

Every word names the hit it was the answer to, so whose words a log holds is read from the log itself.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from shared.redis import Keys
from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import NEVER, Stream, begin, by_worker, end, in_time, p99_under, spread
from tests.processes import Process
from tests.upstream import Request, Script
from tests.waiting import wait_until

CYCLES = 1000  # attempts that were stopped, outlived by another and woken
STREAMS = 40  # at every moment, over all workers
WORKERS = 3
STOPS_A_BATCH = 8  # then the logs are looked at, and new streams are begun
LEASE_SECONDS = 0.4
WORDS_AN_ATTEMPT = 2_000
CLOSED_WITHIN_SECONDS = 1.0
PATIENCE_SECONDS = 20.0
ENV = {"REJOIN_LEASE_SECONDS": str(LEASE_SECONDS), "REJOIN_MAX_ATTEMPTS": "100"}


def script_of_hit(hit: int) -> Script:
    return Script(chunks=tuple(f"{hit} " for _ in range(WORDS_AN_ATTEMPT)), pace_seconds=0.05)


SCRIPTS = tuple(map(script_of_hit, range(1, 100)))


@dataclass
class Seen:
    """What came of all cycles."""

    cycles: int = 0
    stops: int = 0
    closed: list[float] = field(default_factory=list)  # from the waking to the zombie's upstream being closed
    wrong: list[str] = field(default_factory=list)


async def run(say: Say, quick: bool) -> list[Row]:
    seen = Seen()
    cycles = CYCLES // 10 if quick else CYCLES
    async with house(ENV, apis=2, workers=WORKERS) as one, Redis.from_url(one.store.url) as redis:
        batch = 0
        while seen.cycles < cycles:
            batch += 1
            await _batch(one, redis, f"b{batch}", seen, cycles)
            say(f"{seen.cycles} zombies in {seen.stops} stops, {len(seen.wrong)} wrong; closed: {spread(seen.closed)}")
    what = f"entries accepted from {seen.cycles:,} stopped and woken attempts ({seen.stops} stops)"
    return [
        Row("zombies", what, f"{len(seen.wrong)}", "0", not seen.wrong and seen.cycles >= cycles),
        Row("zombies", "waking to the zombie's upstream closed", spread(seen.closed),
            f"p99 < {CLOSED_WITHIN_SECONDS:g} s", p99_under(seen.closed, CLOSED_WITHIN_SECONDS)),
    ]  # fmt: skip


async def _batch(one: House, redis: Redis, name: str, seen: Seen, cycles: int) -> None:
    """Some streams, some stops, then a look at every log."""
    models = [f"{name}-{n}" for n in range(STREAMS)]
    for model in models:
        one.upstream.script(model, *SCRIPTS)
    streams = await begin(one.stack, models.__getitem__, STREAMS)
    for _ in range(STOPS_A_BATCH):
        if seen.cycles < cycles:
            await _stop_and_wake(one, redis, streams, seen)
    await end(one.stack, streams)
    for stream in streams:
        seen.wrong += wrong_entries(stream.id, await _log(redis, stream))


async def _stop_and_wake(one: House, redis: Redis, streams: Sequence[Stream], seen: Seen) -> None:
    held = await by_worker(redis, "chaos", streams)
    pid = max(held, key=lambda pid: len(held[pid]))
    (worker,) = [worker for worker in one.workers if worker.pid == pid]
    worker.signal(signal.SIGSTOP)
    try:
        old = await _attempts_of(one, redis, held[pid])
        await _outlived(redis, old)
        seen.stops += 1
        seen.cycles += len(old)
    finally:
        woken_at = time.monotonic()
        worker.signal(signal.SIGCONT)
    requests = [request for _, request in old.values() if request is not None]
    await in_time(lambda: all(request.closed_at is not None for request in requests), PATIENCE_SECONDS)
    for request in requests:
        seen.closed.append(NEVER if request.closed_at is None else request.closed_at - woken_at)
    await _all_run_again(one, streams, worker)


async def _attempts_of(one: House, redis: Redis, streams: Sequence[Stream]) -> dict[str, tuple[int, Request | None]]:
    """The epoch each of these is in, and the request that is being answered for it."""
    found: dict[str, tuple[int, Request | None]] = {}
    for stream in streams:
        epoch = await _epoch(redis, stream.id)
        requests = one.upstream.requests_of(str(stream.generation["model"]))
        found[stream.id] = epoch, (requests[-1] if requests else None)
    return found


async def _outlived(redis: Redis, old: dict[str, tuple[int, Request | None]]) -> None:
    """Until every one of them has been begun again by another worker."""

    async def all_newer() -> bool:
        return all([await _epoch(redis, id_) > epoch for id_, (epoch, _) in old.items()])

    await wait_until(all_newer, timeout=PATIENCE_SECONDS, every=0.05)


async def _epoch(redis: Redis, generation_id: str) -> int:
    return int(await redis.hget(Keys("chaos").order(generation_id), "epoch"))  # type: ignore[misc]


async def _all_run_again(one: House, streams: Sequence[Stream], woken: Process) -> None:
    """Words come in all streams: the next stop finds attempts that are amid an answer."""
    assert woken.running, woken.log()
    seen = {stream.id: len(stream.reader.blocks) for stream in streams}
    await wait_until(lambda: all(len(stream.reader.blocks) > seen[stream.id] + 1 for stream in streams), timeout=30)


async def _log(redis: Redis, stream: Stream) -> list[tuple[str, str]]:
    """The whole log as it is stored: ids, and the events' JSON."""
    entries = await redis.xrange(Keys("chaos").log(stream.id))
    return [(entry_id.decode(), fields[b"data"].decode()) for entry_id, fields in entries]


def wrong_entries(generation_id: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    """What no fenced log may hold: an entry of an older epoch behind a newer one's start, a hole, words of two hits in
    one epoch, or words of a hit that an earlier epoch had already spoken with."""
    wrong = []
    epoch, seq, hit, hits_before = 0, 0, None, set()
    for entry_id, data in entries:
        now, number = map(int, entry_id.split("-"))
        if now < epoch or (now == epoch and number != seq + 1) or (now > epoch and number != (0 if now else 1)):
            wrong.append(f"{generation_id} {entry_id}: after {epoch}-{seq}")
        if now != epoch:
            hits_before |= {hit} - {None}
            hit = None
        said = re.search(r'"type":"text.delta".*"text":"(\d+) "', data)
        if said:
            if hit not in (None, said[1]) or said[1] in hits_before:
                wrong.append(f"{generation_id} {entry_id}: words of hit {said[1]} in an epoch of hit {hit}")
            hit = hit or said[1]
        epoch, seq = now, number
    if not hits_before:
        wrong.append(f"{generation_id}: no words were found, so nothing was looked at")
    return wrong
