"""Hints on ARQ's queue: in ARQ's own keys, JSON, one of each generation at a time."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.worker import Worker, func
from hypothesis import given

from shared.event_log import Hint, Order, new_id
from shared.jobs import CLOCK_SKEW_MS, DOORBELL_LENGTH, FUNCTION, Jobs, Listing, deserialize, serialize
from shared.redis import Client, Keys, connect
from tests.processes import Valkey
from tests.proxy import Proxy


@pytest.fixture
async def arq(redis: Client, jobs: Jobs) -> AsyncIterator[ArqRedis]:
    """ARQ's own client, on the connections of the test."""
    yield ArqRedis(
        redis.connection_pool,
        job_serializer=serialize,
        job_deserializer=deserialize,
        default_queue_name=jobs.keys.queue,
    )


async def run_worker(arq: ArqRedis, keys: Keys) -> list[tuple[Any, ...]]:
    """Let a real ARQ worker take all that is queued; what it was told to do."""
    told = []

    async def generate(ctx: dict[Any, Any], *args: Any) -> None:
        told.append(args)

    worker = Worker(
        [func(generate, name=FUNCTION)],  # type: ignore[arg-type]
        redis_pool=arq,
        queue_name=keys.queue,
        job_serializer=serialize,
        job_deserializer=deserialize,
        burst=True,
        handle_signals=False,
        poll_delay=0.01,
        max_tries=1,
        keep_result=0,
    )
    await worker.async_run()
    return told


async def keys_of(redis: Client, generation_id: str) -> set[str]:
    return {key.decode() async for key in redis.scan_iter(f"arq:*{generation_id}*")}


async def queue(jobs: Jobs) -> list[str]:
    return [job_id.decode() for job_id in await jobs.redis.zrange(jobs.keys.queue, 0, -1)]


async def score(jobs: Jobs, hint: Hint) -> float | None:
    return await jobs.redis.zscore(jobs.keys.queue, jobs.keys.hint(hint.generation_id, hint.n))


async def took(jobs: Jobs, *hints: Hint) -> list[Hint]:
    """Those of these hints that could be had."""
    taken = await jobs.take([jobs.keys.hint(hint.generation_id, hint.n) for hint in hints], 10)
    return [hint for hint, score in zip(hints, taken.scores, strict=True) if score is not None]


def new_order(created_at: int = 1) -> Order:
    return Order(new_id(), "t", "demo", "queued", created_at, "continue", 0, None, 1, False, {})


def listing(jobs: Jobs, length: int = 5) -> Listing:
    return Listing(jobs.keys.recent("t"), length, 60)


async def listed(jobs: Jobs) -> list[str]:
    return [one.decode() for one in await jobs.redis.zrange(jobs.keys.recent("t"), 0, -1)]


async def test_a_hint_is_a_job_as_arq_writes_it(jobs: Jobs, arq: ArqRedis) -> None:
    """ARQ's own client reads it back: the function, and ids for arguments."""
    hint = Hint(new_id(), 1790000000000, 1)
    await jobs.send(hint)
    (job,) = await arq.queued_jobs()
    assert (job.function, job.args, job.kwargs) == (FUNCTION, list(hint), {})
    assert job.job_id == jobs.keys.hint(hint.generation_id, 1)
    assert job.score is not None and job.score > 0, "a job with score 0 would never run"


async def test_arqs_own_worker_runs_a_hint_at_once(jobs: Jobs, arq: ArqRedis) -> None:
    """Also on a machine whose clock is behind that of Redis: the score leaves room."""
    hint = Hint(new_id(), 5, 1)
    await jobs.send(hint)
    seconds, _ = await jobs.redis.time()
    written = await score(jobs, hint)
    assert written is not None and abs(int(seconds) * 1000 - CLOCK_SKEW_MS - written) < 5000
    assert await run_worker(arq, jobs.keys) == [tuple(hint)]
    assert await queue(jobs) == []
    assert await keys_of(jobs.redis, hint.generation_id) == set()


async def test_the_next_hint_takes_the_place_of_the_one_before(jobs: Jobs) -> None:
    """Hint n deletes ARQ's keys of n-1, its lock among them, and keeps its score: nobody loses a place in the queue."""
    first, other = Hint(new_id(), 5, 1), Hint(new_id(), 0, 1)
    await jobs.send(first)
    await jobs.redis.zincrby(jobs.keys.queue, -1000, jobs.keys.hint(first.generation_id, 1))
    await jobs.send(other)
    old = jobs.keys.hint(first.generation_id, 1)
    for prefix in (in_progress_key_prefix, retry_key_prefix):
        await jobs.redis.set(prefix + old, 1, px=60_000)
    before = await score(jobs, first)
    second = first._replace(n=2)
    await jobs.send(second)
    assert await queue(jobs) == [jobs.keys.hint(*(second.generation_id, 2)), jobs.keys.hint(other.generation_id, 1)]
    assert await score(jobs, second) == before
    new = jobs.keys.hint(second.generation_id, 2)
    assert await keys_of(jobs.redis, first.generation_id) == {job_key_prefix + new}


async def test_a_hint_after_one_that_was_taken_goes_to_the_end(jobs: Jobs) -> None:
    """There is no place to keep."""
    first, other = Hint(new_id(), 5, 1), Hint(new_id(), 0, 1)
    await jobs.send(first)
    assert await took(jobs, first) == [first]
    await jobs.send(other)
    await jobs.redis.zincrby(jobs.keys.queue, -1000, jobs.keys.hint(other.generation_id, 1))
    await jobs.send(first._replace(n=2))
    assert await jobs.position(first._replace(n=2)) == 1


async def test_a_hint_sent_twice_is_queued_once(jobs: Jobs, arq: ArqRedis) -> None:
    """Every hint may be doubled."""
    hint = Hint(new_id(), 5, 1)
    for _ in range(5):
        await jobs.send(hint)
    assert await jobs.depth() == 1
    assert await run_worker(arq, jobs.keys) == [tuple(hint)]


async def test_position_and_depth_count_what_waits(jobs: Jobs) -> None:
    """Taken, or never sent: no position."""
    hints = [Hint(new_id(), 0, 1) for _ in range(4)]
    for place, hint in enumerate(hints):
        await jobs.send(hint)
        await jobs.redis.zincrby(jobs.keys.queue, place - 1000, jobs.keys.hint(hint.generation_id, 1))
    assert [await jobs.position(hint) for hint in hints] == [0, 1, 2, 3]
    assert await jobs.depth() == 4
    assert await took(jobs, hints[1]) == [hints[1]]
    assert [await jobs.position(hint) for hint in hints] == [0, None, 1, 2]
    assert await jobs.depth() == 3
    assert await jobs.position(Hint(new_id(), 0, 1)) is None


async def test_the_doorbell_is_rung_and_stays_bounded(jobs: Jobs) -> None:
    """One ring for each hint, which it names, at most a hundred unheard."""
    hint = Hint(new_id(), 0, 1)
    await jobs.send(hint)
    assert await jobs.redis.lrange(jobs.keys.doorbell, 0, -1) == [jobs.keys.hint(hint.generation_id, 1).encode()]
    for n in range(2, DOORBELL_LENGTH + 10):
        await jobs.send(hint._replace(n=n))
    assert await jobs.redis.llen(jobs.keys.doorbell) == DOORBELL_LENGTH
    assert await jobs.depth() == 1


async def test_no_prompt_is_on_the_queue(jobs: Jobs) -> None:
    """What is queued is ids and numbers."""
    hint = Hint(new_id(), 5, 1)
    await jobs.send(hint)
    stored = await jobs.redis.get(job_key_prefix + jobs.keys.hint(hint.generation_id, 1))
    job = deserialize(stored)
    assert job.pop("et") > 0
    assert job == {"t": None, "f": FUNCTION, "a": [hint.generation_id, 5, 1], "k": {}}


# --- the first hint of a generation


async def test_the_first_hint_is_announced_rung_and_listed_in_one_step(jobs: Jobs, arq: ArqRedis) -> None:
    """The same job as any other hint; and, sent twice, it changes nothing."""
    order = new_order()
    for _ in range(2):
        assert await jobs.announce(order, listing(jobs), 10)
    assert await listed(jobs) == [order.id]
    assert 0 < await jobs.redis.ttl(jobs.keys.recent("t")) <= 60
    assert set(await jobs.redis.lrange(jobs.keys.doorbell, 0, -1)) == {jobs.keys.hint(order.id, 1).encode()}
    assert await jobs.depth() == 1
    assert await run_worker(arq, jobs.keys) == [(order.id, 0, 1)]


async def test_where_enough_hints_wait_nothing_is_announced(jobs: Jobs) -> None:
    """Not the hint, not the ring, not the list; what was announced before its reply was lost is so still."""
    first, second, third = new_order(1), new_order(2), new_order(3)
    assert await jobs.announce(first, listing(jobs), 1) and not jobs.was_full
    assert not await jobs.announce(second, listing(jobs), 1) and jobs.was_full
    assert await jobs.announce(first, listing(jobs), 1) and not jobs.was_full
    assert await listed(jobs) == [first.id] and await jobs.depth() == 1
    assert await keys_of(jobs.redis, second.id) == set()
    assert jobs.keys.hint(second.id, 1).encode() not in await jobs.redis.lrange(jobs.keys.doorbell, 0, -1)
    assert await jobs.announce(third, listing(jobs), None), "nobody counts"
    await jobs.send(Hint(second.id, 0, 2))
    assert await jobs.depth() == 3, "a hint that is sent again is never refused"


async def test_the_list_keeps_the_newest(jobs: Jobs) -> None:
    """By when they were created, whatever the order in which they are announced."""
    orders = [new_order(created_at) for created_at in (3, 1, 4, 2, 5)]
    for order in orders:
        assert await jobs.announce(order, listing(jobs, length=3), 10)
    newest = sorted(orders, key=lambda order: order.created_at)[-3:]
    assert await listed(jobs) == [order.id for order in newest]


# --- hints are taken


async def test_a_hint_is_taken_once_and_off_the_queue(jobs: Jobs) -> None:
    """Of fifty who would have them all, each hint goes to one; and each is told how many wait on."""
    hints = [Hint(new_id(), 0, 1) for _ in range(4)]
    for hint in hints:
        await jobs.send(hint)
    stranger = Hint(new_id(), 0, 1)
    taken = await asyncio.gather(*(took(jobs, *hints[:3], stranger) for _ in range(50)))
    assert [hint for some in taken for hint in some] == hints[:3]
    assert await queue(jobs) == [jobs.keys.hint(hints[3].generation_id, 1)]
    last = [jobs.keys.hint(hints[3].generation_id, 1)]
    assert (await jobs.take([], 10)).waiting == 1
    assert (await jobs.take(last, 10)).waiting == 0


async def test_what_is_taken_is_under_arqs_lock(jobs: Jobs) -> None:
    """ARQ's own worker, which may have read it off the queue just before, leaves it alone; ours does so, too."""
    hint, locked = Hint(new_id(), 0, 1), Hint(new_id(), 0, 1)
    for one in (hint, locked):
        await jobs.send(one)
    lock = in_progress_key_prefix + jobs.keys.hint(locked.generation_id, 1)
    await jobs.redis.set(lock, b"1", px=60_000)
    assert await took(jobs, hint, locked) == [hint]
    assert 0 < await jobs.redis.pttl(in_progress_key_prefix + jobs.keys.hint(hint.generation_id, 1)) <= 10_000
    assert await queue(jobs) == [jobs.keys.hint(locked.generation_id, 1)]
    await jobs.send(hint)  # sent twice, the second time after it was taken
    assert await took(jobs, hint) == []


async def test_hints_whose_reply_was_lost_are_taken_by_the_same_call_again(jobs: Jobs, server: Valkey) -> None:
    """The connection breaks behind the script: sent again, it answers what it did, and no hint waits for its lease."""
    hints = [Hint(new_id(), 0, 1) for _ in range(3)]
    for hint in hints:
        await jobs.send(hint)
    async with Proxy(server.port) as proxy:
        cut = connect(f"redis://127.0.0.1:{proxy.port}/0", connections=1)
        assert await took(Jobs(cut, jobs.keys)) == []  # the server knows the script
        proxy.drop_replies(to=jobs.keys.queue.encode())
        assert await took(Jobs(cut, jobs.keys), *hints) == hints
        assert proxy.dropped == 1
        await cut.aclose()
    assert await took(jobs, *hints) == []


async def test_a_hint_that_is_not_due_is_left(jobs: Jobs) -> None:
    """A score in the future, as ARQ writes for a job that is put off."""
    hint = Hint(new_id(), 0, 1)
    await jobs.send(hint)
    await jobs.redis.zincrby(jobs.keys.queue, 3 * CLOCK_SKEW_MS, jobs.keys.hint(hint.generation_id, 1))
    assert await took(jobs, hint) == []
    assert await jobs.depth() == 1


# --- what else may be on the queue


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> Any:
        return Path.touch, (self.fuse,)


async def test_a_pickle_bomb_on_the_queue_does_not_go_off(jobs: Jobs, arq: ArqRedis, tmp_path: Path) -> None:
    """It is dropped, and the worker goes on with the next hint."""
    fuse, job_id, hint = tmp_path / "fuse", jobs.keys.hint(new_id(), 1), Hint(new_id(), 5, 1)
    bomb = pickle.dumps(Bomb(fuse))
    pickle.loads(bomb)
    assert fuse.exists(), "the bomb works"
    fuse.unlink()
    await jobs.redis.set(job_key_prefix + job_id, bomb, px=60_000)
    await jobs.redis.zadd(jobs.keys.queue, {job_id: 1})
    await jobs.send(hint)
    assert await run_worker(arq, jobs.keys) == [tuple(hint)]
    assert not fuse.exists()
    assert await queue(jobs) == []


@pytest.mark.parametrize("data", [pickle.dumps({"f": "generate"}), b"", b"{", b"[]", b"1", b'"x"', b"null", b"\xff"])
def test_only_a_json_object_is_a_job(data: bytes) -> None:
    """ARQ logs the ValueError and drops the job."""
    with pytest.raises(ValueError):
        deserialize(data)


@given(st.binary(max_size=64))
def test_no_bytes_do_more_than_a_value_error(data: bytes) -> None:
    """Whatever stands on the queue."""
    with suppress(ValueError):
        assert isinstance(deserialize(data), dict)


def test_a_job_survives_its_json() -> None:
    """What ARQ hands to the serializer comes back."""
    job = {"t": None, "f": FUNCTION, "a": ["0" * 32, 2**53, 1], "k": {}, "et": 1790000000000}
    assert deserialize(serialize(job)) == job
